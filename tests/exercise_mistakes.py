"""Mistakes that students make in the exercises, each as an edit of the solution, and the words that have to name it."""

from __future__ import annotations

SDPA = "torch.nn.functional.scaled_dot_product_attention"
SOFTMAX = "scores.masked_fill(future, -torch.inf).softmax(-1) @ values"
CROSS_ENTROPY = 'F.cross_entropy(logits, t, ignore_index=IGNORE, reduction="sum")'
RELAY = "torch.autograd.backward([loss, memory], [None, memories[j].grad])"
LEAVES = "        m.grad = torch.zeros_like(m)\n"
HANDED = "torch.autograd.backward([loss, *written], [None, *received])"
KEPT = "    if not kept:\n        return total\n"
BUDGET = "Weight(k / t, (k - 1) / (t - 1) if t > 1 else 1.0)"
UPDATE = "self.scale * (x @ self.lora_A.T @ self.lora_B.T)"
RULE = "(j <= i) & ((i - j < window) | (j < sinks))"
SPANS = "[(0, start)] if low <= sinks else [(0, sinks), (low, start)]"
ADD = "memory.add(a, b, past_dk, past_dv)"

# Of each exercise: what stands in the solution, what a student wrote instead, words that have to come.
MISTAKES: dict[str, list[tuple[str, str, str]]] = {
    "attention": [
        (SOFTMAX, f"{SDPA}(q, keys, values, is_causal=True)", "The causal mask is aligned top left"),
        (SOFTMAX, f"{SDPA}(q, keys, values, attn_mask=future)", "The mask is inside out"),
        (SOFTMAX, "scores.softmax(-1).masked_fill(future, 0) @ values", "Masked after the softmax"),
        (".masked_fill(future, -torch.inf)", "", "There is no causal mask"),
        (".triu(P + 1)", ".triu(P)", "A query does not see its own position: the mask is off by one."),
        (" / D**0.5", "", "The scores are not divided by sqrt(D)."),
        (".repeat_interleave(H // G, dim=1)", ".repeat(1, H // G, 1, 1)", "tiled (0 1 0 1)"),
        (".repeat_interleave(H // G, dim=1)", "", "The H query heads share G key heads"),
        ("[past_k, k]", "[k, past_k]", "The chunk's keys stand before those of the past, the values behind."),
        ("torch.cat([past_k, k], dim=2)", "torch.cat([past_k.detach(), k], dim=2)", "the gradient of past_k is None"),
    ],
    "merge": [
        ("torch.logaddexp(lse_a, lse_b)", "lse_a + lse_b", "do their logarithms?"),
        ("torch.logaddexp(lse_a, lse_b)", "(lse_a.exp() + lse_b.exp()).log()", "exp(800) is infinite"),
        ("share_a * out_a + share_b * out_b", "(out_a + out_b) / 2", "the average of both, with equal shares"),
        (".exp()[..., None], (lse_b - lse).exp()[..., None]", ".exp(), (lse_b - lse).exp()", "one number: (B, H, C)"),
        ("(q @ k.mT / D**0.5 - lse[..., None]).exp()", "(q @ k.mT / D**0.5).softmax(-1)", "the piece's own softmax"),
        ("(grad @ v.mT - delta)", "(grad @ v.mT)", "delta is missing"),
        ("(grad * out).sum", "(grad * piece(q, k, v)[0]).sum", "from the piece's own output"),
        ("- delta) / D**0.5", "- delta)", "but their gradient is not"),
        ("dq = dq + dq_piece", "dq = dq_piece", "the share of the last piece only"),
    ],
    "loss": [
        ("F.pad(labels[:, 1:], (0, 1), value=IGNORE)", "labels", "cut, but not shifted"),
        ("F.pad(labels[:, 1:], (0, 1), value=IGNORE)", "labels[:, 1:]", "but must be a tensor of shape [2, 3]"),
        ("list(targets.split(chunk_size, dim=1))",
         "[F.pad(part[:, 1:], (0, 1), value=IGNORE) for part in labels.split(chunk_size, dim=1)]", "cut first"),
        (CROSS_ENTROPY, "(logits.logsumexp(-1) - logits[torch.arange(len(t)), t]).sum()", "which index can stand"),
        ('reduction="sum"', 'reduction="mean"', "The loss is the sum of the tiles' means."),
        ("range(0, len(hidden), tile)", "range(0, len(hidden) - tile + 1, tile)", "does not divide N"),
        ("dlogits[t == IGNORE] = 0", "pass", "rows with the label -100 have a gradient"),
        ("dweight += ", "dweight = ", "dweight is that of the last tile only"),
        ("logits = h @ weight.T", "logits = (hidden @ weight.T)[rows]", "the logits of the whole chunk at once"),
        ("grad * dhidden, grad * dweight", "dhidden, dweight", "backward ignores the gradient that it is given"),
    ],
    "relay": [
        (RELAY, "loss.backward()", "missing what later chunks sent back, as if the memories were constants"),
        (RELAY, f"for m in memories[:j]: m.grad.zero_()\n        {RELAY}", "only what the very next chunk sent back"),
        (RELAY, "loss.backward(); memory.backward(memories[j].grad)", "Can both go into one call"),
        ("reversed(range(len(chunks)))", "range(len(chunks))", "The walk goes forward"),
        ("with torch.no_grad():", "with torch.enable_grad():", "What switches them off?"),
        ("m.requires_grad_()", "pass", "is no leaf that requires a gradient"),
        ("memories[:j], weights)", "memories[: j + 1], weights)", "which slice of the memories"),
        (LEAVES, "", "nobody looks at m_{k-1}"),
        ("memories[:j], w", "[m.detach().requires_grad_() for m in memories[:j]], w", "the same leaves in all turns?"),
        ("total = total + loss.detach()", "total = total + loss.detach(); memories += [memory]",
         "the graphs of all of these chunks still lived"),
    ],
    "seco": [
        (HANDED, "loss.backward()", "In seco: The gradient of every chunk is missing what later chunks sent back"),
        ("labels, None)", "labels, 1)", "In seco: The loss is not divided by the number of targets"),
        ("[loss, *written], [None, *received]", "[loss / batch.num_targets, *written], [None, *received]",
         "The loss is divided by the number of targets a second time"),
        ("in reversed(chunks)", "in chunks", "The walk goes forward"),
        ("chunks[:-1], memory", "chunks, memory", "The fill writes chunk 3"),
        ("total + loss.detach()\n    return total\n\n", "total + loss\n    return total\n\n", "has a graph behind it"),
        ("weight.loss * loss", "loss", "In spaco: The loss is not scaled, as in Algorithm 2 as printed"),
        ("weight.relay * g", "g", "What was received is not scaled"),
        ("weight.relay * g", "weight.loss * g", "scaled by weight.loss, but it has a factor of its own"),
        ("input_ids, before_last, memory", "input_ids, [c for c, _ in kept[:-1]], memory", "chunk 1 had not been"),
        (KEPT, "", "a draw that keeps no chunk at all"),
    ],
    "samplers": [
        ("product = first.loss", "product = first.loss * first.relay", "nothing is relayed in it"),
        ("0.0 if entry is None", "1.0 if entry is None", "A skipped chunk was left out of the product"),
        ("(budget - i) / (num_chunks - i)", "budget / num_chunks", "as the paper assumes"),
        ("Weight(1 / rate, 1 / rate)", "Weight(1.0, 1.0)", "nothing makes up for the skipped chunks"),
        ("coin < rate", "coin > rate", "When is a coin, uniform in [0, 1), below"),
        ("torch.rand(len(rates), generator=generator)", "torch.rand(len(rates))", "Is `generator` passed on"),
        ("torch.rand(len(rates), generator=generator).tolist()",
         "torch.rand(1, generator=generator).tolist() * len(rates)", "Does each chunk have its own coin"),
        (BUDGET, "Weight(k / t, k / t)", "The relay factor is k / t, as published"),
        (BUDGET, "Weight(k / t, (k - 1) / (t - 1))", "ZeroDivisionError"),
        ("torch.randperm(k, generator=generator)[:t]", "torch.randint(k, (t,), generator=generator)",
         "can the same chunk be drawn twice?"),
        ("min(budget, num_chunks)", "budget", "A budget above the number of chunks"),
    ],
    "lora": [
        ("base.weight.new_zeros(", "torch.zeros(", "lora_B is torch.float32"),
        ("nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)", "nn.init.zeros_(self.lora_A)", "A starts at zero."),
        ("base.requires_grad_(False)", "base", "The base is not frozen"),
        ("alpha / rank", "1.0", "The adapter is not scaled."),
        (f"self.base(x) + {UPDATE}", UPDATE, "This is the adapter alone."),
        ("self.base(x) +", "self.base(x).detach() +", "lacks what comes through the base"),
        ("copy.deepcopy(self.base)", "self.base", "counts twice"),
        ("self.scale * self.lora_B @ self.lora_A", "self.lora_B @ self.lora_A", "The merged weight lacks the scale"),
        ("    model.requires_grad_(False)\n", "", "is not frozen: it still requires a gradient"),
        ("child in targets", "name.endswith(tuple(targets))", "other_q_proj, which is not among the targets"),
    ],
    "state": [
        ("end - decay * (h - h.detach())", "end", "The gradient still has the way by the decay"),
        ("end - decay * (h - h.detach())", "end - decay * h", "the part of the old state is taken off its value"),
        ("[loss, hand_on(h, end, decay)]", "[loss, end]", "The adjoint passes a chunk twice"),
        ("        adjoint = decays[j] * adjoint + sent", "        adjoint = sent", "The way by the decay is missing"),
        ("decays[j] * adjoint", "(decays[j] if weight else 1.0) * adjoint", "the adjoint goes undiminished"),
        ("weight.relay * adjoint", "adjoint", "What is relayed is not scaled."),
        ("weight.loss * loss", "loss", "The loss is not scaled."),
        ("sent = h.grad", "pass", "Every chunk learns from its own loss alone."),
        ("reversed(range(len(chunks)))", "range(len(chunks))", "The walk goes forward"),
        ("states[j].detach()", "states[j + 1].detach()", "was given h_5, but it stands on h_4"),
        ("(weight := entries[j]) is not None", "(weight := entries[j] or Weight(1, 1))", "Chunk 1 is to be skipped"),
    ],
    "objective": [
        ("losses = -", "losses = ", "In focal: The sign: this loss falls when the labels become less probable"),
        ("losses.sum() / (labels != IGNORE).sum()", "losses.mean()", "The mean is over all positions"),
        ("(1 - log_probs.exp())", "(1 - log_probs)", "log_probs stands where p has to"),
        ("log_probs.exp())", "log_probs.detach().exp())", "The loss is right, but its gradient is not"),
        ("chosen, rejected =", "rejected, chosen =", "In preference: The rejected answers win"),
        (".sum(1).chunk(2)", ".sum(1).view(-1, 2).T", "The rows were paired as neighbours"),
        ("(log_probs - reference)", "log_probs", "The reference is left out"),
        ("- margin", "+ margin", "The margin makes it easier"),
        ("(chosen - rejected) - margin", "(chosen - rejected - margin)", "The margin is multiplied by beta"),
        ("-F.logsigmoid(beta * (chosen - rejected) - margin)",
         "-(beta * (chosen - rejected) - margin).sigmoid().log()", "the sigmoid is 0 in floating point"),
    ],
    "window": [
        (RULE, RULE.replace("j < w", "j <= w"), "The window is one position too large"),
        (RULE, "(j <= i) & (i - j < window)", "The sinks are missing. Which positions"),
        (RULE, "((j <= i) & (i - j < window)) | (j < sinks)", "Sinks that lie in the chunk are seen by queries before"),
        ("torch.arange(start, stop)[:, None]", "torch.arange(stop - start)[:, None]", "counted from the beginning"),
        ("max(0, start - window + 1)", "max(0, stop - window)", "The reach is that of the chunk's last query."),
        (SPANS, "[(0, start)]", "All of the past is read."),
        (SPANS, "[(0, min(sinks, start)), (low, start)]", "Spans that touch have to be one"),
        ("[:, columns]", "", "The mask has a column for every position up to `stop`"),
        ("~seen(start, stop, window, sinks)[:, columns]", "(torch.arange(start, stop)[:, None] < columns)",
         "Within what was read, every query sees everything up to itself"),
        (ADD, "pass", "Nothing has been sent back."),
        (ADD, "memory.add(a, b, past_dv, past_dk)", "The gradients of keys and values are exchanged"),
        (ADD, "memory.add(0, b - a, past_dk, past_dv)", "It sent gradients to the positions from 0 to 3"),
    ],
}  # fmt: skip
# Edits that are as right as the solution.
OTHER_WAYS = [
    ("attention", SOFTMAX, f"{SDPA}(q, keys, values, attn_mask=~future)"),
    ("relay", RELAY, "(loss + (memory * memories[j].grad).sum()).backward()"),
    ("relay", LEAVES, "    memories[-1].grad = torch.zeros_like(memories[-1])\n"),
    ("seco", "OPTIONS = Options()", "OPTIONS = Options(fill_size=7, recompute=True)"),
    ("seco", HANDED, "sum([(m * g).sum() for m, g in zip(written, received)], loss).backward()"),
    ("state", "decay * (h - h.detach())", "(decay * h - (decay * h).detach() - h.detach() * (decay - decay.detach()))"),
]  # fmt: skip
