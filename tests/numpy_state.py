"""State-space layers in NumPy, token by token, forward and backward by hand: see numpy_llama.py, whose loop runs them.

Shapes: B batch, C chunk, P hidden size, N state size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .numpy_llama import Array, KeyValues, Llama


class State:
    """A layer's memory: the state after chunk after chunk, and the adjoint on its way back through all of them."""

    written, relayed = ("state", "decay"), ("adjoint",)

    def __init__(self, B: int, config: dict[str, Any]) -> None:
        self.adjoint = np.zeros((B, config["hidden_size"], config["state_size"]))
        self.past = [(self.adjoint,)]  # before chunk 0, 1, …
        self.decays: list[Array] = []  # through chunk 0, 1, …

    def write(self, own: tuple[Array, ...]) -> None:
        state, decay = own
        self.past.append((state,))
        self.decays.append(decay)

    def hand_over(self, i: int) -> tuple[Array, ...]:
        return (self.adjoint,)

    def send(self, i: int, sent: tuple[Array, ...]) -> None:
        """What comes to the state before chunk i, but for what passes by the decay alone, which has no factor."""
        self.adjoint = self.adjoint * self.decays[i] + sent[0]

    def skip(self, i: int) -> None:
        self.adjoint = self.adjoint * self.decays[i]


class StateSpace(Llama):
    """State-space layers, and a Llama's where the config says full_attention."""

    def is_state(self, i: int) -> bool:
        return self.config["layer_types"][i] == "state"

    def new_memory(self, B: int, cuts: list[tuple[int, int]]) -> list[Any]:
        return [State(B, self.config) if self.is_state(i) else KeyValues(B, self.config, cuts) for i in self.layers]

    def layer_forward(self, i: int, x: Array, past: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...], Any, Any]:
        """Writes the state after the chunk, and what is left in it of the one before."""
        if not self.is_state(i):
            return super().layer_forward(i, x, past)
        name, (h,) = f"model.layers.{i}", past
        u, norm = self.norm(f"{name}.norm", x)
        a = 1 / (1 + np.exp(-self.project(f"{name}.a_proj", u)))  # (B, C, N), as b and c
        b, c = (self.project(f"{name}.{gate}_proj", u) for gate in "bc")
        hs, y = [h], np.zeros_like(x)
        for t in range(x.shape[1]):
            hs.append(a[:, t, None] * hs[-1] + u[:, t, :, None] * b[:, t, None])
            y[:, t] = (hs[-1] * c[:, t, None]).sum(-1)
        return x + y, (hs[-1], a.prod(1)[:, None]), (u, norm, a, b, c, hs), {}  # (B, P, N) and (B, 1, N)

    def layer_backward(
        self, i: int, saved: Any, dx: Array, relayed: tuple[Array, ...]
    ) -> tuple[Array, tuple[Array, ...]]:
        """relayed: the gradient of the state after the chunk.

        Returns that of the state before it, but for what passes from one to the other by the decay alone.
        """
        if not self.is_state(i):
            return super().layer_backward(i, saved, dx, relayed)
        u, norm, a, b, c, hs = saved
        name, du, (after,) = f"model.layers.{i}", np.zeros_like(u), relayed
        da, db, dc = np.zeros_like(a), np.zeros_like(b), np.zeros_like(c)
        dh = after
        for t in reversed(range(dx.shape[1])):
            dh = dh + dx[:, t, :, None] * c[:, t, None]  # y[t] = h[t] c[t]
            dc[:, t] = (dx[:, t, :, None] * hs[t + 1]).sum(1)
            da[:, t] = (dh * hs[t]).sum(1)
            db[:, t] = (dh * u[:, t, :, None]).sum(1)
            du[:, t] = (dh * b[:, t, None]).sum(2)
            dh = dh * a[:, t, None]
        for gate, dz in (("a", da * a * (1 - a)), ("b", db), ("c", dc)):
            du = du + self.project_backward(f"{name}.{gate}_proj", u, dz)
        return dx + self.norm_backward(f"{name}.norm", du, norm), (dh - after * a.prod(1)[:, None],)
