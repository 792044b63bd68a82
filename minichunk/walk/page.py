"""The page: one HTML file with everything in it, made of logs; and `minichunk walk`, which takes the steps for it."""

import ast
import inspect
import json
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from ..blocks import through_blocks
from ..chunks import cut, span
from ..errors import InputError
from ..files.atomic import make_directory, write_text
from ..files.chat import load_chat_template
from ..files.documents import EXTENDED_ON, SHIPPED_MODEL, novel
from ..full import full
from ..models.config import LlamaConfig
from ..models.llama import Llama
from ..models.lora import add_lora
from ..samplers import Bernoulli
from ..seco import seco
from ..spaco import spaco
from ..training.load import load_as_told, read_pieces
from ..training.options import ModelOptions, StepOptions, changed, check_options, option
from .trace import Event, trace

FILES = Path(__file__).parent / "page"
SCRIPTS = ("state.js", "words.js", "drawing.js", "controls.js")
METHODS = ("seco", "spaco", "seco-blocks", "spaco-blocks", "full", "full-recompute")
SHOWN = ("seco", "spaco", "seco-blocks", "full", "full-recompute")
MOST_CHUNKS = 32  # narrower columns cannot be read
ALGORITHMS: dict[str, Callable[..., Any]] = {"seco": seco, "spaco": spaco, "full": full}


def make_page(logs: Sequence[Sequence[Event]]) -> str:
    """A page that shows these logs, as one run each. The first is shown first. Logs of `full` are also drawn behind the
    others, where bytes are counted."""
    runs = [{"events": log} for log in logs]
    known = {"seco", *(log[0]["method"] + ("-blocks" if "blocks" in log[0] else "") for log in logs)} & {*METHODS}
    code = {method: listing(method) for method in sorted(known)}
    data = json.dumps({"runs": runs, "code": code}, separators=(",", ":"))
    page = (FILES / "page.html").read_text(encoding="utf-8")
    css = (FILES / "page.css").read_text(encoding="utf-8")
    scripts = "\n".join((FILES / name).read_text(encoding="utf-8") for name in SCRIPTS)
    page = page.replace("/*CSS*/", css, 1).replace("/*JS*/", scripts, 1)
    return page.replace("/*DATA*/", data.replace("<", "\\u003c"), 1)  # no text of a user's ends the script


def listing(method: str) -> dict[str, Any]:
    """What the page shows of an algorithm's code, seen in a small real step by the frames of the functions that run.
    functions: name, file, number of the first line, and lines behind the docstring, of each. where: for each kind of
    event, and apart on the way up through blocks, the lines at work, as [function, line], the outermost first."""
    functions: dict[str, dict[str, Any]] = {}
    where: dict[str, list[list[int]]] = {}

    def look(event: Event) -> None:
        where[event["kind"] + (" up" if event.get("up") else "")] = running = []
        for frame, number in reversed(list(traceback.walk_stack(None))):
            if (module := frame.f_globals["__name__"]) in shown_of:
                name = frame.f_code.co_qualname
                function = functions.setdefault(name, shown(attrgetter(name)(sys.modules[module])))
                running.append([list(functions).index(name), number - function["first"]])

    algorithm, _, blocks = method.partition("-")
    shown_of = {through_blocks.__module__} if blocks else {function.__module__ for function in ALGORITHMS.values()}
    with torch.random.fork_rng(devices=[]):
        model, ids = Llama(LlamaConfig(8, 4, 4, 2 if blocks else 1, 1, 1, 4)), torch.zeros(1, 4, dtype=torch.int64)
    told: dict[str, Any] = {} if algorithm == "full" else {"chunk_size": 2, "layers_at_once": 1 if blocks else None}
    told |= {"sampler": Bernoulli(1.0)} if algorithm == "spaco" else {}
    trace(ALGORITHMS[algorithm], model, ids, ids, on_event=look, **told)
    return {"functions": list(functions.values()), "where": where}


def shown(function: Callable[..., Any]) -> dict[str, Any]:
    """A function without its docstring, moved to the left."""
    lines, first = inspect.getsourcelines(function)
    (tree,) = ast.parse(textwrap.dedent("".join(lines))).body
    assert isinstance(tree, ast.FunctionDef)
    start = tree.body[ast.get_docstring(tree) is not None].lineno - 1
    file = f"{function.__module__.split('.', 1)[1]}.py"
    code = textwrap.dedent("".join(lines[start:])).splitlines()
    return {"name": function.__name__, "file": file, "first": first + start, "lines": code}


