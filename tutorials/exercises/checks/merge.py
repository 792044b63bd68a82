"""What is known about mistakes in exercise 2, the merge."""

from __future__ import annotations

from itertools import product
from types import ModuleType

import torch
from torch import Tensor

from ..diagnose import Mistakes, Values, compare, count, hint, require, take, within
from .common import random


def check_merge(module: ModuleType) -> None:
    """merge, piece_backward and attend_backward, on three pieces of the keys."""
    q, grad, *kv = random(0, *[(2, 3, 4, 6)] * 2, *[(2, 3, 5, 6)] * 2, *[(2, 3, 3, 6)] * 2, *[(2, 3, 2, 6)] * 2)
    pieces = list(zip(kv[::2], kv[1::2], strict=True))
    _check_merging(module, q, pieces)
    _check_piece_backward(module, grad, q, pieces)
    _check_attend_backward(module, grad, q, pieces)


def _piece(q: Tensor, *pieces: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
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
def _check_merging(module: ModuleType, q: Tensor, pieces: list[tuple[Tensor, Tensor]]) -> None:
    (out_a, lse_a), (out_b, lse_b) = (_piece(q, piece) for piece in pieces[:2])
    out, lse = _piece(q, *pieces[:2])
    with hint("must match the size of tensor", ONE_NUMBER.format("lse is", "the outputs are (B, H, C, D)")):
        result = module.merge(out_a, lse_a, out_b, lse_b)
    got_out, got_lse = take(result, "out", "lse")
    swapped = isinstance(got_out, Tensor) and got_out.shape == lse.shape
    require(not swapped, "The two results are swapped: what has to be returned is the output, then the log-sum-exp.")

    name = "the merged log-sum-exp"
    known = {
        "the sum of both. The sums of exponentials add up; do their logarithms?": lse_a + lse_b,
        "the larger of both. What happened to the other piece's exponentials?": torch.maximum(lse_a, lse_b),
        "exp(lse_a) + exp(lse_b), without a logarithm.": lse_a.exp() + lse_b.exp(),
        "that of piece a. What does the next merge need to know?": lse_a,
        "that of piece b. What does the next merge need to know?": lse_b,
    }
    mistakes = ((f"The merged log-sum-exp is {words}", {name: wrong}) for words, wrong in known.items())
    compare({name: got_lse}, {name: lse}, mistakes, "batch head position")

    name = "the merged output"
    weight_a, weight_b = lse_a.exp()[..., None], lse_b.exp()[..., None]
    known = {
        "the average of both, with equal shares": (out_a + out_b) / 2,
        "the sum of both, without shares": out_a + out_b,
        "weighted by exp(lse), which does not subtract the merged lse": weight_a * out_a + weight_b * out_b,
        "made with the shares swapped": (weight_b * out_a + weight_a * out_b) / (weight_a + weight_b),
        "weighted by the log-sum-exps, not by their exponentials": (
            (lse_a[..., None] * out_a + lse_b[..., None] * out_b) / (lse_a + lse_b)[..., None]
        ),
        "weighted by quotients of log-sum-exps, not of their exponentials": (
            (lse_a[..., None] * out_a + lse_b[..., None] * out_b) / lse[..., None]
        ),
    }
    question = "If piece a has the weight exp(lse_a) in the whole, which share of the whole is that?"
    mistakes = ((f"The merged output is {words}. {question}", {name: wrong}) for words, wrong in known.items())
    compare({name: got_out}, {name: out}, mistakes, "batch head position channel")

    for shift in (800.0, -800.0):
        got_out, got_lse = take(module.merge(out_a, lse_a + shift, out_b, lse_b + shift), "out", "lse")
        finite = bool(torch.isfinite(got_out).all() and torch.isfinite(got_lse).all())
        require(
            finite and torch.allclose(got_out, out),
            f"merge is right for small scores, but not for log-sum-exps around {shift:g}: exp(800) is infinite and "
            "exp(-800) is 0. What can be subtracted before taking exp?",
        )


def _piece_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax: str = "right",
    delta: str = "right",
    scale: str = "right",
    last: str = "right",
) -> Values:
    root = q.shape[-1] ** 0.5
    scores = q @ k.mT / root
    own_p = scores.softmax(-1)
    p = {
        "right": (scores - lse[..., None]).exp(),
        "own": own_p,
        "unscaled": (scores * root - lse[..., None]).exp(),
        "no lse": scores.exp(),
        "no exp": scores - lse[..., None],
        "plus": (scores + lse[..., None]).exp(),
    }[softmax]
    dp = grad @ (k if last == "k" else v).mT
    right = (grad * out).sum(-1, keepdim=True)
    sums = {
        "right": right,
        "own": (grad * (own_p @ v)).sum(-1, keepdim=True),
        "share": (p * dp).sum(-1, keepdim=True),
        "none": torch.zeros(()),
        "of all": (grad * out).sum(),
        "plus": -right,
        "mean": (grad * out).mean(-1, keepdim=True),
    }
    ds = (1 if last == "no p" else p) * (dp - sums[delta])
    for_q, for_k = {
        "right": (root, root),
        "none": (1, 1),
        "q only": (root, 1),
        "k only": (1, root),
        "by D": (root**2, root**2),
        "times": (1 / root, 1 / root),
    }[scale]
    dq, dk, dv = ds @ k / for_q, ds.mT @ q / for_k, p.mT @ (out if last == "out" else grad)
    return {"dq": dq, "dk": dv, "dv": dk} if last == "swapped" else {"dq": dq, "dk": dk, "dv": dv}


