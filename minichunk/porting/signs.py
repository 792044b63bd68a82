"""What the numbers of a tensor that differs tell by themselves: whose they are, and what is in them too often.

Where a sign is clear, it stands in the place of the mistakes that only may be (meanings.py).
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor

NEAR = 1e-3  # of a norm: where rounding may do more, equal numbers tell nothing


class Seen(NamedTuple):
    """A tensor that differs, both of the expected one's shape and finite.

    golden, mine: all tensors of the file and of the port. agreed: the names of those before this one, which are right.
    bound: what rounding may do, relative to a norm.
    """

    name: str
    case: str
    golden: dict[str, Tensor]
    mine: dict[str, Tensor]
    agreed: list[str]
    bound: float

    @property
    def got(self) -> Tensor:
        return self.mine[self.name].double()

    @property
    def expected(self) -> Tensor:
        return self.golden[self.name]

    def equal(self, a: Tensor, b: Tensor) -> bool:
        """Up to rounding."""
        return self.bound < NEAR and a.shape == b.shape and float((a - b).norm()) <= self.bound * float(b.norm())

    def other_chunk(self, n: int) -> str:
        """The same tensor's name at chunk n."""
        return re.sub(r"chunk\.\d+", f"chunk.{n}", self.name)


def sign(seen: Seen) -> str | None:
    """In words; None: the numbers tell nothing for certain."""
    if not (found := re.search(r"chunk\.(\d+)\.(grad\.)?", seen.name)):
        return None
    chunk, is_grad = int(found[1]), found[2] is not None
    step = seen.name[: found.end()]
    if is_grad and any(name.startswith(step) for name in seen.agreed):  # so it was kept and cleared at the right time
        return "yours is all zeros: no gradient comes to this parameter" if all_zeros(seen) else None
    if (is_grad or not all_zeros(seen)) and _one_buffer(seen):
        return "yours is the same for all chunks: a view of one buffer, which goes on changing; keep a copy"
    if is_grad and all_zeros(seen):
        return "yours is all zeros: it was kept before the backward pass"
    for n in range(4):
        other = seen.golden.get(seen.other_chunk(n))
        if n == chunk or other is None or not other.any() or not seen.equal(seen.got, other):
            continue
        if not is_grad:
            return f"yours is chunk {n}'s: chunks are numbered from 0, from the text's beginning on"
        if n > chunk:  # the whole gradient at an earlier one is what a walk from the first chunk on may give
            return f"yours is chunk {n}'s: it was kept before this chunk's backward pass"
    return _not_cleared(seen) if is_grad else None


def _one_buffer(seen: Seen) -> bool:
    names = [name for n in range(4) if (name := seen.other_chunk(n)) in seen.mine.keys() & seen.golden.keys()]
    alike = [name for name in names if seen.golden[name].shape == seen.expected.shape]
    differ = any(not torch.equal(seen.golden[name], seen.expected) for name in alike)
    return differ and all(torch.equal(seen.mine[name].double(), seen.got) for name in alike)


def _not_cleared(seen: Seen) -> str | None:
    """Whether yours is the expected one plus what `full` or another method ends with."""
    parameter = seen.name.partition(".grad.")[2]
    ends = [f"full.grad.{parameter}", *(f"{n}spaco.chunk.0.grad.{parameter}" for n in ("second.", ""))]
    for end in (seen.golden[name] for name in ends if name in seen.golden):
        for times in (1, 2):
            if end.any() and seen.equal(seen.got, seen.expected + times * end):
                return "yours has another method's whole gradient in it: `.grad` was not cleared before this method"
    return None


def all_zeros(seen: Seen) -> bool:
    return not seen.got.any()


def _passing(seen: Seen) -> Tensor:
    """g · decay of the chunk after, which was kept with the factor 1."""
    after = seen.other_chunk(int(re.findall(r"chunk\.(\d+)", seen.name)[0]) + 1)
    return seen.golden[after] * seen.golden[after.replace("adjoint", "decay")]


def not_carried(seen: Seen) -> bool:
    return seen.equal(seen.got, seen.expected - _passing(seen))


def carried_twice(seen: Seen) -> bool:
    return seen.equal(seen.got, seen.expected + _passing(seen))


def not_decayed(seen: Seen) -> bool:
    """At chunk 0, where chunk 1 is skipped; its gates do not depend on the draw."""
    decay = seen.golden[seen.other_chunk(1).replace("spaco", "seco").replace("adjoint", "decay")]
    return seen.equal(seen.got * decay, seen.expected)
