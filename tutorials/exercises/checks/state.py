"""What is known about mistakes in exercise 8, the state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import minichunk as mc

from .. import toy_state
from ..diagnose import Mistakes, Values, close, compare, require, within
from .common import WatchedModel, check_loss_value, check_nothing_kept, check_walk, random

NAME = "the gradient of the weights"
Entries = Sequence[mc.Weight | None]


def _toy() -> tuple[list[Tensor], Tensor, Tensor]:
    *chunks, start, weights = random(7, (3, 4), (2, 4), (3, 4), (1, 4), (2, 4), (2, 4), (3, 4, 4))
    return chunks, 0 * start, 0.6 * weights


def _fill() -> tuple[list[Tensor], list[Tensor]]:
    """The states before each chunk and after the last one; and the decays."""
    chunks, start, weights = _toy()
    states, decays = [start], []
    for chunk in chunks:
        _, end, decay = toy_state.f(chunk, states[-1], weights)
        states.append(end)
        decays.append(decay)
    return states, decays


def _expected(entries: Entries) -> tuple[Values, Tensor]:
    """The gradient by plain autograd through all chunks at once, and each kept chunk's part of the loss."""

    def scaled(x: Tensor, factor: Tensor | float) -> Tensor:  # x, whose gradient is multiplied by the factor
        return x.detach() + factor * (x - x.detach())

    chunks, s, weights = _toy()
    weights.requires_grad_()
    losses = []
    for chunk, entry in zip(chunks, entries, strict=True):
        h = s if entry is not None else s.detach()
        loss, end, decay = toy_state.f(chunk, h, weights)
        decay = decay.detach()
        own = scaled(end - decay * (h - h.detach()), 0.0 if entry is None else entry.relay)
        s = own + decay * (s - s.detach())  # the state's value is the chunk's; its gradient goes to it, and past it
        losses += [] if entry is None else [entry.loss * loss]
    (grad,) = torch.autograd.grad(torch.stack(losses).sum(), weights)
    return {NAME: grad}, torch.stack(losses).detach()


def _walk(
    entries: Entries,
    step: Any = lambda adjoint, decay, sent, kept: decay * adjoint + sent,
    relay: Callable[[mc.Weight], float] = lambda entry: entry.relay,
    loss_factor: Callable[[mc.Weight], float] = lambda entry: entry.loss,
    leave_out: bool = True,
) -> Values:
    """The gradient when the walk makes a mistake; as it stands, the right one.

    step: the next adjoint. leave_out: the way by the decay is no part of what a chunk hands on.
    """
    (chunks, start, weights), (states, decays) = _toy(), _fill()
    weights.requires_grad_()
    adjoint = torch.zeros_like(start)
    for j in reversed(range(len(chunks))):
        sent, entry = torch.zeros_like(start), entries[j]
        if entry is not None:
            h = states[j].clone().requires_grad_()
            loss, end, _ = toy_state.f(chunks[j], h, weights)
            end = end - decays[j] * (h - h.detach()) if leave_out else end
            torch.autograd.backward([loss_factor(entry) * loss, end], [None, relay(entry) * adjoint])
            sent = h.grad
        adjoint = step(adjoint, decays[j], sent, entry is not None)
    return {NAME: weights.grad}


