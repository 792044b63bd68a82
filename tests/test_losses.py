"""The shipped objectives against the papers' equations, by hand, and against TRL's own code, where it is installed."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

import minichunk as mc
from minichunk import losses

from .rounding import measure

B, T = 4, 7
G = torch.Generator().manual_seed(5)
LABELS = torch.randint(9, (B, T), generator=G).where(torch.arange(T) > torch.tensor([[2], [1], [4], [2]]), -100)
MASK = LABELS != -100
LOG_PROBS, REFERENCE, OLD = (-torch.rand(B, T, generator=G, dtype=torch.float64) * 3 * MASK for _ in range(3))
GOOD, ADVANTAGES = torch.tensor([True, False, False, True]), torch.tensor([0.7, -1.2, 0.4, -0.3], dtype=torch.float64)
OURS = {
    "dpo": losses.dpo(REFERENCE, 0.3),
    "ipo": losses.ipo(LABELS, REFERENCE, 0.3),
    "simpo": losses.simpo(LABELS, 2.0, 0.7),
    "orpo": losses.orpo(LABELS, 0.4),
    "kto": losses.kto(REFERENCE, GOOD, 0.2, 0.3, (1.5, 0.5)),
    "grpo": losses.grpo(LABELS, ADVANTAGES, OLD, (0.2, 0.3), REFERENCE, 0.1),
}


def by_hand(kind: str, x: Tensor) -> Tensor:
    """In the words of the papers."""
    n, chosen, rejected = MASK.sum(1), slice(0, B // 2), slice(B // 2, B)
    away, mean, A = (x - REFERENCE).sum(1), x.sum(1) / n, ADVANTAGES[:, None]
    odds, reward, ratio = (mean.exp() / (1 - mean.exp())).log(), 0.3 * (away - 0.2), (x - OLD).exp()
    gain = torch.where(A > 0, ratio.where(ratio < 1.3, 1.3), ratio.where(ratio > 0.8, 0.8)) * A
    gain = gain - 0.1 * ((REFERENCE - x).exp() - (REFERENCE - x) - 1)
    return {
        "dpo": -(0.3 * (away[chosen] - away[rejected])).sigmoid().log().mean(),
        "ipo": ((away / n)[chosen] - (away / n)[rejected] - 1 / 0.6).square().mean(),
        "simpo": -(2 * mean[chosen] - 2 * mean[rejected] - 0.7).sigmoid().log().mean(),
        "orpo": -x[chosen].sum() / n[chosen].sum() - 0.4 * (odds[chosen] - odds[rejected]).sigmoid().log().mean(),
        "kto": torch.where(GOOD, 1.5 * (1 - reward.sigmoid()), 0.5 * (1 - (-reward).sigmoid())).mean(),
        "grpo": -((gain * MASK).sum(1) / n).mean(),
    }[kind]


def with_gradient(f: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    leaf = LOG_PROBS.clone().requires_grad_()
    value = f(leaf)
    (grad,) = torch.autograd.grad(value, leaf)
    return {"loss": value, "gradient": grad * MASK}


@pytest.mark.parametrize("kind", OURS)
def test_as_the_paper_says(kind: str) -> None:
    measure(lambda: with_gradient(lambda x: by_hand(kind, x))).check(with_gradient(OURS[kind]))


def by_trl(kind: str, log_probs: Tensor) -> Tensor:
    """By the methods of its trainers, which are made without a model, data or a run."""
    import trl
    from trl.experimental import cpo, orpo

    nothing, ids, half = torch.zeros(B, T - 1), LABELS.clamp(min=0), B // 2
    told = MagicMock(  # a trainer's self
        beta={"orpo": 0.4, "simpo": 2.0, "grpo": 0.1}.get(kind, 0.3), aux_loss_enabled=False, _total_train_tokens=0,
        _tp_size=1, ld_alpha=None, f_divergence_type="reverse_kl", use_weighting=False, loss_weights=[1.0],
        loss_types=[{"dpo": "sigmoid"}.get(kind, kind)], loss_type=kind, desirable_weight=1.5, undesirable_weight=0.5,
        alpha=0.0, simpo_gamma=0.7, label_smoothing=0.0, epsilon_low=0.2, epsilon_high=0.3, use_vllm=False,
        importance_sampling_level="token", top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
    )  # fmt: skip
    told.accelerator.gather_for_metrics = told.accelerator.gather = lambda x: x
    told.accelerator.device, told.args.delta, told.args.use_bias_correction_kl = "cpu", None, False
    told._compute_kl_logps = lambda *_: torch.full((B,), 0.2, dtype=torch.float64)
    told._get_per_token_logps_and_entropies = lambda *_, **__: (log_probs[:, 1:], nothing, None)
    outputs = {"log_probs": log_probs[:, 1:], "entropy": nothing, "mean_logits": nothing, "is_top1": nothing > 0}
    model = MagicMock(return_value=SimpleNamespace(**outputs))
    rows, means = REFERENCE.sum(1), (log_probs.sum(1) / MASK.sum(1)).chunk(2)
    given: dict[str, Any] = {
        "input_ids": ids, "completion_mask": MASK.long(), "attention_mask": torch.ones_like(ids), "label": GOOD,
        "ref_chosen_logps": rows[:half], "ref_rejected_logps": rows[half:], "ref_logps": rows, "ref_KL_logps": 0 * rows,
    }  # fmt: skip
    if kind == "orpo":
        ratio, *_ = orpo.ORPOTrainer.odds_ratio_loss(told, *means)
        return -log_probs[:half].sum() / MASK[:half].sum() - ratio.mean()
    if kind == "simpo":
        return cpo.CPOTrainer.cpo_loss(told, *means)[0].mean()
    if kind == "grpo":
        given = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids[:, 1:]}
        given |= {"completion_mask": MASK[:, 1:].long(), "advantages": ADVANTAGES}
        given |= {"old_per_token_logps": OLD[:, 1:], "ref_per_token_logps": REFERENCE[:, 1:]}
        return trl.GRPOTrainer._compute_loss(told, model, given)
    return (trl.KTOTrainer if kind == "kto" else trl.DPOTrainer)._compute_loss(told, model, given, False)


@pytest.mark.parametrize("kind", OURS)
def test_as_trl_says(kind: str) -> None:
    """TRL rounds ORPO's means to float32."""
    pytest.importorskip("trl", minversion="1.16")
    ours, theirs = with_gradient(OURS[kind]), with_gradient(lambda x: by_trl(kind, x))
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-6, atol=1e-7, check_dtype=False)


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(mc.InputError, match="3 rows, but pairs need as many"):
        losses.dpo(REFERENCE[:3])(LOG_PROBS[:3])
    with pytest.raises(mc.InputError, match=r"beta is 0.1, but without a reference"):
        losses.grpo(LABELS, ADVANTAGES, beta=0.1)


def test_orpo_with_labels_on_prompts() -> None:
    """The likelihood is that of prompt and answer, the odds are the answers' alone."""
    every = torch.ones_like(LABELS)
    log_probs = -torch.rand(B, T, generator=G, dtype=torch.float64).where(torch.arange(T) > 0, 0)
    expected = losses.orpo(LABELS, 0.4)(log_probs * MASK) - losses.orpo(LABELS, 0.0)(log_probs * MASK)
    got = losses.orpo(every, 0.4, answers=MASK)(log_probs) + log_probs[: B // 2].sum() / (B // 2 * (T - 1))
    assert math.isclose(got, expected, rel_tol=1e-12)
