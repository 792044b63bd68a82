"""A rank's part of a model: some adjacent layers, split so that the fullest rank has as little as possible; with the
first ones the embedding, with the last norm and LM head."""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate
from operator import attrgetter
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..batch import check_positions, widen_gradients
from ..chunks import Chunk, cut, span
from ..errors import InputError
from ..loss import token_losses
from ..memory.layer_memory import LayerMemories, wide
from ..models.load import load_model
from ..models.lora import Placeholder
from ..models.stack import Stack
from ..protocol import DEFAULTS, Options, Written
from .links import Links


class PipelineStage(Stack):
    """What is left of `model` on this rank; `stage.model` is the model itself, and its parameters keep their names.

    Made at the same time on all processes of the default process group, of models with the same weights: seed what is
    drawn at random. The model may be on the CPU; `stage.to(device)` then moves what is left.
    counts: how many layers each rank gets; None: `split_layers(model, ranks)`. links: None: all processes are one
    pipeline. `Links(2)` makes pipelines of two, for documents of their own; `add_copies` then adds up their gradients.
    Raises InputError without a process group, for fewer layers than ranks, and for counts that do not add up.
    """

    def __init__(self, model: Stack, counts: Sequence[int] | None = None, links: Links | None = None) -> None:
        nn.Module.__init__(self)
        self.links = links = links or Links()
        layers, counts = list(model.layers), split_layers(model, links.ranks) if counts is None else counts
        if len(counts) != links.ranks or min(counts) < 1 or sum(counts) != len(layers):
            words = f"{links.ranks} numbers of at least 1, which add up to the {len(layers)} layers of the model"
            raise InputError(f"counts is {list(counts)}, but must be {words}")
        start, stop = sum(counts[: links.rank]), sum(counts[: links.rank + 1])
        self.layer_range = slice(start, stop)
        self.vocab_size, self.hidden_size = model.lm_head.weight.shape
        head = [name for name, x in model.named_parameters(remove_duplicate=False) if x is model.lm_head.weight]
        self.is_tied = links.ranks > 1 and len(head) == 2
        ends = ([] if links.is_first else [model.embedding]) + ([] if links.is_last else [model.norm, model.lm_head])
        elsewhere = {*layers[:start], *layers[stop:], *ends}
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if child in elsewhere:
                    setattr(parent, name, Placeholder(child))
        self.model = model
        # Of a parameter that the first rank has too, its name there by the name here.
        self.twice = {head[1]: head[0]} if self.is_tied and links.is_last else {}

    config: Any = property(attrgetter("model.config"))
    masks: Any = property(attrgetter("model.masks"))
    shared: Any = property(attrgetter("model.shared"))
    takes_positions: Any = property(attrgetter("model.takes_positions"))
    named_parameters: Any = property(attrgetter("model.named_parameters"))  # by their names in the model
    layers: Any = property(lambda stage: stage.model.layers[stage.layer_range])
    embedding: Any = property(attrgetter("model.embedding"))  # after the first rank, and the norm before the last:
    norm: Any = property(attrgetter("model.norm"))  # a Placeholder, which returns the hidden states that it is given

    @classmethod
    def load(
        cls, directory: str | Path, counts: Sequence[int] | None = None, links: Links | None = None, **options: Any
    ) -> Self:
        """A rank's part of a checkpoint, of which it reads its own tensors alone. options: see `load_model`."""
        stages: list[Self] = []
        load_model(directory, prepare=lambda model: stages.append(cls(model, counts, links)), **options)
        return stages[0]

    @property
    def tied_weight(self) -> nn.Parameter | None:
        """The parameter that the first and the last rank both have, where embedding and LM head are one."""
        first, last = self.links.is_first, self.links.is_last
        module: Any = self.model.embedding if first else self.model.lm_head
        return module.weight if self.is_tied and (first or last) else None

    @property
    def lm_head(self) -> nn.Linear:  # type: ignore[override]
        """Raises InputError on one of several ranks: `seco`, `spaco` and `full` ask for it first of all."""
        if self.links.ranks > 1:
            raise InputError("this is one rank's part of a model: call pipeline_seco or pipeline_spaco with it")
        return self.model.lm_head

    def take(self, input_ids: Tensor) -> Tensor:
        """What this rank's layers are run on: the tokens (B, C), or what the rank before made of them, (B, C, E)."""
        if self.links.is_first:
            return input_ids
        x = torch.empty((*input_ids.shape, self.hidden_size), dtype=self.hidden_dtype, device=self.like.device)
        return self.links.take(x, self.links.rank - 1)

    def run_and_hand(
        self, x: Tensor, memory: LayerMemories, chunks: Sequence[Chunk], options: Options = DEFAULTS
    ) -> tuple[Tensor, Written]:
        """As `run`, and the next rank gets the output."""
        y, written = self.run(x, memory, chunks, options)
        if not self.links.is_last:
            self.links.hand(y, self.links.rank + 1)
        return y, written

    @torch.no_grad()
    def fill(
        self, input_ids: Tensor, memory: LayerMemories, chunks: Sequence[Chunk], options: Options = DEFAULTS
    ) -> Written:
        """See Stack; on all ranks but the last one all layers are run as a whole, because the next rank waits."""
        x = self.take(input_ids)
        if self.links.is_last:
            return super().fill(x, memory, chunks, options)
        return self.run_and_hand(x, memory, chunks, options)[1]

    @torch.no_grad()
    def chunk_losses(self, input_ids: Tensor, targets: Tensor, chunk_size: int) -> Iterator[tuple[slice, Tensor]]:
        """See Stack; yields on the last rank alone."""
        memory, options = self.new_memory(*input_ids.shape), Options(positions=check_positions(self, None, input_ids))
        for chunk in cut(input_ids.shape[1], chunk_size):
            rows = span([chunk])
            y, written = self.run_and_hand(self.take(input_ids[:, rows]), memory, [chunk], options)
            memory.write([chunk], written)
            if self.links.is_last:
                yield rows, token_losses(y, self.model.lm_head.weight, targets[:, rows])
        self.links.flush()

    def add_copies(self) -> None:
        """Add up the gradients of all copies of the pipeline: on all processes, once in an optimizer step."""
        widen_gradients(self)
        for parameter in self.parameters():
            if parameter.requires_grad and self.links.copies > 1:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter, dtype=wide(parameter))
                self.links.add(parameter.grad, self.links.copies_of_me)