@dataclass(frozen=True, kw_only=True)
class WalkOptions(ModelOptions):
    """Watch one training step in a browser.

    Takes one real step by each method, writes down what happens, event by event, and makes one HTML file
    of it that needs nothing else: the code with the current line, the chunks and layers, the memory, the
    numbers. With no argument: the small Llama that ships with the package, on the first page of a novel.

      minichunk walk
      minichunk walk --model DIR --data notes.txt --seq-len 1024 --chunk-size 256
      minichunk walk --method seco seco-blocks --layers-at-once 3
      minichunk walk --log logs                     # also write the logs, one JSON object a line

    tutorials/walk.md describes the log."""

    data: tuple[str, ...] | None = option(None, "text or JSONL files", metavar="FILE", absent="a shipped novel")
    seq_len: int = option(512, "tokens", group="the step", metavar="N", least=2)
    chunk_size: tuple[int, ...] = option((128, 64, 256), "tokens per chunk, one or more to choose from", least=1)
    method: tuple[str, ...] = option(SHOWN, f"of {', '.join(METHODS)}", choices=METHODS)
    layers_at_once: int = option(2, "layers in a block, of -blocks", metavar="N", least=1)
    budget: int | None = changed(StepOptions, "budget", absent="half of them")
    rank: int = option(0, "of LoRA; 0 trains all", metavar="R", least=0)
    recompute: bool = option(False, "keep layers' inputs within a chunk, run the rest again")
    seed: int = option(17, "of SpaCO's coins", metavar="N", least=0)
    output: str = option("walk.html", "where to write the page", group="", metavar="FILE")
    log: str | None = option(None, "write the log of each method and chunk size there too", group="logs", metavar="DIR")


def run_walk(options: WalkOptions) -> None:
    """Write the page of a step by each method. Raises InputError."""
    logs = record(options)
    if options.log is not None:
        folder = make_directory(options.log)
        for log in logs:
            write_text(folder / f"{title(log)}.jsonl", "".join(json.dumps(event) + "\n" for event in log))
    write_text(options.output, make_page(logs))
    print(f"written  {options.output}  (open it in a browser)")


def title(log: Sequence[Event]) -> str:
    """A log's method, and the size of its chunks."""
    begin = log[0]
    name = begin["method"] + ("-recompute" if begin.get("recompute") else "") + ("-blocks" if "blocks" in begin else "")
    return name if begin["method"] == "full" else f"{name}-{begin['chunks'][0][1] - begin['chunks'][0][0]}"


def record(options: WalkOptions) -> list[list[Event]]:
    """The logs of one step by each method, and by each chunk size. Raises InputError.
    The parameters' gradients are there from the beginning, as in all but the first step of a training."""
    check_options(options)
    model, tokenizer = load_as_told(options)
    directory, sizes = options.model or SHIPPED_MODEL, options.chunk_size
    texts = options.data or [novel(EXTENDED_ON)]
    (text, *_), _ = read_pieces(texts, model, tokenizer, load_chat_template(directory), options.seq_len)
    if (most := len(cut(len(text), min(sizes)))) > MOST_CHUNKS:
        raise InputError(f"--chunk-size {min(sizes)} makes {most} chunks, but the page has room for {MOST_CHUNKS}")
    if options.rank:
        add_lora(model, options.rank, 2 * options.rank)
    ids, labels = (x[None].clone().to(model.lm_head.weight.device) for x in (text.input_ids, text.labels))
    logs = []
    for method in options.method:
        for size in [len(text)] if method.startswith("full") else sizes:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            torch.manual_seed(options.seed)
            chunks = cut(len(text), size)
            keywords: dict[str, Any] = {"chunk_size": size, "recompute": options.recompute}
            if method.startswith("full"):
                keywords = {"recompute": method == "full-recompute"}
            if method.endswith("-blocks"):
                keywords["layers_at_once"] = options.layers_at_once
            if method.startswith("spaco"):
                keywords["sampler"] = Bernoulli(min(1.0, (options.budget or len(chunks) / 2) / len(chunks)))
                keywords["generator"] = torch.Generator().manual_seed(options.seed)
            events = trace(ALGORITHMS[method.partition("-")[0]], model, ids, labels, **keywords)
            said = [tokenizer.decode(text.input_ids[span([chunk])].tolist()) for chunk in chunks]
            events[0] |= {"text": said, "model": Path(directory).resolve().name}
            logs.append(events)
    return logs
