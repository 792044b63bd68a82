"""Truncated adjoint sharding (arXiv 2501.00692, eq. 7): gradients that reach back a window of tokens, to be seen.

It truncates the sum in each layer's recurrence, and nothing else: through K layers a loss term reaches K · (window - 1)
tokens back. It is here to show what a truncation costs in exactness, not to be used: with a scan it saves nothing. The
exact scan needs one pass over the chunk where this one needs two, and a state for each chunk where this one needs the
inputs of all tokens within reach. The paper's saving is over a loop that forms every vector-Jacobian product.

Shapes: B batch, T tokens of this call, P hidden size, N state size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minichunk.chunks import Chunk
from minichunk.errors import InputError
from minichunk.full import full
from minichunk.memory.layer_memory import MemorySpec, MemoryUse
from minichunk.memory.state import scan
from minichunk.models.ssm import StateLayer, StateSpace
from minichunk.models.stack import Stack

Inputs = tuple[Tensor, Tensor, Tensor]  # u (B, T, P), log A and B (B, T, N): what puts tokens into a state


class Reach(NamedTuple):
    """What a truncated layer sees of its memory: some earlier tokens, and the state before them, a mere number."""

    state: Tensor
    earlier: Sequence[Inputs]
    lengths: Sequence[int]  # of these chunks


def truncated_scan(x: Tensor, log_a: Tensor, b: Tensor, c: Tensor, h: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """`scan`, whose y[t] sends its gradient through the states of the last `window` tokens only, t itself included.

    The part of y[t] that comes from the state `window` tokens ago is a scan too. Its value stays, and its gradient is
    taken off.
    """
    y, end = scan(x, log_a, b, c, h)
    T = x.shape[-2]
    if window < T:
        left = log_a.unfold(-2, window, 1).sum(-1).exp()[..., 1:, :]  # (…, T - window, N): over (t - window, t]
        old = slice(0, T - window)
        far, _ = scan(x[..., old, :], log_a[..., old, :], b[..., old, :], (c[..., window:, :] * left).detach(), h)
        y = y - F.pad(far - far.detach(), (0, 0, window, 0))
    return y, end


class TruncatedLayer(nn.Module):
    """A StateLayer's outputs, whose gradients reach back `window` tokens."""

    def __init__(self, layer: StateLayer, window: int) -> None:
        super().__init__()
        self.layer, self.window = layer, window

    def forward(self, x: Tensor, past: Reach | None, *_: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        if past is None:  # the whole sequence at once
            past = Reach(self.layer.nothing(x), (), [x.shape[1]])
        terms, outputs, written = self.layer.terms(x), [], []
        h, earlier = past.state, past.earlier
        for u, log_a, b, c in zip(*(z.split(list(past.lengths), 1) for z in terms), strict=True):
            u_, log_a_, b_ = (torch.cat(z, 1) for z in zip(*earlier, (u, log_a, b), strict=True))
            silent = F.pad(c, (0, 0, u_.shape[1] - u.shape[1], 0))  # earlier tokens' outputs are not asked for
            y, h = truncated_scan(u_, log_a_, b_, silent, h, self.window)
            outputs.append(y[:, -u.shape[1] :])
            written += [h.detach(), u, log_a, b]
            earlier = ()  # the fill has several chunks, and no gradients
        return x + torch.cat(outputs, 1).to(x.dtype), tuple(written)

    def fill(self, x: Tensor, past: Reach | None, *shared: Any) -> tuple[Tensor, ...]:
        """What `forward` writes."""
        written: tuple[Tensor, ...] = self(x, past, *shared)[1]
        return written

    def new_memory(self, spec: MemorySpec) -> LayerReach:
        """For what lies within reach of a kept chunk."""
        zero = self.layer.nothing(spec.like.new_empty(spec.batch, 0, self.layer.norm.weight.shape[0]))
        return LayerReach(zero, spec, self.window)


class LayerReach:
    """A truncated layer's memory: as of keys and values, of all tokens within reach of a kept chunk, and their
    gradients; and a state, which receives none, wherever they may begin. See layers.LayerMemory."""

    def __init__(self, zero: Tensor, spec: MemorySpec, window: int) -> None:
        self.window = window
        self.starts = {spec.capacity, *(chunk.start for chunk in spec.receiving)}
        self.states = {0: zero}
        self.inputs: dict[Chunk, Inputs] = {}  # leaves: autograd adds up in `.grad` what is sent back

    def past(self, chunks: Sequence[Chunk], save: bool) -> Reach:
        start, earlier = chunks[0].start, list[Inputs]()
        if torch.is_grad_enabled():
            for chunk in sorted(self.inputs, reverse=True):  # whole chunks, until the window is full
                if chunk.stop == start and self.is_within(chunk, chunks[0].start):
                    earlier, start = [self.inputs[chunk], *earlier], chunk.start
        return Reach(self.states[start], earlier, [chunk.stop - chunk.start for chunk in chunks])

    def is_within(self, chunk: Chunk, start: int) -> bool:
        """Whether the window of a chunk that begins at `start` reaches into this earlier one."""
        return chunk.stop <= start < chunk.stop + self.window - 1

    def write(self, chunks: Sequence[Chunk], written: tuple[Tensor, ...]) -> None:
        for chunk, state, *inputs in zip(chunks, *(written[i::4] for i in range(4)), strict=True):
            if any(self.is_within(chunk, start) for start in self.starts):
                u, log_a, b = (z.detach().requires_grad_() for z in inputs)
                self.inputs[chunk] = u, log_a, b
            elif chunk.start not in self.starts:
                self.states.pop(chunk.start)
            self.states[chunk.stop] = state

    def hand_over(self, chunk: Chunk) -> tuple[Tensor, ...]:
        state = self.states[chunk.start]
        if chunk not in self.inputs:  # out of reach of all kept ones
            B, P, N, C = *state.shape, chunk.stop - chunk.start
            return state, state.new_zeros(B, C, P), state.new_zeros(B, C, N), state.new_zeros(B, C, N)
        return state, *(torch.zeros_like(z) if z.grad is None else z.grad for z in self.inputs.pop(chunk))

    def tensors(self) -> MemoryUse:
        leaves = [z for inputs in self.inputs.values() for z in inputs]
        return MemoryUse([*self.states.values(), *leaves], [z.grad for z in leaves if z.grad is not None])


class TruncatedStateSpace(Stack):
    """A StateSpace with truncated gradients. The parameters are the model's own, and get the gradients.

    window: tokens, at least 1, whose states a loss term reaches through each layer's recurrence, its own included.
    Raises InputError for another window, and for attention layers. Its memory always stays on the device.
    """

    def __init__(self, model: StateSpace, window: int) -> None:
        torch.nn.Module.__init__(self)
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise InputError(f"window is {window!r}, but must be a whole number of tokens of at least 1")
        if model.config.attention is not None:
            raise InputError("layer_types has attention layers, but truncated gradients are for states alone")
        self.config, self.model, self.lm_head, self.masks = model.config, model, model.lm_head, model.masks
        layers: Any = model.layers
        self.truncated = nn.ModuleList(TruncatedLayer(layer, window) for layer in layers)

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.embedding

    @property
    def layers(self) -> nn.ModuleList:
        return self.truncated

    @property
    def norm(self) -> nn.Module:
        return self.model.norm


def truncation_errors(
    model: StateSpace, input_ids: Tensor, labels: Tensor, windows: Sequence[int]
) -> list[tuple[int, float]]:
    """(window, ‖truncated - exact‖ / ‖exact‖) for all gradients together, those of the embedding and the head too.

    input_ids, labels: as for `full`. Clears the model's `.grad`. Raises InputError.
    """
    exact = _gradient(model, model, input_ids, labels)
    found = [_gradient(model, TruncatedStateSpace(model, window), input_ids, labels) for window in windows]
    return [(window, float((g - exact).norm() / exact.norm())) for window, g in zip(windows, found, strict=True)]


def _gradient(model: StateSpace, method: Stack, input_ids: Tensor, labels: Tensor) -> Tensor:
    model.zero_grad()
    full(method, input_ids, labels)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return gradient
