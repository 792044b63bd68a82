"""Rotary position embedding: where a token stands, written into its queries and keys as an angle."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import LlamaConfig

Rope = tuple[Tensor, Tensor]  # cos and sin of the angles, (T, D/2) each


def rope_tables(config: LlamaConfig, start: int, stop: int, like: Tensor) -> Rope:
    """cos and sin of the rotation angles at positions `start` to `stop`: two (T, D/2).

    Angles and results are float32 numbers, found in Hugging Face's order, whatever the model's dtype. Power, sine and
    cosine are float64's, rounded: float32's differ in the last bit from machine to machine, and far into a text that
    is an angle.
    """
    D = config.head_dim
    exponents = torch.arange(0, D, 2, dtype=torch.float32, device=like.device) / D
    frequencies = 1.0 / (config.rope_theta ** exponents.double()).float()  # (D/2)
    if config.rope_scaling is not None:
        rule = config.rope_scaling
        turns = rule.original_max_position_embeddings * frequencies / (2 * math.pi)
        keep = (turns - rule.low_freq_factor) / (rule.high_freq_factor - rule.low_freq_factor)
        keep = keep.clamp(0, 1)  # 1: as trained, 0: slowed down by the whole factor
        frequencies = keep * frequencies + (1 - keep) * frequencies / rule.factor
    positions = torch.arange(start, stop, dtype=torch.float32, device=like.device)
    angles = torch.outer(positions, frequencies).double()  # (T, D/2)
    return angles.cos().float().to(like.dtype), angles.sin().float().to(like.dtype)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """RoPE in Hugging Face's layout: dimension i is paired with i + D/2."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)  # (B, H, T, D/2) each
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
