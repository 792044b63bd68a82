"""The forecast is the memory of the real step, counted the same way; on several GPUs that of the fullest."""

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import minichunk as mc
from minichunk import blocks
from minichunk.batch import make_batch, prepare
from minichunk.command.main import main
from minichunk.costs import forecast as module
from minichunk.costs.baselines import tiled_full
from minichunk.costs.count import CountBytes
from minichunk.costs.forecast import bytes_of_share, fewest_blocks, fitted, forecast
from minichunk.costs.peak import optimizer_states, step_memory
from minichunk.costs.plan import parse_bytes
from minichunk.costs.setting import CHUNKED, METHODS, Setting, Share
from minichunk.losses import dpo
from minichunk.memory import attention
from minichunk.memory.kernels import kernel_for
from minichunk.models import load
from minichunk.models.shapes import layer_memory_bytes, random_model
from minichunk.pipeline.stage import layer_costs, split_layers
from minichunk.samplers import most_kept
from minichunk.training.options import TrainOptions
from minichunk.training.preferences import distillation

from . import ranks as tasks
from .ranks import Ranks
from .strategies import PROJECTIONS, tiny

BEYOND = 3328  # tokens: longer than the step that is counted


def write(directory: Path, config: Any) -> str:
    directory.mkdir(exist_ok=True)
    if isinstance(config, str):
        pytest.importorskip("transformers")
        config = import_module(".tiny_transformers", __package__).tiny_config(config, vocab_size=512)
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    return str(directory)


def llama(layers: int, **changes: Any) -> mc.LlamaConfig:
    fields = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return tiny(layers, **(fields | changes))


