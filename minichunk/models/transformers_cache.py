"""What a model of the transformers library is handed when it runs a chunk: three things, by its documented doors.

- An attention function (`AttentionInterface`). The keys and values that it is given are the chunk's own: they are what
  the chunk writes, and `Past.attend` lets the queries see the past as well.
- A mask function (`AttentionMaskInterface`). It makes no mask: it finds the pattern that the model's rule amounts to.
- A cache (`Cache`). It keeps no keys; it says how long the past is, and hands on the states of recurrent layers.

How much of a state passes through a chunk as it is, no layer says. So the fill asks autograd: of a state h, from which
the chunk makes the next one by a matrix M, that is h·Mh / h·h for each head, all of it where the gate is a number.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, partialmethod
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


class WrappedMemory(LayerMemories):
    """A memory for each attention module and each state, by its key, made when the first chunk gets there."""

    def __init__(self, spec: MemorySpec) -> None:
        super().__init__([], spec.receiving)
        self.spec, self.of = spec, dict[Any, Any]()
        self.layers: Any = self.of.values()

    def write(self, chunks: Sequence[Chunk], written: Written) -> None:
        if written:  # else this has been done chunk by chunk, see Wrapped.run
            super().write(chunks, written)


class Run(Cache):
    """Some chunks on their way through the model, which takes this for its cache. save: see Past."""

    now: Any = None  # whose chunks the attention function is asked for

    def __init__(self, memory: WrappedMemory, chunks: Sequence[Chunk], save: bool) -> None:
        super().__init__(layers=[])
        self.memory, self.chunks, self.save, self.closed = memory, chunks, save, False
        self.written, self.pasts = dict[Any, tuple[Tensor, ...]](), dict[Any, Any]()
        self.fills = not torch.is_grad_enabled()

    def write(self, key: Any, tensors: tuple[Tensor, ...], make: Callable[[MemorySpec], LayerMemory]) -> None:
        if key in self.written:
            raise InputError("a layer of it runs twice")
        if key not in self.memory.of:
            self.memory.of[key] = make(self.memory.spec)
        self.written[key] = tensors

    def close(self) -> Written:
        """What has been written. It belongs to a graph that may come to hold this object, which lets go of it."""
        if self.written.keys() != self.memory.of.keys():
            raise InputError("its layers do not write the same in every chunk")
        written, self.written, self.closed = self.written, {}, True  # a layer that is run from now on is recomputed
        return [written[key] for key in self.memory.of]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.chunks[0].start

    def is_recording_past(self, layer_idx: int) -> bool:
        return True  # or a chunk of one token would change the convolution's state in place

    def handed(self, kind: str, layer_idx: int, state_idx: int = 0) -> Any:
        """The state that these chunks are handed; None at the start."""
        key = kind, layer_idx, state_idx
        if not self.chunks[0].start:
            return None
        if key not in self.pasts:
            self.pasts[key] = self.memory.of[key].past(self.chunks, self.save)
        (h,) = self.pasts[key].states
        if self.fills and self.carries(key):
            torch.set_grad_enabled(True)  # until it is handed on
            h.requires_grad_()
        state = h.view_as(h)
        # For a single token some models copy the next state into it: its backward needs it as it was.
        state.copy_ = partial(self.hand_on, key)
        return state

    get_conv_state: Any = partialmethod(handed, "conv")
    get_recurrent_state: Any = partialmethod(handed, "recurrent")

    def carries(self, key: Any) -> bool:
        """Whether the memory carries the adjoint of what is left of the state that these chunks were handed."""
        return self.memory.spec.options.sparse and key[0] == "recurrent" and key in self.pasts

    def hand_on(self, key: Any, state: Tensor) -> Tensor:
        """Write the next state, and how much is left in it of the one before."""
        end, left = state, torch.zeros_like(state[..., :1, :1])
        if self.carries(key):
            (h,), (memory,) = self.pasts[key].states, self.memory.of[key].handed
            if self.fills:
                torch.set_grad_enabled(False)
                end = state.detach()
                if state.requires_grad:
                    (back,) = torch.autograd.grad(state, h, h, materialize_grads=True)
                    left = ((h * back).sum((-2, -1), True) / h.square().sum((-2, -1), True)).nan_to_num()  # of 0, 0
            else:
                left = memory.through[memory.rows[self.chunks[0].start]]
                end = state - left * (h - h.detach())
        if not self.closed:
            self.write(key, (end, left), lambda spec: LayerState([Handed(torch.zeros_like(end), left, spec)]))
        return state

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        return self.hand_on(("recurrent", layer_idx, state_idx), recurrent_states)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **told: Any) -> Tensor:
        before, size = self.get_conv_state(layer_idx, state_idx), told.get("conv_kernel_size") or conv_states.shape[-1]
        if before is None:
            before = conv_states.new_zeros(*conv_states.shape[:-1], size)
        seen = torch.cat([before, conv_states], -1)
        self.hand_on(("conv", layer_idx, state_idx), seen[..., -before.shape[-1] :])
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
    pattern, documents = attention_mask.pattern, run.memory.spec.options.documents
    scale = (query.shape[-1] ** -0.5 if scaling is None else scaling) * sqrt(D)  # minichunk's own is 1 / sqrt(D)
    query = query if isclose(scale, 1) else query * scale
    q, k, v = (x if x.shape[-1] == D else F.pad(x, (0, D - x.shape[-1])) for x in (query, key, value))
    q, k = q.to(v.dtype), k.to(v.dtype)  # autocast leaves rotated ones wider

    def make(spec: MemorySpec) -> LayerCache:
        shape, grad_dtype = (*k.shape[:2], spec.capacity, D), spec.options.cache_grad_dtype or wide(k)
        return LayerCache(shape, spec.receiving, k.new_empty(0), grad_dtype, pattern, documents)

    if not run.closed:
        key.owner = getattr(key, "owner", module)  # who is given the keys of another has its memory (Gemma 3n)
        if key.owner is module:
            run.write(module, (k, v), make)
        run.pasts[module] = run.memory.of[key.owner].past(run.chunks, run.save)
    past = run.pasts[module]
    past.memory.kernel = Plain(softcap) if softcap else None
    if past.memory.pattern != pattern:
        raise InputError("two layers share keys, and do not see the same")
    return past.attend(q, k, v, s_aux)[..., :width].transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, find_rule)
