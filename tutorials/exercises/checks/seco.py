"""What is known about mistakes in exercise 5, SeCO and SpaCO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

import minichunk as mc
from minichunk.batch import prepare, shift
from minichunk.chunks import Chunk, cut
from minichunk.memory.layer_memory import LayerMemories
from minichunk.protocol import DEFAULTS, Options, Written
from minichunk.seco import fill, flat, new_memory, rebuild

from ..diagnose import Mistakes, Values, close, compare, hint, require, within
from .common import (
    CHUNK_SIZE,
    IGNORE,
    RELAY,
    SKIPPED,
    Graphs,
    all_edges,
    batch,
    check_loss_value,
    check_walk,
    tiny_llama,
)

KEYS_AND_VALUES = (
    "can be implicitly created only for scalar outputs",
    "Its memory is here a list of keys and values, `written`: which list holds the gradients that belong to them?",
)
NOBODY = (
    "list index out of range",
    "new_memory has to be told which chunks will be rebuilt: it makes room for what lies before the last of them, "
    "and for the gradients sent back to the others. Which are they?",
)
Hand = Callable[[list[Tensor], list[Tensor]], list[Tensor]]  # of what is relayed, and the chunk's own keys and values


def _gradients(model: mc.Llama) -> Values:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    require(bool(found), "No parameter of the model has received a gradient.")
    return {
        f"the gradient of {name}": torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }


def _walk(
    input_ids: Tensor,
    labels: Tensor,
    kept: list[int],
    loss_factor: Tensor,
    relay_factor: Tensor,
    hand: Hand = lambda relayed, written: relayed,
    targets: Tensor | None = None,
) -> Values:
    """The gradient when chunk j's share of the mean loss is multiplied by loss_factor[j], and what j sends to i by
    relay_factor[i, j].

    hand: what is handed over instead of what is to be relayed. targets: instead of those that belong to the labels.
    """
    model = tiny_llama()
    batch = prepare(model, input_ids, labels, None)
    if targets is not None:
        batch = batch._replace(targets=targets)
    chunks = cut(input_ids.shape[1], CHUNK_SIZE)
    memory = new_memory(model, input_ids, [chunks[i] for i in kept], DEFAULTS)
    fill(model, input_ids, chunks[: kept[-1]], memory, DEFAULTS)

    def received(i: int) -> list[Tensor]:
        layers = memory.layers if i < kept[-1] else []  # asked as often as we like, which the memory itself refuses
        return [g.clone() for layer in layers for g in layer.hand_over(chunks[i])]

    relayed = {i: received(i) for i in kept}  # nothing so far
    for n, j in reversed(list(enumerate(kept))):
        before = {i: received(i) for i in kept[:n]}
        loss, written, _ = rebuild(model, batch, chunks[j], memory, DEFAULTS)
        torch.autograd.backward([loss * loss_factor[j], *written], [None, *hand(relayed[j], written)])
        for i, old in before.items():
            sent = [now - then for now, then in zip(received(i), old, strict=True)]
            relayed[i] = [a + relay_factor[i, j] * b for a, b in zip(relayed[i], sent, strict=True)]
    return _gradients(model)


class _Spy:
    """Sees which chunks of a model are filled and rebuilt, and objects where a loop goes astray."""

    def __init__(self, model: mc.Llama, chunks: list[Chunk], kept: list[int]) -> None:
        self.chunks, self.kept, self.last = chunks, kept, kept[-1]
        self.filled: set[int] = set()
        self.rebuilt: list[int] = []
        self.told: set[Chunk] = set()  # the chunks for whose gradients a memory has room
        self.graphs = Graphs()
        new_memory, run, fill = model.new_memory, model.run, model.fill

        def spied_new_memory(
            batch: int, capacity: int, receiving: Sequence[Chunk] = (), options: Options = DEFAULTS
        ) -> LayerMemories:
            self._see_memory(capacity, receiving)
            return new_memory(batch, capacity, receiving, options)

        def spied_run(
            input_ids: Tensor, memory: LayerMemories, chunks: Sequence[Chunk], options: Options = DEFAULTS
        ) -> tuple[Tensor, Written]:
            self._see_rebuild(chunks[0])
            hidden, written = run(input_ids, memory, chunks, options)
            self.graphs.see(self.chunks.index(chunks[0]), [hidden, *flat(written)])
            return hidden, written

        def spied_fill(
            input_ids: Tensor, memory: LayerMemories, chunks: Sequence[Chunk], options: Options = DEFAULTS
        ) -> Written:
            self._see_fill(chunks)
            return fill(input_ids, memory, chunks, options)

        # Once for each backward call: every chunk looks up its embeddings.
        model.model.embed_tokens.weight.register_hook(lambda grad: self.graphs.see_backward(self.rebuilt[-1]))
        model.new_memory = spied_new_memory  # type: ignore[method-assign]
        model.run, model.fill = spied_run, spied_fill  # type: ignore[method-assign, assignment]

    def _number(self, chunk: Chunk) -> int:
        require(chunk in self.chunks, f"{chunk} is none of the chunks that cut(length, chunk_size) makes.")
        return self.chunks.index(chunk)

    def _see_memory(self, capacity: int, receiving: Sequence[Chunk]) -> None:
        self.told.update(receiving)
        self.capacity = capacity
        for chunk in receiving:
            self._number(chunk)
        require(
            capacity == 0 or capacity in [chunk.start for chunk in self.chunks],
            f"new_memory was told of a chunk that begins at {capacity}, where none of the chunks does that cut(length, "
            "chunk_size) makes. Which length is that of the text?",
        )
        require(
            capacity >= self.chunks[self.last].start,
            "The memory ends before the last chunk that is rebuilt: new_memory makes room for all that lies before the "
            "last chunk you name to it. Is the last chunk not rebuilt, or has `cut` been given another length than the "
            "text's?",
        )

    def check_told(self) -> None:
        """The memory has room for what is sent back to each kept chunk but the last."""
        for i in self.kept[:-1]:
            require(
                self.chunks[i] in self.told,
                f"new_memory was not told of chunk {i}, which is rebuilt: there is no room for what later chunks send "
                "back to it, and so it is lost. Which chunks will be rebuilt?",
            )

    def _see_fill(self, chunks: Sequence[Chunk]) -> None:
        for i in map(self._number, chunks):
            skipped = self.capacity > self.chunks[self.last].start
            require(
                i < self.last or not skipped,
                f"{SKIPPED.format(self.chunks.index(self._ends()))} (Even with factors of 0: new_memory has been told "
                "of it, and the fill goes up to it. Which of the entries are None?)",
            )
            require(
                i < self.last,
                f"The fill writes chunk {i}, for which the memory has no room: it holds what lies before the last "
                f"chunk to be rebuilt, chunk {self.last}. Does anybody look at chunk {i}?",
            )
            self.filled.add(i)

    def _ends(self) -> Chunk:
        """The chunk before which the memory ends."""
        return next(chunk for chunk in self.chunks if chunk.start >= self.capacity)

    def _see_rebuild(self, chunk: Chunk) -> None:
        j = self._number(chunk)
        require(j in self.kept, SKIPPED.format(j))
        for i in sorted({*range(j)} - self.filled):
            raise AssertionError(
                f"Chunk {j} was rebuilt, but chunk {i} had not been filled: chunk {j} looks at keys and "
                "values that nobody wrote. Which chunks must the fill write, skipped ones included?"
            )
        self.rebuilt.append(j)


def _chunk_losses(input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss and number of targets of each chunk, by ordinary inference."""
    model = tiny_llama()
    targets = prepare(model, input_ids, labels, None).targets
    with torch.no_grad():
        logits = model(input_ids)
    losses = F.cross_entropy(logits.mT, targets, ignore_index=IGNORE, reduction="none").sum(0)
    counts = (targets != IGNORE).sum(0)
    return tuple(torch.stack([part.sum() for part in x.split(CHUNK_SIZE)]) for x in (losses, counts))


