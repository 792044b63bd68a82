"""What is known about mistakes in exercise 2, the merge."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..diagnose import Values, compare, hint, require, take, within
from .common import random

Piece = tuple[Tensor, Tensor]
AXES = "batch head position channel"


def check_merge(module: ModuleType) -> None:
    """merge, piece_backward and attend_backward, on three pieces of the keys."""
    q, grad, *kv = random(0, *[(2, 3, 4, 6)] * 2, *[(2, 3, 5, 6)] * 2, *[(2, 3, 3, 6)] * 2, *[(2, 3, 2, 6)] * 2)
    pieces = list(zip(kv[::2], kv[1::2], strict=True))
    _check_merging(module, q, pieces)
    _check_piece_backward(module, grad, q, pieces)
    _check_attend_backward(module, grad, q, pieces)


def _piece(q: Tensor, *pieces: Piece) -> tuple[Tensor, Tensor]:
    """Attention to some pieces at once, by concatenation."""
    k, v = (torch.cat(tensors, dim=2) for tensors in zip(*pieces, strict=True))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


# For a sum without keepdim=True, and for an index without None.
ONE_NUMBER = (
    "{}, for each query, one number: (B, H, C). But {}: along which dimension has that number to be repeated? (A sum "
    "drops its dimension without keepdim=True, and [..., None] brings it back.)"
)


@within("merge")
def _check_merging(module: ModuleType, q: Tensor, pieces: list[Piece]) -> None:
    (out_a, lse_a), (out_b, lse_b) = (_piece(q, piece) for piece in pieces[:2])
    out, lse = _piece(q, *pieces[:2])
    with hint("must match the size of tensor", ONE_NUMBER.format("lse is", "the outputs are (B, H, C, D)")):
        got_out, got_lse = take(module.merge(out_a, lse_a, out_b, lse_b), "out", "lse")
    name = "the merged log-sum-exp"
    words = "The merged log-sum-exp is the sum of both. The sums of exponentials add up; do their logarithms?"
    compare({name: got_lse}, {name: lse}, [(words, {name: lse_a + lse_b})], "batch head position")

    name = "the merged output"
    words = (
        "The merged output is the average of both, with equal shares. If piece a has the weight exp(lse_a) in the "
        "whole, which share of the whole is that?"
    )
    compare({name: got_out}, {name: out}, [(words, {name: (out_a + out_b) / 2})], AXES)
    for shift in (800.0, -800.0):
        got_out, got_lse = take(module.merge(out_a, lse_a + shift, out_b, lse_b + shift), "out", "lse")
        finite = all(torch.isfinite(x).all() for x in (got_out, got_lse))
        require(
            finite and torch.allclose(got_out, out),
            f"merge is right for small scores, but not for log-sum-exps around {shift:g}: exp(800) is infinite and "
            "exp(-800) is 0. What can be subtracted before taking exp?",
        )


def _piece_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mistake: str = ""
) -> Values:
    root = q.shape[-1] ** 0.5
    scores = q @ k.mT / root
    own = scores.softmax(-1)
    p = own if mistake == "own softmax" else (scores - lse[..., None]).exp()
    dp = grad @ v.mT
    delta = {
        "no delta": torch.zeros(()),
        "own delta": (grad * (own @ v)).sum(-1, keepdim=True),
    }.get(mistake, (grad * out).sum(-1, keepdim=True))
    ds = p * (dp - delta)
    ds = ds if mistake == "no root" else ds / root
    return {"dq": ds @ k, "dk": ds.mT @ q, "dv": p.mT @ grad}


MISTAKES = {
    "own softmax": (
        "The probabilities are those of the piece's own softmax: they sum to 1 over this piece alone, as with the "
        "piece's own log-sum-exp instead of the merged one. What do they have to sum to 1 over?"
    ),
    "no delta": "delta is missing. Raising one score lowers all other probabilities: where does ds say so?",
    "own delta": (
        "delta is made from the piece's own output instead of the merged one. "
        "delta sums p · dp over the keys of all pieces: which output knows of all of them?"
    ),
    "no root": "The scores are divided by sqrt(D), but their gradient is not.",
}


@within("piece_backward")
def _check_piece_backward(module: ModuleType, grad: Tensor, q: Tensor, pieces: list[Piece]) -> None:
    out, lse = _piece(q, *pieces)
    for k, v in pieces:
        args = (grad, q, k, v, out, lse)
        with hint("must match the size of tensor", ONE_NUMBER.format("lse and delta are", "dp is (B, H, C, keys)")):
            result = module.piece_backward(*args)
        got = dict(zip(("dq", "dk", "dv"), take(result, "dq", "dk", "dv"), strict=True))
        mistakes = [(words, _piece_backward(*args, mistake)) for mistake, words in MISTAKES.items()]
        compare(got, _piece_backward(*args), mistakes, AXES)


@within("attend_backward")
def _check_attend_backward(module: ModuleType, grad: Tensor, q: Tensor, pieces: list[Piece]) -> None:
    out, lse = _piece(q, *pieces)

    leaves = [x.clone().requires_grad_() for x in (q, *(x for piece in pieces for x in piece))]
    _piece(leaves[0], *zip(leaves[1::2], leaves[2::2], strict=True))[0].backward(grad)
    names = ["dq", *(f"{name} of piece {i}" for i in range(len(pieces)) for name in ("dk", "dv"))]
    expected = {name: x.grad for name, x in zip(names, leaves, strict=True)}

    words = "dq holds the share of the last piece only. The queries look at all pieces: which shares add up?"
    mistakes = [(words, {**expected, "dq": _piece_backward(grad, q, *pieces[-1], out, lse)["dq"]})]
    dq, sent_back = take(module.attend_backward(grad, q, pieces, out, lse), "dq", "a list with (dk, dv) for each piece")
    pairs = [x for pair in take(sent_back, *["a pair (dk, dv)"] * len(pieces)) for x in take(pair, "dk", "dv")]
    compare(dict(zip(names, [dq, *pairs], strict=True)), expected, mistakes, AXES)
