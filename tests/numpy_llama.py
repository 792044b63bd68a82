"""SeCO and SpaCO in NumPy, forward and backward by hand: an oracle that shares nothing with PyTorch.

Written from the golden files' page, as a port would be. Shapes: B batch, C chunk, P past, H heads,
G key-value heads, D head size, E hidden size, V vocabulary. Gradients are named d + the name of
what they are the gradient of; everything is float64.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np

Array = np.ndarray
IGNORE = -100


# Each forward returns its result and what its backward needs; each backward takes that and the
# gradient of the result.


def linear(x: Array, w: Array, b: Array | None) -> Array:
    return x @ w.T if b is None else x @ w.T + b  # (.., in) -> (.., out)


def rms_norm(x: Array, w: Array, eps: float) -> tuple[Array, Any]:
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return x * r * w, (x, w, r)


def rms_norm_backward(dy: Array, saved: Any) -> tuple[Array, Array]:
    """dx and dw."""
    x, w, r = saved
    g = dy * w
    # r depends on x: dr/dx = -r^3 x / E
    dx = r * g - x * r**3 * (g * x).mean(-1, keepdims=True)
    return dx, (dy * x * r).reshape(-1, x.shape[-1]).sum(0)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    a, b = np.split(x, 2, axis=-1)  # dimension i is paired with i + D/2
    return np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)


def rotate_backward(dy: Array, cos: Array, sin: Array) -> Array:
    return rotate(dy, cos, -sin)  # a rotation's transpose is the rotation back


def attention(q: Array, k: Array, v: Array, window: int | None, sinks: int) -> tuple[Array, Any]:
    """q (B, H, C, D) at the end of k, v (B, G, P + C, D). Seen are the last `window` positions, and the sinks."""
    shared = q.shape[1] // k.shape[1]
    k, v = (np.repeat(t, shared, axis=1) for t in (k, v))  # query head h uses key head h // shared
    C, S = q.shape[2], k.shape[2]
    i, j = np.arange(S - C, S)[:, None], np.arange(S)  # positions in the text: the queries stand at the end of the keys
    seen = j <= i
    if window is not None:
        seen = seen & ((i - j < window) | (j < sinks))
    s = np.where(seen, q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]), -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return p @ v, (q, k, v, p, shared)


def attention_backward(do: Array, saved: Any) -> tuple[Array, Array, Array]:
    """dq, and dk and dv of the past and the chunk."""
    q, k, v, p, shared = saved
    dv = p.swapaxes(-1, -2) @ do
    dp = do @ v.swapaxes(-1, -2)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) / math.sqrt(q.shape[-1])
    dk = ds.swapaxes(-1, -2) @ q

    def per_group(t: Array) -> Array:  # the query heads that share a key head add up
        B, H, S, D = t.shape
        return t.reshape(B, H // shared, shared, S, D).sum(2)

    return ds @ k, per_group(dk), per_group(dv)


def rope_tables(config: dict[str, Any], T: int) -> tuple[Array, Array]:
    """cos and sin (T, D/2); angles and results are float32 numbers."""
    D = config["head_dim"]
    exponents = (np.arange(0, D, 2, dtype=np.float32) / np.float32(D)).astype(np.float64)
    f = np.float32(1) / (config["rope_theta"] ** exponents).astype(np.float32)
    if rule := config.get("rope_scaling"):
        turns = rule["original_max_position_embeddings"] * f / np.float32(2 * math.pi)
        low, high = rule["low_freq_factor"], rule["high_freq_factor"]
        keep = np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1)
        f = keep * f + (1 - keep) * f / np.float32(rule["factor"])
    angles = np.outer(np.arange(T, dtype=np.float32), f).astype(np.float64)
    return tuple(t(angles).astype(np.float32).astype(np.float64) for t in (np.cos, np.sin))


class KeyValues:
    """A layer's memory: keys and values, chunk after chunk, and the gradients that are sent back to them."""

    written, relayed = ("keys", "values"), ("key_grads", "value_grads")

    def __init__(self, B: int, config: dict[str, Any], cuts: list[tuple[int, int]]) -> None:
        G, D, T = config["num_key_value_heads"], config["head_dim"], cuts[-1][1]
        self.cuts = cuts
        self.past: list[Any] = [(np.zeros((B, G, 0, D)), np.zeros((B, G, 0, D)))]  # before chunk 0, 1, …
        self.grads = [np.zeros((B, G, T, D)), np.zeros((B, G, T, D))]

    def write(self, own: tuple[Array, ...]) -> None:
        self.past.append(tuple(np.concatenate(pair, 2) for pair in zip(self.past[-1], own, strict=True)))

    def hand_over(self, i: int) -> tuple[Array, ...]:
        start, stop = self.cuts[i]
        return tuple(g[:, :, start:stop] for g in self.grads)

    def send(self, i: int, sent: tuple[Array, ...]) -> None:
        """Chunk i's gradients of all that it has seen of the past."""
        for total, grad in zip(self.grads, sent, strict=True):
            total[:, :, : grad.shape[2]] += grad

    def skip(self, i: int) -> None:
        """Nothing goes on through a chunk that is not rebuilt."""


class Llama:
    """Runs one chunk forward, keeping a tape, and backward along it.

    weights: parameters by Hugging Face's names. rope: cos and sin of all positions. sinks: seen by all queries of
    layers with a window. With a LoRA only its weights learn; masks: of its dropouts, (B, T, ·) for all positions.
    """

    def __init__(
        self, config: dict[str, Any], weights: dict[str, Array], rope: tuple[Array, Array], sinks: int = 0,
        lora: dict[str, Any] | None = None, masks: dict[str, Array] | None = None,
    ) -> None:  # fmt: skip
        self.config, self.w, self.rope, self.sinks, self.masks = config, weights, rope, sinks, masks or {}
        self.eps, self.layers = config["rms_norm_eps"], range(config["num_hidden_layers"])
        self.head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
        self.lora_scale = lora["alpha"] / lora["rank"] if lora else None
        self.grad: dict[str, Array] = defaultdict(float)  # type: ignore[arg-type]
        self.rows = slice(0)  # of the chunk that is run, in the text
        self.hidden_grads: list[Array] = [np.zeros(0) for _ in self.layers]  # of the layers' inputs

    def new_memory(self, B: int, cuts: list[tuple[int, int]]) -> list[Any]:
        """For each layer, what chunks leave behind in it."""
        return [KeyValues(B, self.config, cuts) for _ in self.layers]

    def learn(self, name: str, grad: Array) -> None:
        """Add to the gradient of a parameter, if it is to be trained."""
        if self.lora_scale is None or "lora_" in name:
            self.grad[name] = self.grad[name] + grad

    def heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1, self.config["head_dim"]).swapaxes(1, 2)  # (B, C, H*D) -> (B, H, C, D)

    def project(self, name: str, x: Array) -> Array:
        y = linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))
        if (a := self.w.get(f"{name}.lora_A.weight")) is not None:
            dropped = x * self.masks[name][:, self.rows]
            y = y + self.lora_scale * (dropped @ a.T @ self.w[f"{name}.lora_B.weight"].T)
        return y

    def project_backward(self, name: str, x: Array, dy: Array) -> Array:
        """Learns weight and bias, returns dx."""
        self.learn(f"{name}.weight", outer(dy, x))
        if f"{name}.bias" in self.w:
            self.learn(f"{name}.bias", dy.sum((0, 1)))
        dx = dy @ self.w[f"{name}.weight"]
        if (a := self.w.get(f"{name}.lora_A.weight")) is not None:
            mask = self.masks[name][:, self.rows]
            dlow = self.lora_scale * dy @ self.w[f"{name}.lora_B.weight"]  # (B, C, rank)
            self.learn(f"{name}.lora_B.weight", self.lora_scale * outer(dy, x * mask @ a.T))
            self.learn(f"{name}.lora_A.weight", outer(dlow, x * mask))
            dx = dx + dlow @ a * mask
        return dx

    def norm(self, name: str, x: Array) -> tuple[Array, Any]:
        return rms_norm(x, self.w[f"{name}.weight"], self.eps)

    def norm_backward(self, name: str, dy: Array, saved: Any) -> Array:
        dx, dw = rms_norm_backward(dy, saved)
        self.learn(f"{name}.weight", dw)
        return dx

    def head_rotation(self, name: str, x: Array, start: int) -> tuple[Array, Any]:
        """Queries or keys: split into heads, normalized where the model does that, rotated."""
        x, saved = self.heads(x), None
        if f"{name}_norm.weight" in self.w:
            x, saved = self.norm(f"{name}_norm", x)
        cos, sin = (t[start : start + x.shape[2]] for t in self.rope)
        return rotate(x, cos, sin), (saved, cos, sin)

    def head_rotation_backward(self, name: str, dy: Array, saved: Any) -> Array:
        norm, cos, sin = saved
        dx = rotate_backward(dy, cos, sin)
        if norm is not None:
            dx = self.norm_backward(f"{name}_norm", dx, norm)
        return join(dx)

    def forward(
        self, ids: Array, start: int, past: list[tuple[Array, ...]]
    ) -> tuple[list[Any], list[tuple[Array, ...]], dict[str, Array]]:
        """past: what each layer's memory holds. Returns the tape, what each layer wrote, and what was seen inside."""
        self.rows = slice(start, start + ids.shape[1])
        x, tape, written = self.w["model.embed_tokens.weight"][ids], [], []
        inside: dict[str, Array] = {}
        for i in self.layers:
            inside[f"layer.{i}.hidden"] = x
            x, wrote, saved, seen = self.layer_forward(i, x, past[i])
            inside |= {f"layer.{i}.{name}": tensor for name, tensor in seen.items()}
            written.append(wrote)
            tape.append(saved)
        y, final = self.norm("model.norm", x)
        inside["logits"] = y @ self.w[f"{self.head}.weight"].T
        return [ids, *tape, (y, final)], written, inside

    def layer_forward(self, i: int, x: Array, past: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...], Any, Any]:
        """x (B, C, E) to the next x, what was written, what backward needs, and what was seen inside."""
        name, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        h, norm_1 = self.norm(f"model.layers.{i}.input_layernorm", x)
        q, q_saved = self.head_rotation(f"{name}.q", self.project(f"{name}.q_proj", h), self.rows.start)
        k, k_saved = self.head_rotation(f"{name}.k", self.project(f"{name}.k_proj", h), self.rows.start)
        v = self.heads(self.project(f"{name}.v_proj", h))
        keys, values = (np.concatenate(pair, 2) for pair in zip(past, (k, v), strict=True))
        o, attended = attention(q, keys, values, self.window(i), self.sinks)
        o = join(o)
        residual = x + self.project(f"{name}.o_proj", o)
        h2, norm_2 = self.norm(f"model.layers.{i}.post_attention_layernorm", residual)
        gate, up = self.project(f"{mlp}.gate_proj", h2), self.project(f"{mlp}.up_proj", h2)
        sigmoid = 1 / (1 + np.exp(-gate))
        y = residual + self.project(f"{mlp}.down_proj", gate * sigmoid * up)
        saved = (h, norm_1, q_saved, k_saved, attended, o, h2, norm_2, gate, up, sigmoid)
        return y, (k, v), saved, {"attention": o, "residual": residual}

    def window(self, i: int) -> int | None:
        """How many positions layer i sees, the own included; None: all."""
        kinds = self.config.get("layer_types")
        return self.config["sliding_window"] if kinds and kinds[i] == "sliding_attention" else None

    def backward(self, tape: list[Any], dlogits: Array, relayed: list[tuple[Array, ...]]) -> list[tuple[Array, ...]]:
        """Adds to `grad`. relayed: the gradients of what each layer wrote, from later chunks.

        Returns those of what each layer saw of its memory.
        """
        ids, *layers, (y, final) = tape
        sent = []
        self.learn(f"{self.head}.weight", outer(dlogits, y))
        dx = self.norm_backward("model.norm", dlogits @ self.w[f"{self.head}.weight"], final)
        for i in reversed(self.layers):
            dx, back = self.layer_backward(i, layers[i], dx, relayed[i])
            self.hidden_grads[i] = dx
            sent.append(back)
        embedding = np.zeros_like(self.w["model.embed_tokens.weight"])
        np.add.at(embedding, ids, dx)
        self.learn("model.embed_tokens.weight", embedding)
        return sent[::-1]

    def layer_backward(
        self, i: int, saved: Any, dx: Array, relayed: tuple[Array, ...]
    ) -> tuple[Array, tuple[Array, ...]]:
        """dx of the layer's output to that of its input; and the gradients of the past keys and values."""
        h, norm_1, q_saved, k_saved, attended, o, h2, norm_2, gate, up, sigmoid = saved
        name, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        silu = gate * sigmoid
        da = self.project_backward(f"{mlp}.down_proj", silu * up, dx)
        dh2 = self.project_backward(f"{mlp}.up_proj", h2, da * silu)
        dgate = da * up * (sigmoid + silu * (1 - sigmoid))
        dh2 = dh2 + self.project_backward(f"{mlp}.gate_proj", h2, dgate)
        dx = dx + self.norm_backward(f"model.layers.{i}.post_attention_layernorm", dh2, norm_2)

        do = self.project_backward(f"{name}.o_proj", o, dx)
        dq, dk, dv = attention_backward(self.heads(do), attended)
        P = dk.shape[2] - dx.shape[1]
        sent = (dk[:, :, :P], dv[:, :, :P])
        dk, dv = (own[:, :, P:] + later for own, later in zip((dk, dv), relayed, strict=True))  # relay
        dh = self.project_backward(f"{name}.v_proj", h, join(dv))
        dh = dh + self.project_backward(f"{name}.k_proj", h, self.head_rotation_backward(f"{name}.k", dk, k_saved))
        dh = dh + self.project_backward(f"{name}.q_proj", h, self.head_rotation_backward(f"{name}.q", dq, q_saved))
        dx = dx + self.norm_backward(f"model.layers.{i}.input_layernorm", dh, norm_1)
        return dx, sent


