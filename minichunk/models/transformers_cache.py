"""What a model of the transformers library is handed when it runs a chunk: three things, by its documented doors.

- An attention function (`AttentionInterface`). The keys and values that it is given are the chunk's own: they are what
  the chunk writes, and `Past.attend` lets the queries see the past as well.
- A mask function (`AttentionMaskInterface`). It makes no mask: it finds the pattern that the model's rule amounts to.
- A cache (`Cache`). It keeps no keys; it says how long the past is, and hands on the states of recurrent layers.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from math import isclose, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache

from ..chunks import Chunk
from ..errors import InputError
from ..memory.cache import LayerCache
from ..memory.kernels import Plain
from ..memory.layer_memory import LayerMemories, LayerMemory, MemorySpec, wide
from ..memory.state import Handed, LayerState
from ..memory.window import Pattern, Strided, Window
from ..protocol import Written

NAME = "minichunk"  # of our attention, among transformers'
HARMLESS = {"sliding_window", "position_ids", "use_cache", "output_attentions", "layer_idx"}  # the pattern says it all


class Filled(Exception):
    """All has been written: what is left of the forward pass is of no use to the fill."""


class WrappedMemory(LayerMemories):
    """A memory for each attention module and each state, by `key`, made when the first chunk gets there."""

    def __init__(self, spec: MemorySpec) -> None:
        super().__init__([], spec.receiving)
        self.spec, self.of = spec, dict[Any, LayerMemory]()

    def add(self, key: Any, make: Callable[[MemorySpec], LayerMemory]) -> None:
        if key not in self.of:
            self.of[key] = make(self.spec)
            self.layers.append(self.of[key])

    def write(self, chunks: Sequence[Chunk], written: Written) -> None:
        if written:  # else this has been done chunk by chunk, see Wrapped.fill
            super().write(chunks, written)


class Run(Cache):
    """Some chunks on their way through the model, which takes this for its cache. When recompute comes, it is closed.

    save: see Past. stop: how many tensors there are to write, for a fill, which then leaves the model.
    """

    def __init__(
        self, memory: WrappedMemory, chunks: Sequence[Chunk], save: bool = False, stop: int | None = None
    ) -> None:
        super().__init__(layers=[])
        self.memory, self.chunks, self.save, self.stop, self.open = memory, chunks, save, stop, True
        self.written, self.pasts = dict[Any, tuple[Tensor, ...]](), dict[Any, Any]()
        self.owners = dict[Any, Any]()  # of keys: the module that made them
        self.copied = dict[Any, Tensor]()  # into states, by models that change them in place for a single token

    def write(self, key: Any, tensors: tuple[Tensor, ...], make: Callable[[MemorySpec], LayerMemory]) -> None:
        if not self.open:
            return
        if key in self.written:
            raise InputError("a layer of it runs twice")
        self.memory.add(key, make)
        self.written[key] = tensors
        if len(self.written) == self.stop:
            raise Filled

    def past(self, key: Any, owner: Any) -> Any:
        """What `key` sees of the owner's memory."""
        if key not in self.pasts:
            self.pasts[key] = self.memory.of[owner].past(self.chunks, self.save)
        return self.pasts[key]

    def close(self) -> Written:
        """What has been written. It belongs to a graph that may come to hold this object, which lets go of it."""
        whole = {key: (state, state.new_zeros(())) for key, state in self.copied.items()} | self.written
        if whole.keys() != self.memory.of.keys():
            raise InputError("its layers do not write the same in every chunk")
        self.written, self.copied, self.open = {}, {}, False
        self.owners = {key: owner for key, owner in self.owners.items() if isinstance(key, nn.Module)}
        return [whole[key] for key in self.memory.of]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.chunks[0].start

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.chunks[0].start + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.chunks[0].start > 0

    def is_recording_past(self, layer_idx: int) -> bool:
        return True  # or a chunk of one token would change the convolution's state in place

    def get_conv_state(self, layer_idx: int, state_idx: int = 0, kind: str = "conv") -> Tensor | None:
        key = kind, layer_idx, state_idx
        if not self.chunks[0].start:
            return None
        state: Any = self.past(key, key).states[0]
        if kind == "recurrent" and self.chunks[-1].stop - self.chunks[0].start == 1:
            state = state.view_as(state)
            # What some models copy into it, their backward pass needs it without: that is caught, and written.
            state.copy_ = partial(self.catch, key)
        return state

    def catch(self, key: Any, state: Tensor) -> None:
        if self.open:
            self.copied[key] = state

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.get_conv_state(layer_idx, state_idx, "recurrent")

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, *, kind: str = "recurrent", **_: Any
    ) -> Tensor:
        zero = torch.zeros_like(recurrent_states)
        nothing = zero.new_zeros(())  # of it passes through as it is, as far as the memory knows
        make: Any = lambda spec: LayerState([Handed(zero, nothing, spec)])  # noqa: E731
        self.write((kind, layer_idx, state_idx), (recurrent_states, nothing), make)
        return recurrent_states

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        before = self.get_conv_state(layer_idx, state_idx)
        size = (conv_kernel_size or conv_states.shape[-1]) if before is None else before.shape[-1]
        seen = conv_states if before is None else torch.cat([before, conv_states], -1)
        seen = F.pad(seen, (max(0, size - seen.shape[-1]), 0))
        self.update_recurrent_state(seen[..., seen.shape[-1] - size :], layer_idx, state_idx, kind="conv")
        return seen


