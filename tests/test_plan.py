"""The forecast is the memory of the real step, counted the same way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import minichunk as mc
from minichunk.batch import prepare
from minichunk.chunks import cut
from minichunk.command.main import main
from minichunk.costs.alike import Trace, peak_of
from minichunk.costs.baselines import tiled_full
from minichunk.costs.count import CountBytes
from minichunk.costs.forecast import forecast
from minichunk.costs.plan import left_out, longest_table, parse_bytes
from minichunk.costs.setting import CHUNKED, METHODS, Setting
from minichunk.costs.step import count_step, optimizer_states, step_memory
from minichunk.memory.kernels import kernel_for
from minichunk.memory.layer_memory import LayerMemories
from minichunk.models.shapes import memory_bytes, random_model
from minichunk.samplers import most_kept

from .strategies import tiny


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("shape")
    config = tiny(layers=4, vocab_size=512, hidden_size=64, intermediate_size=128, head_dim=16)
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    return str(path)


def whole_step(setting: Setting, tokens: int) -> int:
    """Peak bytes of a whole real step on the CPU, through the public functions."""
    num_chunks = -(-tokens // setting.chunk_size)
    kept = setting.kept(num_chunks)
    with CountBytes() as count:
        model = random_model(setting.model, setting.dtype, setting.rank, setting.targets)
        make = model.new_memory

        def new_memory(*arguments: object) -> LayerMemories:
            memory = make(*arguments)  # type: ignore[arg-type]
            for layer in memory.layers:
                if hasattr(layer, "kernel"):
                    layer.kernel = kernel_for(setting.device, setting.dtype, 16)
            return memory

        model.new_memory = new_memory  # type: ignore[method-assign]
        states = optimizer_states(model)
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        entries = [None] * (num_chunks - kept) + [mc.Weight(1.0, 2.0)] * kept
        keywords = {"recompute": setting.recompute, "cache_grad_dtype": setting.cache_grad_dtype}
        keywords |= {"offload": setting.offload, "fill_size": setting.fill_size}
        if setting.method == "seco":
            mc.seco(model, ids, ids, setting.chunk_size, **keywords)  # type: ignore[arg-type]
        elif setting.method == "spaco":
            mc.spaco(model, ids, ids, setting.chunk_size, sampler=lambda *_: entries, **keywords)  # type: ignore[arg-type]
        elif setting.method in ("full", "full-recompute"):
            mc.full(model, ids, ids, recompute=setting.method == "full-recompute")
        else:

            def room(x: torch.Tensor) -> torch.Tensor:
                peak, made = count.peak, torch.empty_like(x)
                count.leave_out(made)  # it would be in host memory
                count.peak = max(peak, count.live)
                return made

            tiled_full(
                model, prepare(model, ids, ids, None), offload=setting.method == "full-recompute-offload", room=room
            )
    assert states
    return count.peak


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 4])
def test_forecast_is_the_peak_of_a_real_step(
    directory: str, method: str, recompute: bool, dtype: torch.dtype, rank: int
) -> None:
    setting = Setting(directory, method, 64, 3, rank, dtype=dtype, recompute=recompute, device="cpu")
    assert step_memory(setting, 1024).peak == pytest.approx(whole_step(setting, 1024), rel=0.02)


@pytest.fixture(scope="module", params=["state", "hybrid"])
def state_space(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp(request.param)
    kinds = ("state", "full_attention", "state") if request.param == "hybrid" else ("state",) * 6
    attention = {"intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = mc.StateSpaceConfig(512, 64, 8, len(kinds), kinds, **attention)  # type: ignore[arg-type]
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    return str(path)


@pytest.mark.parametrize("method", ["seco", "spaco"])
@pytest.mark.parametrize(("recompute", "offload"), [(True, True), (False, False)])
def test_a_step_of_a_state_space_model_is_forecast(
    state_space: str, method: str, recompute: bool, offload: bool
) -> None:
    """Also further on, where only the states at the ends of chunks are more; as counted in a real step."""
    setting = Setting(state_space, method, 256, 3, 0, dtype=torch.float32, recompute=recompute, device="cpu")
    setting = replace(setting, offload=offload)
    found = step_memory(setting, 1024)
    assert found.peak + found.host == pytest.approx(whole_step(setting, 1024), rel=0.02)
    further = forecast(setting).at(3328)
    assert further.peak + further.host == pytest.approx(whole_step(setting, 3328), rel=0.02)


def test_offloaded_states_come_to_the_device(tmp_path: Path) -> None:
    """One chunk's at a time: those of all layers, which its graph keeps. On the CPU it is a copy too."""
    config = mc.StateSpaceConfig(512, 128, 64, 6)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    setting = Setting(str(tmp_path), "seco", 32, 3, 0, dtype=torch.float32, device="cpu")
    here, away = (step_memory(replace(setting, offload=offload), 256) for offload in (False, True))
    one = 6 * 128 * 64 * 4  # in all layers; what the last chunk handed on stays on the device, too
    assert here.peak - away.peak == away.host - 2 * one
    assert away.peak + away.host == pytest.approx(whole_step(replace(setting, offload=True), 256), rel=0.001)


