"""The shipped objectives against the papers' equations, by hand."""

import math

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
    now, before, then = ([x[row][MASK[row]] for row in range(B)] for x in (log_probs, REFERENCE, OLD))
    log_ratio = [(x - r).sum() for x, r in zip(now, before, strict=True)]
    mean = [x.mean() for x in now]
    found = []
    for i in range(B if kind in ("kto", "grpo") else B // 2):
        j = i + B // 2  # of the rejected answer
        if kind == "dpo":
            found.append(-(0.3 * (log_ratio[i] - log_ratio[j])).sigmoid().log())
        elif kind == "ipo":
            found.append((log_ratio[i] / len(now[i]) - log_ratio[j] / len(now[j]) - 1 / 0.6) ** 2)
        elif kind == "simpo":
            found.append(-(2 * mean[i] - 2 * mean[j] - 0.7).sigmoid().log())
        elif kind == "orpo":
            p, q = mean[i].exp(), mean[j].exp()
            found.append(-0.4 * (torch.log(p / (1 - p)) - torch.log(q / (1 - q))).sigmoid().log())
        elif kind == "kto":
            reward = 0.3 * (log_ratio[i] - 0.2)
            found.append(1.5 * (1 - reward.sigmoid()) if GOOD[i] else 0.5 * (1 - (-reward).sigmoid()))
        else:
            each = []
            for x, r, o in zip(now[i], before[i], then[i], strict=True):
                ratio, A = torch.exp(x - o), ADVANTAGES[i]
                clipped = min(max(float(ratio.detach()), 0.8), 1.3) * A
                gain = ratio * A if float((ratio * A).detach()) <= clipped else clipped
                each.append(0.1 * (torch.exp(r - x) - (r - x) - 1) - gain)
            found.append(sum(each) / len(each))
    total = sum(found) / len(found)
    return total - log_probs[: B // 2].sum() / MASK[: B // 2].sum() if kind == "orpo" else total


@pytest.mark.parametrize("kind", OURS)
def test_as_the_paper_says(kind: str) -> None:
    leaf = LOG_PROBS.clone().requires_grad_()

    def with_gradient(loss: Tensor) -> dict[str, Tensor]:
        return {"loss": loss, "gradient": torch.autograd.grad(loss, leaf)[0] * MASK}

    measure(lambda: with_gradient(by_hand(kind, leaf))).check(with_gradient(OURS[kind](leaf)))


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
