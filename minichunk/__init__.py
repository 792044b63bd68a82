"""Chunk-wise training of language models on long contexts: SeCO and SpaCO (arXiv 2505.16710).

The algorithm is imported at once. Names of models and tools are imported when they are first asked for, so that
`minichunk.tiny`, the algorithm and models with random weights need PyTorch alone.
"""

from importlib import import_module
from typing import Any

from .errors import InputError
from .full import full
from .losses import log_probs
from .samplers import Bernoulli, FixedBudget, PaperBudget, Weight
from .seco import seco
from .spaco import spaco

__version__ = "0.1.0"
_LATER = {
    "memory.window": ("Strided", "Window"),
    "models.adapter_files": ("load_adapter", "save_adapter"),
    "models.load": (  # which gives them `from_pretrained` and `from_dict`
        "Llama", "LlamaConfig", "Mamba2", "Mamba2Config", "StateSpace", "StateSpaceConfig",
        "change_rope", "load_model",
    ),
    "models.lora": ("add_lora", "merge_lora", "without_adapter"),
    "models.partial": ("partial_context",),
    "pipeline.links": ("Links", "RankLost"),
    "pipeline.stage": ("PipelineStage",),
    "pipeline.pipeline_seco": ("pipeline_seco", "pipeline_spaco"),
    "models.wrap": ("wrap",),  # needs transformers: minichunk[hf]
    "training.generate": ("generate",),
    "walk.trace": ("trace",),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _LATER.items() for name in names}
__all__ = [
    "Bernoulli", "FixedBudget", "InputError", "PaperBudget", "Weight", "full", "log_probs", "seco", "spaco",
    *_MODULE_OF,
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'minichunk' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return __all__