@pytest.mark.parametrize(
    ("method", "recompute", "offload", "kinds"),
    [("seco", False, False, "sfs"), ("seco", True, True, "ssss"), ("spaco", True, False, "ssss")],
)
def test_a_step_with_windows_is_forecast(
    tmp_path: Path, method: str, recompute: bool, offload: bool, kinds: str
) -> None:
    """Layers of both kinds, and of one, which a few of them stand for."""
    fields = tiny(len(kinds), vocab_size=512, hidden_size=64, intermediate_size=128, head_dim=16).to_dict()
    names = {"s": "sliding_attention", "f": "full_attention"}
    windows = {"model_type": "ministral", "sliding_window": 200, "layer_types": [names[kind] for kind in kinds]}
    (tmp_path / "config.json").write_text(json.dumps({**fields, **windows}))
    setting = Setting(str(tmp_path), method, 128, 3, 4, dtype=torch.float32, recompute=recompute, device="cpu")
    setting = replace(setting, offload=offload)
    for tokens in (1024, 3328):
        found = forecast(setting).at(tokens)
        assert found.peak + found.host == pytest.approx(whole_step(setting, tokens), rel=0.02)


def test_without_chunks_windows_take_what_full_attention_takes(directory: str) -> None:
    """As with a kernel that knows them. Masks would grow with the square of the length, and a forecast does not."""
    full = Setting(directory, "full-recompute-tiled", 64, 3, 4, dtype=torch.float32, device="cpu")
    hybrid = replace(full, pattern=mc.Window(40, 4))
    assert step_memory(hybrid, 2048) == step_memory(full, 2048)
    assert "masks" in left_out(hybrid)
    assert "masks" not in left_out(full)


def test_what_a_state_remembers(tmp_path: Path) -> None:
    """P · N numbers in float32 per chunk and layer, and a decay of N; a thousand times the length adds no gradients."""
    config = mc.StateSpaceConfig(512, 64, 8, 3)
    chunks = cut(6400, 64)
    remembered, gradients = memory_bytes(config, torch.bfloat16, chunks)
    assert (remembered, gradients) == (100 * 3 * (64 * 8 + 2 * 8) * 4, 0)
    assert memory_bytes(config, torch.bfloat16, chunks[-4:])[0] == 4 * 3 * (64 * 8 + 2 * 8) * 4


LAYERS = {  # every option of every method at least once
    method: [
        Setting("", method, 64, 3, 4, device="cpu"),
        Setting("", method, 64, 3, 0),
        *(
            [
                Setting("", method, 64, 3, 4, recompute=True, offload=True),
                Setting("", method, 64, 3, 0, recompute=False, fill_size=256, device="cpu"),
            ]
            if method in CHUNKED
            else []
        ),
    ]
    for method in METHODS
}


@pytest.mark.parametrize("setting", [s for settings in LAYERS.values() for s in settings], ids=str)
@pytest.mark.parametrize(("layers", "tied"), [(6, True), (9, False)])
def test_a_step_counted_with_few_layers_is_the_whole_one(
    tmp_path: Path, setting: Setting, layers: int, tied: bool
) -> None:
    config = tiny(layers, vocab_size=512, hidden_size=64, intermediate_size=128, head_dim=16, tie_word_embeddings=tied)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    setting = replace(setting, model=str(tmp_path))
    assert step_memory(setting, 512) == count_step(setting, 512, layers)[0]


