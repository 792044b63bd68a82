"""Every known mistake of a port, made in numpy_llama.py or numpy_state.py by changing a line or two of its source."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from . import numpy_llama

HERE = Path(__file__).parent


class Mutant(NamedTuple):
    """key: of the mistake in porting/mistakes.ini. case: a file that shows it. changes: source, before and after."""

    key: str
    case: str
    changes: tuple[tuple[str, str], ...]

    def modules(self) -> tuple[ModuleType, ModuleType]:
        """numpy_llama and numpy_state with the mistake in one of them."""
        source = "numpy_state" if self.case == "state" else "numpy_llama"
        text = (HERE / f"{source}.py").read_text()
        for before, after in self.changes:
            assert text.count(before) == 1, f"{self.key}: {text.count(before)} times in {source}.py: {before}"
            text = text.replace(before, after)
        if source == "numpy_state":
            return numpy_llama, run(text, numpy_llama)
        llama = run(text, numpy_llama)
        return llama, run((HERE / "numpy_state.py").read_text(), llama)


def run(source: str, llama: ModuleType) -> ModuleType:
    """A module of this source, which builds on that Llama."""
    module = ModuleType(f"{__package__}.mutant")
    module.__dict__.update(Array=llama.Array, KeyValues=llama.KeyValues, Llama=llama.Llama)
    source = source.replace("from .numpy_llama import Array, KeyValues, Llama", "")
    exec(compile(source, "mutant", "exec"), module.__dict__)
    return module


def mutant(key: str, before: str, after: str, case: str = "plain", *more: tuple[str, str]) -> Mutant:
    return Mutant(key, case, ((before, after), *more))


WEIGHT = "            continue\n        start, stop = cuts[i]\n"  # the place where a chunk's factors are known


def other_factors(key: str, weight: str) -> Mutant:
    return mutant(key, WEIGHT, f"{WEIGHT}        weight = {weight}\n")


RELAYED = "relayed = [tuple(weight[1] * g for g in layer.hand_over(i)) for layer in memory]"
UNSCALED = RELAYED.replace("weight[1] * ", "")
ADD_UP = "total[:, :, : grad.shape[2]] += grad"
SEND = "layer.send(i, grads)"
DIVISOR = "divisor = float((targets != IGNORE).sum()) if num_targets is None else num_targets"
LOSS = 'loss_and_gradient(inside["logits"], targets[:, start:stop], divisor'
OWN_TARGETS = "np.concatenate((labels[:, start + 1 : stop], np.full((B, 1), IGNORE)), 1)"
BACKWARD = "sent = model.backward(tape, weight[0] * dlogits, relayed)\n"
THROUGH_THE_PAST = """        for j, (first, last) in reversed(list(enumerate(cuts[:i]))):
            again, _, seen = model.forward(ids[:, first:last], first, [layer.past[j] for layer in memory])
            relays = [tuple(g[:, :, first:last] for g in layer) for layer in sent]
            for layer, grads in zip(sent, model.backward(again, 0 * seen["logits"], relays)):
                for total, grad in zip(layer, grads):
                    total[:, :, :first] += grad
