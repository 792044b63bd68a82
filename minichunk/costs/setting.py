"""What is to be trained and how, as a forecast is told."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..chunks import ONE, Chunk, Documents
from ..memory.attention import BLOCK
from ..memory.window import Pattern, Strided
from ..models.partial import partial_config
from ..models.shapes import NAMES, layer_memory_bytes, patterns, random_model, shape
from ..models.stack import Stack
from ..pipeline.links import MOST_ON_THE_WAY
from ..training.options import DTYPES, PREFERENCES, StepOptions, changed, option

CHUNKED = ("seco", "spaco")
METHODS = (*CHUNKED, "full", "full-recompute", "full-recompute-tiled", "full-recompute-offload")


@dataclass(frozen=True)
class Share:
    """What one rank of a pipeline has of the layers, which are split by these counts."""

    counts: tuple[int, ...]
    rank: int

    @property
    def layers(self) -> slice:
        before = sum(self.counts[: self.rank])
        return slice(before, before + self.counts[self.rank])


class Way(NamedTuple):
    """A part of a step that is counted by itself: up or down through a block of layers, or through all (None)."""

    block: int | None
    down: bool


TEACHER = Way(None, False)  # has run before the step goes any way


@dataclass(frozen=True, kw_only=True)
class Setting(StepOptions):
    """A training whose memory is forecast; hashable, so that nothing is counted twice. `seq_len` plays no part."""

    model: str = option("llama-3-8b", f"directory or one of {', '.join(NAMES)}", metavar="M", group="the model")
    method: str = changed(
        StepOptions, "method", choices=METHODS, help="as of train; or without chunks: full, full-recompute, "
        "full-recompute-tiled (the loss in tiles), full-recompute-offload (and the layers' inputs in host memory)",
    )  # fmt: skip
    answer: int | None = option(
        None, "tokens of an answer, at most: what is before it is a prompt, which runs once", least=1, absent="the row",
        belongs=("objective", PREFERENCES),
    )  # fmt: skip
    chunk_size: int = changed(StepOptions, "chunk_size", default=512)
    budget: int = changed(StepOptions, "budget", default=8, absent="")
    recompute: bool = changed(StepOptions, "recompute", default=True, absent="on")
    targets: tuple[str, ...] | None = changed(StepOptions, "targets", absent="q_proj v_proj, or all without these")
    dtype: str = option("bfloat16", "of the model", choices=tuple(DTYPES))
    device: str = option("cuda", "whose kernels", choices=("cpu", "cuda"))

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def config(self) -> Any:
        """Of the model. Raises InputError."""
        config, pattern = shape(self.model), self.pattern()
        return config if pattern is None else partial_config(config, pattern, self.full_layers)

    def meta_model(self) -> Stack:
        """What is trained, without numbers."""
        shaped = self.config(), self.torch_dtype, self.rank, self.targets
        return random_model(*shaped, "meta", self.load_in_4bit)

    def patterns(self) -> list[Pattern]:
        """What each layer of attention sees, the teacher's too."""
        teacher = patterns(shape(self.teacher), self.torch_dtype) if self.teacher else []
        return patterns(self.config(), self.torch_dtype) + teacher

    @property
    def in_blocks(self) -> bool:
        return self.method in CHUNKED and (self.layers_at_once is not None or self.offload)

    def blocks(self, model: Stack) -> list[Stack]:
        return model.blocks(self.keywords()["layers_at_once"] or 1)

    def pass_chunks(self) -> int:
        """Chunks in a pass of the fill."""
        return (self.fill_size or self.chunk_size) // self.chunk_size

    def row(self, tokens: int) -> tuple[int, Documents]:
        """Of two texts: the prompt but for its last token, then with that the one answer, and the other."""
        if self.answer is None:
            return tokens, ONE
        answer = min(self.answer, tokens - 1)
        trunk = tokens - 1 - answer
        starts = tuple(dict.fromkeys((0, trunk, trunk + answer)))
        return trunk + 2 * answer, Documents(starts, trunk, self.chunk_size)

    def memory_bytes(self, tokens: int, way: Way | None = None) -> Tensor:
        """What each layer of the whole model remembers of so many tokens, and the gradients that have room from the
        start; int64 (layers, 2). way: of the layers of one block alone, or of the teacher; on the way up nothing is
        sent back."""
        (_, kept), (length, documents) = self.chunks(tokens), self.row(tokens)
        kept = kept if way is None or way.down else [Chunk(length, length)]
        options, rows = replace(self.options(), documents=documents), self.rows if self.answer is None else 1
        config = shape(self.teacher) if self.teacher and way == TEACHER else self.config()
        found = torch.tensor(layer_memory_bytes(config, self.torch_dtype, kept, options, rows))
        if way is None or way.block is None:
            return found
        return found.split(self.keywords()["layers_at_once"] or 1)[way.block]

    def even_from(self, share: Share | None = None) -> int:
        """Tokens from which on a step grows evenly: of a chunked one only the batch and what is remembered.
        From there a chunk sees as many pieces of the past as ever, the fill is at its longest pass, a pipeline full."""
        if self.method not in CHUNKED:
            return 1024
        stride = max((p.stride or 1 for p in self.patterns() if isinstance(p, Strided)), default=1)
        reach = max((p.reach + getattr(p, "sinks", 0) for p in self.patterns()), default=0)
        passes = 1 if share is None else MOST_ON_THE_WAY + 1  # a rank still has what it has handed on in them
        tokens = max(BLOCK * stride, passes * (self.fill_size or 0), reach)
        tokens += 0 if self.answer is None else self.answer + (self.fill_size or 0)  # a prompt's last pass may be short
        in_flight = 0 if share is None else len(share.counts) - share.rank
        return (tokens // self.chunk_size + 3 + in_flight + self.graphs) * self.chunk_size
