"""Models of transformers in chunks against their own full backpropagation; `python -m tests.sweep_wrap` tries all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from shutil import copy
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.nn.functional import cross_entropy

import minichunk as mc
from minichunk.batch import IGNORE, shift
from minichunk.chunks import cut
from minichunk.command.main import main

from .gradients import combine
from .rounding import Exact, exactly, outcome
from .tiny_transformers import batch, exact, own, tiny_transformer

import transformers  # isort: skip (if it is there)
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache  # isort: skip (if it is there)

TYPES = ["gemma2", "gemma3n_text", "phi", "gpt_oss", "llama4_text", "qwen3_next", "bamba", "lfm2"]
WAYS: list[dict[str, Any]] = [{"chunk_size": 5}, {"chunk_size": 4, "recompute": True, "fill_size": 12}]
MEAN = {"chunk_size": 5, "fill_size": 10, "objective": lambda log_probs: -log_probs.sum() / (log_probs != 0).sum()}
NAME = "minichunk"


@pytest.mark.parametrize("model_type", TYPES)
def test_seco_is_its_own_full_backpropagation(model_type: str) -> None:
    (ids, labels), model = batch(), tiny_transformer(model_type)
    with exact():
        ids[1, :9], labels[1, :9] = ids[0, :9], labels[0, :9]
        expected = exactly(model, lambda: own(model, ids, labels))
        wrapped = mc.wrap(model)
        expected.check(outcome(model, lambda: mc.full(wrapped, ids, labels)))
        more = [{"chunk_size": 1}] * wrapped.states + [{"chunk_size": 4, "share": True}] * (model_type == "phi")
        for way in [*WAYS, MEAN, *more]:
            expected.check(outcome(model, partial(mc.seco, wrapped, ids, labels, **way)))


@pytest.mark.parametrize("model_type", ["gemma3_text", "qwen3_next"])
def test_spaco_is_unbiased(model_type: str) -> None:
    (ids, labels), model, sampler = batch(length=13), tiny_transformer(model_type), mc.Bernoulli([0.3, 0.5, 0.8])
    with exact():
        expected, wrapped = exactly(model, lambda: own(model, ids, labels)), mc.wrap(model)
        got = [
            (chance, outcome(model, partial(mc.spaco, wrapped, ids, labels, 5, sampler=lambda *_, draw=draw: draw)))
            for chance, draw in sampler.outcomes(3)
        ]
    noise = {name: 8 * x for name, x in expected.noise.items()}  # a draw's weights make fewer terms cancel
    expected.check(combine(got), beside=Exact(expected.values, noise))


def test_a_state_s_adjoint_passes_a_chunk_that_is_skipped() -> None:
    model = tiny_transformer("qwen3_next", layer_types=["linear_attention"] * 4)
    ids, draw = torch.arange(3, 18)[None], [mc.Weight(1.0, 1.0), None, mc.Weight(1.0, 1.0)]
    labels = ids.index_fill(1, torch.arange(10), IGNORE)
    got = outcome(model, lambda: mc.spaco(mc.wrap(model), ids, labels, 5, sampler=lambda *_: draw))
    assert got["model.embed_tokens.weight"][3].any()


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gpt2"])
def test_documents_in_a_row_are_as_if_alone(model_type: str) -> None:
    (ids, labels), model, starts = batch(rows=1), tiny_transformer(model_type), [0, 3, 14, 16]
    parts = [slice(*edges) for edges in pairwise([*starts, 23])]
    count = sum(int((labels[:, part][:, 1:] != IGNORE).sum()) for part in parts)
    with exact():
        wrapped = mc.wrap(model)
        alone = partial(mc.full, wrapped, num_targets=count)
        expected = exactly(model, lambda: sum(alone(ids[:, part], labels[:, part]) for part in parts))
        for way in WAYS:
            expected.check(outcome(model, partial(mc.seco, wrapped, ids, labels, starts=starts, **way)))
        for other in ("llama4_text", "bamba"):  # one counts by itself, and one has states
            with pytest.raises(mc.InputError, match="starts and share are not for"):
                mc.seco(mc.wrap(tiny_transformer(other)), ids, labels, 5, starts=starts)


def lora(model: Any, dropout: float = 0.0, **more: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_dropout=dropout, task_type="CAUSAL_LM", **more))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero at first: nothing would flow into A
            parameter.data.normal_(std=0.3)
    return adapted


@pytest.mark.parametrize(
    "adapted",
    [
        lambda: lora(tiny_transformer("llama"), modules_to_save=["lm_head"]),
        lambda: lora(tiny_transformer("qwen3_next"), target_modules=["q_proj", "in_proj_qkvz"]),
    ],
)
def test_adapters_of_peft(adapted: Callable[[], Any]) -> None:
    """In two batches of 2, whose gradients add up."""
    (ids, labels), model = batch(rows=4), adapted()
    with exact():
        expected, wrapped = exactly(model, lambda: own(model, ids, labels)), mc.wrap(model)
        count = int((shift(labels) != IGNORE).sum())

        def both(way: dict[str, Any]) -> Tensor:
            return sum(mc.seco(wrapped, ids[i : i + 2], labels[i : i + 2], num_targets=count, **way) for i in (0, 2))

        for way in WAYS:
            expected.check(outcome(model, lambda way=way: both(way)))


def through_its_own_cache(model: Any, ids: Tensor, labels: Tensor, size: int, seed: int) -> Tensor:
    """Plain backpropagation through all chunks and transformers' cache at once, with the masks that a seed draws."""
    cache, total, targets = DynamicCache(config=model.config), torch.zeros(()), shift(labels)
    for start, stop in cut(ids.shape[1], size):
        torch.manual_seed(seed + start)
        logits = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True).logits
        total = total + cross_entropy(logits.flatten(0, 1), targets[:, start:stop].flatten(), reduction="sum")
    loss = total / (targets != IGNORE).sum()
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize(
    "dropping",
    [lambda: lora(tiny_transformer("llama"), 0.1), lambda: tiny_transformer("gpt2", resid_pdrop=0.1, embd_pdrop=0.1)],
)
def test_dropout_draws_the_same_masks_whenever_a_chunk_is_run(dropping: Callable[[], Any]) -> None:
    (ids, labels), model = batch(), dropping().eval()
    with exact():
        wrapped = mc.wrap(model)
        assert wrapped.dropout_seed() is None
        model.train()
        seed = wrapped.dropout_seed()
        wrapped.dropout_seed = lambda: seed
        expected = exactly(model, lambda: through_its_own_cache(model, ids, labels, 5, seed))
        for options in ({}, {"recompute": True, "fill_size": 12}, {"objective": MEAN["objective"], "fill_size": 12}):
            expected.check(outcome(model, partial(mc.seco, wrapped, ids, labels, 5, **options)))