"""
PAST = "        past = [layer.past[i] for layer in memory]\n"

# fmt: off
FORWARD = [
    mutant("pairs of neighbours", "a, b = np.split(x, 2, axis=-1)", "a, b = x[..., ::2], x[..., 1::2]"),
    mutant("rotation backwards", "return np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)",
           "return np.concatenate((a * cos + b * sin, b * cos - a * sin), -1)"),
    mutant("no rotation", "return rotate(x, cos, sin), (saved, cos, sin)", "return x, (saved, cos, sin)"),
    mutant("keys before the rotation", "return rotate(x, cos, sin), (saved, cos, sin)",
           "return (x if name.endswith('k') else rotate(x, cos, sin)), (saved, cos, sin)"),
    mutant("eps outside the root", "r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)",
           "r = 1 / (np.sqrt((x * x).mean(-1, keepdims=True)) + eps)"),
    mutant("mean subtracted", "    return x * r * w, (x, w, r)",
           "    return (x - x.mean(-1, keepdims=True)) * r * w, (x, w, r)"),
    mutant("norm by 1 + weight", "    return x * r * w, (x, w, r)", "    return x * r * (1 + w), (x, w, r)"),
    mutant("no llama3 rule", "self.config, self.w, self.rope, self.sinks, self.masks = config, weights, rope,",
           "rope = rope_tables({**config, 'rope_scaling': None}, len(rope[0]))\n"
           "        self.config, self.w, self.rope, self.sinks, self.masks = config, weights, rope,", "llama3-rope"),
    mutant("no biases", 'y = linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))',
           'y = linear(x, self.w[f"{name}.weight"], None)', "qkv-bias"),
    mutant("norm after the rotation", 'x, saved = self.norm(f"{name}_norm", x)',
           'x, saved = self.norm(f"{name}_norm", rotate(x, *(t[start : start + x.shape[2]] for t in self.rope)))',
           "qk-norm", ("return rotate(x, cos, sin), (saved", "return (x if saved else rotate(x, cos, sin)), (saved")),
    mutant("positions of the chunk", "cos, sin = (t[start : start + x.shape[2]] for t in self.rope)",
           "cos, sin = (t[: x.shape[2]] for t in self.rope)"),
    mutant("no scale", "s = np.where(seen, q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]), -np.inf)",
           "s = np.where(seen, q @ k.swapaxes(-1, -2), -np.inf)"),
    mutant("no mask", "seen = j <= i", "seen = j <= i + S"),
    mutant("heads in turn", "k, v = (np.repeat(t, shared, axis=1) for t in (k, v))",
           "k, v = (np.tile(t, (1, shared, 1, 1)) for t in (k, v))", "grouped"),
    mutant("top-left mask", "i, j = np.arange(S - C, S)[:, None]", "i, j = np.arange(C)[:, None]"),
    mutant("no past", "o, attended = attention(q, keys, values,",
           "keys[:, :, : -x.shape[1]] = values[:, :, : -x.shape[1]] = 0\n"
           "        o, attended = attention(q, keys, values,"),
    mutant("no residual", "residual = x + self.project", "residual = self.project"),
    mutant("heads not joined", "x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)",
           "x.reshape(x.shape[0], x.shape[2], -1)"),
    mutant("gate and up", 'gate, up = self.project(f"{mlp}.gate_proj", h2), self.project(f"{mlp}.up_proj", h2)',
           'up, gate = self.project(f"{mlp}.gate_proj", h2), self.project(f"{mlp}.up_proj", h2)'),
    mutant("another activation", "gate * sigmoid * up)", "np.maximum(gate, 0) * up)"),
    mutant("no final norm", 'inside["logits"] = y @', 'inside["logits"] = x @'),
    mutant("window by one", "i - j < window", "i - j <= window", "window"),
    mutant("no sinks", "((i - j < window) | (j < sinks))", "(i - j < window)", "window"),
    mutant("no alpha over rank", 'lora["alpha"] / lora["rank"]', "1.0", "lora"),
    mutant("other masks", PAST, "        model.masks = {n: np.roll(m, 1, 1) for n, m in model.masks.items()}\n" + PAST,
           "lora"),
]
LOSSES = [
    mutant("no shift", "targets = np.concatenate((labels[:, 1:], np.full((B, 1), IGNORE)), 1)", "targets = labels"),
    mutant("shift in each chunk", LOSS, LOSS.replace("targets[:, start:stop]", OWN_TARGETS)),
    mutant("mean of chunk means", LOSS,
           LOSS.replace("divisor", "(targets[:, start:stop] != IGNORE).sum() * len(cuts)")),
    mutant("-100 counts", "valid = (targets != IGNORE) * factors", "valid, targets = factors, np.maximum(targets, 0)"),
    mutant("each batch by itself", DIVISOR, "divisor = float((targets != IGNORE).sum())", "accumulated"),
]
BACKWARDS = [
    mutant("forward walk", "for i in reversed(range(len(cuts))):", "for i in range(len(cuts)):"),
    mutant("the past with its graph", BACKWARD, BACKWARD + THROUGH_THE_PAST),
    mutant("heads not summed", "shared, S, D).sum(2)", "shared, S, D).mean(2)", "grouped"),
    mutant("one use of the tied", 'self.learn(f"{self.head}.weight", outer(dlogits, y))', "pass", "tied"),
    mutant("nothing sent", ADD_UP, "pass"),
    mutant("replaced", ADD_UP, ADD_UP.replace("+=", "=")),
    mutant("sinks hear nothing", "sent = (dk[:, :, :P], dv[:, :, :P])",
           "near = (np.arange(P) > P - (self.window(i) or P + 1))[:, None]\n"
           "        sent = (dk[:, :, :P] * near, dv[:, :, :P] * near)", "window"),
    mutant("not handed over", "(own[:, :, P:] + later for", "(own[:, :, P:] for"),
    mutant("handed over twice", "(own[:, :, P:] + later for", "(own[:, :, P:] + 2 * later for"),
    mutant("handed over before the rotation", 'self.head_rotation_backward(f"{name}.k", dk, k_saved)',
           'self.head_rotation_backward(f"{name}.k", dk - relayed[0], k_saved) + join(relayed[0])'),
    mutant("gradients forgotten", BACKWARD, "model.grad.clear()\n        " + BACKWARD),
    mutant("first batch forgotten", "    B, T = ids.shape\n", "    B, T = ids.shape\n    model.grad.clear()\n",
           "accumulated"),
]
SPARSE = [
    other_factors("no loss factor", "(1.0, weight[1])"),
    other_factors("factors exchanged", "weight[::-1]"),
    mutant("factor not in the gradient", BACKWARD, BACKWARD.replace("weight[0] * ", "")),
    other_factors("no relay factor", "(weight[0], 1.0)"),
    other_factors("one factor for both", "(weight[0], weight[0])"),
    mutant("the sender's factor", SEND, "layer.send(i, [weight[1] * g for g in grads])", "plain", (RELAYED, UNSCALED)),
    mutant("all that arrived", RELAYED, "for layer in memory:\n"
           "            layer.grads = [weight[1] * g for g in layer.grads]\n        " + UNSCALED),
    mutant("skipped chunks relay", "if (weight := weights[i]) is None:\n            for layer in memory:\n"
           "                layer.skip(i)\n            continue", "weight = weights[i] or (0.0, 1.0)"),
]
CARRY = "self.adjoint = self.adjoint * self.decays[i] + sent[0]"
SENT = "(dh - after * a.prod(1)[:, None],)"
STATES = [
    mutant("adjoint stops at a kept chunk", CARRY, "self.adjoint = sent[0]", "state"),
    mutant("adjoint stops at a skipped chunk", "self.adjoint = self.adjoint * self.decays[i]\n",
           "self.adjoint = 0 * self.adjoint\n", "state"),
    mutant("decay counted twice", SENT, "(dh,)", "state"),
    mutant("no decay at a skipped chunk", "self.adjoint = self.adjoint * self.decays[i]\n",
           "pass\n", "state"),
    mutant("all that autograd sends", CARRY, "self.adjoint = sent[0]", "state", (SENT, "(dh,)")),
    mutant("no way back through the state", SENT, "(0 * dh,)", "state"),
]
# fmt: on
MUTANTS = FORWARD + LOSSES + BACKWARDS + SPARSE + STATES
