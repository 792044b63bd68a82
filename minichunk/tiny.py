"""Chunk-wise training on one page: the gradient of a long text, with the graph of one short chunk at a time.

Backpropagation keeps the activations of the whole text. But cut the text into chunks x_0, x_1, ... and a Llama sees
the earlier ones only through the keys and values that they left behind (eq. 1 of arXiv 2505.16710):

    J_j, m_j = f(x_j; m_0 .. m_{j-1}; Θ)        J_j: the loss of chunk j, m_j: its keys and values

So whatever a loss has to tell an earlier chunk goes through these. There we cut: store m_j without its graph, as m'_j;
collect the gradient that arrives there; hand it over when chunk j is run once more. That is SeCO, and it is exact.
SpaCO does it for a random few of the chunks: cheaper, and right on average. `python -m minichunk.tiny` shows both.
The page needs PyTorch alone; it runs Llama without rope scaling, and Qwen2, with all parameters trained.
Chunks are counted from 0, here and everywhere in this project; only the paper counts them from 1.

Shapes: B batch, T text, C chunk, P past, E hidden, H heads, G key-value heads, D head size, V vocabulary.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Config = dict[str, Any]  # Hugging Face's config.json, parsed; with `head_dim`, which older ones leave out
Parameters = dict[str, Tensor]  # Θ, by Hugging Face's names
Cache = list[Tensor]  # keys and values of each layer in turn, (B, G, positions, D); an empty list: no past
Kept = dict[int, tuple[float, float]]  # SpaCO's draw: the kept chunks, each with its factors on loss and relay


def rotate(x: Tensor, start: int, theta: float) -> Tensor:
    """RoPE: turn dimensions i and i + D/2 of each query or key by an angle that grows with its position."""
    C, D = x.shape[-2:]
    # Llama's angles are float32 numbers. Powers, cosines and sines are taken in float64 and then rounded, because the
    # last bit of a float32 cosine differs from machine to machine. A port may leave all these casts out.
    frequencies = 1 / (theta ** (torch.arange(0, D, 2) / D).double()).float()  # (D/2)
    angles = torch.outer(torch.arange(start, start + C).float(), frequencies).double()  # (C, D/2)
    cos, sin = angles.cos().float().to(x), angles.sin().float().to(x)
    a, b = x.chunk(2, dim=-1)  # (B, H, C, D/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)  # (B, H, C, D)


def llama(p: Parameters, config: Config, ids: Tensor, targets: Tensor, past: Cache) -> tuple[Tensor, Cache]:
    """f of eq. 1: the summed loss of a chunk (B, C) on top of its past, and the chunk's own keys and values."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))  # Qwen2 has biases

    def norm(name: str, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], p[f"{name}.weight"], config["rms_norm_eps"])

    C, P = ids.shape[1], past[0].shape[2] if past else 0
    mask = torch.ones(C, P + C, dtype=torch.bool, device=ids.device).tril(P)  # token t sees positions 0 .. P + t
    x = F.embedding(ids, p["model.embed_tokens.weight"])  # (B, C, E)
    written: Cache = []
    for i in range(config["num_hidden_layers"]):
        layer, attn = f"model.layers.{i}", f"model.layers.{i}.self_attn"
        h = norm(f"{layer}.input_layernorm", x)  # (B, C, E)
        q, k, v = (linear(f"{attn}.{n}_proj", h).unflatten(-1, (-1, config["head_dim"])).transpose(1, 2) for n in "qkv")
        q, k = (rotate(t, P, config["rope_theta"]) for t in (q, k))  # (B, H, C, D), (B, G, C, D) as v
        written += [k, v]
        if past:
            past_k, past_v = past[2 * i : 2 * i + 2]
            k, v = torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)  # (B, G, P + C, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)  # (B, H, C, D)
        x = x + linear(f"{attn}.o_proj", y.transpose(1, 2).flatten(2))  # (B, C, H * D) -> (B, C, E)
        h = norm(f"{layer}.post_attention_layernorm", x)
        h = F.silu(linear(f"{layer}.mlp.gate_proj", h)) * linear(f"{layer}.mlp.up_proj", h)
        x = x + linear(f"{layer}.mlp.down_proj", h)  # (B, C, E)
    head = p.get("lm_head.weight", p["model.embed_tokens.weight"])  # (V, E); absent: tied to the embedding
    logits = F.linear(norm("model.norm", x), head)  # (B, C, V)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"), written


def full(p: Parameters, config: Config, ids: Tensor, targets: Tensor) -> Tensor:
    """Ordinary backpropagation: adds the mean loss's gradient to `.grad`. targets (B, T): the next token, or -100."""
    J = llama(p, config, ids, targets, past=[])[0] / (targets != -100).sum()
    J.backward()
    return J.detach()


@torch.no_grad()
def fill(p: Parameters, config: Config, ids: Tensor, targets: Tensor, chunk_size: int) -> Cache:
    """All m'_j side by side: keys and values of the whole text, (B, G, T, D), numbers without a graph."""
    memory: Cache = []
    for x_j, y_j in zip(ids.split(chunk_size, dim=1), targets.split(chunk_size, dim=1), strict=True):  # line 1
        _, m_j = llama(p, config, x_j, y_j, memory)  # line 2; seco.py leaves the loss out
        memory = [torch.cat(pair, dim=2) for pair in zip(memory, m_j, strict=True)] if memory else m_j  # line 3
    return memory


