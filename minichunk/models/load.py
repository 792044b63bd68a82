"""Models from Hugging Face checkpoint directories, and into them: config.json and safetensors."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files.atomic import check_room, read_json
from ..files.checkpoint import checkpoint_bytes, checkpoint_directory, read_checkpoint, write_checkpoint
from ..memory.window import Pattern, Strided, Window
from .config import FULL_ATTENTION, SLIDING_ATTENTION, Config, EndTokens, LlamaConfig, checked, needed
from .llama import Llama
from .lora import adapters
from .mamba2 import Mamba2, Mamba2Config
from .quantize import Linear4bit, check_bitsandbytes, is_in_4bit, is_stored_in_4bit
from .rope import OLD, RULES, RopeRule
from .ssm import StateSpace, StateSpaceConfig
from .stack import Stack

OTHERS: dict[str, Any] = {Mamba2Config.name: Mamba2, StateSpaceConfig.name: StateSpace}

_NO_BIAS = {"attention_bias": False, "attention_out_bias": False, "mlp_bias": False}
# What each model_type implies, whatever its config.json says.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": _NO_BIAS,
    "ministral": _NO_BIAS,
    "qwen2": {**_NO_BIAS, "attention_bias": True},
    "qwen3": {"mlp_bias": False, "qk_norm": True},
}
# The model_type of what no other library computes. transformers refuses its layer_types too, `partial_attention`.
_PARTIAL_CONTEXT = "partial_context"


def class_of(config: Any) -> Any:
    """The model's class of a config object, or of a parsed config.json: a Llama unless it is another's."""
    return OTHERS.get(str(config.get("model_type") if isinstance(config, dict) else config.name), Llama)


def read_model_config(config: dict[str, Any]) -> Any:
    """The config object of a parsed config.json. Raises InputError."""
    return class_of(config).config_class.from_dict(config)


def is_ours(config: dict[str, Any]) -> bool:
    """Whether the model of a parsed config.json has code here; others are transformers' own, wrapped."""
    return config.get("model_type") in {*_FAMILIES, *OTHERS, _PARTIAL_CONTEXT, None}


def load(
    kind: Any, directory: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu",
    load_in_4bit: bool = False, prepare: Callable[[Any], object] = lambda model: None,
) -> Any:  # fmt: skip
    """`kind.from_pretrained`: a Hugging Face checkpoint directory (`config.json` and safetensors) as such a model.

    `load_model`: as one of the class that the config's `model_type` names.
    dtype: of all parameters; None takes that of the first tensor in the files.
    load_in_4bit: store the linear layers' weights in 4 bits, for LoRA; see quantize.py.
    prepare: called with the model before it has its tensors; those of what it takes out are not read.
    Tensor by tensor onto the device: the host holds one at a time. The model is in eval mode. Raises InputError."""
    if load_in_4bit:
        check_bitsandbytes()
    path, generation = checkpoint_directory(directory) / "config.json", Path(directory) / "generation_config.json"
    config = read_json(path)
    if kind is Stack and not is_ours(config):
        return load_wrapped(directory, dtype, device, load_in_4bit, prepare)
    kind = class_of(config) if kind is Stack else kind
    try:
        with torch.device("meta"):  # shapes without memory
            model = kind(kind.config_class.from_dict(config))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    wanted = dict(model.named_parameters())  # a tied LM head is named once, as the embedding
    in_file = {parameter: name for name, parameter in wanted.items()}
    tied = {name: in_file[p] for name, p in model.named_parameters(remove_duplicate=False) if name not in wanted}
    if generation.is_file():
        model.ends = checked(EndTokens, f"{generation}: eos_token_id", read_json(generation).get("eos_token_id"))
    model.origin = Path(directory)
    prepare(model)
    here = {in_file[parameter]: name for name, parameter in model.named_parameters()}
    bytes_here = checkpoint_bytes(path.parent)
    if dtype is not None:
        bytes_here = sum(wanted[name].numel() for name in here) * dtype.itemsize
    advice = "take --dtype bfloat16, --load-in-4bit, a smaller model, or free memory"
    check_room(str(directory), bytes_here * (0.3 if load_in_4bit else 1), torch.device(device), advice)
    shapes = {name: p.shape for name, p in wanted.items()}
    for name, tensor in read_checkpoint(path.parent, shapes, tied, here.keys(), device):
        dtype = dtype or tensor.dtype  # one for all: the memory has the model's
        module_name, _, child = here[name].rpartition(".")
        module, tensor = model.get_submodule(module_name), tensor.to(dtype)
        if load_in_4bit and child == "weight" and isinstance(module, nn.Linear) and is_stored_in_4bit(module_name):
            model.set_submodule(module_name, Linear4bit(tensor, module.bias))
        else:
            setattr(module, child, nn.Parameter(tensor, requires_grad=not isinstance(module, Linear4bit)))
    if len(here) == len(wanted):
        model.tie_weights()
    return model.eval()


