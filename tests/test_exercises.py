"""The exercises: solutions pass their checks, skeletons fail them, and typical mistakes are named in words."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tutorials.exercises.checks import EXERCISES
from tutorials.exercises.diagnose import Exercise, compare, explain, load

ROOT = Path(__file__).parent.parent
SKELETONS = ROOT / "tutorials" / "exercises"
SOLUTIONS = SKELETONS / "solutions"
BY_NAME = {exercise.name: exercise for exercise in EXERCISES}
each_exercise = pytest.mark.parametrize("exercise", EXERCISES, ids=list(BY_NAME))

# (exercise, what stands in the solution, what a student wrote instead, words that have to come)
MISTAKES = [
    ("attention", ".triu(P + 1)", ".triu(1)", "top left"),
    ("attention", ".triu(P + 1)", ".triu(P)", "In which column of the mask does the first query's own"),
    ("attention", ".masked_fill(future, -torch.inf)", "", "no causal mask"),
    ("attention", ".masked_fill(future, -torch.inf)", ".mul(~future)", "exp(0) is 1"),
    ("attention", " / D**0.5", "", "not divided by sqrt(D)"),
    ("attention", ".repeat_interleave(H // G, dim=1)", ".repeat(1, H // G, 1, 1)", "tiled (0 1 0 1)"),
    ("attention", "past_k, k], dim=2)", "past_k.detach(), k], dim=2)", "gradient of past_k is None"),
    ("attention", "scores = ", "k *= 1.5; scores = ", "one of its inputs in place"),
    ("merge", "(lse_a - lse).exp()[..., None], (lse_b - lse).exp()", "lse_a.exp()[..., None], lse_b.exp()",
     "does not subtract the merged lse"),
    ("merge", "torch.logaddexp(lse_a, lse_b)", "lse_a + lse_b", "do their logarithms?"),
    ("merge", "torch.logaddexp(lse_a, lse_b)", "(lse_a.exp() + lse_b.exp()).log()", "exp(800) is infinite"),
    ("merge", "(q @ k.mT / D**0.5 - lse[..., None]).exp()", "(q @ k.mT / D**0.5).softmax(-1)", "piece's own softmax"),
    ("merge", "(grad @ v.mT - delta)", "(grad @ v.mT)", "delta is missing"),
    ("merge", "(grad * out).sum", "(grad * piece(q, k, v)[0]).sum", "from the piece's own output"),
    ("merge", "- delta) / D**0.5", "- delta)", "but their gradient is not"),
    ("merge", "(grad * out).sum(-1, keepdim=True)", "(p * (grad @ v.mT)).sum(-1, keepdim=True)",
     "over this piece's keys only"),
    ("merge", "(grad * out).sum(-1, keepdim=True)", "(grad * out).sum()", "one number for all queries together"),
    ("merge", "(grad * out).sum(-1, keepdim=True)", "(grad * out).sum(-1)",
     "lse and delta are, for each query, one number: (B, H, C). But dp is (B, H, C, keys)"),
    ("merge", "(lse_a - lse).exp()[..., None], (lse_b - lse).exp()[..., None]",
     "(lse_a - lse).exp(), (lse_b - lse).exp()", "along which dimension has that number to be repeated"),
    ("merge", "- delta) / D**0.5\n    return dscores @ k,", "- delta)\n    return dscores @ k / D**0.5,",
     "dq is divided by sqrt(D), but dk is not"),
    ("merge", "- delta) / D**0.5\n    return dscores @ k, dscores.mT @ q,",
     "- delta)\n    return dscores @ k, dscores.mT @ q / D**0.5,", "dk is divided by sqrt(D), but dq is not"),
    ("merge", "piece_backward(grad, q, k, v, out, lse)\n", "piece_backward(grad, q, k, v, *piece(q, k, v))\n",
     "its own output and log-sum-exp instead of the merged ones"),
    ("merge", "dq = dq + dq_piece", "dq = dq_piece", "the share of piece 2 only"),
    ("loss", "F.pad(labels[:, 1:], (0, 1), value=IGNORE)", "labels", "cut, but not shifted"),
    ("loss", "return list(targets.split(chunk_size, dim=1))",
     "return [F.pad(part[:, 1:], (0, 1), value=IGNORE) for part in labels.split(chunk_size, dim=1)]",
     "the last position of every chunk lost its target"),
    ("loss", "targets.split(chunk_size, dim=1)", "labels[:, 1:].split(chunk_size, dim=1)",
     "the last position has nothing to predict, but it is there"),
    ("loss", "return list(targets.split(chunk_size, dim=1))",
     "return [part[:, 1:] for part in labels.split(chunk_size, dim=1)]", "lost its target, and its place"),
    ("loss", "targets.split(chunk_size, dim=1)", "targets.mT.split(chunk_size)",
     "the targets of chunk 0 are a tensor of shape [4, 2]"),
    ("loss", "targets.split(chunk_size, dim=1)", "(targets + 1).split(chunk_size, dim=1)",
     "the targets of chunk 0 are wrong, and by no mistake known here. They differ first at row 0"),
    ("loss", 'F.cross_entropy(logits, t, ignore_index=IGNORE, reduction="sum")',
     "(logits.logsumexp(-1) - logits[torch.arange(len(t)), t]).sum()", "which index can stand there meanwhile?"),
    ("loss", 'F.cross_entropy(logits, t, ignore_index=IGNORE, reduction="sum")',
     "(logits.logsumexp(-1) - logits.gather(1, t[:, None])[:, 0]).sum()", "which index can stand there meanwhile?"),
    ("loss", "ignore_index=IGNORE", "ignore_index=-1", "which index can stand there meanwhile?"),
    ("loss", "t.clamp(min=0)", "t", "which index can stand there meanwhile?"),
    ("loss", 'reduction="sum"', 'reduction="mean"', "the sum of the tiles' means"),
    ("loss", "F.cross_entropy(logits, t, ", "F.cross_entropy(logits, t.clamp(min=0), ",
     "as if their target was token 0"),
    ("loss", "range(0, len(hidden), tile)", "range(0, len(hidden) - tile + 1, tile)", "does not divide N"),
    ("loss", "dlogits[t == IGNORE] = 0", "pass", "rows with the label -100 have a gradient"),
    ("loss", "dweight += ", "dweight = ", "dweight is that of the last tile only"),
    ("loss", "logits = h @ weight.T", "logits = (hidden @ weight.T)[rows]", "the logits of the whole chunk at once"),
    ("loss", "return grad * dhidden, grad * dweight, None, None", "return dhidden, dweight, None, None",
     "ignores the gradient that it is given"),
    ("loss", "grad * dhidden, grad * dweight, None, None", "grad * dhidden, grad * dweight",
     "one gradient for each argument"),
    ("relay", "backward([loss, memory], [None, memories[j].grad])", "backward(loss)",
     "missing what later chunks sent back"),
    ("relay", "reversed(range(len(chunks)))", "range(len(chunks))", "walk goes forward"),
    ("relay", "with torch.no_grad():", "with torch.enable_grad():", "What switches them off?"),
    ("relay", "m.requires_grad_()", "pass", "does not require a gradient: nothing can be sent back"),
    ("relay", "memories[:j], weights)", "memories[: j + 1], weights)", "Which slice of the memories"),
    ("relay", "f(x, memories, weights)", "f(x, [], weights)",
     "In the fill, chunk 1 was run with 0 memories, but there is 1 chunk before it. What has the fill kept"),
    ("relay", "memories[:j], weights)", "memories[: j - 1], weights)",
     "Chunk 3 was run with 2 memories, but there are 3 chunks before it. Which slice"),
    ("relay", "        torch.autograd.backward(",
     "        for m in memories[:j]:\n            m.grad.zero_()\n        torch.autograd.backward(",
     "only what the very next chunk sent back"),
    ("relay", "        torch.autograd.backward(",
     "        if j == 1:\n            memories[j].grad.zero_()\n        torch.autograd.backward(",
     "The gradient of chunk 1 is missing all that later chunks sent back: did you relay before calling backward?"),
    ("relay", "        torch.autograd.backward(",
     "        if j == 2:\n            memories[j].grad.zero_()\n        torch.autograd.backward(",
     "The gradient of chunk 2 is missing what chunk 3 sent back: did you relay before calling backward?"),
    ("relay", "torch.autograd.backward([loss, memory], [None, memories[j].grad])",
     "loss.backward(); memory.backward(memories[j].grad)", "Can both go into one call"),
    ("relay", "torch.autograd.backward([loss, memory], [None, memories[j].grad])",
     "loss.backward(retain_graph=True); memory.backward(memories[j].grad)", "chunk 0 went through 2 backward calls"),
    ("relay", "        m.grad = torch.zeros_like(m)\n", "", "nobody looks at m_{k-1}: what is its gradient then?"),
    ("relay", "[None, memories[j].grad]", "[None, None]", "Which gradient belongs to the chunk's memory"),
    ("relay", "    total = torch.zeros(())", "    torch.set_grad_enabled(False); total = torch.zeros(())",
     "What ran under torch.no_grad(), or was detached"),
    ("relay", "total + loss.detach()", "total + loss", "has a graph behind it"),
    ("relay", "total = total + loss.detach()", "total = loss.detach()", "that of chunk 0 alone"),
    ("seco", "torch.autograd.backward([loss, *written], [None, *received])", "loss.backward()",
     "as if the memory were constant"),
    ("seco", "labels, None)", "labels, 1)", "not divided by the number of targets"),
    ("seco", "labels, None)", "labels, -(-input_ids.shape[1] // chunk_size))", "number of chunks, not of targets"),
    ("seco", "labels, None)", "labels, input_ids.numel())", "divided by the number of positions, 22"),
    ("seco", "memory, OPTIONS)\n        torch",
     "memory, OPTIONS)\n        loss = loss * batch.num_targets"
     " / (batch.targets[:, chunk.start : chunk.stop] >= 0).sum()\n        torch",
     "sum of the chunks' means"),
    ("seco", "memory, OPTIONS)\n        torch",
     "memory, OPTIONS)\n        loss = loss * batch.num_targets / len(chunks)"
     " / (batch.targets[:, chunk.start : chunk.stop] >= 0).sum()\n        torch",
     "that of the mean of the chunks' means"),
    ("seco", "[loss, *written], [None, *received]", "[loss / batch.num_targets, *written], [None, *received]",
     "The loss is divided by the number of targets a second time"),
    ("seco", "[loss, *written], [None, *received]", "[loss / len(chunks), *written], [None, *received]",
     "what do the shares of all chunks add up to?"),
    ("seco", "[loss, *written], [None, *received]",
     "[loss / batch.num_targets, *written], [None, *(g / batch.num_targets for g in received)]",
     "Both the loss and what was received are divided"),
    ("seco", "total = total + loss.detach()", "total = total + loss.detach() / batch.num_targets",
     "The returned loss is divided by the number of targets twice."),
    ("seco", "[None, *received]", "[None, *(g / batch.num_targets for g in received)]",
     "a loss that was divided already"),
    ("seco", "[loss, *written], [None, *received]",
     "[loss * batch.num_targets, *written], [None, *(g / batch.num_targets for g in received)]",
     "is divided by the number of targets, but the loss is not"),
    ("seco", "[None, *received]", "[None, *(g * (chunk.start != 3) for g in received)]",
     "The gradient of chunk 1 is missing all that later chunks sent back: did you relay before calling backward?"),
    ("seco", "in reversed(chunks)", "in chunks", "walk goes forward"),
    ("seco", "in reversed(chunks)", "in chunks[:0:-1]", "Chunk 0 is never rebuilt"),
    ("seco", "chunks[:-1], memory", "chunks, memory", "The fill writes chunk 3"),
    ("seco", "    fill(model, input_ids, chunks[:-1], memory, OPTIONS)", "    pass", "chunk 0 had not been filled"),
    ("seco", "new_memory(model, input_ids, chunks, OPTIONS)", "new_memory(model, input_ids, chunks[:-1], OPTIONS)",
     "In seco: The memory ends before the last chunk that is rebuilt"),
    ("seco", "[chunk for chunk, _ in kept], OPTIONS)", "[chunk for chunk, _ in kept[:-1]], OPTIONS)",
     "In spaco: The memory ends before the last chunk that is rebuilt"),
    ("seco", "[None, *received]", "[None, *[None] * len(written)]", "a list of keys and values, `written`"),
    ("seco", "    for chunk in reversed(chunks):\n", "    held = []\n    for chunk in reversed(chunks):\n"
     "        held.append(rebuild(model, batch, chunk, memory, OPTIONS))\n"
     "        loss, written, received = held[-1]\n"
     "        torch.autograd.backward([loss, *written], [None, *received])\n"
     "        total = total + loss.detach()\n    for chunk in []:\n",
     "when chunk 0 was rebuilt, the graphs of the chunks 1, 2 and 3 still lived"),
    ("seco", "loss = weight.loss * loss\n",
     "loss = weight.loss * loss\n        chunks.append(loss)\n",
     "In spaco: The gradient is right, but when chunk 0 was rebuilt, the graphs of the chunks 2 and 3 still lived"),
    ("seco", "weight.loss * loss", "weight.loss * loss / batch.num_targets",
     "In spaco: The loss is divided by the number of targets a second time"),
    ("seco", "weight.loss * loss", "weight.loss * loss * batch.num_targets",
     "In spaco: The loss is not divided by the number of targets"),
    ("seco", "weight.loss * loss", "loss", "Algorithm 2 as printed"),
    ("seco", "weight.relay * g", "weight.loss * g", "scaled by weight.loss, but it has a factor of its own"),
    ("seco", "weight.relay * g", "g", "What was received is not scaled"),
    ("seco", "weight.relay * g", "weight.loss * weight.relay * g", "scaled by both factors"),
    ("seco", "input_ids, before_last, memory", "input_ids, [c for c, _ in kept[:-1]], memory",
     "chunk 1 had not been filled"),
    ("seco", "[chunk for chunk, _ in kept]", "[chunk for chunk in chunks if chunk <= kept[-1][0]]",
     "new_memory was told of chunks that are skipped"),
    ("seco", "reversed(kept)", "[(c, w or Weight(1, 1)) for c, w in zip(chunks, entries)][3::-1]",
     "Chunk 1 is to be skipped"),
    ("seco", "    if not kept:\n        return total\n", "", "when the sampler keeps no chunk"),
    ("samplers", "product = first.loss", "product = first.loss * first.relay", "nothing is relayed in it"),
    ("samplers", "0.0 if entry is None", "1.0 if entry is None", "A skipped chunk was left out of the product"),
    ("samplers", "(budget - i) / (num_chunks - i)", "budget / num_chunks", "as the paper assumes"),
    ("samplers", "Weight(1 / rate, 1 / rate)", "Weight(1.0, 1.0)", "nothing makes up for the skipped chunks"),
    ("samplers", "Weight(1 / rate, 1 / rate)", "Weight(1.0, 1 / rate)", "Algorithm 2 as printed"),
    ("samplers", "coin < rate", "coin > rate", "with probability 1 - rate"),
    ("samplers", "torch.rand(len(rates), generator=generator)", "torch.rand(len(rates))",
     "In bernoulli: Two generators with the same seed gave different draws. Is `generator` passed on"),
    ("samplers", "torch.rand(len(rates), generator=generator)",
     "torch.rand(len(rates), generator=torch.Generator().manual_seed(1))", "In bernoulli: It returned the same draw"),
    ("samplers", "torch.rand(len(rates), generator=generator).tolist()",
     "torch.rand(1, generator=generator).tolist() * len(rates)",
     "draws, where independent coins give 200. Does each chunk have its own coin?"),
    ("samplers", "(k - 1) / (t - 1) if t > 1 else 1.0", "k / t", "The relay factor is k / t, as published"),
    ("samplers", " if t > 1 else 1.0", "", "divides by zero"),
    ("samplers", "torch.randperm(k, generator=generator)[:t]", "torch.arange(t)", "the same draw"),
    ("samplers", "min(budget, num_chunks)", "budget", "A budget above the number of chunks"),
    ("lora", "new_zeros(base.out_features, rank)", "new_ones(base.out_features, rank)", "B does not start at zero"),
    ("lora", "nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)",
     "nn.init.zeros_(self.lora_A); nn.init.ones_(self.lora_B)", "A starts at zero instead of B"),
    ("lora", "nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)", "nn.init.zeros_(self.lora_A)", "both start at zero"),
    ("lora", "self.scale = alpha / rank", "self.scale = 1.0", "The adapter is not scaled"),
    ("lora", "self.scale = alpha / rank", "self.scale = rank / alpha", "upside down"),
    ("lora", "base.requires_grad_(False)", "base", "The base is not frozen"),
    ("lora", "    model.requires_grad_(False)\n", "", "is not frozen: it still requires a gradient"),
    ("lora", "copy.deepcopy(self.base)", "self.base", "counts twice"),
    ("lora", "child in targets", "name in targets", "add_lora has not replaced model.layers.0.self_attn.q_proj"),
    ("lora", "child in targets", "name.endswith(tuple(targets))",
     "add_lora has replaced model.layers.0.self_attn.other_q_proj, which is not among"),
    ("lora", "child in targets", "any(target in name for target in targets) and isinstance(module, nn.Linear)",
     "does yours match names that only contain it"),
    ("lora", "        linear = copy.deepcopy(self.base)",
     "        torch.set_grad_enabled(True)\n        linear = nn.Linear(5, 4)",
     "need torch.no_grad()"),
    ("state", "end - decay * (h - h.detach())", "end", "it would come past the chunk twice"),
    ("state", "end - decay * (h - h.detach())", "end - decay * h", "the part of the old state is taken off its value"),
    ("state", "end - decay * (h - h.detach())", "end - decay * h.detach()", "Which of the two h is to have"),
    ("state", "end - decay * (h - h.detach())", "end + decay * (h - h.detach())", "instead of being taken off"),
    ("state", "end - decay * (h - h.detach())", "end - (h - h.detach())", "How much of it is left"),
    ("state", "end - decay * (h - h.detach())", "end.detach()", "would never learn what to hand on"),
    ("state", "    return end - decay * (h - h.detach())", "    end - decay", "has the function a return?"),
    ("state", "hand_on(h, end, decay)]", "end]",
     "In spaco, with all chunks kept and factors of 1: The adjoint passes a chunk twice"),
    ("state", "decays[j] * adjoint + sent", "sent", "hand_on leaves it out of what the chunk sends"),
    ("state", "decays[j] * adjoint + sent", "adjoint + sent", "The adjoint passes the chunks undiminished"),
    ("state", "decays[j] * adjoint + sent", "decays[j] * adjoint", "Every chunk learns from its own loss alone"),
    ("state", "decays[j] * adjoint + sent", "decays[j] * (adjoint + sent)", "but it has passed the chunk already"),
    ("state", "decays[j] * adjoint + sent", "decays[j - 1] * adjoint + sent", "by the decay of the chunk before"),
    ("state", "decays[j] * adjoint + sent", "decays[(j + 1) % 5] * adjoint + sent", "by the decay of the chunk after"),
    ("state", "decays[j] * adjoint + sent", "decays[j] * adjoint * (weight.relay if weight else 1) + sent",
     "In spaco: Past a skipped chunk the adjoint goes for sure, but past a kept one"),
    ("state", "        adjoint = decays", "            adjoint = decays",
     "In spaco: Past a skipped chunk the adjoint goes undiminished"),
    ("state", "hand_on(h, end, decay)], [None, weight.relay * adjoint])\n            sent = h.grad",
     "end], [None, weight.relay * adjoint])\n            sent, decays[j] = h.grad, 0",
     "In spaco: Past a skipped chunk the adjoint goes for sure, but past a kept one"),
    ("state", "hand_on(h, end, decay)], [None, weight.relay * adjoint])\n            sent = h.grad\n"
     "            total = total + loss.detach()\n        adjoint = decays[j] * adjoint + sent\n",
     "end], [None, weight.relay * adjoint])\n            sent = h.grad\n"
     "            total = total + loss.detach()\n        adjoint = sent\n",
     "In spaco: A skipped chunk ends everything"),
    ("state", "[loss, hand_on(h, end, decay)], [None, weight.relay * adjoint]", "loss",
     "Every chunk learns from its own loss alone"),
    ("state", "weight.relay * adjoint", "adjoint", "In spaco: What is relayed is not scaled"),
    ("state", "weight.relay * adjoint", "weight.loss * adjoint", "It has a factor of its own"),
    ("state", "loss = weight.loss * loss", "pass", "In spaco: The loss is not scaled"),
    ("state", "total + loss.detach()", "total + loss.detach() / weight.loss", "The returned loss is not scaled"),
    ("state", "states[j].detach()", "states[j + 1].detach()", "was given h_5, but it stands on h_4"),
    ("state", "f(x, states[-1], weights)", "f(x, start, weights)", "In the fill, chunk 1 was given h_0"),
    ("state", "with torch.no_grad():", "with torch.enable_grad():", "What switches them off?"),
    ("state", "states[j].detach().requires_grad_()", "states[j].detach()", "nothing can be sent back to it"),
    ("state", "reversed(range(len(chunks)))", "range(len(chunks))", "walk goes forward"),
    ("state", "(weight := entries[j]) is not None", "(weight := entries[j] or Weight(1.0, 1.0))",
     "In spaco: Chunk 1 is to be skipped"),
]  # fmt: skip


# The same, but as right as the solution.
OTHER_WAYS = [
    ("attention", "scores.masked_fill(future, -torch.inf).softmax(-1) @ values",
     "torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=~future)"),
    ("attention", "scores.masked_fill(future, -torch.inf)", "(scores + torch.where(future, -torch.inf, 0.0))"),
    ("merge", "share_a, share_b = (lse_a - lse).exp()[..., None], (lse_b - lse).exp()[..., None]",
     "share_a, share_b = (lse_a - lse_b).sigmoid()[..., None], (lse_b - lse_a).sigmoid()[..., None]"),
    ("merge", "torch.logaddexp(lse_a, lse_b)", "torch.stack([lse_a, lse_b]).logsumexp(0)"),
    ("loss", "        dlogits = logits.softmax(-1) - F.one_hot(t.clamp(min=0), len(weight))\n"
     "        dlogits[t == IGNORE] = 0",
     "        with torch.enable_grad():\n            leaf = logits.detach().requires_grad_()\n"
     "            F.cross_entropy(leaf, t, ignore_index=IGNORE, reduction='sum').backward()\n"
     "        dlogits = leaf.grad"),
    ("loss", "return list(targets.split(chunk_size, dim=1))", "return targets.split(chunk_size, dim=1)"),
    ("relay", "torch.autograd.backward([loss, memory], [None, memories[j].grad])",
     "(loss + (memory * memories[j].grad).sum()).backward()"),
    ("relay", "        m.grad = torch.zeros_like(m)\n", "    memories[-1].grad = torch.zeros_like(memories[-1])\n"),
    ("relay", "memories.append(f(x, memories, weights)[1])",
     "memories.append(f(x, tuple(memories), weights)[1].clone())"),
    ("seco", "torch.autograd.backward([loss, *written], [None, *received])",
     "sum([(m * g).sum() for m, g in zip(written, received)], loss).backward()"),
    ("seco", "torch.zeros(())", "0.0"),
    ("seco", "        total = total + loss.detach()\n",
     "        total = total + loss.detach()\n        del loss, written, received\n"),
    ("seco", "        torch.autograd.backward([loss, *written], [None, *received])\n",
     "        relayed = list(zip(written, received))\n"
     "        torch.autograd.backward([loss, *[m for m, _ in relayed]], [None, *[g for _, g in relayed]])\n"),
    ("seco", "OPTIONS = Options()", "OPTIONS = Options(fill_size=7, recompute=True, offload=True)"),
    ("samplers", "torch.rand(len(rates), generator=generator)",
     "(1 - torch.bernoulli(torch.tensor(rates), generator=generator))"),
    ("samplers", "torch.randperm(k, generator=generator)[:t]",
     "torch.multinomial(torch.ones(k), t, generator=generator)"),
    ("samplers", "return 0.0", "return 0"),
    ("lora", "        linear = copy.deepcopy(self.base)  # a copy: the base itself stays what it was\n",
     "        linear = nn.Linear(self.base.in_features, self.base.out_features, dtype=self.base.weight.dtype)\n"
     "        linear.weight.copy_(self.base.weight)\n        linear.bias = self.base.bias\n"),
    ("state", "decay * (h - h.detach())", "(decay * h - (decay * h).detach() - h.detach() * (decay - decay.detach()))"),
    ("state", "end - decay * (h - h.detach())",
     "end.detach() + (end - decay.detach() * h) - (end - decay * h).detach()"),
    ("state", "[loss, hand_on(h, end, decay)], [None, weight.relay * adjoint]",
     "loss + (hand_on(h, end, decay) * weight.relay * adjoint).sum()"),
    ("lora", "self.scale * (x @ self.lora_A.T @ self.lora_B.T)", "x @ (self.scale * self.lora_B @ self.lora_A).T"),
]  # fmt: skip


@each_exercise
def test_the_solution_passes(exercise):
    assert explain(exercise, SOLUTIONS) == ""


@each_exercise
def test_the_skeleton_is_not_done_yet_and_offers_what_the_solution_has(exercise):
    words = explain(exercise, SKELETONS)
    assert "is not done yet. Wanted is" in words

    def signatures(directory):
        module = load(directory / exercise.file)
        own = [x for x in vars(module).items() if inspect.isroutine(x[1]) or inspect.isclass(x[1])]
        return {name: str(inspect.signature(x)) for name, x in own if x.__module__ == module.__name__}

    assert signatures(SKELETONS) == signatures(SOLUTIONS)
    assert str(exercise.number) in words and exercise.file in words


@pytest.mark.parametrize(("name", "right", "wrong", "words"), MISTAKES)
def test_a_typical_mistake_is_named(name, right, wrong, words, tmp_path):
    assert words in _explain_edited(BY_NAME[name], right, wrong, tmp_path)


def _explain_edited(exercise: Exercise, old: str, new: str, directory: Path) -> str:
    solution = (SOLUTIONS / exercise.file).read_text()
    edited = solution.replace(old, new)
    assert edited != solution
    (directory / exercise.file).write_text(edited)
    return explain(exercise, directory)


@pytest.mark.parametrize(("name", "right", "other"), OTHER_WAYS)
def test_another_right_way_passes(name, right, other, tmp_path):
    assert _explain_edited(BY_NAME[name], right, other, tmp_path) == ""


def test_an_unknown_mistake_is_shown_by_its_place_and_values(tmp_path):
    found = _explain_edited(BY_NAME["attention"], "keys.mT /", "keys.mT.sin() /", tmp_path)
    assert "differs first at batch 0, head 0, position 0, channel 0: got " in found


def test_an_exception_is_shown_with_its_line_and_without_a_traceback(tmp_path):
    found = _explain_edited(BY_NAME["relay"], "total = total + loss.detach()", "total = totl + loss", tmp_path)
    assert "stopped with NameError: name 'totl'" in found and ": total = totl + loss" in found
    found = _explain_edited(BY_NAME["relay"], "for x in chunks:", "for x in chunks", tmp_path)
    assert "not valid Python" in found and "in line" in found


@pytest.mark.parametrize(
    ("got", "words"),
    [
        (None, "has the function a return?"),
        (torch.ones(2, 3), "is a tensor of shape [2, 3], but must be a tensor of shape [3]"),
        (torch.ones(3), "where did the dtype"),
        (torch.tensor([1.0, torch.nan, 3.0]).double(), "is nan at index (1,)"),
        (torch.tensor([2.0, 4.0, 6.0]).double(), "exactly 2 times"),
        (torch.zeros(3).double(), "all zero"),
        (torch.tensor([1.0, 2.0, 4.0]).double(), "first at index (2,): got 4, expected 3"),
    ],
)
def test_every_difference_has_its_words(got, words):
    with pytest.raises(AssertionError) as raised:
        compare({"x": got}, {"x": torch.tensor([1.0, 2.0, 3.0]).double()})
    assert words in str(raised.value)


def test_a_student_sees_words_and_no_traceback():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tutorials/exercises", "-k", "merge or relay"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert "Exercise 4, relay (e4_relay.py) is not done yet" in run.stdout
    assert "Traceback" not in run.stdout and "diagnose.py" not in run.stdout and "2 failed" in run.stdout
    run = subprocess.run([*command, "--solutions"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "2 passed" in run.stdout, run.stdout
