"""Conversations: the tokens are those of transformers, and what is learnt are the assistant's turns."""

import json
import random
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import minichunk as mc
from minichunk.batch import IGNORE
from minichunk.files.chat import ChatTemplate, load_chat_template
from minichunk.files.documents import Document, load_tokenizer, novel, read_documents

transformers = pytest.importorskip("transformers")
TEMPLATES = Path(__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
# What a template writes after the assistant's words; Mistral's also writes a space before them.
END = {
    "llama-3": "<|eot_id|>", "llama-3.2": "<|eot_id|>", "qwen2.5": "<|im_end|>\n", "qwen3": "<|im_end|>\n",
    "smollm2": "<|im_end|>\n", "deepseek-r1-distill": "<｜end▁of▁sentence｜>", "mistral-7b-v0.2": "</s>",
    "zephyr": "</s>\n",
}  # fmt: skip
SPECIAL = {
    "bos_token": "<s>",
    "eos_token": {"__type": "AddedToken", "content": "</s>"},
    "tokenizer_class": "PreTrainedTokenizerFast",
}
# Says itself, by transformers' own tag, what is learnt. Without the tag and its end it is the same template.
TAGGED = """\
{{ bos_token }}{% if tools %}{{ tools | tojson }}
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}\
{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}\
{{ m.content }}{% for call in m.tool_calls %}<call>{{ call | tojson }}</call>{% endfor %}<|im_end|>
{% endgeneration %}{% else %}{{ m.content | trim }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
UNTAGGED = TAGGED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def tokenizers() -> dict[str, Tokenizer]:
    """The kinds that there are: bytes (Llama 3, Qwen), and SentencePiece's, which put a blank before a text (Llama 2)
    or before its first word (Mistral), the second with an end token of its own."""
    made = {}
    for kind in ("bytes", "prepended", "first"):
        special, alphabet = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"], []
        if kind == "bytes":
            tokenizer, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
            tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
        else:
            tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
            tokenizer.decoder = decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            )
            special += [f"<0x{i:02X}>" for i in range(256)]
        if kind == "prepended":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        if kind == "first":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
        trainer = trainers.BpeTrainer(
            vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(novel("emma").read_text()[:30_000].split("\n\n"), trainer)
        pairs = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
        single = "<s> $A" + (" </s>" if kind == "first" else "")
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=pairs)
        made[kind] = tokenizer
    return made


KINDS = tokenizers()


def checkpoint(directory: Path, template: object, kind: str = "bytes", file: bool = False) -> ChatTemplate:
    """A directory with a tokenizer and a template, in the config or in a file of its own."""
    directory.mkdir(exist_ok=True)
    KINDS[kind].save(str(directory / "tokenizer.json"))
    config = SPECIAL if file else {"chat_template": template, **SPECIAL}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if file:
        (directory / "chat_template.jinja").write_text(str(template))
    found = load_chat_template(directory)
    assert found is not None
    return found


def read(chat: ChatTemplate | None, *rows: object, directory: Path | None = None) -> list[Document]:
    directory = directory or chat.directory  # type: ignore[union-attr]
    path = directory / "data.jsonl"
    path.write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    return read_documents([path], load_tokenizer(directory), None, chat)


def learnt(chat: ChatTemplate, messages: list[dict[str, Any]], **fields: Any) -> list[str]:
    text, spans = chat.spans(messages, [message["role"] == "assistant" for message in messages], **fields)
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    assert text == chat.render(messages[: last + 1], **fields)
    return [text[start:stop] for start, stop in spans]


def turns(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """A conversation of user and assistant in turn."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def said(name: str, *words: str) -> list[str]:
    """What is learnt where the assistant says `words`."""
    expected = [" " * (name == "mistral-7b-v0.2") + text + END[name] for text in words]
    if name == "qwen3":  # writes its thoughts, here none, in the last turn only
        expected[-1] = "<think>\n\n</think>\n\n" + expected[-1]
    return expected


@pytest.fixture(params=NAMES)
def real(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, ChatTemplate]:
    assert sorted(END) == NAMES
    return request.param, checkpoint(tmp_path, (TEMPLATES / f"{request.param}.jinja").read_text(), file=True)


def test_real_templates(real: tuple[str, ChatTemplate]) -> None:
    """What the assistant says may stand elsewhere too, be empty, with spaces or thoughts around it."""
    name, chat = real
    echo = f"assistant{END[name]}user"
    spaced = ["one", "two"] if name in ("llama-3", "llama-3.2") else ["  one\n", "\ttwo  "]
    for system in (None, "Be kind."):
        assert learnt(chat, turns("q", "a", "r", "b", "s", "c", "t", "d", system=system)) == said(name, *"abcd")
        assert learnt(chat, turns(echo, "a", "a", echo, "a", "a", system=system)) == said(name, "a", echo, "a")
        assert learnt(chat, turns("x", "", "y", "", system=system)) == said(name, "", "")
        assert learnt(chat, turns("x", "  one\n", "y", "\ttwo  ", system=system)) == said(name, *spaced)
        assert learnt(chat, turns("x", "y", "left out", system=system)) == said(name, "y")
    thoughts = ["<think>\nhm\n</think>\n\none", "<think>\nso\n</think>\n\ntwo"]
    expected = said(name, *thoughts)
    if name == "qwen3":  # shows those of the last turn only
        expected = ["one<|im_end|>\n", f"{thoughts[1]}<|im_end|>\n"]
    if name == "deepseek-r1-distill":  # shows none
        expected = said(name, "\n\none", "\n\ntwo")
    assert learnt(chat, turns("x", thoughts[0], "y", thoughts[1])) == expected
    if name in ("llama-3", "smollm2", "zephyr"):  # the others want a user first
        assert learnt(chat, turns("x", "one", "y", "two")[1:]) == said(name, "one", "two")


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_real_templates_are_those_of_transformers(
    real: tuple[str, ChatTemplate], kind: str, tmp_path: Path
) -> None:
    name, _ = real
    chat = checkpoint(tmp_path, (TEMPLATES / f"{name}.jinja").read_text(), kind, file=True)
    messages = turns("What is a truth?", " A single man ", "Café ☃?", "in want of a wife", system="s")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(messages, date_string="26 Jul 2024")["input_ids"]
    (document,) = read(chat, {"messages": messages})
    if "strftime_now" not in chat.source():  # ours stands still
        assert document.input_ids.tolist() == expected


def conversation(rng: random.Random) -> list[dict[str, Any]]:
    """Turns of all kinds in any order: with tools and thoughts, consecutive, empty, with words of the template."""
    words = ["a", "user", "<|im_end|>\n", "<think>x</think>", " é ", "truth universally", "", "assistant\n"]
    messages = list[dict[str, Any]]()
    for _ in range(rng.randint(1, 8)):
        role = rng.choice(["user", "assistant", "tool", "system"])
        message: dict[str, Any] = {"role": role, "content": "".join(rng.choices(words, k=rng.randint(0, 3)))}
        if role == "assistant" and rng.random() < 0.3:
            message["tool_calls"] = [{"name": "f", "arguments": {"x": rng.choice(words)}}]
        if role == "assistant" and rng.random() < 0.3:
            message["reasoning_content"] = "so"
        messages.append(message)
    return [{"role": "user", "content": "begin"}, *messages, {"role": "assistant", "content": "end"}]


@pytest.mark.parametrize("kind", KINDS)
def test_spans_that_are_found_are_those_that_the_template_tags(kind: str, tmp_path: Path) -> None:
    """The oracle is transformers: the tag of the same template, and its mask of the assistant's tokens."""
    tagged, untagged = (checkpoint(tmp_path / n, s, kind) for n, s in (("tagged", TAGGED), ("untagged", UNTAGGED)))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tagged")
    rng = random.Random(0)
    for _ in range(60):
        messages, tools = conversation(rng), rng.choice([None, [{"name": "f"}]])
        told = {"return_assistant_tokens_mask": True, "return_dict": True}
        expected = theirs.apply_chat_template(messages, tools=tools, **told)
        targets = [i if m else IGNORE for i, m in zip(expected["input_ids"], expected["assistant_masks"], strict=True)]
        for chat in (tagged, untagged):
            (document,) = read(chat, {"messages": messages, "tools": tools})
            assert document.input_ids.tolist() == expected["input_ids"]
            assert document.labels.tolist() == targets, messages


@pytest.mark.parametrize("template", [TAGGED, UNTAGGED])
def test_turns_that_are_not_to_be_learnt(template: str, tmp_path: Path) -> None:
    messages = turns("a", "first", "b", "second", "c", "third")
    messages[1]["weight"], messages[5]["train"] = 0, False
    (document,) = read(checkpoint(tmp_path, template), {"messages": messages})
    kept = document.input_ids[document.labels != IGNORE].tolist()
    assert KINDS["bytes"].decode(kept, skip_special_tokens=False) == "second<|im_end|>\n"


def test_rows_of_other_forms_are_the_same_conversation(tmp_path: Path) -> None:
    user, assistant = turns("why", "so")
    parts = [{"type": "text", "text": "wh"}, {"type": "text", "text": "y"}]
    first, *others, before = read(
        checkpoint(tmp_path, UNTAGGED),
        {"messages": [user, assistant], "id": 5},
        {"messages": [{**message, "tool_calls": [], "tool_call_id": "a"} for message in (user, assistant)]},
        {"prompt": "why", "completion": "so", "messages": None},
        {"prompt": [user], "completion": [assistant]},
        {"messages": [{"role": "user", "content": parts, "name": None}, assistant]},
        {"conversations": [{"from": "human", "value": "why"}, {"from": "gpt", "value": "so"}]},
        {"prompt": turns("a", "b", "c"), "completion": [assistant]},
    )
    for other in others:
        assert other.input_ids.tolist() == first.input_ids.tolist()
        assert other.labels.tolist() == first.labels.tolist()
    assert int((before.labels != IGNORE).sum()) == int((first.labels != IGNORE).sum())  # the prompt's turn is not


def test_many_turns_take_a_time_that_grows_with_their_number(tmp_path: Path) -> None:
    """400 turns in a second, and counted: a few renderings, however many turns."""
    chat, counts = checkpoint(tmp_path, UNTAGGED), []
    for n in (20, 400):
        messages = turns(*["word " * 40] * n)
        messages[n // 2 + 1]["tool_calls"] = [{"name": "f"}]
        began = time.process_time()
        with mock.patch.object(chat, "_render", wraps=chat._render) as render:
            assert len(learnt(chat, messages)) == n // 2
        assert time.process_time() < began + 2
        counts.append(render.call_count)
    assert counts[0] == counts[1] <= 12


def test_templates_in_all_places(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools" + UNTAGGED}, {"name": "default", "template": UNTAGGED}]
    chat = checkpoint(tmp_path, named)
    assert learnt(chat, turns("x", "y")) == ["y<|im_end|>\n"]
    assert chat.render(turns("x"), tools=[{"name": "f"}]).startswith("tools")
    checkpoint(tmp_path, "{{ messages[0].content }}", file=True)
    assert load_chat_template(tmp_path).render(turns("x")) == "x"  # type: ignore[union-attr]
    assert load_chat_template(tmp_path / "nowhere") is None
    clock = checkpoint(tmp_path / "clock", " {{ strftime_now('%A %-d %B %Y') }}{% if tools is not none %}no{% endif %}")
    assert clock.render(turns("x")) == " Friday 26 July 2024"  # the same on every day


SAID = "the chat template changes what was said around message 2"


@pytest.mark.parametrize(
    ("template", "row", "words"),
    [
        ("{% if %}", turns("x", "y"), "the chat template refuses these messages"),
        ("{{ raise_exception('roles alternate') }}", turns("x", "y"), "refuses these messages: roles alternate"),
        ("{{ ''.__class__.__mro__ }}", turns("x", "y"), "refuses these messages"),
        ("{{ messages | length }}", turns("x", "y", "z", "a"), SAID),  # does not write it at all
        ("{% for m in messages %}{{ loop.revindex }}{{ m['content'] }}{% endfor %}", turns("x", "y", "z", "a"), SAID),
        ([{"name": "tool_use", "template": UNTAGGED}], turns("x", "y"), "the chat template cannot be told"),
        (UNTAGGED, {"messages": "x"}, "'messages' must be a list of messages"),
        (UNTAGGED, {"messages": []}, "'messages' must be a list of messages"),
        (UNTAGGED, [{"role": "user"}], "message 1 .user. has the content null"),
        (UNTAGGED, [{"role": "user", "content": [{"type": "image"}]}], "message 1 .user. has the content ...*image"),
        (UNTAGGED, [{"content": "x"}], "message 1 has no 'role'"),
        (UNTAGGED, turns("x"), "none of the messages has the role 'assistant'"),
        (UNTAGGED, [*turns("x"), {"role": "assistant", "content": "y", "weight": 0}], "none is to be learnt"),
        (UNTAGGED, [*turns("x"), {"role": "assistant", "content": "y", "weight": 0.5}], "has weight 0.5"),
        (UNTAGGED, [*turns("x"), {"role": "assistant", "content": "y", "mask": 1}], "field 'mask', which the model's"),
        (UNTAGGED, {"messages": turns("x", "y"), "documents": [{"text": "d"}]}, "does not write 'documents'"),
        (UNTAGGED, {"messages": turns("x", "y"), "prompt": "x"}, "has 'messages' and 'prompt': which of them"),
        (UNTAGGED, {"conversations": [{"from": "gpt4", "value": "x"}]}, "'from' is 'gpt4', but must be one of"),
        (UNTAGGED, {"messages": turns("x", "y"), "conversations": turns("x", "z")}, "the field 'conversations' would"),
        (UNTAGGED, {"conversations": [{"from": ["gpt"], "value": "x"}]}, "'from' is .* but must be one of"),
        (UNTAGGED, {"conversations": [{"from": "gpt", "value": "x", "content": "y"}]}, "beside 'value' alone"),
        (UNTAGGED, [{"role": "user", "content": "x", "train": True}, turns("x", "y")[1]], "1 only of the assistant's"),
        (UNTAGGED, [{**turns("x", "y")[1], "thinking": "so"}], "changes what was said around message 1"),
        (UNTAGGED, {"messages": turns("x", "y"), "reasoning": "so"}, "the field 'reasoning' would change"),
        (UNTAGGED, {"messages": turns("x", "y"), "chat_template_kwargs": "x"}, "must be an object"),
        (UNTAGGED, {"messages": turns("x", "y"), "chat_template_kwargs": {"f": 1}}, "does not write 'f'"),
        (TAGGED, {"messages": turns("x", "y"), "chat_template_kwargs": {"add_generation_prompt": True}}, "not write"),
        (UNTAGGED, [*turns("x"), {"role": "assistant", "tool_calls": [{"arguments": '{"a": 1}'}]}], "whose quotes the"),
        *((kind.replace("else", "elif m.role == 'user'"), turns("x", "y", system="s"), "not write what message 1")
          for kind in (TAGGED, UNTAGGED)),
        (None, turns("x", "y"), "'messages' need a chat template"),
        (None, {"prompt": "x", "completion": "y", "tools": [{}]}, "the field 'tools' would change what is learnt"),
    ],
)  # fmt: skip
def test_what_is_refused_names_the_line(template: object, row: object, words: str, tmp_path: Path) -> None:
    chat = checkpoint(tmp_path, template or "none")
    with pytest.raises(mc.InputError, match=rf"data.jsonl, line 2: .*{words}"):
        read(chat if template else None, {"messages": row} if isinstance(row, list) else row, directory=tmp_path)


def test_without_transformers_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = checkpoint(tmp_path, UNTAGGED)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(mc.InputError, match=r"line 2: conversations are rendered by .* pip install 'minichunk\[hf\]'"):
        read(chat, {"messages": turns("x", "y")})
    assert len(read(chat, {"text": "plain text needs none"})) == 1
