"""Adjoint sharding as the paper has it (arXiv 2501.00692): a sum of vector-Jacobian products, truncated or whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import minichunk as mc
from minichunk.batch import IGNORE, shift
from tutorials.truncated_adjoint import TruncatedStateSpace, truncation_errors

from .gradients import Tensors, combine, loop
from .rounding import measure, outcome
from .strategies import Batch, batches, build, examples, remember, state_models, tiny_state


class Literal:
    """The paper's sum, one vector-Jacobian product for each (layer, t, i), for one text; eq. 7 with its window T̄.

    Each layer takes the loss's gradient at its own output; that Proposition 3 has it otherwise is shown in tutorial 8.
    The gradients of norms, embedding and head, which the paper leaves out, are there too.
    """

    def __init__(self, model: mc.StateSpace, window: int) -> None:
        self.model, self.window = model, window
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.grads = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    def run(self, ids: Tensor, labels: Tensor, num_targets: int) -> Tensors:
        """The loss and all gradients of one text: ids (T,)."""
        model = self.model
        inputs = [model.embedding(ids).detach()]  # what each layer is given, and what the last one returns: (T, P)
        for layer in model.layers:
            inputs.append(inputs[-1] + self.recurrence(layer, layer.norm(inputs[-1]))[0].detach())
        top = inputs.pop().requires_grad_()
        logits = model.lm_head(model.norm(top))
        loss = F.cross_entropy(logits, shift(labels[None])[0], ignore_index=IGNORE, reduction="sum") / num_targets
        cotangent = self.add(loss, [model.lm_head.weight, model.norm.weight], top, None)  # (T, P)
        for layer, x in zip(reversed(model.layers), reversed(inputs), strict=True):
            cotangent = cotangent + self.through(layer, x, cotangent)
        self.grads[self.names[model.embedding.weight]].index_add_(0, ids, cotangent)
        return {"loss": loss.detach(), **self.grads}

    def recurrence(self, layer: Any, u: Tensor) -> tuple[Tensor, list[Tensor]]:
        return loop(u, F.logsigmoid(layer.a_proj(u)), layer.b_proj(u), layer.c_proj(u), layer.nothing(u[None])[0])

    def through(self, layer: Any, x: Tensor, cotangent: Tensor) -> Tensor:
        """Add a layer's gradients for the cotangent of its output; return that of its input x, both (T, P)."""
        x = x.clone().requires_grad_()
        normed = layer.norm(x)
        u = normed.detach()
        a, b, c = (layer.a_proj(u).sigmoid().detach(), layer.b_proj(u).detach(), layer.c_proj(u).detach())
        states = [torch.zeros_like(u[0, :, None] * b[0]), *(h.detach() for h in self.recurrence(layer, u)[1])]
        of_a, of_b, of_c, of_u = (torch.zeros_like(z) for z in (a, b, c, u))
        for t in range(len(u)):
            of_c[t] = cotangent[t] @ states[t + 1]
            adjoint = cotangent[t, :, None] * c[t]  # (P, N)
            for i in range(t, max(-1, t - self.window), -1):
                of_a[i] += (adjoint * states[i]).sum(0)
                of_b[i] += u[i] @ adjoint
                of_u[i] += adjoint @ b[i]
                adjoint = adjoint * a[i]
        nets: list[tuple[Callable[[Tensor], Tensor], Any, Tensor]] = [
            (lambda z: layer.a_proj(z).sigmoid(), layer.a_proj, of_a),
            (layer.b_proj, layer.b_proj, of_b),
            (layer.c_proj, layer.c_proj, of_c),
        ]
        for net, linear, of_output in nets:
            leaf = u.clone().requires_grad_()
            of_u += self.add(net(leaf), [linear.weight, linear.bias], leaf, of_output)
        return self.add(normed, [layer.norm.weight], x, of_u)

    def add(self, output: Tensor, parameters: Sequence[Tensor], of: Tensor, cotangent: Tensor | None) -> Tensor:
        *grads, wanted = torch.autograd.grad(output, [*parameters, of], cotangent)
        for parameter, grad in zip(parameters, grads, strict=True):
            self.grads[self.names[parameter]] += grad
        return wanted


def literal(model: mc.StateSpace, batch: Batch, window: int) -> Tensors:
    texts = zip(batch.input_ids, batch.labels, strict=True)
    return combine([(1.0, Literal(model, window).run(*text, batch.num_targets)) for text in texts])


def truncated(model: mc.StateSpace, batch: Batch, window: int, size: int | None, **keywords: Any) -> Tensors:
    """By `full`, or in chunks by `seco`."""
    twin = TruncatedStateSpace(model, window)
    if size is None:
        return outcome(model, lambda: mc.full(twin, batch.input_ids, batch.labels))
    return outcome(model, lambda: mc.seco(twin, batch.input_ids, batch.labels, size, **keywords))


@examples(6)
@given(
    model=state_models(letters="s", max_layers=3),
    batch=batches(max_length=10),
    window=st.integers(1, 11),
    chunk_size=st.integers(1, 10),
)
def test_truncated_gradients_are_the_literal_sum(
    model: mc.StateSpace, batch: Batch, window: int, chunk_size: int
) -> None:
    """Windows shorter and longer than a chunk, and than the text."""
    exact = measure(lambda: literal(model, batch, window))
    whole = measure(lambda: truncated(model, batch, window, None))  # two scans, whose difference is rounded too
    exact.check(whole.values, beside=whole)
    exact.check(truncated(model, batch, window, chunk_size), beside=whole)


def some(layers: int, length: int, seed: int = 0, rows: int = 1) -> tuple[mc.StateSpace, Batch]:
    model = build(tiny_state(layers), seed)
    remember(model, 2.0)
    ids = torch.randint(23, (rows, length), generator=torch.Generator().manual_seed(seed))
    return model, Batch(ids, ids)


def test_a_window_of_the_whole_text_truncates_nothing() -> None:
    model, batch = some(2, 9)
    errors = truncation_errors(model, batch.input_ids, batch.labels, [1, 2, 4, 7, 9, 100])
    assert [window for window, _ in errors] == [1, 2, 4, 7, 9, 100]
    assert errors[0][1] > errors[2][1] > errors[3][1] > 1e-6
    assert [error for _, error in errors[4:]] == [0, 0]
    assert all(p.grad is None for p in model.parameters())
