"""SeCO and SpaCO for a state in NumPy, token by token, forward and backward by hand: see numpy_llama.py.

Shapes: B batch, C chunk, P hidden size, N state size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .numpy_llama import IGNORE, Array, Llama, loss_and_gradient


class StateSpace(Llama):
    """Runs one chunk forward, keeping a tape, and backward along it."""

    def __init__(self, config: dict[str, Any], weights: dict[str, Array]) -> None:
        super().__init__(config, weights, rope=())  # type: ignore[arg-type]

    def zeros(self, B: int) -> list[Array]:
        """A state (B, P, N) for each layer."""
        return [np.zeros((B, self.config["hidden_size"], self.config["state_size"])) for _ in self.layers]

    def layer_forward(self, i: int, x: Array, past: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...], Any, Any]:
        """Writes the state after the chunk, and what is left in it of the one before."""
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


def spaco(
    model: StateSpace, ids: Array, labels: Array, chunk_size: int, weights: list[tuple[float, float] | None],
    num_targets: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Algorithm 2, the adjoint carried through all chunks; with all weights (1, 1) it is Algorithm 1.

    Adds to `model.grad`; returns what the golden files hold, by the same names, without their prefix.
    """
    B, T = ids.shape
    targets = np.concatenate((labels[:, 1:], np.full((B, 1), IGNORE)), 1)
    divisor = float((targets != IGNORE).sum()) if num_targets is None else num_targets
    parts = [slice(start, min(start + chunk_size, T)) for start in range(0, T, chunk_size)]
    states, decays = [model.zeros(B)], []  # before and through chunk 0, 1, …
    for rows in parts:  # fill
        _, written, _ = model.forward(ids[:, rows], rows.start, [(h,) for h in states[-1]])
        states.append([end for end, _ in written])
        decays.append([through for _, through in written])
    adjoints = model.zeros(B)
    out: dict[str, Any] = {"loss": 0.0}
    for i, rows in reversed(list(enumerate(parts))):
        sent = model.zeros(B)
        if (weight := weights[i]) is not None:
            tape, written, inside = model.forward(ids[:, rows], rows.start, [(h,) for h in states[i]])  # rebuild
            loss, dlogits = loss_and_gradient(inside["logits"], targets[:, rows], divisor)
            relayed = [weight[1] * adjoint for adjoint in adjoints]  # relay
            sent = [grad for (grad,) in model.backward(tape, weight[0] * dlogits, [(g,) for g in relayed])]
            out |= {f"chunk.{i}.{name}": tensor for name, tensor in inside.items()}
            for n in model.layers:
                names = [f"chunk.{i}.layer.{n}.{name}" for name in ("state", "decay", "adjoint")]
                out |= dict(zip(names, (*written[n], relayed[n]), strict=True))
            out[f"chunk.{i}.loss"] = weight[0] * loss
            out["loss"] += weight[0] * loss
            out |= {f"chunk.{i}.grad.{name}": np.array(grad) for name, grad in model.grad.items()}
        adjoints = [adjoint * decay + s for adjoint, decay, s in zip(adjoints, decays[i], sent, strict=True)]
    return out
