"""`wrap(model)`: a causal language model of the transformers library for `seco` and `spaco`, as it is.

The model's own forward runs a chunk; what it is handed for that is in transformers_cache.py. What is not known to be
right in chunks is refused: by the attention function, if it is asked for what it does not do, and by `wrap`, which
compares loss and gradient of a few tokens with the model's own.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ..chunks import Chunk, Documents, span
from ..errors import InputError
from ..files.checkpoint import copy_beside
from ..loss import logits_of
from ..memory.layer_memory import MemorySpec
from ..memory.state import LayerState
from ..protocol import DEFAULTS, Options, Written
from ..seco import seco
from .lora import changed
from .stack import Stack
from .transformers_cache import NAME, Run, WrappedMemory


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

    def inputs(self, x: Tensor) -> Tensor:
        """What the loss multiplies by the weight, of what the model hands its LM head (…, E)."""
        return x if self.linear.bias is None else F.pad(x, (0, 1), value=1.0)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits (…, V) of such inputs, in float32 or wider."""
        return logits_of(hidden, self.weight, self.cap)


class Wrapped:
    """See protocol.Model. Whatever it is asked beyond that is asked of the model: `parameters()`, `train()`, ….

    draws, states: whether it draws random numbers when it trains, and hands on states; takes_documents: whether it
    counts by the positions that it is told, and has no states. `wrap` finds out.
    """

    draws, states, takes_documents = False, False, False
    run_chunks, chunk_losses, ends = Stack.run_chunks, Stack.chunk_losses, Stack.ends  # for the commands, as all these
    masks, lora, partial, rope, origin, unadapted = Stack.masks, None, None, None, Stack.origin, Stack.unadapted
    like = property(lambda self: self.lm_head.linear.weight)

    def __init__(self, model: Any) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.model, self.config = model, base.config.get_text_config()
        self.lm_head: Any = Head(model.get_output_embeddings(), getattr(self.config, "final_logit_softcapping", None))
        self.cache_is = "cache" if "cache" in signature(base.forward).parameters else "past_key_values"
        experts = any(name.endswith("experts.gate_up_proj") for name, _ in base.named_parameters())
        self.fused = ("gate_proj", "up_proj", "down_proj") if experts else ()  # PEFT takes these for experts' own
        self.layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
        most, tokens = getattr(self.config, "max_position_embeddings", None), base.get_input_embeddings()
        tables = [m.num_embeddings for m in base.modules() if isinstance(m, nn.Embedding) and m is not tokens]
        limits = [most for size in tables if most in (size, size - 2)]  # learnt positions
        ropes = getattr(self.config, "rope_parameters", None) or {}
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

    def new_memory(self, batch: int, capacity: int, receiving: Any = (), options: Options = DEFAULTS) -> WrappedMemory:
        """See protocol.Model. Raises InputError for what would go wrong."""
        if self.model.is_gradient_checkpointing:
            raise InputError("call gradient_checkpointing_disable(): seco(..., recompute=True) does the same")
        in_evaluation = (m for m in self.model.modules() if "bitsandbytes" in type(m).__module__ and not m.training)
        if torch.is_grad_enabled() and any(in_evaluation):
            raise InputError("call train(): on a CPU, 4-bit layers in evaluation lose their gradient, for good")
        if options.recompute and not self.layers:
            raise InputError("its layers are no GradientCheckpointingLayers: it can only run without recompute")
        return WrappedMemory(MemorySpec(batch, capacity, receiving, options, self.like))

    def run(self, input_ids: Tensor, memory: Any = None, chunks: Any = (), options: Options = DEFAULTS) -> Any:
        """See protocol.Model. A whole text is a chunk without a past."""
        if memory is None:
            memory, chunks = self.new_memory(len(input_ids), 0, (), options), [Chunk(0, input_ids.shape[1])]
        seed, place, recompute = options.dropout_seed, span(chunks), options.recompute and torch.is_grad_enabled()
        if len(chunks) > 1 and (seed is not None or self.states):  # masks and states are one chunk's
            parts = []
            for chunk, ids in zip(chunks, input_ids.split([c.stop - c.start for c in chunks], 1), strict=True):
                hidden, written = self.run(ids, memory, [chunk], options)
                memory.write([chunk], written)
                parts.append(hidden)
            return torch.cat(parts, 1), []
        (B, C), told, documents = input_ids.shape, options.positions, options.documents
        positions = torch.arange(place.start, place.stop, device=input_ids.device) if told is None else told[..., place]
        here = documents.between(place.start, place.stop)
        lengths = [min(end, place.stop) - begin + documents.trunk * (begin > 0) for begin, end in here]
        if max(lengths) > self.longest:
            raise InputError(f"past {self.longest} tokens it has no positions, or a RoPE that depends on the length")
        run, head = Run(memory, chunks, recompute), self.lm_head
        ours = [(self.config, "_attn_implementation", NAME), (Run, "now", run)]  # the model attends as we do
        more: list[Any] = [(head.linear, "forward", head.inputs)]
        if head.cap is not None:  # so high a cap changes nothing; some insist on a number
            more.append((self.config, "final_logit_softcapping", 2.0**60))
        if recompute:
            again = partial(
                checkpoint, nn.Module.__call__, use_reentrant=False, preserve_rng_state=seed is not None,
                context_fn=lambda: (nullcontext(), changed(*ours)),
            )  # fmt: skip
            more.append((GradientCheckpointingLayer, "__call__", lambda *given, **named: again(*given, **named)))
        devices = [input_ids.device] if input_ids.is_cuda else []
        with changed(*ours, *more), torch.random.fork_rng(devices, enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed + place.start)  # fill, rebuild and recompute draw the same
            given = {"position_ids": positions.view(-1, C).expand(B, -1), self.cache_is: run, "use_cache": True}
            hidden = self.model(input_ids=input_ids, **given).logits.to(self.like.dtype)
        self.states = any(isinstance(layer, LayerState) for layer in memory.layers)
        return hidden, run.close()

    @torch.no_grad()
    def fill(self, input_ids: Tensor, memory: WrappedMemory, chunks: Sequence[Chunk], options: Options) -> Written:
        """See protocol.Model."""
        return self.run(input_ids, memory, chunks, options)[1]


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
    """Find out what the model draws. Raises InputError unless chunks compute what it does as a whole."""
    model, head, embedding = wrapped.model, wrapped.lm_head, wrapped.model.get_input_embeddings()
    ids = torch.randint(len(head.weight), (2, 10), generator=torch.Generator().manual_seed(0)).to(wrapped.like.device)
    random, forward, pairs = torch.cuda if ids.is_cuda else torch, head.linear.forward, list[Any]()
    probe = torch.zeros_like(embedding(ids), requires_grad=True)  # its gradient will have passed through all layers

    def probed(module: nn.Module, inputs: Any, x: Tensor) -> Tensor:
        return x + probe[:, span(Run.now.chunks) if Run.now is not None else slice(None)]

    training = [(module, "training", True) for module in model.modules()]
    # bitsandbytes packs the weights of a layer in evaluation, for good
    evaluating = [(module, "training", "bitsandbytes" in type(module).__module__) for module in model.modules()]
    frozen = [(parameter, "requires_grad", False) for parameter in model.parameters()]
    with changed(*training, *frozen), torch.no_grad():
        before = random.get_rng_state()
        model(input_ids=ids, use_cache=False)
        wrapped.draws = not torch.equal(before, random.get_rng_state())
        random.set_rng_state(before)
    only = (wrapped, "parameters", lambda: iter([probe]))  # is in training
    with changed(*evaluating, *frozen, only), embedding.register_forward_hook(probed):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        (gradient,) = torch.autograd.grad(loss, probe)
        for size in (4, 1):  # for a single token some models have other code
            pairs.append((seco(wrapped, ids, ids, size, recompute=bool(wrapped.layers)), loss))
            pairs.append((probe.grad, gradient))
            probe.grad = None
        with torch.no_grad(), changed((head.linear, "forward", lambda x: 1000 * forward(x))):
            large = model(input_ids=ids, use_cache=False).logits  # where a cap is felt
            pairs.append((head(1000 * wrapped.run(ids)[0]), large))
    if not wrapped.states:
        with torch.no_grad(), changed(*evaluating):
            far = min(wrapped.longest, 2**20) - 10  # where a second document begins, which knows nothing of the first
            told = Options(positions=torch.arange(-far, 10).to(ids), documents=Documents((0, far), 0, far))
            memory, alone = wrapped.new_memory(2, far, (), told), wrapped.run(ids)[0]
            pairs.append((wrapped.run(ids, memory, [Chunk(far, far + 10)], told)[0], alone))
    off = [float((x.detach() - y.detach()).norm() / y.detach().norm()) for x, y in pairs]
    right = [x < (1e-3 if gradient.dtype.itemsize > 2 else 0.25) for x in off]  # one that is, in bfloat16: 0.1
    wrapped.takes_documents = all(right[5:]) and not wrapped.states
    if not all(right[:5]):
        raise InputError("its loss, gradient or large logits would be off by " + ", ".join(f"{x:.0e}" for x in off))