def test_the_peak_may_be_elsewhere_with_many_layers() -> None:
    """With 3 layers it is at the loss, with 20 at the last layer's end."""
    few, more, other = Trace(), Trace(), Trace()
    few.parts = [[("loss", 100), ("layer", 10), ("layer", 20), ("layer", 30)]]
    more.parts = [[("loss", 100), ("layer", 10), ("layer", 20), ("layer", 30), ("layer", 40)]]
    other.parts = [[("norm", 100), *more.parts[0][1:-1], ("norm", 40)]]
    assert peak_of(few, more, 17) == 200
    assert peak_of(few, other, 17) is None


@pytest.mark.parametrize("method", ["seco", "full"])
@pytest.mark.parametrize("tokens", [70, 700])
def test_a_short_step_is_counted_as_it_is(directory: str, method: str, tokens: int) -> None:
    setting = Setting(directory, method, 64, 3)
    assert forecast(setting).base > tokens
    assert forecast(setting).at(tokens) == step_memory(setting, tokens)


def test_what_recompute_keeps(directory: str, capsys: pytest.CaptureFixture[str]) -> None:
    """True keeps what attention returned: (1, 64, 64) in bfloat16 and log-sum-exps of 4 heads, in 4 layers."""
    common = ["plan", "--model", directory, "--chunk-size", "64", "--seq-len", "4096", "--json"]
    peaks = {}
    for option in ("--no-recompute", ""):
        assert main([*common, *([option] if option else [])]) == 0
        peaks[option] = json.loads(capsys.readouterr().out)["peak_bytes"]
    assert peaks["--no-recompute"] > peaks[""]


@pytest.mark.parametrize("method", ["seco", "spaco"])
def test_forecast_of_offload_is_device_and_host_together(directory: str, method: str) -> None:
    """On the CPU both are one memory, in which the host's part stays from the beginning to the end."""
    setting = Setting(directory, method, 128, 3, 4, dtype=torch.bfloat16, device="cpu", offload=True)
    found = step_memory(setting, 4096)
    assert found.peak + found.host == pytest.approx(whole_step(setting, 4096), rel=0.02)
    assert found.host > 0.2 * found.peak


@pytest.mark.parametrize("method", ["seco", "spaco"])
@pytest.mark.parametrize("offload", [False, True])
def test_a_large_fill_is_forecast(directory: str, method: str, offload: bool) -> None:
    """It peaks above the rebuilds, and is found from the step at the base."""
    setting = Setting(directory, method, 128, 3, 4, device="cpu", fill_size=1024, offload=offload)
    peak = whole_step(setting, 3072)
    assert offload or peak > 1.1 * whole_step(replace(setting, fill_size=None), 3072)
    found = forecast(setting).at(3072)
    assert found.peak + found.host == pytest.approx(peak, rel=0.02)


def test_layer_inputs_in_host_memory(directory: str) -> None:
    """Of 4 layers, and 4 that the last norm saves: (1, tokens, 64) in bfloat16. The device has that much less."""
    tiled, offload = (forecast(Setting(directory, m)) for m in METHODS[-2:])
    assert (offload.host_per_token, tiled.host_per_token) == (8 * 64 * 2, 0)
    assert offload.at(4096).host == 4096 * 8 * 64 * 2
    assert offload.per_token < tiled.per_token


def test_float32_on_cuda_is_counted_with_the_plain_kernel(directory: str) -> None:
    setting = Setting(directory, chunk_size=256, dtype=torch.float32)
    assert step_memory(setting, 3072).peak == pytest.approx(whole_step(setting, 3072), rel=0.02)
    # Scores of 4 heads and 256 queries with a block of the past.
    assert step_memory(setting, 3072).peak > step_memory(replace(setting, device="cpu"), 3072).peak + 4 * 256 * 2048 * 4


def test_spaco_is_counted_with_what_its_coins_may_keep(directory: str) -> None:
    coins = Setting(directory, "spaco", 64, 3, 4, device="cpu")
    fixed = replace(coins, sampler="fixed")
    assert (coins.kept(64), fixed.kept(64), fixed.kept(2)) == (most_kept("bernoulli", 3, 64), 3, 2)
    for setting in (coins, fixed):
        assert forecast(setting).at(4096).peak == pytest.approx(whole_step(setting, 4096), rel=0.02)
    longest = forecast(coins).longest(8 * 2**20, 64)
    assert 0 < longest < forecast(fixed).longest(8 * 2**20, 64)
    assert forecast(coins).at(longest).peak <= 8 * 2**20 < forecast(coins).at(longest + 64).peak


