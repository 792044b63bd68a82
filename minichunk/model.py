"""The Llama, leaf to root. Its memory of earlier chunks, the cache, is an argument.

Shapes: B batch, T tokens of this call, H query heads, G key-value heads, D head size,
E hidden size, V vocabulary. Parameter names are Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import Past
from .cache import Cache
from .chunks import Chunk, cut
from .config import LlamaConfig
from .lora import DropoutMasks
from .rope import rope_tables, rotate

Recompute = bool | Literal["all"]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        E, D = config.hidden_size, config.head_dim
        H, G = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = D
        self.q_proj = nn.Linear(E, H * D, bias=config.attention_bias)
        self.k_proj = nn.Linear(E, G * D, bias=config.attention_bias)
        self.v_proj = nn.Linear(E, G * D, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * D, E, bias=config.attention_out_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(D, config.rms_norm_eps)
            self.k_norm = RMSNorm(D, config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, T, H*D) -> (B, H, T, D)

    def keys_values(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What this chunk puts into the cache: keys and values, each (B, G, T, D)."""
        k, v = self.heads(self.k_proj(x)), self.heads(self.v_proj(x))
        if self.qk_norm:
            k = self.k_norm(k)
        return rotate(k, rope), v

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], past: Past | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q = self.heads(self.q_proj(x))  # (B, H, T, D)
        if self.qk_norm:
            q = self.q_norm(q)
        q = rotate(q, rope)
        k, v = self.keys_values(x, rope)
        if past is None:  # the whole sequence at once: ordinary attention, nothing of ours
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            y = past.attend(q, k, v)
        y = y.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, H*D)
        return self.o_proj(y), (k, v)


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        E, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(E, inner, bias=bias)
        self.up_proj = nn.Linear(E, inner, bias=bias)
        self.down_proj = nn.Linear(inner, E, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], past: Past | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, written = self.self_attn(self.input_layernorm(x), rope, past)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), written

    def keys_values(self, x: Tensor, rope: tuple[Tensor, Tensor], past: Past | None) -> tuple[Tensor, Tensor]:
        """What `forward` writes, and no more."""
        return self.self_attn.keys_values(self.input_layernorm(x), rope)


class Decoder(nn.Module):
    """Everything but the LM head; the name and its parts' names are Hugging Face's."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """A decoder-only transformer: Llama 1-3, Mistral without a window, Qwen2, Qwen3.

    `Llama(config)` has random weights; `Llama.from_pretrained(directory)` has trained ones.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.dropout_masks: DropoutMasks | None = None  # set by add_lora
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        load_in_4bit: bool = False,
    ) -> Llama:
        """Load a Hugging Face checkpoint directory (`config.json` and safetensors).

        dtype: of all parameters; None takes that of the first tensor in the files.
        load_in_4bit: store the linear layers' weights in 4 bits, for LoRA; see quantize.py. Raises InputError.
        """
        from .weights import load_pretrained

        return load_pretrained(directory, dtype, device, load_in_4bit)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors`. Raises InputError for an unmerged adapter."""
        from .weights import save_pretrained

        save_pretrained(self, directory)

    def run(
        self,
        input_ids: Tensor,
        cache: Cache | None = None,
        chunks: Sequence[Chunk] = (),
        recompute: Recompute = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run some tokens, on top of the cache if there is one.

        input_ids: int64 (B, T). cache: keys and values of all positions before; read, not written.
        chunks: the adjacent chunks that these tokens are, where there is a cache.
        recompute: keep only the layers' inputs for the backward pass and run each layer again there; True keeps
        what attention over the cache returned too, "all" runs that again as well.

        Returns the last layer's normalized output (B, T, E) and what these tokens write into the
        cache: keys and values of each layer in turn, each (B, G, T, D).
        """
        x, rope, start = self._begin(input_ids, chunks)
        seed = cache.dropout_seed if cache is not None else None
        written: list[Tensor] = []
        for i, layer in enumerate(self.model.layers):
            past = cache.layers[i].past(start, keep=recompute is True) if cache is not None else None
            arguments = (layer, x, rope, past, seed, chunks)
            if recompute:
                # On top of a cache dropout draws its masks from seeds: no generator's state to replay.
                x, kv = checkpoint(self._layer, *arguments, use_reentrant=False, preserve_rng_state=cache is None)
            else:
                x, kv = self._layer(*arguments)
            written += kv
        return self.model.norm(x), written

    @torch.no_grad()
    def write(self, input_ids: Tensor, cache: Cache, chunks: Sequence[Chunk]) -> list[Tensor]:
        """As `run`, without gradients and only as far as the cache needs it.

        The last layer stops at its keys and values; there is no final norm and no LM head.
        """
        x, rope, start = self._begin(input_ids, chunks)
        written: list[Tensor] = []
        *layers, last = self.model.layers
        for layer, memory in zip(layers, cache.layers, strict=False):
            x, kv = self._layer(layer, x, rope, memory.past(start, keep=False), cache.dropout_seed, chunks)
            written += kv
        assert isinstance(last, Layer)
        written += self._layer(last.keys_values, x, rope, None, cache.dropout_seed, chunks)
        return written

    @torch.no_grad()
    def run_chunks(self, input_ids: Tensor, cache: Cache, chunk_size: int) -> Iterator[tuple[slice, Tensor]]:
        """Inference from position 0, chunk by chunk, writing the cache.

        Yields each chunk's positions and its normalized output (B, C, E).
        """
        for chunk in cut(input_ids.shape[1], chunk_size):
            rows = slice(chunk.start, chunk.stop)
            hidden, written = self.run(input_ids[:, rows], cache, [chunk])
            cache.write(chunk.start, written)
            yield rows, hidden

    def _begin(self, input_ids: Tensor, chunks: Sequence[Chunk]) -> tuple[Tensor, tuple[Tensor, Tensor], int]:
        start = chunks[0].start if chunks else 0
        x = self.model.embed_tokens(input_ids)  # (B, T, E)
        return x, rope_tables(self.config, start, start + input_ids.shape[1], x), start

    def _layer(
        self,
        layer: Callable[[Tensor, tuple[Tensor, Tensor], Past | None], Any],
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        past: Past | None,
        seed: int | None,
        chunks: Sequence[Chunk],
    ) -> Any:
        """One layer; its dropouts draw the masks of these chunks, also when recompute runs it again."""
        if self.dropout_masks is None:
            return layer(x, rope, past)
        with self.dropout_masks.of(seed, chunks):
            return layer(x, rope, past)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (B, T, V) of a whole sequence, without a cache."""
        hidden, _ = self.run(input_ids)
        return self.lm_head(hidden)