def split_layers(model: Stack, ranks: int, memory: Sequence[int] | None = None) -> list[int]:
    """How many of the layers each rank gets, at least one, so that the fullest rank has as few bytes as possible; see
    `layer_costs`. Raises InputError for fewer layers than ranks."""
    if len(model.layers) < ranks:
        raise InputError(f"the model has {len(model.layers)} layers, too few for {ranks} ranks: start fewer")
    return list(split_costs(tuple(layer_costs(model, memory)), ranks))


def layer_costs(model: Stack, memory: Sequence[int] | None = None) -> list[int]:
    """The bytes that each layer takes on its rank; the first one's with the embedding, the last one's with the LM head.

    Counted are weights as they are stored; gradients and AdamW's states of those that learn; and the layer's memory:
    neither time nor the activations of chunks in flight, of which a rank has more the earlier it comes.
    model: with its adapter; on any device, meta too. memory: bytes of `layer_memory_bytes`; None: not known.
    """
    costs = [_bytes(layer) for layer in model.layers]
    costs[0] += _bytes(model.embedding)
    costs[-1] += _bytes(model.norm) + _bytes(model.lm_head)
    return costs if memory is None else [cost + more for cost, more in zip(costs, memory, strict=True)]


@cache
def split_costs(costs: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    """How many adjacent costs each rank gets, at least one, so that the largest sum is the least possible."""
    until = [0, *accumulate(costs)]

    @cache
    def best(start: int, ranks: int) -> tuple[int, tuple[int, ...]]:
        """For the costs from `start` on: the largest sum, and how many each of these ranks gets."""
        if ranks == 1:
            return until[-1] - until[start], (len(costs) - start,)
        ways = []
        for stop in range(start + 1, len(costs) - ranks + 2):
            fullest, counts = best(stop, ranks - 1)
            ways.append((max(until[stop] - until[start], fullest), (stop - start, *counts)))
        return min(ways)

    return best(0, ranks)[1]


def _bytes(module: nn.Module) -> int:
    """Of its weights, and for those that learn a gradient, AdamW's moments and, of half precision, a master copy."""
    found = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    for p in module.parameters():
        if p.requires_grad:
            found += p.numel() * (3 * max(4, p.itemsize) + (4 if p.itemsize < 4 else 0))
    return found
