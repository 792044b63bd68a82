"""`minichunk compare`: the tensors of a port beside those of a golden file, up to the first difference, in words.
The order is that in which a port is built: so whatever comes before the first difference is right, and what it is
itself says what is wrong (mistakes.ini). tests/golden/README.md describes the files."""

import re
from configparser import ConfigParser
from dataclasses import MISSING, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..files.atomic import open_tensors
from ..training.options import check_options, option

FORMAT = "minichunk golden 2"  # in a golden file's metadata
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
SLACK = 2  # rounding was measured on a few runs; other orders of the same steps may do more
JUDGED = 0.2  # of a tensor's norm: where rounding may do more than that, it hides mistakes
GIVEN = re.compile(r"^(masks|weights)\.|(^|\.)(input_ids|labels)$")  # which a port reads and does not compute
# What lies within a chunk's run, and what a port is given or can do without: compared where it is there.
OPTIONAL = re.compile(rf"{GIVEN.pattern}|^(rope|full)\.|\.(hidden|attention|residual|logits|decay)$")
ELSE = "or it was kept at another time, is a view of what goes on changing, or `.grad` was not cleared before"
METHODS = ("seco", "second.seco", "spaco", "second.spaco")
COMPUTED = re.compile(
    rf"(?P<method>{'|'.join(METHODS)})(\.chunk\.(?P<chunk>\d+))?(\.layer\.(?P<layer>\d+))?"
    r"\.(?P<kind>grad(?=\.)|\w+)(\.(?P<parameter>.+))?"
)
FORWARD = (  # in this order; the last two are of all chunks
    "hidden", "keys", "values", "state", "decay", "attention", "residual", "logits", "log_probs", "token_weights",
)  # fmt: skip
WALK = ("key_grads", "value_grads", "adjoint")
# A layer's parameters in the order in which a backward pass comes to them.
BACKWARD = (
    "down_proj", "up_proj", "gate_proj", "post_attention_layernorm", "o_proj", "v_proj", "k_norm", "k_proj",
    "q_norm", "q_proj", "input_layernorm", "c_proj", "b_proj", "a_proj", "norm",
)  # fmt: skip


class Mistake(NamedTuple):
    """A line of mistakes.ini. first: where it shows first, whether or not a port has the tensors that can be left out.
    cases: the golden files that show it; none: all Llamas'."""

    key: str
    first: str
    words: str
    cases: list[str]


class Golden(NamedTuple):
    """A golden file: tensors in the order of comparison, name, and how far one rounding a step moves the worst one."""

    tensors: dict[str, Tensor]
    case: str
    rounding: float


class Verdict(NamedTuple):
    """Whether all is there and equal, and the words for it, which begin with the first tensor that differs."""

    equal: bool
    words: str


def order(name: str) -> tuple[int, ...]:
    """A sort key: a tensor's place in the order of tests/golden/README.md."""
    if not (found := COMPUTED.fullmatch(name)):
        if name.startswith("full."):  # between the losses of seco and its walk
            return 1, 2, *_backward_order(name.removeprefix("full.grad."))
        return 0, int(not name.endswith(("input_ids", "labels"))), int(name.startswith("rope."))
    stage, chunk, layer = 1 + METHODS.index(found["method"]), int(found["chunk"] or 0), found["layer"]
    if (kind := found["kind"]) in FORWARD:
        behind = 1 << 30  # logits come behind all layers
        return stage, 0, int(found["chunk"] or behind), int(layer or behind), FORWARD.index(kind)
    if kind == "loss":
        return (stage, 4) if found["chunk"] is None else (stage, 1, -chunk)
    if kind == "grad":
        return stage, 3, -chunk, 1, *_backward_order(found["parameter"])
    if kind == "hidden_grad":  # comes behind the parameters of its layer
        return stage, 3, -chunk, 1, 2, -int(layer), len(BACKWARD) + 1
    return stage, 3, -chunk, 0, -int(layer), WALK.index(kind)