SOFTMAX = {
    "right": "",
    "own": (
        "The probabilities are those of the piece's own softmax: they sum to 1 over this piece alone, as with the "
        "piece's own log-sum-exp instead of the merged one. What do they have to sum to 1 over?"
    ),
    "unscaled": (
        "The scores within the probabilities are not divided by sqrt(D). The log-sum-exp was made from scores that "
        "are: which s belongs into exp(s - lse)?"
    ),
    "no lse": "The probabilities are exp(s), without the log-sum-exp. What do they have to sum to 1 over?",
    "no exp": "The probabilities are s - lse: those are their logarithms.",
    "plus": "The probabilities are exp(s + lse), but it is by the sum of all exponentials that each is *divided*.",
}
DELTA = {
    "right": "",
    "own": (
        "delta is made from the piece's own output instead of the merged one. "
        "delta sums p · dp over the keys of all pieces: which output knows of all of them?"
    ),
    "share": (
        "delta sums p · dp over this piece's keys only, but has to sum it over those of all pieces. This piece cannot "
        "see the others' p: which two tensors of its arguments know the whole sum?"
    ),
    "none": "delta is missing. Raising one score lowers all other probabilities: where does ds say so?",
    "of all": (
        "delta is one number for all queries together, but each query has its own softmax, and so its own delta. "
        "Over which dimension is the sum, and which are to stay?"
    ),
    "plus": "delta has the wrong sign: raising one score lowers all other probabilities.",
    "mean": "delta is a mean over D, but has to be the sum: which sum over the keys is it the same as?",
}
ROOT = {
    "right": "",
    "none": "The scores are divided by sqrt(D), but their gradient is not.",
    "q only": (
        "dq is divided by sqrt(D), but dk is not. The scores are q · k / sqrt(D): which of the two gradients comes "
        "back through the division?"
    ),
    "k only": (
        "dk is divided by sqrt(D), but dq is not. The scores are q · k / sqrt(D): which of the two gradients comes "
        "back through the division?"
    ),
    "by D": "The gradient of the scores is divided by D, but the scores were divided by its square root.",
    "times": "The gradient of the scores is multiplied by sqrt(D), but a division's gradient is divided, too.",
}
LAST = {
    "right": "",
    "swapped": "dk and dv are swapped: dk comes through the scores, dv is pᵀ grad.",
    "out": "dv is made from out instead of grad. The chain rule through out = p v says dv = pᵀ grad.",
    "k": "dp is made from the keys. Which of them are multiplied by the probabilities, keys or values?",
    "no p": (
        "ds lacks the probability in front: ds = p · (dp - delta). A key that nobody looks at: what is the gradient of "
        "its score?"
    ),
}
TABLES = (SOFTMAX, DELTA, ROOT, LAST)


