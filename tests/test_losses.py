"""The shipped objectives against TRL's own code, where that is installed, and against the papers' equations."""

from __future__ import annotations

import math
from collections import defaultdict
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


def by_hand(kind: str, log_probs: Tensor) -> Tensor:
    """Sequence by sequence and token by token, in the words of the papers."""

    def tokens(x: Tensor, row: int) -> Tensor:
        return x[row][MASK[row]]

    def log_sigmoid(x: Tensor) -> Tensor:
        return -torch.log(1 + torch.exp(-x))

    found = []
    if kind in ("kto", "grpo"):
        for i in range(B):
            now, before, then = (tokens(x, i) for x in (log_probs, REFERENCE, OLD))
            if kind == "kto":
                reward = 0.3 * ((now - before).sum() - 0.2)
                found.append((1.5, 1 - reward.sigmoid()) if GOOD[i] else (0.5, 1 - (-reward).sigmoid()))
                found[-1] = found[-1][0] * found[-1][1]
                continue
            each = []
            for x, r, o in zip(now, before, then, strict=True):
                ratio, A = torch.exp(x - o), ADVANTAGES[i]
                clipped = torch.as_tensor(min(max(float(ratio.detach()), 0.8), 1.3), dtype=x.dtype)
                gain = ratio * A if float((ratio * A).detach()) <= float(clipped * A) else clipped * A
                each.append(0.1 * (torch.exp(r - x) - (r - x) - 1) - gain)
            found.append(sum(each) / len(each))
        return sum(found) / B
    for i in range(B // 2):
        c, r = tokens(log_probs, i), tokens(log_probs, i + B // 2)
        c_before, r_before = tokens(REFERENCE, i), tokens(REFERENCE, i + B // 2)
        if kind == "dpo":
            found.append(-log_sigmoid(0.3 * ((c - c_before).sum() - (r - r_before).sum())))
        elif kind == "ipo":
            found.append(((c - c_before).mean() - (r - r_before).mean() - 1 / 0.6) ** 2)
        elif kind == "simpo":
            found.append(-log_sigmoid(2 * c.mean() - 2 * r.mean() - 0.7))
        else:
            p, q = c.mean().exp(), r.mean().exp()
            found.append(-0.4 * log_sigmoid(torch.log(p / (1 - p)) - torch.log(q / (1 - q))))
    total = sum(found) / len(found)
    return total - log_probs[: B // 2].sum() / MASK[: B // 2].sum() if kind == "orpo" else total


def with_gradient(f: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    leaf = LOG_PROBS.clone().requires_grad_()
    value = f(leaf)
    (grad,) = torch.autograd.grad(value, leaf)
    return {"loss": value, "gradient": grad * MASK}


@pytest.mark.parametrize("kind", OURS)
def test_as_the_paper_says(kind: str) -> None:
    measure(lambda: with_gradient(lambda x: by_hand(kind, x))).check(with_gradient(OURS[kind]))


def trl_trainer(**settings: Any) -> Any:
    """What a trainer of TRL's is asked by its own loss, without a model, data or a run."""
    trainer = MagicMock(**settings, _metrics=defaultdict(lambda: defaultdict(list)))
    trainer.accelerator.gather_for_metrics, trainer.accelerator.device = lambda x: x, "cpu"
    trainer.accelerator.gather = lambda x: x
    return trainer


def by_trl(kind: str, log_probs: Tensor) -> Tensor:
    rows = log_probs.sum(1)
    if kind == "orpo":
        from trl.experimental.orpo import ORPOTrainer

        chosen, rejected = (rows / MASK.sum(1)).chunk(2)
        ratio, *_ = ORPOTrainer.odds_ratio_loss(trl_trainer(beta=0.4), chosen, rejected)
        return -log_probs[: B // 2].sum() / MASK[: B // 2].sum() - ratio.mean()
    if kind == "simpo":
        from trl.experimental.cpo import CPOTrainer

        told = trl_trainer(beta=2.0, alpha=0.0, loss_type="simpo", simpo_gamma=0.7, label_smoothing=0.0)
        found, *_ = CPOTrainer.cpo_loss(told, *(rows / MASK.sum(1)).chunk(2))
        return found.mean()
    ids = LABELS.clamp(min=0)
    nothing = torch.zeros(B, T - 1)
    outputs = {"entropy": nothing, "mean_logits": nothing, "is_top1": nothing > 0}
    model = MagicMock(return_value=SimpleNamespace(log_probs=log_probs[:, 1:], **outputs))
    common = {"beta": 0.3, "aux_loss_enabled": False, "precompute_ref_logps": True, "ld_alpha": None}
    inputs = {"input_ids": ids, "completion_mask": MASK.long(), "attention_mask": torch.ones_like(ids)}
    if kind == "kto":
        from trl import KTOTrainer

        weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
        told = trl_trainer(**common, **weights, loss_type="kto", calculate_KL=True, _tp_size=1, _total_train_tokens=0)
        told._compute_kl_logps = lambda *_: torch.full((B,), 0.2, dtype=torch.float64)
        inputs |= {"label": GOOD, "ref_logps": REFERENCE.sum(1), "ref_KL_logps": torch.zeros(B, dtype=torch.float64)}
        return KTOTrainer._compute_loss(told, model, inputs, False)
    if kind == "grpo":
        from trl import GRPOTrainer

        told = trl_trainer(
            beta=0.1, epsilon_low=0.2, epsilon_high=0.3, loss_type="grpo", importance_sampling_level="token",
            top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, aux_loss_enabled=False,
            current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        )  # fmt: skip
        told.args.delta, told.args.use_bias_correction_kl = None, False
        told._get_per_token_logps_and_entropies = lambda *_, **__: (log_probs[:, 1:], nothing, None)
        inputs = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids[:, 1:]}
        inputs |= {"completion_mask": MASK[:, 1:].long(), "advantages": ADVANTAGES}
        inputs |= {"old_per_token_logps": OLD[:, 1:], "ref_per_token_logps": REFERENCE[:, 1:]}
        return GRPOTrainer._compute_loss(told, model, inputs)
    from trl import DPOTrainer

    loss_type = {"dpo": "sigmoid"}.get(kind, kind)
    told = trl_trainer(**common, loss_types=[loss_type], loss_weights=[1.0], f_divergence_type="reverse_kl",
        _total_train_tokens=0, _tp_size=1, use_weighting=False)  # fmt: skip
    chosen, rejected = REFERENCE.sum(1).chunk(2)
    inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    return DPOTrainer._compute_loss(told, model, inputs, False)


@pytest.mark.parametrize("kind", OURS)
def test_as_trl_says(kind: str) -> None:
    """TRL rounds ORPO's means to float32."""
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
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
