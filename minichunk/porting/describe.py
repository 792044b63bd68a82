"""What a tensor of a golden file is, in words."""

from __future__ import annotations

import re

KINDS = {
    "hidden": "what goes into layer {layer} at chunk {chunk}",
    "keys": "the keys that chunk {chunk} writes in layer {layer}, after the rotation",
    "values": "the values that chunk {chunk} writes in layer {layer}",
    "state": "the state after chunk {chunk} in layer {layer}",
    "decay": "the product of the gates of chunk {chunk} in layer {layer}",
    "attention": "what attention returns to chunk {chunk} in layer {layer}, heads side by side, before o_proj",
    "residual": "the input of layer {layer} plus what o_proj returns, at chunk {chunk}",
    "logits": "what the LM head returns to chunk {chunk}",
    "key_grads": "what is relayed to the keys of chunk {chunk} in layer {layer}: all that later chunks sent back",
    "value_grads": "what is relayed to the values of chunk {chunk} in layer {layer}: all that later chunks sent back",
    "adjoint": "what is relayed to the state after chunk {chunk} in layer {layer}",
    "loss": "chunk {chunk}'s part of the mean loss",
}


def describe(name: str) -> str:
    """What a tensor is, in words."""
    method = "SpaCO" if "spaco" in name else "SeCO"
    of = " of the second batch" if name.startswith("second.") else ""
    factors = ", its factors included" if method == "SpaCO" else ""
    if found := re.search(r"\.chunk\.(\d+)\.grad\.(.+)", name):
        return f"the gradient of {found[2]} after the backward pass of chunk {found[1]} in {method}{of}{factors}"
    if found := re.search(r"\.chunk\.(\d+)\.(?:layer\.(\d+)\.)?(\w+)$", name):
        words = KINDS[found[3]].format(chunk=found[1], layer=found[2])
        return f"{words}, in {method}{of}" + (factors if found[3].endswith(("loss", "grads", "adjoint")) else "")
    if name.endswith("co.loss"):
        return f"the sum of the chunks' losses in {method}{of}{factors}"
    if name.startswith("full."):
        return f"ordinary backpropagation: {name.removeprefix('full.')}"
    return "what the file gives, for you to begin with"
