"""A rank's part of a model: some adjacent layers; with the first ones the embedding, with the last norm and LM head."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from ..models.stack import Stack
from .deal import check_counts, deal, size
from .links import Links


class PipelineStage(Stack):
    """What is left of `model` on this rank; `stage.model` is the model itself, and its parameters keep their names.

    Made at the same time on all ranks of the default process group, of models with the same weights: seed what is drawn
    at random. The model may be on the CPU; `stage.to(device)` then moves what is left. An adapter has to be in it
    already.

    counts: how many layers each rank gets; None: they are dealt by the bytes of their weights, the embedding's and the
        LM head's included.
    timeout: after which a rank that does not answer is given up, with RankLost; None: PyTorch's own.
    Raises InputError without a process group, for fewer layers than ranks, and for counts that do not add up.
    """

    def __init__(self, model: Stack, counts: Sequence[int] | None = None, timeout: timedelta | None = None) -> None:
        super().__init__()
        self.links = links = Links(timeout)
        layers = list(model.layers)
        if len(layers) < links.ranks:
            raise InputError(f"the model has {len(layers)} layers, too few for {links.ranks} ranks: start fewer")
        if counts is None:
            costs = [size(layer) for layer in layers]
            costs[0] += size(model.embedding)
            costs[-1] += size(model.norm) + size(model.lm_head)
            counts = deal(costs, links.ranks)
        check_counts(counts, len(layers), links.ranks)
        self.held = slice(sum(counts[: links.rank]), sum(counts[: links.rank + 1]))
        self.config, self.masks = model.config, model.masks
        self.vocab_size, self.hidden_size = model.lm_head.weight.shape
        self.is_tied = links.ranks > 1 and model.lm_head.weight is model.embedding.weight
        like = next(model.norm.parameters()).detach().new_empty(0)
        self.register_buffer("_like", like, persistent=False)  # goes where the model goes
        _take_out(
            model,
            [layer for i, layer in enumerate(layers) if not self.held.start <= i < self.held.stop]
            + ([] if links.is_first else [model.embedding])
            + ([] if links.is_last else [model.norm, model.lm_head]),
        )
        self.model = model

    @property
    def embedding(self) -> nn.Embedding:
        """Of a rank after the first, which is given hidden states: it lets them through."""
        return self.model.embedding

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.layers[self.held]

    @property
    def norm(self) -> nn.Module:
        """Of a rank before the last: it lets hidden states through."""
        return self.model.norm

    @property
    def like(self) -> Tensor:
        return self.get_buffer("_like")

    @property
    def tied_weight(self) -> nn.Parameter | None:
        """The parameter that the first and the last rank both have, where embedding and LM head are one."""
        links = self.links
        if not self.is_tied or not (links.is_first or links.is_last):
            return None
        weight: Any = (self.model.embedding if links.is_first else self.model.lm_head).weight
        return weight

    @property
    def lm_head(self) -> nn.Linear:  # type: ignore[override]
        """Raises InputError on one of several ranks: `seco`, `spaco` and `full` ask for it first of all."""
        if self.links.ranks > 1:
            raise InputError("this is one rank's part of a model: call pipeline_seco or pipeline_spaco with it")
        return self.model.lm_head

    def shared(self, x: Tensor, start: int) -> tuple[Any, ...]:
        return self.model.shared(x, start)


def _take_out(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Put something without weights, which lets everything through, in their places."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if any(child is module for module in modules):
                setattr(parent, name, nn.Identity())
