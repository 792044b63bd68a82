"""Gradients by name, and an oracle for every weighting of chunks and relays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import minichunk as mc
from minichunk.batch import IGNORE, shift
from minichunk.chunks import Chunk
from minichunk.memory.window import Pattern, Strided
from minichunk.models.llama import rope_tables, rotate
from minichunk.models.ssm import StateLayer

Tensors = dict[str, Tensor]  # a loss, gradients: by name


def take_gradients(model: Any) -> Tensors:
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


def loop(x: Tensor, log_a: Tensor, b: Tensor, c: Tensor, h: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A state's recurrence, token by token: y (…, T, P), and the states (…, P, N) after each."""
    outputs, states = [], []
    for t in range(x.shape[-2]):
        h = h * log_a[..., t, None, :].exp() + x[..., t, :, None] * b[..., t, None, :]
        states.append(h)
        outputs.append((h * c[..., t, None, :]).sum(-1))
    return torch.stack(outputs, -2), states


class Relays(NamedTuple):
    """A sequence cut into chunks, as the oracle needs it."""

    chunks: Sequence[Chunk]
    own: Tensor  # bool (T, T): both positions are in one chunk
    factor: Tensor  # (T, 1): the relay factor of the chunk of each position, 0 if that is skipped


def oracle(
    model: Any,
    input_ids: Tensor,
    labels: Tensor,
    chunks: Sequence[Chunk],
    entries: Sequence[mc.Weight | None],
    num_targets: float | None = None,
    positions: Tensor | None = None,
    objective: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """What SpaCO computes, by plain autograd through the whole sequence at once; adds to `.grad`.

    A key or value that is seen from a later chunk is one whose gradient is multiplied by its own
    chunk's relay factor (0 if that chunk is skipped), and so is what a chunk adds to a state; a chunk's loss is
    multiplied by its loss factor. No cache, no chunk attention, no scan, no tiled loss: naive softmax over T x T
    scores, and a loop over tokens. Of an objective the chunks weigh what each label adds to its gradient.
    """
    T = input_ids.shape[1]
    x = model.model.embed_tokens(input_ids)
    owner = torch.zeros(T, dtype=torch.int64)
    relay, loss_factor = x.new_zeros(T, 1), x.new_zeros(T)
    for j, (chunk, weight) in enumerate(zip(chunks, entries, strict=True)):
        rows = slice(chunk.start, chunk.stop)
        owner[rows] = j
        if weight is not None:
            relay[rows], loss_factor[rows] = weight.relay, weight.loss
    relays = Relays(chunks, owner[:, None] == owner[None, :], relay)
    for layer in model.model.layers:
        if isinstance(layer, StateLayer):
            x = through_state(layer, x, relays)
        else:
            x = through_attention(layer, x, relays, getattr(model.config, "attention", model.config), positions)
    logits = model.lm_head(model.model.norm(x))
    targets = shift(labels)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
    losses = losses.view(targets.shape)
    loss = value = (losses * loss_factor).sum() / (num_targets or int((targets != IGNORE).sum()))
    if objective is not None:
        leaf = losses.detach().requires_grad_()
        value = objective(F.pad(-leaf[:, :-1], (1, 0)))
        loss = (losses * loss_factor * torch.autograd.grad(value, leaf)[0]).sum()
    if loss.requires_grad:
        loss.backward()
    return value.detach()


def through_attention(
    layer: Any, x: Tensor, relays: Relays, config: mc.LlamaConfig, positions: Tensor | None = None
) -> Tensor:
    """The next x (B, T, E), where keys and values that a later chunk sees are relayed."""
    H, G, D, T = config.num_attention_heads, config.num_key_value_heads, config.head_dim, x.shape[1]
    seen = visible(layer.self_attn.pattern, T)
    places = torch.arange(T) if positions is None else positions[:, None]
    rope = rope_tables(config, places, x, places)
    attention = layer.self_attn
    h = layer.input_layernorm(x)
    q, (k, v) = attention.heads(attention.q_proj(h)), attention.keys_values(h, rope)
    q = rotate(attention.q_norm(q) if config.qk_norm else q, rope)
    k, v = (t.repeat_interleave(H // G, dim=1) for t in (k, v))  # (B, H, T, D)
    k_past, v_past = scale_gradient(k, relays.factor), scale_gradient(v, relays.factor)
    scores = torch.where(relays.own, q @ k.mT, q @ k_past.mT) / D**0.5
    scores = scores.masked_fill(~seen, -torch.inf)
    p = (scores - scores.logsumexp(-1, keepdim=True)).exp()  # a softmax, rounded where the merge of pieces rounds
    y = (p * relays.own) @ v + (p * ~relays.own) @ v_past
    x = x + attention.o_proj(y.transpose(1, 2).flatten(2))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def visible(pattern: Pattern, T: int) -> Tensor:
    """bool (T, T): whether the query at i sees the position j."""
    if isinstance(pattern, Strided):
        blocks = [torch.ones(pattern.block, pattern.block)] * -(-T // pattern.block)
        seen = torch.block_diag(*blocks)[:T, :T].bool()
        for _ in range(pattern.local - 1):  # each time one block further back
            seen = seen | F.pad(seen, (0, 0, pattern.block, 0))[:T]
        far = [pattern.stride is not None and j // pattern.block % pattern.stride == 0 for j in range(T)]
        return (seen | torch.tensor(far)).tril()
    seen = torch.ones(T, T, dtype=torch.bool)
    if pattern.window is not None:
        seen = seen.triu(1 - pattern.window)
        seen[:, : pattern.sinks] = True
    return seen.tril()


def through_state(layer: StateLayer, x: Tensor, relays: Relays) -> Tensor:
    """The next x (B, T, P), where all that a chunk does with a state is relayed but its decay, which is not scaled."""
    u = layer.norm(x)
    inputs = u, F.logsigmoid(layer.a_proj(u)), layer.b_proj(u), layer.c_proj(u)
    h, outputs = layer.nothing(u), []
    for chunk in relays.chunks:
        part = [z[:, chunk.start : chunk.stop] for z in inputs]
        outputs.append(loop(*part, h)[0])
        of_the_chunk = loop(*part, h.detach())[1][-1]
        passes = (h - h.detach()) * part[1].detach().sum(1, keepdim=True).exp()
        h = scale_gradient(of_the_chunk, relays.factor[chunk.start]) + passes
    return x + torch.cat(outputs, 1)


def gradients_by_chain_length(model: Any, input_ids: Tensor, labels: Tensor, chunks: Sequence[Chunk]) -> list[Tensors]:
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
