"""Chunk-wise training of language models on long contexts: SeCO and SpaCO (arXiv 2505.16710)."""

from .adapter import load_adapter, save_adapter
from .config import LlamaConfig
from .errors import InputError
from .full import full
from .generate import generate
from .lora import add_lora, merge_lora
from .model import Llama
from .samplers import Bernoulli, FixedBudget, PaperBudget, Weight
from .seco import seco
from .spaco import spaco

__version__ = "0.1.0"
__all__ = [
    "Bernoulli",
    "FixedBudget",
    "InputError",
    "Llama",
    "LlamaConfig",
    "PaperBudget",
    "Weight",
    "add_lora",
    "full",
    "generate",
    "load_adapter",
    "merge_lora",
    "save_adapter",
    "seco",
    "spaco",
]
