"""Chat templates: rendered as transformers does, with only the assistant's tokens to be learnt."""

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


@pytest.mark.parametrize("prompted", [False, True])
def test_the_text_is_that_of_transformers(directory: Path, prompted: bool) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=load_tokenizer(SHIPPED_MODEL), chat_template=CHATML, bos_token="<s>", eos_token="</s>"
    )
    for messages in (MESSAGES, MESSAGES[:1], [{"role": "system", "content": "x"}, *MESSAGES]):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompted)
        assert chat(directory).render(messages, prompted) == expected


def test_the_parts_are_the_text_and_the_assistants_are_to_be_learnt(directory: Path) -> None:
    parts = chat(directory).segments(MESSAGES)
    assert "".join(text for text, _ in parts) == chat(directory).render(MESSAGES)
    learnt = [text for text, is_target in parts if is_target]
    assert learnt == ["That a single man</s>\n", "a good fortune</s>\n"]


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


def test_a_template_file_comes_before_the_config(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert chat(directory).render(MESSAGES) == "What is a truth?"
    assert load_chat_template(directory / "nowhere") is None


def test_several_templates(directory: Path) -> None:
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
