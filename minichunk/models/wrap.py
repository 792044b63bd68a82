"""`wrap(model)`: a causal language model of the transformers library for `seco` and `spaco`, as it is.

The model's own forward runs a chunk; what it is handed for that is in transformers_cache.py. What is not known to be
right in chunks is refused: by the attention function, if it is asked for what it does not do, and by `wrap`, which
compares loss and gradient of a few tokens with the model's own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ..batch import make_batch
from ..chunks import Chunk, span
from ..errors import InputError
from ..files.checkpoint import copy_beside
from ..memory.layer_memory import MemorySpec
from ..memory.state import LayerState
from ..protocol import DEFAULTS, Options, Written
from ..seco import fill, new_memory, rebuild
from .lora import changed
from .stack import Stack
from .transformers_cache import NAME, Run, WrappedMemory

TRIED = [Chunk(0, 5), Chunk(5, 6), Chunk(6, 11), Chunk(11, 13)]  # for a single token some models have other code


class Head:
    """An LM head as `protocol.Model` wants it, a weight alone: a bias is one more column, for one more input of 1."""

    def __init__(self, linear: Any, cap: float | None) -> None:
        if hasattr(linear, "modules_to_save"):  # PEFT's
            linear = linear.modules_to_save[linear.active_adapter]
        if type(linear) is not nn.Linear:
            raise InputError(f"its LM head is a {type(linear)}, not torch's Linear")
        self.linear, self.cap = linear, cap

    @property
    def weight(self) -> Any:
        """(V, E), or (V, E + 1) with a bias; the loss reads its `softcap`."""
        weight, bias = self.linear.weight, self.linear.bias
        columns: Any = weight.view_as(weight) if bias is None else torch.cat([weight, bias[:, None]], 1)
        columns.softcap = self.cap
        return columns

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits (…, V)."""
        logits = hidden @ self.weight.T
        return logits if self.cap is None else self.cap * (logits / self.cap).tanh()


class Wrapped:
    """See protocol.Model. Whatever it is asked beyond that is asked of the model: `parameters()`, `train()`, ….

    draws, states: whether it draws random numbers when it trains, and hands on states; `wrap` finds out.
    """

    draws, states = False, False
    run_chunks, chunk_losses, ends = Stack.run_chunks, Stack.chunk_losses, Stack.ends  # for the commands, as all these
    masks, lora, partial, rope, origin, unadapted = Stack.masks, None, None, None, Stack.origin, Stack.unadapted
    like = property(lambda self: self.lm_head.linear.weight)

    def __init__(self, model: Any) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.model, self.config = model, base.config.get_text_config()
        self.lm_head: Any = Head(model.get_output_embeddings(), getattr(self.config, "final_logit_softcapping", None))
        most = getattr(self.config, "max_position_embeddings", None)
        self.cache_is = "cache" if "cache" in signature(base.forward).parameters else "past_key_values"
        self.layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
        ropes, tokens = getattr(self.config, "rope_parameters", None) or {}, base.get_input_embeddings()
        tables = [m.num_embeddings for m in base.modules() if isinstance(m, nn.Embedding) and m is not tokens]
        limits = [most for size in tables if most in (size, size - 2)]  # learnt positions
        for rope in (ropes, *ropes.values()):  # one, or one for each kind of layer
            if isinstance(rope, dict) and rope.get("rope_type") in ("dynamic", "longrope"):
                limits.append(rope.get("original_max_position_embeddings", most))
        self.longest = min(limits, default=2**62)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["model"], name)

    def save_pretrained(self, directory: str | Path, whole: Any = None) -> None:
        """As the model does; tokenizer and chat template come along."""
        self.model.save_pretrained(directory)
        copy_beside(self.origin, directory)

    def dropout_seed(self) -> int | None:
        """See protocol.Model."""
        return int(torch.randint(2**62, ())) if self.model.training and (self.draws or self.masks) else None

    def new_memory(
        self, batch: int, capacity: int, receiving: Sequence[Chunk] = (), options: Options = DEFAULTS
    ) -> WrappedMemory:
        """See protocol.Model. Raises InputError for what would go wrong."""
        for module in self.model.modules():
            if getattr(module, "gradient_checkpointing", False):
                raise InputError("call gradient_checkpointing_disable(): seco(..., recompute=True) does the same")
            if torch.is_grad_enabled() and "bitsandbytes" in type(module).__module__ and not module.training:
                raise InputError("call train(): on a CPU, 4-bit layers in evaluation lose their gradient, for good")
        if options.recompute and not self.layers:
            raise InputError("its layers are no GradientCheckpointingLayers: it can only run without recompute")
        return WrappedMemory(MemorySpec(batch, capacity, receiving, options, self.like))

    def run(
        self, input_ids: Tensor, memory: Any = None, chunks: Sequence[Chunk] = (), options: Options = DEFAULTS
    ) -> tuple[Tensor, Written]:
        """See protocol.Model. A whole text is a chunk without a past."""
        if len(chunks) > 1 and (options.dropout_seed is not None or self.states):  # masks and states are one chunk's
            parts = []
            for chunk, ids in zip(chunks, input_ids.split([c.stop - c.start for c in chunks], 1), strict=True):
                hidden, written = self.run(ids, memory, [chunk], options)
                memory.write([chunk], written)
                parts.append(hidden)
            return torch.cat(parts, 1), []
        if memory is None:
            memory, chunks = self.new_memory(input_ids.shape[0], 0, (), options), [Chunk(0, input_ids.shape[1])]
        place, seed, drops, told = span(chunks), options.dropout_seed, self.draws or self.masks, options.positions
        if place.stop > self.longest:
            raise InputError(f"past {self.longest} tokens it has no positions, or a RoPE that depends on the length")
        positions = torch.arange(place.start, place.stop, device=input_ids.device) if told is None else told[..., place]
        recompute, cap, linear = options.recompute and torch.is_grad_enabled(), self.lm_head.cap, self.lm_head.linear
        run = Run(memory, chunks, recompute)
        again = partial(
            checkpoint, use_reentrant=False, preserve_rng_state=bool(drops),
            context_fn=lambda: (nullcontext(), self.attending(run)),
        )  # fmt: skip
        with (
            self.attending(run),
            changed([linear], "forward", lambda _: lambda x: x),
            # So high a cap changes nothing; some insist on a number.
            changed([] if cap is None else [self.config], "final_logit_softcapping", lambda _: 2.0**60),
            changed(self.layers if recompute else [], "forward", lambda layer: partial(again, layer.forward)),
            torch.random.fork_rng([self.like.device] if self.like.is_cuda else [], enabled=seed is not None),
        ):
            if seed is not None:
                torch.manual_seed(seed + place.start)  # fill, rebuild and recompute draw the same
            given = {"position_ids": positions.view(-1, input_ids.shape[1]).expand(input_ids.shape), self.cache_is: run}
            hidden = self.model(input_ids=input_ids, use_cache=True, **given).logits.to(self.like.dtype)
        return hidden if linear.bias is None else nn.functional.pad(hidden, (0, 1), value=1.0), run.close()

    @torch.no_grad()
    def fill(self, input_ids: Tensor, memory: WrappedMemory, chunks: Sequence[Chunk], options: Options) -> Written:
        """See protocol.Model."""
        return self.run(input_ids, memory, chunks, options)[1]

    @contextmanager
    def attending(self, run: Run) -> Iterator[None]:
        """Within the block, the model attends as we do."""
        with changed([self.config], "_attn_implementation", lambda _: NAME), changed([Run], "now", lambda _: run):
            yield


