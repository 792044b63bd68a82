"""Preference and reward losses for `seco(..., objective=...)`, as their papers have them and TRL computes them.

Each function here but `divergence` returns an objective. Rows of pairs are as in TRL: the first half of the batch has
the chosen answers, the second half, in the same order, the rejected ones. What is given beside them:

labels: int64 (B, T), those of the step: -100 at prompts, at padding and where documents begin. reference, old: (B, T),
`log_probs` of the reference and of the policy that wrote the answers, with the same labels, chunk size and fill size.
Below l is a log-probability, r its reference, σ the logistic function, and Σ and mean go over the tokens of an answer.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .batch import IGNORE, Objective, lay_out
from .chunks import check_fill_size, cut
from .errors import InputError
from .loss import TILE_ELEMENTS, logits_of, rows_of
from .objective import score
from .protocol import Model, Options


def log_probs(
    model: Model, input_ids: Tensor, labels: Tensor, chunk_size: int, *, fill_size: int | None = None,
    positions: Tensor | None = None, starts: Sequence[int] = (), share: bool = False,
) -> Tensor:  # fmt: skip
    """The log-probability of each label at the label's own position, 0 where there is none and at the first one.

    input_ids, labels, positions: int64 (B, T); starts; share: see `seco`.
    Returns (B, T), in float32 or in the model's dtype where that is wider, without a graph: what an objective of `seco`
    is given, to the last bit if chunk_size, fill_size and share are the same, as they are to be for a reference.
    Raises InputError for a batch or a size that does not fit.
    """
    check_fill_size(fill_size, chunk_size)
    vocab_size = model.lm_head.weight.shape[0]
    batch = lay_out(model, vocab_size, input_ids, labels, 1, positions, starts, share, chunk_size)
    (B, T), documents = batch.input_ids.shape, batch.documents
    chunks, seed = cut(T, chunk_size, documents), model.dropout_seed()
    options = Options(fill_size, dropout_seed=seed, positions=batch.positions, documents=documents)
    memory = model.new_memory(B, chunks[-1].start, (), options)
    return score(model, batch, chunks, memory, options)


def dpo(reference: Tensor, beta: float = 0.1) -> Objective:
    """-log σ(β (Σ (l - r) of the chosen answer - Σ (l - r) of the rejected one)); eq. 7 of arXiv 2305.18290."""
    return lambda log_probs: -F.logsigmoid(beta * margins((log_probs - reference).sum(1))).mean()


def ipo(labels: Tensor, reference: Tensor, beta: float = 0.1) -> Objective:
    """(mean (l - r) of the chosen - of the rejected - 1 / 2β)²; eq. 17 of arXiv 2310.12036, with TRL's means."""
    return lambda log_probs: (margins(means(log_probs - reference, labels)) - 1 / (2 * beta)).square().mean()


def simpo(labels: Tensor, beta: float = 2.0, gamma: float = 1.0) -> Objective:
    """-log σ(β (mean l of the chosen - mean l of the rejected) - γ), without a reference; eq. 6 of arXiv 2405.14734."""
    return lambda log_probs: -F.logsigmoid(beta * margins(means(log_probs, labels)) - gamma).mean()


def orpo(labels: Tensor, beta: float = 0.1, answers: Tensor | None = None) -> Objective:
    """-mean l of the chosen tokens - β log σ(log odds of the chosen - log odds of the rejected).

    Eq. 6 and 7 of arXiv 2403.07691. An answer's odds are p / (1 - p) with log p = mean l.
    answers: bool (B, T), where the answers are if there are labels on prompts too, which only the first term reads.
    """
    within = labels if answers is None else labels.where(answers, IGNORE)

    def objective(log_probs: Tensor) -> Tensor:
        log_p = means(log_probs * (within != IGNORE), within)
        odds, (likely, _) = margins(log_p - log_of_rest(log_p)), pairs(log_probs)
        return -likely.sum() / counted(pairs(labels)[0]).sum() - beta * F.logsigmoid(odds).mean()

    return objective


