"""A model of full attention made a hybrid: what it computes, and that nothing that is written forgets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import minichunk as mc
from minichunk.costs.setting import Setting
from minichunk.memory.window import FULL, Pattern
from minichunk.models.load import load_model
from minichunk.models.partial import describe, partial_config
from minichunk.training.options import TrainOptions

from .rounding import measure
from .strategies import build, tiny, with_adapter
from .test_model import ARCHITECTURES, BASE

IDS = torch.randint(23, (2, 30), generator=torch.Generator().manual_seed(0))
PATTERNS = [mc.Window(5), mc.Window(4, 3), mc.Strided(3, 2, 2)]


def hybrid(pattern: Pattern, layers: int = 3, adapter: bool = False, **fields: Any) -> mc.Llama:
    """The middle one of three layers sees everything."""
    model = build(tiny(layers, **fields), seed=1)
    if adapter:
        with_adapter(model, targets=None)
    mc.partial_context(model, pattern)
    return model


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(
    ("layers", "full_layers", "full"),
    [(3, (), []), (3, (0,), [0]), *((n, None, third) for n, third in ((3, [1]), (4, [1, 2]), (12, [4, 5, 6, 7])))],
)
def test_which_layers_see_a_part(pattern: Pattern, layers: int, full_layers: Any, full: list[int]) -> None:
    """All but the middle third, unless it is said."""
    model = build(tiny(layers), seed=0)
    mc.partial_context(model, pattern, full_layers)
    assert [x.self_attn.pattern for x in model.layers] == [FULL if i in full else pattern for i in range(layers)]


@pytest.mark.parametrize(
    ("pattern", "name", "model_type"),
    [
        (mc.Window(6), "llama", "ministral"), (mc.Window(6), "qwen3, biases", "qwen3"),
        *((pattern, name, "partial_context") for pattern, name in
          ((mc.Strided(3, 2, 2), "llama 3.1"), (mc.Window(5, 2), "qwen2"), (mc.Window(5), "llama, biases"))),
    ],
)  # fmt: skip
def test_stock_transformers_compute_a_hybrid_or_refuse_it(
    pattern: Pattern, name: str, model_type: str, tmp_path: Path
) -> None:
    """They compute windows; what they would ignore they do not take."""
    transformers = pytest.importorskip("transformers")
    ours = build(mc.LlamaConfig.from_dict({**BASE, **ARCHITECTURES[name]}), seed=0)
    mc.partial_context(ours, pattern)
    ours.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert again.config == ours.config and torch.equal(again(IDS), ours(IDS))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == model_type
    if model_type != "partial_context":
        read = {"dtype": torch.float64, "attn_implementation": "eager"}
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **read)
        exact = measure(lambda: {"logits": ours(IDS)})
        exact.check({"logits": theirs(IDS).logits.detach()}, unit=2.0**-24)  # see test_model.py
        return
    for their in ("AutoConfig", "AutoModel", "AutoModelForCausalLM"):
        with pytest.raises(ValueError, match="model type `partial_context`"):
            getattr(transformers, their).from_pretrained(tmp_path)
    for their in ("LlamaForCausalLM", "Qwen2ForCausalLM"):  # which take any type, with a warning
        with pytest.raises(Exception, match=r"layer_types.*partial_attention"):
            getattr(transformers, their).from_pretrained(tmp_path)


@pytest.mark.parametrize("fields", [{"sliding_window": 4}, {"pattern": mc.Window(4, 3)}])
def test_a_window_that_no_layer_would_have(fields: dict[str, Any]) -> None:
    """Or it would be ignored, and all layers would see all of the past."""
    with pytest.raises(mc.InputError, match="layer_types"):
        tiny(3, **fields)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((mc.Window(0),), "window is 0"),
        ((mc.Window(4, -1),), "sinks is -1"),
        ((mc.Window(),), "window is None"),
        ((mc.Strided(4, 0),), "local is 0"),
        (("window",), "must be a Window or a Strided"),
        ((mc.Window(4), [3]), r"full layers are \[3\], but must be some, not all, of 0 to 2"),
        ((mc.Window(4), [-1]), r"full layers are \[-1\]"),
        ((mc.Window(4), [0, 1, 2]), r"full layers are \[0, 1, 2\]"),
    ],
)
def test_mistakes_leave_the_model_as_it_was(arguments: Any, words: str) -> None:
    model = build(tiny(3), seed=0)
    before, config = model(IDS), model.config
    with pytest.raises(mc.InputError, match=words):
        mc.partial_context(model, *arguments)
    assert model.config == config
    assert model.partial is None
    assert torch.equal(model(IDS), before)


def test_models_of_another_kind_are_refused() -> None:
    with pytest.raises(mc.InputError, match="a model of the Llama family, not a state_space"):
        mc.partial_context(mc.StateSpace(mc.StateSpaceConfig(23, 8, 4, 2)), mc.Window(4))
    for model in (hybrid(mc.Window(5)), hybrid(mc.Window(5, 1))):
        with pytest.raises(mc.InputError, match=r"past already: the last 5 positions.*, in all layers but 1"):
            mc.partial_context(model, mc.Window(4))


def test_words() -> None:
    kinds = tuple(f"{kind}_attention" for kind in ["sliding", "full", "sliding", "sliding", "sliding", "full"])
    windows = tiny(6, sliding_window=2000, layer_types=kinds)
    assert describe(windows) == "the last 2,000 positions, in all layers but 1, 5"
    strided = partial_config(tiny(3), mc.Strided(64, 16, 8), [])
    assert describe(strided) == "the last 16 blocks of 64 positions and every 8th before, in all layers"
    assert describe(tiny(3)) == describe(mc.StateSpaceConfig(23, 8, 4, 2)) == ""


# Adapters.


@pytest.mark.parametrize("kind", ["PARTIAL_CONTEXT_LORA", "OTHER_ROPE_LORA"])
def test_peft_refuses_the_adapter_of_a_changed_base(kind: str, tmp_path: Path) -> None:
    """It would put it beside a base that sees everything, with no more than a warning."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    build(tiny(3), seed=1).save_pretrained(tmp_path / "base")
    model = hybrid(mc.Window(5), adapter=True) if "PART" in kind else with_adapter(build(tiny(3), 1), targets=None)
    if "ROPE" in kind:
        mc.change_rope(model, {"rope_theta": 500.0})
    mc.save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for load in (lambda path: peft.PeftModel.from_pretrained(base, path), base.load_adapter):
        with pytest.raises(KeyError, match=kind):
            load(str(tmp_path / "adapter"))