def _walk_mistakes(entries: Entries) -> Mistakes:
    yield (
        "The adjoint passes a chunk twice: by the decay in the walk, and once more within the rebuilt chunk. "
        "What of the state after the chunk does hand_on leave out, and is it what you backpropagate from?",
        _walk(entries, leave_out=False),
    )
    yield (
        "The way by the decay is missing: hand_on leaves it out of what the chunk sends, and nobody else carries it. "
        "What of the old adjoint is in the new one?",
        _walk(entries, lambda adjoint, decay, sent, kept: sent),
    )
    yield (
        "Past a skipped chunk the adjoint goes undiminished. What has that chunk left of the state before it?",
        _walk(entries, lambda adjoint, decay, sent, kept: decay * adjoint + sent if kept else adjoint),
    )
    yield (
        "Past a skipped chunk the adjoint goes for sure, but past a kept one it is multiplied by the relay factor, "
        "too: on average that is too much. Which part of the way depends on no coin, in a kept chunk as well?",
        _walk(entries, lambda adjoint, decay, sent, kept: sent if kept else decay * adjoint, leave_out=False),
    )
    yield (
        "Every chunk learns from its own loss alone. Does the backward start from what the chunk hands on, too, and is "
        "that in the adjoint which the chunks sent back to the states that they read? Where has autograd put it?",
        _walk(entries, relay=lambda entry: 0.0),
    )
    yield "What is relayed is not scaled. Where does weight.relay go?", _walk(entries, relay=lambda entry: 1.0)
    yield "The loss is not scaled. Where does weight.loss go?", _walk(entries, loss_factor=lambda entry: 1.0)


def _check_state(j: int, h: Tensor, who: str) -> None:
    given = next((i for i, state in enumerate(_fill()[0]) if close(h, state)), None)
    found = "a state that no chunk has left behind" if given is None else f"h_{given}"
    require(given == j, f"{who} was given {found}, but it stands on h_{j}. Which state was there before the chunk?")


@within("hand_on")
def _check_hand_on(module: ModuleType) -> None:
    chunks, _, weights = _toy()
    h, v = random(11, (2, 4), (2, 4))

    def results(make: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Values:
        leaf, theta = h.clone().requires_grad_(), weights.clone().requires_grad_()
        out = make(leaf, *toy_state.f(chunks[0], leaf, theta)[1:])
        if not isinstance(out, Tensor) or not out.requires_grad:
            raise AssertionError("What comes back has no graph: the chunk would never learn. What was detached?")
        grads = torch.autograd.grad(out, [leaf, theta], v, allow_unused=True, materialize_grads=True)
        names = ("what is handed on", "its gradient by the state before the chunk", "its gradient by the weights")
        return dict(zip(names, (out.detach(), *grads), strict=True))

    less = (
        "What is handed on is not the state after the chunk: the part of the old state is taken off its value. "
        "Only the gradient is to lose it: what has the value 0 and the gradient of h?"
    )
    compare(results(module.hand_on), results(lambda h, end, decay: end - decay.detach() * (h - h.detach())), [
        ("The gradient still has the way by the decay: it would come past the chunk twice.",
         results(lambda h, end, decay: end)),
        (less, results(lambda h, end, decay: end - decay * h)),
        (less, results(lambda h, end, decay: end - decay.detach() * h)),
    ], "layer channel")  # fmt: skip


def _check_draw(module: ModuleType, entries: Entries) -> None:
    chunks, start, weights = _toy()
    weights.requires_grad_()
    kept = [j for j, entry in enumerate(entries) if entry is not None]
    model = WatchedModel(toy_state.f, chunks, _check_state)
    total = module.spaco(model, chunks, start, weights, entries)
    check_walk(model.rebuilt, kept)
    require(weights.grad is not None, "weights.grad is None: nothing has been backpropagated to the weights.")
    right, losses = _expected(entries)
    compare({NAME: weights.grad}, right, _walk_mistakes(entries), "matrix row column")
    check_loss_value(total, losses)
    model.graphs.check()


def check_state(module: ModuleType) -> None:
    """hand_on; then spaco with all chunks, with some, and with none."""
    _check_hand_on(module)
    with within("spaco, with all chunks kept and factors of 1"):
        _check_draw(module, [mc.Weight(1.0, 1.0)] * 5)
    with within("spaco"):
        _check_draw(module, [mc.Weight(2.0, 3.0), None, mc.Weight(1.5, 2.5), mc.Weight(4.0, 1.25), None])
        chunks, start, weights = _toy()
        total = module.spaco(toy_state.f, chunks, start, weights.requires_grad_(), [None] * len(chunks))
        check_nothing_kept(total, [weights.grad])
