"""What a port got wrong, told from the first tensor that differs.

No row of MISTAKES is from memory: tests/mutants.py makes each of them in a port in NumPy, and tests/test_compare.py
keeps the tensors true in which they show.
"""

import re
from typing import NamedTuple

ELSE = "or it was kept at another time, is a view of what goes on changing, or `.grad` was not cleared before"
FIRST_KEYS = "seco.chunk.0.layer.0.keys"
FIRST_NORM = "seco.chunk.0.layer.0.(keys|state)"
ATTENTION = "seco.chunk.0.layer.(0.(attention|residual)|1.(hidden|keys|state))"
RESIDUAL = "seco.chunk.0.layer.(0.residual|1.(hidden|keys|state))"
MLP = "seco.chunk.0.layer.1.(hidden|keys|state)"
PAST = "seco.chunk.1.layer.(0.(attention|residual)|1.(hidden|keys|state))"
LAST_LOSS = "seco.chunk.3.loss"
LAST_GRAD = "seco.chunk.3.grad."
LAST_V_GRAD = LAST_GRAD + ".*v_proj"
FIRST_LEARNT = "(lm_head|model.norm|.*v_proj.lora_B)"  # of what a backward pass comes to
RELAYED = ".layer.[012].(key|value)_grads"
HANDED = "seco.chunk.2.grad."
SPARSE_RELAY = "spaco.chunk.2" + RELAYED
SPARSE_SUM = "spaco.chunk.0" + RELAYED
FIRST_ADJOINT = "seco.chunk.2.layer.[012].adjoint"
ADJOINT = "seco.chunk.1.layer.[012].adjoint"
CARRY = "spaco.chunk.0.layer.[012].adjoint"
SHARED, STATES, WINDOW = ("grouped", "qk-norm", "window", "hybrid"), ("state", "hybrid"), ("window",)


class Mistake(NamedTuple):
    """key: a name for it. first: where it shows first, whether or not a port has the tensors that can be left out, as a
    regular expression (its dots match themselves, too). cases: the golden files that show it; none: all Llamas'."""

    key: str
    first: str
    words: str
    cases: tuple[str, ...] = ()