def kto(
    reference: Tensor, desirable: Tensor, kl: Tensor | float, beta: float = 0.1,
    weights: tuple[float, float] = (1.0, 1.0),
) -> Objective:  # fmt: skip
    """1 - σ(β (Σ (l - r) - kl)) of a desirable answer, 1 - σ(β (kl - Σ (l - r))) of another; eq. 8 of arXiv 2402.01306.

    desirable: bool (B). kl: at least 0, of answers with prompts that are not theirs. weights: of the two kinds.
    """

    def objective(log_probs: Tensor) -> Tensor:
        away = beta * ((log_probs - reference).sum(1) - kl)
        return torch.where(desirable, weights[0] * (-away).sigmoid(), weights[1] * away.sigmoid()).mean()

    return objective


def grpo(
    labels: Tensor, advantages: Tensor, old: Tensor | None = None, clip: tuple[float, float] = (0.2, 0.2),
    reference: Tensor | None = None, beta: float = 0.0,
) -> Objective:  # fmt: skip
    """mean of β (e^(r - l) - (r - l) - 1) - min(ρ A, clipped ρ A), ρ = e^(l - old); eq. 3 and 4 of arXiv 2402.03300.

    advantages: A, (B) or (B, T). old: None: this policy. clip: how far below and above 1 ρ still counts.
    """
    if beta and reference is None:
        raise InputError(f"grpo's beta is {beta}, but without a reference it must be 0")
    A = advantages if advantages.ndim == 2 else advantages[:, None]

    def objective(log_probs: Tensor) -> Tensor:
        ratio = (log_probs - (log_probs.detach() if old is None else old)).exp()
        each = -torch.minimum(ratio * A, ratio.clamp(1 - clip[0], 1 + clip[1]) * A)
        if reference is not None:
            away = reference - log_probs
            each = each + beta * (away.exp() - away - 1)
        return means(each * (labels != IGNORE), labels).mean()

    return objective


def divergence(hidden: Tensor, weight: Tensor, of_teacher: Tensor, teacher_weight: Tensor, labelled: Tensor) -> Tensor:
    """Σ_v q_v log(q_v / p_v), the forward KL of the model's p from a teacher's q, summed over tokens: a `chunk_loss`.

    hidden: (B, C, E), what the LM head is given for a chunk. weight: (V, E), the LM head's. of_teacher, teacher_weight:
    the teacher's, with an E of its own. labelled: bool (B, C) on the CPU, the tokens that count.
    Of the logits of both, a tile exists at a time, as in loss.py.
    """
    x, y = (rows_of(each, labelled) for each in (hidden, of_teacher.detach()))
    cap, teacher_cap = (getattr(head, "softcap", None) for head in (weight, teacher_weight))  # see loss.py

    def tile(x: Tensor, head: Tensor, teacher_head: Tensor) -> Tensor:
        ours, theirs = logits_of(x.to(head.dtype), head, cap), logits_of(y, teacher_head, teacher_cap)
        away = (theirs.softmax(-1) * (theirs - ours)).sum(-1)
        return torch.stack([ours.logsumexp(-1), theirs.logsumexp(-1), away])  # (3, N)

    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # the sum of the tiles' gradients
    heads = (head.split(max(1, TILE_ELEMENTS // max(1, len(x)))) for head in (weight, teacher_weight.detach()))
    tiles = [checkpoint(tile, wide, *both, use_reentrant=False) for both in zip(*heads, strict=True)]
    lse, teacher_lse, away = torch.stack(tiles, 1)  # (tiles, N) each
    return (lse.logsumexp(0) - teacher_lse.logsumexp(0) + (teacher_lse.softmax(0) * away).sum(0)).sum()


def pairs(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen and the rejected ones. Raises InputError where there are not as many."""
    if len(rows) % 2:
        raise InputError(f"the batch has {len(rows)} rows, but pairs need as many chosen as rejected ones")
    chosen, rejected = rows.chunk(2)
    return chosen, rejected


def margins(rows: Tensor) -> Tensor:
    """The chosen ones less the rejected ones."""
    chosen, rejected = pairs(rows)
    return chosen - rejected


def means(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Of each row's labelled tokens: (B, T) to (B)."""
    return log_probs.sum(1) / counted(labels)


def counted(labels: Tensor) -> Tensor:
    """How many tokens of each row have a label that is predicted: at least 1, so that an empty answer is no NaN."""
    return (labels[:, 1:] != IGNORE).sum(1).clamp(min=1)


def log_of_rest(log_p: Tensor) -> Tensor:
    """log(1 - p), in the form that is exact for this p."""
    return torch.where(log_p > -0.693, (-torch.expm1(log_p)).log(), torch.log1p(-log_p.exp()))
