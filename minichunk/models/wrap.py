"""`wrap(model)`: a causal language model of the transformers library for `seco` and `spaco`, as it is.

The model's own forward runs a chunk; what it is handed for that is in transformers_cache.py. What is not known to be
right in chunks is refused: by the attention function, if it is asked for what it does not do, and by `wrap`, which
compares loss and gradient of a few tokens with the model's own.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from ..batch import make_batch
from ..chunks import Chunk, cut
from ..errors import InputError
from ..files.checkpoint import copy_beside
from ..memory.layer_memory import MemorySpec
from ..memory.state import LayerState
from ..protocol import DEFAULTS, Options, Written
from ..seco import fill, new_memory, rebuild
from .config import Config, EndTokens
from .stack import Stack
from .transformers_cache import NAME, Filled, Run, WrappedMemory, running

ONE = cut(13, 13)
# A few tokens are tried, and cut so, or without the chunk of a single one: for that some models have other code.
CUTS = [Chunk(0, 5), Chunk(5, 6), Chunk(6, 11), Chunk(11, 13)], [Chunk(0, 5), Chunk(5, 11), Chunk(11, 13)]


class Head:
    """An LM head as `protocol.Model` wants it, a weight alone.

    A bias is one more column of it, for one more input of 1; of a cap of the logits it tells the loss.
    """

    def __init__(self, linear: nn.Linear, cap: float | None) -> None:
        self.linear, self.cap = linear, cap

    @property
    def weight(self) -> Tensor:
        """(V, E), or (V, E + 1) with a bias."""
        weight, bias = self.linear.weight, self.linear.bias
        if bias is not None:
            weight = torch.cat([weight, bias[:, None]], 1)
        if self.cap is not None:
            weight = weight.view_as(weight)
            weight.softcap = self.cap  # type: ignore[attr-defined]
        return weight

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits (…, V)."""
        return self.capped(hidden @ self.weight.T)

    def capped(self, logits: Tensor) -> Tensor:
        return logits if self.cap is None else self.cap * (logits / self.cap).tanh()


@dataclass(frozen=True)
class WrappedConfig(Config):
    """What the commands ask of a config."""

    vocab_size: int
    max_position_embeddings: int
    eos_token_id: EndTokens
    model_type: str


