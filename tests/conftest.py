"""A tiny checkpoint directory and a text, as a user would have them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import minichunk as mc
from minichunk.pretrain import MEASURED_ON, novel, train_tokenizer

from .strategies import tiny


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(novel(MEASURED_ON).read_text()[:3000])
    return path


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([text], vocab_size=300)
    torch.manual_seed(0)
    mc.Llama(tiny(vocab_size=300, max_position_embeddings=16)).save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory
