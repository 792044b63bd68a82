"""`minichunk plan`: will it fit? What forecast.py counts, against the memory that there is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from json import dumps
from typing import Any

from tqdm import tqdm

from ..chunks import cut
from ..errors import InputError
from ..files.atomic import human_bytes
from ..memory.window import FULL
from ..training.checks import check_4bit, check_choice, check_least
from ..training.options import DTYPES, SAMPLERS
from ..training.partial_options import make_pattern
from .fullest import Fullest, check_gpus, describe_rank, forecast_on
from .setting import CHUNKED, METHODS, Setting

UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
LEFT_OUT = (
    "the CUDA context, the allocator's fragmentation and the libraries' own buffers (the reserve stands for them)"
)
MASKS = (
    "; and, of the methods without chunks, the masks (tokens x tokens) of layers that see a part of the past, which "
    "minichunk's own `full` makes and a kernel that knows windows does not"
)


def left_out(setting: Setting) -> str:
    """What is not counted, in words."""
    return LEFT_OUT + (MASKS if {*setting.patterns()} - {FULL} else "")


def parse_bytes(text: str) -> int:
    """'24GiB', '80 GB' or a plain number of bytes. Raises InputError."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]*)\s*", text)
    try:
        assert match is not None
        return int(float(match[1]) * UNITS[match[2].lower()])
    except (AssertionError, KeyError, ValueError):
        raise InputError(f"{text!r} is not an amount of memory; write it like 24GiB, 80GB or 512MiB") from None


def plan(
    setting: Setting, memory: int, seq_len: int | None, reserve: int, host: int, gpus: int = 1, quiet: bool = False
) -> dict[str, Any]:
    """The forecast of the setting's method and of the others, as one JSON object. Raises InputError.

    memory, reserve: of each GPU. host: of all of them together.
    """
    available = memory - reserve
    names = dict.fromkeys([setting.method, *(METHODS if gpus == 1 else CHUNKED)])
    forecasts, longest = {}, {}
    for m in tqdm(names, desc="plan", unit="method", leave=False, disable=quiet):
        forecasts[m] = forecast_on(replace(setting, method=m), gpus)
        longest[m] = forecasts[m].longest(available, setting.chunk_size, host)
    here = forecasts[setting.method]
    length = seq_len or longest[setting.method] or here.base
    at = here.at(length)
    num_chunks = len(cut(length, setting.chunk_size))
    dealt: dict[str, Any] = {}
    if isinstance(here, Fullest):
        dealt = {"layers_per_rank": list(here.counts(length)), "fullest_rank": here.fullest(length)}
    return {
        "model": setting.model,
        "gpus": gpus,
        **dealt,
        "method": setting.method,
        "memory_bytes": memory,
        "reserve_bytes": reserve,
        "seq_len": length,
        "peak_bytes": at.peak,
        "host_bytes": at.host,
        "fits": at.peak <= available and at.host <= host,
        "max_tokens": longest[setting.method],
        "breakdown": {name: value for name, value in asdict(at).items() if name not in ("peak", "host")},
        "methods": {
            m: {"max_tokens": longest[m], "bytes_per_token": device, "host_bytes_per_token": host}
            for m, (device, host) in ((m, f.growth(longest[m] or length)) for m, f in forecasts.items())
        },
        "peak_bytes_all_kept": forecasts["seco"].at(length).peak if setting.method == "spaco" else at.peak,
        "chunks": num_chunks,
        "most_kept": setting.kept(num_chunks),
        "sampler": setting.sampler,
        "left_out": left_out(setting),
    }


TABLE_MODELS = ("llama-3.2-1b", "llama-3.2-3b", "llama-3-8b", "qwen2.5-14b", "qwen2.5-32b")
TABLE_METHODS = ("full-recompute-tiled", "seco", "spaco")
TABLE_MEMORY = (12, 16, 24, 48, 80, 141)  # GiB


def longest_table(setting: Setting, reserve: int, models: Sequence[str] = TABLE_MODELS) -> str:
    """A Markdown table: the longest context, in thousands of tokens, by model, base, method and memory."""
    settings = {
        f"{model} | {'4 bits' if four else 'bfloat16'} | {method}": (
            replace(setting, model=model, load_in_4bit=four, method=method), 1
        )
        for model in models for four in (False, True) for method in TABLE_METHODS
    }  # fmt: skip
    return _table("model | base | method", settings, reserve)


def gpus_table(setting: Setting, reserve: int, gpus: int) -> str:
    """The same of one model, by number of GPUs, method and memory of each GPU."""
    numbers = sorted({1, gpus, *(2**i for i in range(1, gpus.bit_length()))})
    settings = {f"{n} | {method}": (replace(setting, method=method), n) for n in numbers for method in CHUNKED}
    return _table("GPUs | method", settings, reserve)


