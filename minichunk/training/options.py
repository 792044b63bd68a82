"""Options of commands, each written once, as a field of a dataclass: parser, help, defaults and checks follow from it.

command/main.py makes a parser of such a dataclass; its docstring is what `--help` says first.
"""

import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args, get_origin, get_type_hints

import torch

from ..chunks import ONE, Chunk, Documents, cut
from ..errors import InputError
from ..files.documents import SHIPPED_MODEL
from ..memory.window import Pattern, Strided, Window
from ..pipeline.links import started
from ..protocol import Options
from ..samplers import Bernoulli, FixedBudget, PaperBudget, most_kept
from ..spaco import Sampler

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
PREFERENCES = ("dpo", "ipo", "simpo", "orpo", "kto")  # objectives that compare two answers
WINDOW, STRIDED = ("partial_context", ("window",)), ("partial_context", ("strided",))  # what options belong to
BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "least": ("at least", operator.ge), "above": ("above", operator.gt), "most": ("at most", operator.le),
    "below": ("below", operator.lt),
}  # fmt: skip


def option(
    default: Any, help: str, *, group: str | None = None, metavar: str = "", absent: str = "",
    choices: Collection[str] = (), least: float | None = None, above: float | None = None, most: float | None = None,
    below: float | None = None, belongs: tuple[str, tuple[str, ...]] | None = None, positional: bool = False,
    none: bool = False, bare: str = "",
) -> Any:  # fmt: skip
    """A field of a dataclass of options. Its annotation says what is read: int, float, str, bool, a tuple of them.

    default: `MISSING` if it has to be given; None, whatever the annotation says, if it is chosen for the case.
    absent: the default in words. group: its title in the help; None: that of the option before it; "": none.
    least, above, most, below: bounds of every number. belongs: another option, and which values it must have for this
    one; (): any but None and false. positional: without `--`. none: a tuple may be empty. bare: the value of an option
    that is given without one.
    """
    return field(default=default, metadata={name: value for name, value in locals().items() if name != "default"})


def changed(options: Any, name: str, **changes: Any) -> Any:
    """The option `name` of another dataclass again, with some of its keywords changed."""
    found = options.__dataclass_fields__[name]
    return option(**{"default": found.default, **found.metadata, **changes})


def form(annotation: Any) -> tuple[type, bool]:
    """What a value, or each of several, must be; and whether there are several."""
    kinds = [part for part in get_args(annotation) or (annotation,) if part not in (type(None), ...)]
    several = get_origin(annotation) is tuple or get_origin(kinds[0]) is tuple
    return (get_args(kinds[0]) or kinds)[0], several


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_options(options: Any) -> None:
    """Raise InputError unless each value is of its kind, within its bounds, and belongs to what else is said."""
    annotations = get_type_hints(type(options))
    for each in fields(options):
        value, rule = getattr(options, each.name), each.metadata
        name = each.name if rule["positional"] else flag(each.name)
        if value is None and each.default is None:
            continue
        kind, several = form(annotations[each.name])
        if several != isinstance(value, tuple):
            raise InputError(f"{name} is {value!r}, but must be {'a tuple' if several else 'one value'}")
        for one in value if several else (value,):
            if must := _must(one, kind, rule):
                raise InputError(f"{name} is {one!r}, but must be {must}")
        if rule["belongs"] and value != each.default:
            owner, allowed = rule["belongs"]
            if not getattr(options, owner) or (allowed and getattr(options, owner) not in allowed):
                raise InputError(f"{name} belongs to {flag(owner)} {' or '.join(allowed)}".strip())


def _must(value: Any, kind: type, rule: Mapping[str, Any]) -> str:
    """What the value must be and is not; empty if it is all right."""
    allowed: Any = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or isinstance(value, bool) != (kind is bool):
        return KINDS[kind]
    if rule["choices"]:
        return "" if value in rule["choices"] else f"one of {', '.join(rule['choices'])}"
    bounds = [(words, rule[key], holds) for key, (words, holds) in BOUNDS.items() if rule[key] is not None]
    if all(holds(value, bound) for _, bound, holds in bounds) and (kind is not float or math.isfinite(value)):
        return ""
    return " and ".join(f"{words} {bound}" for words, bound, _ in bounds) or "a finite number"


