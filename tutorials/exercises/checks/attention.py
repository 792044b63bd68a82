"""What is known about mistakes in exercise 1, attention."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..diagnose import Values, compare, hint, require
from .common import random

# What is said about each mistake, and the arguments of `_attention` that make it. A rule takes the position i of a
# query, the position j of a key and the length P of the past.
MISTAKES: dict[str, dict[str, Any]] = {
    "The causal mask is aligned top left, as with is_causal=True: the chunk's first query sees only the very first "
    "position of the past. How many positions stand before that query?": {"rule": lambda i, j, P: j <= i - P},
    "There is no causal mask: a query sees the later positions of its own chunk. What may it see of it?": {
        "rule": lambda i, j, P: j >= 0 * i
    },
    "A query does not see its own position: the mask is off by one. In which column of the mask does the first query's "
    "own position stand?": {"rule": lambda i, j, P: j < i},
    "The mask is inside out: what a query may see is hidden, and what it may not is shown. What does True mean for the "
    "function that takes the mask? (masked_fill hides it, scaled_dot_product_attention shows it.)": {
        "rule": lambda i, j, P: j > i
    },
    "Masked after the softmax: what is left no longer sums to 1. What must a masked score be before the softmax, so "
    "that its probability is 0?": {"after": True},
    "The scores are not divided by sqrt(D). What is the variance of a sum of D products?": {"scaled": False},
    "The key heads are tiled (0 1 0 1), but neighbouring query heads share one (0 0 1 1). Which function repeats each "
    "entry in place?": {"tiled": True},
    "The chunk's keys stand before those of the past, the values behind. Which value belongs to a key?": {
        "keys_turned": True
    },
}


def _attention(
    inputs: Sequence[Tensor],
    rule: Any = lambda i, j, P: j <= i,
    after: bool = False,
    scaled: bool = True,
    tiled: bool = False,
    keys_turned: bool = False,
) -> Tensor:
    q, k, v, past_k, past_v = inputs
    H, C, D = q.shape[1:]
    G, P = past_k.shape[1:3]
    keys = torch.cat([k, past_k] if keys_turned else [past_k, k], dim=2)
    values = torch.cat([past_v, v], dim=2)
    keys, values = (x.repeat(1, H // G, 1, 1) if tiled else x.repeat_interleave(H // G, dim=1) for x in (keys, values))
    scores = q @ keys.mT / (D**0.5 if scaled else 1)
    seen = rule(torch.arange(P, P + C)[:, None], torch.arange(P + C), P)
    if after:
        return (scores.softmax(-1) * seen) @ values
    # A row that sees nothing is 0, as PyTorch's own has it.
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num() @ values


FEWER_HEADS = (
    "at non-singleton dimension 1",
    "The H query heads share G key heads, so keys and values have fewer heads than the queries. How often does each of "
    "them have to be repeated, so that there are H?",
)


def check_attention(module: ModuleType) -> None:
    """attend: the output for long, empty and short pasts, then the gradients of all inputs."""
    for P, C, H, G in ((4, 3, 4, 2), (0, 3, 4, 2), (5, 1, 2, 2)):
        inputs = random(P, (2, H, C, 6), *[(2, G, C, 6)] * 2, *[(2, G, P, 6)] * 2)
        copies = [x.clone() for x in inputs]
        name = f"the output (P = {P}, C = {C}, H = {H}, G = {G})"
        with hint(*FEWER_HEADS):
            got = module.attend(*copies)
        mistakes = [(words, {name: _attention(inputs, **changes)}) for words, changes in MISTAKES.items()]
        compare({name: got}, {name: _attention(inputs)}, mistakes, "batch head position channel")
        same = all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))
        require(same, "attend changed one of its inputs in place. Others still need them.")

    results: list[Values] = []
    for attend in (module.attend, lambda *args: _attention(args)):
        leaves = [x.clone().requires_grad_() for x in random(0, (2, 4, 3, 6), *[(2, 2, 3, 6)] * 2, *[(2, 2, 4, 6)] * 2)]
        attend(*leaves).square().sum().backward()
        names = ("q", "k", "v", "past_k", "past_v")
        results.append({f"the gradient of {name}": x.grad for name, x in zip(names, leaves, strict=True)})
    for name, grad in results[0].items():
        require(grad is not None, f"{name} is None: did a detach or a no_grad cut it off?")
    compare(results[0], results[1], axes="batch head position channel")
