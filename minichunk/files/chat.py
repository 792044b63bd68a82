"""Conversations as text, rendered by transformers, and where in the text the assistant speaks.

Some templates say themselves, by their `{% generation %}` tag, what is the assistant's. For the others, marks are put
around what each message says: one rendering shows where every message went, and a few of the beginning show what the
template itself writes between messages.
"""

import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import InputError
from .atomic import read_json

Message = dict[str, Any]
Span = tuple[int, int]  # characters of a text, half open

_MARKS = re.compile("[\U000f0000-\U000ffffd]")  # private characters, which no text has: two for each message
# A template's clock stands still, so that the same data is the same tokens on every day.
_SAID = {f"%{x}": datetime(2024, 7, 26, 12).strftime(f"%{x}") for x in "aAbBcdfHIjmMpSuwxXyY"} | {"%-d": "26"}
_REPLACED = "".join(f".replace('{code}', '{said}')" for code, said in _SAID.items())
_CLOCK = f"{{% macro strftime_now(format) %}}{{{{ format{_REPLACED} }}}}{{% endmacro +%}}"
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # one field under three names, as transformers has it


class ChatTemplate:
    """A checkpoint's chat template; transformers reads it, from wherever it is kept, when it is first needed."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._tokenizer: Any = None

    def _load(self) -> Any:
        if self._tokenizer is None:
            try:
                from transformers import AutoTokenizer
            except ImportError:
                how = "pip install 'minichunk[hf]', or take --no-chat-template"
                raise InputError(f"conversations are rendered by the transformers library: {how}") from None
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self.directory, local_files_only=True)
            except Exception as error:  # whatever a damaged file leads to
                raise InputError(f"{self.directory}: transformers cannot read the tokenizer: {error}") from None
        return self._tokenizer

    def source(self, tools: Sequence[Any] | None = None) -> str:
        """The template that transformers takes for rows with, or without, tools. Raises InputError."""
        tokenizer = self._load()
        try:
            source: str = tokenizer.get_chat_template(None, tools)
        except ValueError as error:
            raise InputError(f"{self.directory}: the chat template cannot be told: {first_line(error)}") from None
        return _CLOCK + source if "strftime_now" in source else source

    def render(self, messages: Sequence[Message], **fields: Any) -> str:
        """The conversation as text. fields: tools, documents, add_generation_prompt, and the template's own."""
        return self._render(messages, **fields)[0]

    def _render(self, messages: Sequence[Message], **fields: Any) -> tuple[str, list[Span] | None]:
        """And what the template says is the assistant's; None if it says nothing about that."""
        from transformers.utils.chat_template_utils import render_jinja_template

        source = self.source(fields.get("tools"))
        tagged = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        told: Any = {"chat_template": source, "return_assistant_tokens_mask": tagged}
        try:
            found: Any = render_jinja_template([list(messages)], **told, **self._load().special_tokens_map | fields)
        except Exception as error:  # the template is a program, which may fail like any other
            why = f"the chat template refuses these messages: {first_line(error)}"
            raise InputError(f"{self.directory}: {why}") from None
        return found[0][0], found[1][0] if tagged else None

    def spans(self, messages: Sequence[Message], learnt: Sequence[bool], **fields: Any) -> tuple[str, list[Span]]:
        """The conversation as text, up to the assistant's last turn, and the spans of the turns that are learnt.

        A turn goes from where the template lets the assistant begin to write up to the token that ends the turn, or as
        the template's own tag says. learnt: for each message; only the assistant's can be.
        Raises InputError if nobody can say which characters are the assistant's. The time is linear in the turns.
        """
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        messages = messages[: turns[-1] + 1]
        text, tagged = self._render(messages, **fields)
        found = _Turns(self, messages, text, fields)
        if tagged is None:
            spans = [found.span(i) for i in turns]
        elif len(tagged) == len(turns):
            spans = tagged
        elif all(learnt[i] for i in turns):
            return text, tagged
        else:
            written = f"the chat template writes {len(tagged)} assistant's turns for {len(turns)} messages"
            raise InputError(f"{self.directory}: {written}, so those that are not to be learnt cannot be told apart")
        return text, [span for i, span in zip(turns, spans, strict=True) if learnt[i]]


