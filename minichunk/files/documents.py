"""Text to documents of tokens: reading files, cutting to length, batching."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..batch import IGNORE, shift
from ..errors import InputError
from .atomic import json_lines
from .chat import ChatTemplate, Segment

FORMS = "must be an object with the string 'text', with 'prompt' and 'completion', or with 'messages'"


@dataclass(frozen=True)
class Document:
    """input_ids and labels, int64 (T,); `name` says where they come from, for messages."""

    name: str
    input_ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def num_targets(self) -> int:
        """How many positions have something to predict."""
        return int((shift(self.labels[None]) != IGNORE).sum())


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Read `tokenizer.json` from a checkpoint directory. Raises InputError."""
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path} is missing: a checkpoint directory needs the tokenizer of its model")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{path} is not a tokenizer.json that the tokenizers library reads: {error}") from None
    tokenizer.no_truncation()  # the file may ask for either, from how its model was trained
    tokenizer.no_padding()
    return tokenizer


def read_documents(
    paths: Sequence[str | Path], tokenizer: Tokenizer, eos_token_id: int | None = None,
    chat: ChatTemplate | None = None,
) -> list[Document]:  # fmt: skip
    """Read text files (one document each) and JSONL files (one document a line).

    A JSONL line is an object with `text`; with `prompt` and `completion`, of which the completion is
    learnt; or with `messages`, each with `role` and `content`, of which the assistant's are learnt.
    chat: the model's template, for messages, and for prompt and completion as user and assistant.
    Without one, a completion follows its prompt directly and ends with `eos_token_id`, if there is one.
    The tokenizer's own special tokens (a BOS) come first, but not where a template writes them itself.

    Raises InputError, naming file and line, for anything else and for a document of fewer than two tokens.
    """
    documents = []
    for path in map(Path, paths):
        for name, record in _records(path):
            segments, is_chat = _segments(name, record, chat)
            ids: list[int] = []
            labels: list[int] = []
            for i, (text, is_target) in enumerate(segments):
                new = tokenizer.encode(text, add_special_tokens=i == 0 and not is_chat).ids
                if i == 1 and not is_chat and eos_token_id is not None:
                    new = [*new, eos_token_id]
                ids += new
                labels += new if is_target else [IGNORE] * len(new)
            if len(ids) < 2:
                raise InputError(f"{name}: a document of {len(ids)} tokens, but a next-token loss needs at least 2")
            documents.append(Document(name, torch.tensor(ids), torch.tensor(labels)))
    return documents


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, record) of each document; a text file is one record with `text`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); --data takes text or JSONL files") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from None
    if not text.strip():
        raise InputError(f"{path} is empty")
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        yield str(path), {"text": text}
        return
    for name, record in json_lines(path, text):
        if not isinstance(record, dict):
            raise InputError(f"{name}: {FORMS}")
        yield name, record


def _segments(name: str, record: dict[str, Any], chat: ChatTemplate | None) -> tuple[list[Segment], bool]:
    """A record's segments, and whether a template wrote them. Raises InputError."""

    def check(text: object, what: str) -> str:
        if not isinstance(text, str):
            raise InputError(f"{name}: {FORMS}")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError(f"{name}: {what!r} has half of a surrogate pair, which is not text: mend or drop it")
        return text

    if "text" in record:
        return [(check(record["text"], "text"), True)], False
    if "messages" in record:
        messages = record["messages"]
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise InputError(f"{name}: {FORMS}")
        messages = [{key: check(m.get(key), key) for key in ("role", "content")} for m in messages]
        if not any(message["role"] == "assistant" for message in messages):
            raise InputError(f"{name}: none of the messages has the role 'assistant': there is nothing to learn")
        if chat is None:
            raise InputError(f"{name}: 'messages' need a chat template, and the model's directory has none")
    else:
        prompt, completion = (check(record.get(field), field) for field in ("prompt", "completion"))
        if chat is None:
            return [(prompt, False), (completion, True)], False
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    try:
        return chat.segments(messages), True
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def cut_documents(documents: Sequence[Document], seq_len: int) -> tuple[list[Document], str]:
    """Cut documents into pieces of at most `seq_len` tokens; returns them and a line on what was kept.

    A piece in which nothing is to be predicted (a rest of one token, a prompt alone) is left out,
    and the line says so. Raises InputError if that leaves none.
    """
    pieces, total, kept = [], 0, 0
    for document in documents:
        for start in range(0, len(document), seq_len):
            stop = min(start + seq_len, len(document))
            name = document.name if len(document) <= seq_len else f"{document.name}, tokens {start} to {stop}"
            piece = Document(name, document.input_ids[start:stop], document.labels[start:stop])
            total += len(piece)
            if piece.num_targets():
                pieces.append(piece)
                kept += len(piece)
    line = (
        f"{len(documents):,} documents of {total:,} tokens, cut into {len(pieces):,} pieces of at most "
        f"{seq_len:,}; {'all tokens kept' if kept == total else f'{total - kept:,} tokens without a target left out'}"
    )
    if not pieces:
        raise InputError(f"the data has nothing to predict: {line}")
    return pieces, line


def check_vocabulary(documents: Sequence[Document], vocab_size: int) -> None:
    """Raise InputError, naming the document, if a token id does not fit the model."""
    for document in documents:
        highest = int(document.input_ids.max())
        if highest >= vocab_size:
            raise InputError(
                f"{document.name} has the token id {highest}, but the model's vocabulary ends at {vocab_size - 1}: "
                "is this the tokenizer of this model?"
            )


def collate(documents: Sequence[Document], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Right-pad documents into input_ids and labels, int64 (B, T); labels are -100 on the padding."""
    T = max(len(document) for document in documents)
    input_ids = torch.zeros(len(documents), T, dtype=torch.int64)
    labels = torch.full((len(documents), T), IGNORE)
    for row, document in enumerate(documents):
        input_ids[row, : len(document)] = document.input_ids
        labels[row, : len(document)] = document.labels
    return input_ids.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def step_documents(documents: Sequence[Document], per_step: int, step: int, seed: int) -> list[Document]:
    """The documents of one step: a new shuffle every epoch, and nothing to remember for a resume."""
    order: list[int] = []
    first = step * per_step
    n = len(documents)
    for epoch in range(first // n, (first + per_step - 1) // n + 1):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order += torch.randperm(n, generator=generator).tolist()
    offset = first % n
    return [documents[i] for i in order[offset : offset + per_step]]
