"""What a training run asks of the other processes that it runs on, if there are any."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..models.quantize import count_parameters
from ..pipeline.stage import PipelineStage

T = TypeVar("T")


class Ranks:
    """The processes that train a model: several copies of a pipeline if it is a `PipelineStage`, else this one alone.

    Everything here is called on all processes at a time, and costs one alone nothing.
    """

    def __init__(self, model: Any) -> None:
        stage = model if isinstance(model, PipelineStage) else None
        self.part = model
        self.model: Any = model if stage is None else stage.model  # as it is saved
        self.links = None if stage is None else stage.links
        self.twice = {} if stage is None else stage.twice  # parameters that another rank has too
        self.copy, self.copies = (0, 1) if self.links is None else (self.links.copy, self.links.copies)
        self.is_first = self.links is None or (self.links.is_first and self.copy == 0)  # it speaks and writes the files

    def mine(self, of_all: Sequence[T]) -> list[tuple[int, T]]:
        """What this copy works on, with its number."""
        return list(enumerate(of_all))[self.copy :: self.copies]

    def once(self, named: dict[str, T]) -> dict[str, T]:
        """Of what each rank has by a parameter's name, what counts here, so that each parameter counts once."""
        return {name: x for name, x in named.items() if name not in self.twice}

    def everyones(self, mine: T) -> list[T]:
        """What each process says, a picklable object."""
        return [mine] if self.links is None else self.links.everyones(mine, of_all=True)

    def of_pipeline(self, mine: T) -> list[T]:
        """What each rank of this pipeline says."""
        return [mine] if self.links is None else self.links.everyones(mine)

    def add_copies(self, x: Tensor) -> None:
        """Add to x those of the other copies, in place."""
        if self.links is not None:
            self.links.add(x, self.links.copies_of_me)

    def add_all(self, x: Tensor) -> None:
        """Add to x (on the CPU) those of all processes, in place."""
        if self.links is not None:
            self.links.add(x)

    def norm(self, named: dict[str, Tensor]) -> Tensor:
        """Of all ranks' tensors together; on the CPU."""
        norms = [torch.linalg.vector_norm(x) for x in self.once(named).values()]
        here = torch.stack(norms).cpu() if norms else torch.zeros(0)
        return torch.linalg.vector_norm(torch.cat(self.of_pipeline(here)))

    def whole(self, named: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """The tensors of all ranks by name, on the first process, whose host has room for them; None on the others."""
        if self.links is None:
            return named
        return self.links.to_first(self.once(named)) if self.copy == 0 else None

    def count_parameters(self) -> tuple[int, int]:
        """How many numbers the model has on all ranks together, and how many of them learn."""
        named = dict(self.part.named_parameters())
        here = self.once(named).values()
        again = sum(p.numel() for p in named.values()) - sum(p.numel() for p in here)
        learnt = sum(p.numel() for p in here if p.requires_grad)
        total, trained = zip(*self.of_pipeline((count_parameters(self.part) - again, learnt)), strict=True)
        return sum(total), sum(trained)

    def describe(self) -> str:
        """The processes in words; empty for one alone."""
        layers = self.of_pipeline(len(self.part.layers))
        over = f"over {len(layers)} ranks with {', '.join(map(str, layers))} layers" if len(layers) > 1 else ""
        copies = f"{self.copies} copies" if self.copies > 1 else ""
        return ", each ".join(filter(None, [copies, over]))
