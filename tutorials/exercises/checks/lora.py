"""What is known about mistakes in exercise 7, LoRA."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..diagnose import close, compare, require, within
from ..toy_llama import batch, tiny_llama
from .common import random


def check_lora(module: ModuleType) -> None:
    """One LoraLinear by itself, its merge, and then a whole model."""
    x, weight, bias, A, B = random(6, (2, 3, 5), (4, 5), (4,), (2, 5), (4, 2))
    base = nn.Linear(5, 4).double()
    with torch.no_grad():
        base.weight.copy_(weight)
        base.bias.copy_(bias)
    layer = module.LoraLinear(base, 2, 8.0)
    _check_start(layer)
    with torch.no_grad():
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B)
    _check_forward(layer, x, weight, bias)
    _check_merged(layer, x, weight, bias)
    _check_add_lora(module)


@within("LoraLinear.__init__")
def _check_start(layer: Any) -> None:
    for name, shape in (("lora_A", [2, 5]), ("lora_B", [4, 2])):
        p = getattr(layer, name, None)
        if not isinstance(p, nn.Parameter) or list(p.shape) != shape:
            raise AssertionError(f"{name} must be an nn.Parameter of shape {shape} (rank 2, 5 inputs, 4 outputs).")
        require(p.dtype == torch.float64, f"{name} is {p.dtype}, but the base's weight is torch.float64.")
        require(p.requires_grad, f"{name} does not require a gradient: what is there to train?")
    a_is_zero, b_is_zero = (not p.any() for p in (layer.lora_A, layer.lora_B))
    require(
        not a_is_zero,
        "A starts at zero. With B at zero as well neither has a gradient; and LoRA draws A at random and lets B grow "
        "from zero: which of the two should the first step move?",
    )
    require(b_is_zero, "B does not start at zero: the model is another one before its first step. What should B A be?")
    frozen = not any(p.requires_grad for name, p in layer.named_parameters() if not name.startswith("lora_"))
    require(frozen, "The base is not frozen: its parameters still require a gradient. What was to be saved?")


@within("LoraLinear.forward")
def _check_forward(layer: Any, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    update, plain = x @ A.T @ B.T, x @ weight.T + bias
    wrongs = {
        "The adapter is not scaled. It has to be multiplied by alpha / rank: where is the scale?": plain + update,
        "This is the adapter alone. Where is the base's output?": 4 * update,
    }
    name = "the layer's output"
    mistakes = ((words, {name: wrong}) for words, wrong in wrongs.items())
    compare({name: layer(x)}, {name: plain + 4 * update}, mistakes, "batch position channel")
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    by_base, by_adapter = (matrix.sum(0).expand_as(x) for matrix in (weight, 4 * B @ A))
    name = "the gradient of the input"
    compare({name: leaf.grad}, {name: by_base + by_adapter}, [
        ("The gradient of the input lacks what comes through the base: the layers below would learn little. The base's "
         "weights are frozen, but what is detached passes nothing on.", {name: by_adapter}),
    ], "batch position channel")  # fmt: skip


@within("LoraLinear.merged")
def _check_merged(layer: Any, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    update = layer.lora_B.detach() @ layer.lora_A.detach()
    before = layer(x).detach()
    for _ in range(2):
        linear = layer.merged()
        right = isinstance(linear, nn.Linear) and not any("lora" in part for part, _ in linear.named_parameters())
        require(right, f"merged() returned a {type(linear).__name__}, but has to return a plain nn.Linear.")
        name = "the weight of the merged layer"
        compare({name: linear.weight}, {name: weight + 4 * update}, [
            ("The merged weight lacks the scale alpha / rank.", {name: weight + update}),
        ], "row column")  # fmt: skip
        require(
            linear.bias is not None and torch.equal(linear.bias.detach(), bias),
            "The bias of the merged layer is not the base's. A new nn.Linear begins with a random one, if with any: "
            "what has to be copied, too?",
        )
        require(
            torch.allclose(layer(x).detach(), before),
            "After merged() the layer itself computes something else: the adapter is in the base's weight now, and "
            "still beside it, so that it counts twice. What has to be copied?",
        )


@within("add_lora")
def _check_add_lora(module: ModuleType) -> None:
    model, plain = tiny_llama(2), tiny_llama(2)
    input_ids, _ = batch(8)
    wanted = {f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")}
    # Neither is asked for: their names only end or begin with a target's.
    for other in ("other_q_proj", "v_proj_other"):
        model.get_submodule("model.layers.0.self_attn").add_module(other, nn.Linear(8, 8).double())
    module.add_lora(model, 2, 8, ["q_proj", "v_proj"])
    found = {name for name, layer in model.named_modules() if isinstance(layer, module.LoraLinear)}
    for name in sorted(wanted - found):
        raise AssertionError(f"add_lora has not replaced {name}. Which part of a module's name do the targets name?")
    for name in sorted(found - wanted):
        raise AssertionError(
            f"add_lora has replaced {name}, which is not among the targets. A target is the whole last part of a name, "
            "from its last dot on: does yours match names that only contain it, or end with it?"
        )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    adapters = {f"{name}.{matrix}" for name in wanted for matrix in ("lora_A", "lora_B")}
    for name in sorted(trained - adapters):
        raise AssertionError(f"{name} is not frozen: it still requires a gradient. Which parameters does LoRA train?")
    for name in sorted(adapters - trained):
        raise AssertionError(f"{name} does not require a gradient. In which order are layers frozen and replaced?")
    with torch.no_grad():
        same = close(model(input_ids), plain(input_ids))
    require(
        same,
        "The logits before the first step are others than without the adapters. Is the base of each LoraLinear the "
        "very layer that it replaces, and does B start at zero?",
    )
