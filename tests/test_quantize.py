"""A 4-bit base: the adapters' gradients are those beside the same weights unpacked."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import minichunk as mc
from minichunk.costs.forecast import forecast
from minichunk.costs.setting import Setting
from minichunk.models.quantize import Linear4bit, count_parameters

from .rounding import exactly, outcome
from .strategies import PROJECTIONS, build, tiny, with_adapter

pytest.importorskip("bitsandbytes")
CONFIG = tiny(vocab_size=64, hidden_size=64, intermediate_size=96, head_dim=16, attention_bias=True, model_type="qwen2")
IDS = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    build(CONFIG, seed=0).float().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def unpacked(directory: Path) -> Any:
    """An ordinary model whose weights are what the 4-bit one's are when unpacked."""
    quantized, plain = mc.load_model(directory, load_in_4bit=True), mc.load_model(directory)
    with torch.no_grad():
        for name, module in quantized.named_modules():
            if isinstance(module, Linear4bit):
                plain.get_submodule(name).weight.copy_(module.weight_as(torch.float32))
    return plain


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), PROJECTIONS, ("in_proj", "out_proj")])
@pytest.mark.parametrize("method", ["full", "seco", "recompute and offload", "blocks"])
def test_gradients_equal_those_beside_the_unpacked_base(directory: Path, targets: tuple[str, ...], method: str) -> None:
    """Also of a Mamba-2, which has two linear layers where a Llama has seven."""
    if is_mamba := "in_proj" in targets:
        build(mc.Mamba2Config(64, 8, 3, 2, num_heads=4, head_dim=4, n_groups=2), 0).float().save_pretrained(directory)
    torch.manual_seed(1)
    expected = with_adapter(unpacked(directory), targets=targets).double()
    exact = exactly(expected, lambda: mc.full(expected, IDS, IDS))
    torch.manual_seed(1)
    model = with_adapter(mc.load_model(directory, load_in_4bit=True), targets=targets)
    assert sum(isinstance(module, Linear4bit) for module in model.modules()) == (4 if is_mamba else 14)
    keywords = dict.fromkeys(("recompute", "offload"), method == "recompute and offload")
    cut = {"layers_at_once": 1 if method == "blocks" else None}
    run = mc.full if method == "full" else partial(mc.seco, chunk_size=16, **keywords, **cut)
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
    # Those in 4 bits are buffers; `train` recomputes the layers of a large model by this count.
    plain = mc.Llama.from_pretrained(directory)
    assert count_parameters(model) == count_parameters(plain) == sum(p.numel() for p in plain.parameters())


def test_no_unpacked_weight_is_kept_for_the_backward(directory: Path) -> None:
    model = with_adapter(mc.Llama.from_pretrained(directory, load_in_4bit=True), targets=PROJECTIONS)
    shapes = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (shapes.add(tuple(t.shape)), t)[1], lambda t: t):
        model.run(IDS)
    assert not shapes & {(64, 64), (96, 64), (64, 96), (32, 64)}


def test_an_adapter_goes_from_one_base_to_the_other(directory: Path, tmp_path: Path) -> None:
    bases = [lambda: mc.load_model(directory, load_in_4bit=True), lambda: unpacked(directory)]
    for base in bases:
        mc.save_adapter(model := with_adapter(base(), targets=PROJECTIONS), tmp_path)
        for there in (make() for make in bases):
            mc.load_adapter(there, tmp_path)
            torch.testing.assert_close(there(IDS), model(IDS), rtol=1e-5, atol=1e-5)
            mc.load_adapter(there, tmp_path)  # over the one that is there now
            torch.testing.assert_close(there(IDS), model(IDS), rtol=1e-5, atol=1e-5)


def test_refusals(directory: Path, tmp_path: Path) -> None:
    model = mc.Llama.from_pretrained(directory, load_in_4bit=True)
    with pytest.raises(mc.InputError, match="a model in 4 bits is not written"):
        model.save_pretrained(tmp_path / "new")
    mc.add_lora(model)
    with pytest.raises(mc.InputError, match="a 4-bit base cannot take an adapter in"):
        mc.merge_lora(model)


def test_8b_in_4_bits_on_24_gib() -> None:
    """The adapter of the comparison: rank 32 on all linear layers; 1 GiB reserve, sums in bfloat16."""
    common = {"rank": 32, "targets": PROJECTIONS, "load_in_4bit": True, "cache_grad_dtype": "bfloat16"}
    available = 23 * 2**30
    assert forecast(Setting(**common)).longest(available) >= 60_000