def test_an_adapter_of_another_hybrid_is_refused(tmp_path: Path) -> None:
    mc.save_adapter(hybrid(mc.Window(5), adapter=True), tmp_path)
    elsewhere = build(tiny(3), seed=1)
    mc.partial_context(elsewhere, mc.Window(5), [0])
    for other in (hybrid(mc.Window(6)), hybrid(mc.Window(5, 1)), elsewhere):
        with pytest.raises(mc.InputError, match=r"adapter_config.json: layers of this model see a part"):
            mc.load_adapter(other, tmp_path)


def test_the_plan_of_a_hybrid_is_that_of_its_checkpoint(tmp_path: Path) -> None:
    config = tiny(3, vocab_size=512, hidden_size=64, intermediate_size=128, head_dim=16)
    for name, one in (("base", config), ("hybrid", partial_config(config, mc.Window(200, 8), [0]))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(one.to_dict()))
    options = {"partial_context": "window", "window": 200, "sinks": 8, "full_layers": (0,)}
    told = Setting(model=str(tmp_path / "base"), **options)
    assert Setting(model=str(tmp_path / "hybrid")).config() == told.config() != config
    assert Setting(model=str(tmp_path / "hybrid")).even_from() == told.even_from()


def test_the_pattern_that_options_say() -> None:
    assert TrainOptions(partial_context="window").pattern() == mc.Window(1024, 64)
    assert TrainOptions(partial_context="strided", local=3).resolved().pattern() == mc.Strided(64, 3, 16)
    assert TrainOptions().resolved().pattern() is None