def state_space(*kinds: str) -> mc.StateSpaceConfig:
    attention = {"intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return mc.StateSpaceConfig(512, 64, 8, len(kinds), kinds, **attention)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("shape"), llama(4))


def of(directory: str, method: str = "seco", size: int = 256, rank: int = 4, **options: Any) -> Setting:
    told = {"budget": 3, "dtype": "float32", "device": "cpu", **options}
    return Setting(model=directory, method=method, chunk_size=size, rank=rank, **told)


def real_peak(setting: Setting, tokens: int) -> tuple[int, int]:
    """Bytes of a whole real step on the CPU, through the public functions: at the device's peak, and in host memory."""
    (chunks, kept), keywords = setting.chunks(tokens), setting.keywords()
    kernel = mock.patch.object(attention, "pick_kernel", lambda q: kernel_for(setting.device, q.dtype, 16))
    with kernel, CountBytes() as count, mock.patch.object(blocks, "host_like", count.room):
        model = random_model(setting.config(), setting.torch_dtype, setting.rank, setting.targets)
        teacher = random_model(setting.teacher, setting.torch_dtype) if setting.teacher else None
        count.peak = count.live  # a model of transformers has been tried
        states = optimizer_states(model)
        if setting.in_blocks:  # as from an earlier batch of the same step
            mc.seco(model, *[torch.zeros(1, 2, dtype=torch.int64)] * 2, 2)
        ids = torch.zeros(setting.rows, tokens, dtype=torch.int64)
        if teacher is not None:
            teacher.requires_grad_(False)
            keywords["chunk_loss"] = distillation(teacher, model, make_batch(ids, ids, tokens), setting.chunk_size)
        elif setting.objective:  # the chosen answer and the rejected one
            ids[1, tokens - (setting.answer or tokens) :] = 1
            keywords |= {"objective": dpo(torch.zeros(ids.shape)), "share": setting.answer is not None}
        if setting.method == "seco":
            mc.seco(model, ids, ids, setting.chunk_size, **keywords)
        elif setting.method == "spaco":
            entries = [None] * (len(chunks) - len(kept)) + [mc.Weight(1.0, 2.0)] * len(kept)
            mc.spaco(model, ids, ids, setting.chunk_size, sampler=lambda *_: entries, **keywords)
        elif setting.method in ("full", "full-recompute"):
            mc.full(model, ids, ids, recompute=setting.method == "full-recompute")
        else:
            offload = setting.method == "full-recompute-offload"
            tiled_full(model, prepare(model, ids, ids, None), offload=offload, room=count.room)
    assert states
    return count.peak, count.left_out


WINDOWS = {"model_type": "ministral", "sliding_window": 200}
SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("config", "method", "options"),
    [  # of the first eight, every pair of values is in some row
        (llama(2), "seco", {}),
        (llama(4), "seco", {"rank": 0, "layers_at_once": "2", "offload": True}),
        (llama(4), "seco", {"rank": 0, "offload": True, "recompute": False, "dtype": "bfloat16", "fill_size": 1024}),
        (llama(5), "seco", {"layers_at_once": "2", "recompute": False, "dtype": "bfloat16"}),
        (llama(4), "spaco", {"dtype": "bfloat16", "offload": True}),
        (llama(5), "spaco", {"rank": 0, "fill_size": 1024, "layers_at_once": "2"}),
        (llama(2), "spaco", {"rank": 0, "recompute": False}),
        (llama(4), "spaco", {"recompute": False, "layers_at_once": "1", "offload": True, "fill_size": 1024}),
        (llama(4), "seco", {"objective": "dpo"}),
        (llama(4), "seco", {"objective": "dpo", "answer": 700, "recompute": False}),
        (llama(4), "spaco", {"objective": "dpo", "answer": 90, "fill_size": 1024}),
        (llama(4), "seco", {"objective": "dpo", "answer": 700, "layers_at_once": "2"}),
        (llama(5), "spaco", {"objective": "dpo", "answer": 90, "offload": True, "layers_at_once": "2"}),
        (llama(4), "spaco", {"objective": "distill", "teacher": llama(9)}),
        (llama(4), "seco", {"objective": "distill", "teacher": "gemma3_text", "layers_at_once": "2"}),
        ("gemma3_text", "seco", {"objective": "dpo"}),
        ("qwen3_next", "spaco", {"dtype": "bfloat16", "fill_size": 1024}),
        ("llama", "seco", {"graphs": 2, "rank": 0, "recompute": False}),
        (llama(4), "seco", {"graphs": 2, "rank": 0}),
        (llama(4), "seco", {"graphs": 6, "dtype": "bfloat16"}),
        *((llama(2), m, o) for m in METHODS if m not in CHUNKED for o in ({}, {"dtype": "bfloat16", "rank": 0})),
        (state_space("state", FULL, "state"), "seco", {"rank": 0, "offload": True}),
        (state_space("state", FULL, "state"), "spaco", {"rank": 0, "recompute": False}),
        (state_space("state", "state", "state"), "spaco", {"rank": 0, "layers_at_once": "2"}),
        (llama(3, **WINDOWS, layer_types=(SLIDING, FULL, SLIDING)), "seco", {"recompute": False}),
        (llama(2, **WINDOWS, layer_types=(SLIDING,) * 2), "seco", {"offload": True}),
        (llama(2, **WINDOWS, layer_types=(SLIDING,) * 2), "spaco", {}),
    ],
)
def test_the_forecast_is_the_peak_of_a_real_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Any, method: str, options: Any
) -> None:
    """Of our models, and of those that transformers computes, which are named."""
    if config == "llama":
        monkeypatch.delitem(load._FAMILIES, "llama")  # as if we had none
    if "teacher" in options:
        options = {**options, "teacher": write(tmp_path / "teacher", options["teacher"])}
    setting = of(write(tmp_path, config), method, **options)
    found = forecast(setting).at(BEYOND)
    peak, host = real_peak(setting, BEYOND)
    assert (found.peak, found.host) == (pytest.approx(peak, rel=0.02), host)


def test_a_large_fill_peaks_above_the_rebuilds(directory: str) -> None:
    """So that the forecasts with one, above, are those of a fill."""
    assert real_peak(of(directory, fill_size=1024), 2048)[0] > 1.1 * real_peak(of(directory), 2048)[0]