def outer(dy: Array, x: Array) -> Array:
    return np.einsum("bco,bci->oi", dy, x)  # of a weight (out, in), from all tokens


def join(x: Array) -> Array:
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)  # (B, H, C, D) -> (B, C, H*D)


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def dpo_factors(logits: Array, targets: Array, beta: float, reference: float) -> tuple[Array, dict[str, Any]]:
    """Of the loss of each target; and DPO's loss, with what a port can compare on the way to them.

    The first row is the chosen answer, the second the rejected one; reference: of each target, in the reference model.
    """
    valid, sign = targets != IGNORE, np.array([[1.0], [-1.0]])
    log_p = np.take_along_axis(log_softmax(logits), np.where(valid, targets, 0)[..., None], -1)[..., 0] * valid
    margin = beta * (sign * (log_p - reference * valid)).sum()
    weights = -beta / (1 + np.exp(margin)) * sign * valid  # dJ/dl of J = log(1 + exp(-margin))
    own = [np.concatenate((0 * x[:, :1], x[:, :-1]), 1) for x in (log_p, weights)]  # at the label's own position
    return -weights, {"loss": np.log1p(np.exp(-margin)), "log_probs": own[0], "token_weights": own[1]}


def loss_and_gradient(logits: Array, targets: Array, divisor: float, factors: Array) -> tuple[float, Array]:
    """Summed cross-entropy of the valid targets, each times its factor, over `divisor`; and its gradient."""
    log_p = log_softmax(logits)
    valid = (targets != IGNORE) * factors
    one_hot = np.eye(logits.shape[-1])[np.where(targets != IGNORE, targets, 0)] * valid[..., None]
    loss = float(-(one_hot * log_p).sum() / divisor)
    return loss, (np.exp(log_p) * valid[..., None] - one_hot) / divisor


