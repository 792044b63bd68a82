"""A model over several GPUs: the forecast of the rank that needs most, which decides whether it fits."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import InputError
from ..models.shapes import alike, random_model
from ..models.stack import Stack
from ..pipeline.split_layers import layer_costs, split_costs, split_layers
from .forecast import BATCH, Forecast, forecast, most
from .setting import CHUNKED, Setting, Share
from .step import StepBytes


@dataclass(frozen=True)
class Fullest:
    """The forecast of the fullest of several ranks. For each length the layers are dealt by what they take then."""

    setting: Setting
    gpus: int

    @property
    def base(self) -> int:
        return self.forecast_at(self.setting.chunk_size).base

    def counts(self, tokens: int) -> tuple[int, ...]:
        """How many layers each rank gets."""
        return tuple(split_layers(_meta_model(self.setting), self.gpus, self._memory(tokens)))

    def at(self, tokens: int) -> StepBytes:
        """What the fullest rank takes; in host memory, all of them."""
        return replace(self.forecast_at(tokens).at(tokens), host=self._host(tokens))

    def forecast_at(self, tokens: int) -> Forecast:
        """Of the rank that is the fullest at this length."""
        counts = self.counts(tokens)
        found = [forecast(replace(self.setting, share=Share(counts, rank))) for rank in self._candidates(counts)]
        return max(found, key=lambda one: one.at(tokens).peak)

    def fullest(self, tokens: int) -> int:
        """Which rank that is."""
        share = self.forecast_at(tokens).setting.share
        assert share is not None
        return share.rank

    def growth(self, tokens: int) -> tuple[float, float]:
        """What a token more takes on the fullest rank, and in host memory, of all ranks."""
        found = self.forecast_at(tokens)
        size = self.setting.period() * self.setting.chunk_size
        return found.per_token, (self._host(tokens + size) - self._host(tokens)) / size

    def longest(self, available: int, chunk_size: int, host: int | None = None) -> int:
        """As Forecast has it, of `available` bytes on each device. Searched near the length that the costs alone allow,
        as the ranks of every other deal have to be counted."""

        def costs_fit(num_chunks: int) -> bool:
            tokens = num_chunks * chunk_size
            if host is not None and self._host(tokens) > host:
                return False
            costs = self._costs(tokens)
            return max(_sums(costs, split_costs(costs, self.gpus))) + BATCH * tokens <= available

        def fits(num_chunks: int) -> bool:
            return costs_fit(num_chunks) and self.at(num_chunks * chunk_size).peak <= available

        return most(fits, most(costs_fit, 1)) * chunk_size

    def _candidates(self, counts: tuple[int, ...]) -> list[int]:
        """The ranks that may be the fullest. Of the middle ones a later rank needs more layers for that than all before
        it, as it has fewer chunks in flight."""
        last = self.gpus - 1
        if not alike(self.setting.config()):
            return list(range(self.gpus))
        middle = [rank for rank in range(1, last) if counts[rank] > max(counts[1:rank], default=0)]
        return [0, *middle, last]

    def _memory(self, tokens: int) -> list[int] | None:
        """Of each layer on the device."""
        return None if self.setting.offload else self.setting.layer_memory_bytes(tokens).sum(1).tolist()

    def _costs(self, tokens: int) -> tuple[int, ...]:
        return tuple(layer_costs(_meta_model(self.setting), self._memory(tokens)))

    def _host(self, tokens: int) -> int:
        return sum(self.setting.memory_bytes(tokens)) if self.setting.offload else 0


def describe_rank(counts: Sequence[int], rank: int) -> str:
    """What it has, in words."""
    held = Share(tuple(counts), rank).layers
    one = counts[rank] == 1
    layers = f"layer {held.start}" if one else f"layers {held.start} to {held.stop - 1}"
    ends = [*(["the embedding"] if rank == 0 else []), *(["the LM head"] if rank == len(counts) - 1 else [])]
    return f"rank {rank}: {' and '.join([layers, *ends])}"


def forecast_on(setting: Setting, gpus: int) -> Forecast | Fullest:
    """The forecast of a training on so many GPUs."""
    return forecast(setting) if gpus == 1 else Fullest(setting, gpus)


def check_gpus(setting: Setting, gpus: int) -> None:
    """Raise InputError for what cannot run on so many."""
    layers = setting.config().num_hidden_layers
    if gpus > layers:
        raise InputError(f"--gpus is {gpus}, but {setting.model} has {layers} layers, and each GPU needs one at least")
    if gpus > 1 and setting.method not in CHUNKED:
        raise InputError(f"--method is {setting.method!r}, but on several GPUs must be one of {', '.join(CHUNKED)}")


@functools.cache
def _meta_model(setting: Setting) -> Stack:
    """What is trained, without numbers."""
    base = setting.config(), setting.dtype
    return random_model(*base, setting.rank, setting.targets, "meta", setting.load_in_4bit)


def _sums(costs: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Of each rank's layers."""
    return [sum(costs[Share(tuple(counts), rank).layers]) for rank in range(len(counts))]