class Wrapped:
    """See protocol.Model. Whatever it is asked beyond that is asked of the model: `parameters()`, `train()`, ….

    wrap makes one, and finds out: does the model draw random numbers when it trains, does it hand on states, and is
    it right in a chunk of a single token, and how many tensors it writes.
    """

    draws, states, single = False, False, True
    ends: Any = None  # these as a Stack has them, for the commands
    partial, rope, lora, masks = None, None, None, None
    origin: Path | None = None
    unadapted = ()
    stop: int | None = None
    lm_head: Any
    run_chunks, chunk_losses = Stack.run_chunks, Stack.chunk_losses

    def __init__(self, model: Any) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        linear = model.get_output_embeddings()
        if hasattr(linear, "modules_to_save"):  # PEFT's
            linear = linear.modules_to_save[linear.active_adapter]
        if type(linear) is not nn.Linear:
            raise InputError(
                f"its LM head is a {type(linear).__name__} ({type(linear).__module__}), not torch's Linear"
            )
        self.model, self.linear, self.text = model, linear, base.config.get_text_config()
        self.config = WrappedConfig(
            linear.out_features, getattr(self.text, "max_position_embeddings", 2**31), self.text.eos_token_id,
            self.text.model_type,
        )  # fmt: skip
        self.lm_head = Head(linear, getattr(self.text, "final_logit_softcapping", None))
        self.cache_is = "cache" if "cache" in signature(base.forward).parameters else "past_key_values"
        layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
        inner = {module for layer in layers for module in layer.modules() if module is not layer}
        self.layers = [layer for layer in layers if layer not in inner]
        ropes = getattr(self.text, "rope_parameters", None) or {}
        ropes = [ropes] if "rope_type" in ropes else [rope for rope in ropes.values() if isinstance(rope, dict)]
        grows = [rope for rope in ropes if rope.get("rope_type") in ("dynamic", "longrope")]
        limits = [rope.get("original_max_position_embeddings", self.text.max_position_embeddings) for rope in grows]
        tables = [m for m in base.modules() if type(m) is nn.Embedding and m is not base.get_input_embeddings()]
        most = self.config.max_position_embeddings
        limits += [most for table in tables if table.num_embeddings - most in (0, 2)]  # learnt positions
        self.longest: int | None = min(limits, default=None)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["model"], name)

    def save_pretrained(self, directory: str | Path, whole: Any = None) -> None:
        """As the model does; tokenizer and chat template come along."""
        if hasattr(self.text, "max_position_embeddings"):
            self.text.max_position_embeddings = self.config.max_position_embeddings
        self.model.save_pretrained(directory)
        copy_beside(self.origin, directory)

    @property
    def like(self) -> Tensor:
        """A tensor of the model's dtype, on its device."""
        return self.linear.weight

    def dropout_seed(self) -> int | None:
        """See protocol.Model."""
        draws = self.draws or self.masks is not None
        return int(torch.randint(2**62, ())) if draws and self.model.training else None

    def new_memory(
        self, batch: int, capacity: int, receiving: Sequence[Chunk] = (), options: Options = DEFAULTS
    ) -> WrappedMemory:
        """See protocol.Model. Raises InputError for what would go wrong."""
        self.check_length(capacity)
        if any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()):
            raise InputError("call gradient_checkpointing_disable(): seco(..., recompute=True) does the same")
        if any("bitsandbytes" in type(m).__module__ and not m.training for m in self.model.modules()) and receiving:
            raise InputError("call train(): on a CPU, 4-bit layers in evaluation lose their gradient, for good")
        if options.recompute and not self.layers:
            raise InputError("its layers are no GradientCheckpointingLayers: it can only run without recompute")
        return WrappedMemory(MemorySpec(batch, capacity, receiving, options, self.like))

    def check_length(self, length: int) -> None:
        """Raise InputError where there are no positions, or a chunk would have another RoPE than the whole."""
        if self.longest is not None and length > self.longest:
            raise InputError(f"past {self.longest} tokens it has no positions, or a RoPE that depends on the length")

    def run(
        self, input_ids: Tensor, memory: WrappedMemory | None = None, chunks: Sequence[Chunk] = (),
        options: Options = DEFAULTS,
    ) -> tuple[Tensor, Written]:  # fmt: skip
        """See protocol.Model. Without a memory it attends in its own way."""
        if memory is None:
            if options.recompute:
                raise InputError("as a whole it is recomputed by gradient_checkpointing_enable(): leave out recompute")
            with self.headless():
                return self.widened(self.model(input_ids=input_ids, use_cache=False).logits), []
        run = Run(memory, chunks, options.recompute)
        return self.hidden(input_ids, run, options), run.close()

    @torch.no_grad()
    def fill(self, input_ids: Tensor, memory: WrappedMemory, chunks: Sequence[Chunk], options: Options) -> Written:
        """See protocol.Model."""
        if len(chunks) > 1 and (options.dropout_seed is not None or self.states):  # masks and states are one chunk's
            for chunk, ids in zip(chunks, input_ids.split([c.stop - c.start for c in chunks], 1), strict=True):
                memory.write([chunk], self.fill(ids, memory, [chunk], options))
            return []
        run = Run(memory, chunks, stop=self.stop)
        with suppress(Filled):
            self.hidden(input_ids, run, options)
        return run.close()

    def hidden(self, input_ids: Tensor, run: Run, options: Options = DEFAULTS) -> Tensor:
        """What goes into the LM head (B, C, E), scaled as the logits are."""
        start, stop, seed = run.chunks[0].start, run.chunks[-1].stop, options.dropout_seed
        device, told = input_ids.device, options.positions
        self.check_length(stop)
        if start and input_ids.shape[1] == 1 and torch.is_grad_enabled() and not self.single:
            raise InputError("its own code for a single token computes something else: take another chunk_size")
        positions = torch.arange(start, stop, device=device) if told is None else told[..., start:stop]
        layers = self.layers if options.recompute and torch.is_grad_enabled() else []
        twice = partial(
            checkpoint, use_reentrant=False, preserve_rng_state=seed is not None,
            context_fn=lambda: (nullcontext(), self.attending(run)),
        )  # fmt: skip
        with (
            self.attending(run),
            self.headless(),
            torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=seed is not None),
            forwards(layers, lambda forward: partial(twice, forward)),
        ):
            if seed is not None:
                torch.manual_seed(seed + start)  # fill, rebuild and recompute draw the same
            given = {
                "position_ids": positions.view(-1, stop - start).expand(input_ids.shape),
                self.cache_is: run,
                "use_cache": True,
            }
            return self.widened(self.model(input_ids=input_ids, **given).logits)

    def widened(self, hidden: Tensor) -> Tensor:
        """In the LM head's dtype; with the 1 that its bias is multiplied by."""
        hidden = hidden.to(self.linear.weight.dtype)
        return hidden if self.linear.bias is None else nn.functional.pad(hidden, (0, 1), value=1.0)

    @contextmanager
    def attending(self, run: Run) -> Iterator[None]:
        """Within the block, the model attends as we do."""
        before, token = self.text._attn_implementation, running.set(run)
        self.text._attn_implementation = NAME
        try:
            yield
        finally:
            self.text._attn_implementation = before
            running.reset(token)

    @contextmanager
    def headless(self) -> Iterator[None]:
        """Within the block, its logits are what goes into the LM head, and are not capped."""
        cap = self.lm_head.cap
        if cap is not None:
            self.text.final_logit_softcapping = 2.0**60  # so high that it changes nothing; some insist on a number
        try:
            with forwards([self.linear], lambda _: lambda x: x):
                yield
        finally:
            if cap is not None:
                self.text.final_logit_softcapping = cap


