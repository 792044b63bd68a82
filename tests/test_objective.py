"""Losses of the caller's; that their gradients are exact is drawn with all else, in test_seco.py and test_spaco.py."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import minichunk as mc
from minichunk.chunks import Chunk

from .gradients import take_gradients
from .rounding import exactly, outcome
from .strategies import build, tiny, with_adapter

IDS = torch.randint(23, (2, 11), generator=torch.Generator().manual_seed(3))
IDS[1, :4] = IDS[0, :4]  # as rows of one prompt are
LABELS = IDS.where(torch.arange(11) > torch.tensor([[4], [6]]), -100)
STEPS = {
    "full": lambda model, **told: mc.full(model, IDS, LABELS, **told),
    "seco": lambda model, **told: mc.seco(model, IDS, LABELS, 4, **told),
    "blocks": lambda model, **told: mc.seco(model, IDS, LABELS, 4, layers_at_once=1, **told),
    "spaco": lambda model, **told: mc.spaco(model, IDS, LABELS, 4, sampler=mc.Bernoulli(1), **told),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_nan_in_an_objectives_gradient_without_a_label_goes_nowhere(step: Callable[..., Tensor]) -> None:
    """The square root of 0 has an infinite slope, and 0 times that is no number: where a mask comes too late."""
    model, labelled = build(tiny(), seed=3), LABELS != -100
    expected = outcome(model, lambda: step(model, objective=lambda x: (-x[labelled]).sqrt().sum()))
    got = outcome(model, lambda: step(model, objective=lambda x: ((-x).sqrt() * labelled).sum()))
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("told", [{}, {"fill_size": 9}, {"fill_size": 8, "share": True}])
def test_policy_and_reference_are_the_same_to_the_bit_at_the_start(dtype: torch.dtype, told: dict[str, Any]) -> None:
    model = build(tiny(), seed=3).to(dtype)
    before = mc.log_probs(model, IDS, LABELS, 4, **told)
    assert before.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(before != 0, LABELS != -100)
    mc.add_lora(model, 2, 4, dropout=0.5)
    with mc.without_adapter(model):
        reference = mc.log_probs(model, IDS, LABELS, 4, **told)
    seen = []
    mc.seco(model, IDS, LABELS, 4, objective=lambda x: seen.append(x) or (x - reference).sum(), **told)
    assert torch.equal(seen[0], reference) and torch.equal(reference, before)


def test_without_the_adapter_and_with_it_again() -> None:
    model = build(tiny(), seed=3)
    plain = model(IDS)
    with_adapter(model)
    adapted = model(IDS)
    with mc.without_adapter(model):
        assert torch.equal(model(IDS), plain)
    assert torch.equal(model(IDS), adapted) and not torch.equal(adapted, plain)
    mc.merge_lora(model)
    with pytest.raises(mc.InputError, match="needs a model with an adapter"), mc.without_adapter(model):
        """Not reached."""


@pytest.mark.parametrize("name", STEPS)
def test_a_sum_over_chunks_equals_that_of_the_whole(name: str) -> None:
    """The cross-entropy and the squared log-sum-exps (z-loss) of all positions, from full logits of a chunk."""
    model = build(tiny(3), seed=4)

    def loss_of(logits: Tensor, here: slice) -> Tensor:
        targets = F.pad(IDS[:, 1:], (0, 1), value=-100)[:, here].flatten()
        cross_entropy = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-100, reduction="sum")
        return cross_entropy / 20 + 0.1 * logits.logsumexp(-1).square().sum()

    def expected() -> Tensor:
        loss = loss_of(model(IDS), slice(None))
        loss.backward()
        return loss

    def chunk_loss(hidden: Tensor, chunk: Chunk) -> Tensor:
        return loss_of(model.lm_head(hidden), slice(*chunk))

    exactly(model, expected).check(outcome(model, lambda: STEPS[name](model, chunk_loss=chunk_loss)))


def test_an_objective_that_sees_a_draw_of_nothing_returns_its_loss() -> None:
    model = build(tiny(), seed=3)
    for at_once in (None, 1):
        told = {"sampler": lambda k, _: [None] * k, "objective": lambda x: x.sum() ** 2, "layers_at_once": at_once}
        loss = mc.spaco(model, IDS, LABELS, 4, **told)
        torch.testing.assert_close(loss, mc.log_probs(model, IDS, LABELS, 4).sum() ** 2)
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["seco", "spaco", "blocks"])
@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"objective": lambda x: x.sum(1)}, r"returned Tensor \[2\], but must return a scalar"),
        ({"objective": lambda x: x.sum().item()}, "returned float -"),
        ({"objective": lambda x: torch.zeros(())}, "must return a scalar made of the log-probabilities"),
        ({"objective": torch.sum, "num_targets": 3}, "num_targets and objective were given, but only one"),
        ({"chunk_loss": torch.sum, "num_targets": 3}, "num_targets and chunk_loss were given"),
        ({"chunk_loss": torch.sum, "objective": torch.sum}, "objective and chunk_loss were given"),
    ],
)
def test_what_is_wrong_is_named(name: str, told: dict[str, Any], words: str) -> None:
    model = build(tiny(), seed=3)
    with pytest.raises(mc.InputError, match=words):
        STEPS[name](model, **told)
    assert not any(g.any() for g in take_gradients(model).values())