def test_without_chunks_windows_take_what_full_attention_takes(directory: str) -> None:
    """As with a kernel that knows them. Masks would grow with the square of the length, and a forecast does not."""
    full = of(directory, "full-recompute-tiled")
    assert step_memory(replace(full, partial_context="window", window=40, sinks=4), 2048) == step_memory(full, 2048)


def test_float32_on_cuda_is_counted_with_the_plain_kernel(directory: str) -> None:
    """Scores of 4 heads and 256 queries with a block of the past."""
    cuda, cpu = (step_memory(of(directory, device=device), 2304).peak for device in ("cuda", "cpu"))
    assert cuda > cpu + 4 * 256 * 2048 * 4
    assert cuda == pytest.approx(real_peak(of(directory, device="cuda"), 2304)[0], rel=0.02)


def test_it_grows_evenly(directory: str) -> None:
    """Keys and values of 4 layers, 2 heads of 16, in bfloat16; SeCO also has their gradients; and the batch."""
    cache, options = 4 * 2 * 2 * 16 * 2, {"dtype": "bfloat16", "sampler": "fixed", "cache_grad_dtype": "float32"}
    for method, times in (("seco", 3), ("spaco", 1)):
        line = forecast(of(directory, method, **options))
        assert all(line.at(tokens) == step_memory(line.setting, tokens) for tokens in (700, 4096))
        assert line.growth(3072) == (times * cache + 25, 0)


def test_auto_is_the_fewest_blocks_that_fit(tmp_path: Path) -> None:
    """With all that is needed, and with a byte less. Where nothing fits, and for the longest text: what grows least."""
    config = llama(6, num_attention_heads=8, num_key_value_heads=8)  # 512 numbers a token and layer, 64 between blocks
    setting, host = of(write(tmp_path, config), dtype="bfloat16", layers_at_once="auto"), 2**40
    for offload in (False, True):
        setting = replace(setting, offload=offload)
        steps = {size: forecast(replace(setting, layers_at_once=str(size))).at(BEYOND) for size in (6, 3, 2, 1)}
        for size, fewer in ((6, 3), (3, 2), (2, 1), (1, 1)):
            assert fewest_blocks(setting, BEYOND, steps[size].peak, host) == size
            assert fewest_blocks(setting, BEYOND, steps[size].peak - 1, host) == fewer
        assert fewest_blocks(setting, None, 2**30, host) == fewest_blocks(setting, BEYOND, 1, host) == 1
    assert fewest_blocks(setting, BEYOND, steps[2].peak, steps[2].host) == 2


