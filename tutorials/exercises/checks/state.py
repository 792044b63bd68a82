"""What is known about mistakes in exercise 8, the state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

import minichunk as mc

from .. import toy_state
from ..diagnose import Mistakes, Values, close, compare, require, within
from .common import Graphs, check_loss_value, check_walk, random

GRADIENT = "the gradient of the weights"
Entries = Sequence[mc.Weight | None]
# By which factor the adjoint passes a chunk beside it: of the chunk's number, its decay and its entry.
Passes = Callable[[int, Tensor, mc.Weight | None], Tensor | float]


def _toy() -> tuple[list[Tensor], Tensor, Tensor]:
    *chunks, start, weights = random(7, (3, 4), (2, 4), (3, 4), (1, 4), (2, 4), (2, 4), (3, 4, 4))
    return chunks, 0 * start, 0.6 * weights


def _scaled(x: Tensor, factor: Tensor | float) -> Tensor:
    """x, whose gradient is multiplied by the factor."""
    return x.detach() + factor * (x - x.detach())


def _by_decay(j: int, decay: Tensor, entry: mc.Weight | None) -> Tensor | float:
    return decay


def _gradient(
    entries: Entries, passes: Passes = _by_decay, leave_out: bool = True, send: Passes = lambda *_: 1.0
) -> Values:
    """What the walk leads to, by plain autograd through all chunks at once.

    leave_out: the way by the decay is no part of what a chunk hands on. send: a factor on what a chunk sends back.
    """
    chunks, s, weights = _toy()
    weights.requires_grad_()
    total = torch.zeros(())
    for j, (chunk, entry) in enumerate(zip(chunks, entries, strict=True)):
        decay = toy_state.f(chunk, s, weights)[2].detach()
        h = _scaled(s, send(j, decay, entry) if entry is not None else 0.0)
        loss, end, _ = toy_state.f(chunk, h, weights)
        own = end - decay * (h - h.detach()) if leave_out else end
        relay = 0.0 if entry is None else entry.relay
        # The state's value is the chunk's; its gradient goes to the chunk, and past it.
        s = _scaled(own, relay) + passes(j, decay, entry) * (s - s.detach())
        total = total + (0.0 if entry is None else entry.loss * loss)
    (grad,) = torch.autograd.grad(total, weights)
    return {GRADIENT: grad}


def _walk_mistakes(entries: Entries) -> Mistakes:
    chunks, start, weights = _toy()
    with torch.no_grad():
        decays, h = [], start
        for chunk in chunks:
            _, h, decay = toy_state.f(chunk, h, weights)
            decays.append(decay)

    def change(loss: Callable[[mc.Weight], float], relay: Callable[[mc.Weight], float]) -> list[mc.Weight | None]:
        return [None if e is None else mc.Weight(loss(e), relay(e)) for e in entries]

    def shifted(by: int) -> Passes:
        return lambda j, decay, entry: decays[(j + by) % len(decays)]

    yield (
        "The adjoint passes a chunk twice: by the decay in the walk, and once more within the rebuilt chunk. "
        "What of the state after the chunk does hand_on leave out, and is it what you backpropagate from?",
        _gradient(entries, leave_out=False),
    )
    yield (
        "A skipped chunk ends everything: the adjoint behind it is lost. By which way, known since the fill, does it "
        "reach the state before a chunk that is not run again?",
        _gradient(entries, lambda *_: 0.0, leave_out=False),
    )
    yield (
        "The way by the decay is missing: hand_on leaves it out of what the chunk sends, and nobody else carries it. "
        "What of the old adjoint is in the new one?",
        _gradient(entries, lambda *_: 0.0),
    )
    yield (
        "Past a skipped chunk the adjoint goes undiminished. What has that chunk left of the state before it?",
        _gradient(entries, lambda j, decay, entry: decay if entry is not None else 1.0),
    )
    yield (
        "The adjoint passes the chunks undiminished. By what has each of them multiplied the state before it?",
        _gradient(entries, lambda *_: 1.0),
    )
    yield (
        "Past a skipped chunk the adjoint goes for sure, but past a kept one it is multiplied by the relay factor, "
        "too: on average that is too much. Which part of the way depends on no coin, in a kept chunk as well?",
        _gradient(entries, lambda j, decay, entry: decay * (1.0 if entry is None else entry.relay)),
    )
    yield (
        "What was sent back to the state before the chunk is multiplied by the chunk's decay, but it has passed the "
        "chunk already. What is still behind the chunk, and has to come past it?",
        _gradient(entries, send=_by_decay),
    )
    yield (
        "Every chunk learns from its own loss alone. Does the backward start from what the chunk hands on, too, and is "
        "that in the adjoint which the chunks sent back to the states that they read? Where has autograd put it?",
        _gradient(change(lambda e: e.loss, lambda e: 0.0)),
    )
    yield from _slips(entries)
    words = "The adjoint is multiplied by the decay of the chunk {}. Which chunk lies between it and the next state?"
    yield words.format("before"), _gradient(entries, shifted(-1))
    yield words.format("after"), _gradient(entries, shifted(1))
    yield "What is relayed is not scaled. Where does weight.relay go?", _gradient(change(lambda e: e.loss, lambda e: 1))
    yield "The loss is not scaled. Where does weight.loss go?", _gradient(change(lambda e: 1, lambda e: e.relay))
    yield "Neither the loss nor what is relayed is scaled.", _gradient(change(lambda e: 1, lambda e: 1))
    yield "The two factors are swapped.", _gradient(change(lambda e: e.relay, lambda e: e.loss))
    yield (
        "What is relayed is scaled by weight.loss. It has a factor of its own: which one is it?",
        _gradient(change(lambda e: e.loss, lambda e: e.loss)),
    )


def _walk(
    entries: Entries,
    step: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda adjoint, decay, sent: decay * adjoint + sent,
    relay: Callable[[mc.Weight, Tensor, Tensor], Tensor] = lambda entry, adjoint, decay: entry.relay * adjoint,
    loss_factor: Callable[[mc.Weight], float] = lambda entry: entry.loss,
    send: Callable[[mc.Weight], float] = lambda entry: 1.0,
    first: float = 0.0,
    itself: bool = False,
) -> Values:
    """The gradient when the walk makes these mistakes; as it stands, the right one.

    step: the next adjoint. relay: what is handed over. send: on what was sent back. first: the last state's adjoint.
    itself: a state is taken for what was sent back to it.
    """
    chunks, start, weights = _toy()
    states, decays = [start], []
    with torch.no_grad():
        for chunk in chunks:
            _, end, decay = toy_state.f(chunk, states[-1], weights)
            states.append(end)
            decays.append(decay)
    weights.requires_grad_()
    weights.grad = torch.zeros_like(weights)
    adjoint = torch.full_like(start, first)
    for j in reversed(range(len(chunks))):
        sent, entry = torch.zeros_like(start), entries[j]
        if entry is not None:
            h = states[j].clone().requires_grad_()
            loss, end, decay = toy_state.f(chunks[j], h, weights)
            end = end - decay.detach() * (h - h.detach())
            torch.autograd.backward([loss_factor(entry) * loss, end], [None, relay(entry, adjoint, decays[j])])
            assert h.grad is not None
            sent = h.detach() if itself else send(entry) * h.grad
        adjoint = step(adjoint, decays[j], sent)
    return {GRADIENT: weights.grad}


def _slips(entries: Entries) -> Mistakes:
    """Mistakes in one expression of the walk."""
    yield (
        "The decay is on the wrong one of the two: what was sent back has passed the chunk already, the old adjoint "
        "has not.",
        _walk(entries, lambda adjoint, decay, sent: adjoint + decay * sent),
    )
    yield (
        "What was sent back is subtracted. Both are parts of one gradient: what do parts do?",
        _walk(entries, lambda adjoint, decay, sent: decay * adjoint - sent),
    )
    yield "What was sent back counts twice.", _walk(entries, lambda adjoint, decay, sent: decay * adjoint + 2 * sent)
    yield (
        "What is relayed is multiplied by the decay. It belongs to the state *after* the chunk: what has it to pass "
        "yet?",
        _walk(entries, relay=lambda entry, adjoint, decay: entry.relay * decay * adjoint),
    )
    yield (
        "What is relayed is divided by weight.relay. A message that rarely survives has to count more.",
        _walk(entries, relay=lambda entry, adjoint, decay: adjoint / entry.relay),
    )
    yield (
        "What is relayed is scaled by both factors. The loss factor of the chunk where a message starts is in it "
        "already: which factor is this hop's own?",
        _walk(entries, relay=lambda entry, adjoint, decay: entry.loss * entry.relay * adjoint),
    )
    yield "What is relayed counts twice.", _walk(entries, relay=lambda entry, adjoint, decay: 2 * entry.relay * adjoint)
    yield (
        "The loss is multiplied by weight.loss and by weight.relay. The relay's factor is for the adjoint.",
        _walk(entries, loss_factor=lambda entry: entry.loss * entry.relay),
    )
    yield (
        "The loss is divided by weight.loss. A chunk that is rarely kept has to count more.",
        _walk(entries, loss_factor=lambda entry: 1 / entry.loss),
    )
    yield (
        "What was sent back is multiplied by the relay factor, too. What is relayed has it already, and a message "
        "has one factor for each chunk that it passes through.",
        _walk(entries, send=lambda entry: entry.relay),
    )
    yield (
        "The factor is on what the chunk sends instead of on what is relayed to it. Whose coin has a message to "
        "survive, the sender's or the receiver's?",
        _walk(entries, relay=lambda entry, adjoint, decay: adjoint, send=lambda entry: entry.relay),
    )
    yield (
        "The adjoint takes up the state itself instead of what was sent back to it. Where has autograd put that?",
        _walk(entries, itself=True),
    )
    yield (
        "The last state has an adjoint of ones. Which losses come after the last chunk?",
        _walk(entries, first=1.0),
    )


class _Spy:
    """f, which also sees how it is called."""

    def __init__(self) -> None:
        self.chunks, start, weights = _toy()
        self.states = [start]
        self.filled: list[int] = []
        self.rebuilt: list[int] = []
        self.graphs = Graphs()
        with torch.no_grad():
            for chunk in self.chunks:
                self.states.append(toy_state.f(chunk, self.states[-1], weights)[1])

    def __call__(self, chunk: Tensor, h: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        j = next((j for j, x in enumerate(self.chunks) if torch.equal(x, chunk)), None)
        if j is None:
            raise AssertionError("f was called with a chunk that is none of x_0, …, x_{k-1}.")
        fills = not torch.is_grad_enabled()
        who = f"In the fill, chunk {j}" if fills else f"Chunk {j}"
        given = next((i for i, state in enumerate(self.states) if close(h, state)), None)
        found = "a state that no chunk has left behind" if given is None else f"h_{given}"
        question = "What has the chunk before it handed on?" if fills else "Which state was there before the chunk?"
        require(given == j, f"{who} was given {found}, but it stands on h_{j}. {question}")
        if fills:
            self.filled.append(j)
            return toy_state.f(chunk, h, weights)
        require(
            bool(self.filled),
            f"Chunk {j} is the first to run, and with gradients: if the fill keeps graphs, all k of them are in "
            "memory. What switches them off?",
        )
        require(
            h.grad_fn is None and h.requires_grad,
            f"When chunk {j} is rebuilt, the state before it is no leaf that requires a gradient: nothing can be "
            "sent back to it. Who has to say so?",
        )
        self.rebuilt.append(j)
        results = toy_state.f(chunk, h, self.graphs.own(j, weights))
        self.graphs.see(j, results)
        return results


@within("hand_on")
def _check_hand_on(module: ModuleType) -> None:
    chunks, _, weights = _toy()
    h, v = random(11, (2, 4), (2, 4))

    def results(make: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Values:
        leaf, theta = h.clone().requires_grad_(), weights.clone().requires_grad_()
        _, end, decay = toy_state.f(chunks[0], leaf, theta)
        out = make(leaf, end, decay)
        if not isinstance(out, Tensor) or not out.requires_grad:
            return {"what is handed on": out}
        by_h, by_theta = torch.autograd.grad(out, [leaf, theta], v, allow_unused=True, materialize_grads=True)
        names = ("what is handed on", "its gradient by the state before the chunk", "its gradient by the weights")
        return dict(zip(names, (out.detach(), by_h, by_theta), strict=True))

    def right(h: Tensor, end: Tensor, decay: Tensor) -> Tensor:
        return end - decay.detach() * (h - h.detach())

    def known() -> Mistakes:
        yield (
            "The gradient still has the way by the decay: it would come past the chunk twice.",
            results(lambda h, end, decay: end),
        )
        less = (
            "What is handed on is not the state after the chunk: the part of the old state is taken off its value. "
            "Only the gradient is to lose it: what has the value 0 and the gradient of h?"
        )
        yield less, results(lambda h, end, decay: end - decay * h)
        yield less, results(lambda h, end, decay: end - decay.detach() * h)
        yield (
            "What is handed on is not the state after the chunk: the part of the old state is taken off its value, and "
            "the gradient has kept it. Which of the two h is to have no gradient?",
            results(lambda h, end, decay: end - decay * h.detach()),
        )
        yield (
            "The way by the decay is added once more instead of being taken off.",
            results(lambda h, end, decay: end + decay * (h - h.detach())),
        )
        yield (
            "The gradient is that of h alone, as if the chunk did nothing else. Which function of the chunk's own "
            "result is to keep its gradient, and which part of that is to be taken off?",
            results(lambda h, end, decay: end.detach() + h - h.detach()),
        )
        yield (
            "The way by the decay is replaced by a way without any decay. What is the derivative of decay · h by h?",
            results(lambda h, end, decay: end + (1 - decay) * (h - h.detach())),
        )
        yield less, results(lambda h, end, decay: end - h)
        yield (
            "What is handed on is the state after the chunk, faded by the decay. Only the gradient is to lose "
            "something.",
            results(lambda h, end, decay: end * decay),
        )
        yield (
            "The whole of h is taken off. How much of it is left in the state after the chunk?",
            results(lambda h, end, decay: end - (h - h.detach())),
        )

    got, expected = results(module.hand_on), results(right)
    require(
        len(got) > 1 or not isinstance(got["what is handed on"], Tensor),
        "What comes back has no graph: the chunk would never learn what to hand on. What was detached?",
    )
    compare({**dict.fromkeys(expected), **got}, expected, known(), "layer channel")


def _sums(entries: Entries) -> Tensor:
    chunks, h, weights = _toy()
    losses = []
    with torch.no_grad():
        for chunk, entry in zip(chunks, entries, strict=True):
            loss, h, _ = toy_state.f(chunk, h, weights)
            losses.append(loss * (0.0 if entry is None else entry.loss))
    return torch.stack(losses)


def _check_draw(module: ModuleType, entries: Entries) -> None:
    chunks, start, weights = _toy()
    weights.requires_grad_()
    kept = [j for j, entry in enumerate(entries) if entry is not None]
    spy = _Spy()
    total = module.spaco(spy, chunks, start, weights, entries)
    for j in sorted({*range(kept[-1])} - {*spy.filled}):
        raise AssertionError(f"The fill never ran chunk {j}, on which later chunks stand.")
    check_walk(spy.rebuilt, kept)
    require(weights.grad is not None, "weights.grad is None: nothing has been backpropagated to the weights.")
    compare({GRADIENT: weights.grad}, _gradient(entries), _walk_mistakes(entries), "matrix row column")
    spy.graphs.check_backwards()
    parts = _sums(entries)
    unscaled = _sums([None if entry is None else mc.Weight(1.0, 1.0) for entry in entries])
    words = "The returned loss is not scaled by weight.loss: on average it would be too small."
    check_loss_value(total, parts[kept], [(words, {"the returned loss": unscaled.sum()})])
    spy.graphs.check()


def check_state(module: ModuleType) -> None:
    """hand_on; then spaco with all chunks, with some, and with none."""
    _check_hand_on(module)
    with within("spaco, with all chunks kept and factors of 1"):
        _check_draw(module, [mc.Weight(1.0, 1.0)] * 5)
    with within("spaco"):
        _check_draw(module, [mc.Weight(2.0, 3.0), None, mc.Weight(1.5, 2.5), mc.Weight(4.0, 1.25), None])
        chunks, start, weights = _toy()
        total = module.spaco(toy_state.f, chunks, start, weights.requires_grad_(), [None] * len(chunks))
        nothing = isinstance(total, Tensor | float | int) and float(total) == 0
        require(nothing, f"When no chunk is kept, the returned loss has to be 0, but it is {total}.")
        touched = weights.grad is not None and bool(weights.grad.any())
        require(not touched, "When no chunk is kept, the gradient must stay as it was.")
