"""What is known about mistakes in exercise 5, SeCO and SpaCO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import minichunk as mc
from minichunk.batch import prepare
from minichunk.chunks import Chunk, cut
from minichunk.protocol import DEFAULTS, flat
from minichunk.seco import fill, new_memory, rebuild

from ..diagnose import Values, close, compare, hint, require, within
from ..toy_llama import CHUNK_SIZE, batch, tiny_llama
from .common import RELAY, SKIPPED, Graphs, check_loss_value, check_nothing_kept, check_walk

Entries = Sequence[mc.Weight | None]
# Of the number of targets and, for a kept chunk, its factors, its share of the mean loss, and what was sent back to it.
# Returns what is backpropagated instead: the loss, and what is handed to the chunk.
Change = Callable[[int, mc.Weight, Tensor, list[Tensor]], tuple[Tensor, list[Tensor]]]
KEYS_AND_VALUES = (
    "can be implicitly created only for scalar outputs",
    "Its memory is here a list of keys and values, `written`: which list holds the gradients that belong to them?",
)


def _gradients(model: mc.Llama) -> Values:
    require(any(p.grad is not None for p in model.parameters()), "No parameter of the model has received a gradient.")
    return {
        f"the gradient of {name}": torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }


def _walk(input_ids: Tensor, labels: Tensor, entries: Entries, change: Change) -> Values:
    """The gradient of the walk with a mistake in it."""
    model, chunks = tiny_llama(), cut(input_ids.shape[1], CHUNK_SIZE)
    batch = prepare(model, input_ids, labels, None)
    kept = [(i, weight) for i, weight in enumerate(entries) if weight is not None]
    memory = new_memory(model, input_ids, [chunks[i] for i, _ in kept], DEFAULTS)
    fill(model, input_ids, chunks[: kept[-1][0]], memory, DEFAULTS)
    for i, weight in reversed(kept):
        loss, written, received = rebuild(model, batch, chunks[i], memory, DEFAULTS)
        loss, received = change(int(batch.num_targets), weight, loss, received)
        torch.autograd.backward([loss, *written], [None, *received])
    return _gradients(model)


class _Watch:
    """Sees which chunks of a model are filled and rebuilt, and objects where a loop goes astray."""

    def __init__(self, model: mc.Llama, chunks: list[Chunk], kept: list[int]) -> None:
        self.kept = kept
        self.filled: set[int] = set()
        self.rebuilt: list[int] = []
        self.graphs = Graphs()
        new_memory, run, fill = model.new_memory, model.run, model.fill

        def watched_new_memory(batch: int, capacity: int, receiving: Sequence[Chunk], options: Any) -> Any:
            *others, last = (chunks[i] for i in kept)
            require(
                capacity == last.start and list(receiving) == others,
                f"new_memory has to be told which chunks will be rebuilt, in order: here the chunks {kept}. It makes "
                "room for what lies before the last of them, and for the gradients sent back to the others, and for no "
                "more. (If you named these, has `cut` been given another length than the text's?)",
            )
            return new_memory(batch, capacity, receiving, options)

        def watched_fill(input_ids: Tensor, memory: Any, group: Sequence[Chunk], options: Any) -> Any:
            for i in map(chunks.index, group):
                require(
                    i < kept[-1],
                    f"The fill writes chunk {i}, but the memory needs only what lies before the last chunk to be "
                    f"rebuilt, chunk {kept[-1]}. Does anybody look at chunk {i}?",
                )
                self.filled.add(i)
            return fill(input_ids, memory, group, options)

        def watched_run(input_ids: Tensor, memory: Any, group: Sequence[Chunk], options: Any) -> Any:
            j = chunks.index(group[0])
            require(j in kept, SKIPPED.format(j))
            for i in sorted({*range(j)} - self.filled):
                raise AssertionError(
                    f"Chunk {j} was rebuilt, but chunk {i} had not been filled: chunk {j} looks at keys and values "
                    "that nobody wrote. Which chunks must the fill write, skipped ones included?"
                )
            self.rebuilt.append(j)
            hidden, written = run(input_ids, memory, group, options)
            self.graphs.see(j, [hidden, *flat(written)])
            return hidden, written

        # Once for each backward call: every chunk looks up its embeddings.
        model.model.embed_tokens.weight.register_hook(lambda grad: self.graphs.backwards.update(self.rebuilt[-1:]))
        model.new_memory, model.run, model.fill = watched_new_memory, watched_run, watched_fill


SECO_MISTAKES: dict[str, Change] = {
    "The gradient of every chunk is missing what later chunks sent back, as if the memory were constant (truncated "
    f"backpropagation): {RELAY} To which tensors do the gradients in `received` belong?": lambda n, w, loss, got: (
        loss,
        [0 * g for g in got],
    ),
    "The loss is not divided by the number of targets: the gradient is too large by that factor. "
    "By which number does rebuild divide, and who has told it?": lambda n, w, loss, got: (n * loss, got),
    "The loss is divided by the number of targets a second time. What rebuild returns is divided already: what do "
    "the chunks' shares of the mean add up to?": lambda n, w, loss, got: (loss / n, got),
}


SPACO_MISTAKES: dict[str, Change] = {
    "The loss is not scaled, as in Algorithm 2 as printed: a chain through one chunk survives only sometimes, too. "
    "Where does weight.loss go?": lambda n, w, loss, got: (loss, [w.relay * g for g in got]),
    "What was received is not scaled. Where does weight.relay go?": (lambda n, w, loss, got: (w.loss * loss, got)),
    "What was received is scaled by weight.loss, but it has a factor of its own. Which one is "
    "it?": lambda n, w, loss, got: (w.loss * loss, [w.loss * g for g in got]),
}


def _check_step(step: Any, oracle: Any, T: int, entries: Entries, mistakes: dict[str, Change]) -> mc.Llama:
    """One step of a method; returns the model with what it has left in the gradients."""
    input_ids, labels = batch(T)
    model, right = tiny_llama(), tiny_llama()
    loss = oracle(right, input_ids, labels)
    watch = _Watch(model, cut(T, CHUNK_SIZE), [i for i, entry in enumerate(entries) if entry is not None])
    with hint(*KEYS_AND_VALUES):
        total = step(model, input_ids, labels)
    check_walk(watch.rebuilt, watch.kept)
    known = ((words, _walk(input_ids, labels, entries, change)) for words, change in mistakes.items())
    compare(_gradients(model), _gradients(right), known)
    check_loss_value(total, loss[None])
    watch.graphs.check()
    return model


@within("seco")
def _check_seco(module: ModuleType) -> None:
    def step(model: mc.Llama, input_ids: Tensor, labels: Tensor) -> Tensor:
        return module.seco(model, input_ids, labels, CHUNK_SIZE)

    model = _check_step(step, mc.full, 11, [mc.Weight(1.0, 1.0)] * 4, SECO_MISTAKES)  # chunks of 3, 3, 3 and 2
    once = {name: grad.clone() for name, grad in _gradients(model).items()}
    step(model, *batch(11))
    added = all(close(grad, 2 * once[name]) for name, grad in _gradients(model).items())
    require(added, "A second step must add its gradient to .grad, for gradient accumulation. Is it overwritten?")


@within("spaco")
def _check_spaco(module: ModuleType) -> None:
    entries = [mc.Weight(2.0, 3.0), None, mc.Weight(1.5, 2.5), mc.Weight(4.0, 1.25), None]

    def step(model: mc.Llama, input_ids: Tensor, labels: Tensor, entries: Entries = entries) -> Tensor:
        return module.spaco(model, input_ids, labels, CHUNK_SIZE, entries)

    def oracle(model: mc.Llama, input_ids: Tensor, labels: Tensor) -> Tensor:
        return mc.spaco(model, input_ids, labels, CHUNK_SIZE, sampler=lambda num_chunks, generator: entries)

    _check_step(step, oracle, 15, entries, SPACO_MISTAKES)
    model = tiny_llama()
    words = "This was a draw that keeps no chunk at all, which happens with coins. What is there to do then?"
    with hint("out of range", words):
        total = step(model, *batch(15), [None] * len(entries))
    check_nothing_kept(total, [p.grad for p in model.parameters()])


def check_seco(module: ModuleType) -> None:
    """seco against ordinary backpropagation, then spaco for some draws."""
    _check_seco(module)
    _check_spaco(module)
