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
from ..files.room import human_bytes
from ..memory.pattern import FULL
from ..training.checks import check_4bit, check_choice, check_least
from ..training.options import DTYPES, SAMPLERS
from ..training.partial_options import make_pattern
from .forecast import forecast
from .setting import METHODS, Setting

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
    setting: Setting, memory: int, seq_len: int | None, reserve: int, host: int, quiet: bool = False
) -> dict[str, Any]:
    """The forecast of the setting's method and of the others, as one JSON object. Raises InputError."""
    available = memory - reserve
    methods = tqdm(dict.fromkeys([setting.method, *METHODS]), desc="plan", unit="method", leave=False, disable=quiet)
    forecasts = {m: forecast(replace(setting, method=m)) for m in methods}
    longest = {m: found.longest(available, setting.chunk_size, host) for m, found in forecasts.items()}
    length = seq_len or longest[setting.method] or forecasts[setting.method].base
    at = forecasts[setting.method].at(length)
    num_chunks = len(cut(length, setting.chunk_size))
    return {
        "model": setting.model,
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
            m: {"max_tokens": longest[m], "bytes_per_token": f.per_token, "host_bytes_per_token": f.host_per_token}
            for m, f in forecasts.items()
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
    lines = ["| model | base | method | " + " | ".join(f"{n} GiB" for n in TABLE_MEMORY) + " |"]
    lines.append("|---|---|---|" + "---:|" * len(TABLE_MEMORY))
    rows = [(m, four, method) for m in models for four in (False, True) for method in TABLE_METHODS]
    for model, four, method in tqdm(rows, desc="plan", unit="row", leave=False):
        found = forecast(replace(setting, model=model, load_in_4bit=four, method=method))
        longest = (found.longest(n * 2**30 - reserve, setting.chunk_size) for n in TABLE_MEMORY)
        cells = [f"{tokens / 1000:,.0f}k" if tokens else "–" for tokens in longest]
        lines.append(f"| {model} | {'4 bits' if four else 'bfloat16'} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run_plan(
    model: str,
    memory: str,
    reserve: str,
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
    recompute_attention: bool,
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
        "budget": (budget, 1), "rank": (rank, 0),
    }  # fmt: skip
    check_least(least)
    check_4bit(load_in_4bit, rank)
    setting = Setting(
        model, method, chunk_size, budget, rank, tuple(targets) if targets else None, DTYPES[dtype],
        DTYPES[cache_grad_dtype] if cache_grad_dtype else None, "all" if recompute_attention else not no_recompute,
        device=device,
        offload=offload, load_in_4bit=load_in_4bit, fill_size=fill_size, sampler=sampler,
        pattern=make_pattern(partial_context, {**partial, "full_layers": full_layers}),
        full_layers=None if full_layers is None else tuple(full_layers),
    )  # fmt: skip
    if table:
        print(longest_table(setting, parse_bytes(reserve)))
        return
    found = plan(setting, parse_bytes(memory), seq_len, parse_bytes(reserve), parse_bytes(host_memory), json)
    print(dumps(found, indent=2) if json else describe(found))


def describe(found: dict[str, Any]) -> str:
    """The forecast in words."""
    fits = "fits" if found["fits"] else "does NOT fit"
    lines = [
        f"{found['model']}, {found['method']}: the longest sequence that fits has {found['max_tokens']:,} tokens",
        f"peak at {found['seq_len']:,} tokens: {human_bytes(found['peak_bytes'])}; {fits} into "
        f"{human_bytes(found['memory_bytes'])} less a reserve of {human_bytes(found['reserve_bytes'])}",
        "",
    ]
    lines += [f"  {name.replace('_', ' '):22} {human_bytes(n):>10}" for name, n in found["breakdown"].items()]
    if found["host_bytes"]:
        lines.append(f"  {'in host memory':22} {human_bytes(found['host_bytes']):>10}")
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
