"""`minichunk compare` finds every known mistake, where it shows first, and says in words what it is."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minichunk.command.main import main
from minichunk.errors import InputError
from minichunk.files.atomic import write_tensors
from minichunk.porting.compare import OPTIONAL, Golden, compare, order, read_golden, read_mistakes

from .golden.write import CASES, build, golden
from .mutants import FORWARD, LOSSES, MUTANTS, Mutant
from .test_golden import COMMITTED, Numpy

MISTAKES = read_mistakes()
WORDS = {mistake.key: mistake.words for mistake in MISTAKES}


@cache
def file(name: str) -> Golden:
    return read_golden(COMMITTED / f"{name}.safetensors")


def outputs(port: Numpy) -> dict[str, Tensor]:
    """All that a port in NumPy computes, by the golden file's names."""
    with np.errstate(all="ignore"):
        got = port.walks("seco") | port.walks("spaco")
    return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in got.items()}


def without_optional(mine: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in mine.items() if not OPTIONAL.search(name)}


def test_each_known_mistake_is_made_once() -> None:
    assert sorted(mutant.key for mutant in MUTANTS) == sorted(mistake.key for mistake in MISTAKES)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.key)
def test_each_mistake_is_named_where_it_shows_first(mutant: Mutant) -> None:
    only = next(mistake.cases for mistake in MISTAKES if mistake.key == mutant.key)
    assert not only or mutant.case in only
    others = ("tied", "lora", *(["hybrid"] if mutant in FORWARD + LOSSES else []))
    for case in only or (mutant.case, *others):
        mine = outputs(Numpy(case, *mutant.modules()))
        for port in (mine, without_optional(mine)):
            verdict = compare(port, file(case))
            assert not verdict.equal
            assert WORDS[mutant.key] in verdict.words, verdict.words


# What the rows of the table in tutorial 7 are about, in its order; two rows name no tensor.
ROWS = (
    "positions of the chunk", "top-left mask", "mean of chunk means", "shift in each chunk", "forward walk",
    "the past with its graph", "replaced", "handed over before the rotation", "other masks", "no loss factor",
    "no relay factor", "all that arrived", "skipped chunks relay",
)  # fmt: skip


def test_the_table_of_the_seventh_tutorial_is_true() -> None:
    page = (COMMITTED.parents[1] / "tutorials" / "07_porting.py").read_text()
    rows = re.findall(r"^# \| \*\*.+?\*\*.*\| `([\w.]+)`.*\|$", page, re.MULTILINE)
    for key, tensor in zip(ROWS, rows, strict=True):
        mutant = next(mutant for mutant in MUTANTS if mutant.key == key)
        first = compare(outputs(Numpy(mutant.case, *mutant.modules())), file(mutant.case)).words.split()[0]
        assert first == (tensor if tensor.startswith("spaco") else f"seco.{tensor}"), key


def test_bfloat16_sees_every_mistake_but_the_smallest() -> None:
    plain = [mutant for mutant in MUTANTS if mutant.case == "plain"]
    verdicts = {m.key: compare(outputs(Numpy("calm", *m.modules())), file("calm"), "bfloat16") for m in plain}
    assert len(plain) > 30 and [key for key, verdict in verdicts.items() if verdict.equal] == ["eps outside the root"]