def _backward_order(parameter: str) -> tuple[int, ...]:
    if not (layer := re.search(r"layers\.(\d+)\.", parameter)):
        return {"lm_head.weight": (0,), "model.norm.weight": (1,), "full.loss": (-1,)}.get(parameter, (3,))
    kind = next((i for i, part in enumerate(BACKWARD) if f".{part}." in parameter), len(BACKWARD))
    return 2, -int(layer[1]), kind, int(parameter.endswith((".bias", ".lora_A.weight")))


def read_golden(path: str | Path) -> Golden:
    """Raises InputError."""
    with open_tensors(path) as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise InputError(f"{path} is no golden file of this version, '{FORMAT}': take one of tests/golden")
        names = sorted(file.keys(), key=lambda name: (order(name), name))
        return Golden({name: file.get_tensor(name) for name in names}, metadata["case"], float(metadata["rounding"]))


def difference(got: Tensor, expected: Tensor, bound: float) -> str | None:
    """In words; None: equal, up to `bound` times the norm."""
    if got.shape != expected.shape:
        hint = "; the same axes, in another order" if sorted(got.shape) == sorted(expected.shape) else ""
        hint = f"; a scalar saved as {list(got.shape)}" if got.numel() == 1 and not expected.shape else hint
        return f"has the shape {list(got.shape)}, but must have {list(expected.shape)}{hint}"
    if not expected.is_floating_point():
        same = not got.is_floating_point() and torch.equal(got.long(), expected.long())
        return None if same else f"is not the file's ({got.dtype}; the file has {expected.dtype})"
    if not got.is_floating_point():
        return f"has the dtype {got.dtype}, but must be a floating-point one"
    got = got.double()
    if not got.isfinite().all():
        return "has numbers that are not finite"
    norm, error = float(expected.norm()), float((got - expected).norm())
    if error <= bound * norm:
        return None
    if norm == 0:
        return "must be all zeros, and is not"
    worst = (got - expected).abs().argmax()
    place = f"worst at {[int(i) for i in torch.unravel_index(worst, got.shape)]}: " if got.shape else ""
    digits = 4 if error > 1e-3 * norm else 12
    numbers = ", expected ".join(f"{float(x.flatten()[worst]):.{digits}g}" for x in (got, expected))
    factor = float((got * expected).sum() / norm**2)
    fits = float((got - factor * expected).norm()) <= max(bound, 1e-6) * norm
    hint = f"\n  yours is {factor:.6g} times what is expected" if fits else ""
    return f"is off by {error / norm:.2g} of its norm; rounding may do {bound:.1g}\n  {place}yours {numbers}{hint}"


def read_mistakes() -> list[Mistake]:
    """All of mistakes.ini, in its order."""
    table = ConfigParser(delimiters="=", interpolation=None)
    table.read(Path(__file__).with_name("mistakes.ini"), encoding="utf-8")
    found = []
    for first in table.sections():
        for key, words in table.items(first):
            name, _, cases = key.partition(" [")
            found.append(Mistake(name, first, words, cases.rstrip("]").split()))
    return found


def likely_mistakes(name: str, case: str, agreed: list[str]) -> list[str]:
    """Lines that say what usually is wrong where this tensor of a golden file is the first that differs. agreed: the
    names of those before it, which are right: what would show in one of the same forward pass is not wrong."""
    run = re.match(r"(second\.)?\w+\.chunk\.\d+\.layer\.", name)
    forward = [n for n in agreed if run and n.startswith(run[0]) and not n.endswith(("_grads", "adjoint"))]
    here = [m for m in read_mistakes() if (case in m.cases or not m.cases) and _shows(m, name, case)]
    usual = [m for m in here if not any(_shows(m, n, case) for n in forward)]
    usual.sort(key=lambda mistake: not mistake.cases)  # those of this file alone come first
    return ["what usually begins here:", *(f"  - {words}" for words in [*(m.words for m in usual), ELSE])]


