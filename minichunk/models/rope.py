"""The rules that stretch rotary positions (RoPE) to texts longer than a model was trained on.
RoPE turns the numbers of a query or a key in pairs, each by the angle position · frequency. A config.json names its
rule as `rope_type`, with the rule's numbers beside it. All of them compute what transformers computes."""

import math
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import InputError
from .config import Config, LlamaConfig, needed
from .llama import periods as periods_of

OLD = "original_max_position_embeddings"
RULES: dict[str, tuple[str, ...]] = {  # by name, the fields that it needs
    "default": (),  # RoFormer, arXiv 2104.09864
    "linear": ("factor",),  # position interpolation, arXiv 2306.15595
    "dynamic": ("factor",),  # a theta that grows with the text, "dynamic NTK": in YaRN's paper, arXiv 2309.00071
    "yarn": ("factor", OLD),  # arXiv 2309.00071; mscale is DeepSeek-V2's, arXiv 2405.04434
    "longrope": ("short_factor", "long_factor", "factor", OLD),  # arXiv 2402.13753
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", OLD),  # Llama 3.1, arXiv 2407.21783
    "proportional": (),  # p-RoPE: Round and Round We Go!, arXiv 2410.06205
}


@dataclass(frozen=True)
class RopeRule(Config):
    """One of RULES, and the fields of all of them, as config.json calls them. partial_rotary_factor: the part of a head
    that is turned, its first numbers; if proportional, the part of all pairs that is, those that turn fastest."""

    rope_type: str = "default"
    partial_rotary_factor: float = 1.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    original_max_position_embeddings: int = 2048
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """From the object that config.json has. Raises InputError for a field that is missing or wrong."""
        needs = {name: needed(config, name) for name in RULES[config["rope_type"]]}
        said = {each.name: config[each.name] for each in fields(cls) if config.get(each.name) is not None}
        return cls(**said | needs)

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads back: what the rule needs, and what is not as it is by default."""
        needs = ("rope_type", *RULES[self.rope_type])
        said = {name for name, value in vars(self).items() if name in needs or value != getattr(RopeRule, name)}
        return {name: value for name, value in super().to_dict().items() if name in said}

    def check(self, config: LlamaConfig) -> None:
        """Raise InputError unless the rule fits the model's heads."""
        turned = self.turned(config)
        if self.partial_rotary_factor > 1 or turned < 4:
            part = f"partial_rotary_factor is {self.partial_rotary_factor} and head_dim {config.head_dim}"
            raise InputError(f"config: {part}, but must be at most 1, and turn 4 numbers of a head at least")
        for name in ("short_factor", "long_factor") if self.rope_type == "longrope" else ():
            if (given := len(getattr(self, name))) != (pairs := (turned + 1) // 2):
                raise InputError(f"config: {name} has {given} numbers, but must have {pairs}, one for each pair")
        if self.high_freq_factor <= self.low_freq_factor:
            raise InputError(f"config: high_freq_factor is {self.high_freq_factor}, but must be above low_freq_factor")

    def turned(self, config: LlamaConfig) -> int:
        """How many numbers of a head are."""
        part = 1.0 if self.rope_type == "proportional" else self.partial_rotary_factor
        return int(config.head_dim * part)

    def frequencies(self, config: LlamaConfig, like: Tensor, whole: Tensor | None) -> tuple[Tensor, float]:
        """Radians to a position of each pair, float32 (D/2), on like's device; and what cos and sin are multiplied by.
        whole: see rope_tables; InputError where the rule needs it and it is None."""
        size, theta, old = self.turned(config), config.rope_theta, self.original_max_position_embeddings
        periods = periods_of(size, theta, like)
        found, scale, factor = 1.0 / periods, 1.0, self.factor
        match self.rope_type:
            case "linear":
                found = found / factor
            case "dynamic":
                context = config.max_position_embeddings
                longer = length(whole).clamp(min=context).double() / context
                found = 1.0 / periods_of(size, theta * (factor * longer - (factor - 1)) ** (size / (size - 2)), like)
            case "yarn":
                # The numbers of the pairs, not rounded, that turn so often within the old context.
                often = (math.log(old / (turns * 2 * math.pi)) for turns in (self.beta_fast, self.beta_slow))
                low, high = (size * turns / (2 * math.log(theta)) for turns in often)
                if self.truncate:
                    low, high = math.floor(low), math.ceil(high)
                low, high = max(low, 0), min(high, size - 1)
                pairs = torch.arange(len(periods), dtype=torch.float32, device=like.device)
                keep = 1 - ((pairs - low) / (high - low or 0.001)).clamp(0, 1)  # 1: as trained, 0: slowed by factor
                found = 1.0 / (factor * periods) * (1 - keep) + found * keep
                grows = 0.1 * math.log(max(factor, 1.0))
                scale = grows + 1.0
                if self.mscale is not None and self.mscale_all_dim is not None:
                    scale = (grows * self.mscale + 1.0) / (grows * self.mscale_all_dim + 1.0)
            case "longrope":
                factors = torch.tensor((self.short_factor, self.long_factor), dtype=torch.float32, device=like.device)
                found = 1.0 / (torch.where(length(whole) > old, factors[1], factors[0]) * periods)
                scale = math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(old))
            case "llama3":
                turns = old * found / (2 * math.pi)
                keep = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
                found = keep * found + (1 - keep) * found / factor
            case "proportional":
                found[int(self.partial_rotary_factor * size // 2) :] = 0
                found = found / factor
        if self.rope_type in ("yarn", "longrope") and self.attention_factor is not None:
            scale = self.attention_factor
        return found, scale


def length(whole: Tensor | None) -> Tensor:
    """Of the text with these positions: a number of the whole text, so that all of its chunks follow one rule."""
    if whole is None:
        what = "this rope_type (dynamic or longrope) depends on the length of the whole text"
        raise InputError(f"{what}: say its positions, Options(positions=…), and give each document a row of its own")
    return whole.max() + 1