@within("piece_backward")
def _check_piece_backward(module: ModuleType, grad: Tensor, q: Tensor, pieces: list[tuple[Tensor, Tensor]]) -> None:
    out, lse = _piece(q, *pieces)
    for k, v in pieces:
        args = (grad, q, k, v, out, lse)
        with hint("must match the size of tensor", ONE_NUMBER.format("lse and delta are", "dp is (B, H, C, keys)")):
            result = module.piece_backward(*args)
        got = dict(zip(("dq", "dk", "dv"), take(result, "dq", "dk", "dv"), strict=True))

        def mistakes(args: tuple[Tensor, ...] = args) -> Mistakes:
            some = [chosen for chosen in product(*TABLES) if chosen.count("right") > 1]
            for chosen in sorted(some, key=lambda chosen: -chosen.count("right")):
                words = [table[choice] for table, choice in zip(TABLES, chosen, strict=True)]
                yield "\n".join(filter(None, words)), _piece_backward(*args, *chosen)

        expected = _piece_backward(*args)
        compare(got, expected, mistakes(), "batch head position channel")


@within("attend_backward")
def _check_attend_backward(module: ModuleType, grad: Tensor, q: Tensor, pieces: list[tuple[Tensor, Tensor]]) -> None:
    leaves = [x.clone().requires_grad_() for x in (q, *(x for piece in pieces for x in piece))]
    _piece(leaves[0], *zip(leaves[1::2], leaves[2::2], strict=True))[0].backward(grad)
    names = ["dq", *(f"{name} of piece {i}" for i in range(len(pieces)) for name in ("dk", "dv"))]
    expected = {name: x.grad for name, x in zip(names, leaves, strict=True)}

    out, lse = _piece(q, *pieces)
    dq, sent_back = take(module.attend_backward(grad, q, pieces, out, lse), "dq", "a list with (dk, dv) for each piece")
    require(isinstance(sent_back, list | tuple), "The second result has to be a list, with (dk, dv) for each piece.")
    flat = len(sent_back) == 2 * len(pieces) and all(isinstance(x, Tensor) for x in sent_back)
    require(not flat, "dk and dv of all pieces stand in one list, but each piece needs its own pair: (dk, dv).")
    pairs = [take(pair, "dk", "dv") for pair in sent_back]
    require(
        len(pairs) == len(pieces),
        f"{count(len(pairs), 'pair', 'pairs')} (dk, dv) came back, but there are {len(pieces)} pieces.",
    )
    lengths = [x.shape[2] if isinstance(x, Tensor) and x.ndim == 4 else 0 for x, _ in pairs]
    backwards = lengths == [k.shape[2] for k, _ in reversed(pieces)]
    require(not backwards, "The pairs stand in the reverse order: the first one has to be that of the first piece.")
    got = dict(zip(names, [dq, *(x for pair in pairs for x in pair)], strict=True))

    def mistakes() -> Mistakes:
        parts = [_piece_backward(grad, q, k, v, out, lse)["dq"] for k, v in pieces]
        for i, part in enumerate(parts):
            words = f"dq holds the share of piece {i} only. The queries look at all pieces: which shares add up?"
            yield words, {**expected, "dq": part}
        words = "dq is the mean over the pieces. Each piece's share is whole already: what do they add up to?"
        yield words, {**expected, "dq": expected["dq"] / len(parts)}
        pair = {
            f"{a} of piece {i}": expected[f"{b} of piece {i}"]
            for i in range(3)
            for a, b in (("dk", "dv"), ("dv", "dk"))
        }
        yield (
            "dk and dv are swapped: each pair has to be (dk, dv), as piece_backward returns them.",
            {**expected, **pair},
        )
        for softmax, delta, what in (
            ("own", "own", "output and log-sum-exp instead of the merged ones"),
            ("right", "own", "output instead of the merged one"),
            ("own", "right", "log-sum-exp instead of the merged one"),
        ):
            own = [_piece_backward(grad, q, k, v, out, lse, softmax, delta) for k, v in pieces]
            wrong = {f"{name} of piece {i}": part[name] for i, part in enumerate(own) for name in ("dk", "dv")}
            yield (
                f"Every piece was given its own {what}: its keys do not know that there are others. Which out and lse "
                "belong to the whole?",
                {**wrong, "dq": torch.stack([part["dq"] for part in own]).sum(0)},
            )

    compare(got, expected, mistakes(), "batch head position channel")