def _shows(mistake: Mistake, name: str, case: str) -> bool:
    """Whether it may show first in this tensor. A second batch shows the mistakes that the first would, and to a
    Llama's mistakes the hybrid's layer 1 is the first."""
    if case == "hybrid":
        name = re.sub(r"layer\.([12])\.", lambda layer: f"layer.{int(layer[1]) - 1}.", name)
    return any(re.match(mistake.first, n) for n in (name, name.removeprefix("second.")))


def compare(mine: dict[str, Tensor], golden: Golden, precision: str | None = None) -> Verdict:
    """Up to the first difference. Raises InputError for a precision in which this file shows nothing.
    precision: of the port; None: that of its coarsest floating-point tensor."""
    dtypes = {tensor.dtype for tensor in mine.values()}
    precision = precision or ([name for name, dtype in PRECISIONS.items() if dtype in dtypes] or ["float64"])[0]
    bound = SLACK * torch.finfo(PRECISIONS[precision]).eps / 2 * golden.rounding
    if bound > JUDGED:
        reason = f"{golden.case} cannot judge {precision}: rounding alone may do {bound:.2g} of a tensor's norm to it"
        raise InputError(f"{reason}. Take calm.safetensors, which can judge bfloat16, or compute in float32 or float64")
    there = [name for name in golden.tensors if name in mine]
    for n, name in enumerate(there):
        if words := difference(mine[name], golden.tensors[name], bound):
            before = f"{n} tensors before it agree, the last of them {there[n - 1]}" if n else "it is the first one"
            numeric = words.startswith(("is off by", "must be all zeros"))
            about = likely_mistakes(name, golden.case, there[:n]) if numeric else []
            return Verdict(False, "\n".join([f"{name} {words}", f"  {before}", *about]))
    missing = [name for name in golden.tensors if name not in mine and not OPTIONAL.search(name)]
    counted = f"{len(there)} tensors agree in {precision}, within {bound:.1g} of their norms"
    if missing:
        lines = [counted, f"not there yet: {missing[0]} and {len(missing) - 1} more"]
        if unknown := sorted(mine.keys() - golden.tensors.keys()):
            close = get_close_matches(missing[0], unknown, 1) or unknown
            lines.append(f"the golden file has no {close[0]} ({len(unknown)} such names of yours)")
        return Verdict(False, "\n".join(lines))
    left = [name for name in golden.tensors if name not in mine and not GIVEN.search(name)]
    return Verdict(True, counted + (f"; {len(left)} that can be left out are not there" if left else ""))


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Compare a port's tensors with a golden file's, up to the first difference, and say what it usually means.

    Your port reads a golden file (they lie in tests/golden, and its README.md describes them), begins with
    its weights and input_ids, runs SeCO and SpaCO as the file's metadata says, and writes what it has
    computed by the golden file's names, with safetensors from NumPy, JAX, PyTorch, ...

      minichunk compare mine.safetensors --golden tests/golden/plain.safetensors

    Begin with a few tensors and add more: what is there is compared in the order in which a port is built,
    and what comes next is named. A tensor is equal if it is off by no more than rounding can do, relative to
    its norm: about 1e-14 in float64 and 1e-5 in float32. In bfloat16 only calm.safetensors shows more.
    Exit status 0: all is there and equal. 1: something differs or is missing. 2: a file cannot be used."""

    mine: str = option(MISSING, "safetensors file that your port has written", positional=True)
    golden: str = option(MISSING, "the golden file that it has read", metavar="FILE")
    precision: str | None = option(None, "of your port", choices=tuple(PRECISIONS), absent="the coarsest dtype in MINE")


def run_compare(options: CompareOptions) -> bool:
    """Print the verdict; returns whether all is there and equal. Raises InputError."""
    check_options(options)
    expected = read_golden(options.golden)
    with open_tensors(options.mine) as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    verdict = compare(found, expected, options.precision)
    print(verdict.words)
    return verdict.equal
