"""Attention of one chunk over the cache, without copying the cache.

A chunk's queries see the chunk itself, causally, and the whole past. These are two ordinary attentions, whose results
are merged by their log-sum-exps; and so the past may be cut into blocks, each of them a view of the cache. Backward, a
kernel that is given the *merged* output and log-sum-exp returns the exact gradients of its block: it computes the
probabilities again as exp(scores - lse), and the merged lse makes them those of the whole softmax.

Where a layer sees part of the past (window.py), the first one is to the *band*, which begins before the chunk, and the
second one to what is *pinned* before it. With full attention the band is the chunk, and the whole past is pinned. Of
several documents in a row each has a band, and a past of its own.

Shapes: B batch, H query heads, G key-value heads, C tokens of the chunk, D head size, n positions of the past.
q (B, H, C, D); k, v of the chunk (B, G, C, D), of the past (B, G, n, D); out (B, H, C, D); lse (B, H, C).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .kernels import Kernel, pick_kernel
from .window import Span, runs

BLOCK = 2048  # positions of the past whose gradients are computed at a time: bounds what is in flight
TILE = 128  # queries that go to a kernel at once which builds a mask for them


def merge(out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> None:
    """Let out and lse, wide enough for it, be of attention to these keys and to more, given the attention to more."""
    more_out, more_lse = more_out.reshape(out.shape), more_lse.reshape(lse.shape)
    both = torch.logaddexp(lse, more_lse)
    out *= (lse - both).exp()[..., None]
    out += more_out * (more_lse - both).exp()[..., None]
    lse.copy_(both)


def fold(x: Tensor, G: int) -> Tensor:
    """(B, H, C, ·) to (B, G, H/G * C, ·): for keys that all queries see, the H/G heads of a key head are one."""
    return x.reshape(x.shape[0], G, -1, *x.shape[3:])


class Past:
    """What a chunk's attention holds by reference instead of saving: a layer's memory (cache.py) and its place in it.

    save: for a layer that recompute runs twice: the first run leaves out and lse here, and the second takes them.
    """

    def __init__(self, memory: Any, start: int, save: bool) -> None:
        self.memory, self.start, self.save = memory, start, save
        self.saved: tuple[Tensor, Tensor] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """Attention of the chunk to itself and to what lies before it.

        q: (B, H, C, D). k, v: (B, G, C, D), the chunk's own. sinks: (H), for each head the score of one key more, which
        is worth nothing, as in gpt-oss. Returns (B, H, C, D). Backward adds the gradients of the past's keys and values
        to the memory, in place, instead of returning them: they are the relay of Algorithm 1.
        """
        return _Attention.apply(q, k, v, sinks, self)

    def forward(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out and lse."""
        band, keys, values, pinned = self.seen(kernel, k, v)
        parts = [kernel.forward(q[:, :, rows], keys[:, :, at], values[:, :, at], window) for rows, at, window in band]
        out, lse = parts[0] if len(parts) == 1 else (torch.cat(pieces, 2) for pieces in zip(*parts, strict=True))
        out = out.to(lse.dtype)
        for rows, spans in pinned:
            folded = fold(q[:, :, rows], k.shape[1])
            # One span, as the whole past, is a view and may be of any length; of many a copy is made.
            for some in at_most(kernel.block or max(BLOCK, spans[0][1] - spans[0][0]), spans):
                merge(out[:, :, rows], lse[:, :, rows], *kernel.forward(folded, *self.read(some, k, v)))
        return out.to(q.dtype), lse

    def backward(self, kernel: Kernel, sends_back: bool, k: Tensor, v: Tensor, *query: Tensor) -> tuple[Tensor, ...]:
        """The gradients of q, k and v, where `query` has the merged out and lse; those of the past go to the memory."""
        band, keys, values, pinned = self.seen(kernel, k, v)
        wide, start, low = query[-1].dtype, self.start, self.start + k.shape[2] - keys.shape[2]
        if len(band) == 1:
            dq, dk, dv = kernel.backward(query, keys, values, band[0][2])
            dq = dq.to(wide)  # summed in float32 or wider, and rounded once
        else:
            dq, dk, dv = (x.new_zeros(x.shape, dtype=wide) for x in (query[0], keys, values))
            for rows, at, window in band:
                parts = kernel.backward([x[:, :, rows] for x in query], keys[:, :, at], values[:, :, at], window)
                for total, place, part in zip((dq, dk, dv), (rows, at, at), parts, strict=True):
                    total[:, :, place] += part
        for rows, spans in pinned:
            folded = kernel.prepare([fold(x[:, :, rows], k.shape[1]) for x in query])
            for some in at_most(BLOCK, spans):
                dq_part, *grads = kernel.backward(folded, *self.read(some, k, v))
                dq[:, :, rows] += dq_part.reshape(dq[:, :, rows].shape)
                sizes = [last - first for first, last in some]
                for (first, last), dk_part, dv_part in zip(some, *(x.split(sizes, 2) for x in grads), strict=True):
                    if first >= start:
                        dk[:, :, first - low : last - low] += dk_part
                        dv[:, :, first - low : last - low] += dv_part
                    elif sends_back:
                        self.memory.add_grads(first, dk_part, dv_part)  # line 7's other half: the relay
                del dq_part, dk_part, dv_part, grads  # or they would live on beside the next block's
        if sends_back and low < start:
            self.memory.add_grads(low, dk[:, :, : start - low], dv[:, :, : start - low])
        return dq.to(k.dtype), dk[:, :, start - low :].to(k.dtype), dv[:, :, start - low :].to(k.dtype)

    def seen(self, kernel: Kernel, k: Tensor, v: Tensor) -> tuple[list[Any], Tensor, Tensor, list[Any]]:
        """Returns (queries, keys, window) of each run, slices of the chunk and of the band; the band's keys and values;
        and what is pinned, with the queries that see it: (queries, spans)."""
        pattern, start, C = self.memory.pattern, self.start, k.shape[2]
        most = C if pattern.reach == 0 or kernel.takes_many else TILE
        found = list(runs(pattern, self.memory.documents, start, start + C, most))
        low = found[0][0].low
        band = [(slice(r.start - start, r.stop - start), slice(r.low - low, r.stop - low), r.window) for r, _ in found]
        pinned = [(slice(a - start, b - start), spans) for _, seen in found for a, b, spans in seen if spans]
        return band, *self.read([(low, start), (start, start + C)], k, v), pinned

    def read(self, spans: Sequence[Span], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, n, D) of these positions, of the past or the chunk's own: a view of one piece."""
        pieces: list[Any] = []
        for start, stop in spans:
            if start < self.start:
                pieces += [pair for *_, pair in self.memory.pieces(start, stop)]
            else:
                pieces.append([x[:, :, start - self.start : stop - self.start] for x in (k, v)])
        keys, values = (x[0] if len(x) == 1 else torch.cat(x, 2) for x in zip(*pieces, strict=True))
        return keys, values


