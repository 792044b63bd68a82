"""Gradients by name, and an oracle for every weighting of chunks and relays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import minichunk as mc
from minichunk.chunks import Chunk
from minichunk.models.rope import rope_tables, rotate
from minichunk.targets import IGNORE, shift

Tensors = dict[str, Tensor]  # a loss, gradients: by name


def take_gradients(model: mc.Llama) -> Tensors:
    """The gradients of all trainable parameters (zeros where there is none); clears them."""
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    model.zero_grad(set_to_none=True)
    return grads


def norm(grads: Tensors) -> float:
    return float(torch.stack([g.double().norm() for g in grads.values()]).norm())


def distance(got: Tensors, expected: Tensors) -> float:
    """‖got - expected‖ / ‖expected‖ over all gradients together."""
    expected = {name: e for name, e in expected.items() if name != "loss"}
    return norm({name: got[name] - e for name, e in expected.items()}) / norm(expected)


def combine(terms: Sequence[tuple[float, Tensors]]) -> Tensors:
    """The weighted sum of losses and gradients."""
    first = terms[0][1]
    return {name: torch.stack([factor * tensors[name] for factor, tensors in terms]).sum(0) for name in first}


def scale_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """x itself, whose gradient is multiplied by `factor`."""
    return x.detach() + (x - x.detach()) * factor


def oracle(
    model: mc.Llama,
    input_ids: Tensor,
    labels: Tensor,
    chunks: Sequence[Chunk],
    entries: Sequence[mc.Weight | None],
    num_targets: float | None = None,
) -> Tensor:
    """What SpaCO computes, by plain autograd through the whole sequence at once; adds to `.grad`.

    A key or value that is seen from a later chunk is one whose gradient is multiplied by its own
    chunk's relay factor (0 if that chunk is skipped); a chunk's loss is multiplied by its loss
    factor. No cache, no chunk attention, no tiled loss: naive softmax over T x T scores.
    """
    config, T = model.config, input_ids.shape[1]
    H, G, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    x = model.model.embed_tokens(input_ids)
    owner = torch.zeros(T, dtype=torch.int64)
    relay, loss_factor = x.new_zeros(T, 1), x.new_zeros(T)
    for j, (chunk, weight) in enumerate(zip(chunks, entries, strict=True)):
        rows = slice(chunk.start, chunk.stop)
        owner[rows] = j
        if weight is not None:
            relay[rows], loss_factor[rows] = weight.relay, weight.loss
    own = owner[:, None] == owner[None, :]  # (T, T)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    rope = rope_tables(config, 0, T, x)
    for layer in model.model.layers:
        attention = layer.self_attn
        h = layer.input_layernorm(x)
        q, (k, v) = attention.heads(attention.q_proj(h)), attention.keys_values(h, rope)
        q = rotate(attention.q_norm(q) if config.qk_norm else q, rope)
        k, v = (t.repeat_interleave(H // G, dim=1) for t in (k, v))  # (B, H, T, D)
        k_past, v_past = scale_gradient(k, relay), scale_gradient(v, relay)
        scores = torch.where(own, q @ k.mT, q @ k_past.mT) / D**0.5
        scores = scores.masked_fill(~causal, -torch.inf)
        p = (scores - scores.logsumexp(-1, keepdim=True)).exp()  # a softmax, rounded where the merge of pieces rounds
        y = (p * own) @ v + (p * ~own) @ v_past
        x = x + attention.o_proj(y.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    logits = model.lm_head(model.model.norm(x))
    targets = shift(labels)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
    loss = (losses.view(targets.shape) * loss_factor).sum() / (num_targets or int((targets != IGNORE).sum()))
    if loss.requires_grad:
        loss.backward()
    return loss.detach()


def gradients_by_chain_length(
    model: mc.Llama, input_ids: Tensor, labels: Tensor, chunks: Sequence[Chunk]
) -> list[Tensors]:
    """The parts of the exact gradient that come through chains of 1, 2, …, k chunks.

    With every relay multiplied by r, a chain through p chunks is multiplied by r^(p-1): the
    gradient is a polynomial in r, and its coefficients are found from its values at k points.
    """
    k = len(chunks)
    points = torch.linspace(-1, 1, k, dtype=torch.float64) if k > 1 else torch.zeros(1, dtype=torch.float64)
    values = []
    for r in points.tolist():
        oracle(model, input_ids, labels, chunks, [mc.Weight(1.0, r)] * k)
        values.append(take_gradients(model))
    inverse = torch.linalg.inv(torch.vander(points, k, increasing=True))  # (power, point)
    return [combine(list(zip(inverse[p].tolist(), values, strict=True))) for p in range(k)]
