"""The recipe for an 8B, run with a small model in its place."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import minichunk as mc
from minichunk.command.main import main

RECIPE = (Path(__file__).parents[1] / "tutorials" / "recipe_8b.md").read_text()
# What is made smaller, and nothing else: the commands are the page's.
SMALLER = {
    "24576": "32", "--chunk-size 512": "--chunk-size 8", "--fill-size 4096": "--fill-size 16",
    "--steps 200": "--steps 4", "--save-every 10": "--save-every 2", "--memory 24GiB": "--memory 1032MiB",
}  # fmt: skip
NOT_RUN = ("pip", "hf", "vllm")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_directory: Path, text: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_directory, "qwen3-8b")
    template = Path(__file__).parent / "chat_templates" / "qwen3.jinja"
    Path("qwen3-8b/tokenizer_config.json").write_text(json.dumps({"chat_template": template.read_text()}))
    shutil.copy(text, "book.txt")
    shutil.copy(text, "heldout.txt")
    messages = [{"role": "user", "content": "What is a truth?"}, {"role": "assistant", "content": "A man in want."}] * 2
    Path("chats.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    return tmp_path


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the other libraries
def test_every_command_works(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    ran = []
    for language, block in re.findall(r"```(sh|python)\n(.*?)```", RECIPE, re.DOTALL):
        if language == "python":
            names: dict[str, object] = {}
            exec(block, names)
            ran.append("python")
            continue
        for line in block.strip().splitlines():
            for old, new in SMALLER.items():
                line = line.replace(old, new)
            program, *arguments = shlex.split(line)
            if program == "minichunk":
                assert main(arguments) == 0, capsys.readouterr().err
            else:
                assert program in NOT_RUN
            ran.append(" ".join([program, *arguments[:1]]))
    assert [name for name in ran if name.split()[0] not in NOT_RUN] == [
        "minichunk plan", "minichunk train", "minichunk train", "minichunk evaluate", "minichunk generate", "python",
    ]  # fmt: skip
    assert "fits into 1.01 GiB" in capsys.readouterr().out
    assert Path("runs/novel/loss.png").is_file()
    ids = torch.arange(20)[None]
    merged, theirs = mc.Llama.from_pretrained("qwen3-8b-novel"), names["theirs"]
    torch.testing.assert_close(merged(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)  # type: ignore[operator]
    assert Path("qwen3-8b-novel/tokenizer.json").is_file()
