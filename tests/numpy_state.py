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

    def forward(self, ids: Array, states: list[Array]) -> tuple[list[Any], list[Array], list[Array], Array]:  # type: ignore[override]
        """Returns the tape, each layer's state after the chunk, what is left in it of the one before, and logits."""
        x, tape, ends, decays = self.w["model.embed_tokens.weight"][ids], [], [], []
        for i, h in zip(self.layers, states, strict=True):
            name = f"model.layers.{i}"
            u, norm = self.norm(f"{name}.norm", x)
            a = 1 / (1 + np.exp(-self.project(f"{name}.a_proj", u)))  # (B, C, N), as b and c
            b, c = (self.project(f"{name}.{gate}_proj", u) for gate in "bc")
            hs, y = [h], np.zeros_like(x)
            for t in range(ids.shape[1]):
                hs.append(a[:, t, None] * hs[-1] + u[:, t, :, None] * b[:, t, None])
                y[:, t] = (hs[-1] * c[:, t, None]).sum(-1)
            x = x + y
            tape.append((u, norm, a, b, c, hs))
            ends.append(hs[-1])
            decays.append(a.prod(1)[:, None])  # (B, 1, N)
        y, final = self.norm("model.norm", x)
        return [ids, *tape, (y, final)], ends, decays, y @ self.w[f"{self.head}.weight"].T

    def backward(self, tape: list[Any], dlogits: Array, relayed: list[Array]) -> list[Array]:  # type: ignore[override]
        """Adds to `grad`. relayed: the gradient of each layer's state after the chunk.

        Returns that of the states before it, but for what passes from one to the other by the decay alone.
        """
        ids, *layers, (y, final) = tape
        sent = []
        head = f"{self.head}.weight"
        self.grad[head] = self.grad[head] + np.einsum("bcv,bce->ve", dlogits, y)
        dx = self.norm_backward("model.norm", dlogits @ self.w[head], final)
        for i in reversed(self.layers):
            u, norm, a, b, c, hs = layers[i]
            name, du = f"model.layers.{i}", np.zeros_like(u)
            da, db, dc = np.zeros_like(a), np.zeros_like(b), np.zeros_like(c)
            dh = relayed[i]
            for t in reversed(range(ids.shape[1])):
                dh = dh + dx[:, t, :, None] * c[:, t, None]  # y[t] = h[t] c[t]
                dc[:, t] = (dx[:, t, :, None] * hs[t + 1]).sum(1)
                da[:, t] = (dh * hs[t]).sum(1)
                db[:, t] = (dh * u[:, t, :, None]).sum(1)
                du[:, t] = (dh * b[:, t, None]).sum(2)
                dh = dh * a[:, t, None]
            sent.append(dh - relayed[i] * a.prod(1)[:, None])
            for gate, dz in (("a", da * a * (1 - a)), ("b", db), ("c", dc)):
                du = du + self.project_backward(f"{name}.{gate}_proj", u, dz)
            dx = dx + self.norm_backward(f"{name}.norm", du, norm)
        embedding = np.zeros_like(self.w["model.embed_tokens.weight"])
        np.add.at(embedding, ids, dx)
        self.grad["model.embed_tokens.weight"] = self.grad["model.embed_tokens.weight"] + embedding
        return sent[::-1]


def spaco(
    model: StateSpace, ids: Array, labels: Array, chunk_size: int, weights: list[tuple[float, float] | None]
) -> dict[str, Any]:
    """Algorithm 2, the adjoint carried through all chunks; with all weights (1, 1) it is Algorithm 1.

    Adds to `model.grad`; returns what the golden files hold, by the same names, without their prefix.
    """
    B, T = ids.shape
    targets = np.concatenate((labels[:, 1:], np.full((B, 1), IGNORE)), 1)
    divisor = float((targets != IGNORE).sum())
    parts = [slice(start, min(start + chunk_size, T)) for start in range(0, T, chunk_size)]
    states, decays = [model.zeros(B)], []  # before and through chunk 0, 1, …
    for rows in parts:  # fill
        _, ends, through, _ = model.forward(ids[:, rows], states[-1])
        states.append(ends)
        decays.append(through)
    adjoints = model.zeros(B)
    out: dict[str, Any] = {"loss": 0.0}
    for i, rows in reversed(list(enumerate(parts))):
        sent = model.zeros(B)
        if (weight := weights[i]) is not None:
            tape, ends, through, logits = model.forward(ids[:, rows], states[i])  # rebuild
            loss, dlogits = loss_and_gradient(logits, targets[:, rows], divisor)
            relayed = [weight[1] * adjoint for adjoint in adjoints]  # relay
            sent = model.backward(tape, weight[0] * dlogits, relayed)
            for n in model.layers:
                where = f"chunk.{i}.layer.{n}"
                out |= {f"{where}.state": ends[n], f"{where}.decay": through[n], f"{where}.adjoint": relayed[n]}
            out[f"chunk.{i}.loss"] = weight[0] * loss
            out["loss"] += weight[0] * loss
            out |= {f"chunk.{i}.grad.{name}": np.array(grad) for name, grad in model.grad.items()}
        adjoints = [adjoint * decay + s for adjoint, decay, s in zip(adjoints, decays[i], sent, strict=True)]
    return out