@dataclass(frozen=True)
class Rule:
    """What stands in for a mask."""

    pattern: Pattern

    def __getitem__(self, index: Any) -> "Rule":
        if any(part not in (slice(None), slice(0, None)) for part in index):
            raise InputError("its attention takes a mask apart")
        return self


running: ContextVar[Run] = ContextVar("running")


def find_rule(*, mask_function: Callable[..., Tensor], device: Any, local_size: int | None = None, **_: Any) -> Rule:
    """The mask function: what the model's rule amounts to, which is asked about a few queries. Raises InputError."""
    edge = local_size or 500
    i = torch.tensor([0, 1, edge - 1, edge, edge + 1, 2 * edge + 1], device=device)[:, None]
    j = torch.arange(2 * edge + 2, device=device)
    sees, causal = mask_function(0 * i, 0 * i, i, j), j <= i
    if torch.equal(sees, causal if local_size is None else causal & (i - j < local_size)):
        return Rule(Window(local_size))
    if local_size and torch.equal(sees, causal & (i // local_size == j // local_size)):
        return Rule(Strided(local_size, 1, None))
    raise InputError("its mask is neither causal, nor a window, nor blocks")


def new_memory(spec: MemorySpec, k: Tensor, pattern: Pattern, cap: float | None) -> LayerMemory:
    """Of keys like k (B, G, C, D)."""
    B, G, _, D = k.shape
    grad_dtype = spec.options.cache_grad_dtype or wide(k)
    cache = LayerCache((B, G, spec.capacity, D), spec.receiving, k.new_empty(0), grad_dtype, pattern)
    cache.kernel = Plain(cap) if cap else None
    return cache


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, scaling: float | None = None,
    dropout: float = 0.0, softcap: float | None = None, s_aux: Tensor | None = None, is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention function. q (B, H, C, D); k, v (B, G, C, ·); returns (B, C, H, ·). Raises InputError."""
    asked = [name for name, x in others.items() if x is not None and x is not False and name not in HARMLESS]
    if asked or is_causal is False or not isinstance(attention_mask, Rule):
        raise InputError(f"its attention wants {', '.join(asked) or 'a mask of its own'}, which is not done here")
    if dropout:
        raise InputError("dropout of attention's probabilities is not done here: load it with attention_dropout=0")
    run, width, D = running.get(), value.shape[-1], max(query.shape[-1], value.shape[-1])
    scale = (query.shape[-1] ** -0.5 if scaling is None else scaling) * sqrt(D)  # minichunk's own is 1 / sqrt(D)
    query = query if isclose(scale, 1) else query * scale
    q, k, v = (x if x.shape[-1] == D else F.pad(x, (0, D - x.shape[-1])) for x in (query, key, value))
    q, k = q.to(v.dtype), k.to(v.dtype)  # autocast leaves rotated ones wider
    if module not in run.owners:  # whose memory: its own, or that of who was given the same keys (Gemma 3n)
        run.owners[module], _ = run.owners.setdefault(id(key), (module, key))
    owner = run.owners[module]
    if owner is module:
        run.write(module, (k, v), lambda spec: new_memory(spec, k, attention_mask.pattern, softcap))
    past = run.past(module, owner)
    if past.memory.pattern != attention_mask.pattern:
        raise InputError("two layers share keys, and do not see the same")
    return past.attend(q, k, v, s_aux)[..., :width].transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, find_rule)
