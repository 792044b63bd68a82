"""Rows of text to documents of tokens: reading files, what of them is learnt, cutting to length, batching.

A row is one text and the spans of it that are learnt. The whole text is encoded once, and a token is learnt if it
has a character of a span: so the tokens are those that the model will meet, whatever the tokenizer does at a text's
beginning and end.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from ..batch import IGNORE, shift
from ..errors import InputError
from .atomic import json_lines
from .chat import ChatTemplate, Message, Span, unknown_fields
from .checkpoint import checkpoint_directory

FORMS = "must be an object with the string 'text', with 'prompt' and 'completion', or with 'messages'"
# Fields of other programs' rows that say what is learnt, or what is seen before it. They are refused, not dropped.
MEANINGFUL = {
    "assistant_masks", "attention_mask", "audio", "chosen", "completion_mask", "context", "conversations", "functions",
    "image", "images", "input", "input_ids", "instruction", "label", "labels", "loss", "loss_mask", "mask", "output",
    "rejected", "response", "suffix", "system", "train", "video", "videos", "weight", "weights",
}  # fmt: skip
SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
BINARY = {
    b"PAR1": "a Parquet file",
    b"\x1f\x8b": "a gzip file",
    b"PK\x03\x04": "a zip file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
}


class Row(NamedTuple):
    """A text and the spans of it that are learnt. ends: an end token is to follow; template: a chat template wrote it,
    with its own special tokens."""

    text: str
    learnt: list[Span]
    ends: bool = False
    template: bool = False


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
    path = checkpoint_directory(directory) / "tokenizer.json"
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
    """Read files of text (one document each) and of JSON, lines or an array (one document a row), told by content.

    A row is an object with `text`; with `prompt` and `completion`, of which the completion is learnt; or with
    `messages`, of which the assistant's are learnt (but those with `weight: 0` or `train: false`).
    chat: the model's template, for messages, and for prompt and completion as user and assistant.
    Rows without a template end with `eos_token_id`, if there is one; a file of text does not.
    The tokenizer's own special tokens (a BOS) come first, but not where a template writes them itself.

    Raises InputError, naming file and line, for anything else, for a field that would change what is learnt and is
    not understood, and for a document of fewer than two tokens.
    """
    documents = []
    for path in map(Path, paths):
        for name, record in _records(path):
            try:
                row = record if isinstance(record, Row) else _row(record, chat)
                check_text("a field", row.text)
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
            ids, labels = encode(row, tokenizer, eos_token_id)
            if len(ids) < 2:
                raise InputError(f"{name}: a document of {len(ids)} tokens, but a next-token loss needs at least 2")
            documents.append(Document(name, torch.tensor(ids), torch.tensor(labels)))
    return documents


def encode(row: Row, tokenizer: Tokenizer, eos_token_id: int | None) -> tuple[list[int], list[int]]:
    """Token ids and labels of a row, encoded as a whole; a token that has a character of a learnt span is learnt."""
    found = tokenizer.encode(row.text, add_special_tokens=not row.template)
    ids, labels, spans = list(found.ids), [IGNORE] * len(found.ids), iter(row.learnt)
    span = next(spans, None)
    for i, (start, stop) in enumerate(found.offsets):
        while span is not None and span[1] <= start:
            span = next(spans, None)
        if span is not None and max(stop, start + 1) > span[0]:
            labels[i] = ids[i]
    last = len(ids) if row.template else end_of_text(found)
    appended = ids[last:]  # has no characters; it is learnt with the words before it
    if row.ends and eos_token_id is not None and not appended:
        appended = [eos_token_id]
    is_learnt = bool(row.learnt) and row.learnt[-1][1] == len(row.text)
    if appended:
        ids, labels = ids[:last] + appended, labels[:last] + (appended if is_learnt else [IGNORE] * len(appended))
    return ids, labels


def end_of_text(found: Encoding) -> int:
    """How many tokens there are without those that the tokenizer puts at the end of every text."""
    last = len(found.ids)
    while last and found.special_tokens_mask[last - 1]:
        last -= 1
    return last or len(found.ids)


def check_text(name: str, text: str) -> None:
    """Raise InputError if it has characters that stand for no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name} has half of a surrogate pair, or bytes that are not UTF-8: mend or drop it") from None


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (name, row) of each document: a Row of a file of text, else what is to become one."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); --data takes files of text or JSON") from None
    for magic, what in BINARY.items():
        if content.startswith(magic):
            raise InputError(f"{path} is {what}: unpack it, or write its rows as JSON lines, first")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from None
    if not text.strip():
        raise InputError(f"{path} is empty")
    named_json = path.suffix.lower() in (".json", ".jsonl", ".ndjson")
    is_lines = isinstance(_json(next(line for line in text.split("\n") if line.strip())), dict)
    whole = _json(text) if not is_lines and text.lstrip()[0] in "[{" else None
    if isinstance(whole, list) and (named_json or all(isinstance(record, dict) for record in whole)):
        yield from ((f"{path}, item {number}", record) for number, record in enumerate(whole, start=1))
    elif isinstance(whole, dict):
        yield str(path), whole
    elif named_json or is_lines:
        yield from json_lines(path, text)
    else:
        yield str(path), Row(text, [(0, len(text))])


