"""Which mistakes show first in a tensor of a golden file.

No row of MISTAKES is from memory: tests/mutants.py makes each of them in a port in NumPy, and tests/test_compare.py
keeps the tensors true in which they show.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from .signs import Seen, all_zeros, carried_twice, not_carried, not_decayed


class Mistake(NamedTuple):
    """key: a name for it. first: where it shows first, whether or not a port has the tensors that can be left out.

    cases: the golden files that show it; none: those of all Llamas. told: whether the numbers are this mistake's; where
    those of any are, the others are not named.
    """

    key: str
    first: str
    words: str
    cases: tuple[str, ...] = ()
    told: Callable[[Seen], bool] | None = None


FIRST_KEYS = r"seco\.chunk\.0\.layer\.0\.keys"
FIRST_NORM = r"seco\.chunk\.0\.layer\.0\.(keys|state)"
ATTENTION = r"seco\.chunk\.0\.layer\.(0\.(attention|residual)|1\.(hidden|keys|state))"
RESIDUAL = r"seco\.chunk\.0\.layer\.(0\.residual|1\.(hidden|keys|state))"
MLP = r"seco\.chunk\.0\.layer\.1\.(hidden|keys|state)"
PAST = r"seco\.chunk\.1\.layer\.(0\.(attention|residual)|1\.(hidden|keys|state))"
LAST_LOSS = r"seco\.chunk\.3\.loss"
RELAY = r"seco\.chunk\.2\.layer\.\d\.(key|value)_grads"
SUM = r"seco\.chunk\.1\.layer\.\d\.(key|value)_grads"
FIRST_LEARNT = r"(lm_head|model\.norm|.*v_proj\.lora_B)"  # of what a backward pass comes to
HANDED = r"seco\.chunk\.2\.grad\..*[kv]_proj"
SPARSE_RELAY = r"spaco\.chunk\.2\.layer\.\d\.(key|value)_grads"
CARRY = r"spaco\.chunk\.0\.layer\.\d\.adjoint"


def _at(first: str, words: dict[str, str], *cases: str, told: Callable[[Seen], bool] | None = None) -> list[Mistake]:
    """The mistakes that show first there, by their keys."""
    return [Mistake(key, first, text, cases, told) for key, text in words.items()]


# fmt: off
MISTAKES = (
    # The forward pass.
    *_at(FIRST_KEYS, {
        "pairs of neighbours": "the rotation pairs dimensions 2i and 2i + 1; it must pair i and i + D/2",
        "rotation backwards": "the rotation turns the other way: a cos - b sin and b cos + a sin are right",
        "no rotation": "the queries and keys are not rotated",
        "keys before the rotation": "the keys are those before the rotation; the cache holds rotated ones",
    }),
    *_at(FIRST_NORM, {
        "eps outside the root": "RMSNorm's eps stands outside the root: x / sqrt(mean(x²) + eps) is right",
        "mean subtracted": "the norm subtracts the mean, as LayerNorm does and RMSNorm does not",
        "norm by 1 + weight": "the norm multiplies by 1 + weight, as Gemma's does, instead of by weight",
    }),
    *_at(FIRST_KEYS, {
        "no llama3 rule": "the llama3 rule for the frequencies is left out",
    }, "llama3-rope"),
    *_at(FIRST_KEYS, {
        "no biases": "the biases of q, k and v are left out",
    }, "qkv-bias"),
    *_at(FIRST_KEYS, {
        "norm after the rotation": "each head is normalized after the rotation, not before",
    }, "qk-norm"),
    *_at(FIRST_KEYS, {
        "no alpha over rank": "the adapter's product is not multiplied by alpha / rank",
        "masks of 0 and 1": "dropout does not divide what it keeps by 1 - rate",
        "other masks": "the rebuild draws other dropout masks than the fill did",
    }, "lora"),
    *_at(ATTENTION, {
        "no scale": "the scores are not divided by the root of the head size",
        "no mask": "there is no causal mask within the chunk",
        "heads not joined": "the heads are flattened without moving them behind the positions",
    }),
    *_at(ATTENTION, {
        "heads in turn": "query heads take key heads in turn (tile); neighbours share one (repeat)",
    }, "grouped", "qk-norm", "window", "hybrid"),
    *_at(RESIDUAL, {
        "no residual": "what attention returns is not added to the layer's input",
    }),
    *_at(MLP, {
        "no MLP": "the MLP is left out",
        "gate and up": "gate_proj and up_proj are exchanged: silu(gate) · up is right",
        "another activation": "the activation is not silu(x) = x · sigmoid(x)",
        "norm of the wrong input": "the second norm is given the layer's input, not the sum with attention",
    }),
    *_at(rf"seco\.chunk\.0\.logits|{LAST_LOSS}", {
        "no final norm": "the final norm before the LM head is left out",
    }),
    *_at(r"seco\.chunk\.1\.layer\.0\.keys", {
        "positions of the chunk": "positions count from the chunk's beginning, not from the text's",
    }),
    *_at(PAST, {
        "top-left mask": "the mask is aligned top left: a chunk's queries stand at the end of the keys",
        "no past": "the chunk does not see its past",
    }),
    *_at(PAST, {
        "window by one": "the window is one too wide: seen is i - j < window, the own position included",
        "no sinks": "the sinks, positions j < sinks, are not seen from beyond the window",
        "no window": "no layer has a window",
    }, "window"),
    *_at(r"seco\.chunk\.1\.layer\.(1\.(attention|residual)|2\.(hidden|keys))", {
        "window everywhere": "the window is put on the layer with full_attention too",
    }, "window"),
    # The loss.
    *_at(LAST_LOSS, {
        "no shift": "the labels are not shifted: position t predicts the label of t + 1",
        "shift in each chunk, counted": "the labels are shifted after cutting, and the divisor counts what is left",
        "mean of chunk means": "each chunk is divided by its own targets; the divisor is that of the whole batch",
        "all positions counted": "the divisor counts all positions, not the valid targets alone",
        "summed": "the loss is summed and not divided",
        "-100 counts": "labels of -100 are not ignored",
    }),
    *_at(LAST_LOSS, {
        "each batch by itself": "each batch is divided by its own targets, not by `num_targets`",
    }, "accumulated"),
    *_at(r"seco\.chunk\.2\.loss", {
        "shift in each chunk": "the labels are shifted after cutting, so that every chunk but the last loses a target",
    }),
    # The walk back.
    *_at(rf"seco\.chunk\.3\.grad\.{FIRST_LEARNT}", {
        "forward walk": "the walk goes from the first chunk to the last: later chunks must come first",
    }),
    *_at(r"seco\.chunk\.3\.grad\..*v_proj", {
        "the past with its graph": "the past still has its graph: it must be numbers, at which the gradient stops",
    }),
    *_at(r"seco\.chunk\.3\.grad\..*v_proj", {
        "heads not summed": "the gradients of query heads that share a key head are not summed",
    }, "grouped", "qk-norm", "window", "hybrid"),
    *_at(r"seco\.chunk\.3\.grad\.model\.embed_tokens", {
        "one use of the tied": "the tied embedding gets the gradient of one of its two uses",
    }, "tied"),
    *_at(RELAY, {
        "nothing sent": "nothing is sent back: what arrives at the past as gradient must be kept",
        "sent scaled": "what is sent back is divided by `num_targets` once more; the loss has the divisor already",
        "wrong rows": "the gradient is read at the wrong positions: a chunk's own, counted in the text",
    }),
    *_at(SUM, {
        "replaced": "a chunk's gradient replaces those of later chunks; they must add up",
        "one chunk back": "a chunk sends to the chunk before it alone; it must send to all that it has seen",
    }),
    *_at(r"seco\.chunk\.[01]\.layer\.\d\.(key|value)_grads", {
        "sinks hear nothing": "gradients reach the window alone; the sinks must hear too",
    }, "window"),
    *_at(HANDED, {
        "not handed over": "what was received is not handed to the backward pass",
        "handed over twice": "what was received is handed to the backward pass twice",
        "handed over scaled": "what was received is scaled once more (divided by `num_targets`) when it is handed over",
    }),
    *_at(r"seco\.chunk\.2\.grad\..*k_(proj|norm)", {
        "handed over before the rotation": "the relay goes to keys before the rotation; it belongs to the rotated ones",
    }),
    *_at(rf"seco\.chunk\.2\.grad\.{FIRST_LEARNT}", {
        "gradients forgotten": "the parameters' gradients are cleared between chunks; they must add up",
    }),
    *_at(r"second\.seco\.chunk\.3\.grad", {
        "first batch forgotten": "the parameters' gradients are cleared between batches; they must add up",
    }, "accumulated"),
    # SpaCO.
    *_at(r"spaco\.chunk\.2\.layer\.(0\.(attention|residual)|1\.(hidden|keys))", {
        "a past of kept chunks": "skipped chunks are missing from the cache; the fill runs them too",
    }),
    *_at(r"spaco\.chunk\.3\.loss", {
        "no loss factor": "the loss is not multiplied by its factor (Algorithm 2 as printed leaves it out)",
        "factors exchanged": "the factors are exchanged: the first is the loss's, the second the relay's",
        "kept targets counted": "the divisor counts the kept chunks' targets; it is that of the whole batch",
    }),
    *_at(rf"spaco\.chunk\.3\.grad\.{FIRST_LEARNT}", {
        "factor not in the gradient": "the loss's factor is in the number alone, not in what is backpropagated",
    }),
    *_at(SPARSE_RELAY, {
        "no relay factor": "the relay is not multiplied by its factor",
        "one factor for both": "the relay is multiplied by the loss's factor",
        "the sender's factor": "the relay has the sender's factor; it must have the receiver's",
    }),
    *_at(r"spaco\.chunk\.0\.layer\.\d\.(key|value)_grads", {
        "all that arrived": "all that has arrived is multiplied by a chunk's factor, not that chunk's part alone",
        "skipped chunks relay": "a skipped chunk relays: what was sent to it must end there",
    }),
    *_at(r"spaco\.loss", {
        "factors not in the sum": "the losses are added up without their factors",
    }),
    # A state.
    *_at(r"seco\.chunk\.2\.layer\.\d\.adjoint", {
        "no way back through the state": "nothing is sent back: the gradient at the state before a chunk must be kept",
    }, "state", "hybrid"),
    *_at(r"seco\.chunk\.1\.layer\.\d\.adjoint", {
        "adjoint stops at a kept chunk": "g · decay is missing: the adjoint passes through the chunk as well",
    }, "state", "hybrid", told=not_carried),
    *_at(r"seco\.chunk\.1\.layer\.\d\.adjoint", {
        "decay counted twice": "g · decay is counted twice: take relayed · decay off what autograd sends",
    }, "state", "hybrid", told=carried_twice),
    *_at(CARRY, {
        "adjoint stops at a skipped chunk": "the adjoint does not pass a skipped chunk; there too it is g · decay",
    }, "state", "hybrid", told=all_zeros),
    *_at(CARRY, {
        "no decay at a skipped chunk": "the adjoint passes a skipped chunk as it is; it must be g · decay",
    }, "state", "hybrid", told=not_decayed),
    *_at(CARRY, {
        "all that autograd sends": "the relay's factor is on what passes by the decay alone, too: another estimate",
    }, "state", "hybrid"),
)
# fmt: on


def usual_mistakes(seen: Seen, forward: list[str]) -> list[str]:
    """The words of all known mistakes that show first in this tensor; those of this file alone come first.

    forward: tensors of the same forward pass that are right, so nothing that would show in them is wrong. A second
    batch shows the mistakes that the first would.
    """
    here = [m for m in MISTAKES if (seen.case in m.cases or not m.cases) and _begins(m, seen.name, seen.case)]
    here = [m for m in here if not any(_begins(m, name, seen.case) for name in forward)]
    told = {m.key: m.told(seen) for m in here if m.told}
    found = [m for m in here if told.get(m.key, not any(told.values()))]
    return [mistake.words for mistake in sorted(found, key=lambda mistake: not mistake.cases)]


def _begins(mistake: Mistake, name: str, case: str) -> bool:
    """Whether it may show first in this tensor. The hybrid's layer 1 is to a Llama's mistakes the first."""
    if case == "hybrid":
        name = re.sub(r"layer\.([12])\.", lambda layer: f"layer.{int(layer[1]) - 1}.", name)
    return any(re.match(mistake.first, n) for n in (name, name.removeprefix("second.")))