def at_most(count: int, spans: Sequence[Span]) -> list[list[Span]]:
    """The same positions, no more than so many at a time."""
    cut = [(low, min(low + count, stop)) for start, stop in spans for low in range(start, stop, count)]
    n = count // max(stop - start for start, stop in cut)
    return [cut[i : i + n] for i in range(0, len(cut), n)]


class _Attention(torch.autograd.Function):
    """What autograd sees of it: q, k and v of one chunk, however long the past."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, past: Past) -> Tensor:
        q, k, v = _rows(q), _rows(k), _rows(v)
        ctx.past, ctx.kernel = past, past.memory.kernel or pick_kernel(q)
        if past.saved is None:
            out, lse = past.forward(ctx.kernel, q, k, v)
            if sinks is not None:  # one more key: all that is below needs the log-sum-exp with it
                scores = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
                out, lse = (out * (lse - scores).exp()[..., None]).to(out.dtype), scores
        else:
            out, lse = (x.detach() for x in past.saved)
        if past.save:
            past.saved = out.detach(), lse  # detached: what is returned will hold this node, which holds `past`
        ctx.save_for_backward(sinks, k, v, q, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # The same projections made the past's keys and values: they need gradients if ours do.
        sends_back = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        grad, (sinks, k, v, q, out, lse) = _rows(grads[0]), ctx.saved_tensors
        dq, dk, dv = ctx.past.backward(ctx.kernel, sends_back, k, v, grad, q, out, lse)
        if sinks is None:
            return dq, dk, dv, None, None
        p = (sinks.to(lse.dtype)[:, None] - lse).exp()  # (B, H, C): the softmax's share of the sink
        return dq, dk, dv, -(p * (grad * out).to(lse.dtype).sum(-1)).sum((0, 2)).to(sinks.dtype), None


def _rows(x: Tensor) -> Tensor:
    """x with the numbers of each head side by side, as the flash kernels take for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()