def seco(p: Parameters, config: Config, ids: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
    """Algorithm 1: what `full` does, with the graph of one chunk at a time."""
    n, k = (targets != -100).sum(), len(ids.split(chunk_size, dim=1))
    memory = fill(p, config, ids, targets, chunk_size)  # lines 1-3
    sent = [torch.zeros_like(m) for m in memory]  # the gradient at every m'_j, as far as it has arrived
    J = torch.zeros(())
    for j in reversed(range(k)):  # line 4; only later chunks use m'_j, so by now its gradient is complete
        before, now = slice(0, j * chunk_size), slice(j * chunk_size, (j + 1) * chunk_size)
        # The m' of chunks 0 to j-1 as leaves: autograd stops there; it leaves in `.grad` what would have gone on.
        past = [m[:, :, before].detach().requires_grad_() for m in memory]
        J_j, m_j = llama(p, config, ids[:, now], targets[:, now], past)  # line 5: m'_j once more, now with a graph
        # Autograd cannot know that m'_j, which later chunks used, is m_j. So it starts in two places: at J_j with 1,
        # and (the relay) at m_j with the gradient that has arrived at m'_j, which stands for all later losses.
        torch.autograd.backward([J_j / n, *m_j], [None, *(s[:, :, now] for s in sent)])  # lines 6, 7
        for s, m in zip(sent, past, strict=True):
            s[:, :, before] += m.grad
        J = J + J_j.detach() / n
    return J


def spaco(p: Parameters, config: Config, ids: Tensor, targets: Tensor, chunk_size: int, kept: Kept) -> Tensor:
    """Algorithm 2: the same for the kept chunks only. What is sent to any other chunk is lost.

    Each kept chunk has two factors: its loss is multiplied by a, what later chunks sent back to it by b. A gradient
    that travels through several chunks arrives only if all are kept. The paper draws t of the k chunks, with b = k/t
    and (not printed) a = k/t; but then each one kept makes the others rarer. Ours: a coin for each chunk, with chance
    r, and a = b = 1/r. The means over all draws, of gradient and J, are `full`'s.
    """
    n, memory = (targets != -100).sum(), fill(p, config, ids, targets, chunk_size)
    sent = [torch.zeros_like(m) for m in memory]
    J = torch.zeros(())
    for j, (a, b) in sorted(kept.items(), reverse=True):  # NEW: not every j
        before, now = slice(0, j * chunk_size), slice(j * chunk_size, (j + 1) * chunk_size)
        past = [m[:, :, before].detach().requires_grad_() for m in memory]
        J_j, m_j = llama(p, config, ids[:, now], targets[:, now], past)
        torch.autograd.backward([a * J_j / n, *m_j], [None, *(b * s[:, :, now] for s in sent)])  # NEW: a and b
        for s, m in zip(sent, past, strict=True):
            s[:, :, before] += m.grad
        J = J + a * J_j.detach() / n  # NEW: a
    return J


if __name__ == "__main__":
    torch.manual_seed(0)
    config = {"num_hidden_layers": 2, "head_dim": 4, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
    linears = ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down"]
    weights = {f"model.layers.{i}.{name}_proj.weight": torch.randn(16, 16) / 4 for i in range(2) for name in linears}
    norms = (f"layers.{i}.{name}_layernorm" for i in range(2) for name in ("input", "post_attention"))
    weights |= {f"model.{name}.weight": torch.ones(16) for name in (*norms, "norm")}
    weights |= {"model.embed_tokens.weight": torch.randn(50, 16) / 4}
    ids = torch.randint(50, (2, 48))
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)  # the next token, also across a cut: shift before cutting
    coins = [[j for j in range(6) if number >> j & 1] for number in range(64)]  # the kept chunks: all falls of 6 coins
    threes = [kept for kept in coins if len(kept) == 3]

    def mean_spaco(p: Parameters, config: Config, ids: Tensor, targets: Tensor, draws: list[list[int]]) -> Tensor:
        """The mean over these draws, with the factor 2 = 1/rate = k/t on loss and relay."""
        losses = [spaco(p, config, ids, targets, 8, dict.fromkeys(kept, (2.0, 2.0))) for kept in draws]
        for t in p.values():
            t.grad /= len(draws)
        return torch.stack(losses).mean()

    methods: dict[str, Any] = {
        "full backpropagation": full,
        "SeCO, 6 chunks of 8": partial(seco, chunk_size=8),
        "SpaCO, coins of 1/2, factors 2, mean of all 64 draws": partial(mean_spaco, draws=coins),
        "SpaCO, 3 of 6, the paper's factor 6/3, mean of all 20": partial(mean_spaco, draws=threes),
    }
    exact = None
    for name, method in methods.items():
        p = {key: t.double().requires_grad_() for key, t in weights.items()}  # new tensors, without `.grad`
        J = method(p, config, ids, targets)
        gradient = torch.cat([t.grad.flatten() for t in p.values()])
        exact = gradient if exact is None else exact  # the first method's
        print(f"{name:55} loss {J:.4f}  gradient off by {(gradient - exact).norm() / exact.norm():.0e}")
