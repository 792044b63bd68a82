"""What is known about mistakes in exercise 1, attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from types import ModuleType

import torch
from torch import Tensor

from ..diagnose import Mistakes, Values, compare, hint, require
from .common import random

# Everything that a choice may be, the right one first, and what is to be said about a wrong one.
MASK = {
    "right": "",
    "top left": (
        "The causal mask is aligned top left, as with is_causal=True: the chunk's first query sees only the very "
        "first position of the past. How many positions stand before that query?"
    ),
    "no mask": "There is no causal mask: a query sees the later positions of its own chunk. What may it see of it?",
    "not itself": (
        "A query does not see its own position: the mask is off by one. In which column of the mask does the first "
        "query's own position stand?"
    ),
    "next": "A query sees the position after its own: the mask is off by one. It would know the answer, would it not?",
    "no past": "The queries see their own chunk only. Where do past_k and past_v come in?",
    "afterwards": (
        "Masked after the softmax: what is left no longer sums to 1. "
        "What must a masked score be before the softmax, so that its probability is 0?"
    ),
    "inside out": (
        "The mask is inside out: what a query may see is hidden, and what it may not is shown. What does True mean "
        "for the function that takes the mask? (masked_fill hides it, scaled_dot_product_attention shows it.)"
    ),
    "by C": (
        "The mask begins at column C, the length of the chunk. How many positions stand before the chunk's first one?"
    ),
    "over queries": "The softmax runs over the queries. Over what do a query's probabilities sum to 1?",
    "finite": "Masked scores are -1, which is a score like any other. What must it be so that its exponential is 0?",
    "zero score": "Masked scores are 0, but exp(0) is 1. What must a score be so that its exponential is 0?",
}
SCALE = {
    "right": "",
    "none": "The scores are not divided by sqrt(D). What is the variance of a sum of D products?",
    "by D": "The scores are divided by D, not by its square root.",
    "of H D": (
        "The scores are divided by sqrt(H · D). Each head has a softmax of its own: over how many products is its sum?"
    ),
    "of G": "The scores are divided by the root of the number of key heads: which dimension of q is D?",
    "of H": "The scores are divided by the root of the number of heads: which dimension of q is D?",
    "of C": "The scores are divided by the root of the chunk's length: which dimension of q is D?",
}
HEADS = {
    "right": "",
    "tiled": (
        "The key heads are tiled (0 1 0 1), but neighbouring query heads share one (0 0 1 1). "
        "Which function repeats each entry in place?"
    ),
}
ORDER = {
    "right": "",
    "keys first": "The chunk's keys stand before those of the past, the values behind. Which value belongs to a key?",
    "values first": "The chunk's values stand before those of the past, the keys behind. Which value belongs to a key?",
    "keys for values": "The probabilities are multiplied by the keys. What are the values for?",
    "chunk first": "The chunk's keys and values stand before those of the past. In which order does the mask count?",
}


def _attention(
    inputs: Sequence[Tensor], mask: str = "right", scale: str = "right", heads: str = "right", order: str = "right"
) -> Tensor:
    q, k, v, past_k, past_v = inputs
    H, C, D = q.shape[1:]
    G, P = past_k.shape[1:3]
    k_pair, v_pair = (past_k, k), (past_k, k) if order == "keys for values" else (past_v, v)
    keys = torch.cat(k_pair[::-1] if order in ("chunk first", "keys first") else k_pair, dim=2)
    values = torch.cat(v_pair[::-1] if order in ("chunk first", "values first") else v_pair, dim=2)
    if heads == "right":
        keys, values = (x.repeat_interleave(H // G, dim=1) for x in (keys, values))
    else:
        keys, values = (x.repeat(1, H // G, 1, 1) for x in (keys, values))
    under = {"right": D, "none": 1, "by D": D**2, "of H D": H * D, "of G": G, "of H": H, "of C": C}[scale]
    scores = q @ keys.mT / under**0.5
    every = torch.ones(C, P + C, dtype=torch.bool)
    if mask == "afterwards":
        return (scores.softmax(-1) * every.tril(P)) @ values
    if mask == "zero score":
        return (scores * every.tril(P)).softmax(-1) @ values
    if mask == "finite":
        return scores.masked_fill(~every.tril(P), -1).softmax(-1) @ values
    if mask == "over queries":
        return scores.masked_fill(~every.tril(P), -torch.inf).softmax(-2) @ values
    visible = {
        "right": every.tril(P),
        "inside out": ~every.tril(P),
        "by C": every.tril(C - 1),
        "top left": every.tril(),
        "no mask": every,
        "not itself": every.tril(P - 1),
        "next": every.tril(P + 1),
        "no past": every.tril(P) & (torch.arange(P + C) >= P),
    }[mask]
    p = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return (
        p.nan_to_num() if mask == "inside out" else p
    ) @ values  # a row that sees nothing: 0, as PyTorch's own has it


def _attention_mistakes(name: str, inputs: Sequence[Tensor]) -> Mistakes:
    choices = [chosen for chosen in product(MASK, SCALE, HEADS, ORDER) if chosen.count("right") > 1]
    for chosen in sorted(choices, key=lambda chosen: -chosen.count("right")):  # single mistakes first
        words = [table[choice] for table, choice in zip((MASK, SCALE, HEADS, ORDER), chosen, strict=True)]
        yield "\n".join(filter(None, words)), {name: _attention(inputs, *chosen)}


SIZES = {  # what PyTorch says, and what it means here
    "at non-singleton dimension 1": (
        "The H query heads share G key heads, so keys and values have fewer heads than the queries. How often does "
        "each of them have to be repeated, so that there are H?"
    ),
    "at non-singleton dimension 3": (
        "Scores and mask have P + C columns, the past and the chunk. Which of yours has fewer?"
    ),
    "Sizes of tensors must match": (
        "Past and chunk stand one after the other in the text. Which dimension of (B, G, positions, D) is that?"
    ),
}


@contextmanager
def _hints() -> Iterator[None]:
    with ExitStack() as stack:
        for symptom, words in SIZES.items():
            stack.enter_context(hint(symptom, words))
        yield


def check_attention(module: ModuleType) -> None:
    """attend: the output for long, empty and short pasts, then the gradients of all inputs."""
    for P, C, H, G in ((4, 3, 4, 2), (0, 3, 4, 2), (5, 1, 2, 2)):
        D = 6
        inputs = random(P, (2, H, C, D), *[(2, G, C, D)] * 2, *[(2, G, P, D)] * 2)
        copies = [x.clone() for x in inputs]
        name = f"the output (P = {P}, C = {C}, H = {H}, G = {G})"
        with _hints():
            got = module.attend(*copies)
        mistakes = _attention_mistakes(name, inputs)
        compare({name: got}, {name: _attention(inputs)}, mistakes, "batch head position channel")
        same = all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))
        require(same, "attend changed one of its inputs in place. Others still need them.")

    names = ("q", "k", "v", "past_k", "past_v")
    results: list[Values] = []
    for attend in (module.attend, lambda *args: _attention(args)):
        leaves = [x.clone().requires_grad_() for x in random(0, (2, 4, 3, 6), *[(2, 2, 3, 6)] * 2, *[(2, 2, 4, 6)] * 2)]
        attend(*leaves).square().sum().backward()
        results.append({f"the gradient of {name}": x.grad for name, x in zip(names, leaves, strict=True)})
    for name, grad in results[0].items():
        require(grad is not None, f"{name} is None: did a detach or a no_grad cut it off?")
    compare(results[0], results[1], axes="batch head position channel")