@pytest.mark.parametrize(
    "ignored",
    ["gemma3_text mask", "gemma3_text scaling", "gpt_oss s_aux", "gemma2 softcap", "gemma2 cap", "bamba state"],
)
def test_who_ignores_a_part_of_a_model_is_found_out(ignored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from minichunk.models import transformers_cache, wrap

    model_type, ignored = ignored.split()
    model, attend = tiny_transformer(model_type, attn_logit_softcapping=1.0), transformers_cache.attend
    mc.wrap(model)
    less = lambda *args, **asked: attend(*args, **{key: x for key, x in asked.items() if key != ignored})  # noqa: E731
    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, less)
    if ignored == "mask":
        rule = transformers_cache.Rule(mc.Window())
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, NAME, lambda **_: rule)
    if ignored == "cap":
        capless = lambda x, name, *other: None if "softcap" in name else getattr(x, name, *other)  # noqa: E731
        monkeypatch.setattr(wrap, "getattr", capless, raising=False)
    if ignored == "state":
        monkeypatch.setattr(transformers_cache.Run, "get_recurrent_state", lambda *_, **__: None)
    with pytest.raises(mc.InputError, match="would be off by"):
        mc.wrap(model)


@pytest.mark.parametrize(
    ("model_type", "reason"), [("bloom", "AttentionInterface"), ("diffllama", "runs twice"), ("jamba", "be off by")]
)
def test_others_are_refused_in_a_line(model_type: str, reason: str) -> None:
    with pytest.raises(mc.InputError, match=f"cannot be run in chunks: .*{reason}") as error:
        mc.wrap(tiny_transformer(model_type))
    assert "\n" not in str(error.value)


def test_what_is_not_done_is_refused() -> None:
    ids, labels = batch()
    with pytest.raises(mc.InputError, match="not torch's Linear"):
        mc.wrap(lora(tiny_transformer("llama"), target_modules=["q_proj", "lm_head"]))
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = tiny_transformer("llama", rope_parameters=rope, max_position_embeddings=20)
    wrapped = mc.wrap(model)
    mc.seco(wrapped, ids[:, :20], labels[:, :20], 5)
    with pytest.raises(mc.InputError, match="past 20 tokens"):
        mc.seco(wrapped, ids, labels, 5)
    dropping = tiny_transformer("llama", attention_dropout=0.1).train()
    with pytest.raises(mc.InputError, match="attention_dropout=0"):
        mc.seco(mc.wrap(dropping), ids, labels, 5)
    model.gradient_checkpointing_enable()
    with pytest.raises(mc.InputError, match="gradient_checkpointing_disable"):
        mc.seco(wrapped, ids[:, :20], labels[:, :20], 5)
    model.gradient_checkpointing_disable()
    with pytest.raises(mc.InputError, match="offload"):
        mc.seco(wrapped, ids[:, :20], labels[:, :20], 5, offload=True)


def test_in_bfloat16_it_is_no_further_off_than_twice_its_own_backpropagation() -> None:
    (ids, labels), model = batch(), tiny_transformer("llama").bfloat16()
    theirs = outcome(model, lambda: own(model, ids, labels))
    ours = outcome(model, lambda: mc.seco(mc.wrap(model), ids, labels, 5))
    expected = outcome(model.double(), lambda: own(model, ids, labels))
    off = [sum(float((x[name] - y).norm()) ** 2 for name, y in expected.items()) for x in (ours, theirs)]
    assert off[0] < 4 * off[1]


