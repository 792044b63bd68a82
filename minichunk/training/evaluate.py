"""Loss by position: how well a model predicts, near the start of a document and far into it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from tqdm import tqdm

from ..batch import IGNORE, shift
from ..files.chat import load_chat_template
from ..files.documents import Document, collate
from ..files.shipped import MEASURED_ON, SHIPPED_MODEL, novel
from ..models.partial import describe
from ..models.stack import Stack
from .load import load_as_told, read_pieces
from .loop import Ranks
from .options import ReadOptions, check_options, option


@dataclass(frozen=True)
class Span:
    """Mean loss in nats per token of the targets predicted at positions `start` to `stop`."""

    start: int
    stop: int
    loss: float


@torch.no_grad()
def loss_by_position(
    model: Stack, documents: Sequence[Document], chunk_size: int, spans: Sequence[tuple[int, int]], title: str = ""
) -> list[Span]:
    """Mean loss over the documents for each span of positions; spans without a target are left out.

    Runs chunk by chunk over the cache, so that a length that can be trained can be evaluated.
    model: or a `PipelineStage`, on all processes; the copies of a pipeline share the documents.
    title: of a progress bar; empty for none.
    """
    ranks, was_training = Ranks(model), model.training
    sums = torch.zeros(2, max(map(len, documents), default=1), dtype=torch.float64)  # losses; targets
    model.eval()
    hidden = not title or not ranks.is_first
    for _, document in tqdm(ranks.mine(documents), title, unit="document", leave=False, disable=hidden):
        input_ids, labels = collate([document], model.like.device)
        targets = shift(labels)
        for rows, losses in model.chunk_losses(input_ids, targets, chunk_size):
            sums[:, rows] += torch.stack([losses[0], targets[0, rows] != IGNORE]).double().cpu()
    model.train(was_training)
    ranks.add(sums)
    totals = [(start, stop, *sums[:, start:stop].sum(1).tolist()) for start, stop in spans]
    return [Span(start, stop, total / count) for start, stop, total, count in totals if count]


def spans_for(context: int, length: int) -> list[tuple[int, int]]:
    """The old context, then doublings beyond it, up to `length`; halvings where all is inside it."""
    if length <= context:
        return list(pairwise([0, *(part for shifted in (3, 2, 1) if (part := length >> shifted)), length]))
    edges = [0, context]
    while edges[-1] < length:
        edges.append(min(edges[-1] * 2, length))
    return list(pairwise(edges))


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ReadOptions):
    """Measure the loss by position: how well a model predicts texts, near their start and far into them.

    Cuts the texts into pieces of at most --seq-len tokens and prints the mean loss, in nats per token,
    for each span of positions: inside the length that the model was made for, and beyond it.

      minichunk evaluate
      minichunk evaluate --model DIR --data heldout.txt --seq-len 16384 --adapter runs/1/adapter

    DIR and FILE are as `minichunk train` takes them: of a JSONL line, what would be learnt is measured.
    """

    data: tuple[str, ...] = option((), "text or JSONL files", metavar="FILE", absent="a shipped novel", group="texts")
    seq_len: int = option(2048, "tokens per piece", least=2)
    documents: int = option(8, "pieces, the longest", least=1)
    chunk_size: int = option(512, "tokens per forward pass: costs memory, changes no result", least=1)


def evaluate_files(options: EvaluateOptions) -> None:
    """`minichunk evaluate`: print the loss by position. Raises InputError before anything is measured."""
    check_options(options)
    chat = load_chat_template(options.model or SHIPPED_MODEL)
    model, tokenizer = load_as_told(options)
    pieces, line = read_pieces(options.data or [novel(MEASURED_ON)], model, tokenizer, chat, options.seq_len)
    pieces = sorted(pieces, key=len, reverse=True)[: options.documents]
    spans = spans_for(model.config.max_position_embeddings, len(pieces[0]))
    losses = loss_by_position(model, pieces, options.chunk_size, spans, "evaluate")
    if seen := describe(model.config):
        print(f"seen of the past: {seen}")
    print(f"{line}\n\nmean loss, nats per token ({len(pieces)} documents)")
    for span in losses:
        print(f"{f'{span.start:,} to {span.stop:,}':18} {span.loss:7.3f}")
