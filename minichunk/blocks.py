"""SeCO and SpaCO through blocks of layers: a longer text on the same device, for some more work.

A step is a grid, layers by chunks. seco.py goes through it chunk by chunk, with all layers at a time: what the chunks
leave behind in *all* layers, and what is sent back to that, lives for the whole text. Here the layers are cut too. The
text goes up through one block of layers after the other, and of each block only its input is kept. Then it goes down:
each block is a SeCO of its own, whose last layer is given a gradient instead of a loss, and hands one to the block
below. So what grows with the text is the memory of one block, and a hidden state of each token for every block.

All layers at once is SeCO itself; one layer at a time is the order of StreamBP (arXiv 2506.03077).
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from .batch import Batch
from .chunks import Chunk, groups, span
from .errors import InputError
from .loss import summed_loss
from .protocol import Model, Options, relay

Kept = Sequence[tuple[Chunk, tuple[float, float]]]  # chunks, each with the factors on its loss and on its relay
LossOf = Callable[[Tensor, Chunk], Tensor]  # a chunk's share of the mean loss, of what the LM head is given


def through_blocks(
    model: Any, batch: Batch, chunks: Sequence[Chunk], kept: Kept, options: Options, layers_at_once: int | None,
    offload: bool,
) -> Tensor:  # fmt: skip
    """Add to `.grad` what `spaco` adds if it keeps these chunks, and `seco` with all of them; return the loss.

    model: a `protocol.LayeredModel`. layers_at_once, offload: see `seco`. Raises InputError.
    """
    size = 1 if layers_at_once is None else layers_at_once
    if size < 1:
        raise InputError(f"layers_at_once is {size}, but must be at least 1")
    if not hasattr(model, "blocks"):
        kind = type(model).__name__
        raise InputError(f"layers_at_once and offload need a model in blocks of layers: {kind} has no method blocks")
    blocks: Sequence[Model] = model.blocks(size)
    first = next(i for i, block in enumerate(blocks) if any(p.requires_grad for p in block.parameters()))
    chunks = [chunk for chunk in chunks if chunk <= kept[-1][0]]
    inputs = [Hidden(batch.input_ids, offload) for _ in blocks]
    inputs[0].keep(chunks, batch.input_ids[:, span(chunks)])
    for i, block in enumerate(blocks[:-1]):
        go_up(block, chunks, inputs[i], inputs[i + 1], options)
        if i < first:  # nothing learns there, so nobody comes back
            inputs[i].parts.clear()

    def loss_of(y: Tensor, chunk: Chunk) -> Tensor:
        return summed_loss(y, model.lm_head.weight, batch.targets[:, span([chunk])]) / batch.num_targets

    total, above = torch.zeros((), device=batch.input_ids.device), None
    for i in reversed(range(first, len(blocks))):
        total = total + go_down(blocks[i], chunks, kept, inputs[i], above, loss_of, i > first, options)
        above = inputs.pop()  # where the gradients are now
    return total


def go_up(block: Model, chunks: Sequence[Chunk], x: "Hidden", y: "Hidden", options: Options) -> None:
    """The outputs of all chunks from their inputs; what they leave behind in the block is forgotten."""
    memory, passes = block.new_memory(x.batch, chunks[-1].stop, (), options), groups(chunks, options.fill_size)
    for group, part in zip(passes, x.bring(passes), strict=True):
        with torch.no_grad():
            out, written = block.run(part, memory, group, options)
        memory.write(group, written)
        y.keep(group, out)
        del out, written


def go_down(
    block: Model, chunks: Sequence[Chunk], kept: Kept, hidden: "Hidden", above: "Hidden | None", loss_of: LossOf,
    learns_below: bool, options: Options,
) -> Tensor:  # fmt: skip
    """SeCO or SpaCO of one block, whose inputs give way to their gradients. Returns the loss; 0 below the last block.

    above: the gradients of the block's outputs; None: it is the last one, and `loss_of` makes losses of them.
    """
    memory = block.new_memory(hidden.batch, chunks[-1].start, [chunk for chunk, _ in kept[:-1]], options)
    passes = groups(chunks[:-1], options.fill_size)
    for group, x in zip(passes, hidden.bring(passes), strict=True):  # lines 1-3
        memory.write(group, block.fill(x, memory, group, options))
    total = torch.zeros((), device=hidden.device)
    walk = [[chunk] for chunk, _ in reversed(kept)]
    grads = repeat(None) if above is None else above.bring(walk)
    for (chunk, (on_loss, on_relay)), x, grad in zip(reversed(kept), hidden.bring(walk), grads, strict=False):  # line 4
        y, written = block.run(x.requires_grad_(learns_below), memory, [chunk], options)  # line 5
        if above is None:
            y = on_loss * loss_of(y, chunk)
            total = total + y.detach()
        made, received = relay(written, memory.hand_over(chunk))  # line 6
        torch.autograd.backward([y, *made], [grad, *(on_relay * g for g in received)])  # line 7
        if x.grad is not None:
            hidden.keep([chunk], x.grad)
        del x, y, grad, written, made, received  # or they would live on beside the next chunk's
    return total


class Hidden:
    """What goes from one block to the next, a tensor (B, C, E) of each chunk: hidden states on the way up; on the way
    down, in their place, the gradients of the loss by them. Into the first block go the tokens (B, C).

    offload: they wait in host memory. On CUDA that is pinned, and they are copied on one stream beside the computation,
    each copy after those before it.
    """

    def __init__(self, tokens: Tensor, offload: bool) -> None:
        self.batch, self.device = tokens.shape[0], tokens.device
        self.room = host_like if offload else torch.empty_like
        self.parts: dict[Chunk, Tensor] = {}

    def keep(self, chunks: Sequence[Chunk], x: Tensor) -> None:
        """What belongs to these adjacent chunks, (B, C, E)."""
        for chunk, part in zip(chunks, x.detach().split([stop - start for start, stop in chunks], dim=1), strict=True):
            if chunk not in self.parts:
                self.parts[chunk] = self.room(part)
            self.parts[chunk].copy_(part, non_blocking=True)

    def bring(self, order: Sequence[Sequence[Chunk]]) -> Iterator[Tensor]:
        """On the device, of some adjacent chunks after others; the next ones are copied while these are at work."""
        for chunks in order:
            yield torch.cat([self.parts[chunk].to(self.device, non_blocking=True) for chunk in chunks], dim=1)


def host_like(x: Tensor) -> Tensor:
    """Room for x in host memory, pinned where x is on a GPU."""
    return torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.is_cuda)
