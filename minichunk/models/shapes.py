"""Named model shapes, for measurements and forecasts that need no weights."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..chunks import Chunk
from ..errors import InputError
from ..files.atomic import read_json
from ..files.checkpoint import advice
from ..memory.state import LayerState
from ..memory.window import Pattern
from ..protocol import DEFAULTS, Options
from .config import LlamaConfig
from .load import class_of, is_ours, load_wrapped, read_model_config
from .lora import add_lora
from .mamba2 import Mamba2Config
from .quantize import quantize
from .ssm import StateSpaceConfig
from .stack import Stack

_QWEN2: dict[str, Any] = {"model_type": "qwen2", "attention_bias": True, "rope_theta": 1e6}
_SHAPES: dict[str, Any] = {
    "llama-47m": LlamaConfig(8192, 576, 1536, 12, 9, 3, 64, 8192, tie_word_embeddings=True),
    "llama-3.2-1b": LlamaConfig(128256, 2048, 8192, 16, 32, 8, 64, 8192, rope_theta=5e5, tie_word_embeddings=True),
    "llama-3.2-3b": LlamaConfig(128256, 3072, 8192, 28, 24, 8, 128, 8192, rope_theta=5e5, tie_word_embeddings=True),
    "llama-3-8b": LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, 8192, rope_theta=5e5),
    "qwen2.5-14b": LlamaConfig(152064, 5120, 13824, 48, 40, 8, 128, 8192, **_QWEN2),
    "qwen2.5-32b": LlamaConfig(152064, 5120, 27648, 64, 40, 8, 128, 8192, **_QWEN2),
    "mamba2-130m": Mamba2Config(50288, 768, 128, 24, 24, 64, 1, tie_word_embeddings=True),
    "mamba2-2.7b": Mamba2Config(50288, 2560, 128, 64, 80, 64, 1, tie_word_embeddings=True),
    # As many parameters as adjoint sharding's largest model (arXiv 2501.00692), which says no more of its shape.
    # Whatever the shape, a state in all layers has a third as many numbers as the layers have parameters.
    "state-space-1.27b": StateSpaceConfig(32768, 4096, 256, 318),
}
NAMES = tuple(_SHAPES)


def shape(name: str) -> Any:
    """The config of a named shape, or of a checkpoint directory (its config.json alone); of a model_type that has no
    code here, the directory. Raises InputError."""
    if name in _SHAPES:
        return _SHAPES[name]
    if (Path(name) / "config.json").is_file():
        config = read_json(Path(name) / "config.json")
        return read_model_config(config) if is_ours(config) else Path(name)
    known = f"a directory with a config.json nor one of {', '.join(NAMES)}"
    raise InputError(f"--model {name!r} is neither {known}{advice(name)}")


def random_model(
    shaped: Any, dtype: torch.dtype, rank: int = 0, targets: Sequence[str] | None = None, device: str = "cpu",
    load_in_4bit: bool = False,
) -> Stack:  # fmt: skip
    """A model of this shape with random weights, and LoRA of `rank` unless that is 0. Raises InputError.
    shaped: what `shape` returns, or a name for it. targets: of LoRA, see `add_lora`."""
    config = shape(shaped) if isinstance(shaped, str) else shaped
    if isinstance(config, Path):
        model: Any = load_wrapped(config, dtype, device, load_in_4bit, weights=False)
        try:
            model.states = any(isinstance(layer, LayerState) for layer in memory_of(model, 1, [Chunk(0, 0)]).layers)
        except Exception as error:  # some look at numbers, of which "meta" has none
            raise InputError(f"{config}: this model_type cannot be forecast: {error}".partition("\n")[0]) from None
    else:
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # so that no wider copy of the weights is ever made
        try:
            with torch.device(device):
                model = class_of(config)(config)
        finally:
            torch.set_default_dtype(previous)
    if load_in_4bit:
        quantize(model)
    if rank:
        add_lora(model, rank, 2 * rank, targets)
    return model


_random_model = lru_cache(maxsize=8)(random_model)


def alike(config: Any) -> bool:
    """Whether all layers are of one kind."""
    return len(set(getattr(config, "layer_types", ()))) <= 1


def memory_of(model: Any, batch: int, kept: Sequence[Chunk], options: Options = DEFAULTS) -> Any:
    """The memory of a step whose kept chunks are these. A wrapped model makes that of a layer when it is first run."""
    memory = model.new_memory(batch, kept[-1].start, kept[:-1], options)
    if not memory.layers:
        with torch.no_grad():
            model.run(torch.zeros(batch, 2, dtype=torch.int64, device=model.like.device), memory, [Chunk(0, 2)])
    return memory


def layer_memories(
    config: Any, dtype: torch.dtype, kept: Sequence[Chunk], options: Options = DEFAULTS, batch: int = 1
) -> list[Any]:
    """Each layer's memory in a step whose kept chunks are these, without numbers."""
    with torch.device("meta"):
        return list(memory_of(_random_model(config, dtype, device="meta"), batch, kept, options).layers)


@lru_cache(maxsize=8)
def patterns(config: Any, dtype: torch.dtype) -> list[Pattern]:
    """What each layer of attention sees."""
    return [each.pattern for each in layer_memories(config, dtype, [Chunk(0, 0)]) if hasattr(each, "pattern")]


def layer_memory_bytes(*step: Any) -> list[tuple[int, int]]:
    """Bytes of each of `layer_memories`, and of the gradients sent back to it."""
    return [layer.tensors().bytes() for layer in layer_memories(*step)]
