"""Solution 4: SeCO from first principles."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Model = Callable[[Tensor, Sequence[Tensor], Tensor], tuple[Tensor, Tensor]]


def seco(f: Model, chunks: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Add the gradient of J_0 + … + J_{k-1} to `weights.grad`; return the sum, detached (Algorithm 1)."""
    memories: list[Tensor] = []
    with torch.no_grad():  # lines 1-3: fill
        for x in chunks:
            memories.append(f(x, memories, weights)[1])
    for m in memories:
        m.requires_grad_()  # leaves: whatever is sent back to them adds up in .grad
        m.grad = torch.zeros_like(m)

    total = torch.zeros(())
    for j in reversed(range(len(chunks))):  # line 4
        loss, memory = f(chunks[j], memories[:j], weights)  # line 5: rebuild
        torch.autograd.backward([loss, memory], [None, memories[j].grad])  # lines 6 and 7: relay, backward
        total = total + loss.detach()
    return total