def wrap(model: Any) -> Wrapped:
    """A causal language model of transformers, or PEFT's of one, for `seco`, `spaco` and `full`.

        wrapped = mc.wrap(model)
        loss = mc.seco(wrapped, input_ids, labels, chunk_size=512)

    The model stays as it is, and usable as ever. A few tokens are run as a whole and in chunks: raises InputError if
    loss or gradient differ, or for anything else that is not done here. Dropout draws the same masks for a chunk
    whenever it is run. A router's auxiliary loss is not part of the loss. Needs `minichunk[hf]`.
    """
    try:
        wrapped = Wrapped(model)
        devices = [wrapped.like.device] if wrapped.like.is_cuda else []
        with torch.random.fork_rng(devices), changed(model.parameters(), "requires_grad", lambda _: False):
            check(wrapped)
    except Exception as error:
        what = str(error)
        if not isinstance(error, InputError):
            what = f"its code does not take what it is handed: {type(error).__name__}: {error}".partition("\n")[0]
            if not getattr(model, "_supports_attention_backend", True):
                what = "its attention does not go through transformers' AttentionInterface"
        raise InputError(f"{type(model).__name__} cannot be run in chunks: {what}") from error
    return wrapped


def check(wrapped: Wrapped) -> None:
    """Find out what the model draws and remembers. Raises InputError unless chunks compute what it does as a whole."""
    model, head, device = wrapped.model, wrapped.lm_head, wrapped.like.device
    options, leaves, forward = Options(recompute=bool(wrapped.layers)), list[Any](), head.linear.forward
    ids = torch.randint(head.weight.shape[0], (2, 13), generator=torch.Generator().manual_seed(0)).to(device)
    with changed(model.modules(), "training", lambda _: True), torch.no_grad():
        torch.manual_seed(0)
        drawn = model(input_ids=ids, use_cache=False), torch.rand(9, device=device)
        torch.manual_seed(0)
        wrapped.draws = not torch.equal(drawn[1], torch.rand(9, device=device))

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())  # its gradient will have passed through all layers
        return 1 * leaves[-1]  # which may be changed in place

    with (
        # bitsandbytes packs the weights of a layer in evaluation, for good
        changed(model.modules(), "training", lambda module: "bitsandbytes" in type(module).__module__),
        model.get_input_embeddings().register_forward_hook(keep),
    ):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        (gradient,) = torch.autograd.grad(loss, leaves)
        memory: Any = new_memory(wrapped, ids, TRIED, options)
        fill(wrapped, ids, TRIED[:-1], memory, options)
        leaves.clear()
        total = torch.zeros_like(loss)
        for chunk in reversed(TRIED):
            part, written, received = rebuild(wrapped, make_batch(ids, ids, None), chunk, memory, options)
            torch.autograd.backward([part, *written], [None, *received])
            total += part.detach()
        got = torch.cat([leaf.grad for leaf in reversed(leaves)], 1)
        with torch.no_grad(), changed([head.linear], "forward", lambda _: lambda x: 1000 * forward(x)):
            large = model(input_ids=ids, use_cache=False).logits  # where a cap is felt
            expected = head(1000 * wrapped.run(ids)[0])
    pairs = (total, loss), (got, gradient), (expected, large)
    off = [float((x.detach() - y.detach()).norm() / y.detach().norm()) for x, y in pairs]
    if not max(off) < (1e-3 if got.dtype.itemsize > 2 else 2**-4):
        raise InputError("its loss, gradient and large logits would be off by " + ", ".join(f"{x:.0e}" for x in off))
    wrapped.states = any(isinstance(layer, LayerState) for layer in memory.layers)