def options_of(options: type, values: Mapping[str, Any]) -> Any:
    """An instance of a dataclass of options from what a parser or a JSON file says: lists become tuples."""
    return options(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def default_dtype(device: str) -> str:
    """The name of the dtype that a model has on this device unless told otherwise."""
    return "bfloat16" if device.startswith("cuda") else "float32"


def check_device(name: str | None) -> str:
    """The device of `--device`; None: CUDA where there is one. Raises InputError for one that is not there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return "cuda" if count else "cpu"
    here = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if name not in here:
        raise InputError(f"--device is {name!r}, but PyTorch sees only {', '.join(here)} here")
    return name


# fmt: off
@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, in which numbers, and where."""

    model: str = option(None, "checkpoint directory", absent="the shipped one", metavar="DIR", group="model and data")
    dtype: str = option(None, "of the model", choices=tuple(DTYPES), absent="bfloat16 on CUDA, else float32")
    device: str = option(None, "cpu, cuda or cuda:N", absent="cuda where there is one")


@dataclass(frozen=True, kw_only=True)
class ReadOptions(ModelOptions):
    """Which trained model."""

    adapter: str | None = option(None, "adapter of this model, runs/N/adapter", absent="none", metavar="DIR")
    load_in_4bit: bool = option(False, "store the base in 4 bits (bitsandbytes)")


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What one step of a training does: `minichunk train` takes it, `minichunk plan` forecasts its memory."""

    method: str = option("seco", "spaco estimates the gradient", choices=("seco", "spaco", "full"), group="method")
    objective: str | None = option(
        None, "another loss: preferences (rows of prompt, chosen, rejected; of kto prompt, completion, label), or what "
        "--teacher says of each token", choices=(*PREFERENCES, "distill"), absent="the mean")
    teacher: str | None = option(None, "distill: a larger checkpoint of the same vocabulary", metavar="DIR",
                                 belongs=("objective", ("distill",)))
    seq_len: int = option(2048, "tokens per document piece, or of each of two answers with its prompt", least=2)
    chunk_size: int = option(256, "tokens per chunk", least=1)
    fill_size: int | None = option(None, "tokens per forward pass of the fill", least=1, absent="the chunk size")
    budget: int | None = option(None, "spaco: chunks kept of a document, on average", least=1, absent="a quarter")
    sampler: str = option("bernoulli", "of spaco: bernoulli is unbiased", choices=("bernoulli", "fixed", "paper"))
    recompute: bool | None = option(None, "run layers twice, to save memory", absent="from a billion parameters on")
    cache_grad_dtype: str | None = option(None, "of cache gradients", choices=tuple(DTYPES), absent="float32 or wider")
    layers_at_once: str | None = option(
        None, "take the text through a block of N layers at a time, up and down again, to save memory; auto: what is "
        "fastest and fits, by the forecast of plan", metavar="N|auto", absent="all")
    graphs: int = option(0, "seco: keep the graphs of the fill's last N chunks; at auto layers, what fits", least=0)
    offload: bool = option(False, "let the blocks' inputs wait in host memory; by default of blocks of one layer")
    partial_context: str | None = option(
        None, "what all but --full-layers see, as in LongGen; the model has to learn it: the last positions and a few "
        "before", choices=("window", "strided"), absent="all", group="a part of the past")
    window: int = option(1024, "window: the last N positions, the own included", least=1, belongs=WINDOW)
    sinks: int = option(64, "window: and the first N, 0 for none", least=0, belongs=WINDOW)
    block: int = option(64, "strided: positions in a block", least=1, belongs=STRIDED)
    local: int = option(16, "strided: the last N blocks, the own included", least=1, belongs=STRIDED)
    stride: int = option(16, "strided: and every Nth block, the first one included", least=1, belongs=STRIDED)
    full_layers: tuple[int, ...] | None = option(None, "these see all of the past, counted from 0; no number: none",
                                                 absent="the middle third", none=True, belongs=("partial_context", ()))
    rank: int = option(8, "of the adapter; 0 trains all parameters", least=0, group="LoRA")
    targets: tuple[str, ...] | None = option(None, "layers with an adapter", absent="all PEFT takes", metavar="NAME")
    load_in_4bit: bool = option(False, "store the frozen base in 4 bits (bitsandbytes)")

    def check(self) -> None:
        """Raise InputError for a value that cannot be, or that does not go with the others."""
        check_options(self)
        if self.fill_size is not None and self.fill_size < self.chunk_size:
            raise InputError(f"--fill-size is {self.fill_size}, but must be at least {self.chunk_size}, a chunk")
        if self.objective == "distill" and self.teacher is None:
            raise InputError("--objective distill needs a --teacher")
        if self.load_in_4bit and self.rank == 0:
            raise InputError("--load-in-4bit freezes the base: it needs an adapter, --rank of at least 1")
        if (given := self.layers_at_once) not in (None, "auto") and not (given.isdecimal() and int(given)):
            raise InputError(f"--layers-at-once is {given!r}, but must be a whole number of at least 1, or auto")
        others = self.method != "seco" or self.objective or self.offload or given not in (None, "auto")
        if self.graphs and others:
            names = "--layers-at-once N, --offload and --objective"
            raise InputError(f"--graphs is for seco with all layers at once: leave out {names}")

    @property
    def rows(self) -> int:  # of a piece
        return 2 if self.objective in PREFERENCES else 1

    def options(self) -> Options:
        """How chunks are computed."""
        return Options(self.fill_size, bool(self.recompute), DTYPES.get(self.cache_grad_dtype or ""))

    def keywords(self) -> dict[str, Any]:
        """How a step is computed, as keywords of `seco`. Raises InputError for an `auto` that nobody has decided."""
        if self.layers_at_once == "auto":
            raise InputError("--layers-at-once is 'auto': let costs.forecast.fitted decide it first")
        how = {name: getattr(self.options(), name) for name in ("fill_size", "recompute", "cache_grad_dtype")}
        how |= {"layers_at_once": self.layers_at_once and int(self.layers_at_once), "offload": self.offload}
        return how | ({"graphs": self.graphs} if self.graphs else {})

    def row(self, tokens: int) -> tuple[int, Documents]:
        """The positions of a row that is run for texts of so many tokens, and its documents."""
        return tokens, ONE

    def chunks(self, tokens: int) -> tuple[list[Chunk], list[Chunk]]:
        """All chunks of a text, and the most of them that a step backpropagates: as many, at the end of it."""
        length, documents = self.row(tokens)
        chunks = cut(length, self.chunk_size, documents)
        kept = most_kept(self.sampler, self.budget or 1, len(chunks)) if self.method == "spaco" else len(chunks)
        return chunks, chunks[-kept:]

    def pattern(self) -> Pattern | None:
        """What the layers of `--partial-context` see; None without it."""
        if self.partial_context == "window":
            return Window(self.window, self.sinks)
        return Strided(self.block, self.local, self.stride) if self.partial_context == "strided" else None


@dataclass(frozen=True, kw_only=True)
class TrainOptions(StepOptions, ModelOptions):
    """Train on documents longer than memory allows, chunk by chunk.

    With no argument: takes the small Llama and the novels that ship with the package and extends the
    model's context from 256 to 2,048 tokens with LoRA and SeCO, in under two minutes on two CPU cores.

      minichunk train
      minichunk train --model DIR --data notes.txt more.jsonl --seq-len 16384 --chunk-size 512
      minichunk train --model DIR --data book.txt --method spaco --budget 8
      minichunk train --output runs/1 --resume
      torchrun --nproc-per-node 4 -m minichunk train --pipeline 4 --model DIR --data book.txt

    DIR is a Hugging Face checkpoint: config.json, tokenizer.json and safetensors. FILE is text, or has rows of
    JSON: {"text": …}; {"prompt": …, "completion": …}, where only the completion is learnt, texts or lists of
    messages; or {"messages": …} (or "conversations"), where only the assistant's are, but not with "weight": 0 or
    "train": false; "tools" may stand beside them. A row ends with an end token, a text file does not. The
    checkpoint's chat template is used where it has one: this needs minichunk[hf], and its date is 26 July 2024.
    """

    data: tuple[str, ...] = option((), "text or JSONL files", absent="a novel", metavar="FILE", group="model and data")
    val_data: tuple[str, ...] = option((), "held-out files", absent="a part of the data", metavar="FILE")
    val_fraction: float = option(0.1, "part of the data held out", least=0, below=1)
    eval_documents: int = option(8, "held-out documents to measure", least=0)
    chat_template: bool = option(True, "put prompt and completion into the model's template", absent="if it has one")
    pack: str | None = option(
        None, "many documents in a row of --seq-len tokens; each learns as if alone, or with open a row is "
        "one text", choices=("apart", "open"), absent="each by itself", metavar="open", bare="apart")
    rope: str | None = option(
        None, "yarn:4 (2309.00071, the least training) or linear:4, for 4 times the length of the first training",
        absent="as the config says", metavar="TYPE:FACTOR", group="positions")
    rope_theta: float | None = option(
        None, "the base of the angles; larger instead of --rope where the training is long: 8e6 took Llama 3 from "
        "8K to 64K, 1.28e8 to 512K (ProLong, 2410.02660)", above=1, absent="the config's")
    cap: float | None = option(None, "spaco with paper: the most the relay factor may be", above=0, absent="none",
                               belongs=("sampler", ("paper",)), group="method")
    beta: float | None = option(None, "how dearly leaving the reference is paid; in orpo the weight of the odds",
                                above=0, absent="0.1; 2 for simpo", belongs=("objective", PREFERENCES))
    gamma: float = option(1.0, "simpo: the margin that is asked for", least=0, belongs=("objective", ("simpo",)))
    desirable_weight: float = option(1.0, "kto: of label true; else 1", above=0, belongs=("objective", ("kto",)))
    steps: int = option(60, "optimizer steps", least=1, group="training")
    batch_size: int = option(1, "pieces at a time", least=1)
    accumulate: int = option(None, "batches per step, of all copies together", least=1, absent="one for each copy")
    lr: float = option(None, "peak", above=0, absent="3e-4 with LoRA, 2e-5 without, 4e-3 for the shipped model")
    warmup: int = option(None, "steps of linear warm-up", least=0, absent="a tenth")
    weight_decay: float = option(0.0, "of AdamW", least=0)
    clip: float = option(1.0, "most that the gradient norm may be, 0: any", least=0)
    alpha: float = option(16.0, "the update is alpha / rank · B A", above=0, group="LoRA")
    dropout: float = option(0.0, "on the adapter's input", least=0, below=1)
    pipeline: int = option(
        None, "N of torchrun's P processes share its layers, in P/N copies", least=1, group="several GPUs")
    timeout: float = option(7200.0, "seconds after which a process that does not answer is given up", above=0)
    seed: int = option(0, "of adapter, order, dropout and sampler", least=0, below=2**32, group="run")
    deterministic: bool = option(False, "the same bits in every run on CUDA too, if slower")
    save_every: int = option(20, "steps between checkpoints", least=1)
    output: str | None = option(None, "where to write", absent="the next free runs/N", metavar="DIR")
    resume: bool = option(False, "continue the run in --output, by default the newest")
    # fmt: on

    def resolved(self) -> "TrainOptions":
        """Check every value and fill in those that are None. Raises InputError."""
        self.check()
        device, copies = check_device(self.device), started().world // (self.pipeline or 1)
        # The shipped model, of 3 million parameters, takes larger steps.
        lr = 2e-5 if self.rank == 0 else 4e-3 if self.model is None else 3e-4
        chosen: dict[str, Any] = {"model": str(SHIPPED_MODEL), "device": device, "dtype": default_dtype(device)}
        chosen |= {"beta": 2.0 if self.objective == "simpo" else 0.1} if self.objective in PREFERENCES else {}
        chosen |= {"lr": lr, "warmup": self.steps // 10, "pipeline": 1, "accumulate": copies}
        if self.method == "spaco":
            chosen["budget"] = max(1, len(cut(self.seq_len, self.chunk_size)) // 4)
        return replace(self, **{name: value for name, value in chosen.items() if getattr(self, name) is None})

    def check(self) -> None:
        super().check()
        self.rope_parameters()
        if self.method != "spaco" and (self.budget, self.cap, self.sampler) != (None, None, "bernoulli"):
            raise InputError(f"--budget, --sampler and --cap belong to --method spaco, not to {self.method}")
        in_blocks = self.layers_at_once is not None or self.offload
        if self.method == "full" and (self.fill_size or self.cache_grad_dtype or in_blocks):
            names = "--fill-size, --cache-grad-dtype, --layers-at-once and --offload"
            raise InputError(f"{names} belong to --method seco and spaco")
        if self.objective in PREFERENCES and not self.data:
            raise InputError(f"--objective {self.objective} needs --data with rows of answers")
        if self.pack and (self.objective or self.batch_size > 1):
            raise InputError("--pack fills a row by itself: leave out --batch-size and --objective")
        world, ranks = started().world, self.pipeline or 1
        if self.objective and world > 1:
            raise InputError(f"--objective {self.objective} is for one process")
        if self.pipeline is None and world > 1:
            raise InputError(f"torchrun has started {world} processes: say with --pipeline how many share the layers")
        if world % ranks:
            told = f"--pipeline is {ranks}, but must divide the number of processes, {world}"
            raise InputError(f"{told}: start torchrun --nproc-per-node {ranks}")
        if ranks > 1 and (self.method == "full" or in_blocks or self.graphs):
            raise InputError("--method full, --layers-at-once, --offload and --graphs are for --pipeline 1")
        if self.accumulate is not None and self.accumulate < (copies := world // ranks):
            raise InputError(f"--accumulate is {self.accumulate}, but {copies} copies of the model need a batch each")

    def rope_parameters(self) -> dict[str, Any]:
        """What `--rope` and `--rope-theta` change in the config's. Raises InputError."""
        said: dict[str, Any] = {} if self.rope_theta is None else {"rope_theta": self.rope_theta}
        if self.rope is None:
            return said
        kind, _, factor = self.rope.partition(":")
        if kind not in ("yarn", "linear") or not re.fullmatch(r"\d+(\.\d+)?", factor) or float(factor) <= 1:
            raise InputError(f"--rope is {self.rope!r}, but must be yarn:FACTOR or linear:FACTOR, a factor above 1")
        return {**said, "rope_type": kind, "factor": float(factor)}

    def make_sampler(self) -> Sampler:
        budget = self.budget or 1
        if self.sampler == "bernoulli":
            return lambda num_chunks, generator: Bernoulli(min(1, budget / num_chunks))(num_chunks, generator)
        return FixedBudget(budget) if self.sampler == "fixed" else PaperBudget(budget, self.cap)
