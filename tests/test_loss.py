"""The tiled loss against F.cross_entropy on all logits at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minichunk import loss as loss_module
from minichunk import losses as losses_module
from minichunk.costs.count import CountBytes
from minichunk.loss import summed_loss, token_losses
from minichunk.losses import divergence

from .rounding import measure


@pytest.fixture(params=[1, 10 * 3, 1 << 24], ids=["a column at a time", "three columns", "all at once"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (loss_module, losses_module):
        monkeypatch.setattr(module, "TILE_ELEMENTS", request.param)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize(("frozen", "cap"), [("", None), ("hidden", None), ("weight", None), ("", 1.5)])
def test_loss_and_gradients(frozen: str, cap: float | None) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=frozen != "hidden")
    weight = torch.randn(29, 7, dtype=torch.float64, requires_grad=frozen != "weight")
    targets = torch.randint(29, (2, 5))
    targets[0, 1:3] = -100
    inputs = {name: x for name, x in (("hidden", hidden), ("weight", weight)) if x.requires_grad}
    of_teacher, teacher_weight = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(29, 3, dtype=torch.float64)

    def results(loss: Tensor, of: str = "") -> dict[str, Tensor]:
        found = torch.autograd.grad(3 * loss, list(inputs.values()))
        return {f"{of}loss": loss} | {of + name: x for name, x in zip(inputs, found, strict=True)}

    def logits(hidden: Tensor, weight: Tensor, cap: float | None) -> Tensor:
        x = (hidden @ weight.T).flatten(0, 1)
        return x if cap is None else cap * torch.tanh(x / cap)

    def expected() -> dict[str, Tensor]:
        each = F.cross_entropy(logits(hidden, weight, cap), targets.flatten(), reduction="none")
        p, q = (logits(*x).log_softmax(1) for x in ((hidden, weight, cap), (of_teacher, teacher_weight, 2.5)))
        away = (q.exp() * (q - p)).sum(1)[targets.flatten() != -100].sum()
        return {"each": each.view(2, 5), **results(each.sum()), **results(away, "divergence, ")}

    ours, theirs = (x.view_as(x) for x in (weight, teacher_weight))
    ours.softcap, theirs.softcap = cap, 2.5  # type: ignore[attr-defined]
    got = {"each": token_losses(hidden, ours, targets), **results(summed_loss(hidden, ours, targets))}
    away = divergence(hidden, ours, of_teacher, theirs, targets != -100)
    measure(expected).check({**got, **results(away, "divergence, ")})


def test_logits_of_a_chunk_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tile has all tokens, so that each part of the head is read for all of them together."""
    monkeypatch.setattr(loss_module, "TILE_ELEMENTS", 10 * 40)
    monkeypatch.setattr(losses_module, "TILE_ELEMENTS", 10 * 40)
    shapes, original = [], loss_module.logits_of
    monkeypatch.setattr(loss_module, "logits_of", lambda *x: shapes.append((len(x[0]), len(x[1]))) or original(*x))
    hidden, weight = torch.randn(1, 10, 3, requires_grad=True), torch.randn(4400, 3)
    summed_loss(hidden, weight[:100], torch.randint(100, (1, 10)))
    assert shapes == [(10, 40), (10, 40), (10, 20), (10, 40), (10, 40)]  # the last tile is still there
    with CountBytes() as count:
        count.add(weight)
        divergence(hidden, weight, hidden, weight, torch.ones(1, 10).bool()).backward()
    assert count.peak - 4 * weight.numel() < 10 * 4400  # all logits have four times as many bytes, and those twice


def test_bfloat16_is_as_exact_in_tiles_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = torch.randn(1, 50, 16), torch.randn(640, 16), torch.randint(640, (1, 50))
    errors = []
    for elements in (1 << 24, 50 * 10):  # 64 tiles
        monkeypatch.setattr(loss_module, "TILE_ELEMENTS", elements)
        half = hidden.bfloat16().requires_grad_()
        summed_loss(half, weight.bfloat16(), targets).backward()
        wide = half.detach().double().requires_grad_()
        summed_loss(wide, weight.bfloat16().double(), targets).backward()
        errors.append(float((half.grad - wide.grad).norm() / wide.grad.norm()))
    assert errors[1] < 1.1 * errors[0] < 0.02
