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
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4000, 1)
    generator = torch.Generator().manual_seed(0)
    shares = torch.bincount(choose(logits, 1.0, 0.75, generator)[:, 0], minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.625, 0.375, 0, 0]), rtol=0, atol=0.03)
    shares = torch.bincount(choose(logits, 0.5, 1.0, generator)[:, 0], minlength=4) / 4000
    squares = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    torch.testing.assert_close(shares, squares / squares.sum(), rtol=0, atol=0.03)
    assert set(choose(logits, 1.0, 1e-6, generator)[:, 0].tolist()) == {0}


@pytest.mark.parametrize("keywords", [{"temperature": -1}, {"top_p": 0}, {"max_new_tokens": 0}])
def test_wrong_values_are_refused(keywords: dict[str, float]) -> None:
    with pytest.raises(mc.InputError, match="generate needs"):
        generate(build(tiny(), 0), torch.zeros(1, 2, dtype=torch.int64), **{"max_new_tokens": 2, **keywords})
