"""Conversations as text: the chat template that a checkpoint brings along."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment  # the template is a program out of a downloaded file

from .errors import InputError
from .files import read_json

Message = dict[str, str]
Part = tuple[str, bool]  # a text, and whether it is to be learnt


class ChatTemplate:
    """Renders messages as the model was trained to see them. name: the file it came from, for messages."""

    def __init__(self, source: str, special_tokens: dict[str, str], name: str) -> None:
        self.name, self.special_tokens = name, special_tokens
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = self._refuse
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
        except TemplateError as error:
            raise InputError(f"{self.name}: the chat template fails on these messages: {error}") from None

    def parts(self, messages: Sequence[Message]) -> list[Part]:
        """The conversation in parts, of which those that the assistant wrote are to be learnt.

        Raises InputError if the template changes earlier text when messages are added: then nobody
        can say which tokens are the assistant's.
        """
        parts: list[Part] = []
        done = ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self.render(messages[:i], add_generation_prompt=True), self.render(messages[: i + 1])
            if not before.startswith(done) or not after.startswith(before):
                raise InputError(
                    f"{self.name}: the chat template changes what was said before message {i + 1}, so its tokens "
                    "cannot be told apart; write the texts out as 'text', or as 'prompt' and 'completion' with "
                    "--no-chat-template"
                )
            parts += [(before[len(done) :], False), (after[len(before) :], True)]
            done = after
        return parts


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
