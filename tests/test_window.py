"""Layers that see a window of the past: what they read and send, and mistakes that must be seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import minichunk as mc
from minichunk.chunks import cut
from minichunk.memory import attention, band, kernels
from minichunk.memory.attention import Past
from minichunk.memory.cache import LayerCache
from minichunk.memory.offload import OffloadedLayer
from minichunk.memory.pattern import Pattern, Strided, Window
from minichunk.models.shapes import alike, with_layers
from tutorials.concatenating import Concatenating

from .gradients import Tensors, distance, oracle
from .rounding import exactly, measure, outcome
from .strategies import blocks_of, build, give_pattern, tiny

KINDS = ("sliding_attention", "full_attention", "sliding_attention")
IDS = torch.randint(23, (2, 20), generator=torch.Generator().manual_seed(0))


def windowed(sinks: int = 2, window: int = 5) -> mc.Llama:
    return hybrid(Window(window, sinks))


def hybrid(pattern: Pattern) -> mc.Llama:
    model = build(tiny(3, sliding_window=5, layer_types=KINDS), seed=2)
    give_pattern(model, pattern)
    return model


def a_window_too_wide(patch: pytest.MonkeyPatch) -> None:
    original = Window.parts
    patch.setattr(Window, "parts", lambda self, *a: original(replace(self, window=self.window and self.window + 1), *a))


def a_band_off_by_one(patch: pytest.MonkeyPatch) -> None:
    original = kernels.hidden
    patch.setattr(kernels, "hidden", lambda *a: original(*a).roll(1, -1))


def nothing_sent_to_the_reach(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LayerCache, "add_near_grads", lambda *_: None)


def sinks_forgotten(patch: pytest.MonkeyPatch) -> None:
    original = Window.parts
    patch.setattr(Window, "parts", lambda *a: (p._replace(pinned=0 if p.reach else p.pinned) for p in original(*a)))


def sinks_in_the_past_only(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Past, "own_pinned", lambda *_: None)


def tiles_that_do_not_overlap(patch: pytest.MonkeyPatch) -> None:
    """Each tile's gradients of the keys replace those of the one before, where both have some."""

    def add(self: band.Tiles, x: torch.Tensor, total: torch.Tensor) -> None:
        for n, tile in enumerate([x] if self.number == 1 else x.unflatten(1, total.shape[:2])):
            total[:, :, self.low + n * self.length :][:, :, : tile.shape[2]] = tile

    patch.setattr(band.Tiles, "add", add)