def spaco(
    model: Llama, ids: Array, labels: Array, chunk_size: int, weights: list[tuple[float, float] | None],
    num_targets: float | None = None, dpo: dict[str, float] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Algorithm 2; with all weights (1, 1) it is Algorithm 1. Adds to `model.grad`.

    Returns what the golden files hold, by the same names, without their prefix.
    """
    B, T = ids.shape
    targets = np.concatenate((labels[:, 1:], np.full((B, 1), IGNORE)), 1)  # shifted once, before cutting
    divisor = float((targets != IGNORE).sum()) if num_targets is None else num_targets
    cuts = [(start, min(start + chunk_size, T)) for start in range(0, T, chunk_size)]
    memory = model.new_memory(B, cuts)
    logits = []
    for start, stop in cuts:  # fill
        _, written, inside = model.forward(ids[:, start:stop], start, [layer.past[-1] for layer in memory])
        for layer, own in zip(memory, written, strict=True):
            layer.write(own)
        logits.append(inside["logits"])

    factors, out = np.ones((B, T)), {"loss": 0.0}
    if dpo is not None:
        factors, out = dpo_factors(np.concatenate(logits, 1), targets, **dpo)
    for i in reversed(range(len(cuts))):
        if (weight := weights[i]) is None:
            for layer in memory:
                layer.skip(i)
            continue
        start, stop = cuts[i]
        past = [layer.past[i] for layer in memory]
        tape, written, inside = model.forward(ids[:, start:stop], start, past)  # rebuild
        loss, dlogits = loss_and_gradient(inside["logits"], targets[:, start:stop], divisor, factors[:, start:stop])
        relayed = [tuple(weight[1] * g for g in layer.hand_over(i)) for layer in memory]  # relay
        sent = model.backward(tape, weight[0] * dlogits, relayed)
        for layer, grads in zip(memory, sent, strict=True):
            layer.send(i, grads)
        out["loss"] += 0 if dpo is not None else weight[0] * loss
        out[f"chunk.{i}.loss"] = weight[0] * loss
        out |= {f"chunk.{i}.{name}": tensor for name, tensor in inside.items()}
        for n, layer in enumerate(memory):
            names = [f"chunk.{i}.layer.{n}.{name}" for name in (*layer.written, *layer.relayed)]
            out |= dict(zip(names, (*written[n], *relayed[n]), strict=True))
            out[f"chunk.{i}.layer.{n}.hidden_grad"] = model.hidden_grads[n]
        out |= {f"chunk.{i}.grad.{name}": np.array(grad) for name, grad in model.grad.items()}
    return out
