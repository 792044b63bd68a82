"""SeCO and SpaCO through blocks of layers: a longer text on the same device, for some more work.

A step is a grid, layers by chunks. seco.py goes through it chunk by chunk, with all layers at a time. Here the layers
are cut too. The text goes up through one block of layers after the other, and of each block only its input is kept.
Then it goes down: each block is a SeCO of its own, whose last layer is given a gradient instead of a loss, and hands
one to the block below. So what grows with the text is the memory of one block, and a hidden state of each token for
every block, which may wait in host memory. One layer at a time is the order of StreamBP (arXiv 2506.03077).
"""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batch import Batch, Objective
from .chunks import Chunk, groups, span
from .errors import InputError
from .loss import loss_of_chunk
from .objective import Scores, weigh
from .protocol import Memory, Model, Options, Written, relay

Kept = Sequence[tuple[Chunk, tuple[float, float]]]  # chunks, each with the factors on its loss and on its relay


def through_blocks(
    model: Any, batch: Batch, chunks: Sequence[Chunk], kept: Kept, options: Options, layers_at_once: int | None,
    offload: bool, objective: Objective | None = None,
) -> Tensor:  # fmt: skip
    """Add to `.grad` what `spaco` adds if it keeps these chunks, and `seco` with all of them; return the loss.

    model: a `protocol.LayeredModel`. layers_at_once, offload: see `seco`. Raises InputError.
    """
    size = 1 if layers_at_once is None else layers_at_once
    if size < 1:
        raise InputError(f"layers_at_once is {size}, but must be at least 1")
    if not hasattr(model, "blocks"):
        raise InputError(f"layers_at_once and offload need blocks: {type(model).__name__} has no method blocks")
    blocks: Sequence[Model] = model.blocks(size)
    first, (B, _), device = first_that_learns(blocks), batch.input_ids.shape, batch.input_ids.device
    seen = [chunk for chunk in chunks if kept and chunk <= kept[-1][0]]  # no kept chunk reads what comes after
    walk = Walk(model, batch, seen if objective is None else chunks, kept, options)
    copies = torch.cuda.Stream(device) if offload and device.type == "cuda" else None
    inputs = [Hidden(device, offload, copies) for _ in blocks]
    inputs[0].keep(walk.chunks, batch.input_ids[:, span(walk.chunks)])
    for i, block in enumerate(blocks[:-1]):
        walk.go_up(block, block.new_memory(B, walk.chunks[-1].stop, (), options), inputs[i], inputs[i + 1])
        if i < first:  # nothing learns there, so nobody comes back
            inputs[i].parts.clear()
    if objective is not None:
        scores = Scores(model, batch)
        walk.go_up(blocks[-1], blocks[-1].new_memory(B, chunks[-1].stop, (), options), inputs[-1], scores)
        batch, value = weigh(objective, batch, scores.log_probs())
        if not kept:
            return value
        walk = Walk(model, batch, seen, kept, options)
    total, gradients = torch.zeros((), device=device), None
    for i in reversed(range(first, len(blocks))):
        memory = blocks[i].new_memory(B, seen[-1].start, [chunk for chunk, _ in kept[:-1]], options)
        total = total + walk.go_down(blocks[i], memory, inputs[i], gradients, learns_below=i > first)
        del memory  # before the next block has one
        gradients = inputs.pop()
    return total if objective is None else value


def first_that_learns(blocks: Sequence[Model]) -> int:
    """The number of the first block with a parameter that requires a gradient."""
    return next(i for i, block in enumerate(blocks) if any(p.requires_grad for p in block.parameters()))


class Walk(NamedTuple):
    """Through one block of the model after the other; kept: of the chunks, those that are rebuilt."""

    model: Model
    batch: Batch
    chunks: Sequence[Chunk]
    kept: Kept
    options: Options

    @torch.no_grad()
    def go_up(self, block: Model, memory: Memory, x: "Hidden", y: "Hidden | Scores") -> None:
        passes = [*groups(self.chunks[:-1], self.options.fill_size), self.chunks[-1:]]
        for group, part in zip(passes, x.bring(passes), strict=True):
            out, written = block.run(part, memory, group, self.options)
            memory.write(group, written)
            y.keep(group, out)
            del part, out, written

    def go_down(
        self, block: Model, memory: Memory, x: "Hidden", gradients: "Hidden | None", learns_below: bool
    ) -> Tensor:
        """SeCO or SpaCO of the block. In the place of its inputs x come their gradients, if anything learns below.
        gradients: of its outputs; None for the last block, which has the loss instead. Returns that, or 0."""
        passes = groups([*filter(self.options.documents.remembered, self.chunks[:-1])], self.options.fill_size)
        for group, part in zip(passes, x.bring(passes), strict=True):  # lines 1-3
            memory.write(group, block.fill(part, memory, group, self.options))
            del part
        back = [[chunk] for chunk, _ in reversed(self.kept)]
        ends = repeat(None) if gradients is None else gradients.bring(back)
        total = torch.zeros((), device=x.device)
        for (chunk, (on_loss, on_relay)), part, grad in zip(reversed(self.kept), x.bring(back), ends, strict=False):
            end, written = block.run(part.requires_grad_(learns_below), memory, [chunk], self.options)  # line 5
            if grad is None:
                end = on_loss * loss_of_chunk(end, self.model.lm_head.weight, self.batch, chunk)
                total = total + end.detach()
            made, received = relay(written, memory.hand_over(chunk))  # line 6
            torch.autograd.backward([end, *made], [grad, *(on_relay * g for g in received)])  # line 7
            if part.grad is not None:
                x.keep([chunk], part.grad)
            del part, grad, end, written, made, received  # or they would live on beside the next chunk's
        return total


