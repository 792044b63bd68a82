"""Rows of text to documents of tokens: reading files, what of them is learnt, cutting to length, batching.

A row is one text, which is encoded as a whole, as the model will meet it, and the spans of it that are learnt.
"""

import json
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..batch import IGNORE, shift
from ..errors import InputError
from .atomic import json_lines, read_json
from .chat import ChatTemplate, Message, Span, shared, unknown_fields
from .checkpoint import checkpoint_directory

ASSETS = Path(__file__).parents[1] / "assets"
SHIPPED_MODEL = ASSETS / "austen-llama"
SHIPPED_STATE = ASSETS / "austen-state"  # a StateSpace, whose tokens are bytes
TRAINED_ON = ("emma", "mansfieldpark", "prideprejudice", "sensesensibility")  # the shipped models
EXTENDED_ON, MEASURED_ON = "persuasion", "northangerabbey"  # the main job

FORMS = "must be an object with the string 'text', with 'prompt' and 'completion', or with 'messages'"
# Fields of other programs' rows that say what is learnt, or what is seen before it. They are refused, not dropped.
MEANINGFUL = {
    "assistant_masks", "attention_mask", "audio", "chat_template", "chosen", "completion_mask", "context",
    "conversations", "enable_thinking", "functions", "history", "image", "images", "input", "input_ids", "instruction",
    "label", "labels", "loss", "loss_mask", "mask", "output", "reasoning", "reasoning_content", "rejected", "response",
    "suffix", "system", "system_prompt", "thinking", "tool_calls", "train", "video", "videos", "weight", "weights",
}  # fmt: skip
SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
BINARY = (b"PAR1", b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd")  # Parquet, gzip, zip, zstd


class Row(NamedTuple):
    """A text and the spans of it that are learnt. ends: an end token is to follow; template: a chat template wrote it,
    with its own special tokens."""

    text: str
    learnt: list[Span]
    ends: bool = False
    template: bool = False


@dataclass(frozen=True)
class Document:
    """input_ids and labels, int64 (T,); `name` says where they come from, for messages. starts: see `seco`."""

    name: str
    input_ids: Tensor
    labels: Tensor
    starts: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    def num_targets(self) -> int:
        return int((shift(self.labels[None]) != IGNORE).sum())


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, which has the same tokens before both; KTO's second one is another prompt's."""

    name: str
    rows: tuple[Document, Document]
    desirable: bool = True  # the label of KTO's

    def __len__(self) -> int:
        return sum(map(len, self.rows))

    def num_targets(self) -> int:
        return sum(row.num_targets() for row in self.rows)


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Read `tokenizer.json` from a checkpoint directory. Raises InputError."""
    path = checkpoint_directory(directory) / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path} is missing: a checkpoint directory needs the tokenizer of its model")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{path} is not a tokenizer.json that the tokenizers library reads: {error}") from None
    told = read_json(config) if (config := path.with_name("tokenizer_config.json")).is_file() else {}
    for field in ("bos_token", "eos_token"):
        token = told.get(field)
        text = str((token.get("content") if isinstance(token, dict) else token) or "")
        if text and len(tokenizer.encode(text, add_special_tokens=False)) != 1:
            raise InputError(f"{config}: {field} is {text!r}, which is no token of {path.name}: save both anew")
    tokenizer.no_truncation()  # the file may ask for either, from how its model was trained
    tokenizer.no_padding()
    return tokenizer


def novel(name: str) -> Path:
    return ASSETS / "austen" / f"{name}.txt"


def read_documents(
    paths: Sequence[str | Path], tokenizer: Tokenizer, eos_token_id: int | None = None, chat: ChatTemplate | None = None
) -> list[Document]:
    """Read files of text (one document each) and of JSON, lines or an array (one document a row), told by content.

    A row is an object with `text`; with `prompt` and `completion`, of which the completion is learnt; or with
    `messages`, of which the assistant's are learnt (but those with `weight: 0` or `train: false`).
    chat: the model's template, for messages, and for prompt and completion as user and assistant.
    Rows without a template end with `eos_token_id`, if there is one; a file of text does not.
    The tokenizer's own special tokens (a BOS) come first, but not where a template writes them itself.

    Raises InputError, naming file and line, for anything else, for a field that is not understood and would change
    what is learnt, and for a document of fewer than two tokens.
    """
    return [_document(*each, tokenizer, eos_token_id, chat) for path in paths for each in _records(Path(path))]