# fmt: off
MISTAKES = [Mistake(*row) for row in (
    # The forward pass.
    ("pairs of neighbours", FIRST_KEYS, "the rotation pairs dimensions 2i and 2i + 1; it must pair i and i + D/2"),
    ("rotation backwards", FIRST_KEYS, "the rotation turns the other way: a cos - b sin and b cos + a sin are right"),
    ("no rotation", FIRST_KEYS, "the queries and keys are not rotated"),
    ("keys before the rotation", FIRST_KEYS, "the keys are those before the rotation; the cache holds rotated ones"),
    ("eps outside the root", FIRST_NORM, "RMSNorm's eps stands outside the root: x / sqrt(mean(x²) + eps) is right"),
    ("mean subtracted", FIRST_NORM, "the norm subtracts the mean, as LayerNorm does and RMSNorm does not"),
    ("norm by 1 + weight", FIRST_NORM, "the norm multiplies by 1 + weight, as Gemma's does, instead of by weight"),
    ("no llama3 rule", FIRST_KEYS, "the llama3 rule for the frequencies is left out", ("llama3-rope",)),
    ("no biases", FIRST_KEYS, "the biases of q, k and v are left out", ("qkv-bias",)),
    ("norm after the rotation", FIRST_KEYS, "each head is normalized after the rotation, not before", ("qk-norm",)),
    ("no alpha over rank", FIRST_KEYS, "the adapter's product is not multiplied by alpha / rank", ("lora",)),
    ("other masks", FIRST_KEYS, "the rebuild draws other dropout masks than the fill did", ("lora",)),
    ("no scale", ATTENTION, "the scores are not divided by the root of the head size"),
    ("no mask", ATTENTION, "there is no causal mask within the chunk"),
    ("heads not joined", ATTENTION, "the heads are flattened without moving them behind the positions"),
    ("heads in turn", ATTENTION, "query heads take key heads in turn (tile); neighbours share one (repeat)", SHARED),
    ("no residual", RESIDUAL, "what attention returns is not added to the layer's input"),
    ("gate and up", MLP, "gate_proj and up_proj are exchanged: silu(gate) · up is right"),
    ("another activation", MLP, "the activation is not silu(x) = x · sigmoid(x)"),
    ("no final norm", f"seco.chunk.0.logits|{LAST_LOSS}", "the final norm before the LM head is left out"),
    ("positions of the chunk", "seco.chunk.1.layer.0.keys", "positions count from the chunk's start, not the text's"),
    ("top-left mask", PAST, "the mask is aligned top left: a chunk's queries stand at the end of the keys"),
    ("no past", PAST, "the chunk does not see its past"),
    ("window by one", PAST, "the window is one too wide: seen is i - j < window, the own position included", WINDOW),
    ("no sinks", PAST, "the sinks, positions j < sinks, are not seen from beyond the window", WINDOW),
    # The loss.
    ("no shift", LAST_LOSS, "the labels are not shifted: position t predicts the label of t + 1"),
    ("mean of chunk means", LAST_LOSS, "each chunk is divided by its own targets; the divisor is the whole batch's"),
    ("-100 counts", LAST_LOSS, "labels of -100 are not ignored"),
    ("each batch by itself", LAST_LOSS, "each batch is divided by its own targets, not all", ("accumulated",)),
    ("shift in each chunk", "seco.chunk.2.loss", "the labels are shifted after cutting: a target is lost at every cut"),
    # The walk back.
    ("forward walk", LAST_GRAD + FIRST_LEARNT, "the walk goes from the first chunk on: the last one must come first"),
    ("the past with its graph", LAST_V_GRAD, "the past still has its graph: the gradient must stop at it"),
    ("heads not summed", LAST_V_GRAD, "the gradients of query heads that share a key head are not summed", SHARED),
    ("one use of the tied", LAST_GRAD + "model.embed", "the tied embedding lacks the gradient of one use", ("tied",)),
    ("nothing sent", "seco.chunk.2" + RELAYED, "nothing is sent back: the past's gradient must be kept"),
    ("replaced", "seco.chunk.1" + RELAYED, "a chunk's gradient replaces those of later chunks; they must add up"),
    ("sinks hear nothing", "seco.chunk.[01]" + RELAYED, "gradients reach the window alone, not the sinks", WINDOW),
    ("not handed over", HANDED + ".*[kv]_proj", "what was sent back is not handed to the backward pass"),
    ("handed over twice", HANDED + ".*[kv]_proj", "what was sent back is handed to the backward pass twice"),
    ("handed over before the rotation", HANDED + ".*k_(proj|norm)", "the relay belongs to the keys after the rotation"),
    ("gradients forgotten", HANDED + FIRST_LEARNT, "the parameters' gradients are cleared between chunks"),
    ("first batch forgotten", "second." + LAST_GRAD, "the gradients are cleared between batches", ("accumulated",)),
    # SpaCO.
    ("no loss factor", "spaco.chunk.3.loss", "the loss is not multiplied by its factor (Algorithm 2 as printed)"),
    ("factors exchanged", "spaco.chunk.3.loss", "the factors are exchanged: the first is the loss's, then the relay's"),
    ("factor not in the gradient", "spaco.chunk.3.grad." + FIRST_LEARNT, "the loss's factor is in the number alone"),
    ("no relay factor", SPARSE_RELAY, "the relay is not multiplied by its factor"),
    ("one factor for both", SPARSE_RELAY, "the relay is multiplied by the loss's factor"),
    ("the sender's factor", SPARSE_RELAY, "the relay has the sender's factor; it must have the receiver's"),
    ("all that arrived", SPARSE_SUM, "all that has arrived is multiplied by a chunk's factor, not its own part alone"),
    ("skipped chunks relay", SPARSE_SUM, "a skipped chunk relays: what was sent to it must end there"),
    # A state.
    ("no way back through the state", FIRST_ADJOINT, "nothing is sent back to the state before a chunk", STATES),
    ("adjoint stops at a kept chunk", ADJOINT, "g · decay is missing: the adjoint passes the chunk as well", STATES),
    ("decay counted twice", ADJOINT, "g · decay counts twice: take relayed · decay off what autograd sends", STATES),
    ("adjoint stops at a skipped chunk", CARRY, "the adjoint must pass a skipped chunk as well, by g · decay", STATES),
    ("no decay at a skipped chunk", CARRY, "the adjoint passes a skipped chunk as it is, without its decay", STATES),
    ("all that autograd sends", CARRY, "the relay's factor is on what passes by the decay alone, too", STATES),
)]
# fmt: on


def likely_mistakes(name: str, case: str, agreed: list[str]) -> list[str]:
    """Lines that say what usually is wrong where this tensor of a golden file is the first that differs.

    agreed: the names of those before it, which are right: what would show in one of the same forward pass is not wrong.
    """
    run = re.match(r"(second\.)?\w+\.chunk\.\d+\.layer\.", name)
    forward = [n for n in agreed if run and n.startswith(run[0]) and not n.endswith(("_grads", "adjoint"))]
    here = [m for m in MISTAKES if (case in m.cases or not m.cases) and _shows(m, name, case)]
    usual = [m for m in here if not any(_shows(m, n, case) for n in forward)]
    usual.sort(key=lambda mistake: not mistake.cases)  # those of this file alone come first
    return ["what usually begins here:", *(f"  - {mistake.words}" for mistake in usual), f"  - {ELSE}"]


def _shows(mistake: Mistake, name: str, case: str) -> bool:
    """Whether it may show first in this tensor. A second batch shows the mistakes that the first would, and to a
    Llama's mistakes the hybrid's layer 1 is the first."""
    if case == "hybrid":
        name = re.sub(r"layer\.([12])\.", lambda layer: f"layer.{int(layer[1]) - 1}.", name)
    return any(re.match(mistake.first, n) for n in (name, name.removeprefix("second.")))
