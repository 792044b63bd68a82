"""A rank's part of a model: some adjacent layers; with the first ones the embedding, with the last norm and LM head."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..batch import widen_gradients
from ..chunks import Chunk, cut, span
from ..errors import InputError
from ..loss import token_losses
from ..memory.layer_memory import LayerMemories, wide
from ..models.load import load_model
from ..models.lora import Placeholder
from ..models.stack import Stack
from ..protocol import DEFAULTS, Options, Written
from .links import Links
from .split_layers import check_counts, split_layers


class PipelineStage(Stack):
    """What is left of `model` on this rank; `stage.model` is the model itself, and its parameters keep their names.

    Made at the same time on all processes of the default process group, of models with the same weights: seed what is
    drawn at random. The model may be on the CPU; `stage.to(device)` then moves what is left. `PipelineStage.load` reads
    a checkpoint without what other ranks have.

    counts: how many layers each rank gets; None: `split_layers(model, ranks)`.
    links: between the ranks; None: all processes are one pipeline. `Links(2)` makes pipelines of two, each of which
        works on documents of its own; `stage.add_copies()` then adds up their gradients. With `Links(timeout=…)` a rank
        that does not answer in that time is given up, with RankLost.
    Raises InputError without a process group, for fewer layers than ranks, and for counts that do not add up.
    """

    def __init__(self, model: Stack, counts: Sequence[int] | None = None, links: Links | None = None) -> None:
        super().__init__()
        self.links = links = links or Links()
        if counts is None:
            counts = split_layers(model, links.ranks)
        check_counts(counts, len(model.layers), links.ranks)
        start, stop = sum(counts[: links.rank]), sum(counts[: links.rank + 1])
        self.layer_range = slice(start, stop)
        self.vocab_size, self.hidden_size = model.lm_head.weight.shape
        self.is_tied = links.ranks > 1 and model.lm_head.weight is model.embedding.weight
        head = next(name for name, parameter in model.named_parameters() if parameter is model.lm_head.weight)
        ends = ([] if links.is_first else [model.embedding]) + ([] if links.is_last else [model.norm, model.lm_head])
        _take_out(model, [*model.layers[:start], *model.layers[stop:], *ends])
        self.model = model
        # Of a parameter that the first rank has too, its name there by the name here.
        twice = model.lm_head.weight if self.is_tied and links.is_last else None
        self.twice = {name: head for name, parameter in model.named_parameters() if parameter is twice}

    config: Any = property(attrgetter("model.config"))
    masks: Any = property(attrgetter("model.masks"))
    embedding: Any = property(attrgetter("model.embedding"))  # after the first rank, and the norm before the last:
    norm: Any = property(attrgetter("model.norm"))  # a Placeholder, which returns the hidden states that it is given

    @classmethod
    def load(
        cls,
        directory: str | Path,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        load_in_4bit: bool = False,
        counts: Sequence[int] | None = None,
        links: Links | None = None,
    ) -> Self:
        """A rank's part of a checkpoint, of which it reads its own tensors alone; otherwise as `load_model`."""
        stages: list[Self] = []
        load_model(directory, dtype, device, load_in_4bit, lambda model: stages.append(cls(model, counts, links=links)))
        return stages[0]

    def named_parameters(self, *args: Any, **keywords: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """By their names in the model."""
        return self.model.named_parameters(*args, **keywords)

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.layers[self.layer_range]

    @property
    def like(self) -> Tensor:
        """A norm's weight: no adapter is put there, and it is not stored in 4 bits."""
        return next(module.weight for module in self.layers.modules() if isinstance(module, nn.RMSNorm))

    @property
    def stream_dtype(self) -> torch.dtype:
        """Of the hidden states between layers."""
        return wide(self.like) if getattr(self.config, "residual_in_fp32", False) else self.like.dtype

    @property
    def tied_weight(self) -> nn.Parameter | None:
        """The parameter that the first and the last rank both have, where embedding and LM head are one."""
        if not self.is_tied or not (self.links.is_first or self.links.is_last):
            return None
        module: Any = self.model.embedding if self.links.is_first else self.model.lm_head
        return module.weight

    @property
    def lm_head(self) -> nn.Linear:  # type: ignore[override]
        """Raises InputError on one of several ranks: `seco`, `spaco` and `full` ask for it first of all."""
        if self.links.ranks > 1:
            raise InputError("this is one rank's part of a model: call pipeline_seco or pipeline_spaco with it")
        return self.model.lm_head

    def shared(self, x: Tensor, start: int) -> tuple[Any, ...]:
        return self.model.shared(x, start)

    def take(self, input_ids: Tensor) -> Tensor:
        """What this rank's layers are run on: the tokens (B, C), or what the rank before made of them, (B, C, E)."""
        if self.links.is_first:
            return input_ids
        shape, dtype = (*input_ids.shape, self.hidden_size), self.stream_dtype
        return self.links.take(torch.empty(shape, dtype=dtype, device=self.like.device), self.links.rank - 1)

    @torch.no_grad()
    def fill(
        self, input_ids: Tensor, memory: LayerMemories, chunks: Sequence[Chunk], options: Options = DEFAULTS
    ) -> Written:
        """See Stack; what the rank before made of the tokens is taken, and what this one made of them is handed on."""
        x = self.take(input_ids)
        if self.links.is_last:
            return super().fill(x, memory, chunks, options)
        y, written = self.run(x, memory, chunks, replace(options, recompute=False))
        self.links.hand(y, self.links.rank + 1)
        return written

    @torch.no_grad()
    def chunk_losses(self, input_ids: Tensor, targets: Tensor, chunk_size: int) -> Iterator[tuple[slice, Tensor]]:
        """See Stack; yields on the last rank alone."""
        memory = self.new_memory(*input_ids.shape)
        for chunk in cut(input_ids.shape[1], chunk_size):
            rows = span([chunk])
            y, written = self.run(self.take(input_ids[:, rows]), memory, [chunk])
            memory.write([chunk], written)
            if self.links.is_last:
                yield rows, token_losses(y, self.model.lm_head.weight, targets[:, rows])
            else:
                self.links.hand(y, self.links.rank + 1)
        self.links.flush()

    def add_copies(self) -> None:
        """Add up the gradients of all copies of the pipeline: called on all processes, once all have done their part
        of an optimizer step. Where a copy has done nothing, it adds nothing."""
        if self.links.copies == 1:
            return
        widen_gradients(self)
        for parameter in self.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter, dtype=wide(parameter))
                self.links.add(parameter.grad, self.links.copies_of_me)


def _take_out(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Put something without weights, which lets everything through, in their places."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if any(child is module for module in modules):
                setattr(parent, name, Placeholder(child))
