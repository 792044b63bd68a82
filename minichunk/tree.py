"""Rows that begin alike, a prompt and its answers, as one row: what they share runs once.

The *trunk*, as many first positions as are the same in all rows, is the row's first document; what is left of each row
is a document of its own after it, which sees the trunk and then itself. So a tree of chunks is cut, filled and walked
back like any packed row. Positions are those in the row that a token comes from.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .chunks import Documents


class Tree(NamedTuple):
    """place: int64 (B, T), of each position in the one row of `length` positions; what stands behind a row's last
    target is left out, and its place means nothing. labelled: bool (B, T), on the same device: where there is one."""

    place: Tensor
    labelled: Tensor
    length: int

    def rows(self, x: Tensor) -> Tensor:
        """What the one row has for each target, (1, length) to (B, T); 0 without a target."""
        return x[0][self.place].where(self.labelled, 0)

    def row(self, x: Tensor) -> Tensor:
        """The other way, (B, T) to (1, length): what belongs to one place is added up."""
        return x.new_zeros(self.length).index_add(0, self.place[self.labelled], x[self.labelled])[None]


def grow(
    input_ids: Tensor, targets: Tensor, positions: Tensor, nothing: int
) -> tuple[Tree, Documents, Tensor, Tensor, Tensor]:
    """The tree of some rows, its documents, and of the one row, (1, length), what is given of the rows, int64 (B, T).

    nothing: the target where there is none. Rows share a position if they have the same token there, at the same
    position, and no two different targets: so the trunk mostly ends before the last token that they have in common.
    """
    T, labelled = input_ids.shape[1], targets != nothing
    common = targets.where(labelled, -1).amax(0)
    alike = (input_ids == input_ids[:1]) & (positions == positions[:1]) & ((targets == common) | ~labelled)
    trunk = int(alike.all(0).long().cumprod(0).sum())
    t = torch.arange(T, device=input_ids.device)
    ends = (labelled * (t + 1)).amax(1).clamp(min=trunk)  # (B): behind each row's last target
    starts = trunk + (ends - trunk).cumsum(0) - (ends - trunk)
    own = (t >= trunk) & (t < ends[:, None])
    source = torch.cat([t[:trunk], own.flatten().nonzero()[:, 0]])  # of each place of the one row, in flat rows
    place = t.where(t < trunk, starts[:, None] + t - trunk).where(own | (t < trunk), 0)
    begins = [0] * (trunk > 0) + starts[ends > trunk].tolist()
    targets = common.where((t < trunk) & (common >= 0), targets)
    ids, targets, places = (x.flatten()[source][None] for x in (input_ids, targets, positions))
    return Tree(place, labelled, len(source)), Documents(tuple(begins), trunk), ids, targets, places