def _document(name: str, record: Any, tokenizer: Tokenizer, eos_token_id: int | None, chat: Any) -> Document:
    try:
        row = record if isinstance(record, Row) else _row(record, chat)
        check_text("the text", row.text)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    ids, labels = encode(row, tokenizer, eos_token_id)
    if len(ids) < 2:
        raise InputError(f"{name}: a document of {len(ids)} tokens, but a next-token loss needs at least 2")
    return Document(name, torch.tensor(ids), torch.tensor(labels))


def read_pairs(
    paths: Sequence[str | Path], tokenizer: Tokenizer, eos_token_id: int | None = None,
    chat: ChatTemplate | None = None, *, with_labels: bool = False, seq_len: int,
) -> tuple[list[Pair], str]:  # fmt: skip
    """Read rows of JSON with `prompt`, `chosen` and `rejected`, or with the last two alone, which begin with the prompt
    then; or, with labels, with `prompt`, `completion` and `label`, paired with the completion of the row before.

    Prompt and answer are what prompt and completion are to `read_documents`, but a prompt that is found within texts
    gets no template. The answers begin at the first token that is one's own, or in which they differ.
    Returns the pairs of rows of at most `seq_len` tokens, as none is cut, and a line that names the others.
    Raises InputError, naming file, line and field, and if there are none.
    """
    rows = [(each[0], *_compared(*each, chat, with_labels)) for path in paths for each in _records(Path(path))]
    if with_labels and len(rows) == 1:
        raise InputError(f"{rows[0][0]} is the only row, but each needs another one's completion beside its own")
    fields = ("completion", "completion of the row before") if with_labels else ("chosen", "rejected")
    pairs = []
    for i, (name, template, label, rest, answers) in enumerate(rows):
        both = []
        for field, answer in zip(fields, (*answers, *rows[i - 1][-1]), strict=False):
            told = f"{name}: {field!r}", {**rest, "completion": answer}
            both.append(_document(*told, tokenizer, eos_token_id, template))
            if not both[-1].num_targets():
                raise InputError(f"{told[0]} has no token that can be predicted")
        begins = [int((row.labels != IGNORE).nonzero()[0]) for row in both]
        start = min(shared(*(row.input_ids.tolist() for row in both)), *begins)
        for row, begin in zip(both, begins, strict=True):
            row.labels[start:begin] = row.input_ids[start:begin]
        pairs.append(Pair(name, (both[0], both[1]), label))
    kept = [pair for pair in pairs if max(map(len, pair.rows)) <= seq_len]
    longer = ", ".join(pair.name for pair in pairs if max(map(len, pair.rows)) > seq_len)
    line = f"{len(kept):,} pairs of {sum(map(len, kept)):,} tokens"
    if longer:
        line += f"; {len(pairs) - len(kept):,} with a row of more than {seq_len:,} left out: {longer[:400]}"
    if not kept:
        raise InputError(f"--seq-len is {seq_len}, but pairs are not cut: {line}")
    return kept, line