def check_seco(module: ModuleType) -> None:
    """seco against ordinary backpropagation, then spaco for some draws."""
    _check_seco(module)
    _check_spaco(module)


def _seco_mistakes(input_ids: Tensor, labels: Tensor, counts: Tensor) -> Mistakes:
    k, n, positions = len(counts), int(counts.sum()), input_ids.numel()
    every, loss, relay = list(range(k)), torch.ones(k).double(), torch.ones(k, k).double()

    def walk(loss: Tensor, relay: Tensor) -> Values:
        return _walk(input_ids, labels, every, loss, relay)

    undivided, per_chunk = n * loss, n / counts.double()
    targets = shift(labels)
    yield (
        "The gradient of every chunk is missing what later chunks sent back, as if the memory were constant (truncated "
        f"backpropagation): {RELAY} To which tensors do the gradients in `received` belong?",
        walk(loss, 0 * relay),
    )
    yield (
        "The labels are not shifted: each position would predict itself. prepare has shifted them: where are they?",
        _walk(
            input_ids, labels, every, (targets != IGNORE).sum() / (labels != IGNORE).sum() * loss, relay, targets=labels
        ),
    )
    yield (
        "The labels are not shifted: each position would predict itself. prepare has shifted them: where are they?",
        _walk(input_ids, labels, every, loss, relay, targets=labels),
    )
    yield (
        "The labels are shifted twice: each position would predict the one after the next. prepare shifts them: which "
        "labels does it want?",
        _walk(input_ids, targets, every, loss, relay),
    )
    yield (
        "What was received counts twice. How often does each of `written` stand in the list that backward starts from, "
        "and is there a factor on its gradient?",
        walk(loss, 2 * relay),
    )
    yield (
        "What was received is handed over in another order than `written` has. The two lists belong together, entry by "
        "entry: keys and values of layer 0, of layer 1, …",
        _walk(input_ids, labels, every, loss, relay, lambda relayed, written: relayed[::-1]),
    )
    yield (
        "Keys and values were given themselves as their gradient. What later chunks have sent back to them is not "
        "their value: which list holds it?",
        _walk(input_ids, labels, every, loss, relay, lambda relayed, written: [m.detach() for m in written]),
    )
    yield (
        "Keys and values were given ones as their gradient, as in a sum over them. What have later chunks sent back?",
        _walk(input_ids, labels, every, loss, relay, lambda relayed, written: [torch.ones_like(m) for m in written]),
    )
    yield (
        "What was received has the wrong sign.",
        walk(loss, -relay),
    )
    last = torch.zeros(k).double()
    last[-1] = 1
    yield (
        "Only the last chunk's loss is backpropagated. Where do the other chunks' losses come in?",
        walk(last, relay),
    )
    yield (
        f"The loss is not divided by the number of targets: the gradient is {n} times too large. "
        "By which number does rebuild divide, and who has told it?",
        walk(undivided, relay),
    )
    yield (
        "The gradient is that of the sum of the chunks' means. A chunk with few targets would weigh as much as one "
        "with many: by which number are all to be divided?",
        walk(per_chunk, relay),
    )
    yield (
        "The gradient is that of the mean of the chunks' means. A chunk with few targets would weigh as much as one "
        "with many: by which number are all to be divided?",
        walk(per_chunk / k, relay),
    )
    yield "The loss is divided by the number of chunks, not of targets.", walk(undivided / k, relay)
    yield (
        f"The loss is divided by the number of positions, {positions}. How many of them have a target?",
        walk(undivided / positions, relay),
    )
    yield (
        "The loss is divided by the number of targets a second time. What rebuild returns is divided already: what do "
        "the chunks' shares of the mean add up to?",
        walk(loss / n, relay),
    )
    yield (
        "The loss is divided by the number of chunks, but what rebuild returns is a share of the mean over all "
        "targets: what do the shares of all chunks add up to?",
        walk(loss / k, relay),
    )
    yield (
        "What was received is divided by the number of targets, too, but it came from a loss that was divided already. "
        "What is there left to divide?",
        walk(loss, relay / n),
    )
    yield (
        "What was received is divided by the number of targets, but the loss is not. Which of the two has to be?",
        walk(undivided, relay / n),
    )
    yield (
        "Both the loss and what was received are divided by the number of targets, but the loss that rebuild returns "
        "is divided already, and with it all that is sent back. What is there left to divide?",
        walk(loss / n, relay / n),
    )
    for i, j in sorted(all_edges(k)):
        cut_off = relay.clone()
        cut_off[i, j] = 0
        words = f"The gradient of chunk {i} is missing what chunk {j} sent back: {RELAY}"
        yield words, walk(loss, cut_off)
    for i in range(k):
        cut_off = relay.clone()
        cut_off[i] = 0
        words = f"The gradient of chunk {i} is missing all that later chunks sent back: {RELAY}"
        yield words, walk(loss, cut_off)
    yield (
        "Every chunk receives only what the very next chunk sent back. Does the memory's sum of gradients survive?",
        walk(loss, relay.triu(1).tril(1)),
    )


