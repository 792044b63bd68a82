"""The scan, which has no loop over tokens, against the one that has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minichunk.memory import state as scan_module
from minichunk.memory.state import BLOCK, scan

from .gradients import Tensors, loop
from .rounding import measure
from .strategies import examples

Scan = Callable[..., tuple[Tensor, Tensor]]
NAMES = ("x", "log_a", "b", "c", "h")
GATES = ("some", "near 1", "near 0", "0 and 1 among others")


@dataclass
class Case:
    """What a scan is given, and the directions on which its results are projected."""

    inputs: dict[str, Tensor]
    for_y: Tensor
    for_h: Tensor

    def run(self, scan: Scan) -> Tensors:
        """Both results, and the gradient by every input of their projections' sum."""
        inputs = {name: x.clone().requires_grad_() for name, x in self.inputs.items()}
        y, end = scan(*inputs.values())
        (y * self.for_y).sum().add((end * self.for_h).sum()).backward()
        return {"y": y, "end": end, **{name: grad_of(x) for name, x in inputs.items()}}

    def to(self, dtype: torch.dtype) -> Case:
        inputs = {name: x.to(dtype) for name, x in self.inputs.items()}
        return Case(inputs, self.for_y.to(dtype), self.for_h.to(dtype))


def grad_of(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def written_out(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    y, states = loop(*inputs)
    return y, states[-1]


def case(lead: tuple[int, ...], length: int, P: int, N: int, gates: str, one_gate: bool, seed: int) -> Case:
    """Random numbers of float32, in float64: both widths start from the same."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).double()

    logits = normal(*lead, length, 1 if one_gate else N)
    shift = {"near 1": 7.0, "near 0": -60.0}.get(gates, 1.0)
    log_a = torch.nn.functional.logsigmoid(logits + shift)
    if gates == "0 and 1 among others":
        kind = torch.randint(4, log_a.shape, generator=generator)
        log_a = log_a.masked_fill(kind == 0, -torch.inf).masked_fill(kind == 1, 0)
    log_a = log_a.float().double()
    inputs = (normal(*lead, length, P), log_a, *(normal(*lead, length, N) for _ in "bc"), normal(*lead, P, N))
    return Case(dict(zip(NAMES, inputs, strict=True)), normal(*lead, length, P), normal(*lead, P, N))


@st.composite
def cases(draw: st.DrawFn, block: int) -> Case:
    """Lengths on both sides of the multiples of a block."""
    length = max(1, block * draw(st.integers(0, 2 if block == BLOCK else 3)) + draw(st.integers(-1, 1)))
    lead = tuple(draw(st.lists(st.integers(1, 2), max_size=3)))
    sizes = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return case(lead, length, *sizes, draw(st.sampled_from(GATES)), draw(st.booleans()), draw(st.integers(0, 2**31)))


@pytest.mark.parametrize(("block", "count"), [(BLOCK, 4), (5, 20), (1, 10)])
def test_scan_equals_the_loop(block: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and gradients, for gates of all sizes; also in float32, by the same rule."""
    monkeypatch.setattr(scan_module, "BLOCK", block)

    @examples(count)
    @given(drawn=cases(block))
    def check(drawn: Case) -> None:
        exact = measure(lambda: drawn.run(written_out))
        exact.check(drawn.run(scan))
        exact.check(drawn.to(torch.float32).run(scan))

    check()


@pytest.mark.parametrize("gates", GATES)
def test_a_long_scan_in_float32_is_off_by_a_few_roundings(gates: str) -> None:
    """Sums over 512 tokens, gates of about 0.998 among them: no product of gates is a quotient of two others."""
    drawn = case((), 512, 16, 8, gates, one_gate=False, seed=0)
    got = drawn.to(torch.float32).run(scan)
    errors = {name: (got[name] - e).norm() / e.norm() for name, e in drawn.run(scan).items()}
    assert max(errors.values()) < 4e-7


def test_leading_dimensions_broadcast() -> None:
    """Heads with gates of their own that share b and c, as in Mamba-2; two texts that begin in one state."""
    drawn = case((2, 3), 2 * BLOCK + 1, 4, 2, "some", one_gate=True, seed=2)
    shared = {name: drawn.inputs[name][:, :1] for name in "bc"} | {"h": drawn.inputs["h"][:1, :1]}
    drawn.inputs = {name: shared.get(name, x) for name, x in drawn.inputs.items()}
    measure(lambda: drawn.run(written_out)).check(drawn.run(scan))
