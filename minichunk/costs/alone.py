"""One rank of a pipeline by itself, to be counted: what it hands over is taken by nobody, what it is given is empty."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..models.stack import Stack
from ..pipeline.links import MOST_ON_THE_WAY, Links
from ..pipeline.stage import PipelineStage
from .setting import Share


class Alone(Links):
    """Of one of `ranks` ranks, without the others: messages are sent and received as ever, and never travel.

    handed: called when one has been sent.
    """

    def __init__(self, ranks: int, rank: int, handed: Callable[[], None]) -> None:
        self.ranks, self.rank, self.copies, self.copy = ranks, rank, 1, 0
        self.is_first, self.is_last = rank == 0, rank == ranks - 1
        self.ends = None
        self.on_the_way = deque()
        self.handed = handed

    def take(self, x: Tensor, source: int) -> Tensor:
        return x

    def hand(self, x: Tensor, to: int) -> None:
        x = x.detach().contiguous()
        self.handed()
        self.on_the_way.append((self, x, to))
        self.flush(MOST_ON_THE_WAY)

    def wait(self) -> None:
        """As what a real message is sent by: until it has been taken."""

    def add(self, x: Tensor, group: Any = None) -> None:
        """Nothing comes from others."""


def stage_alone(model: Stack, share: Share, handed: Callable[[], None]) -> tuple[PipelineStage, bool]:
    """What is left of the model on this rank; and whether anything learns on the ranks before it. See Alone."""
    before = [model.embedding, *model.layers[: share.layers.start]] if share.rank else []
    below_learns = any(parameter.requires_grad for module in before for parameter in module.parameters())
    links = Alone(len(share.counts), share.rank, handed)
    return PipelineStage(model, share.counts, links=links), below_learns
