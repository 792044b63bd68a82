"""A 4-bit base: the adapters' gradients are those beside the same weights unpacked."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

import minichunk as mc
from minichunk.cli import main
from minichunk.forecast import Setting, forecast
from minichunk.lora import PROJECTIONS, LoraLinear
from minichunk.quantize import Linear4bit

from .rounding import exactly, outcome
from .strategies import build, tiny

pytest.importorskip("bitsandbytes")
CONFIG = tiny(vocab_size=64, hidden_size=64, intermediate_size=96, head_dim=16, attention_bias=True, model_type="qwen2")
IDS = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    build(CONFIG, seed=0).float().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def unpacked(directory: Path) -> mc.Llama:
    """An ordinary model whose weights are what the 4-bit one's are when unpacked."""
    quantized, plain = mc.Llama.from_pretrained(directory, load_in_4bit=True), mc.Llama.from_pretrained(directory)
    with torch.no_grad():
        for name, module in quantized.named_modules():
            if isinstance(module, Linear4bit):
                plain.get_submodule(name).weight.copy_(module.weight_as(torch.float32))
    return plain


def with_adapter(model: mc.Llama, targets: tuple[str, ...]) -> mc.Llama:
    torch.manual_seed(1)
    mc.add_lora(model, 4, 8, targets)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), PROJECTIONS])
@pytest.mark.parametrize("method", ["full", "seco", "recompute", "offload"])
def test_gradients_equal_those_beside_the_unpacked_base(directory: Path, targets: tuple[str, ...], method: str) -> None:
    expected = with_adapter(unpacked(directory), targets).double()
    exact = exactly(expected, lambda: mc.full(expected, IDS, IDS))
    model = with_adapter(mc.Llama.from_pretrained(directory, load_in_4bit=True), targets)
    keywords = {"recompute": method == "recompute", "offload": method == "offload"}
    run = mc.full if method == "full" else partial(mc.seco, chunk_size=16, **keywords)
    exact.check(outcome(model, lambda: run(model, IDS, IDS)))  # float32, against float64


def test_what_is_stored_and_what_is_not(directory: Path) -> None:
    model = mc.Llama.from_pretrained(directory, dtype=torch.bfloat16, load_in_4bit=True)
    stored = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert len(stored) == 7 * CONFIG.num_hidden_layers
    assert isinstance(model.lm_head, torch.nn.Linear)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert layer.packed.nbytes + layer.scales.nbytes == 64 * 64 // 2 + 64 * 64 // 64 * 4
    assert layer.bias is not None
    assert not layer.bias.requires_grad
    exact = mc.Llama.from_pretrained(directory).get_submodule("model.layers.0.self_attn.q_proj").weight
    error = (layer.weight_as(torch.float32) - exact).norm() / exact.norm()
    assert 0.02 < error < 0.12


def test_no_unpacked_weight_is_kept_for_the_backward(directory: Path) -> None:
    model = with_adapter(mc.Llama.from_pretrained(directory, load_in_4bit=True), PROJECTIONS)
    shapes = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (shapes.add(tuple(t.shape)), t)[1], lambda t: t):
        model.run(IDS)
    assert not shapes & {(64, 64), (96, 64), (64, 96), (32, 64)}


def test_an_adapter_goes_from_one_base_to_the_other(directory: Path, tmp_path: Path) -> None:
    model = with_adapter(mc.Llama.from_pretrained(directory, load_in_4bit=True), ("q_proj", "v_proj"))
    mc.save_adapter(model, tmp_path / "adapter")
    plain = unpacked(directory)
    mc.load_adapter(plain, tmp_path / "adapter")
    torch.testing.assert_close(plain(IDS), model(IDS), rtol=1e-5, atol=1e-5)
    assert sum(isinstance(m, LoraLinear) for m in plain.modules()) == 4


def test_refusals(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = mc.Llama.from_pretrained(directory, load_in_4bit=True)
    with pytest.raises(mc.InputError, match="a model in 4 bits is not written"):
        model.save_pretrained(tmp_path / "new")
    mc.add_lora(model)
    with pytest.raises(mc.InputError, match="a 4-bit base cannot take an adapter in"):
        mc.merge_lora(model)
    for command in ("train", "plan"):
        assert main([command, "--load-in-4bit", "--rank", "0"]) == 2
        assert "--load-in-4bit freezes the base" in capsys.readouterr().err


def test_8b_in_4_bits_on_24_gib() -> None:
    """The adapter of the comparison: rank 32 on all linear layers; 1 GiB reserve, sums in bfloat16."""
    common = {"rank": 32, "targets": PROJECTIONS, "load_in_4bit": True, "cache_grad_dtype": torch.bfloat16}
    available = 23 * 2**30
    assert forecast(Setting(**common)).longest(available, 512) >= 60_000
    assert forecast(Setting(method="spaco", **common)).longest(available, 512) >= 115_000
    assert forecast(Setting(offload=True, **common)).longest(available, 512, host=64 * 2**30) >= 250_000
