"""Adapters: what they compute, merging, PEFT's files both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import minichunk as mc
from minichunk.chunks import Chunk
from minichunk.models.lora import DropoutMasks

from .gradients import take_gradients
from .rounding import exactly, measure, outcome
from .strategies import PROJECTIONS, build, tiny, with_adapter

PART = {"pattern": {"window": 5, "sinks": 0}, "full_layers": [1]}
OF_A_HYBRID = {"peft_type": "PARTIAL_CONTEXT_LORA"}


def adapted(dropout: float = 0.0) -> mc.Llama:
    return with_adapter(build(tiny(), 0), dropout=dropout)


def test_a_new_adapter_changes_nothing_and_freezes_the_rest() -> None:
    """In float32 at least, whatever the model has."""
    model, ids = mc.Llama(tiny()).bfloat16(), torch.arange(9)[None]
    names, before = set(model.state_dict()), model(ids)
    mc.add_lora(model, rank=3)
    mc.seco(model, ids, ids, 4)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    torch.testing.assert_close(model(ids), before, rtol=0, atol=0)
    assert names < set(model.state_dict())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"model.layers.{i}.self_attn.{t}.lora_{x}.weight" for i in (0, 1) for t in ("q_proj", "v_proj") for x in "AB"
    }


@pytest.mark.parametrize("pattern", [None, mc.Window(5, 2)])
def test_merging_keeps_the_function(pattern: Any, tmp_path: Path) -> None:
    """What is saved is the merged model: an adapter alone would be lost. That of a stored hybrid is an ordinary one."""
    base, ids = build(tiny(), 0), torch.arange(9)[None]
    if pattern is not None:
        mc.partial_context(base, pattern, [0])
    base.save_pretrained(tmp_path / "base")
    mc.save_adapter(with_adapter(mc.load_model(tmp_path / "base")), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    model = mc.load_model(tmp_path / "base")
    mc.load_adapter(model, tmp_path)
    exact = measure(lambda: {"logits": model(ids)})
    with pytest.raises(mc.InputError, match="call merge_lora first"):
        model.save_pretrained(tmp_path)
    mc.merge_lora(model)
    assert all(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path)
    again = mc.load_model(tmp_path)
    exact.check({"logits": again(ids)})
    assert set(again.state_dict()) == set(model.state_dict()) == set(base.state_dict())


@pytest.mark.parametrize("pattern", [None, mc.Window(5), mc.Window(4, 3), mc.Strided(3, 2, 2)], ids=str)
@pytest.mark.parametrize("adapter_first", [False, True])
def test_save_and_load(pattern: Any, adapter_first: bool, tmp_path: Path) -> None:
    """An adapter brings along what its base was made; into one that is there it goes with the file's alpha."""

    def base(changed: bool) -> mc.Llama:
        model = build(tiny(), 0)
        if changed and pattern is not None:
            mc.partial_context(model, pattern, [0])
        return model

    model, ids = with_adapter(base(not adapter_first), dropout=0.1).eval(), torch.arange(21)[None]
    if adapter_first and pattern is not None:
        mc.partial_context(model, pattern, [0])
    mc.save_adapter(model, tmp_path, base_model="somewhere/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somewhere/base"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 6, 0.1)
    there = base(False)
    mc.add_lora(there, 3, 99, PROJECTIONS)
    for other in (base(False), base(True), there):
        mc.load_adapter(other, tmp_path)
        assert torch.equal(other.eval()(ids).detach(), model(ids).detach()) and other.config == model.config
        mc.load_adapter(other, tmp_path)  # once more
        mc.save_adapter(other, tmp_path)  # and on


def test_masks_are_those_of_the_chunk_the_module_and_the_seed() -> None:
    x = torch.zeros(2, 6, 4, dtype=torch.float64)
    masks = DropoutMasks()

    def draw(seed: int, module: str, *chunks: Chunk) -> torch.Tensor:
        with masks.of(seed, chunks):
            return masks.draw(x[:, : chunks[-1].stop - chunks[0].start], module, 0.5)

    whole = draw(1, "a", Chunk(0, 4), Chunk(4, 6))
    assert torch.equal(whole[:, 4:], draw(1, "a", Chunk(4, 6)))
    assert torch.equal(whole[:, :4], draw(1, "a", Chunk(0, 4)))
    assert not torch.equal(whole[:, :2], whole[:, 4:])
    assert not torch.equal(whole, draw(2, "a", Chunk(0, 4), Chunk(4, 6)))
    assert not torch.equal(whole, draw(1, "b", Chunk(0, 4), Chunk(4, 6)))
    assert set(whole.unique().tolist()) == {0.0, 2.0}


