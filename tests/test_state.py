"""The same two methods, unchanged, on states: SeCO is exact, SpaCO unbiased."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import minichunk as mc
from minichunk.chunks import Chunk, cut
from minichunk.memory.state import Handed
from minichunk.models.config import first_eos
from minichunk.models.load import load_model
from minichunk.models.ssm import StateLayer
from minichunk.protocol import DEFAULTS
from minichunk.seco import fill

from .gradients import oracle
from .rounding import exactly, outcome
from .strategies import SECO_HOW, Batch, batches, blocks_of, build, examples, state_models, tiny, tiny_state


def some_ids(length: int, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(23, (batch, length), generator=torch.Generator().manual_seed(seed))


@examples(20)
@given(
    model=state_models(), batch=batches(), chunk_size=st.integers(1, 9), fill_chunks=st.integers(0, 4),
    extra=st.integers(0, 3), block=st.integers(1, 6), how=SECO_HOW,
)  # fmt: skip
def test_full_and_seco_equal_the_loop(
    model: mc.StateSpace, batch: Batch, chunk_size: int, fill_chunks: int, extra: int, block: int, how: Any
) -> None:
    fill_size = fill_chunks * chunk_size + extra if fill_chunks else None
    whole = [Chunk(0, batch.input_ids.shape[1])]
    exact = exactly(model, lambda: oracle(model, batch.input_ids, batch.labels, whole, [mc.Weight(1, 1)]))
    exact.check(outcome(model, lambda: mc.full(model, batch.input_ids, batch.labels)))
    keywords = {"fill_size": fill_size, **how}
    with blocks_of(block):
        exact.check(outcome(model, lambda: mc.seco(model, batch.input_ids, batch.labels, chunk_size, **keywords)))


@pytest.mark.parametrize(("target", "graphs"), [("q_proj", [False, False, True, True]), ("b_proj", [True] * 4)])
def test_what_lies_below_all_that_learns_has_no_graph(target: str, graphs: list[bool]) -> None:
    """Nor is the state that such a layer is handed a leaf: there is nothing that its adjoint would reach."""
    model, ids, chunks = build(tiny_state("ssas"), seed=6), some_ids(9), cut(9, 3)
    mc.add_lora(model, 2, 4, [target])
    memory = model.new_memory(2, 6, chunks[:2])
    fill(model, ids, chunks[:2], memory, DEFAULTS)
    seen: list[bool] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, inputs, output: seen.append(output[0].requires_grad))
    model.run(ids[:, 3:6], memory, [chunks[1]])
    assert seen == graphs
    exactly(model, lambda: mc.full(model, ids, ids)).check(outcome(model, lambda: mc.seco(model, ids, ids, 3)))


@pytest.mark.parametrize(
    ("kept", "starts"), [([0, 1, 2, 3, 4], [0, 3, 6, 9, 12]), ([1, 3], [3, 9]), ([4], [12]), ([0], [0])]
)
def test_states_where_kept_chunks_begin_and_nowhere_else(kept: list[int], starts: list[int]) -> None:
    model, ids, seen = build(tiny_state(2), seed=4), some_ids(14), []
    entries = [mc.Weight(1, 1) if i in kept else None for i in range(5)]
    original = Handed.__init__

    def spy(self: Handed, *arguments: Any) -> None:
        original(self, *arguments)
        seen.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handed, "__init__", spy)
        mc.spaco(model, ids, ids, 3, sampler=lambda *_: entries)
    for part in seen:
        assert part.starts == starts
        assert part.states.shape == (len(starts), 2, 8, 3)
        assert not part.read  # no state's gradient outlives the chunk that it was sent to


@pytest.mark.parametrize("layers", ["ss", "sas"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_is_found_and_read_again(layers: str, tied: bool, tmp_path: Path) -> None:
    config = tiny_state(layers, tie_word_embeddings=tied, eos_token_id=(3, 4), rope_theta=500.0, rms_norm_eps=1e-4)
    model = build(config, seed=5)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert isinstance(again, mc.StateSpace)
    assert again.config == config
    assert (again.lm_head.weight is again.embedding.weight) == tied
    ids = some_ids(9)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in again.state_dict().items())
    torch.testing.assert_close(again(ids), model(ids), rtol=1e-12, atol=1e-12)
    assert load_model(tmp_path, dtype=torch.bfloat16)(ids).dtype == torch.bfloat16


def test_lists_are_as_good_as_tuples(tmp_path: Path) -> None:
    """In a config that a user writes: it is a value, and can be saved."""
    kinds = ["state", "full_attention", "state"]
    listed, configs = (
        [
            tiny_state("sas", layer_types=make(kinds), eos_token_id=make([3, 4])),
            mc.Mamba2Config(23, 8, 3, 1, 4, 4, 2, time_step_limit=make([0.0, 1.0])),
            tiny(eos_token_id=make([3, 4])),
        ]
        for make in (list, tuple)
    )
    assert listed == configs and [hash(config) for config in listed] == [hash(config) for config in configs]
    mc.StateSpace(listed[0]).save_pretrained(tmp_path)


def test_layers_are_states_unless_the_config_says_otherwise() -> None:
    config = {"model_type": "state_space", "vocab_size": 5, "hidden_size": 4, "state_size": 2, "num_hidden_layers": 2}
    read = mc.StateSpaceConfig.from_dict({**config, "torch_dtype": "float32", "layer_types": None})
    assert read.layer_types == ("state", "state")
    assert read.attention is None
    assert first_eos(replace(read, eos_token_id=(2, 1))) == 2


def test_untrained_gates_remember_for_1_to_1000_tokens() -> None:
    torch.manual_seed(0)
    layer = mc.StateSpace(tiny_state(1, state_size=16)).layers[0]
    assert isinstance(layer, StateLayer)
    tokens = 1 / (1 - layer.a_proj.bias.detach().sigmoid())
    assert 1 < float(tokens.min()) < 1.5
    assert float(tokens.max()) == pytest.approx(1000, rel=1e-3)