def load_transformer(directory: str | Path, dtype: torch.dtype | None, device: str | torch.device) -> Wrapped:
    """A checkpoint directory, as the commands take it: in evaluation mode. Raises InputError."""
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype or "auto")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{directory}: transformers cannot load it: {error}".partition("\n")[0]) from None
    wrapped = wrap(model.to(device).eval())
    wrapped.ends, wrapped.origin = model.generation_config.eos_token_id, Path(directory)
    return wrapped


@contextmanager
def forwards(modules: Iterable[nn.Module], make: Callable[[Any], Any]) -> Iterator[None]:
    """Within the block, each module's forward is what `make` makes of it."""
    before = [(module, vars(module).get("forward")) for module in modules]
    for module, _ in before:
        module.forward = make(module.forward)
    try:
        yield
    finally:
        for module, forward in before:
            del module.forward
            if forward is not None:
                module.forward = forward


def wrap(model: Any) -> Wrapped:
    """A causal language model of transformers, or PEFT's of one, for `seco`, `spaco` and `full`.

        wrapped = mc.wrap(model)
        loss = mc.seco(wrapped, input_ids, labels, chunk_size=512)

    The model stays as it is, and usable as ever. A few tokens are run as a whole and in chunks: raises InputError if
    loss or gradient differ, or for anything else that is not done here. Dropout draws the same masks for a chunk
    whenever it is run. A router's auxiliary loss is not part of the loss. Needs `minichunk[hf]`.
    """
    modes = [(module, module.training) for module in model.modules()]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        wrapped = Wrapped(model)
        model.requires_grad_(False)
        with torch.random.fork_rng([wrapped.like.device] if wrapped.like.is_cuda else []):
            find_draws(wrapped)
            try:
                compare(wrapped, CUTS[0])
            except Exception:  # whatever a model makes of a single token
                compare(wrapped, CUTS[1])
                wrapped.single = False
    except InputError as error:
        raise InputError(f"{type(model).__name__} cannot be run in chunks: {error}") from None
    except Exception as error:
        words = str(error).partition("\n")[0]
        what = f"its code does not take what it is handed: {type(error).__name__}: {words}"
        if not getattr(model, "_supports_attention_backend", True):
            what = "its attention does not go through transformers' AttentionInterface"
        raise InputError(f"{type(model).__name__} cannot be run in chunks: {what}") from error
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in learning:
            parameter.requires_grad_()
    return wrapped