def test_the_model_stays_as_it_was() -> None:
    (ids, labels), model = batch(), tiny_transformer("gemma2").train()
    before, state, config = model(input_ids=ids).logits.detach(), torch.get_rng_state(), model.config.to_dict()
    model.model.layers[0].mlp.eval().requires_grad_(False)
    modes = [(module.training, vars(module).keys()) for module in model.modules()]
    learning = [p.requires_grad for p in model.parameters()]
    wrapped = mc.wrap(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    mc.seco(wrapped, ids, labels, 5, recompute=True)
    assert [p.requires_grad for p in model.parameters()] == learning
    assert [(module.training, vars(module).keys()) for module in model.modules()] == modes
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.filterwarnings("ignore")
def test_adapters_on_4_bits(tmp_path: Path) -> None:
    """In float32, as the base is; in evaluation it is refused, for a CPU's layers lose their gradient there."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    (ids, labels), model = batch(), tiny_transformer("llama", hidden_size=64).float()
    model.save_pretrained(tmp_path)
    told = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=told, device_map="cpu")
    adapted = lora(base.train())
    expected, wrapped = outcome(adapted, lambda: own(adapted, ids, labels)), mc.wrap(adapted)
    for way in WAYS:
        got = outcome(adapted, partial(mc.seco, wrapped, ids, labels, **way))
        assert all((got[name] - x).norm() <= 1e-4 * x.norm() for name, x in expected.items())
    with pytest.raises(mc.InputError, match=r"call train\(\)"):
        mc.seco(wrapped.eval() and wrapped, ids, labels, 5)


@pytest.mark.parametrize("rank", [2, 0])
def test_the_commands_train_and_evaluate(
    rank: int, model_directory: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter; and all parameters, from a teacher."""
    base, teacher, run = tmp_path / "granite", tmp_path / "gemma2", tmp_path / "run"
    for directory in (base, teacher):
        tiny_transformer(directory.name, vocab_size=300).float().save_pretrained(directory)
        copy(model_directory / "tokenizer.json", directory)
    same = ["--seq-len", "40", "--chunk-size", "8", "--device", "cpu", "--model"]
    data = ["--data", str(text), "--val-data", str(text), "--eval-documents", "4", "--output", str(run)]
    how = ["--steps", "2", "--rank", str(rank), "--lr", "0.1"]
    how += [] if rank else ["--objective", "distill", "--teacher", str(teacher)]
    assert main(["train", *same, str(base), *data, *how]) == 0
    losses = json.loads((run / "loss_by_position.json").read_text())
    assert losses["before"] != losses["after"]
    capsys.readouterr()
    trained = [str(base), "--adapter", str(run / "adapter")] if rank else [str(run / "model")]
    assert main(["evaluate", *same, *trained, "--data", str(text), "--documents", "4"]) == 0
    printed = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if " to " in line]
    assert printed == [pytest.approx(span["loss"], abs=6e-4) for span in losses["after"]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", ["transformers", "trl"])
def test_five_steps_of_a_trainer(library: str, tmp_path: Path) -> None:
    """In two batches each, the weights become those of the library's own: of rows of two lengths, from the tokens."""
    pytest.importorskip("accelerate")
    from tutorials.transformers_trainer import Chunkwise

    whole, _ = batch(rows=20)
    rows: Any = [{"input_ids": ids[: 23 - i % 2 * 4].tolist()} for i, ids in enumerate(whole)]
    named: dict[str, Any] = {"max_steps": 5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    named |= {"learning_rate": 1e-2, "report_to": [], "use_cpu": True, "disable_tqdm": True, "optim": "sgd"}
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({str(i): i for i in range(97)})), pad_token="0", eos_token="2"
    )
    if library == "trl":
        trl, rows = pytest.importorskip("trl"), pytest.importorskip("datasets").Dataset.from_list(rows)
        base, told = trl.SFTTrainer, trl.SFTConfig(tmp_path, gradient_checkpointing=False, bf16=False, **named)
        more = {"processing_class": words}
    else:
        base, told = transformers.Trainer, transformers.TrainingArguments(tmp_path, **named)
        more = {"data_collator": transformers.DataCollatorForLanguageModeling(words, mlm=False)}
    weights = []
    for kind, size in ((base, {}), (type("Ours", (Chunkwise, base), {}), {"chunk_size": 5})):
        model = tiny_transformer("llama")
        with exact():
            kind(model=model, args=told, train_dataset=rows, **more, **size).train()
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    before = dict(tiny_transformer("llama").named_parameters())
    for name, expected in weights[0].items():
        assert (weights[1][name] - expected).norm() < 1e-9 * (expected - before[name]).norm(), name
    with pytest.raises(mc.InputError, match="leave out what changes it"):
        kind(model=model, args=replace(told, label_smoothing_factor=0.1), chunk_size=5, train_dataset=rows, **more)