def _json(text: str) -> Any:
    """What a text says in JSON; the error, if it does not."""
    try:
        return json.loads(text)
    except RecursionError:
        return ValueError("it is nested too deep")
    except ValueError as error:
        return error


def _row(record: Any, chat: ChatTemplate | None) -> Row:
    """A record of a file as a text and what of it is learnt. Raises InputError."""
    if not isinstance(record, dict):
        raise InputError(FORMS)
    record = {key: value for key, value in record.items() if value is not None}  # columns that other rows fill
    if "conversations" in record:
        record = {**record, "messages": [_of_sharegpt(message) for message in _list(record, "conversations")]}
        del record["conversations"]
    forms = [form for form in (("text",), ("messages",), ("prompt", "completion")) if record.keys() & set(form)]
    if len(forms) > 1:
        names = " and ".join(repr(name) for form in forms for name in form if name in record)
        raise InputError(f"has {names}: which of them is the text? Drop the others")
    if not forms or not set(forms[0]) <= record.keys():
        raise InputError(FORMS)
    strange = MEANINGFUL & record.keys()
    extra = {key: record[key] for key in ("tools", "documents", "chat_template_kwargs") if key in record}
    if strange or (extra and forms[0] == ("text",)):
        raise InputError(
            f"the field {min(strange or extra)!r} would change what is learnt, and is not understood: drop it, or "
            "write what is meant as 'text', 'prompt' and 'completion', or 'messages'"
        )
    if forms[0] == ("text",):
        text = _text(record, "text")
        return Row(text, [(0, len(text))], ends=True)
    if forms[0] == ("messages",):
        return _conversation([], _list(record, "messages"), extra, chat)
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        return _conversation(_list(record, "prompt"), _list(record, "completion"), extra, chat)
    prompt, completion = _text(record, "prompt"), _text(record, "completion")
    if chat is not None:
        said = [{"role": "assistant", "content": completion}]
        return _conversation([{"role": "user", "content": prompt}], said, extra, chat)
    if extra:
        raise InputError(f"the field {min(extra)!r} needs a chat template that writes it, and there is none")
    return Row(prompt + completion, [(len(prompt), len(prompt + completion))] if completion else [], ends=True)


def _text(record: dict[str, Any], field: str) -> str:
    """The string of a field. Raises InputError."""
    text = record[field]
    if not isinstance(text, str):
        raise InputError(f"{field!r} is {json.dumps(text)[:40]}, but {FORMS}")
    check_text(repr(field), text)
    return text


def _list(record: dict[str, Any], field: str) -> list[dict[str, Any]]:
    messages = record[field]
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise InputError(f"{field!r} must be a list of messages, each an object with 'role' and 'content'")
    return messages


def _of_sharegpt(message: dict[str, Any]) -> Message:
    """A message of ShareGPT's form, {"from": "gpt", "value": ...}, or one that has the usual form already."""
    if "from" not in message:
        return message
    if message["from"] not in SHAREGPT:
        raise InputError(f"'from' is {message['from']!r}, but must be one of {', '.join(SHAREGPT)}")
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {"role": SHAREGPT[message["from"]], "content": message.get("value"), **rest}


def _conversation(
    before: Sequence[Message], messages: Sequence[Message], extra: dict[str, Any], chat: ChatTemplate | None
) -> Row:
    """A conversation of which the assistant's turns in `messages` are learnt. Raises InputError."""
    if chat is None:
        raise InputError(
            "'messages' need a chat template, and the model's directory has none (or it is not to be used)"
        )
    clean, learnt = [], []
    source = chat.source(extra.get("tools"))
    for i, message in enumerate([*before, *messages], start=1):
        message = {key: value for key, value in message.items() if value is not None}
        role = message.get("role")
        if not isinstance(role, str):
            raise InputError(f"message {i} has no 'role'")
        message = {**message, **_content(message, i)}
        weight, train = message.pop("weight", 1), message.pop("train", True)
        if weight not in (0, 1) or train not in (False, True):
            raise InputError(
                f"message {i} ({role}) has weight {weight!r} and train {train!r}; only 0 and 1 are understood"
            )
        if strange := unknown_fields(message, source):
            raise InputError(
                f"message {i} ({role}) has the field {strange[0]!r}, which the model's chat template does not write: "
                "drop it, or take a template that does"
            )
        clean.append(message)
        learnt.append(role == "assistant" and i > len(before) and bool(weight and train))
    if strange := unknown_fields({"tools", "documents"} & extra.keys(), source):
        raise InputError(
            f"the model's chat template does not write {strange[0]!r}: drop the field, or take one that does"
        )
    if not any(learnt):
        raise InputError("none of the messages has the role 'assistant', or none is to be learnt: nothing is")
    fields = {**extra.pop("chat_template_kwargs", {}), **extra}
    text, spans = chat.spans(clean, learnt, **fields)
    return Row(text, spans, template=True)


def _content(message: Message, number: int) -> Message:
    """The content of a message as one string; a message that calls a tool may have none. Raises InputError."""
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return {}
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        texts = [part.get("text") for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else content
    if not isinstance(content, str):
        raise InputError(
            f"message {number} ({message['role']}) has the content {json.dumps(content)[:40]}, but that must be a "
            "string, or a list of {'type': 'text', 'text': ...}"
        )
    return {"content": _text({"content": content}, "content")}


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
