"""Chunk-wise training of language models on long contexts: SeCO and SpaCO (arXiv 2505.16710)."""

from .errors import InputError
from .full import full
from .memory.pattern import Strided, Window
from .models.adapter_files import load_adapter, save_adapter
from .models.auto import load_model
from .models.config import LlamaConfig
from .models.gemma3 import Gemma3
from .models.gemma3_config import Gemma3Config
from .models.llama import Llama
from .models.lora import add_lora, merge_lora
from .models.mamba2 import Mamba2
from .models.mamba2_config import Mamba2Config
from .models.partial import partial_context
from .models.ssm import StateSpace
from .models.ssm_config import StateSpaceConfig
from .pipeline.links import Links, RankLost
from .pipeline.pipeline_seco import pipeline_seco, pipeline_spaco
from .pipeline.stage import PipelineStage
from .samplers import Bernoulli, FixedBudget, PaperBudget, Weight
from .seco import seco
from .spaco import spaco
from .training.generate import generate
from .walk.trace import trace

__version__ = "0.1.0"
__all__ = [
    "Bernoulli",
    "FixedBudget",
    "Gemma3",
    "Gemma3Config",
    "InputError",
    "Links",
    "Llama",
    "LlamaConfig",
    "Mamba2",
    "Mamba2Config",
    "PaperBudget",
    "PipelineStage",
    "RankLost",
    "StateSpace",
    "StateSpaceConfig",
    "Strided",
    "Weight",
    "Window",
    "add_lora",
    "full",
    "generate",
    "load_adapter",
    "load_model",
    "merge_lora",
    "partial_context",
    "pipeline_seco",
    "pipeline_spaco",
    "save_adapter",
    "seco",
    "spaco",
    "trace",
]
