"""What is known about mistakes in exercise 7, LoRA."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import minichunk as mc

from ..diagnose import close, compare, require, within
from .common import CHUNK_SIZE, batch, random, tiny_llama


def check_lora(module: ModuleType) -> None:
    """One LoraLinear by itself, its merge, and then a whole model."""
    x, weight, bias, A, B = random(6, (2, 3, 5), (4, 5), (4,), (2, 5), (4, 2))
    base = nn.Linear(5, 4).double()
    with torch.no_grad():
        base.weight.copy_(weight)
        base.bias.copy_(bias)
    layer = module.LoraLinear(base, 2, 8.0)
    _check_start(layer, x)
    with torch.no_grad():
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B)
    _check_forward(layer, x, weight, bias)
    _check_merged(layer, x, weight, bias)
    _check_add_lora(module)


@within("LoraLinear.__init__")
def _check_start(layer: Any, x: Tensor) -> None:
    for name, shape in (("lora_A", [2, 5]), ("lora_B", [4, 2])):
        p = getattr(layer, name, None)
        if not isinstance(p, nn.Parameter) or list(p.shape) != shape:
            raise AssertionError(f"{name} must be an nn.Parameter of shape {shape} (rank 2, 5 inputs, 4 outputs).")
        require(p.dtype == torch.float64, f"{name} is {p.dtype}, but the base's weight is torch.float64.")
        require(p.requires_grad, f"{name} does not require a gradient: what is there to train?")
    a_is_zero, b_is_zero = (not p.any() for p in (layer.lora_A, layer.lora_B))
    require(
        not (a_is_zero and b_is_zero),
        "A and B both start at zero. The gradient of A goes through B and that of B through A: what will they be?",
    )
    require(
        not a_is_zero,
        "A starts at zero instead of B. B A is zero either way, but LoRA draws A at random and lets B grow from zero: "
        "which of the two should the first step move?",
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
        "The adapter is scaled by alpha. What keeps the update's size when the rank grows?": plain + 8 * update,
        "The scale is upside down: rank / alpha.": plain + update / 4,
        "The adapter is scaled by 1 / rank. Where is alpha?": plain + update / 2,
        "The adapter is scaled by alpha / sqrt(rank). Here it has to be alpha / rank.": plain + 8 / 2**0.5 * update,
        "This is the adapter alone. Where is the base's output?": 4 * update,
        "This is the base's output alone. Where is the adapter's?": plain,
        "The adapter is subtracted.": plain - 4 * update,
        "The base's bias is missing.": plain - bias + 4 * update,
        "The base's output is scaled, too. What does alpha / rank belong to?": 4 * (plain + update),
    }
    name = "the layer's output"
    mistakes = ((words, {name: wrong}) for words, wrong in wrongs.items())
    compare({name: layer(x)}, {name: plain + 4 * update}, mistakes, "batch position channel")
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    assert leaf.grad is not None
    by_base, by_adapter = (matrix.sum(0).expand_as(x) for matrix in (weight, 4 * B @ A))
    name = "the gradient of the input"
    compare({name: leaf.grad}, {name: by_base + by_adapter}, [
        ("The gradient of the input lacks what comes through the base: the layers below would learn little. The base's "
         "weights are frozen, but what is detached passes nothing on.", {name: by_adapter}),
        ("The gradient of the input lacks what comes through the adapter. What is detached passes nothing on.",
         {name: by_base}),
    ], "batch position channel")  # fmt: skip
    layer(x).square().sum().backward()
    for name in ("lora_A", "lora_B"):
        grad = getattr(layer, name).grad
        require(
            grad is not None and bool(grad.any()), f"{name} receives no gradient: did a detach or a no_grad cut it off?"
        )


@within("LoraLinear.merged")
def _check_merged(layer: Any, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    update = layer.lora_B.detach() @ layer.lora_A.detach()
    before = layer(x).detach()
    name = "the weight of the merged layer"
    for count in (1, 2):
        linear = layer.merged()
        right = isinstance(linear, nn.Linear) and not any("lora" in part for part, _ in linear.named_parameters())
        require(right, f"merged() returned a {type(linear).__name__}, but has to return a plain nn.Linear.")
        twice = (
            "merged() added the adapter a second time: the base's own weight has been changed. "
            "Which tensor may be changed in place, and which has to be copied?"
        )
        compare({name: linear.weight}, {name: weight + 4 * update}, [
            ("The merged weight lacks the scale alpha / rank.", {name: weight + update}),
            ("The merged weight is the adapter's product alone. Where is the base's weight?", {name: 4 * update}),
            ("The merged weight is the base's. Where is the adapter?", {name: weight}),
            (twice, {name: weight + 8 * update}),
            ("The merged weight has the adapter subtracted.", {name: weight - 4 * update}),
        ], "row column")  # fmt: skip
        require(linear.bias is not None, "The merged layer has lost the base's bias.")
        name_of_bias = "the bias of the merged layer"
        require(
            linear.bias.shape == bias.shape and torch.equal(linear.bias.detach(), bias),
            f"{name_of_bias} is not the base's. A new nn.Linear begins with a random one: what has to be copied, too?",
        )
        require(
            torch.allclose(layer(x).detach(), before),
            "After merged() the layer itself computes something else: the adapter is in the base's weight now, and "
            f"still beside it, so that it counts twice (found after call {count} of merged()). What has to be copied?",
        )


@within("add_lora")
def _check_add_lora(module: ModuleType) -> None:
    model, plain = tiny_llama(2), tiny_llama(2)
    input_ids, labels = batch(8)
    wanted = {f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")}
    # Neither is asked for: their names only end or begin with a target's.
    for other in ("other_q_proj", "v_proj_other"):
        model.get_submodule("model.layers.0.self_attn").add_module(other, nn.Linear(8, 8).double())
    module.add_lora(model, 2, 8, ["q_proj", "v_proj"])
    found = {name for name, layer in model.named_modules() if isinstance(layer, module.LoraLinear)}
    for name in sorted(wanted - found):
        raise AssertionError(f"add_lora has not replaced {name}. Which part of a module's name do the targets name?")
    every = {name for name, layer in plain.named_modules() if isinstance(layer, nn.Linear)}
    words = "add_lora has replaced every linear layer of the model. What are the targets for?"
    require(not every <= found, words)
    for name in sorted(found - wanted):
        raise AssertionError(
            f"add_lora has replaced {name}, which is not among the targets. A target is the whole last part of a name, "
            "from its last dot on: does yours match names that only contain it, or end with it?"
        )
    q_proj = model.get_submodule("model.layers.0.self_attn.q_proj")
    shape = list(q_proj.lora_A.shape)
    require(
        shape == [2, 8],
        f"With rank 2 and alpha 8, lora_A of a layer with 8 inputs is {shape}, but has to be [2, 8]. In which order "
        "does LoraLinear take them?",
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
    mc.seco(model, input_ids, labels, CHUNK_SIZE)
    for name, p in model.named_parameters():
        has = p.grad is not None and bool(p.grad.any())
        require(has or not name.endswith("lora_B"), f"{name} has received no gradient from a step of SeCO.")
