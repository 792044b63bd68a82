"""The rules that stretch rotary positions (RoPE) to texts longer than a model was trained on.

RoPE turns the numbers of a query or a key in pairs, each by the angle position · frequency. A config.json names its
rule as `rope_type`, with the fields of a class of RULES beside it. All of them compute what transformers computes.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import InputError
from .config import Config, LlamaConfig
from .llama import periods as periods_of


@dataclass(frozen=True)
class RopeRule(Config):
    """As first published. partial_rotary_factor: the part of a head that is turned, its first numbers."""

    partial_rotary_factor: float = field(default=1.0, kw_only=True)

    def check(self, config: LlamaConfig) -> None:
        """Raise InputError unless the rule fits the model's heads."""
        if self.partial_rotary_factor > 1 or self.turned(config) < 4:
            part = f"partial_rotary_factor is {self.partial_rotary_factor} and head_dim {config.head_dim}"
            raise InputError(f"config: {part}, but must be at most 1, and turn 4 numbers of a head at least")

    def turned(self, config: LlamaConfig) -> int:
        """How many numbers of a head are."""
        return int(config.head_dim * self.partial_rotary_factor)

    def frequencies(self, periods: Tensor, config: LlamaConfig, whole: Tensor | None) -> Tensor:
        """Radians to a position of each pair, float32 (D/2), which are 1 / periods as first published.

        whole: see rope_tables; InputError where it is needed and None.
        """
        return 1.0 / periods

    def scale(self) -> float:
        """What cos and sin are multiplied by."""
        return 1.0


@dataclass(frozen=True)
class Linear(RopeRule):
    factor: float

    def frequencies(self, periods: Tensor, config: LlamaConfig, whole: Tensor | None) -> Tensor:
        return 1.0 / periods / self.factor


@dataclass(frozen=True)
class Dynamic(RopeRule):
    factor: float

    def frequencies(self, periods: Tensor, config: LlamaConfig, whole: Tensor | None) -> Tensor:
        size, context = self.turned(config), config.max_position_embeddings
        longer = length(whole).clamp(min=context).double() / context
        theta = config.rope_theta * (self.factor * longer - (self.factor - 1)) ** (size / (size - 2))
        return 1.0 / periods_of(size, theta, periods)


@dataclass(frozen=True)
class Yarn(RopeRule):
    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def frequencies(self, periods: Tensor, config: LlamaConfig, whole: Tensor | None) -> Tensor:
        size = self.turned(config)

        def pair(turns: float) -> float:
            """The number of the pair, not rounded, that turns so often within the old context."""
            within = math.log(self.original_max_position_embeddings / (turns * 2 * math.pi))
            return size * within / (2 * math.log(config.rope_theta))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        pairs = torch.arange(len(periods), dtype=torch.float32, device=periods.device)
        keep = 1 - ((pairs - low) / (high - low or 0.001)).clamp(0, 1)  # 1: as trained, 0: slowed by the whole factor
        return 1.0 / (self.factor * periods) * (1 - keep) + 1.0 / periods * keep

    def scale(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        grows = 0.1 * math.log(max(self.factor, 1.0))
        if self.mscale is None or self.mscale_all_dim is None:
            return grows + 1.0
        return (grows * self.mscale + 1.0) / (grows * self.mscale_all_dim + 1.0)


@dataclass(frozen=True)
class LongRope(RopeRule):
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    factor: float
    attention_factor: float | None = None

    def check(self, config: LlamaConfig) -> None:
        super().check(config)
        pairs = (self.turned(config) + 1) // 2
        for name, given in (("short_factor", self.short_factor), ("long_factor", self.long_factor)):
            if len(given) != pairs:
                raise InputError(f"config: {name} has {len(given)} numbers, but must have {pairs}, one for each pair")

    def frequencies(self, periods: Tensor, config: LlamaConfig, whole: Tensor | None) -> Tensor:
        factors = torch.tensor((self.short_factor, self.long_factor), dtype=torch.float32, device=periods.device)
        is_long = length(whole) > self.original_max_position_embeddings
        return 1.0 / (torch.where(is_long, factors[1], factors[0]) * periods)

    def scale(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1 + math.log(max(self.factor, 1.0)) / math.log(self.original_max_position_embeddings))


@dataclass(frozen=True)
class Llama3Rope(RopeRule):
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def check(self, config: LlamaConfig) -> None:
        super().check(config)
        if self.high_freq_factor <= self.low_freq_factor:
            raise InputError(f"config: high_freq_factor is {self.high_freq_factor}, but must be above low_freq_factor")

    def frequencies(self, periods: Tensor, config: LlamaConfig, whole: Tensor | None) -> Tensor:
        frequencies = 1.0 / periods
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        keep = keep.clamp(0, 1)  # 1: as trained, 0: slowed down by the whole factor
        return keep * frequencies + (1 - keep) * frequencies / self.factor


@dataclass(frozen=True)
class Proportional(RopeRule):
    """partial_rotary_factor: of all pairs of a head, those are turned that turn fastest."""

    factor: float = 1.0

    def turned(self, config: LlamaConfig) -> int:
        return config.head_dim

    def frequencies(self, periods: Tensor, config: LlamaConfig, whole: Tensor | None) -> Tensor:
        frequencies = 1.0 / periods
        frequencies[int(self.partial_rotary_factor * config.head_dim // 2) :] = 0
        return frequencies / self.factor


def length(whole: Tensor | None) -> Tensor:
    """Of the text with these positions: a number of the whole text, so that all of its chunks follow one rule."""
    if whole is None:
        what = "this rope_type (dynamic or longrope) depends on the length of the whole text"
        raise InputError(f"{what}, and this call runs a part of it: say the text's positions, Options(positions=…)")
    return whole.max() + 1


RULES: dict[str, type[RopeRule]] = {
    "default": RopeRule,  # RoFormer, arXiv 2104.09864
    "linear": Linear,  # position interpolation, arXiv 2306.15595
    "dynamic": Dynamic,  # a theta that grows with the text, "dynamic NTK": in YaRN's paper, arXiv 2309.00071
    "yarn": Yarn,  # arXiv 2309.00071; mscale is DeepSeek-V2's, arXiv 2405.04434
    "longrope": LongRope,  # arXiv 2402.13753
    "llama3": Llama3Rope,  # Llama 3.1; The Llama 3 Herd of Models, arXiv 2407.21783
    "proportional": Proportional,  # p-RoPE: Round and Round We Go!, arXiv 2410.06205
}
