"""How much memory a training step of any length needs: steps counted, and how that grows with the length."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .setting import CHUNKED, Setting
from .step import StepBytes, step_memory

BATCH = 2 * torch.int64.itemsize  # bytes per token: input_ids and targets


@dataclass(frozen=True)
class Forecast:
    """The memory at any length: what a step of `base` tokens needs, and what a longer one has more.

    Of a chunked step only the batch and the memory grow: keys and values of all chunks but the last, gradients for
    all kept chunks but the last, or states. Of the others the activations grow, evenly from `base` tokens on.
    per_token, host_per_token: that growth in bytes; SpaCO's without what more kept chunks take.
    """

    setting: Setting
    at_base: StepBytes
    base: int
    per_token: float
    host_per_token: float = 0.0

    def at(self, tokens: int) -> StepBytes:
        if tokens < self.base:
            return step_memory(self.setting, tokens)
        m = self.at_base
        if self.setting.method not in CHUNKED:
            more = tokens - self.base
            peak, host = m.peak + round(more * self.per_token), m.host + round(more * self.host_per_token)
            return StepBytes(peak, m.weights, m.adapter_and_optimizer, 0, 0, m.chunk + peak - m.peak, host)
        cache, grads = self.setting.memory_bytes(tokens)
        batch = (tokens - self.base) * BATCH
        if self.setting.offload:
            return StepBytes(m.peak + batch, m.weights, m.adapter_and_optimizer, 0, 0, m.chunk + batch, cache + grads)
        fixed = m.weights + m.adapter_and_optimizer + m.chunk + batch
        return StepBytes(fixed + cache + grads, m.weights, m.adapter_and_optimizer, cache, grads, m.chunk + batch)

    def longest(self, available: int, chunk_size: int, host: int | None = None) -> int:
        """Tokens, in whole chunks, that fit into `available` bytes on the device and `host` bytes (None: any number).

        0 if even one chunk does not fit.
        """

        def fits(num_chunks: int) -> bool:
            found = self.at(num_chunks * chunk_size)
            return found.peak <= available and (host is None or found.host <= host)

        return most(fits, self.base // chunk_size) * chunk_size

    def growth(self, tokens: int) -> tuple[float, float]:
        """What a token more takes at this length, on the device and in host memory."""
        return self.per_token, self.host_per_token


def most(fits: Callable[[int], bool], near: int) -> int:
    """The largest number that fits, if all smaller ones do; found by few questions where it is not far from `near`.

    0 if not even 1 fits.
    """
    low, high, step = near, near + 1, 1
    while low > 0 and not fits(low):
        low, high, step = max(0, low - step), low, 2 * step
    while fits(high):
        low, high, step = high, high + step, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@functools.cache
def forecast(setting: Setting) -> Forecast:
    """Run the step at lengths beyond which it grows evenly, and say by how much."""
    setting.check()
    size = setting.chunk_size
    if setting.method not in CHUNKED:
        base, more = 1024, 1024
        first, second = step_memory(setting, base), step_memory(setting, base + more)
        per_token, host_per_token = (second.peak - first.peak) / more, (second.host - first.host) / more
        return Forecast(setting, first, base, per_token, host_per_token)
    num_chunks = setting.settled() // size + 3 + (setting.share.in_flight if setting.share else 0)
    at_base = step_memory(setting, num_chunks * size)
    base = num_chunks * size
    grows = sum(setting.growth(setting.kept(num_chunks))) / (setting.period() * size)
    return Forecast(setting, at_base, base, *((BATCH, grows) if setting.offload else (BATCH + grows, 0)))
