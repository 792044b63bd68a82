"""What is known about mistakes in exercise 9, the window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

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

    def __str__(self) -> str:
        return f"start = {self.start}, stop = {self.stop}, window = {self.window}, sinks = {self.sinks}"


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


def _seen(case: Case) -> Tensor:
    i, j = _ij(case)
    return (j <= i) & ((i - j < case.window) | (j < case.sinks))


def _ij(case: Case) -> tuple[Tensor, Tensor]:
    return torch.arange(case.start, case.stop)[:, None], torch.arange(case.stop)


MASKS: dict[str, Callable[[Case, Tensor, Tensor], Tensor]] = {
    "The window is one position too large: i - j < window. With a window of 1, what does a query see?": (
        lambda c, i, j: (j <= i) & ((i - j <= c.window) | (j < c.sinks))
    ),
    "The window is one position too small: the query's own position is one of those that it counts.": (
        lambda c, i, j: (j <= i) & ((i - j < c.window - 1) | (j < c.sinks))
    ),
    "The sinks are missing. Which positions does every query see, however far back they are?": (
        lambda c, i, j: (j <= i) & (i - j < c.window)
    ),
    "The window is missing: every query sees all of its past.": lambda c, i, j: j <= i,
    "The sinks are all there is. Which positions does a query see because they are near?": (
        lambda c, i, j: (j <= i) & (j < c.sinks)
    ),
    "One sink too many: the positions before `sinks` are counted from 0.": (
        lambda c, i, j: (j <= i) & ((i - j < c.window) | (j <= c.sinks))
    ),
    "Queries see positions after their own: i - j < window holds for all of them. What is missing from the rule?": (
        lambda c, i, j: (i - j < c.window) | (j < c.sinks)
    ),
    "Sinks that lie in the chunk are seen by queries before them. What holds for every j that i sees?": (
        lambda c, i, j: ((j <= i) & (i - j < c.window)) | (j < c.sinks)
    ),
    "All queries of the chunk see as far back as the first one does. The window ends with each query's own position.": (
        lambda c, i, j: (j <= i) & ((c.start - j < c.window) | (j < c.sinks))
    ),
    "All queries of the chunk see only as far back as the last one. The window ends with each query's own position.": (
        lambda c, i, j: (j <= i) & ((c.stop - 1 - j < c.window) | (j < c.sinks))
    ),
    "The queries are counted from the beginning of the chunk. At which position of the text does it stand?": (
        lambda c, i, j: (j <= i - c.start) & ((i - c.start - j < c.window) | (j < c.sinks))
    ),
    "Window and sinks have both to hold, but one of them is enough. Which word stands between them?": (
        lambda c, i, j: (j <= i) & (i - j < c.window) & (j < c.sinks)
    ),
    "The sinks are counted from the beginning of the chunk, but they are the first positions of the text.": (
        lambda c, i, j: (j <= i) & ((i - j < c.window) | ((j >= c.start) & (j < c.start + c.sinks)))
    ),
    "The sinks are taken from the window: what is near loses as many positions as the sinks have.": (
        lambda c, i, j: (j <= i) & ((i - j < c.window - c.sinks) | (j < c.sinks))
    ),
    "The mask is inside out: it is True where a query does *not* see.": (
        lambda c, i, j: ~((j <= i) & ((i - j < c.window) | (j < c.sinks)))
    ),
}


@within("seen")
def _check_seen(module: ModuleType) -> None:
    got = {f"the mask ({case})": module.seen(*case) for case in CASES}
    expected = {f"the mask ({case})": _seen(case) for case in CASES}
    for name, mask in got.items():
        shape = list(expected[name].shape)
        turned = isinstance(mask, Tensor) and list(mask.shape) == shape[::-1] != shape
        require(not turned, f"{name} has a row for each position, but must have one for each query: {shape}.")

    def mistakes() -> Mistakes:
        for words, rule in MASKS.items():
            yield words, {f"the mask ({case})": rule(case, *_ij(case)) for case in CASES}

    compare(got, expected, mistakes(), "query position")


def _spans(case: Case, low: int | None = None) -> Spans:
    low = max(0, case.start - case.window + 1) if low is None else low
    both = [(0, case.start)] if low <= case.sinks else [(0, case.sinks), (low, case.start)]
    return [(a, b) for a, b in both if a < b]


def _span_mistakes(case: Case) -> Iterator[tuple[str, object]]:
    start, stop, window, sinks = case
    low, right = max(0, start - window + 1), _spans(case)

    def nonempty(*spans: tuple[int, int]) -> Spans:
        return [(a, b) for a, b in spans if a < b]

    early = "The reach begins one position too early: the first query's own position is one of those in its window."
    yield early, _spans(case, max(0, start - window))
    last = "The reach is that of the chunk's last query. Which of its queries sees furthest back?"
    yield last, _spans(case, min(start, max(0, stop - window)))
    yield "The reach begins one position too late.", _spans(case, min(start, low + 1))
    yield "The sinks are missing.", nonempty((low, start))
    near = "The window's reach is missing: the first query sees positions just before the chunk."
    yield near, nonempty((0, min(sinks, start)))
    yield "All of the past is read. What of it does no query of the chunk see?", [(0, start)]
    if sinks > start:
        beyond = "The sinks go beyond the past: some lie in the chunk itself, whose keys are not in the memory yet."
        yield beyond, nonempty((0, sinks), (low, start))
    if low == sinks:
        yield "Spans that touch have to be one: the fewer pieces, the fewer copies.", [(0, sinks), (low, start)]
    twice = "Positions are named twice, and would count twice in the softmax: what if sinks and reach meet?"
    yield twice, nonempty((0, min(sinks, start)), (low, start))
    yield twice, nonempty((0, sinks), (low, start))
    own = "The chunk's own positions are read from the memory, but they are not in it yet: its own keys are at hand."
    yield own, [(a, stop if b == start else b) for a, b in right]
    before = "A span begins before position 0: what if the window is larger than the past?"
    yield before, nonempty((0, sinks), (start - window + 1, start))
    yield "A span (a, b) ends before b: the last position is missing.", [(a, b - 1) for a, b in right]
    yield "The spans stand in the wrong order: whose columns come first?", right[::-1] if len(right) > 1 else None


@within("spans")
def _check_spans(module: ModuleType) -> None:
    for case in CASES:
        found = module.spans(*case)
        require(isinstance(found, list | tuple), f"What came back is a {type(found).__name__}, but has to be a list.")
        got = [tuple(span) if isinstance(span, list | tuple) else (span,) for span in found]
        pairs = all(len(span) == 2 and all(isinstance(x, int) for x in span) for span in got)
        require(pairs, f"A span has to be a pair of numbers (a, b), but the result is {found}.")
        if got == _spans(case):
            continue
        empty = "There is an empty span. What is there to read?" if any(a >= b for a, b in got) else ""
        where = f"For {case} it returned {found}, but it has to be {_spans(case)}."
        words = next((words for words, wrong in _span_mistakes(case) if got == wrong), empty)
        raise AssertionError(f"{words} {where}".strip())


def _inputs(case: Case) -> tuple[list[Tensor], Memory]:
    """q, k, v and the gradient of the output, and a memory of all that lies before the chunk."""
    *own, keys, values = random(case.start + case.window, *[(case.stop - case.start, D)] * 4, *[(case.start, D)] * 2)
    return own, Memory(keys, values)


def _attention(
    case: Case,
    mask: Callable[[Case], Tensor] = _seen,
    scale: float = D**0.5,
    twice: bool = False,
    change: Callable[[Tensor], Tensor] = lambda grad: grad,
    chunk_first: bool = False,
) -> Values:
    """By a dense mask over all of the past.

    change: of the output's gradient. twice: sinks that the window reaches count twice. chunk_first: of the keys alone.
    """
    (q, k, v, grad), memory = _inputs(case)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, memory.keys, memory.values)]
    q, k, v, past_k, past_v = leaves
    keys, values, visible = torch.cat([past_k, k]), torch.cat([past_v, v]), mask(case)
    if chunk_first:  # what is read alone stands side by side, and of it only the keys are turned round
        read = [j for a, b in _spans(case) for j in range(a, b)]
        keys, values = torch.cat([k, past_k[read]]), torch.cat([past_v[read], v])
        visible = visible[:, [*read, *range(case.start, case.stop)]]
    if twice:
        again = range(max(0, case.start - case.window + 1), min(case.sinks, case.start))
        keys, values = (torch.cat([x, x[list(again)]]) for x in (keys, values))
        visible = torch.cat([visible, visible[:, list(again)]], dim=1)
    out = (q @ keys.T / scale).masked_fill(~visible, -torch.inf).softmax(-1) @ values
    grads = torch.autograd.grad(out, leaves, change(grad), allow_unused=True, materialize_grads=True)
    names = ("dq", "dk", "dv", "the gradient sent back to the keys", "the gradient sent back to the values")
    return {"the output": out.detach(), **dict(zip(names, grads, strict=True))}


def _rebuild_mistakes(case: Case, right: Values) -> Mistakes:
    sent = list(right)[-2:]
    start = case.start

    def change(edit: Callable[[Tensor], Tensor]) -> Values:
        return {**right, **{name: edit(right[name]) for name in sent}}

    def rows(*spans: tuple[int, int]) -> Callable[[Tensor], Tensor]:
        def keep(x: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            for a, b in spans:
                out[a:b] = x[a:b]
            return out

        return keep

    spans = _spans(case)
    yield "The scores are not divided by sqrt(D).", _attention(case, scale=1)
    yield "The scores are divided by D, not by its square root.", _attention(case, scale=D)
    yield (
        "Within what was read, every query sees everything up to itself: the mask is missing. The chunk reads what its "
        "first query sees: do the others see it, too?",
        _attention(case, lambda c: _only(_seen_causal(c), spans, start)),
    )
    yield (
        "Queries see later positions of their own chunk.",
        _attention(case, lambda c: _only(torch.ones_like(_seen(c)), spans, start)),
    )
    yield (
        "The mask's columns do not belong to the keys: those side by side are the spans and the chunk, and between "
        "them there may be a gap. Which columns of `seen` are they?",
        _attention(case, lambda c: _shifted(c, spans)),
    )
    yield (
        "The mask's columns are its first ones, but the keys side by side are the spans and the chunk. Which columns "
        "of `seen` are they?",
        _attention(case, lambda c: _shifted(c, spans, first=True)),
    )
    yield (
        "The mask is inside out: what a query sees is hidden. What does True mean for the function that takes the "
        "mask?",
        _attention(case, lambda c: _only(~_seen(c), spans, start)),
    )
    yield (
        "The chunk's keys stand before those of the past, the values or the mask's columns behind. One order for all.",
        _attention(case, chunk_first=True),
    )
    yield "The chunk sees only itself. What did it read?", _attention(case, lambda c: _only(_seen(c), [], start))
    yield (
        "Positions of the past count twice: where sinks and window meet, they are one span.",
        _attention(case, twice=True),
    )
    yield "Nothing has been sent back. Whose keys and values has the chunk read?", change(torch.zeros_like)
    words = "What was sent back has not come to {}. All that was read needs its gradient: how many pieces were there?"
    if len(spans) > 1:
        yield words.format("the window's reach"), change(rows(spans[0]))
        yield words.format("the sinks"), change(rows(spans[1]))
        yield (
            "What belongs to the sinks and to the window's reach has been exchanged.",
            change(lambda x: _exchanged(x, spans)),
        )
    yield "What was sent back counts twice.", change(lambda x: 2 * x)
    yield (
        "What was sent back has come to the beginning of the text. From which position on was each piece read?",
        change(lambda x: _to_the_front(x, spans)),
    )
    yield "The gradients of keys and values are exchanged: memory.add takes those of the keys first.", {
        **right, sent[0]: right[sent[1]], sent[1]: right[sent[0]]
    }  # fmt: skip
    yield (
        "Of keys and values, the gradients of the chunk's own are exchanged: dk comes before dv.",
        {**right, "dk": right["dv"], "dv": right["dk"]},
    )
    ones = _attention(case, change=torch.ones_like)
    yield "The gradient of the output is not the one given, but ones, as of a sum. Where does grad come in?", ones


def _seen_causal(case: Case) -> Tensor:
    i, j = _ij(case)
    return j <= i


def _only(mask: Tensor, spans: Spans, start: int) -> Tensor:
    """The mask, where of the past nothing but the spans is there."""
    there = torch.zeros(mask.shape[1], dtype=torch.bool)
    there[start:] = True
    for a, b in spans:
        there[a:b] = True
    return mask & there


def _shifted(case: Case, spans: Spans, first: bool = False) -> Tensor:
    """The last columns of the mask, or its first ones, on keys that stand elsewhere."""
    columns = torch.cat([torch.arange(a, b) for a, b in [*spans, (case.start, case.stop)]])
    mask = torch.zeros_like(_seen(case))
    mask[:, columns] = _seen(case)[:, : len(columns)] if first else _seen(case)[:, -len(columns) :]
    return mask


def _to_the_front(x: Tensor, spans: Spans) -> Tensor:
    out = torch.zeros_like(x)
    for a, b in spans:
        out[: b - a] += x[a:b]
    return out


def _exchanged(x: Tensor, spans: Spans) -> Tensor:
    (a, b), (c, d) = spans
    out, n = torch.zeros_like(x), min(b - a, d - c)
    out[a : a + n], out[c : c + n] = x[c : c + n], x[a : a + n]
    return out


COLUMNS = (
    "at non-singleton dimension 1",
    "The mask has a column for every position up to `stop`, but there are keys for the spans and the chunk only. "
    "Which of its columns belong to them?",
)


@contextmanager
def _hints() -> Iterator[None]:
    places = (
        "at non-singleton dimension 0",
        "A piece's gradients go to the positions from which it was read. Which are they?",
    )
    given = (
        "can be implicitly created only for scalar outputs",
        "The gradient of the output is an argument. Where is it?",
    )
    unused = "have been used in the graph", "Something that was read, or q, k or v, takes no part in the output. Which?"
    with hint(*COLUMNS), hint(*places), hint(*unused), hint(*given):
        yield


@within("rebuild")
def _check_rebuild(module: ModuleType) -> None:
    for case in CASES:
        (q, k, v, grad), memory = _inputs(case)
        own = [x.requires_grad_() for x in (q, k, v)]
        with _hints():
            result = module.rebuild(*own, memory, case.start, case.window, case.sinks, grad)
        out, dq, dk, dv = take(result, "the output", "dq", "dk", "dv")
        for a, b in memory.reads:
            inside = any(low <= a and b <= high for low, high in _spans(case))
            require(
                inside or a >= b,
                f"It read the positions from {a} to {b - 1} ({case}), but no more of the past is wanted than "
                f"{_spans(case)}: that is what a window saves.",
            )
        for a, b in memory.adds:
            inside = any(low <= a and b <= high for low, high in _spans(case))
            require(
                inside or a >= b,
                f"It sent gradients to the positions from {a} to {b - 1} ({case}), but nobody in the chunk has seen "
                f"others than {_spans(case)}. Whose keys do they belong to?",
            )
        right = _attention(case)
        got = {"the output": out, "dq": dq, "dk": dk, "dv": dv}
        got |= {list(right)[4]: memory.key_grads, list(right)[5]: memory.value_grads}
        compare(got, right, _rebuild_mistakes(case, right), "position channel")
        require(
            not out.requires_grad, "The output has a graph behind it, which keeps the chunk's scores alive. Who cuts?"
        )


def check_window(module: ModuleType) -> None:
    """The rule, what a chunk reads, and attention over it, forward and backward."""
    _check_seen(module)
    _check_spans(module)
    _check_rebuild(module)
