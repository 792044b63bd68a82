"""The memory of a step of any length: one is counted, and what is remembered more of a longer text is computed."""

from bisect import bisect_left
from dataclasses import dataclass, fields, replace
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..files.atomic import free_memory, human_bytes
from ..models.lora import default_targets
from ..models.quantize import count_parameters
from ..models.shapes import alike
from ..models.stack import Stack
from ..pipeline.links import local_device
from ..pipeline.stage import layer_costs, split_costs
from ..training.options import StepOptions, TrainOptions
from ..training.train import LARGE
from .peak import StepBytes, step_memory, ways
from .setting import CHUNKED, Setting, Share, Way

BATCH = 3 * torch.int64.itemsize + 1  # bytes per token: input_ids, targets, where there is one, and positions
TREE = 2 * torch.int64.itemsize + 5  # more where two rows share a prompt: places in the one row, factors, a reference
RESERVE = 2**30  # bytes of a GPU for what is not counted: see plan.py's LEFT_OUT
SPAN = 1024  # chunks over which the growth is taken: what is remembered of strided blocks grows by whole blocks


@dataclass(frozen=True)
class Forecast:
    """The memory of a training step by its length; on several GPUs that of the rank that needs most.
    For each length the layers are split over the ranks by what they take then. Made by `forecast`."""

    setting: Setting
    gpus: int = 1

    def at(self, tokens: int) -> StepBytes:
        """What a step of so many tokens takes on the rank that needs most; in host memory, on all ranks together."""
        return bytes_of_share(self.setting, tokens, self.largest_share(tokens))

    def counts(self, tokens: int) -> tuple[int, ...]:
        """How many layers each rank gets."""
        remembered = self.setting.memory_bytes(tokens).sum(1).tolist()
        return split_costs(tuple(layer_costs(self._model, remembered)), self.gpus)

    def largest_share(self, tokens: int) -> Share | None:
        """Of the rank that needs most at this length; None: one process has all layers.
        Of the ranks between the first and the last, a later one has fewer chunks in flight. It can only need most if
        it has more layers than each of those before it."""
        if self.gpus == 1:
            return None
        counts, last = self.counts(tokens), self.gpus - 1
        between = [rank for rank in range(1, last) if counts[rank] > max(counts[1:rank], default=0)]
        ranks = [0, *between, last] if alike(self.setting.config()) else range(self.gpus)
        shares = [Share(counts, rank) for rank in ranks]
        return max(shares, key=lambda share: bytes_of_share(self.setting, tokens, share).peak)

    def growth(self, tokens: int) -> tuple[float, float]:
        """Bytes that a token more takes from this length on, on the rank that needs most and in host memory."""
        share, span = self.largest_share(tokens), SPAN * self.setting.chunk_size
        start = max(tokens, self.setting.even_from(share))
        now, later = (bytes_of_share(self.setting, n, share).peak for n in (start, start + span))
        return (later - now) / span, (self.at(start + span).host - self.at(start).host) / span

    def longest(self, available: int, host: int | None = None) -> int:
        """Tokens, in whole chunks, that fit into `available` bytes on each device and `host` bytes in host memory.
        host: None for any number. Returns 0 if even one chunk does not fit."""
        size = self.setting.chunk_size

        def fits(num_chunks: int) -> bool:
            found = self.at(num_chunks * size)
            return found.peak <= available and (host is None or found.host <= host)

        too_many = max(1, self.setting.even_from() // size)  # longer ones are computed, shorter ones counted
        while fits(too_many):
            too_many *= 2
        return size * bisect_left(range(1, too_many), True, key=lambda num_chunks: not fits(num_chunks))

    @cached_property
    def _model(self) -> Stack:
        return self.setting.meta_model()


def forecast(setting: Setting, gpus: int = 1) -> Forecast:
    """Raises InputError for a setting that cannot be, and for more GPUs than there are layers."""
    setting.check()
    config = setting.config()
    if isinstance(config, Path) and (gpus > 1 or setting.in_blocks or setting.answer):
        raise InputError("--gpus, --layers-at-once, --offload and --answer are for models of minichunk's own")
    if gpus > 1 and gpus > (layers := config.num_hidden_layers):
        raise InputError(f"--gpus is {gpus}, but {setting.model} has {layers} layers, and each GPU needs one at least")
    if (gpus > 1 or setting.objective) and setting.method not in CHUNKED:
        raise InputError(f"--method is {setting.method!r}, but with --gpus or --objective must be seco or spaco")
    if gpus > 1 and (setting.in_blocks or setting.graphs or setting.objective):
        raise InputError("--layers-at-once, --offload, --graphs and --objective are for one GPU")
    return Forecast(setting, gpus)


def bytes_of_share(setting: Setting, tokens: int, share: Share | None, way: Way | None = None) -> StepBytes:
    """What a step takes on one rank, or in one process (None). way: on this part of its way through blocks of layers.
    Of a chunked step only the batch grows with the length, what is remembered, and what waits between blocks. That is
    keys and values of all chunks but the last, gradients of all kept chunks but the last, or states; and hidden states.
    Of the others the activations grow."""
    if (setting.in_blocks or setting.teacher) and way is None:
        found = [bytes_of_share(setting, tokens, None, way) for way in ways(setting)]
        return replace(max(found, key=attrgetter("peak")), host=max(each.host for each in found))
    graphs = min(setting.graphs, -(-tokens // setting.chunk_size) - 1)
    if graphs > 3:  # each takes as much
        two, three = (bytes_of_share(replace(setting, graphs=number), tokens, share) for number in (2, 3))
        return replace(three, chunk=three.chunk + (graphs - 3) * (three.peak - two.peak))
    base = setting.even_from(share)
    if tokens <= base:
        return step_memory(setting, tokens, share, way)
    first, more = step_memory(setting, base, share, way), tokens - base
    if setting.method not in CHUNKED:
        second = step_memory(setting, 2 * base)
        device, host = (round(more * (getattr(second, n) - getattr(first, n)) / base) for n in ("chunk", "host"))
        return replace(first, chunk=first.chunk + device, host=first.host + host)
    cache, grads = setting.memory_bytes(tokens, way)[share.layers if share else slice(None)].sum(0).tolist()
    chunk = first.chunk + (setting.rows * BATCH + TREE * (setting.answer is not None)) * more
    (length, _), (counted, _) = setting.row(tokens), setting.row(base)
    hidden, host = (n * length // counted for n in (first.hidden_states, first.host))
    return StepBytes(first.weights, first.adapter_and_optimizer, cache, grads, hidden, chunk, host)


def fewest_blocks(setting: Setting, tokens: int | None, available: int, host: int) -> int:
    """Layers at once, in as few blocks as fit into `available` bytes on the device and `host` bytes in host memory.
    Where none fit, in those of which least grows. tokens: None for the longest text that fits.
    What grows is computed for each number of blocks. Then a step is counted, if that alone does not take too much."""
    model, length = setting.meta_model(), tokens or SPAN * setting.chunk_size
    layers, weights, remembered = len(model.layers), sum(layer_costs(model)), setting.memory_bytes(length).sum(1)
    hidden = setting.rows * length * model.config.hidden_size * model.hidden_dtype.itemsize
    parts: dict[int, float] = {}  # of the memory that there is, what grows takes
    for number in range(1, layers + 1):
        blocks = remembered.split(-(-layers // number))
        device, between = max(int(block.sum()) for block in blocks), hidden * (len(blocks) - 1)
        device, away = (device, between) if setting.offload else (device + between, 0)
        parts.setdefault(-(-layers // number), max(device / max(1, available - weights), away / max(1, host)))
    if tokens is not None:
        for size in (size for size, part in parts.items() if part <= 1):
            found = forecast(replace(setting, layers_at_once=str(size))).at(tokens)
            if found.peak <= available and found.host <= host:
                return size
    return min(parts, key=lambda size: parts[size])  # of equals the first, with the fewest blocks


def fastest(setting: Setting, tokens: int | None, available: int, host: int) -> dict[str, Any]:
    """What `--layers-at-once auto` stands for, see `fewest_blocks`: `layers_at_once`, and as many `graphs` of a step of
    SeCO as fit beside all else, where all layers fit at once."""
    graphs, setting = 0, replace(setting, layers_at_once=None, graphs=0)
    if hasattr(model := setting.meta_model(), "blocks"):
        size = fewest_blocks(setting, tokens, available, host)
        if tokens is None or setting.offload or size < len(model.layers):
            return {"layers_at_once": str(size), "graphs": graphs}
    if tokens is not None and setting.method == "seco" and not setting.objective and not setting.offload:
        two, three = (forecast(replace(setting, graphs=number)).at(tokens).peak for number in (2, 3))
        graphs = max(0, min(2 + (available - two) // (three - two), -(-tokens // setting.chunk_size) - 1))
    return {"layers_at_once": None, "graphs": graphs}


def fitted(options: TrainOptions) -> TrainOptions:
    """With `--layers-at-once auto` decided, and `--graphs` where all layers fit, by what is free on the GPU now.
    On a CPU all layers are taken at once. Raises InputError."""
    if options.layers_at_once != "auto":
        return options
    told = options.resolved()
    device = torch.device(local_device(told.device))
    if device.type == "cpu":
        return replace(options, layers_at_once=None)
    if told.batch_size > 1:
        raise InputError(f"--layers-at-once auto is for one piece at a time, but --batch-size is {told.batch_size}")
    step = {each.name: getattr(told, each.name) for each in fields(StepOptions)} | {"layers_at_once": None}
    step |= {"model": told.model, "dtype": told.dtype, "budget": told.budget or 1, "recompute": bool(told.recompute)}
    model = Setting(**step).meta_model()
    recompute = count_parameters(model) >= LARGE if told.recompute is None else told.recompute
    step |= {"targets": told.targets or tuple(default_targets(model)), "recompute": recompute}
    available = (free_memory(device) or 0) - RESERVE
    found = fastest(Setting(**step), told.seq_len, available, free_memory(torch.device("cpu")) or 0)
    peak = forecast(Setting(**step | found)).at(told.seq_len).peak
    if peak > available:
        words = f"{human_bytes(peak)}, but {human_bytes(available)} are free on {device}: take a shorter --seq-len"
        raise InputError(f"--layers-at-once auto: {told.seq_len:,} tokens need {words}")
    return replace(options, **found)
