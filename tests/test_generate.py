"""Writing text with the cache equals running the whole text again for every token."""

import pytest
import torch

import minichunk as mc
from minichunk.training.generate import choose, generate

from .strategies import build, tiny


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_greedy_equals_the_forward_pass(chunk_size: int) -> None:
    model = build(tiny(), seed=0)
    prompt = torch.randint(23, (2, 7))
    expected = prompt
    for _ in range(9):
        expected = torch.cat([expected, model(expected)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generate(model, prompt, 9, chunk_size=chunk_size), expected)


def test_top_p_keeps_the_likeliest() -> None:
    chances, generator = torch.tensor([0.5, 0.3, 0.15, 0.05]), torch.Generator().manual_seed(0)
    for temperature, top_p, expected in (
        (1.0, 0.75, torch.tensor([0.625, 0.375, 0, 0])), (0.5, 1.0, chances**2), (1.0, 1e-6, torch.eye(4)[0]),
    ):  # fmt: skip
        drawn = choose(chances.log().repeat(4000, 1), temperature, top_p, generator)[:, 0]
        shares = torch.bincount(drawn, minlength=4) / 4000
        torch.testing.assert_close(shares, expected / expected.sum(), rtol=0, atol=0.03 * (top_p > 0.1))


@pytest.mark.parametrize("keywords", [{"temperature": -1}, {"top_p": 0}, {"max_new_tokens": 0}])
def test_wrong_values_are_refused(keywords: dict[str, float]) -> None:
    with pytest.raises(mc.InputError, match="generate needs"):
        generate(build(tiny(), 0), torch.zeros(1, 2, dtype=torch.int64), **{"max_new_tokens": 2, **keywords})