def a_window_of_all(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(kernels, "is_causal", lambda q, k, window: window is not None and k.shape[2] == q.shape[2])


MISTAKES = [
    a_window_too_wide, a_band_off_by_one, nothing_sent_to_the_reach, sinks_forgotten,
    sinks_in_the_past_only, tiles_that_do_not_overlap, a_window_of_all,
]  # fmt: skip


@pytest.mark.parametrize("break_it", [None, *MISTAKES])
def test_negative_controls(break_it: Callable[[pytest.MonkeyPatch], None] | None) -> None:
    """Each of these makes SpaCO differ from the oracle, by far; without one it does not."""
    model = windowed(window=1 if break_it is a_window_of_all else 5)
    chunks, entries = cut(20, 8), [mc.Weight(0.7, 2.0), mc.Weight(1.5, 0.5), mc.Weight(2.0, 3.0)]
    exact = exactly(model, lambda: oracle(model, IDS, IDS, chunks, entries))
    with pytest.MonkeyPatch.context() as patch, blocks_of(3):
        if break_it is not None:
            break_it(patch)
        got = outcome(model, lambda: mc.spaco(model, IDS, IDS, 8, sampler=lambda *_: entries))
    if break_it is None:
        exact.check(got)
    else:
        assert distance(got, exact.values) > 1e-3
        with pytest.raises(AssertionError, match="is off by"):
            exact.check(got)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_reach_that_begins_within_a_block_of_host_memory(recompute: bool) -> None:
    model = windowed()
    exact = exactly(model, lambda: mc.full(model, IDS, IDS))
    with blocks_of(3):
        exact.check(outcome(model, lambda: mc.seco(model, IDS, IDS, 4, offload=True, recompute=recompute)))


PATTERNS = [(Window(5, 2), (0, 1, 12, 13, 14, 15)), (Strided(2, 2, 3), (0, 1, 6, 7, 12, 13, 14, 15))]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(("pattern", "expected"), PATTERNS)
def test_a_layer_reads_its_reach_and_what_is_pinned(
    pattern: Pattern, expected: tuple[int, ...], offload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And sends gradients there, and nowhere else: the query at 16 sees the most of the past."""
    model, kind = hybrid(pattern), OffloadedLayer if offload else LayerCache
    asked: dict[int, set[int]] = {}
    sent: dict[int, set[int]] = {}
    memory = model.new_memory(2, 16, cut(16, 8), mc.protocol.Options(offload=offload))
    for _ in model.run_chunks(IDS[:, :16], memory, 8):
        pass

    def spy(name: str, found: dict[int, set[int]]) -> None:
        original = getattr(kind, name)

        def call(self: Any, at: int, *rest: Any) -> Any:
            pinned = [j for stretch in self.pattern.pinned(0, 16) for j in range(*stretch)]
            positions = {
                "pinned": lambda: pinned[:at], "near": lambda: range(at, rest[0]),
                "add_pinned_grads": lambda: pinned[at : at + rest[0].shape[2]],
                "add_near_grads": lambda: range(at, at + rest[0].shape[2]),
            }[name]()  # fmt: skip
            found.setdefault(id(self), set()).update(positions)
            return original(self, at, *rest)

        monkeypatch.setattr(kind, name, call)

    for name in ("pinned", "near"):
        spy(name, asked)
    for name in ("add_pinned_grads", "add_near_grads"):
        spy(name, sent)
    with blocks_of(3) if not offload else blocks_of(band.TILE):
        hidden, _ = model.run(IDS[:, 16:], memory, [mc.chunks.Chunk(16, 20)])
        hidden.sum().backward()
    for i, layer in enumerate(memory.layers):
        positions = set(range(16)) if KINDS[i] == "full_attention" else set(expected)
        assert asked[id(layer)] == sent[id(layer)] == positions


def test_the_baseline_that_concatenates_knows_windows() -> None:
    model = windowed()
    exact = exactly(model, lambda: mc.full(model, IDS, IDS))
    exact.check(outcome(model, lambda: mc.seco(Concatenating(model), IDS, IDS, 8)))


@pytest.mark.parametrize("pattern", [Window(100, 3), Strided(16, 3, 4)])
def test_many_queries_in_tiles_of_their_real_size(pattern: Pattern) -> None:
    """Whole tiles, several calls of the kernel, and a rest."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 700, 8, dtype=torch.float64, generator=generator) for h in (4, 2, 2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    memory = LayerCache((1, 2, 0, 8), [], q.detach(), torch.float64, pattern)

    def tensors(out: torch.Tensor) -> Tensors:
        return dict(
            zip(("out", "dq", "dk", "dv"), [out, *torch.autograd.grad(out.square().sum(), leaves)], strict=True)
        )

    mask = pattern.mask(700)
    exact = measure(lambda: tensors(F.scaled_dot_product_attention(*leaves, attn_mask=mask, enable_gqa=True)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(band, "KEYS", 600)
        exact.check(tensors(attention.attend(*leaves, memory, 0)))


def test_layers_that_all_have_the_window_are_alike() -> None:
    mixed = tiny(3, sliding_window=5, layer_types=KINDS)
    same = replace(mixed, layer_types=KINDS[:1] * 3)
    assert (alike(mixed), alike(same), alike(tiny(3))) == (False, True, True)
    assert mc.Llama(with_layers(same, 1)).layers[0].self_attn.pattern == Window(5)


def test_a_llama_with_windows_is_not_saved(tmp_path: Any) -> None:
    """Stock transformers would ignore them."""
    with pytest.raises(mc.InputError, match=r"no config\.json describes this model"):
        windowed(sinks=0).save_pretrained(tmp_path)
