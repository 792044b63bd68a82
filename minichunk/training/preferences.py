"""What `--objective` trains on: two answers compared by losses.py, by a reference and measured; or a teacher.

The reference is the model as it is before the first step: it runs once, needs no second model, and what it says of the
answers is all that a run keeps of it.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..batch import IGNORE, Batch, ChunkLoss
from ..chunks import Chunk, Documents, span
from ..errors import InputError
from ..files.documents import Pair, collate, step_documents
from ..losses import divergence, dpo, ipo, kto, log_probs, means, orpo, simpo
from ..losses import pairs as halves
from ..models.lora import without_dropout
from ..models.stack import Stack
from ..protocol import Options
from .options import TrainOptions

FREE = ("simpo", "orpo")  # of a reference


class Compared:
    """The objective of a batch of pairs, which keeps the log-probabilities that it is given.

    reference: what `score_pairs` found; SimPO and ORPO have none. KTO compares with how far the model goes for other
    prompts' answers, on average over the batch. labels: (B, T), all first answers before all second.
    """

    def __init__(
        self, options: TrainOptions, pairs: Sequence[Pair], labels: Tensor, reference: Mapping[str, Tensor]
    ) -> None:
        self.options, self.kind, self.beta, self.labels = options, str(options.objective), options.beta or 0.1, labels
        self.reference = gathered({} if self.kind in FREE else reference, pairs, labels)
        self.desirable = torch.tensor([pair.desirable for pair in pairs], device=labels.device)

    def __call__(self, log_probs: Tensor) -> Tensor:
        self.away, size = log_probs.detach() - self.reference, len(self.desirable)
        if self.kind == "kto":
            kl, weights = self.away[size:].sum(1).mean().clamp(min=0), (self.options.desirable_weight, 1.0)
            return kto(self.reference[:size], self.desirable, kl, self.beta, weights)(log_probs[:size])
        objectives = {
            "dpo": dpo(self.reference, self.beta), "ipo": ipo(self.labels, self.reference, self.beta),
            "simpo": simpo(self.labels, self.beta, self.options.gamma), "orpo": orpo(self.labels, self.beta),
        }  # fmt: skip
        return objectives[self.kind](log_probs)

    def measures(self) -> list[float]:
        """The batch's mean rewards, of chosen and of rejected answers, and the part that is right; NaN of none.

        A reward is β times the answer's log-probability over the reference's, or its mean over tokens where the loss
        has that. Right is a chosen answer that has more than the rejected one; of KTO's, a reward of the label's sign.
        """
        away = self.away.sum(1) if self.kind in ("dpo", "kto") else means(self.away, self.labels)
        chosen, rejected = halves(self.beta * away)
        right = chosen > rejected
        if self.kind == "kto":
            right = (chosen > 0) == self.desirable
            chosen, rejected = chosen[self.desirable], chosen[~self.desirable]
        return [float(rows.double().mean()) for rows in (chosen, rejected, right)]


def averages(measures: Sequence[Sequence[float]]) -> dict[str, float]:
    """Over batches, those of `Compared.measures` and their margin, as far as there are any."""
    if not measures or not measures[0]:
        return {}
    chosen, rejected, right = torch.tensor(measures, dtype=torch.float64).nanmean(0).tolist()
    named = {"reward_chosen": chosen, "reward_rejected": rejected, "margin": chosen - rejected, "accuracy": right}
    return {name: x for name, x in named.items() if x == x}


def shares_prompts(model: Any, options: TrainOptions) -> bool:
    """Whether a pair's prompt runs once: in chunks, unless layers or rope of the model refuse it; see tree.py."""
    if options.method == "full" or not isinstance(model, Stack):
        return False
    return takes(model, Documents((0, 1), 1))


def takes(model: Any, documents: Documents) -> bool:
    """Whether layers and rope of the model take such a row."""
    if not getattr(model, "takes_documents", False):
        return False
    with suppress(InputError):
        model.new_memory(1, 2, (), Options(documents=documents))
        if isinstance(model, Stack):  # of other models' ropes nothing is known before they run
            model.shared(model.like, torch.arange(2, device=model.like.device), None)
        return True
    return False


@torch.no_grad()
def score_pairs(model: Stack, pairs: Sequence[Pair], options: TrainOptions, title: str) -> dict[str, Tensor]:
    """The log-probabilities of each row's labels, float (labels) on the CPU, by pair and row. title: of a bar.

    Pair by pair, in the chunks that a step has: of a step with one pair in a batch they are the same to the last bit.
    """
    size = options.seq_len if options.method == "full" else options.chunk_size
    how: Any = {"fill_size": options.fill_size, "share": shares_prompts(model, options)}
    found = dict[str, Tensor]()
    with without_dropout(model):
        for pair in tqdm(pairs, title, unit="pair", leave=False):
            input_ids, labels = collate([pair], next(model.parameters()).device)
            scores = log_probs(model, input_ids, labels, size, **how)
            found |= {f"{pair.name}, row {i}": scores[i][labels[i] != IGNORE].cpu() for i in (0, 1)}
    return found


def score_reference(model: Stack, training: Sequence[Pair], held: Sequence[Pair], options: TrainOptions) -> Any:
    """`score_pairs` of what is held out and of what the run's steps take; nothing for a loss without a reference."""
    if options.objective in FREE:
        return {}
    size = options.batch_size * options.accumulate
    steps = (step_documents(training, size, step, options.seed) for step in range(options.steps))
    return score_pairs(model, [*{pair.name: pair for pair in chain(held, *steps)}.values()], options, "reference")


def gathered(known: Mapping[str, Tensor], pairs: Sequence[Pair], labels: Tensor) -> Tensor:
    """What `score_pairs` found, as `log_probs` would return it for a batch with these labels (B, T); 0 of nothing."""
    if not known:
        return torch.zeros(labels.shape, device=labels.device)
    rows = torch.cat([known[f"{pair.name}, row {i}"] for i in (0, 1) for pair in pairs]).to(labels.device)
    return torch.zeros(labels.shape, dtype=rows.dtype, device=rows.device).masked_scatter(labels != IGNORE, rows)


def measure_pairs(
    model: Stack, pairs: Sequence[Pair], options: TrainOptions, reference: Mapping[str, Tensor], title: str
) -> dict[str, float]:
    """Mean loss of held-out pairs, and their `averages`."""
    losses, measures, now = [], [], score_pairs(model, pairs, options, title)
    for pair in pairs:
        compared = Compared(options, [pair], labels := collate([pair])[1], reference)
        losses.append(float(compared(gathered(now, [pair], labels))))
        measures.append(compared.measures())
    return {"loss": sum(losses) / len(losses), **averages(measures)} if losses else {}


def distillation(teacher: Stack, model: Any, batch: Batch, chunk_size: int) -> ChunkLoss:
    """`losses.divergence` from the teacher, summed over the batch's targets.

    The teacher runs here, chunk by chunk; its last hidden states are kept, and nothing else of it.
    """
    hidden = torch.cat([x for _, x in teacher.run_chunks(batch.input_ids, None, chunk_size)], 1)

    def chunk_loss(of_model: Tensor, chunk: Chunk) -> Tensor:
        of_teacher, part = hidden[:, span([chunk])], batch.part([chunk])
        summed = divergence(of_model, model.lm_head.weight, of_teacher, teacher.lm_head.weight, part.labelled)
        return summed / batch.num_targets

    return chunk_loss