def encode(row: Row, tokenizer: Tokenizer, eos_token_id: int | None) -> tuple[list[int], list[int]]:
    """Token ids and labels of a row, encoded as a whole; a token that has a character of a learnt span is learnt."""
    found = tokenizer.encode(row.text, add_special_tokens=not row.template)
    ids, labels, spans = list(found.ids), [IGNORE] * len(found.ids), iter(row.learnt)
    span = next(spans, None)
    for i, (start, stop) in enumerate(found.offsets):
        if start == stop and i:  # of a blank, which some tokenizers trim: it is behind the token before
            start = found.offsets[i - 1][1]
        while span is not None and span[1] <= start:
            span = next(spans, None)
        if span is not None and max(stop, start + 1) > span[0]:
            labels[i] = ids[i]
    last = len(ids) if row.template else end_of_text(found)
    first = int(found.special_tokens_mask[:1] == [1] and ids[:1] == ids[1:2])  # the text has its BOS already
    end = ids[last:] or ([eos_token_id] if row.ends and eos_token_id is not None else [])
    end = [] if end == ids[last - 1 : last] else end  # and its end token
    is_learnt = bool(row.learnt) and row.learnt[-1][1] == len(row.text)  # with the words before it
    return ids[first:last] + end, labels[first:last] + (end if is_learnt else [IGNORE] * len(end))


def end_of_text(found: Encoding) -> int:
    """How many tokens there are without those that the tokenizer puts at the end of every text."""
    own = [i for i, is_special in enumerate(found.special_tokens_mask, start=1) if not is_special]
    return own[-1] if own else len(found.ids)


def check_text(name: str, text: str) -> None:
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
    if content.startswith(BINARY):
        raise InputError(f"{path} is a Parquet or a compressed file: write its rows as JSON lines first")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from None
    if not text.strip():
        raise InputError(f"{path} is empty")
    is_named_json = path.suffix.lower() in (".json", ".jsonl", ".ndjson")
    whole, first = _json(text), _json(text.strip().split("\n", 1)[0])
    if isinstance(whole, list) and (is_named_json or all(isinstance(record, dict) for record in whole)):
        yield from ((f"{path}, item {number}", record) for number, record in enumerate(whole, start=1))
    elif isinstance(whole, dict):
        yield f"{path}, line {text[: text.index('{')].count(chr(10)) + 1}", whole
    elif is_named_json or isinstance(first, dict):
        yield from json_lines(path, text)
    else:
        yield str(path), Row(text, [(0, len(text))])


def _compared(name: str, record: Any, chat: ChatTemplate | None, with_labels: bool) -> tuple[Any, ...]:
    """Of a record for `read_pairs`: its template, its label, what else it has, and its answers. Raises InputError."""
    needed = ("prompt", "completion", "label") if with_labels else ("prompt", "chosen", "rejected")
    rest: Any = {key: value for key, value in record.items() if value is not None} if isinstance(record, dict) else {}
    first, last = map(rest.get, needed[1:])
    if "prompt" not in rest and any(isinstance(first, form) and isinstance(last, form) for form in (str, list)):
        size, chat = shared(first, last), chat if isinstance(first, list) else None
        rest |= {"prompt": first[:size], needed[1]: first[size:], needed[2]: last[size:]}
    if not rest.keys() >= {*needed} or (with_labels and not isinstance(last, bool)):
        label = ", which is true or false" if with_labels else "; the last two alone may both begin with the prompt"
        raise InputError(f"{name}: must be an object with {needed[0]!r}, {needed[1]!r} and {needed[2]!r}{label}")
    first, last = (rest.pop(field) for field in needed[1:])
    if "completion" in rest or first == last:
        wrong = "has a 'completion' too" if "completion" in rest else "'chosen' and 'rejected' are the same"
        raise InputError(f"{name}: {wrong}")
    return (chat, last, rest, [first]) if with_labels else (chat, True, rest, [first, last])


def _json(text: str) -> Any:
    with suppress(ValueError, RecursionError):
        return json.loads(text)


