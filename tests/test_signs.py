"""`minichunk compare` says what the numbers of a tensor tell by themselves, and then nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from torch import Tensor

from minichunk.porting.compare import compare

from .mutants import MUTANTS
from .test_compare import file, outputs, without_optional, words_for
from .test_golden import Numpy


def signs(change: Callable[[str, dict[str, Tensor]], Tensor | None], case: str = "plain") -> list[str]:
    """The words for a port that is right but for what `change` makes of its tensors (None: not there), in turn with
    and without those that can be left out."""
    right = file(case).tensors
    changed = {name: tensor for name in right if (tensor := change(name, right)) is not None}
    return [compare(mine, file(case), "float64").words for mine in (changed, without_optional(changed))]


def grads(name: str, method: str) -> str | None:
    """Of the tensors that hold a gradient of this method: whose."""
    found = re.match(rf"(?:second\.)?{method}\.chunk\.\d\.grad\.(.+)", name)
    return found and found[1]


@pytest.mark.parametrize("case", ["plain", "accumulated", "lora", "hybrid"])
@pytest.mark.parametrize(("method", "times"), [("seco", 1), ("spaco", 1), ("spaco", 2)])
def test_a_gradient_that_was_not_cleared_is_told_apart(case: str, method: str, times: int) -> None:
    def left(name: str, right: dict[str, Tensor]) -> Tensor:
        of = grads(name, method)
        return right[name] + times * right[f"full.grad.{of}"] if of else right[name]

    for words in signs(left, case):
        assert f"{method}.chunk.3.grad" in words and "was not cleared before this method" in words
        assert "usually" not in words and "no known" not in words


def test_a_gradient_that_was_kept_too_early_is_told_apart() -> None:
    def early(name: str, right: dict[str, Tensor]) -> Tensor | None:
        if not grads(name, "seco"):
            return right[name]
        before = re.sub(r"\d", lambda n: str(int(n[0]) + 1), name, count=1)
        return right.get(before)

    for words in signs(early):
        assert "seco.chunk.2.grad" in words and "yours is chunk 3's: it was kept before" in words
        assert "usually" not in words
    for words in signs(lambda name, right: 0 * right[name] if grads(name, "seco") else right[name]):
        assert "seco.chunk.3.grad" in words and "yours is the same for all chunks" in words
    for words in signs(lambda name, right: 0 * right[name] if name.startswith("seco.chunk.3.grad") else right[name]):
        assert "yours is all zeros: it was kept before the backward pass" in words and "usually" not in words


def test_one_parameter_that_is_wrong_is_no_wrong_step() -> None:
    """After the gradient of another parameter agreed, it was kept, and cleared, at the right time."""

    parameter = "grad.model.layers.2.self_attn.v_proj.weight"

    def changed(wrong: Callable[[Tensor, Tensor], Tensor]) -> list[str]:
        return signs(
            lambda name, right: (
                wrong(right[name], right[f"full.{parameter}"]) if name == f"seco.chunk.3.{parameter}" else right[name]
            )
        )

    for words in changed(lambda right, full: 0 * right):
        assert "yours is all zeros: no gradient comes to this parameter" in words and "kept before" not in words
    for words in changed(lambda right, full: right + full):
        assert "still has its graph" in words and "cleared" not in words


def test_a_view_of_one_buffer_is_told_apart() -> None:
    def view(name: str, right: dict[str, Tensor]) -> Tensor:
        return right[re.sub(r"chunk\.\d", "chunk.0", name)] if grads(name, "seco") else right[name]

    for words in signs(view):
        assert "yours is the same for all chunks: a view of one buffer" in words and "usually" not in words


def test_chunks_that_are_numbered_from_1_are_told_apart() -> None:
    def later(name: str, right: dict[str, Tensor]) -> Tensor | None:
        if "chunk." not in name:
            return right[name]
        return right.get(re.sub(r"chunk\.(\d)", lambda n: f"chunk.{int(n[1]) - 1}", name))

    for words in signs(later):
        assert words.startswith("seco.chunk.1.layer.0") and "yours is chunk 0's: chunks are numbered" in words
        assert "usually" not in words


def test_what_agrees_rules_out_what_would_show_there() -> None:
    """Where layer 1 begins with the right numbers, nothing before it is wrong."""
    with_hidden, without = signs(lambda name, right: right[name] + name.endswith("layer.1.keys"))
    assert "no known mistake begins here" in with_hidden and "causal mask" in without
    mutant = next(mutant for mutant in MUTANTS if mutant.key == "no rotation")
    words = compare(outputs(Numpy("hybrid", *mutant.modules())), file("hybrid")).words
    assert words.startswith("seco.chunk.0.layer.1.keys") and "activation" not in words and "RMSNorm" not in words
    assert words_for(mutant)[0] in words


STATE_WORDS = {mutant.key: words_for(mutant)[0] for mutant in MUTANTS if mutant.case == "state"}


@pytest.mark.parametrize("key", STATE_WORDS)
def test_the_mistakes_of_a_state_are_told_apart(key: str) -> None:
    mutant = next(mutant for mutant in MUTANTS if mutant.key == key)
    for case in ("state", "hybrid"):
        words = compare(outputs(Numpy(case, *mutant.modules())), file(case)).words
        assert [other for other, text in STATE_WORDS.items() if text in words] == [key]
