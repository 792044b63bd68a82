"""Chat templates, made up and real: rendered as transformers does, with only the assistant's tokens to be learnt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import minichunk as mc
from minichunk.batch import IGNORE
from minichunk.files.chat import ChatTemplate, load_chat_template
from minichunk.files.documents import load_tokenizer, read_documents
from minichunk.files.shipped import SHIPPED_MODEL

CHATML = """\
{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
{{ bos_token + 'Be kind.\\n' -}}
{% endif %}
{{ '<|' + message['role'] + '|>' + message['content'] | trim + eos_token + '\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|assistant|>' -}}
{% endif %}
"""
MESSAGES = [
    {"role": "user", "content": "What is a truth?"},
    {"role": "assistant", "content": " That a single man "},
    {"role": "user", "content": "In possession of what?"},
    {"role": "assistant", "content": "a good fortune"},
]
SPECIAL = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML, **SPECIAL}))
    return tmp_path


def chat(directory: Path) -> ChatTemplate:
    template = load_chat_template(directory)
    assert template is not None
    return template


def test_documents(directory: Path) -> None:
    tokenizer = load_tokenizer(SHIPPED_MODEL)
    path = directory / "data.jsonl"
    pair = {"prompt": MESSAGES[0]["content"], "completion": MESSAGES[1]["content"]}
    path.write_text("".join(json.dumps(record) + "\n" for record in ({"messages": MESSAGES}, pair)))
    first, second = read_documents([path], tokenizer, eos_token_id=0, chat=chat(directory))
    assert tokenizer.decode(first.input_ids.tolist()) == chat(directory).render(MESSAGES)
    kept = first.input_ids[first.labels != IGNORE].tolist()
    assert tokenizer.decode(kept) == "That a single man</s>\na good fortune</s>\n"
    assert tokenizer.decode(second.input_ids.tolist()) == chat(directory).render(MESSAGES[:2])
    with pytest.raises(mc.InputError, match="line 1: 'messages' need a chat template"):
        read_documents([path], tokenizer)


def test_which_template_is_taken(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert chat(directory).render(MESSAGES) == "What is a truth?"
    assert load_chat_template(directory / "nowhere") is None
    (directory / "chat_template.jinja").unlink()
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert chat(directory).render(MESSAGES) == "y"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% if %}", "not valid Jinja"),
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "fails on these messages"),
        ("{{ messages | length }}", "changes what was said around message 2"),  # does not write it at all
        ("{% for m in messages %}{{ m['content'] * 2 }}{% endfor %}", "changes what was said around message 2"),
        ("{% for m in messages %}{{ loop.revindex }}{{ m['content'] }}{% endfor %}", "around message 2"),
        ("{{ messages | length + 'x' }}", "fails on these messages"),
        ("{{ messages[9]['content'] }}", "fails on these messages"),
    ],
)
def test_templates_that_do_not_serve(directory: Path, source: str, words: str) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
    with pytest.raises(mc.InputError, match=words):
        chat(directory).segments(MESSAGES)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": "x"}, "must be an object with"),
        ({"messages": [{"role": "user"}]}, "must be an object with"),
        ({"messages": [{"role": "user", "content": "x"}]}, "none of the messages has the role 'assistant'"),
    ],
)
def test_wrong_messages_name_the_line(directory: Path, record: object, words: str) -> None:
    path = directory / "data.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(mc.InputError, match=f"line 1.*{words}"):
        read_documents([path], load_tokenizer(SHIPPED_MODEL), chat=chat(directory))


DIRECTORY = Path(__file__).parent / "chat_templates"
# Real templates; what each writes after the assistant's words; Mistral's also writes a space before them.
END = {
    "llama-3": "<|eot_id|>", "llama-3.2": "<|eot_id|>", "qwen2.5": "<|im_end|>\n", "qwen3": "<|im_end|>\n",
    "smollm2": "<|im_end|>\n", "deepseek-r1-distill": "<｜end▁of▁sentence｜>", "mistral-7b-v0.2": "</s>",
    "zephyr": "</s>\n",
}  # fmt: skip
NAMES = sorted(END)
TRIMMED = ("llama-3", "llama-3.2")


def source(name: str) -> str:
    return (DIRECTORY / f"{name}.jinja").read_text(encoding="utf-8")


def real(name: str) -> ChatTemplate:
    return ChatTemplate(source(name), {"bos_token": "<s>", "eos_token": "</s>"}, name)


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation of user and assistant in turn."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def learnt(name: str, messages: list[dict[str, str]]) -> list[str]:
    """The texts to be learnt; asserts that all segments together are what the template renders."""
    segments = real(name).segments(messages)
    assert "".join(text for text, _ in segments) == real(name).render(messages)
    return [text for text, is_target in segments if is_target]


def said(name: str, *words: str) -> list[str]:
    """What is learnt where the assistant says `words`."""
    space = " " if name == "mistral-7b-v0.2" else ""
    expected = [space + text + END[name] for text in words]
    if name == "qwen3":  # writes its thoughts, here none, in the last turn only
        expected[-1] = "<think>\n\n</think>\n\n" + expected[-1]
    return expected


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
def test_empty_turns_and_spaces_are_as_the_template_leaves_them(name: str) -> None:
    assert learnt(name, turns("x", "", "y", "")) == said(name, "", "")
    assert real(name).segments(turns("x", "y", "left out")) == real(name).segments(turns("x", "y"))
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
            assert real(name).render(messages, prompted) == expected


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
        read_documents([path], load_tokenizer(SHIPPED_MODEL), chat=real(name))
