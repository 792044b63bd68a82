"""Mamba-2: transformers' numbers and files, and SeCO and SpaCO with two tensors handed from chunk to chunk."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import minichunk as mc
from minichunk.batch import IGNORE, shift
from minichunk.chunks import Chunk, Documents, cut
from minichunk.memory.state import Handed, LayerState

from . import strategies
from .gradients import Tensors, take_gradients
from .rounding import exactly, measure, outcome, weighted
from .strategies import SECO_HOW, VOCAB, Batch, batches, examples
from .tiny_transformers import exact as stays_float64

transformers = pytest.importorskip("transformers", minversion="5")
Theirs: Any = transformers.Mamba2ForCausalLM


def tiny(**changes: Any) -> mc.Mamba2Config:
    fields = {
        "vocab_size": VOCAB, "hidden_size": 8, "state_size": 3, "num_hidden_layers": 3, "num_heads": 4, "head_dim": 4,
        "n_groups": 2, "eos_token_id": None,
    }  # fmt: skip
    return mc.Mamba2Config(**{**fields, **changes})


def build(config: mc.Mamba2Config, seed: int = 0) -> mc.Mamba2:
    """In float64, with gates that remember for about 1 to 100 tokens, and nothing that is 0 or 1 by default."""
    model = strategies.build(config, seed, 0.4)
    for layer in model.layers:
        layer.mixer.dt_bias.data.mul_(2.5).sub_(2)
        layer.mixer.A_log.data.mul_(2.5)
        layer.mixer.conv1d.weight.data.mul_(2.5)
    return model


def reference(model: mc.Mamba2, chunk_size: int = 4) -> Theirs:
    """transformers' model with the same weights, which it takes strictly."""
    config = transformers.Mamba2Config.from_dict({**model.config.to_dict(), "chunk_size": chunk_size})
    theirs = Theirs(config).double()
    theirs.load_state_dict(model.state_dict())
    return theirs


def their_outcome(theirs: Theirs, batch: Batch) -> Tensors:
    """Its logits and loss, and the gradients of all parameters."""
    with stays_float64():
        logits = theirs(batch.input_ids, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), shift(batch.labels).flatten(), ignore_index=IGNORE)
        loss.backward()
    return {"logits": logits.detach(), "loss": loss.detach(), **take_gradients(theirs)}


@st.composite
def configs(draw: st.DrawFn) -> mc.Mamba2Config:
    groups, per_group, expand = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    heads, size = groups * per_group, expand * draw(st.integers(1, 3))
    return tiny(
        hidden_size=heads * size // expand, state_size=draw(st.integers(1, 4)),
        num_hidden_layers=draw(st.integers(1, 3)), num_heads=heads, head_dim=size, n_groups=groups, expand=expand,
        conv_kernel=draw(st.integers(1, 5)), layer_norm_epsilon=draw(st.sampled_from([1e-5, 1e-3])),
        time_step_limit=draw(st.sampled_from([(0.0, math.inf), (0.1, 0.3), (0.0, 0.2)])),
        use_bias=draw(st.booleans()), use_conv_bias=draw(st.booleans()), tie_word_embeddings=draw(st.booleans()),
        residual_in_fp32=draw(st.booleans()), eos_token_id=draw(st.sampled_from([None, 3, (3, 4)])),
    )  # fmt: skip


@examples(25)
@given(
    config=configs(), batch=batches(), seed=st.integers(0, 2**31), chunk_size=st.integers(1, 8),
    fill_chunks=st.integers(1, 3), blocks=st.tuples(*[st.integers(1, 6)] * 2), how=SECO_HOW,
)  # fmt: skip
def test_logits_and_gradients_equal_transformers(
    config: mc.Mamba2Config, batch: Batch, seed: int, chunk_size: int, fill_chunks: int, blocks: tuple[int, int],
    how: Any,
) -> None:  # fmt: skip
    """By `full` and by `seco`, chunks shorter than the convolution's kernel too; blocks: their scan's, and ours."""
    assert mc.Mamba2Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    model = build(config, seed)
    theirs = reference(model, blocks[0])
    exact = measure(lambda: their_outcome(theirs, batch))
    logits = {"logits": model(batch.input_ids)}
    keywords = {"fill_size": fill_chunks * chunk_size, **how}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minichunk.memory.state.BLOCK", blocks[1])
        exact.check(outcome(model, lambda: mc.full(model, batch.input_ids, batch.labels)) | logits)
        step = outcome(model, lambda: mc.seco(model, batch.input_ids, batch.labels, chunk_size, **keywords))
        exact.check(step | logits)