@within("seco")
def _check_seco(module: ModuleType) -> None:
    input_ids, labels = batch(11)  # chunks of 3, 3, 3 and 2
    losses, counts = _chunk_losses(input_ids, labels)
    chunks = cut(11, CHUNK_SIZE)
    model, oracle = tiny_llama(), tiny_llama()
    mc.full(oracle, input_ids, labels)
    spy = _Spy(model, chunks, list(range(len(chunks))))
    with hint(*KEYS_AND_VALUES), hint(*NOBODY):
        total = module.seco(model, input_ids, labels, CHUNK_SIZE)
    check_walk(spy.rebuilt, list(range(len(chunks))))
    spy.check_told()
    compare(_gradients(model), _gradients(oracle), _seco_mistakes(input_ids, labels, counts))
    spy.graphs.check_backwards()
    name = "the returned loss"
    n = counts.sum()
    mistakes = [
        ("The returned loss is the sum over all targets, not divided by their number.", {name: losses.sum()}),
        ("The returned loss is the mean of the chunks' means, not of all targets.", {name: (losses / counts).mean()}),
        (
            "The returned loss is the sum of the chunks' means, not the mean of all targets.",
            {name: (losses / counts).sum()},
        ),
        ("The returned loss is divided by the number of targets twice.", {name: losses.sum() / n / n}),
    ]
    check_loss_value(total, losses / n, mistakes)
    spy.graphs.check()

    right = _gradients(oracle)
    module.seco(model, input_ids, labels, CHUNK_SIZE)
    added = all(close(grad, 2 * right[name]) for name, grad in _gradients(model).items())
    require(added, "A second step must add its gradient to .grad, for gradient accumulation. Is it overwritten?")