def _row(record: Any, chat: ChatTemplate | None) -> Row:
    if not isinstance(record, dict):
        raise InputError(FORMS)
    record = {key: value for key, value in record.items() if value is not None}  # columns that other rows fill
    if "conversations" in record and "messages" not in record:
        record["messages"] = record.pop("conversations")
    forms = [form for form in (("text",), ("messages",), ("prompt", "completion")) if record.keys() & set(form)]
    if len(forms) > 1:
        names = " and ".join(repr(name) for form in forms for name in form if name in record)
        raise InputError(f"has {names}: which of them is the text? Drop the others")
    if not forms or not set(forms[0]) <= record.keys():
        raise InputError(FORMS)
    texts = [record[field] for field in forms[0]]
    extra = {key: record[key] for key in ("tools", "documents", "chat_template_kwargs") if key in record}
    is_plain = forms[0] == ("text",) or (chat is None and all(isinstance(text, str) for text in texts))
    if strange := (MEANINGFUL & record.keys()) or (extra if is_plain else {}):
        raise InputError(f"the field {min(strange)!r} would change what is learnt, and is not understood here: drop it")
    if is_plain:
        for field, text in zip(forms[0], texts, strict=True):
            if not isinstance(text, str):
                raise InputError(f"{field!r} is {json.dumps(text)[:40]}, but {FORMS}")
        *before, learnt = texts
        start = sum(map(len, before))
        return Row("".join(before) + learnt, [(start, start + len(learnt))] if learnt else [], ends=True)
    if len(texts) == 2 and all(isinstance(text, str) for text in texts):
        texts = [[{"role": role, "content": text}] for role, text in zip(("user", "assistant"), texts, strict=True)]
    for field, messages in zip(forms[0], texts, strict=True):
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise InputError(f"{field!r} must be a list of messages, each an object with 'role' and 'content'")
    return _conversation([message for messages in texts for message in messages], len(texts[-1]), extra, chat)


def _conversation(messages: Sequence[Message], count: int, extra: dict[str, Any], chat: ChatTemplate | None) -> Row:
    """A conversation of which the assistant's turns in the last `count` messages are learnt. Raises InputError."""
    if chat is None:
        raise InputError("'messages' need a chat template, and the model has none (or it is not to be used)")
    clean, learnt = [], []
    source = chat.source(extra.get("tools"))
    for i, message in enumerate(map(_message, messages), start=1):
        asked = message.get("role") != "assistant" and (message.get("weight") or message.get("train"))
        weight, train = message.pop("weight", 1), message.pop("train", True)
        if not isinstance(message.get("role"), str):
            raise InputError(f"message {i} has no 'role'")
        name = f"message {i} ({message['role']})"
        if not isinstance(message.get("content", "" if message.get("tool_calls") else None), str):
            content = json.dumps(message.get("content"))[:40]
            raise InputError(f"{name} has the content {content}, but must have a string, or a list of texts")
        if weight not in (0, 1) or train not in (False, True) or asked:
            raise InputError(f"{name} has weight {weight!r} and train {train!r}: 0 or 1, 1 only of the assistant's")
        if strange := unknown_fields(message, source):
            raise InputError(f"{name} has the field {strange[0]!r}, which the model's chat template does not write")
        clean.append(message)
        learnt.append(message["role"] == "assistant" and i > len(messages) - count and bool(weight and train))
    if not isinstance(given := extra.pop("chat_template_kwargs", {}), dict):
        raise InputError("'chat_template_kwargs' must be an object")
    fields = {**given, **extra}
    if strange := sorted({"messages", "add_generation_prompt"} & fields.keys()) or unknown_fields(fields, source):
        raise InputError(f"the model's chat template does not write {strange[0]!r}: drop it, or take one that does")
    if not any(learnt):
        raise InputError("none of the messages has the role 'assistant', or none is to be learnt: nothing is")
    text, spans = chat.spans(clean, learnt, **fields)
    calls = [call for message in clean for call in message.get("tool_calls", ()) if isinstance(call, dict)]
    said = [call["arguments"] for call in (call.get("function", call) for call in calls) if "arguments" in call]
    if any(isinstance(words, str) and json.dumps(words, ensure_ascii=False) in text for words in said):
        raise InputError("a call's 'arguments' are a string, whose quotes the chat template escapes: write an object")
    return Row(text, spans, template=True)


