"""The real chat templates: of conversations of several turns, only what the assistant says is learnt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import minichunk as mc
from minichunk.files.chat import ChatTemplate
from minichunk.files.documents import load_tokenizer, read_documents
from minichunk.files.shipped import SHIPPED_MODEL

DIRECTORY = Path(__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in DIRECTORY.glob("*.jinja"))
# What a template writes after the assistant's words; Mistral's also writes a space before them.
END = {
    "llama-3": "<|eot_id|>", "llama-3.2": "<|eot_id|>", "qwen2.5": "<|im_end|>\n", "qwen3": "<|im_end|>\n",
    "smollm2": "<|im_end|>\n", "deepseek-r1-distill": "<｜end▁of▁sentence｜>", "mistral-7b-v0.2": "</s>",
    "zephyr": "</s>\n",
}  # fmt: skip
TRIMMED = ("llama-3", "llama-3.2")


def source(name: str) -> str:
    return (DIRECTORY / f"{name}.jinja").read_text(encoding="utf-8")


def template(name: str) -> ChatTemplate:
    return ChatTemplate(source(name), {"bos_token": "<s>", "eos_token": "</s>"}, name)


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation of user and assistant in turn."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def learnt(name: str, messages: list[dict[str, str]]) -> list[str]:
    """The texts to be learnt; asserts that all parts together are what the template renders."""
    chat = template(name)
    parts = chat.segments(messages)
    assert "".join(text for text, _ in parts) == chat.render(messages)
    return [text for text, is_target in parts if is_target]


def said(name: str, *words: str) -> list[str]:
    """What is learnt where the assistant says `words`."""
    space = " " if name == "mistral-7b-v0.2" else ""
    expected = [space + text + END[name] for text in words]
    if name == "qwen3":  # writes its thoughts, here none, in the last turn only
        expected[-1] = "<think>\n\n</think>\n\n" + expected[-1]
    return expected


def test_every_template_is_here() -> None:
    assert sorted(END) == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("system", [None, "Be kind."])
@pytest.mark.parametrize("words", [["yes"], ["one", "two"], ["one", "two", "three", "four"]])
def test_several_turns(name: str, system: str | None, words: list[str]) -> None:
    contents = [text for i, word in enumerate(words) for text in (f"question {i}", word)]
    assert learnt(name, turns(*contents, system=system)) == said(name, *words)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_assistant_says_may_stand_elsewhere_too(name: str) -> None:
    echo = f"assistant{END[name]}user"
    assert learnt(name, turns(echo, "a", "a", echo, "a", "a", system="a")) == said(name, "a", echo, "a")


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_turn_is_its_end(name: str) -> None:
    assert learnt(name, turns("x", "", "y", "")) == said(name, "", "")


@pytest.mark.parametrize("name", NAMES)
def test_spaces_are_as_the_template_leaves_them(name: str) -> None:
    spaces = ["  one\n", "\ttwo  "]
    expected = [text.strip() for text in spaces] if name in TRIMMED else spaces
    assert learnt(name, turns("x", spaces[0], "y", spaces[1])) == said(name, *expected)


@pytest.mark.parametrize("name", NAMES)
def test_thoughts(name: str) -> None:
    thoughts = ["<think>\nhm\n</think>\n\none", "<think>\nso\n</think>\n\ntwo"]
    expected = said(name, *thoughts)
    if name == "qwen3":  # shows those of the last turn only
        expected = ["one<|im_end|>\n", f"{thoughts[1]}<|im_end|>\n"]
    if name == "deepseek-r1-distill":  # shows none
        expected = said(name, "\n\none", "\n\ntwo")
    assert learnt(name, turns("x", thoughts[0], "y", thoughts[1])) == expected


@pytest.mark.parametrize("name", NAMES)
def test_what_follows_the_assistants_last_turn_is_left_out(name: str) -> None:
    chat = template(name)
    assert chat.segments(turns("x", "y", "left out")) == chat.segments(turns("x", "y"))


@pytest.mark.parametrize("name", ["llama-3", "smollm2", "zephyr"])
def test_an_assistant_that_begins_learns_no_more_than_its_words(name: str) -> None:
    assert learnt(name, turns("x", "one", "y", "two")[1:]) == said(name, "one", "two")


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", NAMES)
def test_the_text_is_that_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=load_tokenizer(SHIPPED_MODEL), chat_template=source(name), bos_token="<s>", eos_token="</s>"
    )
    for messages in (turns("x", " y ", "z", "<think>\na\n</think>\n\nb", system="s"), turns("x")):
        for prompted in (False, True):
            expected = theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompted, date_string="26 Jul 2024"
            )
            assert template(name).render(messages, prompted) == expected


@pytest.mark.parametrize(
    ("name", "messages", "words"),
    [
        ("mistral-7b-v0.2", turns("x", "y")[1:], "refuses these messages: .* roles must alternate"),
        ("mistral-7b-v0.2", turns("x", "y") + turns("z", "a")[1:], "refuses these messages: .* roles must alternate"),
        ("qwen3", turns("x", "y") + turns("z", "a")[1:], r"changes what was said around message 3 \(assistant\)"),
    ],
)
def test_refusals_name_file_and_line(name: str, messages: list[dict[str, str]], words: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n" + json.dumps({"messages": messages}) + "\n")
    with pytest.raises(mc.InputError, match=f"data.jsonl, line 2: {name}: the chat template {words}"):
        read_documents([path], load_tokenizer(SHIPPED_MODEL), chat=template(name))
