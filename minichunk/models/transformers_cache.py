"""What a model of the transformers library is handed when it runs a chunk: three things, by its documented doors.

- An attention function (`AttentionInterface`). The keys and values that it is given are the chunk's own: they are what
  the chunk writes, and `Past.attend` lets the queries see the past as well.
- A mask function (`AttentionMaskInterface`). It makes no mask: it finds the pattern that the model's rule amounts to.
- A cache (`Cache`). It keeps no keys; it says how long the past is, and hands on the states of recurrent layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import isclose, sqrt
from typing import Any, ClassVar

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


class WrappedMemory(LayerMemories):
    """A memory for each attention module and each state, by its key, made when the first chunk gets there."""

    def __init__(self, spec: MemorySpec) -> None:
        super().__init__([], spec.receiving)
        self.spec, self.of = spec, dict[Any, LayerMemory]()
        self.layers: Any = self.of.values()

    def write(self, chunks: Sequence[Chunk], written: Written) -> None:
        if written:  # else this has been done chunk by chunk, see Wrapped.fill
            super().write(chunks, written)


class Run(Cache):
    """Some chunks on their way through the model, which takes this for its cache. save: see Past."""

    now: ClassVar[Any] = None  # whose chunks the attention function is asked for

    def __init__(self, memory: WrappedMemory, chunks: Sequence[Chunk], save: bool) -> None:
        super().__init__(layers=[])
        self.memory, self.chunks, self.save, self.closed = memory, chunks, save, False
        self.written, self.pasts = dict[Any, tuple[Tensor, ...]](), dict[Any, Any]()
        self.owners = dict[nn.Module, nn.Module]()  # whose keys an attention module uses: its own, or another's

    def write(self, key: Any, tensors: tuple[Tensor, ...], make: Callable[[MemorySpec], LayerMemory]) -> None:
        if self.closed:  # and recomputed
            return
        if key in self.written:
            raise InputError("a layer of it runs twice")
        if key not in self.memory.of:
            self.memory.of[key] = make(self.memory.spec)
        self.written[key] = tensors

    def past(self, key: Any, owner: Any) -> Any:
        """What `key` sees of the owner's memory."""
        if key not in self.pasts:
            self.pasts[key] = self.memory.of[owner].past(self.chunks, self.save)
        return self.pasts[key]

    def close(self) -> Written:
        """What has been written. It belongs to a graph that may come to hold this object, which lets go of it."""
        if self.written.keys() != self.memory.of.keys():
            raise InputError("its layers do not write the same in every chunk")
        written, self.written, self.closed = self.written, {}, True
        return [written[key] for key in self.memory.of]

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

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.handed("conv", layer_idx, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.handed("recurrent", layer_idx, state_idx)

    def handed(self, *key: Any) -> Any:
        """The state that these chunks are handed; None at the start."""
        if not self.chunks[0].start:
            return None
        state = self.past(key, key).states[0].view_as(self.past(key, key).states[0])
        # For a single token some models copy the next state into it: its backward needs it as it was.
        state.copy_ = partial(self.hand_on, key)
        return state

    def hand_on(self, key: Any, state: Tensor) -> Tensor:
        zero, nothing = torch.zeros_like(state), state.new_zeros(())  # of it passes as it is, as far as memory knows
        self.write(key, (state, nothing), lambda spec: LayerState([Handed(zero, nothing, spec)]))
        return state

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        return self.hand_on(("recurrent", layer_idx, state_idx), recurrent_states)

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        before = self.get_conv_state(layer_idx, state_idx)
        size = (conv_kernel_size or conv_states.shape[-1]) if before is None else before.shape[-1]
        seen = conv_states if before is None else torch.cat([before, conv_states], -1)
        seen = F.pad(seen, (max(0, size - seen.shape[-1]), 0))
        self.hand_on(("conv", layer_idx, state_idx), seen[..., seen.shape[-1] - size :])
        return seen


@dataclass(frozen=True)
class Rule:
    """What stands in for a mask; of which some models take all."""

    pattern: Pattern

    def __getitem__(self, index: Any) -> "Rule":
        if any(part not in (slice(None), slice(0, None)) for part in index):
            raise InputError("its attention takes a mask apart")
        return self


def find_rule(*, mask_function: Callable[..., Tensor], device: Any, local_size: int | None = None, **_: Any) -> Rule:
    """The mask function: what the model's rule amounts to, which is asked about a few queries. Raises InputError."""
    edge = local_size or 500
    device = "cpu" if device.type == "meta" else device
    i = torch.tensor([0, 1, edge - 1, edge, edge + 1, 2 * edge + 1], device=device)[:, None]
    j = torch.arange(2 * edge + 2, device=device)
    sees, causal = mask_function(0 * i, 0 * i, i, j), j <= i
    if torch.equal(sees, causal if local_size is None else causal & (i - j < local_size)):
        return Rule(Window(local_size))
    if local_size and torch.equal(sees, causal & (i // local_size == j // local_size)):
        return Rule(Strided(local_size, 1, None))
    raise InputError("its mask is neither causal, nor a window, nor blocks")


def new_memory(k: Tensor, pattern: Pattern, cap: float | None, spec: MemorySpec) -> LayerMemory:
    """Of keys like k (B, G, C, D)."""
    B, G, _, D = k.shape
    grad_dtype = spec.options.cache_grad_dtype or wide(k)
    cache = LayerCache((B, G, spec.capacity, D), spec.receiving, k.new_empty(0), grad_dtype, pattern)
    cache.kernel = Plain(cap) if cap else None
    return cache


def attend(
    module: nn.Module, query: Tensor, key: Any, value: Tensor, attention_mask: Any, *, scaling: float | None = None,
    dropout: float = 0.0, softcap: float | None = None, s_aux: Tensor | None = None, is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention function. q (B, H, C, D); k, v (B, G, C, ·); returns (B, C, H, ·). Raises InputError."""
    asked = [name for name, x in others.items() if x is not None and x is not False and name not in HARMLESS]
    if asked or is_causal is False or not isinstance(attention_mask, Rule):
        raise InputError(f"its attention wants {', '.join(asked) or 'a mask of its own'}, which is not done here")
    if dropout:
        raise InputError("dropout of attention's probabilities is not done here: load it with attention_dropout=0")
    run, width, D = Run.now, value.shape[-1], max(query.shape[-1], value.shape[-1])
    scale = (query.shape[-1] ** -0.5 if scaling is None else scaling) * sqrt(D)  # minichunk's own is 1 / sqrt(D)
    query = query if isclose(scale, 1) else query * scale
    q, k, v = (x if x.shape[-1] == D else F.pad(x, (0, D - x.shape[-1])) for x in (query, key, value))
    q, k = q.to(v.dtype), k.to(v.dtype)  # autocast leaves rotated ones wider
    if module not in run.owners:  # and not recomputed: who is given the keys of another has its memory (Gemma 3n)
        key.owner = run.owners[module] = getattr(key, "owner", module)
    owner = run.owners[module]
    if owner is module:
        run.write(module, (k, v), partial(new_memory, k.detach(), attention_mask.pattern, softcap))
    past = run.past(module, owner)
    if past.memory.pattern != attention_mask.pattern:
        raise InputError("two layers share keys, and do not see the same")
    return past.attend(q, k, v, s_aux)[..., :width].transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, find_rule)