def _spaco_mistakes(input_ids: Tensor, labels: Tensor, entries: Sequence[mc.Weight | None], counts: Tensor) -> Mistakes:
    k, n = len(entries), int(counts.sum())
    kept = [i for i, entry in enumerate(entries) if entry is not None]
    loss, relay = (torch.tensor([0.0 if e is None else e[which] for e in entries]).double() for which in (0, 1))
    ones, matrix = torch.ones(k).double(), torch.ones(k, k).double()
    receiver, by_loss = relay[:, None] * matrix, loss[:, None] * matrix

    def walk(loss: Tensor, relay: Tensor) -> Values:
        return _walk(input_ids, labels, kept, loss, relay)

    yield (
        "The loss is not scaled, as in Algorithm 2 as printed: a chain through one chunk survives only sometimes, too. "
        "Where does weight.loss go?",
        walk(ones, receiver),
    )
    yield (
        "What was received is scaled by weight.loss, but it has a factor of its own. Which one is it?",
        walk(loss, by_loss),
    )
    yield "What was received is not scaled. Where does weight.relay go?", walk(loss, matrix)
    yield (
        "What was received is scaled by both factors. The loss factor of the chunk where a chain starts is in it "
        "already: which factor is this hop's own?",
        walk(loss, receiver * by_loss),
    )
    yield "Neither the loss nor what was received is scaled. What are the entries' two factors for?", walk(ones, matrix)
    yield (
        "The gradient of every kept chunk is missing what later chunks sent back: " + RELAY,
        walk(loss, 0 * matrix),
    )
    yield "The two factors are swapped: weight.relay is on the loss, weight.loss on the relay.", walk(relay, by_loss)
    yield (
        "What is sent back is scaled by the relay factor of the chunk that sends it. Whose factor has to be on it: the "
        "sender's or the receiver's?",
        walk(loss, relay[None, :] * matrix),
    )
    yield "The loss is divided by weight.loss. A chunk that is rarely kept has to count more.", walk(1 / loss, receiver)
    yield (
        "What was received is divided by weight.relay. A chain that rarely survives has to count more.",
        walk(loss, 1 / relay[:, None] * matrix),
    )
    yield (
        "The loss is multiplied by weight.relay. The relay's factor is for what was received: which one is the loss's?",
        walk(relay, receiver),
    )
    yield (
        "Only what was kept is counted in the divisor: the loss is divided by the number of targets of the kept "
        "chunks. weight.loss makes up for the skipped ones already: whose targets are to be counted?",
        walk(loss * n / counts[kept].sum(), receiver),
    )
    yield (
        "What was received counts twice. Is there a factor on its gradient beside weight.relay?",
        walk(loss, 2 * receiver),
    )
    yield (
        "The loss is not divided by the number of targets of the whole batch.",
        walk(loss * n, receiver),
    )
    yield (
        "The loss is divided by the number of targets a second time: what rebuild returns is divided already.",
        walk(loss / n, receiver),
    )
    yield (
        "The loss is multiplied by weight.loss and by weight.relay. The relay's factor is for what was received.",
        walk(loss * relay, receiver),
    )