def test_auto_of_a_training_asks_what_is_free(
    directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    told = TrainOptions(model=directory, layers_at_once="auto", recompute=True, dtype="bfloat16", seq_len=8192)
    assert fitted(replace(told, layers_at_once="3")).layers_at_once == "3"
    assert fitted(told).layers_at_once is None  # on a CPU
    monkeypatch.setattr("minichunk.training.options.check_device", lambda name: "cuda")
    setting = of(directory, rank=8, targets=PROJECTIONS, device="cuda", dtype="bfloat16", seq_len=8192)
    peaks = [forecast(replace(setting, layers_at_once=size)).at(8192).peak for size in ("4", "2", "1")]
    for peak, size in zip(peaks, ("4", "2", "1"), strict=True):
        monkeypatch.setattr(module, "free_memory", lambda device, peak=peak: peak + module.RESERVE)
        assert fitted(told).layers_at_once == (None if size == "4" else size)
    for graphs in (0, 5, 7, 400):  # of 32 chunks; all that fit
        peak = forecast(replace(setting, graphs=graphs)).at(8192).peak
        monkeypatch.setattr(module, "free_memory", lambda device, peak=peak: peak + module.RESERVE)
        assert fitted(told).graphs == min(graphs, 31)
    assert fitted(replace(told, offload=True)).layers_at_once == "4"  # said, or offload would take one at a time
    assert fitted(replace(told, graphs=2)).graphs == 31
    assert fitted(replace(told, model=write(tmp_path, "gemma3_text"))).graphs == 31
    monkeypatch.setattr(module, "free_memory", lambda device: 0)
    with pytest.raises(mc.InputError, match=r"--layers-at-once auto: 8,192 tokens need .* take a shorter --seq-len"):
        fitted(told)
    with pytest.raises(mc.InputError, match=r"--layers-at-once auto .* but --batch-size is 2"):
        fitted(replace(told, batch_size=2))
    with pytest.raises(mc.InputError, match=r"let costs.forecast\.fitted decide"):
        told.keywords()


def test_spaco_is_counted_with_what_its_coins_may_keep(directory: str) -> None:
    coins, fixed = (of(directory, "spaco", 64, sampler=sampler, dtype="bfloat16") for sampler in ("bernoulli", "fixed"))
    assert [len(each.chunks(64 * 64)[1]) for each in (coins, fixed)] == [most_kept("bernoulli", 3, 64), 3]
    longest = forecast(coins).longest(8 * 2**20)
    assert 0 < longest < forecast(fixed).longest(8 * 2**20)
    assert forecast(coins).at(longest).peak <= 8 * 2**20 < forecast(coins).at(longest + 64).peak
    for method in ("seco", "full"):  # also where a chunk is longer than the step that is counted
        found = forecast(of(directory, method, 1500))
        assert found.longest(64 * 2**20) % 1500 == found.longest(0) == 0


def test_counting_forgets_what_is_freed() -> None:
    with CountBytes() as count:
        a = torch.zeros(1000)
        b = a[10:]
        torch.zeros(500) + 1
        del a
        c = torch.zeros(100)
    assert (count.live, count.peak) == (4400, 8000)
    assert len(b) + len(c) == 1090


def test_amounts_of_memory() -> None:
    assert [*map(parse_bytes, ("24GiB", "80 GB", "512", "1.5 MiB"))] == [24 * 2**30, 80 * 10**9, 512, 3 * 2**19]
    for text in ("", "GiB", "24 apples", "-1GiB", "1..5GiB"):
        with pytest.raises(mc.InputError, match="not an amount of memory"):
            parse_bytes(text)


def test_a_layer_in_4_bits_costs_what_is_stored(directory: str) -> None:
    """Half a byte for a number and four bytes for 64 of them, where bfloat16 has two for one."""
    wide, narrow = (of(directory, dtype="bfloat16", load_in_4bit=narrow) for narrow in (False, True))
    numbers = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128  # of a layer's projections
    saved = numbers * 2 - numbers // 2 - numbers // 64 * 4
    assert layer_costs(wide.meta_model())[1] - layer_costs(narrow.meta_model())[1] == saved
    assert step_memory(wide, 700).weights - step_memory(narrow, 700).weights == 4 * saved


def test_the_command(directory: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The method that is asked for, and with --compare the others."""
    common = ["plan", "--model", directory, "--memory", "64MiB", "--reserve", "1MiB", "--chunk-size", "64"]
    assert main([*common, "--method", "spaco", "--budget", "2", "--compare", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["methods"].keys() == set(METHODS)
    assert found["max_tokens"] % 64 == 0
    assert found["max_tokens"] == found["methods"]["spaco"]["max_tokens"] > found["methods"]["seco"]["max_tokens"] > 0
    assert found["most_kept"] == most_kept("bernoulli", 2, found["chunks"])
    assert sum(found["breakdown"].values()) == found["peak_bytes"] <= 63 * 2**20
    assert main([*common, "--seq-len", "100000"]) == 0
    words = capsys.readouterr().out
    assert "does NOT fit" in words
    assert "full" not in words.partition("not counted")[0]


HYBRID = state_space("state", "full_attention", "state", "state", "state")


@pytest.mark.parametrize(
    ("config", "counts", "options"),
    [
        (llama(7), (1, 5, 1), {}),
        (llama(3, tie_word_embeddings=True), (2, 1), {"method": "spaco", "rank": 0, "recompute": False}),
        (llama(3), (2, 1), {"fill_size": 1024}),
        (HYBRID, (2, 2, 1), {"rank": 0}),
    ],
)
def test_the_forecast_of_each_rank_is_its_peak(
    ranks: Ranks, tmp_path: Path, config: Any, counts: tuple[int, ...], options: dict[str, Any]
) -> None:
    """But for 12 bytes: the loss, and the number of targets, which is a number in the forecast."""
    setting, tokens = of(write(tmp_path, config), **options), 5376  # whole passes of the large fill
    counted = ranks.ask(len(counts), tasks.counted, setting, counts, tokens)
    for rank, (peak, host) in enumerate(counted):
        share = Share(counts, rank)
        assert setting.even_from(share) < tokens
        found = bytes_of_share(setting, tokens, share)
        assert host == found.host
        assert 0 <= peak - found.peak <= 16, f"{peak} on {share}, forecast {found}"


@pytest.mark.parametrize(("config", "tokens"), [(llama(6), 4096), (llama(8), 262_144), (HYBRID, 4096)])
def test_no_rank_needs_more_than_the_forecast(tmp_path: Path, config: Any, tokens: int) -> None:
    setting = of(write(tmp_path, config), rank=0)
    found = forecast(setting, 4)
    peaks = [bytes_of_share(setting, tokens, Share(found.counts(tokens), rank)).peak for rank in range(4)]
    share = found.largest_share(tokens)
    assert share is not None
    assert found.at(tokens).peak == max(peaks) == peaks[share.rank]


def test_the_longest_that_fits_all_ranks(tmp_path: Path) -> None:
    found = forecast(of(write(tmp_path, llama(3))), 3)
    longest = found.longest(32 * 2**20)
    assert longest > 2 * forecast(found.setting).longest(32 * 2**20)
    assert found.at(longest).peak <= 32 * 2**20 < found.at(longest + 256).peak
    assert found.longest(2**10) == 0


def test_a_training_splits_the_layers_as_the_forecast_does(tmp_path: Path) -> None:
    """From a model in memory, and the chunks that it keeps."""
    config = llama(9, vocab_size=4096)
    found = forecast(of(write(tmp_path, config), method="spaco", size=64, budget=3), 3)
    model, seen = random_model(config, torch.float32, 4), set()
    for tokens in (512, 2048, 65536):
        _, kept = found.setting.chunks(tokens)
        remembered = layer_memory_bytes(model.config, torch.float32, kept, found.setting.options())
        counts = tuple(split_layers(model, 3, [sum(layer) for layer in remembered]))
        assert counts == found.counts(tokens)
        seen.add(counts)
    assert len(seen) > 1


def test_the_command_for_several_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["plan", "--model", write(tmp_path, llama(3)), "--memory", "64MiB", "--reserve", "1MiB", "--gpus", "3"]
    assert main([*common, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["gpus"], found["layers_per_rank"]) == (3, [1, 1, 1])
    assert sum(found["breakdown"].values()) == found["peak_bytes"] <= 63 * 2**20
    assert main(common) == 0
    words = capsys.readouterr().out
    rank = found["largest_rank"]
    assert f"of 3 GPUs which needs most (rank {rank}, layers {rank} to {rank})" in words
    assert "layers of each rank: 1, 1, 1" in words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("plan --model nowhere", "--model 'nowhere' is neither a directory with a config.json nor one of llama-47m"),
        ("plan --memory much", "'much' is not an amount of memory"),
        ("plan --targets q", "LoRA targets are ['q']"),
        ("plan --fill-size 256", "--fill-size is 256, but must be at least 512"),
        ("plan --gpus 33", "has 32 layers, and each GPU needs one at least"),
        ("plan --gpus 2 --method full", "--method is 'full', but with --gpus or --objective must be seco or spaco"),
        ("plan --model llama4_text", "this model_type cannot be forecast: Tensor on device meta is not"),
        ("plan --model gemma3_text --layers-at-once 1", "--answer are for models of minichunk's own"),
        ("plan --model gemma3_text --partial-context window", "needs a model of the Llama family, not a gemma3_text"),
        ("bench --fill-size 256", "256"),
    ],
)
def test_mistakes(arguments: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = [write(tmp_path / word, word) if word.endswith("_text") else word for word in arguments.split()]
    assert main(named) == 2
    assert words in capsys.readouterr().err
