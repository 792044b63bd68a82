"""The tiled loss against F.cross_entropy on all logits at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minichunk import loss as loss_module
from minichunk.loss import summed_loss, token_losses

from .rounding import measure


@pytest.fixture(params=[1, 10 * 3, 1 << 24], ids=["a column at a time", "three columns", "all at once"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_TILE_ELEMENTS", request.param)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize(("frozen", "cap"), [("", None), ("hidden", None), ("weight", None), ("", 1.5)])
def test_loss_and_gradients(frozen: str, cap: float | None) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=frozen != "hidden")
    weight = torch.randn(29, 7, dtype=torch.float64, requires_grad=frozen != "weight")
    targets = torch.randint(29, (2, 5))
    targets[0, 1:3] = -100
    inputs = {name: x for name, x in (("hidden", hidden), ("weight", weight)) if x.requires_grad}

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        return dict(zip(inputs, torch.autograd.grad(3 * loss, list(inputs.values())), strict=True))

    def expected() -> dict[str, Tensor]:
        logits = (hidden @ weight.T).flatten(0, 1)
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        each = F.cross_entropy(logits, targets.flatten(), reduction="none")
        return {"sum": each.sum(), "each": each.view(2, 5), **gradients(each.sum())}

    given: Any = weight.view_as(weight)
    given.softcap = cap
    got = summed_loss(hidden, given, targets)
    measure(expected).check({"sum": got, "each": token_losses(hidden, given, targets), **gradients(got)})


def test_logits_of_a_chunk_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tile has all tokens, so that each part of the head is read for all of them together."""
    monkeypatch.setattr(loss_module, "_TILE_ELEMENTS", 10 * 40)
    shapes = []
    original = loss_module._logits
    monkeypatch.setattr(
        loss_module, "_logits", lambda h, w, cap: shapes.append((len(h), len(w))) or original(h, w, cap)
    )
    summed_loss(torch.randn(1, 10, 3, requires_grad=True), torch.randn(100, 3), torch.randint(100, (1, 10)))
    assert shapes == [(10, 40), (10, 40), (10, 20), (10, 40), (10, 40)]  # the last tile is still there


def test_bfloat16_is_as_exact_in_tiles_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = torch.randn(1, 50, 16), torch.randn(640, 16), torch.randint(640, (1, 50))
    errors = []
    for elements in (1 << 24, 50 * 10):  # 64 tiles
        monkeypatch.setattr(loss_module, "_TILE_ELEMENTS", elements)
        half = hidden.bfloat16().requires_grad_()
        summed_loss(half, weight.bfloat16(), targets).backward()
        wide = half.detach().double().requires_grad_()
        summed_loss(wide, weight.bfloat16().double(), targets).backward()
        errors.append(float((half.grad - wide.grad).norm() / wide.grad.norm()))
    assert errors[1] < 1.1 * errors[0] < 0.02
