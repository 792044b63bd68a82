"""Conversations as text: the chat template that a checkpoint brings along."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment  # the template is a program out of a downloaded file

from ..errors import InputError
from .atomic import read_json

Message = dict[str, str]
Segment = tuple[str, bool]  # a text, and whether it is to be learnt
_MARK = "\ue000 the assistant's words \ue000"  # of a private character, which no text has


class ChatTemplate:
    """Renders messages as the model was trained to see them. name: the file it came from, for messages."""

    def __init__(self, source: str, special_tokens: dict[str, str], name: str) -> None:
        self.name, self.special_tokens = name, special_tokens
        # As transformers sets it up, but without strftime_now: the same data is the same tokens on every day.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = self._refuse
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        try:
            self.template = environment.from_string(source)
        except TemplateError as error:
            raise InputError(f"{name}: the chat template is not valid Jinja: {error}") from None

    def _refuse(self, message: str) -> None:
        raise InputError(f"{self.name}: the chat template refuses these messages: {message}")

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as text; add_generation_prompt: up to where the assistant begins to write."""
        try:
            return self.template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self.special_tokens
            )
        except InputError:
            raise
        except Exception as error:  # the template is a program, which may fail like any other
            raise InputError(f"{self.name}: the chat template fails on these messages: {error}") from None

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        """The conversation up to the assistant's last turn, in segments; what the assistant wrote is to be learnt.

        Its turns go from where the template lets it begin to write up to the end of the turn, the token
        that says so included. Their texts, put together, are `render(messages)`.
        Raises InputError if nobody can say which tokens are the assistant's.
        """
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        messages = messages[: turns[-1] + 1] if turns else messages
        text = self.render(messages)
        segments: list[Segment] = []
        done = 0
        for i in turns:
            start, stop = self._span(messages, i, text, done)
            segments += [(text[done:start], False), (text[start:stop], True)]
            done = stop
        return [*segments, (text[done:], False)]

    def _span(self, messages: Sequence[Message], i: int, text: str, done: int) -> tuple[int, int]:
        """Where in `text` the assistant's message i begins and ends; earlier turns end at `done`.

        Found by what a mark in its place leaves as it was, never by its words: those may occur
        elsewhere, and templates strip them, cut them at </think>, or write <think> in the last turn only.
        """
        mark: Message = {"role": "assistant", "content": _MARK}
        before, found, after = self.render([*messages[:i], mark, *messages[i + 1 :]]).partition(_MARK)
        said = self.render(messages[:i]) if i else ""  # templates may want a first message
        prompt = self.render(messages[:i], add_generation_prompt=True) if i else before
        start, content_stop = _length_shared(before, prompt), len(text) - len(after)
        same = text.startswith(said) and text.startswith(before[:start]) and text.endswith(after)
        if not found or _MARK in after or not same or not max(done, len(said)) <= start <= content_stop:
            raise InputError(
                f"{self.name}: the chat template changes what was said around message {i + 1} ({messages[i]['role']}), "
                "so its tokens cannot be told apart; write the texts out as 'text', or as 'prompt' and 'completion' "
                "with --no-chat-template"
            )
        end_of_turn = self.render([*messages[:i], mark]).rpartition(_MARK)[2]
        return start, content_stop + _length_shared(after, end_of_turn)


def _length_shared(text: str, beginning: str) -> int:
    """With how many characters of `beginning` the text begins."""
    return next(n for n in range(len(beginning), -1, -1) if text.startswith(beginning[:n]))


def load_chat_template(directory: str | Path) -> ChatTemplate | None:
    """The template of a checkpoint directory, as Hugging Face stores it; None if there is none. Raises InputError."""
    directory = Path(directory)
    path = directory / "tokenizer_config.json"
    config: dict[str, Any] = read_json(path) if path.is_file() else {}
    source = config.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = next((t.get("template") for t in source if isinstance(t, dict) and t.get("name") == "default"), None)
    if (directory / "chat_template.jinja").is_file():
        path = directory / "chat_template.jinja"
        source = path.read_text(encoding="utf-8")
    if source is None:
        return None
    if not isinstance(source, str):
        raise InputError(f"{path}: chat_template must be a string, or a list of which one is named 'default'")
    special = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        special[name] = token if isinstance(token, str) else ""
    return ChatTemplate(source, special, str(path))