def computed_in(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What our own code computes of a file in another precision."""
    step = build(CASES[name])
    for adapter, mask in step.masks.items():
        step.masks[adapter] = mask.to(dtype)
    step.model.to(dtype)
    return golden(CASES[name], step)


def worst(mine: dict[str, Tensor], name: str) -> float:
    """The largest error of any tensor, relative to its norm."""
    expected = {key: value for key, value in file(name).tensors.items() if float(value.double().norm()) > 0}
    return max(float((mine[key].double() - value).norm() / value.double().norm()) for key, value in expected.items())


@pytest.mark.parametrize("name", CASES)
def test_float32_is_judged_on_all_files_and_bfloat16_on_the_calm_one_alone(name: str) -> None:
    """Every tensor has a place of its own, and a port without a mistake is equal."""
    computed = [tensor for tensor in file(name).tensors if re.search(r"^full|co\.", tensor)]
    assert len({order(tensor) for tensor in computed}) == len(computed)
    mine = outputs(Numpy(name))
    assert compare(mine, file(name)).equal and compare(without_optional(mine), file(name)).equal
    mine = computed_in(name, torch.float32)
    assert compare(mine, file(name)).equal
    assert worst(mine, name) < (1e-4 if name == "state" else 1e-5)
    mine["seco.chunk.0.grad.model.embed_tokens.weight" if name != "lora" else "seco.loss"] *= 1.001
    assert not compare(mine, file(name)).equal
    mine = computed_in(name, torch.bfloat16)
    assert (worst(mine, name) < 0.03) == (name == "calm")
    if name == "calm":
        assert compare(mine, file(name), "bfloat16").equal
    else:
        with pytest.raises(InputError, match="cannot judge bfloat16"):
            compare(mine, file(name))


def test_the_order_is_that_of_the_page() -> None:
    steps = (
        "input_ids", "weights.lm_head.weight", "rope.cos", "seco.chunk.0.layer.0.hidden", "seco.chunk.0.layer.0.keys",
        "seco.chunk.0.layer.0.attention", "seco.chunk.0.layer.1.hidden", "seco.chunk.0.logits",
        "seco.chunk.1.layer.0.keys", "seco.log_probs", "seco.token_weights", "seco.chunk.3.loss", "seco.chunk.2.loss",
        "full.loss", "full.grad.lm_head.weight",
        "seco.chunk.3.layer.2.key_grads", "seco.chunk.3.grad.lm_head.weight", "seco.chunk.3.layer.2.hidden_grad",
        "seco.chunk.3.grad.model.layers.1.mlp.down_proj.weight", "seco.chunk.3.grad.model.embed_tokens",
        "seco.chunk.2.layer.2.key_grads", "seco.chunk.2.grad.lm_head.weight", "seco.loss", "spaco.chunk.0.layer.0.keys",
    )  # fmt: skip
    backwards = steps[::-1]
    assert sorted(backwards, key=order) == list(steps)


def changed(change: Any, tensor: str = "seco.chunk.1.layer.0.keys") -> str:
    """The words for a port that is right but for one tensor."""
    mine = dict(file("plain").tensors)
    mine[tensor] = change(mine[tensor])
    verdict = compare(mine, file("plain"), "float64")
    assert not verdict.equal and verdict.words.startswith(tensor)
    return verdict.words


def test_what_is_wrong_is_said_in_words() -> None:
    for words, change in {
        "but must have [2, 4, 3, 4]; the same axes, in another order": lambda x: x.transpose(1, 2),
        "has the shape [2, 4, 2, 4], but must have [2, 4, 3, 4]\n": lambda x: x[:, :, :2],
        "has the dtype torch.int64, but must be a floating-point one": lambda x: x.long(),
        "has numbers that are not finite": lambda x: x / 0,
    }.items():
        assert words in changed(change) and "begins here" not in changed(change)
    assert "yours is 2.5 times what is expected" in changed(lambda x: 2.5 * x)
    assert "times what" not in changed(lambda x: x + 1)
    assert "must be all zeros, and is not" in changed(lambda x: x + 1, "seco.chunk.3.layer.0.key_grads")
    assert "is not the file's" in changed(lambda x: x + 1, "input_ids")
    assert "begins here:\n  - or it was kept" in changed(lambda x: x + 1, "seco.chunk.2.layer.0.values")
    assert "but must have []; a scalar saved as [1]" in changed(lambda x: x[None], "seco.chunk.3.loss")


def test_what_is_missing_is_named_and_what_can_be_left_out_is_not() -> None:
    computed = {name: t for name, t in file("lora").tensors.items() if re.match("full|rope|seco|spaco", name)}
    assert "left out" not in compare(computed, file("lora")).words  # what is given does not count
    del computed["seco.chunk.0.logits"]
    assert "; 1 that can be left out" in compare(computed, file("lora")).words
    mine = without_optional(file("plain").tensors)
    assert compare(mine, file("plain")).equal
    mine["seco.chunk.3.losses"] = mine.pop("seco.chunk.3.loss")
    verdict = compare(mine, file("plain"))
    assert not verdict.equal and "not there yet: seco.chunk.3.loss and 0 more" in verdict.words
    assert "no seco.chunk.3.losses" in verdict.words


def test_what_agrees_rules_out_what_would_show_there() -> None:
    """Where layer 1 begins with the right numbers, nothing before it is wrong."""
    right = file("plain").tensors
    mine = {name: tensor + name.endswith("layer.1.keys") for name, tensor in right.items()}
    with_hidden, without = (compare(port, file("plain")).words for port in (mine, without_optional(mine)))
    assert "causal mask" not in with_hidden and "causal mask" in without
    mutant = next(mutant for mutant in MUTANTS if mutant.key == "no rotation")
    words = compare(outputs(Numpy("hybrid", *mutant.modules())), file("hybrid")).words
    assert words.startswith("seco.chunk.0.layer.1.keys") and "activation" not in words and "RMSNorm" not in words
    assert WORDS[mutant.key] in words


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, mine = COMMITTED / "plain.safetensors", tmp_path / "mine.safetensors"
    tensors = {name: tensor.float() for name, tensor in without_optional(file("plain").tensors).items()}
    for factor, status in ((1.0, 0), (1.0001, 1)):
        write_tensors(mine, {**tensors, "seco.chunk.2.loss": factor * tensors["seco.chunk.2.loss"]})
        assert main(["compare", str(mine), "--golden", str(plain)]) == status
        assert ("agree in float32" in capsys.readouterr().out) == (status == 0)
    assert main(["compare", str(plain), "--golden", str(mine)]) == 2
    assert "is no golden file of this version" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "none"), "--golden", str(plain)]) == 2
    assert "is not a whole safetensors file" in capsys.readouterr().err
    write_tensors(mine, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    assert main(["compare", str(mine), "--golden", str(plain)]) == 2
    assert "Take calm.safetensors" in capsys.readouterr().err
