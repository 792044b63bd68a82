"""What is known about mistakes in exercise 9, the window."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..diagnose import Mistakes, Values, compare, hint, require, take, within
from ..toy_window import Memory
from .common import random

Spans = list[tuple[int, int]]
D = 4


class Case(NamedTuple):
    """A chunk and what its queries see."""

    start: int
    stop: int
    window: int
    sinks: int

    def spans(self, low: int | None = None) -> Spans:
        low = max(0, self.start - self.window + 1) if low is None else low
        both = [(0, self.start)] if low <= self.sinks else [(0, self.sinks), (low, self.start)]
        return [(a, b) for a, b in both if a < b]


CASES = [
    Case(8, 11, 5, 2),  # sinks, a gap, and the reach
    Case(8, 11, 5, 0),
    Case(6, 9, 1, 0),  # every query sees itself alone
    Case(5, 8, 1, 2),
    Case(0, 4, 2, 1),  # no past
    Case(4, 7, 3, 2),  # sinks and reach touch
    Case(4, 7, 4, 2),  # and overlap
    Case(3, 6, 9, 0),  # a window larger than the past
    Case(1, 5, 2, 3),  # some of the sinks lie in the chunk itself
]
Rule = Callable[[Case, Tensor, Tensor], Tensor]  # of the positions i of the queries and j of the keys
MASKS: dict[str, Rule] = {
    "The window is one position too large: i - j < window. With a window of 1, what does a query see?": (
        lambda c, i, j: (j <= i) & ((i - j <= c.window) | (j < c.sinks))
    ),
    "The sinks are missing. Which positions does every query see, however far back they are?": (
        lambda c, i, j: (j <= i) & (i - j < c.window)
    ),
    "Sinks that lie in the chunk are seen by queries before them. What holds for every j that i sees?": (
        lambda c, i, j: ((j <= i) & (i - j < c.window)) | (j < c.sinks)
    ),
    "The queries are counted from the beginning of the chunk. At which position of the text does it stand?": (
        lambda c, i, j: (j <= i - c.start) & ((i - c.start - j < c.window) | (j < c.sinks))
    ),
}


def _rule(c: Case, i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & ((i - j < c.window) | (j < c.sinks))


def _mask(case: Case, rule: Rule = _rule) -> Tensor:
    return rule(case, torch.arange(case.start, case.stop)[:, None], torch.arange(case.stop))


@within("seen")
def _check_seen(module: ModuleType) -> None:
    got = {f"the mask of {case}": module.seen(*case) for case in CASES}
    expected = {f"the mask of {case}": _mask(case) for case in CASES}
    wrong = ((words, {f"the mask of {case}": _mask(case, rule) for case in CASES}) for words, rule in MASKS.items())
    compare(got, expected, wrong, "query position")


def _span_mistakes(case: Case) -> dict[str, Any]:
    start, stop, window, sinks = case
    low = max(0, start - window + 1)
    return {
        "The reach is that of the chunk's last query. Which of its queries sees furthest back?": (
            case.spans(min(start, max(0, stop - window)))
        ),
        "All of the past is read. What of it does no query of the chunk see?": [(0, start)],
        "Spans that touch have to be one, and positions that are named twice count twice in the softmax: what if sinks "
        "and reach meet?": [(0, min(sinks, start)), (low, start)],
    }


@within("spans")
def _check_spans(module: ModuleType) -> None:
    for case in CASES:
        found = module.spans(*case)
        if found == case.spans():
            continue
        words = next((words for words, wrong in _span_mistakes(case).items() if found == wrong), "")
        raise AssertionError(f"{words} For {case} it returned {found}, but it has to be {case.spans()}.".strip())


def _inputs(case: Case) -> tuple[list[Tensor], Memory]:
    """q, k, v and the gradient of the output, and a memory of all that lies before the chunk."""
    *own, keys, values = random(case.start + case.window, *[(case.stop - case.start, D)] * 4, *[(case.start, D)] * 2)
    return own, Memory(keys, values)


def _attention(case: Case, rule: Rule = _rule) -> Values:
    """By a dense mask over all of the past."""
    (q, k, v, grad), memory = _inputs(case)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, memory.keys, memory.values)]
    q, k, v, past_k, past_v = leaves
    scores = q @ torch.cat([past_k, k]).T / D**0.5
    out = scores.masked_fill(~_mask(case, rule), -torch.inf).softmax(-1) @ torch.cat([past_v, v])
    grads = torch.autograd.grad(out, leaves, grad, allow_unused=True, materialize_grads=True)
    names = ("dq", "dk", "dv", "the gradient sent back to the keys", "the gradient sent back to the values")
    return {"the output": out.detach(), **dict(zip(names, grads, strict=True))}


def _rebuild_mistakes(case: Case, right: Values) -> Mistakes:
    spans, sent = case.spans(), list(right)[-2:]

    def read(j: Tensor) -> Tensor:  # whether the position is there at all
        return (j >= case.start) | torch.stack([(a <= j) & (j < b) for a, b in [*spans, (0, 0)]]).any(0)

    yield (
        "Within what was read, every query sees everything up to itself: the mask is missing. The chunk reads what its "
        "first query sees: do the others see it, too?",
        _attention(case, lambda c, i, j: (j <= i) & read(j)),
    )
    yield (
        "Nothing has been sent back. Whose keys and values has the chunk read?",
        {**right, **{name: torch.zeros_like(right[name]) for name in sent}},
    )
    swapped = {**right, sent[0]: right[sent[1]], sent[1]: right[sent[0]]}
    yield "The gradients of keys and values are exchanged: memory.add takes those of the keys first.", swapped


COLUMNS = (
    "at non-singleton dimension 1",
    "The mask has a column for every position up to `stop`, but there are keys for the spans and the chunk only. "
    "Which of its columns belong to them?",
)


@within("rebuild")
def _check_rebuild(module: ModuleType) -> None:
    for case in CASES:
        (q, k, v, grad), memory = _inputs(case)
        own = [x.requires_grad_() for x in (q, k, v)]
        with hint(*COLUMNS):
            result = module.rebuild(*own, memory, case.start, case.window, case.sinks, grad)
        out, dq, dk, dv = take(result, "the output", "dq", "dk", "dv")
        for what, places in (("It read", memory.reads), ("It sent gradients to", memory.adds)):
            for a, b in places:
                require(
                    a >= b or any(low <= a and b <= high for low, high in case.spans()),
                    f"{what} the positions from {a} to {b - 1} ({case}), but of the past the chunk sees "
                    f"{case.spans()} alone: that is what a window saves, and nobody else's keys have a gradient.",
                )
        right = _attention(case)
        got = {"the output": out, "dq": dq, "dk": dk, "dv": dv}
        got |= dict(zip(list(right)[4:], (memory.key_grads, memory.value_grads), strict=True))
        compare(got, right, _rebuild_mistakes(case, right), "position channel")
        require(not out.requires_grad, "The output has a graph behind it, which keeps the scores alive. Who cuts?")


def check_window(module: ModuleType) -> None:
    """The rule, what a chunk reads, and attention over it, forward and backward."""
    _check_seen(module)
    _check_spans(module)
    _check_rebuild(module)
