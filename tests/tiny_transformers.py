"""Tiny models of transformers, with random weights, in float64 throughout; and their own gradient."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5")
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

logging.getLogger("transformers").setLevel(logging.ERROR)

# Of every name that some config has for a thing; scales are odd, so that a forgotten one is seen.
TINY: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "n_embd": 32, "d_model": 32, "intermediate_size": 48, "n_inner": 48,
    "ffn_dim": 48, "num_hidden_layers": 4, "n_layer": 4, "num_layers": 4, "n_layers": 4, "num_attention_heads": 4,
    "n_head": 4, "n_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "n_positions": 128, "sliding_window": 6, "attention_chunk_size": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "word_embed_proj_dim": 32, "rotary_dim": 4, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "shared_expert_intermediate_size": 16, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "mamba_d_state": 8,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_d_conv": 4,
    "mamba_chunk_size": 4, "dropout": 0.0, "attention_dropout": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "hidden_dropout": 0.0, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0,
    "activation_dropout": 0.0, "layerdrop": 0.0, "initializer_range": 0.3, "query_pre_attn_scalar": 11,
    "use_sliding_window": True, "max_window_layers": 2, "attention_multiplier": 0.4, "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7, "logits_scaling": 2.0, "logit_scale": 0.5, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 97, "laurel_rank": 4, "num_kv_shared_layers": 2,
}  # fmt: skip


def tiny_config(model_type: str, **more: Any) -> Any:
    kind = CONFIG_MAPPING[model_type]
    default = kind()
    default.allow_global_per_layer_attribute_access = True
    known = {name: x for name, x in TINY.items() if hasattr(default, name) or name in default.to_dict()}
    for alias, real in getattr(kind, "attribute_map", {}).items():  # n_head and num_attention_heads are one
        if alias in known:
            known.setdefault(real, known[alias])
            del known[alias]
    if isinstance(getattr(kind, "head_dim", None), property):
        known.pop("head_dim", None)
    return kind(**{name: x for name, x in (known | more).items() if x is not ...})


def tiny_transformer(model_type: str, **more: Any) -> Any:
    """In evaluation mode, with eager attention."""
    torch.manual_seed(0)
    config = tiny_config(model_type, **more)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager").eval()
    config._experts_implementation = "eager"  # grouped products know no float64
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # so that all matters: norms' weights and biases, too
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += (0.25 if parameter.ndim > 1 else 0.1) * noise
    return model


@contextmanager
def exact() -> Iterator[None]:
    """Who asks for float32 gets float64: models compute norms, softmax and losses in float32, whatever theirs is."""
    before = torch.float32, torch.float, Tensor.float
    torch.float32, torch.float, Tensor.float = torch.float64, torch.float64, Tensor.double  # type: ignore[misc]
    try:
        yield
    finally:
        torch.float32, torch.float, Tensor.float = before  # type: ignore[misc]


def own(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """Its own loss and full backpropagation."""
    loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    return loss.detach()


def batch(rows: int = 2, length: int = 23) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 97, (rows, length), generator=generator)
    return ids, ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, -100)