def _table(head: str, settings: dict[str, tuple[Setting, int]], reserve: int) -> str:
    """Rows by what they begin with: what is trained, and on how many GPUs."""
    lines = [f"| {head} | " + " | ".join(f"{n} GiB" for n in TABLE_MEMORY) + " |"]
    lines.append("|---" * len(head.split("|")) + "|" + "---:|" * len(TABLE_MEMORY))
    for begin, (setting, gpus) in tqdm(settings.items(), desc="plan", unit="row", leave=False):
        found = forecast_on(setting, gpus)
        longest = (found.longest(n * 2**30 - reserve, setting.chunk_size) for n in TABLE_MEMORY)
        cells = [f"{tokens / 1000:,.0f}k" if tokens else "–" for tokens in longest]
        lines.append(f"| {begin} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run_plan(
    model: str,
    memory: str,
    reserve: str,
    gpus: int,
    method: str,
    seq_len: int | None,
    chunk_size: int,
    fill_size: int | None,
    budget: int,
    sampler: str,
    rank: int,
    targets: list[str] | None,
    dtype: str,
    cache_grad_dtype: str | None,
    no_recompute: bool,
    device: str,
    offload: bool,
    host_memory: str,
    load_in_4bit: bool,
    table: bool,
    json: bool,
    partial_context: str | None,
    full_layers: list[int] | None,
    **partial: int | None,
) -> None:
    """`minichunk plan`: print the forecast. Raises InputError."""
    check_choice("dtype", dtype, DTYPES)
    check_choice("cache_grad_dtype", cache_grad_dtype, DTYPES)
    check_choice("sampler", sampler, SAMPLERS)
    least: dict[str, tuple[float | None, float]] = {
        "seq_len": (seq_len, 2), "chunk_size": (chunk_size, 1), "fill_size": (fill_size, chunk_size),
        "budget": (budget, 1), "rank": (rank, 0), "gpus": (gpus, 1),
    }  # fmt: skip
    check_least(least)
    check_4bit(load_in_4bit, rank)
    setting = Setting(
        model, method, chunk_size, budget, rank, tuple(targets) if targets else None, DTYPES[dtype],
        DTYPES[cache_grad_dtype] if cache_grad_dtype else None, not no_recompute,
        device=device,
        offload=offload, load_in_4bit=load_in_4bit, fill_size=fill_size, sampler=sampler,
        pattern=make_pattern(partial_context, {**partial, "full_layers": full_layers}),
        full_layers=None if full_layers is None else tuple(full_layers),
    )  # fmt: skip
    check_gpus(setting, gpus)
    if table:
        apart = parse_bytes(reserve)
        print(longest_table(setting, apart) if gpus == 1 else gpus_table(setting, apart, gpus))
        return
    found = plan(setting, parse_bytes(memory), seq_len, parse_bytes(reserve), parse_bytes(host_memory), gpus, json)
    print(dumps(found, indent=2) if json else describe(found))


def describe(found: dict[str, Any]) -> str:
    """The forecast in words."""
    fits = "fits" if found["fits"] else "does NOT fit"
    several, who = found["gpus"] > 1, ""
    if several:
        rank = describe_rank(found["layers_per_rank"], found["fullest_rank"])
        who = f", on the fullest of {found['gpus']} GPUs ({rank})"
    lines = [
        f"{found['model']}, {found['method']}: the longest sequence that fits has {found['max_tokens']:,} tokens",
        f"peak at {found['seq_len']:,} tokens{who}: {human_bytes(found['peak_bytes'])}; {fits} into "
        f"{human_bytes(found['memory_bytes'])} less a reserve of {human_bytes(found['reserve_bytes'])}",
        *([f"layers of each rank: {', '.join(map(str, found['layers_per_rank']))}"] if several else []),
        "",
    ]
    lines += [f"  {name.replace('_', ' '):22} {human_bytes(n):>10}" for name, n in found["breakdown"].items()]
    if found["host_bytes"]:
        of = " of all GPUs" if several else ""
        lines.append(f"  {'in host memory' + of:22} {human_bytes(found['host_bytes']):>10}")
    lines += ["", "  method                    longest   grows per token"]
    for method, row in found["methods"].items():
        host = row["host_bytes_per_token"]
        beside = f", and {human_bytes(host)} in host memory" if host else ""
        lines.append(f"  {method:22} {row['max_tokens']:>10,}   {human_bytes(row['bytes_per_token'])}{beside}")
    if found["method"] == "spaco":
        often = " in 99.9 % of the steps" if found["sampler"] == "bernoulli" else ""
        lines += ["", f"  counted with {found['most_kept']} of {found['chunks']} chunks kept: no more are kept{often}"]
        if often:
            lines.append(f"  with every chunk kept, as a random draw may: {human_bytes(found['peak_bytes_all_kept'])}")
    return "\n".join([*lines, "", f"not counted: {found['left_out']}"])
