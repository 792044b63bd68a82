"""What a checkpoint, an adapter and a prompt say is what runs, as in transformers and PEFT, or is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import minichunk as mc
from minichunk.command.main import main
from minichunk.models.config import first_eos
from minichunk.models.load import read_model_config
from minichunk.models.lora import default_targets
from minichunk.training import generate as generate_module

from .strategies import build, tiny
from .test_chat import KINDS
from .test_model import ARCHITECTURES, BASE
from .tiny_transformers import tiny_transformer

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
IDS = torch.arange(11)[None]
pytestmark = pytest.mark.filterwarnings("ignore")  # of the other libraries


def theirs_of(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)


def write(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **values}))


@pytest.mark.parametrize("config", [None, [], -1, 7, [22, 7]])
@pytest.mark.parametrize("generation", ["absent", [], -1, 7, [22, 7]])
def test_a_text_ends_where_transformers_ends_it(config: Any, generation: Any, tmp_path: Path) -> None:
    build(tiny(), seed=0).save_pretrained(tmp_path)
    prompt = torch.arange(3, 9)[None]
    end = int(mc.generate(mc.load_model(tmp_path), prompt, 9)[0, 9])  # the fourth that is written
    config, generation = (json.loads(json.dumps(x).replace("7", str(end))) for x in (config, generation))
    write(tmp_path / "config.json", eos_token_id=config)
    if generation != "absent":
        write(tmp_path / "generation_config.json", eos_token_id=generation)
    ours, theirs = mc.load_model(tmp_path), theirs_of(tmp_path)
    expected = theirs.generate(prompt, max_new_tokens=9, do_sample=False, pad_token_id=0)
    assert torch.equal(mc.generate(ours, prompt, 9), expected)
    assert first_eos(ours.config) == {"[]": None, "-1": None, "[22": 22}.get(str(config).split(",")[0], config)


def test_a_prompt_has_no_end_and_is_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tiny(vocab_size=700), seed=0).save_pretrained(tmp_path)
    KINDS["first"].save(str(tmp_path / "tokenizer.json"))  # appends </s>
    given: list[list[int]] = []
    monkeypatch.setattr(generate_module, "generate", lambda _, ids, *__, **___: given.append(ids[0].tolist()) or ids)
    assert main(["generate", "a man", "--model", str(tmp_path)]) == 0
    assert given == [KINDS["first"].encode("a man").ids[:-1]]
    assert main(["generate", "\udcff\udcfe abc", "--model", str(tmp_path)]) == 2
    assert "the prompt has half of a surrogate pair" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "generate hello", "evaluate", "walk", "plan", "generate x --adapter"])
def test_a_name_on_the_hub_gets_advice(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = command.split()
    assert main([*words, *([] if "--adapter" in words else ["--model"]), "Qwen/Qwen3-8B"]) == 2
    assert "hf download Qwen/Qwen3-8B --local-dir Qwen3-8B" in capsys.readouterr().err


def test_a_head_that_differs_from_the_tied_embedding_is_refused(tmp_path: Path) -> None:
    build(tiny(tie_word_embeddings=True), seed=0).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    for change in (0, 1):
        save_file({**tensors, "lm_head.weight": head + change}, tmp_path / "model.safetensors", {"format": "pt"})
        theirs = theirs_of(tmp_path)
        assert torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight) == (not change)
    with pytest.raises(mc.InputError, match=r"model\.safetensors: lm_head\.weight differs .* tie_word_embeddings"):
        mc.load_model(tmp_path)


@pytest.mark.parametrize("name", [*ARCHITECTURES, "mamba2", "gemma3n_text", "qwen3_next"])
def test_peft_loads_the_default_adapter_of_every_family(name: str, tmp_path: Path) -> None:
    """PEFT takes an adapter of gemma3n's routers for one of whole layers, and of an MLP for one of its experts."""
    mamba2 = mc.Mamba2Config(23, 8, 4, 3, num_heads=4, head_dim=4, n_groups=2)
    if name in ("gemma3n_text", "qwen3_next"):
        tiny_transformer(name).float().save_pretrained(tmp_path / "base")
    else:
        config = mamba2 if name == "mamba2" else read_model_config({**BASE, **ARCHITECTURES[name]})
        build(config, seed=0).save_pretrained(tmp_path / "base")
    ours = mc.load_model(tmp_path / "base")
    mc.add_lora(ours, 2, 4, default_targets(ours), dropout=0.5)
    for parameter in (p for n, p in ours.named_parameters() if "lora_B" in n):
        torch.nn.init.normal_(parameter)
    mc.save_adapter(ours, tmp_path / "adapter")
    base = theirs_of(tmp_path / "base").to(ours.like.dtype)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    found = theirs(IDS).logits.double()  # whose norms and adapters work in float32
    ours.eval()
    torch.testing.assert_close(ours.lm_head(ours.run(IDS)[0]), found, rtol=1e-4, atol=1e-4, check_dtype=False)


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({"layers_to_transform": [1]}, ""),
        ({"layers_to_transform": 0, "layers_pattern": "layers"}, ""),
        ({"target_modules": r".*\.1\..*(q|up)_proj"}, ""),
        ({"target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.1.mlp.up_proj"]}, ""),
        ({"target_modules": ["layers.0.self_attn.q_proj", "up_proj"]}, ""),
        ({"use_rslora": True}, ""),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern = .* is not supported"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern = .* is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = .* is not supported"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"lora_bias": True}, "lora_bias = True is not supported"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices = .* is not supported"),
    ],
)  # fmt: skip
def test_an_adapter_of_peft_is_loaded_right_or_refused_by_name(
    fields: dict[str, Any], refused: str, tmp_path: Path
) -> None:
    build(tiny(), 0).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "up_proj"], **fields})
    theirs = peft.get_peft_model(theirs_of(tmp_path / "base"), config).eval()
    for parameter in (p for n, p in theirs.named_parameters() if "lora_" in n):
        torch.nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = mc.load_model(tmp_path / "base")
    if refused:
        with pytest.raises(mc.InputError, match=rf"adapter_config\.json: {refused}"):
            mc.load_adapter(ours, tmp_path / "theirs")
        return
    mc.load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    mc.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(theirs_of(tmp_path / "base"), tmp_path / "ours")
    torch.testing.assert_close(again(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)


def test_a_model_keeps_its_mode_and_what_stood_beside_it(tmp_path: Path) -> None:
    build(tiny(), 0).save_pretrained(tmp_path / "base")
    beside = ("tokenizer.json", "chat_template.jinja", "generation_config.json", "additional_chat_templates/a.jinja")
    (tmp_path / "base/additional_chat_templates").mkdir()
    for name in beside:
        (tmp_path / "base" / name).write_text("{}")
    model = mc.load_model(tmp_path / "base")
    mc.add_lora(model, 2, dropout=0.5)
    assert all(module.training for module in model.modules())
    mc.save_adapter(model, tmp_path / "adapter")
    for training in (False, True):
        again = mc.load_model(tmp_path / "base").train(training)
        mc.load_adapter(again, tmp_path / "adapter")
        assert {module.training for module in again.modules()} == {training}
    mc.merge_lora(model)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/tokenizer.json").write_text("of its own")
    model.save_pretrained(tmp_path / "merged")
    assert [(tmp_path / "merged" / name).read_text() for name in beside] == ["of its own", "{}", "{}", "{}"]