def _message(message: Message) -> Message:
    """A message without empty fields, with its text in one piece, and in the usual form if it is in ShareGPT's."""
    message = {key: value for key, value in message.items() if value not in (None, [])}
    if "from" in message:
        if (role := str(message.pop("from"))) not in SHAREGPT or {"role", "content"} & message.keys():
            raise InputError(f"'from' is {role!r}, but must be one of {', '.join(SHAREGPT)}, beside 'value' alone")
        message = {"role": SHAREGPT[role], "content": message.pop("value", None), **message}
    parts = message.get("content")
    if isinstance(parts, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
    ):
        message["content"] = "".join(part["text"] for part in parts)
    return message


def cut_documents(documents: Sequence[Document], seq_len: int) -> tuple[list[Document], str]:
    """Cut documents into pieces of at most `seq_len` tokens; returns them and a line on what was kept.

    A piece in which nothing is to be predicted (a rest of one token, a prompt alone) is left out,
    and the line says so. Raises InputError if that leaves none.
    """
    pieces = []
    for document in documents:
        for start in range(0, len(document), seq_len):
            stop = min(start + seq_len, len(document))
            name = document.name if len(document) <= seq_len else f"{document.name}, tokens {start} to {stop}"
            piece = Document(name, document.input_ids[start:stop], document.labels[start:stop])
            pieces += [piece] if piece.num_targets() else []
    total = sum(map(len, documents))
    lost = total - sum(map(len, pieces))
    line = f"{len(documents):,} documents of {total:,} tokens, cut into {len(pieces):,} pieces of at most {seq_len:,}; "
    line += f"{lost:,} tokens without a target left out" if lost else "all tokens kept"
    if not pieces:
        raise InputError(f"the data has nothing to predict: {line}")
    return pieces, line


def pack_documents(documents: Sequence[Document], seq_len: int, apart: bool) -> tuple[list[Document], str]:
    """Rows of at most `seq_len` tokens, each of several documents, and a line on them. apart: see `seco`, starts;
    else a row is one text. The longest documents come first, each into the fullest row that has room for it."""
    rows, rooms = list[list[Document]](), list[tuple[int, int]]()  # by room: how much there is, and of which row
    for document in sorted(documents, key=len, reverse=True):
        i = bisect_left(rooms, (len(document), 0))
        if i == len(rooms):
            rooms.append((seq_len, len(rows)))
            rows.append([])
        room, number = rooms.pop(i)
        rows[number].append(document)
        insort(rooms, (room - len(document), number))
    packed = []
    for row in rows:
        starts = tuple(accumulate(map(len, row[:-1]), initial=0))
        labels = torch.cat([document.labels for document in row])
        if apart:
            labels[list(starts)] = IGNORE
        name = row[0].name + (f" and {len(row) - 1} more" if len(row) > 1 else "")
        ids = torch.cat([document.input_ids for document in row])
        packed.append(Document(name, ids, labels, starts if apart else ()))
    full = sum(map(len, packed)) / (len(packed) * seq_len)
    return packed, f"packed into {len(packed):,} rows of at most {seq_len:,} tokens, {full:.0%} full"


def check_vocabulary(documents: Sequence[Document], vocab_size: int) -> None:
    """Raise InputError, naming the document, if a token id does not fit the model."""
    for document in documents:
        if (highest := int(document.input_ids.max())) >= vocab_size:
            raise InputError(f"{document.name} has the token id {highest}: is this the tokenizer of this model?")


def collate(documents: Sequence[Any], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Right-pad documents, or pairs' first answers and then their second ones, into input_ids and labels, int64 (B, T);
    labels are -100 on the padding."""
    if isinstance(documents[0], Pair):
        documents = [pair.rows[i] for i in (0, 1) for pair in documents]
    input_ids = pad_sequence([document.input_ids for document in documents], batch_first=True)
    labels = pad_sequence([document.labels for document in documents], batch_first=True, padding_value=IGNORE)
    return input_ids.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def step_documents(documents: Sequence[Any], per_step: int, step: int, seed: int) -> list[Any]:
    """The documents of one step: a new shuffle every epoch, and nothing to remember for a resume."""
    order, first, n = list[int](), step * per_step, len(documents)
    for epoch in range(first // n, (first + per_step - 1) // n + 1):
        order += torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
    return [documents[i] for i in order[first % n :][:per_step]]
