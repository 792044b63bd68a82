"""The rule of all exactness tests, tested: what is moved, what is not, and what a failure says."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from .rounding import EPS, Exact, Rounding, measure


def test_fresh_float64_results_are_moved_and_nothing_else() -> None:
    x, y, n = torch.ones(5, dtype=torch.float64), torch.ones(5, dtype=torch.float32), torch.arange(5)
    with Rounding(0):
        product, view, single, whole = x * 2, x[1:], y * 2, n * 2
        again = x.clone()
        again.mul_(1.0)
        values, indices = x.max(0)
    error = (product / 2 - 1).abs()
    assert float(error.min()) > 0 and float(error.max()) < 6 * EPS
    assert torch.equal(view, x[1:]) and torch.equal(single, y * 2) and torch.equal(whole, n * 2)
    assert view.data_ptr() == x[1:].data_ptr()
    assert values != 1 and indices.dtype == torch.int64


def test_the_numbers_that_a_computation_draws_stay_the_same() -> None:
    draws = []

    def compute() -> dict[str, Tensor]:
        draws.append(torch.rand(3))
        return {"x": draws[-1].double()}

    torch.manual_seed(3)
    measure(compute)
    following = torch.rand(2)
    assert all(torch.equal(draw, draws[0]) for draw in draws)
    torch.manual_seed(3)
    torch.rand(3)
    assert torch.equal(following, torch.rand(2))


def test_noise_follows_the_terms_that_cancel() -> None:
    large = torch.full((4,), 1e6, dtype=torch.float64)
    exact = measure(lambda: {"x": large * 3 - large * 3 + 1})
    assert 3e6 < exact.noise["x"] < 3e7
    exact.check({"x": torch.full((4,), 1 + 1e-9, dtype=torch.float64)})
    assert measure(lambda: {"x": large * 0}).noise["x"] == 0
    assert measure(lambda: {"x": large}).noise["x"] == float(large.norm())  # rounded once, at least


def test_a_failure_names_tensor_index_values_error_and_allowance() -> None:
    exact = Exact({"w": torch.tensor([[1.0, 2.0]], dtype=torch.float64)}, {"w": 1.0})
    message = r"w is off by 5\.000e-01, allowed 3\.553e-15; worst at \(0, 1\): got 2\.5, expected 2"
    with pytest.raises(AssertionError, match=message):
        exact.check({"w": torch.tensor([[1.0, 2.5]], dtype=torch.float64)})
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(AssertionError, match="w is off by"):
            exact.check({"w": torch.tensor([[1.0, wrong]], dtype=torch.float64)})
    with pytest.raises(AssertionError, match="names differ"):
        exact.check({})


def warn_from(module: str) -> None:
    exec("import warnings; warnings.warn('something is new')", {"__name__": module})


def test_a_warning_fails_only_where_minichunk_gave_it() -> None:
    """Another project's release must not break this suite."""
    with pytest.raises(UserWarning, match="something is new"):
        warn_from("minichunk.seco")
    for other in ("transformers.modeling", "minichunker"):
        with warnings.catch_warnings(record=True) as found:
            warn_from(other)
        assert len(found) == 1