class Hidden:
    """What goes from one block to the next, a tensor (B, C, E) of each chunk: hidden states on the way up; on the way
    down, in their place, the gradients of the loss by them. Into the first block go the tokens (B, C).

    offload: they wait in host memory. On a GPU they are copied by `copies`, a stream beside the computation.
    """

    def __init__(self, device: torch.device, offload: bool, copies: torch.cuda.Stream | None) -> None:
        self.device, self.copies = device, copies
        self.room = host_like if offload else torch.empty_like
        self.parts: dict[Chunk, Tensor] = {}

    def keep(self, chunks: Sequence[Chunk], x: Tensor) -> None:
        """What belongs to these adjacent chunks, (B, C, E)."""
        if self.copies is not None:
            self.copies.wait_stream(torch.cuda.current_stream(self.device))
            x.record_stream(self.copies)
        with torch.cuda.stream(self.copies):
            parts = x.detach().split([stop - start for start, stop in chunks], dim=1)
            for chunk, part in zip(chunks, parts, strict=True):
                if chunk not in self.parts:
                    self.parts[chunk] = self.room(part)
                self.parts[chunk].copy_(part, non_blocking=True)

    def bring(self, order: Sequence[Sequence[Chunk]]) -> Iterator[Tensor]:
        """On the device, of some adjacent chunks after others; the next ones are copied while these are at work."""
        coming = deque[tuple[Tensor, torch.cuda.Event | None]]()
        for chunks in order:
            coming.append(self.start(chunks))
            if len(coming) > 1:
                yield self.arrived(*coming.popleft())
        if coming:
            yield self.arrived(*coming.popleft())

    def start(self, chunks: Sequence[Chunk]) -> tuple[Tensor, torch.cuda.Event | None]:
        """A copy for the device, and what tells when it is done."""
        with torch.cuda.stream(self.copies):
            x = torch.cat([self.parts[chunk].to(self.device, non_blocking=True) for chunk in chunks], dim=1)
        return x, None if self.copies is None else self.copies.record_event()

    def arrived(self, x: Tensor, copied: torch.cuda.Event | None) -> Tensor:
        """For the computation, which waits until the copy is done."""
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)
            x.record_stream(torch.cuda.current_stream(self.device))
        return x


def host_like(x: Tensor) -> Tensor:
    """Room for x in host memory, pinned where x is on a GPU."""
    return torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.is_cuda)


class WithGraphs:
    """A model some of whose chunks have been run already: `run` returns what that returned. All else is the model's."""

    def __init__(self, model: Model, built: dict[Chunk, tuple[Tensor, Written]]) -> None:
        self.model, self.built = model, built

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def run(self, input_ids: Tensor, memory: Any, chunks: Sequence[Chunk], options: Options) -> tuple[Tensor, Written]:
        """See protocol.Model; a graph is given away, so that it goes with its backward."""
        built = self.built.pop(chunks[0], None)
        return self.model.run(input_ids, memory, chunks, options) if built is None else built


def fill_with_graphs(model: Model, input_ids: Tensor, chunks: Sequence[Chunk], memory: Memory, options: Options) -> Any:
    """Lines 1-3 for the last chunks of the fill, and line 5 for them already. Returns a model to rebuild them with."""
    built = {}
    for chunk in chunks:
        hidden, written = model.run(input_ids[:, span([chunk])], memory, [chunk], options)
        memory.write([chunk], [tuple(tensor.detach() for tensor in layer) for layer in written])
        built[chunk] = hidden, written
    return WithGraphs(model, built)


def check_graphs(graphs: int, **others: object) -> None:
    """Raise InputError for a number that cannot be, and for what does not go together with graphs that are kept."""
    if graphs < 0:
        raise InputError(f"graphs is {graphs}, but must be at least 0")
    if graphs and (given := [name for name, value in others.items() if value]):
        raise InputError(f"graphs is {graphs}, but is not supported together with {given[0]}: leave one of them out")