def test_dropout_drops_at_its_rate_and_only_in_training() -> None:
    model = adapted(dropout=0.25)
    masks = model.masks
    assert masks is not None
    with masks.of(3, [Chunk(0, 400)]):
        mask = masks.draw(torch.zeros(2, 400, 100), "m", 0.25)
    assert abs(float((mask == 0).float().mean()) - 0.25) < 0.01
    ids = torch.arange(9)[None]
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rank": 0}, "rank 0"),
        ({"alpha": -1}, "alpha -1"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"targets": ["q"]}, "targets are .*must be some of q_proj"),
        ({"targets": []}, "must be some of"),
    ],
)
def test_wrong_values_are_named(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(mc.InputError, match=words):
        mc.add_lora(build(tiny(), 0), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"r": 2.5}, "rank 2.5"),
        ({"lora_dropout": "x"}, "dropout 'x'"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": None}, "rank None"),
        ({"peft_type": "PARTIAL_CONTEXT_LORA"}, "peft_type is 'PARTIAL_CONTEXT_LORA', but must be 'LORA'"),
        ({"partial_context": PART}, "peft_type is 'LORA', but must be 'PARTIAL_CONTEXT_LORA'"),
        ({**OF_A_HYBRID, "partial_context": 3}, "must have a pattern and a list of full_layers"),
        ({**OF_A_HYBRID, "partial_context": {**PART, "pattern": {"window": 5}}}, "must have window and sinks"),
        ({**OF_A_HYBRID, "partial_context": {**PART, "full_layers": 1}}, "'full_layers': 1}, but must"),
        ({**OF_A_HYBRID, "partial_context": {**PART, "full_layers": [9]}}, r"full layers are \[9\]"),
    ],
)
def test_unsupported_adapters_are_refused(tmp_path: Path, change: dict[str, object], words: str) -> None:
    mc.save_adapter(adapted(), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    model = build(tiny(), 0)
    with pytest.raises(mc.InputError, match=f"adapter_config.json: .*{words}"):
        mc.load_adapter(model, tmp_path)
    assert model.partial is None and all(p.requires_grad for p in model.parameters())  # as it was


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    mc.save_adapter(adapted(), tmp_path)
    with pytest.raises(mc.InputError, match=r"has model\.layers\.1"):
        mc.load_adapter(build(tiny(layers=1), 0), tmp_path)
    with pytest.raises(mc.InputError, match=r"has the shape .*, but the model needs \[12, 3\]"):
        mc.load_adapter(build(tiny(hidden_size=12), 0), tmp_path)
    for rank, targets, words in ((2, PROJECTIONS, "rank 3, but .* adapter 2"), (3, "v_proj", "unlike the model's")):
        other = build(tiny(), 0)
        mc.add_lora(other, rank, targets=targets)
        with pytest.raises(mc.InputError, match=words):
            mc.load_adapter(other, tmp_path)
    with pytest.raises(mc.InputError, match="no adapter to save"):
        mc.save_adapter(build(tiny(), 0), tmp_path)
    with pytest.raises(mc.InputError, match="already"):
        mc.add_lora(adapted())
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(mc.InputError, match=r"adapter_model\.bin is pickled"):
        mc.load_adapter(build(tiny(), 0), tmp_path)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's, about its own use of transformers
def test_peft_has_the_same_gradient(tmp_path: Path) -> None:
    """With our files, on transformers' model in float64."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = build(tiny(), 0)
    base.save_pretrained(tmp_path / "base")
    ours = adapted()
    for name, parameter in base.named_parameters():  # the adapter draws moved nothing of the base
        assert torch.equal(parameter, ours.get_parameter(name))
    mc.save_adapter(ours, tmp_path / "ours", base_model=tmp_path / "base")

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours", is_trainable=True)
    ids = torch.randint(23, (2, 11))
    loss = theirs(input_ids=ids, labels=ids).loss
    loss.backward()
    prefix, grads = "base_model.model.", take_gradients(theirs)
    got = {name.removeprefix(prefix).replace(".default", ""): grad for name, grad in grads.items()}
    exact = exactly(ours, lambda: mc.full(ours, ids, ids))
    exact.check({"loss": loss, **got}, unit=2.0**-24)  # PEFT's adapter is float32
    exact.check(outcome(ours, lambda: mc.seco(ours, ids, ids, 4)))
