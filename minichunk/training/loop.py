"""The training loop: batches, gradient, optimizer. Its state is tensors and a step number, so a resume is exact."""

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files.documents import Document, Pair, step_documents
from ..models.quantize import count_parameters
from ..pipeline.stage import PipelineStage
from .preferences import averages

GOLDEN_RATIO_HASH = 2_654_435_769  # Knuth's multiplier: products of small numbers with it are far apart in 32 bits
# Adds the gradient of (model or stage, a batch's documents or pairs), given the step's num_targets and a generator.
# Returns the batch's share of the loss; of pairs followed by `Compared.measures`, see preferences.py.
Gradient = Callable[[Any, Sequence[Any], int, torch.Generator], Tensor]


@dataclass(frozen=True)
class Schedule:
    """AdamW's settings: linear warm-up to `lr`, then a cosine down to a tenth of it."""

    steps: int
    lr: float
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float = 1.0

    def lr_at(self, step: int) -> float:
        """Of a step, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


class Ranks:
    """The processes that train a model: several copies of a pipeline if it is a `PipelineStage`, else this one alone.
    All of them call everything here at a time."""

    def __init__(self, model: Any) -> None:
        stage = model if isinstance(model, PipelineStage) else None
        self.part = model
        self.model: Any = model if stage is None else stage.model  # as it is saved
        self.links = None if stage is None else stage.links
        self.twice = {} if stage is None else stage.twice  # parameters that another rank has too
        self.copy, self.copies = (0, 1) if self.links is None else (self.links.copy, self.links.copies)
        self.is_first = self.links is None or (self.links.is_first and self.copy == 0)  # it speaks and writes the files

    def mine(self, of_all: Sequence[Any]) -> list[tuple[int, Any]]:
        """What this copy works on, with its number."""
        return list(enumerate(of_all))[self.copy :: self.copies]

    def once(self, named: dict[str, Any]) -> dict[str, Any]:
        """Of what each rank has by a parameter's name, what counts here, so that each parameter counts once."""
        return {name: x for name, x in named.items() if name not in self.twice}

    def everyones(self, mine: Any, of_all: bool = True) -> list[Any]:
        """What each process says, a picklable object; of this pipeline, or `of_all`."""
        return [mine] if self.links is None else self.links.everyones(mine, of_all)

    def add(self, x: Tensor, of_all: bool = True) -> None:
        """Add to x, in place, those of all processes (on the CPU), or only those of the other copies."""
        if self.links is not None:
            self.links.add(x, None if of_all else self.links.copies_of_me)

    def norm(self, named: dict[str, Any]) -> Tensor:
        """Of all ranks' tensors together; on the CPU."""
        norms = [torch.linalg.vector_norm(x) for x in self.once(named).values()]
        here = torch.stack(norms).cpu() if norms else torch.zeros(0)
        return torch.linalg.vector_norm(torch.cat(self.everyones(here, of_all=False)))

    def whole(self, named: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """The tensors of all ranks by name, on the first process, whose host has room for them; None on the others."""
        if self.links is None:
            return named
        return self.links.to_first(self.once(named)) if self.copy == 0 else None

    def count_parameters(self) -> tuple[int, int]:
        """How many numbers the model has on all ranks together, and how many of them learn."""
        named = dict(self.part.named_parameters())
        total = count_parameters(self.part) - sum(p.numel() for name, p in named.items() if name in self.twice)
        learnt = sum(p.numel() for p in self.once(named).values() if p.requires_grad)
        totals, trained = zip(*self.everyones((total, learnt), of_all=False), strict=True)
        return sum(totals), sum(trained)

    def describe(self) -> str:
        """The processes in words; empty for one alone."""
        layers = self.everyones(len(self.part.layers), of_all=False)
        over = f"over {len(layers)} ranks with {', '.join(map(str, layers))} layers" if len(layers) > 1 else ""
        return ", each ".join(filter(None, [f"{self.copies} copies" if self.copies > 1 else "", over]))


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient is not a finite number; the message names step and document."""


class Trainer:
    """Runs single steps. A step depends on the weights, the optimizer's state and its number only.

    All randomness of a batch comes from (seed, step, number of the batch): a resumed run repeats an uninterrupted one
    bit for bit. Parameters in half precision are trained through float32 copies of them.
    model: or a `PipelineStage`, on all processes that train together.
    """

    def __init__(
        self, model: Any, documents: Sequence[Document | Pair], gradient: Gradient, schedule: Schedule,
        batch_size: int = 1, accumulate: int = 1, seed: int = 0,
    ) -> None:  # fmt: skip
        self.model, self.documents, self.gradient, self.schedule = model, documents, gradient, schedule
        self.batch_size, self.accumulate, self.seed, self.ranks = batch_size, accumulate, seed, Ranks(model)
        self.step = 0  # steps done
        self.device = next(model.parameters()).device
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        wide = {name: nn.Parameter(p.detach().float()) for name, p in self.parameters.items() if p.dtype.itemsize < 4}
        self.masters = self.parameters | wide
        groups = [{"params": list(self.masters.values())}]  # there may be none: a rank on which nothing learns
        decay, fused = schedule.weight_decay, self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, schedule.lr, (0.9, 0.95), weight_decay=decay, fused=fused)

    def run_step(self) -> dict[str, Any]:
        """Do one step; returns loss (nats per token, or an objective's), gradient norm, learning rate, tokens, seconds.

        Raises NonFiniteLoss before anything is changed.
        """
        began, size = time.perf_counter(), self.batch_size
        chosen = step_documents(self.documents, size * self.accumulate, self.step, self.seed)
        batches = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        num_targets = sum(document.num_targets() for document in chosen)
        found = {}
        for number, batch in self.ranks.mine(batches):
            # PyTorch's generator on the CPU takes the low 32 bits of a seed, in which each batch has to differ.
            seed = self.seed * 1_000_003 + self.step + number * GOLDEN_RATIO_HASH
            torch.manual_seed(seed)  # dropout
            generator = torch.Generator().manual_seed(seed)  # the sampler
            found[number] = self.gradient(self.model, batch, num_targets, generator).reshape(-1).tolist()
        norm = self._collect_gradients()
        of_all = {n: numbers for copy in self.ranks.everyones(found) for n, numbers in copy.items()}
        losses = [of_all[n][0] for n in sorted(of_all)]
        if not math.isfinite(sum(losses)) or not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            bad = [batch for batch, loss in zip(batches, losses, strict=True) if not math.isfinite(loss)]
            names = "; ".join(document.name for batch in bad or batches for document in batch)
            where = f"the {'loss' if bad else 'gradient'} is not a finite number at step {self.step + 1}"
            raise NonFiniteLoss(f"{where} ({names}): try a lower --lr")
        self.optimizer.param_groups[0]["lr"] = lr = self.schedule.lr_at(self.step)
        self._update()
        self.step += 1
        done = {"step": self.step, "loss": sum(losses), "grad_norm": norm, "lr": lr, "tokens": sum(map(len, chosen))}
        return {**done, **averages([of_all[n][1:] for n in sorted(of_all)]), "seconds": time.perf_counter() - began}

    def _collect_gradients(self) -> float:
        """Move the gradients to the masters, clip them, and return their norm before clipping."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            # A SpaCO step may keep nothing, a copy may have no batch: the gradient is then zero, not absent.
            grad = torch.zeros_like(master) if parameter.grad is None else parameter.grad.to(master.dtype)
            parameter.grad = None
            self.ranks.add(grad, of_all=False)
            master.grad = grad
        total = self.ranks.norm({name: master.grad for name, master in self.masters.items()})
        if self.schedule.clip > 0:
            nn.utils.clip_grads_with_norm_(self.masters.values(), self.schedule.clip, total.to(self.device))
        return float(total)

    @torch.no_grad()
    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def state(self) -> dict[str, Tensor]:
        """All that a resume needs of this rank: weights, AdamW's two moments and step count, by parameter name."""
        return {
            f"{key}.{name}": value
            for name, master in self.ranks.once(self.masters).items()
            for key, value in {"weight": master.detach(), **self.optimizer.state[master]}.items()
        }

    @torch.no_grad()
    def load_state(self, keys: Collection[str], read: Callable[[str], Tensor], step: int) -> None:
        """Continue from the `state()` of all ranks after `step` steps. Raises InputError if it is of another model.

        keys: of the tensors that there are. read: one of them; a rank reads only its own.
        """
        names = {self.ranks.twice.get(name, name): name for name in self.masters}
        expected = {f"weight.{name}" for each in self.ranks.everyones(set(names)) for name in each}
        if odd := sorted(expected ^ {key for key in keys if key.startswith("weight.")}):
            raise InputError(f"the checkpoint does not fit the model: {odd[0]} differs")
        self.step = step
        for stored, name in names.items():
            master, weight = self.masters[name], read(f"weight.{stored}")
            if weight.shape != master.shape:
                raise InputError(f"the checkpoint does not fit the model: weight.{stored} differs")
            self.parameters[name].copy_(master.copy_(weight))
            there = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{stored}" in keys]
            self.optimizer.state[master] = {key: read(f"{key}.{stored}").to(self.device) for key in there}