def some_ids(wrapped: Wrapped) -> Tensor:
    weight = wrapped.like
    return torch.randint(weight.shape[0], (2, 13), generator=torch.Generator().manual_seed(0)).to(weight.device)


@torch.no_grad()
def find_draws(wrapped: Any) -> None:
    """Find out whether the model draws random numbers when it trains."""
    wrapped.model.train()
    ids, drawn = some_ids(wrapped), []
    for runs in (False, True):
        torch.manual_seed(0)
        with suppress(InputError):  # of a training: dropout that is not done here
            if runs:
                wrapped.run(ids, new_memory(wrapped, ids, ONE, DEFAULTS), ONE)
        drawn.append([torch.rand(1, device=device).item() for device in {"cpu", ids.device.type}])
    wrapped.draws = drawn[0] != drawn[1]


def compare(wrapped: Any, chunks: Sequence[Chunk]) -> None:
    """Find out what the model remembers. Raises InputError unless in chunks it computes what it does as a whole."""
    model, ids, options = wrapped.model, some_ids(wrapped), Options(recompute=bool(wrapped.layers))
    for module in model.modules():  # bitsandbytes packs the weights of a layer in evaluation, for good
        module.training = "bitsandbytes" in type(module).__module__
    with leaves_of(model.get_input_embeddings()) as leaves:  # their gradients have passed through all layers
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        (gradient,) = torch.autograd.grad(loss, leaves)
        memory: Any = new_memory(wrapped, ids, chunks, options)
        fill(wrapped, ids, chunks[:-1], memory, options)
        leaves.clear()
        total = torch.zeros_like(loss)
        for chunk in reversed(chunks):
            part, written, received = rebuild(wrapped, make_batch(ids, ids, None), chunk, memory, options)
            torch.autograd.backward([part, *written], [None, *received])
            total += part.detach()
    got = torch.cat([leaf.grad for leaf in reversed(leaves)], 1)
    off = [float((x.detach() - y.detach()).norm() / y.detach().norm()) for x, y in ((total, loss), (got, gradient))]
    if not max(off) < (1e-3 if got.dtype.itemsize > 2 else 2**-4):
        raise InputError(f"its loss and gradient would be off by {off[0]:.0e} and {off[1]:.0e}")
    wrapped.stop, wrapped.states = len(memory.of), any(isinstance(layer, LayerState) for layer in memory.layers)
    with torch.no_grad(), forwards([wrapped.linear], lambda _: lambda x: 1000 * x):  # a cap is not felt at first
        large = model(input_ids=ids, use_cache=False).logits
        expected = wrapped.lm_head.capped(1000 * wrapped.run(ids)[0][..., : wrapped.linear.in_features])
    if not torch.allclose(large.to(expected.dtype), expected, 1e-2):
        raise InputError("its logits are not a linear function of what goes into its LM head")


@contextmanager
def leaves_of(module: nn.Module) -> Iterator[list[Any]]:
    """What comes out of the module within the block, as leaves of the graph, first to last."""
    leaves: list[Any] = []

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return 1 * leaves[-1]  # which may be changed in place

    handle = module.register_forward_hook(hook)
    try:
        yield leaves
    finally:
        handle.remove()
