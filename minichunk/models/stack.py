"""Layers one after the other, each with a memory of its own: what `seco` asks of a model, for any kind of layer."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..chunks import Chunk, cut, span
from ..loss import token_losses
from ..memory.layer_memory import LayerMemories, MemorySpec, wide
from ..protocol import DEFAULTS, Options, Written


class Stack(nn.Module):
    """A `protocol.Model`: embedding, layers, norm, LM head. The layers may be of different kinds.

    A layer is called as `layer(x, past, *shared)` with x (B, T, E) and returns the next x and what it writes;
    `layer.fill(x, past, *shared)` returns the latter alone. `past` is what it sees of its memory (None: it runs
    the whole sequence at once), `shared` what all layers get. `layer.new_memory(spec)` makes that memory.
    `from_pretrained(directory)` has trained weights, else they are random.
    config: with vocab_size, hidden_size and tie_word_embeddings, in config.json's terms."""

    config_class: ClassVar[Any]  # with `to_dict` and `from_dict`
    from_pretrained: ClassVar[Any]  # load.py sets these two: a model needs no files
    save_pretrained: ClassVar[Any]
    names: ClassVar = ("model", "embed_tokens", "norm")  # of all but the LM head, and of two things in there
    model: Any
    lora: Any = None  # what `add_lora` was told, if there is an adapter
    masks: Any = None  # lora.py's DropoutMasks, if there are dropouts
    partial: Any = None  # what `partial_context` changed since the checkpoint was loaded
    rope: Any = None  # what `change_rope` did
    origin: Path | None = None  # the directory that it was loaded from
    ends: Any = None  # the end tokens of its generation_config.json, as a config has them; None: those of the config
    takes_documents: ClassVar = True  # see Options.documents
    takes_positions: Any = False  # whether a token's position is more than its place in the text
    unadapted: tuple[str, ...] = ()  # linear layers that an adapter leaves out unless told otherwise

    def __init__(self, config: Any, layers: Iterable[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.config: Any = config
        body = nn.Module()
        self.add_module(self.names[0], body)
        body.add_module(self.names[1], nn.Embedding(config.vocab_size, config.hidden_size))
        body.layers = nn.ModuleList(layers)
        body.add_module(self.names[2], norm)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)
        self.tie_weights()

    embedding = property(lambda self: self.get_submodule(f"{self.names[0]}.{self.names[1]}"))
    layers = property(lambda self: self.get_submodule(f"{self.names[0]}.layers"))
    norm = property(lambda self: self.get_submodule(f"{self.names[0]}.{self.names[2]}"))

    def tie_weights(self) -> None:
        """Let embedding and LM head be one parameter, where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embedding.weight

    @property
    def like(self) -> Tensor:
        """A tensor of the model's dtype, on its device: a norm's weight, as no adapter is put there, and no 4 bits."""
        return next(module.weight for module in self.layers.modules() if isinstance(module, nn.RMSNorm))

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Of what goes from layer to layer."""
        return wide(self.like) if getattr(self.config, "residual_in_fp32", False) else self.like.dtype

    def blocks(self, layers_at_once: int) -> list[Self]:
        """See protocol.LayeredModel. They share all weights with the model."""
        return [self._block(*layers) for layers in cut(len(self.layers), layers_at_once)]

    def _block(self, start: int, stop: int) -> Self:
        """With the first layers goes the embedding, with the last ones go norm and LM head; elsewhere x passes."""
        block, inner = copy(self), copy(self.get_submodule(self.names[0]))
        block._modules = {**self._modules, self.names[0]: inner}
        inner._modules = {**inner._modules, "layers": self.layers[start:stop]}
        if start > 0:
            inner._modules[self.names[1]] = nn.Identity()
        if stop < len(self.layers):
            inner._modules[self.names[2]] = block._modules["lm_head"] = nn.Identity()
        return block

    def shared(self, x: Tensor, positions: Tensor, whole: Tensor | None) -> tuple[Any, ...]:
        """What every layer is given beside x (B, T, E), which is at these positions, int64 (T) or (B, 1, T).
        whole: those of the whole text; None where a part of it is run and they were not told, or of several texts."""
        return ()

    def _shared(self, x: Tensor, chunks: Sequence[Chunk], options: Options) -> tuple[Any, ...]:
        """The same for what these chunks are; without a memory there are none, and it is a whole text."""
        whole, start = options.positions, chunks[0].start if chunks else 0
        stop = start + x.shape[1]
        here = torch.arange(start, stop, device=x.device) if whole is None else whole[..., start:stop]
        return self.shared(x, here, None if options.documents.starts else whole if chunks else here)

    def new_memory(
        self, batch: int, capacity: int, receiving: Sequence[Chunk] = (), options: Options = DEFAULTS
    ) -> LayerMemories:
        """See protocol.Model."""
        spec = MemorySpec(batch, capacity, receiving, options, self.like)
        return LayerMemories([layer.new_memory(spec) for layer in self.layers], receiving)

    def dropout_seed(self) -> int | None:
        """See protocol.Model."""
        return None if self.masks is None else int(torch.randint(2**62, ()))

    def run(
        self, input_ids: Tensor, memory: LayerMemories | None = None, chunks: Sequence[Chunk] = (),
        options: Options = DEFAULTS,
    ) -> tuple[Tensor, Written]:  # fmt: skip
        """Run some tokens, on top of the memory if there is one.
        input_ids: int64 (B, T). memory: of all positions before; read, not written.
        chunks: the adjacent chunks that these tokens are, where there is a memory.
        Returns the last layer's normalized output (B, T, E) and what these tokens write, one tuple for each layer."""
        x = self.embedding(input_ids)  # (B, T, E)
        shared = self._shared(x, chunks, options)
        written, call = [], self._layer
        recompute = options.recompute and torch.is_grad_enabled()
        if recompute:  # on top of a memory dropout draws its masks from seeds: no generator's state to replay
            call = partial(checkpoint, self._layer, use_reentrant=False, preserve_rng_state=memory is None)
        for i, layer in enumerate(self.layers):
            # Below the first layer that learns, the past needs no gradient either: there is nothing to hand it to.
            learns = x.requires_grad or any(p.requires_grad for p in layer.parameters())
            with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
                past = memory.layers[i].past(chunks, save=recompute) if memory is not None else None
            x, wrote = call(layer, chunks, options, x, past, *shared)
            written.append(wrote)
        return self.norm(x), written

    @torch.no_grad()
    def fill(
        self, input_ids: Tensor, memory: LayerMemories, chunks: Sequence[Chunk], options: Options = DEFAULTS
    ) -> Written:
        """As `run`, without gradients and only as far as memory needs it: the last layer stops at what it writes."""
        x = self.embedding(input_ids)  # (B, T, E)
        shared = self._shared(x, chunks, options)
        *layers, last = zip(self.layers, memory.layers, strict=True)
        written = []
        for layer, layer_memory in layers:
            x, wrote = self._layer(layer, chunks, options, x, layer_memory.past(chunks, save=False), *shared)
            written.append(wrote)
        past = last[1].past(chunks, save=False)
        return [*written, self._layer(last[0].fill, chunks, options, x, past, *shared)]

    @torch.no_grad()
    def run_chunks(
        self, input_ids: Tensor, memory: Any, chunk_size: int, start: int = 0, options: Options = DEFAULTS
    ) -> Iterator[tuple[slice, Tensor]]:
        """Inference of input_ids (B, T) from the position `start`, chunk by chunk, writing the memory.
        memory: None: one for this text alone. options: with the positions of the whole text, where rope depends on its
        length. Yields each chunk's place in input_ids and its normalized output (B, C, E)."""
        if memory is None:
            options = Options(positions=torch.arange(input_ids.shape[1], device=input_ids.device))
            memory = self.new_memory(*input_ids.shape)
        for chunk in cut(input_ids.shape[1], chunk_size):
            rows = span([chunk])
            here = [Chunk(start + chunk.start, start + chunk.stop)]
            hidden, written = self.run(input_ids[:, rows], memory, here, options)
            memory.write(here, written)
            yield rows, hidden

    @torch.no_grad()
    def chunk_losses(self, input_ids: Tensor, targets: Tensor, chunk_size: int) -> Iterator[tuple[slice, Tensor]]:
        """Each chunk's place in input_ids (B, T), and the loss (B, C) of its targets in nats; 0 where there is none."""
        for rows, hidden in self.run_chunks(input_ids, None, chunk_size):
            yield rows, token_losses(hidden, self.lm_head.weight, targets[:, rows])

    def _layer(self, layer: Any, chunks: Sequence[Chunk], options: Options, *inputs: Any) -> Any:
        """One layer; its dropouts draw the masks of these chunks, also when recompute runs it again."""
        with nullcontext() if self.masks is None else self.masks.of(options.dropout_seed, chunks):
            return layer(*inputs)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (B, T, V) of a whole sequence, without a memory."""
        hidden, _ = self.run(input_ids)
        return self.lm_head(hidden)