class _Turns:
    """Where each of the assistant's turns stands in a rendered conversation: between what the template writes after
    the message before it, up to where the assistant begins, and what begins the message after it. Both are found once
    for each kind of neighbour, by rendering the conversation up to there, and anew where they are not there.
    """

    def __init__(self, chat: ChatTemplate, messages: Sequence[Message], text: str, fields: dict[str, Any]) -> None:
        self.chat, self.messages, self.text, self.fields = chat, messages, text, fields
        self.known: dict[Any, list[str]] = {}  # what the template writes, by the kind of neighbour
        self.marked = [_marked(message, i) for i, message in enumerate(messages)]
        plain, places = self._places(self.marked)
        self.places = places if plain == text else {}
        self.done = 0
        lost = [i for i, message in enumerate(self.marked) if message is not messages[i] and _end(i) not in places]
        if self.places and lost:
            said = f"message {lost[0] + 1} ({messages[lost[0]]['role']}) says, and it would be lost: change either"
            raise InputError(f"{chat.directory}: the chat template does not write what {said}")

    def _places(self, messages: Sequence[Message], **fields: Any) -> tuple[str, dict[str, int]]:
        """A rendering without its marks, and where each mark stood; none if one stood twice."""
        text = self.chat.render(messages, **self.fields, **fields)
        marks = list(_MARKS.finditer(text))
        places = {mark.group(): mark.start() - i for i, mark in enumerate(marks)}
        return _MARKS.sub("", text), places if len(places) == len(marks) else {}

    def span(self, i: int) -> Span:
        """The characters of the assistant's message i."""
        start = self._start(i)
        stop = len(self.text) if i == len(self.messages) - 1 else self._stop(i)
        if start is None or stop is None or not self.done <= start <= stop:
            said = f"the chat template changes what was said around message {i + 1} (assistant)"
            raise InputError(f"{self.chat.directory}: {said}, so its tokens cannot be told apart: write the text out")
        self.done = stop
        return start, stop

    def _beginning(self, count: int, **fields: Any) -> int | None:
        """Where the first messages end, if they are rendered alone as they are here."""
        text = self.chat.render(self.messages[:count], **self.fields, **fields)
        return len(text) if self.text.startswith(text) else None

    def _start(self, i: int) -> int | None:
        if i == 0:  # templates want a message before: the turn begins with its words
            said = "" if set(_THOUGHTS) & self.messages[0].keys() else str(self.messages[0].get("content")).strip()
            end = self.places.get(_end(0), 0)
            return end - len(said) if said and self.text[:end].endswith(said) else None
        before = self.places.get(_end(i - 1))
        if before is None:
            return self._beginning(i, add_generation_prompt=True)
        known = self.known.setdefault(self.messages[i - 1]["role"], [])
        opening = next((text for text in known if self.text.startswith(text, before)), None)
        if opening is None:
            text, places = self._places(self.marked[:i], add_generation_prompt=True)
            prompt = text[places.get(_end(i - 1), 0) :]
            # Templates may prompt with more than they write before what was said, as an open <think>.
            text, places = self._places([*self.marked[:i], _marked({"role": "assistant", "content": "words"}, i)])
            begun = text[places.get(_end(i - 1), 0) : places.get(_end(i), 0) - len("words")]
            opening = prompt[: shared(prompt, begun)]
            if not self.text.startswith(opening, before):
                return None
            known += [opening] if opening or not prompt else []
        return before + len(opening)

    def _stop(self, i: int) -> int | None:
        after = self.places.get(_begin(i + 1))
        if after is None:  # the next message is the assistant's too, or the template changes it
            return self._beginning(i + 1)
        known = self.known.setdefault((bool(self.messages[i].get("tool_calls")), self.messages[i + 1]["role"]), [])
        heading = next((text for text in known if self.text.endswith(text, 0, after)), None)
        if heading is None:
            probe = [*self.marked[:i], _marked({**self.messages[i], "content": "words"}, i)]
            ended, ends = self._places(probe)
            going_on, places = self._places([*probe, self.marked[i + 1]])
            # After the words; or from the beginning, for a template that writes a call without them.
            ended, going_on = ended[ends.get(_end(i), 0) :], going_on[: places.get(_begin(i + 1), 0)]
            going_on = going_on[places.get(_end(i), 0) :]
            heading = going_on[shared(ended, going_on) :]
            if not heading or not self.text.endswith(heading, 0, after):
                return None
            known.append(heading)
        return after - len(heading)


def _begin(i: int) -> str:
    return chr(0xF0000 + 2 * i)


def _end(i: int) -> str:
    return chr(0xF0001 + 2 * i)


def _marked(message: Message, i: int) -> Message:
    """A message with marks around its words, but none before the assistant's, where templates look for <think>."""
    content = message.get("content")
    if not isinstance(content, str) or not content.strip() or i >= 0x7000:
        return message
    said = content.strip()  # within the spaces, which templates strip
    begin = "" if message["role"] == "assistant" else _begin(i)
    return {**message, "content": content.replace(said, f"{begin}{said}{_end(i)}", 1)}


def shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many characters two texts share at their beginnings; or items, two lists."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def first_line(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__


def unknown_fields(fields: Iterable[str], source: str) -> list[str]:
    """Those of a message's or a row's fields that a template does not name: what they say would be lost."""
    words = set(re.findall(r"\w+", source))
    words |= {"role", "content", "name", "tool_call_id"} | (set(_THOUGHTS) if words & set(_THOUGHTS) else set())
    return sorted(set(fields) - words)


def load_chat_template(directory: str | Path) -> ChatTemplate | None:
    """The template of a checkpoint directory; None if there is none. Raises InputError."""
    path = Path(directory, "tokenizer_config.json")
    files = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
    there = any(path.with_name(name).exists() for name in files)
    there = there or (path.is_file() and read_json(path).get("chat_template") is not None)
    return ChatTemplate(directory) if there else None
