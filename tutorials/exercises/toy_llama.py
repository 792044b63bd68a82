"""A Llama small enough to be checked in float64, and texts for it: for the checks of the exercises on SeCO and LoRA."""

from __future__ import annotations

import torch
from torch import Tensor

import minichunk as mc

CHUNK_SIZE = 3
IGNORE = -100


def tiny_llama(layers: int = 3) -> mc.Llama:
    """A tiny float64 Llama whose attention is far from uniform."""
    config = mc.LlamaConfig(
        vocab_size=13, hidden_size=8, intermediate_size=12, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=4,
    )  # fmt: skip
    model = mc.Llama(config).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * (1.0 if "embed" in name else 0.25) + ("norm" in name))
    return model


def batch(T: int) -> tuple[Tensor, Tensor]:
    """input_ids and labels (2, T): some labels ignored, so that the chunks have unequally many targets."""
    input_ids = torch.randint(13, (2, T), generator=torch.Generator().manual_seed(T))
    labels = input_ids.clone()
    labels[0, :4] = IGNORE
    labels[1, -2:] = IGNORE
    return input_ids, labels