@pytest.mark.parametrize(
    ("length", "chunk_size", "at_once", "starts"),
    [(4, 1, None, ()), (8, 3, 1, ()), (12, 3, None, (0, 1, 2, 10)), (12, 4, None, (0, 7))],
)
def test_spaco_is_unbiased(length: int, chunk_size: int, at_once: int | None, starts: tuple[int, ...]) -> None:
    """Averaged over all draws it is the exact gradient: a state's adjoint passes skipped chunks, a tail's does not."""
    model, ids = build(tiny(num_hidden_layers=2)), torch.randint(VOCAB, (1 if starts else 2, length))
    chunks = len(cut(length, chunk_size, Documents(starts)))
    terms: list[tuple[float, Any]] = []
    for probability, entries in mc.Bernoulli([0.9, 0.3, 0.5, 0.7][:chunks]).outcomes(chunks):
        draw = {"sampler": lambda *_, entries=entries: entries, "layers_at_once": at_once, "starts": starts}
        terms.append((probability, exactly(model, lambda draw=draw: mc.spaco(model, ids, ids, chunk_size, **draw))))
    found = weighted(terms)
    exactly(model, lambda: mc.full(model, ids, ids, starts=starts)).check(found.values, beside=found)


def dropped(number: int) -> Callable[[pytest.MonkeyPatch], None]:
    """What comes back to one of the tensors that a chunk writes is lost."""

    def hand_over(self: LayerState, chunk: Chunk, original: Any = LayerState.hand_over) -> tuple[Tensor, ...]:
        return tuple(x * (i != number) for i, x in enumerate(original(self, chunk)))

    return lambda patch: patch.setattr(LayerState, "hand_over", hand_over)


def lasting_tail(patch: pytest.MonkeyPatch) -> None:
    """The memory carries the tail's gradient on, which the graph of a chunk carries already."""
    original = Handed.write
    patch.setattr(Handed, "write", lambda self, chunk, x, decay: original(self, chunk, x, decay + (decay.ndim == 0)))


@pytest.mark.parametrize(
    "break_it", [dropped(0), dropped(2), lasting_tail], ids=["no state", "no tail", "lasting tail"]
)
@pytest.mark.parametrize("chunk_size", [2, 5])  # shorter and longer than the tail
def test_negative_controls(break_it: Callable[[pytest.MonkeyPatch], None], chunk_size: int) -> None:
    model, ids = build(tiny(), seed=1), torch.randint(VOCAB, (1, 12))
    exact = exactly(model, lambda: mc.full(model, ids, ids))
    exact.check(outcome(model, lambda: mc.seco(model, ids, ids, chunk_size)))
    with pytest.MonkeyPatch.context() as patch:
        break_it(patch)
        with pytest.raises(AssertionError, match="is off by"):
            exact.check(outcome(model, lambda: mc.seco(model, ids, ids, chunk_size)))


def test_a_tail_does_not_keep_its_chunk_in_memory() -> None:
    model, ids = build(tiny()), torch.randint(VOCAB, (1, 50))
    _, written = model.run(ids, model.new_memory(1, 50), [Chunk(0, 20), Chunk(20, 50)])
    assert [x.shape[1:] for x in written[0]] == [(2, 2, 4, 3), (2, 2, 1, 1), (3, 28), ()] * 2
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in written[0][2::4])


def test_an_absent_field_is_what_transformers_takes_it_for() -> None:
    """transformers 5 leaves out what is a default of all models."""
    needed = {name: asdict(tiny())[name] for name in ("vocab_size", "state_size", "num_hidden_layers")}
    needed |= {"hidden_size": 32, "num_heads": 16, "head_dim": 4}
    config, theirs = mc.Mamba2Config.from_dict({"model_type": "mamba2", **needed}), transformers.Mamba2Config()
    assert config.max_position_embeddings == 2048
    for name in asdict(config).keys() - needed.keys() - {"max_position_embeddings"}:
        assert getattr(config, name) == getattr(theirs, name), name


def test_random_weights_decay_and_step_as_transformers() -> None:
    mixer = mc.Mamba2(tiny(num_heads=256, head_dim=1, hidden_size=128)).backbone.layers[0].mixer
    steps = F.softplus(mixer.dt_bias.detach())
    assert torch.equal(mixer.A_log, torch.arange(1, 257).log()) and torch.equal(mixer.D, torch.ones(256))
    assert 0.0009 < float(steps.min()) < 0.0015 < 0.07 < float(steps.max()) < 0.11


@pytest.mark.parametrize("wide", [False, True])
def test_bfloat16(wide: bool) -> None:
    """The residual stream is float32 where the config says so, states and their gradients always."""
    model, ids = build(tiny(residual_in_fp32=wide)).bfloat16(), torch.randint(VOCAB, (2, 20))
    oracle = mc.Mamba2(model.config).double()
    oracle.load_state_dict(model.state_dict())
    exact = exactly(oracle, lambda: mc.full(oracle, ids, ids))
    seen: list[torch.dtype] = []
    model.backbone.layers[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    got = outcome(model, lambda: mc.seco(model, ids, ids, 6, recompute=True))
    exact.check(got, unit=2.0**-9)
    assert {x.dtype for x in got.values()} == {torch.float32}
    assert set(seen) == {torch.float32 if wide else torch.bfloat16}
    hidden, written = model.run(ids)
    assert hidden.dtype == torch.bfloat16
    assert [x.dtype for x in written[0]] == [torch.float32] * 2 + [torch.bfloat16] * 2