@pytest.mark.parametrize("method", METHODS)
def test_a_chunk_longer_than_the_base(directory: str, method: str) -> None:
    """Of methods without chunks the base is 1,024 tokens."""
    found = forecast(Setting(directory, method, 1500, 3, device="cpu"))
    assert found.longest(64 * 2**20, 1500) % 1500 == 0
    assert found.longest(0, 1500) == 0


@pytest.mark.parametrize("method", ["seco", "spaco"])
def test_growth_is_linear(directory: str, method: str) -> None:
    setting = Setting(directory, method, 128, 3)
    line = forecast(setting)
    for tokens in (2560, 5120, 9728):
        assert line.at(tokens) == step_memory(setting, tokens)
    # Keys and values of 4 layers, 2 heads of 16, in bfloat16; SeCO also has their gradients in float32.
    cache = 4 * 2 * 2 * 16 * 2
    assert line.per_token == cache * (3 if method == "seco" else 1) + 16


def test_an_8b_llama_on_24_gib() -> None:
    """LoRA of rank 8 on q and v, bfloat16, chunks of 512, 1 GiB reserve; the paper reaches 16,000 tokens."""
    available = 23 * 2**30
    seco = forecast(Setting(cache_grad_dtype=torch.bfloat16))
    assert seco.per_token == pytest.approx(256 * 1024, rel=0.001)
    assert seco.longest(available, 512) >= 30_000
    assert seco.at_base.chunk < 0.5 * 2**30
    assert forecast(Setting(method="spaco", sampler="fixed")).longest(available, 512) >= 54_000


def test_counting_forgets_what_is_freed() -> None:
    with CountBytes() as count:
        a = torch.zeros(1000)
        b = a[10:]
        torch.zeros(500) + 1
        del a
        c = torch.zeros(100)
        count.settle()
    assert (count.live, count.peak) == (4400, 8000)
    assert len(b) + len(c) == 1090


@pytest.mark.parametrize(
    ("text", "count"), [("24GiB", 24 * 2**30), ("80 GB", 80 * 10**9), ("512", 512), ("1.5 MiB", 3 * 2**19)]
)
def test_amounts_of_memory(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "24 apples", "-1GiB", "1..5GiB"])
def test_wrong_amounts_of_memory(text: str) -> None:
    with pytest.raises(mc.InputError, match="not an amount of memory"):
        parse_bytes(text)


def test_the_command(directory: str, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["plan", "--model", directory, "--memory", "64MiB", "--reserve", "1MiB", "--chunk-size", "64"]
    assert main([*common, "--method", "spaco", "--budget", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["peak_bytes"] <= 63 * 2**20
    assert found["max_tokens"] % 64 == 0
    assert found["max_tokens"] > found["methods"]["seco"]["max_tokens"] > 0
    assert found["most_kept"] == most_kept("bernoulli", 2, found["chunks"])
    assert sum(found["breakdown"].values()) == found["peak_bytes"] < found["peak_bytes_all_kept"]
    assert main([*common, "--seq-len", "100000"]) == 0
    assert "does NOT fit" in capsys.readouterr().out


def test_the_table_says_what_the_command_says(directory: str) -> None:
    setting = Setting(chunk_size=64, budget=2, dtype=torch.float32)
    header, _, *rows = longest_table(setting, 2**30, [directory]).splitlines()
    assert header == "| model | base | method | 12 GiB | 16 GiB | 24 GiB | 48 GiB | 80 GiB | 141 GiB |"
    assert len(rows) == 6
    seco = forecast(replace(setting, model=directory, method="seco")).longest(23 * 2**30, 64)
    assert rows[1].split(" | ")[1:3] == ["bfloat16", "seco"]
    assert rows[1].split(" | ")[5] == f"{seco / 1000:,.0f}k"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "nowhere"], "--model 'nowhere' is neither a directory with a config.json nor one of llama-47m"),
        (["--memory", "much"], "'much' is not an amount of memory"),
        (["--method", "naive"], "--method is 'naive'"),
        (["--dtype", "int8"], "--dtype is 'int8'"),
        (["--chunk-size", "0"], "--chunk-size is 0"),
        (["--targets", "q"], "LoRA targets are ['q']"),
        (["--fill-size", "256"], "--fill-size is 256, but must be at least 512"),
        (["--sampler", "dice"], "--sampler is 'dice', but must be one of bernoulli, fixed, paper"),
    ],
)
def test_mistakes(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    assert words in capsys.readouterr().err
