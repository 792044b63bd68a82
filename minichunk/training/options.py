"""What a training run is told: one dataclass, checked before anything is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

import torch

from ..chunks import Chunk, cut
from ..errors import InputError
from ..files.shipped import SHIPPED_MODEL
from ..memory.pattern import Pattern
from ..pipeline.start import started
from ..samplers import Bernoulli, FixedBudget, PaperBudget, most_kept
from ..spaco import Sampler
from .checks import check_4bit, check_choice, check_device, check_least
from .partial_options import make_pattern, pattern_options

T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
METHODS = ("seco", "spaco", "full")
SAMPLERS = ("bernoulli", "fixed", "paper")


def default_dtype(device: str) -> str:
    """The name of the dtype that a model has on this device unless told otherwise."""
    return "bfloat16" if device.startswith("cuda") else "float32"


def known(value: T | None) -> T:
    """Not None: `TrainOptions.resolved` has filled it in."""
    assert value is not None
    return value


@dataclass(frozen=True)
class TrainOptions:
    """Options of `minichunk train`; `minichunk train --help` says what each means. None: chosen for the case."""

    model: str | None = None
    data: tuple[str, ...] = ()
    val_data: tuple[str, ...] = ()
    val_fraction: float = 0.1
    eval_documents: int = 8
    chat_template: bool = True
    method: Literal["seco", "spaco", "full"] = "seco"
    seq_len: int = 2048
    chunk_size: int = 256
    fill_size: int | None = None
    budget: int | None = None
    sampler: Literal["bernoulli", "fixed", "paper"] = "bernoulli"
    cap: float | None = None
    recompute: bool | None = None
    recompute_attention: bool = False
    cache_grad_dtype: str | None = None
    offload: bool = False
    partial_context: str | None = None
    window: int | None = None
    sinks: int | None = None
    block: int | None = None
    local: int | None = None
    stride: int | None = None
    full_layers: tuple[int, ...] | None = None
    deterministic: bool = False
    steps: int = 60
    batch_size: int = 1
    accumulate: int | None = None
    pipeline: int | None = None
    timeout: float = 7200.0
    lr: float | None = None
    warmup: int | None = None
    weight_decay: float = 0.0
    clip: float = 1.0
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | None = None
    dropout: float = 0.0
    load_in_4bit: bool = False
    dtype: str | None = None
    device: str | None = None
    seed: int = 0
    save_every: int = 20
    output: str | None = None

    def resolved(self) -> TrainOptions:
        """Check every value and fill in those that are None. Raises InputError."""
        self._check()
        device = check_device(self.device)
        num_chunks = len(cut(self.seq_len, self.chunk_size))
        pipeline, copies = self._processes()
        return replace(
            self,
            model=self.model or str(SHIPPED_MODEL),
            device=device,
            dtype=self.dtype or default_dtype(device),
            lr=self.lr if self.lr is not None else self._default_lr(),
            warmup=self.warmup if self.warmup is not None else self.steps // 10,
            pipeline=pipeline,
            accumulate=self.accumulate or copies,
            budget=self.budget or (max(1, num_chunks // 4) if self.method == "spaco" else None),
            **pattern_options(self.partial_context, vars(self)),
        )

    def pattern(self) -> Pattern | None:
        """What the layers of `--partial-context` see."""
        return make_pattern(self.partial_context, vars(self))

    def _processes(self) -> tuple[int, int]:
        """Processes that share the layers, and how many copies there are of such a pipeline."""
        world = started().world
        if self.pipeline is None and world > 1:
            raise InputError(
                f"torchrun has started {world} processes: say with --pipeline how many of them share the layers "
                f"({world}: all of them; 1: each has all layers, and documents of its own)"
            )
        ranks = self.pipeline or 1
        if world == 1 and ranks > 1:
            raise InputError(
                f"--pipeline {ranks} needs {ranks} processes: torchrun --nproc-per-node {ranks} -m minichunk train "
                f"--pipeline {ranks} …"
            )
        if world % ranks:
            raise InputError(f"--pipeline is {ranks}, but must divide the {world} processes that torchrun has started")
        if self.method == "full" and ranks > 1:
            raise InputError("--method full has no pipeline: take seco or spaco, or --pipeline 1")
        if self.accumulate is not None and self.accumulate < world // ranks:
            raise InputError(
                f"--accumulate is {self.accumulate}, but {world // ranks} copies of the model need a batch each in a "
                f"step: at least {world // ranks} of them, or fewer processes"
            )
        return ranks, world // ranks

    def _default_lr(self) -> float:
        if self.rank == 0:
            return 2e-5
        return 4e-3 if self.model is None else 3e-4  # a model of 3 million parameters takes larger steps

    def _check(self) -> None:
        choices = {"method": METHODS, "sampler": SAMPLERS, "dtype": DTYPES, "cache_grad_dtype": DTYPES}
        for name, allowed in choices.items():
            check_choice(name, getattr(self, name), allowed)
        least = {
            "seq_len": 2, "chunk_size": 1, "fill_size": self.chunk_size, "budget": 1, "steps": 1, "batch_size": 1,
            "accumulate": 1, "pipeline": 1, "rank": 0, "save_every": 1, "eval_documents": 0, "warmup": 0, "seed": 0,
        }  # fmt: skip
        check_least({name: (getattr(self, name), bound) for name, bound in least.items()})
        for name, value in (("lr", self.lr), ("cap", self.cap), ("alpha", self.alpha), ("timeout", self.timeout)):
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"--{name} is {value}, but must be a number above 0")
        for name, value in (("weight-decay", self.weight_decay), ("clip", self.clip)):
            if not 0 <= value < float("inf"):
                raise InputError(f"--{name} is {value}, but must be a number of at least 0")
        for name, value in (("dropout", self.dropout), ("val-fraction", self.val_fraction)):
            if not 0 <= value < 1:
                raise InputError(f"--{name} is {value}, but must be at least 0 and below 1")
        given = self.budget is not None or self.cap is not None or self.sampler != "bernoulli"
        if self.method != "spaco" and given:
            raise InputError(f"--budget, --sampler and --cap belong to --method spaco, not to {self.method}")
        chunked = [
            name for name in ("fill_size", "cache_grad_dtype", "offload", "recompute_attention") if getattr(self, name)
        ]
        if self.recompute is False and self.recompute_attention:
            raise InputError("--recompute-attention is a kind of --recompute: leave out --no-recompute")
        if self.method == "full" and chunked:
            raise InputError(f"--{chunked[0].replace('_', '-')} belongs to --method seco and spaco, not to full")
        check_4bit(self.load_in_4bit, self.rank)
        if self.seed >= 2**32:
            raise InputError(f"--seed is {self.seed}, but must be below 2^32")
        if self.cap is not None and self.sampler != "paper":
            raise InputError("--cap belongs to --sampler paper")

    def most_kept(self) -> list[Chunk]:
        """The most chunks of a piece that a step backpropagates: as many, at the end of it."""
        chunks = cut(self.seq_len, self.chunk_size)
        return chunks[-most_kept(self.sampler, self.budget, len(chunks)) :] if self.budget is not None else chunks

    def make_sampler(self) -> Sampler:
        """The sampler of `--sampler` and `--budget`; Bernoulli keeps `budget` chunks on average."""
        budget = self.budget
        assert budget is not None
        if self.sampler == "fixed":
            return FixedBudget(budget)
        if self.sampler == "paper":
            return PaperBudget(budget, self.cap)
        return lambda num_chunks, generator: Bernoulli(min(1, budget / num_chunks))(num_chunks, generator)

    def to_dict(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainOptions:
        arguments: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
        options = cls(**arguments)
        for name, default in cls().to_dict().items():
            value = getattr(options, name)
            wanted = (int, float) if isinstance(default, float) else type(default)
            if default is not None and not isinstance(value, list | tuple) and not isinstance(value, wanted):
                raise TypeError(f"{name} is {value!r}")
        return options
