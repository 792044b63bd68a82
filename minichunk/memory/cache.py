"""Keys and values: what chunks leave behind in attention layers, and the gradients that are sent back to them.

Room for keys and values is there from the start. Chunks are written into it and read from it as views, and the
gradients that later chunks send back are added in place, so that the past is never copied.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..chunks import Chunk
from .attention import Past
from .kernels import Kernel
from .layer_memory import MemoryUse

Span = tuple[int, int]  # positions: (start, stop)


class Rows:
    """Rows of a buffer for some spans of positions, in order; spans that touch or overlap become one.

    spans: (start, stop, row of the first position). count: the rows of all of them.
    """

    def __init__(self, spans: Iterable[Span]) -> None:
        self.spans: list[tuple[int, int, int]] = []
        self.count = 0
        for start, stop in sorted(spans):
            if self.spans and start <= self.spans[-1][1]:
                start, before, self.count = self.spans.pop()
                stop = max(stop, before)
            if start < stop:
                self.spans.append((start, stop, self.count))
                self.count += stop - start

    def of(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(start, stop, row of the first position) of what has rows among these positions."""
        for first, last, row in self.spans:
            low, high = max(start, first), min(stop, last)
            if low < high:
                yield low, high, row + low - first


class LayerCache:
    """One layer's keys and values of up to `capacity` positions, (B, G, capacity, D); see LayerMemory.

    shape: (B, G, capacity, D). like: a tensor of the model's dtype, on its device.
    receiving: the chunks that later ones send gradients to. Only they have room for them: key_grads and value_grads
    (B, G, rows, D), of `grad_dtype`.
    kernel: of the attention; None: the best one for the device and dtype.
    """

    kernel: Kernel | None = None

    def __init__(
        self, shape: tuple[int, int, int, int], receiving: Sequence[Chunk], like: Tensor, grad_dtype: torch.dtype
    ) -> None:
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self.rows = Rows(receiving)
        room = (*shape[:2], self.rows.count, shape[3])
        self.key_grads, self.value_grads = (like.new_zeros(room, dtype=grad_dtype) for _ in range(2))

    def past(self, chunks: Sequence[Chunk], save: bool) -> Past:
        return Past(self, chunks[0].start, save, self.kernel)

    def write(self, chunks: Sequence[Chunk], written: tuple[Tensor, ...]) -> None:
        here = slice(chunks[0].start, chunks[-1].stop)
        self.keys[:, :, here], self.values[:, :, here] = written  # (B, G, C, D) each

    def blocks(self, stop: int, size: int | None) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(position, keys, values) of what comes before `stop`, at most `size` positions at a time; None: any number.

        keys, values: (B, G, n, D) with n at least 1, from that position on.
        """
        for start in range(0, stop, size or stop or 1):
            here = slice(start, min(start + size, stop) if size else stop)
            yield start, self.keys[:, :, here], self.values[:, :, here]

    def add_grads(self, position: int, key_grads: Tensor, value_grads: Tensor) -> None:
        """Add the gradients (B, G, n, D) that a later chunk sends back to the n positions from that one."""
        for start, stop, row in self.rows.of(position, position + key_grads.shape[2]):
            here, sent = slice(row, row + stop - start), slice(start - position, stop - position)
            self.key_grads[:, :, here] += key_grads[:, :, sent]
            self.value_grads[:, :, here] += value_grads[:, :, sent]

    def hand_over(self, chunk: Chunk) -> tuple[Tensor, ...]:
        ((start, stop, row),) = self.rows.of(*chunk)
        here = slice(row, row + stop - start)
        return tuple(grads[:, :, here].to(self.keys.dtype) for grads in (self.key_grads, self.value_grads))

    def tensors(self) -> MemoryUse:
        return MemoryUse([self.keys, self.values], [self.key_grads, self.value_grads])
