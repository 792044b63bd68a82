"""Writing text with the same cache as training: fill it with the prompt, then a token at a time."""

from dataclasses import MISSING, dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..files.documents import check_text, end_of_text
from ..models.config import several
from ..models.lora import without_dropout
from ..models.stack import Stack
from ..protocol import Options
from .load import load_as_told
from .options import ReadOptions, check_options, option


@torch.no_grad()
def generate(
    model: Stack, input_ids: Tensor, max_new_tokens: int, *, temperature: float = 0.0, top_p: float = 1.0,
    generator: torch.Generator | None = None, chunk_size: int = 512,
) -> Tensor:  # fmt: skip
    """Continue `input_ids`, int64 (B, T) without padding; returns int64 (B, T + new).

    temperature: 0 takes the likeliest token; otherwise the logits are divided by it and sampled, among the likeliest
    tokens that together have the probability top_p. generator: on the CPU. chunk_size: tokens of the prompt at a time.
    Stops early when every row has written an end token of generation_config.json, or config.json. Raises InputError.
    """
    if input_ids.ndim != 2 or input_ids.shape[1] < 1 or max_new_tokens < 1:
        raise InputError("generate needs input_ids [B, T] with at least 1 token and max_new_tokens of at least 1")
    if not temperature >= 0 or not 0 < top_p <= 1:
        raise InputError(f"generate needs temperature >= 0 and 0 < top_p <= 1, got {temperature} and {top_p}")
    B, T = input_ids.shape
    if int(input_ids.max()) >= model.config.vocab_size or int(input_ids.min()) < 0:
        raise InputError(f"input_ids must lie between 0 and {model.config.vocab_size - 1}")
    ends = model.config.eos_token_id if model.ends is None else model.ends
    stop_ids = torch.tensor(several(ends), dtype=torch.int64, device=input_ids.device)
    memory, new = model.new_memory(B, T + max_new_tokens), input_ids
    options = Options(positions=torch.arange(T + max_new_tokens, device=input_ids.device))
    done = torch.zeros(B, dtype=torch.bool, device=input_ids.device)
    with without_dropout(model):
        while input_ids.shape[1] < T + max_new_tokens and not done.all():
            start = input_ids.shape[1] - new.shape[1]
            for _, hidden in model.run_chunks(new, memory, chunk_size, start, options):  # noqa: B007 (the last one counts)
                pass
            new = choose(model.lm_head(hidden[:, -1]), temperature, top_p, generator)  # (B, 1)
            input_ids = torch.cat([input_ids, new], dim=1)
            done |= torch.isin(new[:, 0], stop_ids)
    return input_ids


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """The next token of each row of logits (B, V): int64 (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probabilities, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities  # of the likelier tokens
    probabilities = probabilities.masked_fill(before >= top_p, 0.0)  # the likeliest one always stays
    picked = torch.multinomial(probabilities.cpu(), 1, generator=generator).to(order.device)
    return order.gather(-1, picked)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ReadOptions):
    """Continue a text, and print it with its continuation.

    The prompt is continued as it stands, without a chat template, up to an end token of the checkpoint's.

      minichunk generate "It is a truth"
      minichunk generate "It is a truth" --model DIR --adapter runs/1/adapter
      minichunk generate "$(cat chapter.txt)" --model DIR --max-new-tokens 500 --load-in-4bit

    DIR is a Hugging Face checkpoint; one that was trained with --rank 0 is in runs/N/model.
    """

    prompt: str = option(MISSING, "the text to continue, in quotes", positional=True, group="text")
    max_new_tokens: int = option(128, "write up to N", least=1)
    temperature: float = option(0.8, "0: always the likeliest token; higher: more varied", least=0)
    top_p: float = option(0.95, "among the likeliest tokens that together have this chance", above=0, most=1)
    seed: int = option(0, "another one, another text", least=0, below=2**32)


def continue_text(options: GenerateOptions) -> str:
    """`minichunk generate`: the prompt and its continuation as text. Raises InputError."""
    check_options(options)
    if not options.prompt:
        raise InputError("the prompt is empty: give the beginning of a text")
    check_text("the prompt", options.prompt)
    model, tokenizer = load_as_told(options)
    found = tokenizer.encode(options.prompt)
    input_ids = torch.tensor([found.ids[: end_of_text(found)]], device=model.lm_head.weight.device)
    how: Any = {"temperature": options.temperature, "top_p": options.top_p}
    how["generator"] = torch.Generator().manual_seed(options.seed)
    out = generate(model, input_ids, options.max_new_tokens, **how)
    return tokenizer.decode(out[0].tolist())
