"""`minichunk plan`: will it fit? The forecast, against the memory that there is."""

import re
from dataclasses import dataclass, replace
from json import dumps
from typing import Any

from tqdm import tqdm

from ..errors import InputError
from ..files.atomic import human_bytes
from ..memory.window import FULL
from ..training.options import StepOptions, changed, option
from .forecast import fastest, forecast
from .setting import CHUNKED, METHODS, Setting, Share

UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
LEFT_OUT = "the CUDA context, the allocator's fragmentation, the libraries' own buffers (the reserve stands for them)"
MASKS = "masks (tokens x tokens) that methods without chunks make for layers with windows, where a kernel needs none"


@dataclass(frozen=True, kw_only=True)
class PlanOptions(Setting):
    """Forecast whether a training fits into memory.

    Runs the real code on tensors without memory, needs no weights and no GPU, and says how much memory
    a training step needs, what it consists of, and the longest sequence that fits.

      minichunk plan --model llama-3-8b --memory 24GiB
      minichunk plan --model llama-3-8b --layers-at-once auto --offload --host-memory 128GiB
      minichunk plan --model DIR --seq-len 131072 --gpus 4"""

    memory: str = option("24GiB", "of the device, of each GPU", group="the device")
    reserve: str = option("1GiB", "of it not to be planned with")
    host_memory: str = option("64GiB", "for --offload")
    gpus: int = option(1, "of a pipeline: the one that needs most of so many is forecast", metavar="N", least=1)
    seq_len: int | None = changed(  # type: ignore[assignment]
        StepOptions, "seq_len", default=None, help="tokens to forecast", absent="the most that fit"
    )
    compare: bool = option(False, "forecast the other methods too: each takes some seconds for a large model")
    json: bool = option(False, "print one JSON object")


def parse_bytes(text: str) -> int:
    """'24GiB', '80 GB' or a plain number of bytes. Raises InputError."""
    match = re.fullmatch(r"\s*(\d+|\d*\.\d+)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in UNITS:
        raise InputError(f"{text!r} is not an amount of memory; write it like 24GiB, 80GB or 512MiB")
    return int(float(match[1]) * UNITS[match[2]])


def run_plan(options: PlanOptions) -> None:
    """`minichunk plan`: print the forecast. Raises InputError."""
    found = plan(options)
    print(dumps(found, indent=2) if options.json else describe(found))


def plan(options: PlanOptions) -> dict[str, Any]:
    """The forecast as one JSON object: of the method, and with `compare` of the others too. Raises InputError."""
    memory, reserve, host = (parse_bytes(text) for text in (options.memory, options.reserve, options.host_memory))
    if options.layers_at_once == "auto":
        options = replace(options, **fastest(options, options.seq_len, memory - reserve, host))
    here = forecast(options, options.gpus)
    others = (METHODS if options.gpus == 1 else CHUNKED) if options.compare else ()
    methods: dict[str, Any] = {}
    for method in tqdm({options.method: 0} | dict.fromkeys(others), "plan", leave=False, disable=options.json):
        graphs = options.graphs if method == "seco" else 0
        line = forecast(replace(options, method=method, graphs=graphs), options.gpus)
        longest = line.longest(memory - reserve, host)
        device, on_host = line.growth(longest or options.seq_len or options.chunk_size)
        methods[method] = {"max_tokens": longest, "bytes_per_token": device, "host_bytes_per_token": on_host}
    longest = methods[options.method]["max_tokens"]
    length = options.seq_len or longest or options.chunk_size
    at, share = here.at(length), here.largest_share(length)
    chunks, kept = options.chunks(length)
    makes_masks = {*options.patterns()} - {FULL} and {*methods} - {*CHUNKED}
    return {
        "model": options.model, "gpus": options.gpus,
        **({} if share is None else {"layers_per_rank": list(share.counts), "largest_rank": share.rank}),
        "method": options.method, "layers_at_once": options.keywords()["layers_at_once"], "graphs": options.graphs,
        "memory_bytes": memory, "reserve_bytes": reserve,
        "seq_len": length, "peak_bytes": at.peak, "host_bytes": at.host,
        "fits": at.peak <= memory - reserve and at.host <= host, "max_tokens": longest,
        "breakdown": {name: value for name, value in vars(at).items() if name != "host"},
        "methods": methods, "chunks": len(chunks), "most_kept": len(kept), "sampler": options.sampler,
        "left_out": f"{LEFT_OUT}; {MASKS}" if makes_masks else LEFT_OUT,
    }  # fmt: skip


def describe(found: dict[str, Any]) -> str:
    """The forecast in words."""
    fits, who, split, of = "fits" if found["fits"] else "does NOT fit", "", "", ""
    if found["gpus"] > 1:
        counts, rank, of = tuple(found["layers_per_rank"]), found["largest_rank"], " of all GPUs"
        layers = Share(counts, rank).layers
        which = f"rank {rank}, layers {layers.start} to {layers.stop - 1}"
        who = f", on that of {found['gpus']} GPUs which needs most ({which})"
        split = f"\nlayers of each rank: {', '.join(map(str, counts))}"
    in_blocks = f", {found['layers_at_once']} layers at once" if found["layers_at_once"] else ""
    in_blocks += f", {found['graphs']} graphs kept" if found["graphs"] else ""
    lines = [
        f"{found['model']}, {found['method']}{in_blocks}: the longest sequence that fits has "
        f"{found['max_tokens']:,} tokens",
        f"peak at {found['seq_len']:,} tokens{who}: {human_bytes(found['peak_bytes'])}; {fits} into "
        f"{human_bytes(found['memory_bytes'])} less a reserve of {human_bytes(found['reserve_bytes'])}{split}",
        "",
        *(f"  {name.replace('_', ' '):22} {human_bytes(n):>10}" for name, n in found["breakdown"].items() if n),
    ]
    if found["host_bytes"]:
        lines.append(f"  {'in host memory' + of:22} {human_bytes(found['host_bytes']):>10}")
    lines += ["", "  method                    longest   grows per token"]
    for method, row in found["methods"].items():
        host = row["host_bytes_per_token"]
        beside = f", and {human_bytes(host)} in host memory" if host else ""
        lines.append(f"  {method:22} {row['max_tokens']:>10,}   {human_bytes(row['bytes_per_token'])}{beside}")
    if found["method"] == "spaco":
        often = " in 99.9 % of the steps" if found["sampler"] == "bernoulli" else ""
        lines += ["", f"  counted with {found['most_kept']} of {found['chunks']} chunks: no more are kept{often}"]
    return "\n".join([*lines, "", f"not counted: {found['left_out']}"])
