"""How far rounding alone can move a result, measured on the oracle itself: the rule of all exactness tests.

Rounding follows the terms that cancel, not what is left of them: no bound relative to the result
can be right for every model. So the oracle runs a few times with every fresh result off by a random
relative EPS (Monte Carlo arithmetic). What that moves, divided by EPS, is the `noise`; another order
of the same operations may differ by some unit roundoffs of it, and by no more than SLACK.

    exact = exactly(model, lambda: mc.full(model, ids, ids))
    exact.check(outcome(model, lambda: mc.seco(model, ids, ids, 4)))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .gradients import Tensors, combine, take_gradients

EPS = 2.0**-40  # far above float64's rounding, and far below where the response stops being linear
RUNS = 3
SLACK = 32
POOL = 1 << 17  # random factors: drawn once, and read from a random place on

Noise = dict[str, float]


@cache
def random_factors(seed: int) -> Tensor:
    return 1 + EPS * torch.randn(POOL, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Rounding(TorchDispatchMode):
    """Within the block every fresh float64 result is off by a random relative EPS; views and in-place results are not.

    Draws from a generator of its own, so that the numbers which the computation itself draws stay the same.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.factors, self.random = random_factors(seed), Random(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # An alias is another name of a number that was rounded when it was made.
        if isinstance(out, Tensor):
            return out if func._schema.returns[0].alias_info else self.rounded(out)
        if isinstance(out, tuple):
            return tuple(
                x if returned.alias_info else self.rounded(x)
                for x, returned in zip(out, func._schema.returns, strict=True)
            )
        return out

    def rounded(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype != torch.float64:
            return x
        if x.numel() > POOL // 2:
            return x * self.factors[(torch.arange(x.numel()) + self.random.randrange(POOL)).view(x.shape) % POOL]
        start = self.random.randrange(POOL // 2)
        return x * self.factors[start : start + x.numel()].view(x.shape)


class WrittenOut(TorchFunctionMode):
    """Within the block `scaled_dot_product_attention` is separate steps, with the log-sum-exp as one of them.

    In one fused operator nothing inside would be off. And that attention merges pieces by their log-sum-exps
    has a price that a softmax may not have: the rounding of a large one moves every probability.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self.attention(*args, **(kwargs or {}))

    @staticmethod
    def attention(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **_: Any
    ) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v


@dataclass
class Exact:
    """What should come out, and for each tensor its noise: how far steps that are off by their own size move it."""

    values: Tensors
    noise: Noise

    def check(self, got: Tensors, beside: Exact | None = None, unit: float | None = None) -> None:
        """Assert ‖got - expected‖ <= SLACK · unit · noise for every tensor; integers must be equal.

        beside: what `got` was computed by, if its conditioning differs from the oracle's: its noise is added.
        unit: the roundoff of what `got` was computed in; None: that of its dtype.
        """
        assert got.keys() == self.values.keys(), f"names differ: {sorted(got.keys() ^ self.values.keys())}"
        for name, expected in self.values.items():
            noise = self.noise[name] + (beside.noise[name] if beside is not None else 0.0)
            _check(name, got[name].detach(), expected, noise, unit)


def _check(name: str, got: Tensor, expected: Tensor, noise: float, unit: float | None) -> None:
    assert got.shape == expected.shape, f"{name} has the shape {list(got.shape)}, expected {list(expected.shape)}"
    if not expected.dtype.is_floating_point:
        assert torch.equal(got, expected), f"{name} differs"
        return
    difference = (got.to(torch.float64) - expected).abs()
    allowed = SLACK * (unit or torch.finfo(got.dtype).eps / 2) * noise
    error = float(difference.norm())
    if not error <= allowed:  # so that NaN is an error too
        worst = torch.unravel_index(difference.argmax(), difference.shape)
        index = tuple(int(i) for i in worst)
        raise AssertionError(
            f"{name} is off by {error:.3e}, allowed {allowed:.3e}; "
            f"worst at {index}: got {float(got[worst]):.17g}, expected {float(expected[worst]):.17g}"
        )


def measure(compute: Callable[[], Tensors]) -> Exact:
    """What `compute` returns, in float64, and its noise; the numbers that it draws are the same in every run."""
    state = torch.get_rng_state()
    values = {name: x.detach().clone() for name, x in compute().items()}
    # What is right to the last bit has been rounded once: no result has less noise than its own size.
    noise = {name: float(x.norm()) if x.dtype.is_floating_point else 0.0 for name, x in values.items()}
    for seed in range(RUNS):
        torch.set_rng_state(state)
        with WrittenOut(), Rounding(seed):
            moved = compute()
        for name, x in values.items():
            if x.dtype.is_floating_point:
                noise[name] = max(noise[name], float((moved[name].detach() - x).norm()) / EPS)
    return Exact(values, noise)


def outcome(model: Any, run: Callable[[], Tensor]) -> Tensors:
    """The loss that `run` returns, and the gradients of all trainable parameters that it adds to cleared ones."""
    take_gradients(model)
    loss = run()
    return {"loss": loss.detach(), **take_gradients(model)}


def exactly(model: Any, oracle: Callable[[], Tensor]) -> Exact:
    """The loss and the gradients of an oracle, with their noise."""
    return measure(lambda: outcome(model, oracle))


def weighted(terms: Sequence[tuple[float, Exact]]) -> Exact:
    """A weighted sum of separate computations: each is off by its own noise, so that in the worst case they add up."""
    values = combine([(factor, exact.values) for factor, exact in terms])
    noise = {name: sum(abs(factor) * exact.noise[name] for factor, exact in terms) for name in values}
    return Exact(values, noise)
