"""States: what chunks hand on in recurrent layers, and the adjoints that come back.

A state is read by the next chunk alone, which hands on a state of its own. So what is sent back to a state, the loss's
derivative by it, is the adjoint state of adjoint sharding (arXiv 2501.00692), and a memory of one state per chunk is
all that grows with the length.

Part of a state passes through a chunk as it is, decayed by a factor that the fill knows, and the adjoint passes back by
the same factor: so the memory carries this part itself, and a chunk that is run again leaves it out. In SpaCO what
comes from the far past no longer needs all chunks on the way to be kept.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import ONE, Chunk, Documents
from ..errors import InputError
from .layer_memory import MemorySpec, MemoryUse

BLOCK = 32  # tokens of a scan: T · BLOCK · N products of gates in memory, T / BLOCK steps from block to block


class Before(NamedTuple):
    """What a recurrent layer sees of its memory: what was handed on to these chunks, and how long each of them is.

    begins: which of their tokens are the first ones of documents, to which nothing is handed on; (): it is one text.
    """

    states: tuple[Tensor, ...]
    lengths: Sequence[int]
    begins: Sequence[int] = ()


class Handed:
    """One tensor that chunks hand on: stores it at the start of every chunk that is rebuilt, and carries its adjoint.

    h_j is what chunk j is handed, and d_j how much of it is left in h_(j+1). A step:

    - *Fill*, first chunk to last: `before` answers h_j. `write` takes h_(j+1) and d_j. It stores h where a chunk begins
      that is rebuilt, and two products of decays: `through` it, and those `skipped` up to the next one that is rebuilt.
    - *Rebuild*, last chunk to first: `before` answers h_j as a leaf, whose `.grad` is what chunk j sends back.
    - *hand_over*, right after the rebuild: the loss's derivative by h_(j+1). That is `adjoint`, the derivative by what
      the next rebuilt chunk was handed, times `skipped`. Then `adjoint` passes chunk j, times `through`; what chunk j
      itself sends back is added when the chunk before it is rebuilt, for only then is its backward pass done.
    zero: h before position 0. decay: of the shape of the decays, which broadcast against it.
    """

    def __init__(self, zero: Tensor, decay: Tensor, spec: MemorySpec) -> None:
        # The last chunk that is rebuilt begins at `capacity`, and is not among the receiving ones.
        self.starts = sorted({spec.capacity, *(chunk.start for chunk in spec.receiving)})
        self.rows = {start: row for row, start in enumerate(self.starts)}
        self.states = zero.new_zeros(len(self.rows), *zero.shape)
        # 0 after a chunk that the fill leaves out, for a document ends with it: nothing passes.
        self.through, self.skipped = (decay.new_zeros(len(self.rows), *decay.shape) for _ in range(2))
        self.last = zero  # the fill: what the last chunk that was written has handed on
        self.decay = torch.ones_like(decay)  # the fill: of all chunks since the last one that is rebuilt
        self.read: dict[int, Tensor] = {}  # leaves, by row
        self.adjoint = zero

    def before(self, start: int) -> Tensor:
        if start not in self.rows:
            return self.last.detach()
        row = self.rows[start]
        h = self.states[row].data  # not `detach`: to write other rows while a graph lives is no change of this one
        if torch.is_grad_enabled():
            self._add_what_the_next_sent(row)  # now, so that its leaf can go
            if row > 0:  # there is a rebuilt chunk before it to hand the gradient to
                self.read[row] = h.requires_grad_()
        return h

    def _add_what_the_next_sent(self, row: int) -> None:
        """To the adjoint, from the leaf of the chunk after this row's, once its backward pass is done."""
        later = self.read.get(row + 1)
        if later is not None and later.grad is not None:
            self.adjoint = self.adjoint + later.grad
            del self.read[row + 1]

    def write(self, chunk: Chunk, value: Tensor, decay: Tensor) -> None:
        row = bisect_right(self.starts, chunk.start) - 1  # of the last chunk so far that is rebuilt
        if row >= 0:
            rebuilt = self.starts[row] == chunk.start
            self.skipped[row] = self.decay = torch.ones_like(decay) if rebuilt else self.decay * decay
            if rebuilt:
                self.through[row] = decay
        self.last = value
        if chunk.stop in self.rows:
            self.last = self.states[self.rows[chunk.stop]].copy_(value)

    def hand_over(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        row = self.rows[chunk.start]
        self._add_what_the_next_sent(row)
        received = self.adjoint * self.skipped[row]
        self.adjoint = received * self.through[row]
        return received, torch.zeros_like(self.decay)


class LayerState:
    """A recurrent layer's LayerMemory. What is written are, for each chunk, pairs of a tensor and its decay.

    Raises InputError for a trunk, whose state would have to be handed to several documents.
    """

    def __init__(self, handed: Sequence[Handed], documents: Documents = ONE) -> None:
        if documents.trunk:
            raise InputError("share is for full attention, but a layer has a state")
        self.handed, self.documents = handed, documents

    def past(self, chunks: Sequence[Chunk], save: bool) -> Before:
        (start, _), (_, stop), lengths = chunks[0], chunks[-1], [stop - start for start, stop in chunks]
        here = self.documents.between(start, stop) if self.documents.starts else []
        begins = [begin - start for begin, _ in here if begin >= start]
        return Before(tuple(part.before(start) for part in self.handed), lengths, begins)

    def write(self, chunks: Sequence[Chunk], written: tuple[Tensor, ...]) -> None:
        pairs = zip(written[::2], written[1::2], strict=True)
        for (chunk, part), pair in zip(product(chunks, self.handed), pairs, strict=True):
            part.write(chunk, *pair)

    def hand_over(self, chunk: Chunk) -> tuple[Tensor, ...]:
        return tuple(tensor for part in self.handed for tensor in part.hand_over(chunk))

    def tensors(self) -> MemoryUse:
        return MemoryUse([x for part in self.handed for x in (part.states, part.through, part.skipped)], [])


def scan_chunks(
    x: Tensor, log_a: Tensor, b: Tensor, c: Tensor, h: Tensor, past: Before
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """`scan` over adjacent chunks: y, and for each chunk the state after it and what is left in it of the one before,
    by which no gradient passes: the memory carries it. Where a document begins, the gate is closed."""
    outputs, written = [], []
    if past.begins:
        log_a = log_a.index_fill(-2, torch.tensor(past.begins, device=log_a.device), -torch.inf)
    parts = (z.split(list(past.lengths), dim=-2) for z in (x, log_a, b, c))
    for x, log_a, b, c in zip(*parts, strict=True):
        y, end = scan(x, log_a, b, c, h)
        decay = log_a.detach().sum(-2, keepdim=True).exp()  # (…, 1, N)
        outputs.append(y)
        written.append((end - decay * (h - h.detach()), decay))
        h = end
    return torch.cat(outputs, dim=-2), written


def scan(x: Tensor, log_a: Tensor, b: Tensor, c: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence of a selective state-space layer over one chunk, without a loop over its tokens.

        h[t] = h[t-1] · a[t] + x[t] b[t]ᵀ,    y[t] = h[t] c[t]      (h: P x N; the gates a in (0, 1))

    Within a block of L tokens y = scores x, where scores[t, s] sums c[t] (a[s+1] … a[t]) b[s] over the N. From block to
    block goes the state. A product of gates is the exponential of a sum of its own: nothing overflows or cancels.
    x: (…, T, P). log_a: logarithms of the gates (…, T, N), or (…, T, 1), one for all N. b, c: (…, T, N). h: (…, P, N),
    before the first token. The leading dimensions (batch, heads) broadcast. A gate may be 0, its logarithm -inf.
    Returns y (…, T, P), and the state after the last token.
    """
    T, L = x.shape[-2], min(BLOCK, x.shape[-2])
    # A last block that is short is filled up with tokens that keep the state (log_a = 0) and add nothing to it.
    x, log_a, b, c = (F.pad(z, (0, 0, 0, -T % L)).unflatten(-2, (-1, L)) for z in (x, log_a, b, c))  # (…, n, L, ·)
    between = products(log_a)  # (…, n, L, L, N)
    if log_a.shape[-1] == 1:
        scores = c @ b.mT * between[..., 0]  # (…, n, L, L)
    else:
        scores = (c[..., None, :] * between * b[..., None, :, :]).sum(-1)
    added = x.mT @ (b * between[..., -1, :, :])  # (…, n, P, N): what each block adds to the state at its end
    since = log_a.cumsum(-2).exp()  # (…, n, L, N): what is left at t of the state before the block
    h, before = torch.broadcast_tensors(h, added[..., 0, :, :])[0], []
    for part, more in zip(since[..., -1:, :].unbind(-3), added.unbind(-3), strict=True):
        before.append(h)
        h = h * part + more
    y = scores @ x + (c * since) @ torch.stack(before, -3).mT
    return y.flatten(-3, -2)[..., :T, :], h


def products(log_a: Tensor) -> Tensor:
    """(…, L, N) to (…, L, L, N): at [t, s] the product of the gates after s up to t; 0 where t < s."""
    ones = torch.ones(log_a.shape[-2], log_a.shape[-2], dtype=torch.bool, device=log_a.device)
    sums = log_a[..., :, None, :].where(ones.tril(-1)[..., None], 0).cumsum(-3)
    return sums.where(ones.tril()[..., None], -torch.inf).exp()
