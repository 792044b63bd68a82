"""The training loop: batches, gradient, optimizer. Its state is tensors and a step number, so a resume is exact."""

import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files.documents import Document, collate, step_documents
from ..models.stack import Stack
from .ranks import Ranks

# Knuth's multiplier: 2^32 divided by the golden ratio. The products of small numbers with it are far apart in 32 bits.
GOLDEN_RATIO_HASH = 2_654_435_769
# Adds the gradient of the mean loss of (model, input_ids, labels), given num_targets and a generator.
Gradient = Callable[[Stack, Tensor, Tensor, int, torch.Generator], Tensor]


@dataclass(frozen=True)
class Schedule:
    """AdamW's settings: linear warm-up to `lr`, then a cosine down to a tenth of it."""

    steps: int
    lr: float
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float = 1.0

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


@contextmanager
def deterministic_kernels(on: bool) -> Iterator[None]:
    """Within the block, if `on`, PyTorch takes kernels that give the same bits in every run (the CPU's always do)."""
    before = torch.are_deterministic_algorithms_enabled()
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient is not a finite number; the message names step and document."""


class Trainer:
    """Runs single steps. A step depends on the weights, the optimizer's state and its number only.

    All randomness of a batch comes from (seed, step, number of the batch), so that a resumed run repeats an
    uninterrupted one bit for bit, and a batch is the same on whatever copy of a pipeline. Parameters in half precision
    are trained through float32 copies of them.

    model: or a `PipelineStage`, on all processes that train together.
    """

    def __init__(
        self,
        model: Any,
        documents: Sequence[Document],
        gradient: Gradient,
        schedule: Schedule,
        batch_size: int = 1,
        accumulate: int = 1,
        seed: int = 0,
    ) -> None:
        self.model, self.documents, self.gradient, self.schedule = model, documents, gradient, schedule
        self.batch_size, self.accumulate, self.seed, self.ranks = batch_size, accumulate, seed, Ranks(model)
        self.step = 0  # steps done
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.device = next(model.parameters()).device
        self.parameters = named
        self.masters = {
            name: nn.Parameter(p.detach().float()) if p.dtype.itemsize < 4 else p for name, p in named.items()
        }
        self.optimizer = torch.optim.AdamW(
            [{"params": list(self.masters.values())}],  # there may be none: a rank on which nothing learns
            lr=schedule.lr,
            betas=(0.9, 0.95),
            weight_decay=schedule.weight_decay,
            fused=self.device.type == "cuda",
        )

    def run_step(self) -> dict[str, float]:
        """Do one step; returns loss (nats per token), gradient norm, learning rate, tokens, seconds.

        Raises NonFiniteLoss before anything is changed.
        """
        began = time.perf_counter()
        per_step, size = self.batch_size * self.accumulate, self.batch_size
        chosen = step_documents(self.documents, per_step, self.step, self.seed)
        batches = [chosen[start : start + size] for start in range(0, per_step, size)]
        num_targets = sum(document.num_targets() for document in chosen)
        losses = []
        for number, batch in self.ranks.mine(batches):
            # PyTorch's generator on the CPU takes the low 32 bits of a seed, in which each batch has to differ.
            seed = self.seed * 1_000_003 + self.step + number * GOLDEN_RATIO_HASH
            torch.manual_seed(seed)  # dropout
            generator = torch.Generator().manual_seed(seed)  # the sampler
            input_ids, labels = collate(batch, self.device)
            losses.append((number, self.gradient(self.model, input_ids, labels, num_targets, generator)))
        norm = self._collect_gradients()
        of_copies = self.ranks.everyones([(number, float(loss)) for number, loss in losses])
        by_number = dict(pair for copy in of_copies for pair in copy)
        loss = sum(by_number[number] for number in range(len(batches)))
        if not math.isfinite(loss) or not math.isfinite(norm):
            self._refuse(batches, by_number)
        lr = self.schedule.lr_at(self.step)
        self._update(lr)
        self.step += 1
        done = {"step": self.step, "loss": loss, "grad_norm": norm, "lr": lr, "tokens": sum(map(len, chosen))}
        return {**done, "seconds": time.perf_counter() - began}

    def _collect_gradients(self) -> float:
        """Move the gradients to the masters, clip them, and return their norm before clipping."""
        grads = {}
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            # A SpaCO step may keep nothing, a copy may have no batch: the gradient is then zero, not absent.
            grad = torch.zeros_like(master) if parameter.grad is None else parameter.grad.to(master.dtype)
            parameter.grad = None
            self.ranks.add_copies(grad)
            grads[name] = master.grad = grad
        total = self.ranks.norm(grads)
        if self.schedule.clip > 0:
            nn.utils.clip_grads_with_norm_(self.masters.values(), self.schedule.clip, total.to(self.device))
        return float(total)

    def _update(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if self.masters[name] is not parameter:
                    parameter.copy_(self.masters[name])

    def _refuse(self, batches: list[list[Document]], losses: Mapping[int, float]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        bad = [batches[number] for number, loss in losses.items() if not math.isfinite(loss)]
        what = "loss" if bad else "gradient"
        names = "; ".join(document.name for batch in (bad or batches) for document in batch)
        raise NonFiniteLoss(f"the {what} is not a finite number at step {self.step + 1} ({names})")

    def state(self) -> dict[str, Tensor]:
        """All that a resume needs of this rank: weights, AdamW's two moments and step count, by parameter name."""
        tensors = {}
        for name, master in self.masters.items():
            if name not in self.ranks.twice:
                tensors[f"weight.{name}"] = master.detach()
                for key, value in self.optimizer.state[master].items():
                    tensors[f"{key}.{name}"] = value
        return tensors

    def load_state(self, keys: Collection[str], read: Callable[[str], Tensor], step: int) -> None:
        """Continue from the `state()` of all ranks after `step` steps. Raises InputError if it is of another model.

        keys: of the tensors that there are. read: one of them; a rank reads only its own.
        """
        names = {self.ranks.twice.get(name, name): name for name in self.masters}
        expected = set[str]().union(*self.ranks.everyones(set(names)))
        if odd := sorted(expected ^ {key.removeprefix("weight.") for key in keys if key.startswith("weight.")}):
            raise InputError(f"the checkpoint does not fit the model: weight.{odd[0]} differs")
        self.step = step
        for stored, name in names.items():
            master, weight = self.masters[name], read(f"weight.{stored}")
            if weight.shape != master.shape:
                raise InputError(f"the checkpoint does not fit the model: weight.{stored} differs")
            with torch.no_grad():
                master.copy_(weight)
                self.parameters[name].copy_(master)
            # AdamW keeps its step count on the CPU unless it is fused.
            self.optimizer.state[master] = {
                key: read(f"{key}.{stored}").to("cpu" if key == "step" and self.device.type == "cpu" else self.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{key}.{stored}" in keys
            }