def load_wrapped(
    directory: str | Path, dtype: Any, device: Any, load_in_4bit: bool, prepare: Any = lambda model: None,
    weights: bool = True,
) -> Any:  # fmt: skip
    """`load` for the model_types that transformers computes, by `wrap`; without `weights`, random ones or of no device:
    on "meta", where nothing can be compared, what cannot be run in chunks is not found out."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM

        from .wrap import Wrapped, wrap
    except ImportError:
        raise InputError(f"{directory}: this model_type needs transformers: pip install 'minichunk[hf]'") from None
    if load_in_4bit:
        raise InputError(f"{directory}: 4 bits are for model_types of minichunk's own: load it with transformers")
    try:
        if weights:
            theirs: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype or "auto")
        else:
            with torch.device(device):
                theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{directory}: transformers cannot load it: {error}".partition("\n")[0]) from None
    model = (Wrapped if theirs.device.type == "meta" else wrap)(theirs.to(device).eval())
    model.ends, model.origin = theirs.generation_config.eos_token_id, Path(directory)
    prepare(model)
    return model


def save(
    model: Stack, directory: str | Path,
    whole: Callable[[dict[str, Tensor]], dict[str, Tensor] | None] = lambda tensors: tensors,
) -> None:  # fmt: skip
    """`model.save_pretrained`: write `config.json` and `model.safetensors`.
    Tokenizer, chat template and generation config of the directory that it was loaded from come along.
    whole: makes all tensors by name of those that are here, or None where nothing is to be written.
    Raises InputError for an adapter or a 4-bit base."""
    if adapters(model):
        raise InputError("the model has an unmerged LoRA adapter: call merge_lora first, or save it with save_adapter")
    if is_in_4bit(model):
        raise InputError("a model in 4 bits is not written: load it without load_in_4bit first")
    if model.config_class.from_dict(model.config.to_dict()) != model.config:
        raise InputError(f"no config.json describes this model: a {model.config.model_type} has other biases or norms")
    tensors = whole({name: parameter.detach() for name, parameter in model.named_parameters()})
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if tensors is not None:
        write_checkpoint(directory, {**model.config.to_dict(), "torch_dtype": dtype}, tensors, model.origin)


def read_llama_config(cls: type[LlamaConfig], config: dict[str, Any]) -> LlamaConfig:
    """`LlamaConfig.from_dict`, of a parsed `config.json`.
    Raises InputError, naming the field, for what this model does not compute."""
    partial = config.get("model_type") == _PARTIAL_CONTEXT
    field = "base_model_type" if partial else "model_type"
    model_type = config.get(field, None if partial else "llama")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        known = f"{', '.join(sorted(_FAMILIES))}, and by minichunk.load_model also {', '.join(OTHERS)}"
        raise InputError(f"config: {field} {model_type!r} is not supported; supported are {known}")
    c = {**config, "model_type": model_type}
    heads = checked(int, "num_attention_heads", needed(c, "num_attention_heads"))
    hidden = checked(int, "hidden_size", needed(c, "hidden_size"))
    c |= {
        "num_key_value_heads": c.get("num_key_value_heads") or heads,
        "head_dim": c.get("head_dim") or (128 if model_type == "qwen3" else hidden // heads),
        "attention_out_bias": c.get("attention_bias", False),
        "qk_norm": False,
        **_FAMILIES[model_type],
    }
    c["pattern"] = pattern_of(needed(c, "pattern")) if partial else None
    c["sliding_window"], c["layer_types"] = (None, needed(c, "layer_types")) if partial else _read_windows(c)
    c["rope_theta"], c["rope_scaling"] = _read_rope(c)
    return super(LlamaConfig, cls).from_dict(c)


def write_llama_config(config: LlamaConfig) -> dict[str, Any]:
    """`LlamaConfig.to_dict`, which `from_dict` and, unless there is a pattern, transformers 4 and 5 read back."""
    architecture = f"{config.model_type.capitalize()}ForCausalLM"
    out: dict[str, Any] = {"architectures": [architecture], "model_type": config.model_type, "hidden_act": "silu"}
    out |= Config.to_dict(config)
    out["rope_scaling"] = config.rope_scaling and config.rope_scaling.to_dict()
    kinds = {"layer_types": list(config.layer_types)} if config.layer_types else {}
    if config.pattern is not None:
        ours = {"model_type": _PARTIAL_CONTEXT, "architectures": ["PartialContextForCausalLM"]}
        return out | ours | kinds | {"base_model_type": config.model_type, "pattern": asdict(config.pattern)}
    if config.model_type == "llama":
        return out
    out |= {"sliding_window": config.sliding_window} | ({} if config.model_type == "mistral" else kinds)
    if config.model_type in ("qwen2", "qwen3"):
        out["use_sliding_window"] = config.sliding_window is not None
        if config.sliding_window is not None:  # for releases before `layer_types`
            out["max_window_layers"] = config.layer_types.index(SLIDING_ATTENTION)
    return out


def pattern_of(value: Any) -> Pattern:
    """The pattern that `asdict` made these fields of. Raises InputError."""
    kinds = [kind for kind in (Window, Strided) if isinstance(value, dict) and set(value) == set(vars(kind()))]
    if not kinds:
        raise InputError(f"config: pattern is {value!r}, but must have window and sinks, or block, local and stride")
    for name, given in value.items():
        if (name, given) != ("sinks", 0):
            checked(int, name, given)
    return kinds[0](**value)


def _read_windows(c: dict[str, Any]) -> tuple[int | None, tuple[str, ...]]:
    """`sliding_window` and `layer_types`, as transformers reads them; (None, ()) if no layer has a window."""
    model_type = c["model_type"]
    num_layers = checked(int, "num_hidden_layers", needed(c, "num_hidden_layers"))
    window = c.get("sliding_window", None if model_type == "llama" else 4096)  # transformers' default
    if model_type not in ("mistral", "ministral"):
        window = window if c.get("use_sliding_window") else None
    first = num_layers if window is None else 0
    if model_type in ("qwen2", "qwen3") and window is not None:
        first = c.get("max_window_layers", 28)
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            raise InputError(f"config: max_window_layers is {first!r}, but must be a whole number of at least 0")
    implied = tuple(FULL_ATTENTION if i < first else SLIDING_ATTENTION for i in range(num_layers))
    kinds = checked(tuple[str, ...], "layer_types", c.get("layer_types")) or implied
    if kinds == (FULL_ATTENTION,) * num_layers:
        return None, ()
    if SLIDING_ATTENTION in kinds and (model_type == "llama" or (model_type == "mistral" and kinds != implied)):
        given = f"layer_types = {list(kinds)}, sliding_window = {window}"
        raise InputError(f"config: {given} is not supported for model_type {model_type!r}; take 'ministral'")
    return window, kinds


def _read_rope(c: dict[str, Any]) -> tuple[float, RopeRule | None]:
    """rope_theta and the rule. transformers 5 keeps both in rope_parameters, but would take rope_scaling first."""
    said = [field for field in ("rope_scaling", "rope_parameters") if c.get(field)]
    read = [_read_rope_field(c, field) for field in said or ["rope_parameters"]]
    if read[0] != read[-1]:
        raise InputError("config: rope_scaling and rope_parameters do not say the same: drop the one that is wrong")
    return read[0]


def _read_rope_field(c: dict[str, Any], field: str) -> tuple[float, RopeRule | None]:
    rope = c.get(field) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise InputError(f"config: {field} is {rope!r}, but must be an object, the same for all layers, or null")
    theta = checked(float, "rope_theta", rope.get("rope_theta", c.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in RULES:
        raise InputError(f"config: {field}.rope_type {kind!r} is not supported; supported are {', '.join(RULES)}")
    part = rope.get("partial_rotary_factor", c.get("partial_rotary_factor"))
    told = {**rope, "rope_type": kind, "partial_rotary_factor": part}
    if OLD in RULES[kind]:
        context = checked(int, "max_position_embeddings", c.get("max_position_embeddings", 2048))
        told[OLD] = checked(int, OLD, c.get(OLD) or rope.get(OLD) or context)
        if kind == "longrope" and told.get("factor") is None:
            told["factor"] = context / told[OLD]
    rule = RopeRule.from_dict(told)
    return theta, rule if kind != "default" or part not in (None, 1.0) else None


def change_rope(model: Stack, rope: dict[str, Any]) -> None:
    """Let a pretrained model's positions be turned by other angles: in place, to be trained after.
    Its config says so, `save_pretrained` writes it, and `save_adapter` writes it beside the adapter.
    rope: fields of config.json's `rope_parameters`, as {"rope_type": "yarn", "factor": 4.0} or {"rope_theta": 8e6}.
        What it leaves out stays, but a new rope_type begins without the old one's fields; its
        original_max_position_embeddings, if need be, is the old rule's, or else the config's max_position_embeddings.
    Raises InputError for another kind of model, and for a rule that cannot be."""
    config = model.config
    if not isinstance(rope, dict):
        raise InputError(f"rope_parameters is {rope!r}, but must be an object")
    if type(config) is not LlamaConfig:
        kind = getattr(config, "name", None) or config.model_type
        raise InputError(f"another rope needs a model of the Llama family, not a {kind}")
    old = {"rope_theta": config.rope_theta, **(config.rope_scaling or RopeRule()).to_dict()}
    if rope.keys() & {"rope_type", "type"}:
        lasting = ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor")
        old = {name: value for name, value in old.items() if name in lasting}
    whole = {"max_position_embeddings": config.max_position_embeddings, "rope_parameters": {**old, **rope}}
    theta, rule = _read_rope(whole)
    model.config = replace(config, rope_theta=theta, rope_scaling=rule)
    model.rope = {"rope_theta": theta, **(rule or RopeRule()).to_dict()}


Stack.from_pretrained = classmethod(load)
Stack.save_pretrained = save
load_model = Stack.from_pretrained
LlamaConfig.from_dict = classmethod(read_llama_config)  # type: ignore[assignment,method-assign]
LlamaConfig.to_dict = write_llama_config  # type: ignore[assignment,method-assign]