@within("spaco")
def _check_spaco(module: ModuleType) -> None:
    input_ids, labels = batch(15)
    losses, counts = _chunk_losses(input_ids, labels)
    chunks, n = cut(15, CHUNK_SIZE), counts.sum()
    entries = [mc.Weight(2.0, 3.0), None, mc.Weight(1.5, 2.5), mc.Weight(4.0, 1.25), None]
    kept = [0, 2, 3]
    model, oracle = tiny_llama(), tiny_llama()
    mc.spaco(oracle, input_ids, labels, CHUNK_SIZE, sampler=lambda num_chunks, generator: entries)
    spy = _Spy(model, chunks, kept)
    with hint(*KEYS_AND_VALUES):
        total = module.spaco(model, input_ids, labels, CHUNK_SIZE, entries)
    check_walk(spy.rebuilt, kept)
    require(
        spy.told <= {chunks[i] for i in kept},
        "new_memory was told of chunks that are skipped: it has set memory aside for gradients that nobody will fetch. "
        "Which chunks will be rebuilt?",
    )
    spy.check_told()
    compare(_gradients(model), _gradients(oracle), _spaco_mistakes(input_ids, labels, entries, counts))
    spy.graphs.check_backwards()
    factors = torch.tensor([entry.loss for entry in entries if entry is not None]).double()
    unscaled = {"the returned loss": losses[kept].sum() / n}
    words = "The returned loss is not scaled by weight.loss: on average it would be too small."
    check_loss_value(total, factors * losses[kept] / n, [(words, unscaled)])
    spy.graphs.check()

    model = tiny_llama()
    try:
        total = module.spaco(model, input_ids, labels, CHUNK_SIZE, [None] * len(chunks))
    except (IndexError, ValueError) as error:
        raise AssertionError(
            f"It stops with {type(error).__name__}, {error}, when the sampler keeps no chunk at all, which happens "
            "with coins. What is there to do then?"
        ) from error
    nothing = isinstance(total, Tensor | float | int) and float(total) == 0
    require(nothing, f"When no chunk is kept, the returned loss has to be 0, but it is {total}.")
    touched = any(p.grad is not None and p.grad.any() for p in model.parameters())
    require(not touched, "When no chunk is kept, the gradients must stay as they were.")
