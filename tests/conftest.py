"""Random numbers that are the same in everybody's run, and a tiny checkpoint and a text, as a user would have them.

`--hypothesis-profile=explore` takes fresh ones instead, `explore-few` a tenth of the examples.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

import minichunk as mc
from minichunk.files.documents import MEASURED_ON, novel
from tutorials.pretrain import train_tokenizer

from .ranks import Ranks
from .strategies import tiny

common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "max_examples": 100}
settings.register_profile("same", **common | {"max_examples": 40}, derandomize=True)
settings.register_profile("explore", **common, print_blob=True)
settings.register_profile("explore-few", **common | {"max_examples": 10}, print_blob=True)
settings.load_profile("same")


if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # a process for each core, not all cores for each process, nor for those that it starts
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--torch-seed", type=int, help="seeds torch before each test (default: 0; fresh when exploring)")


@pytest.fixture(scope="session")
def torch_seed(request: pytest.FixtureRequest) -> int:
    if (seed := request.config.getoption("--torch-seed")) is not None:
        return seed
    return 0 if settings().derandomize else secrets.randbelow(2**31)


@pytest.fixture(autouse=True)
def _seeded(torch_seed: int) -> None:
    """A test that draws without a seed of its own must hold for any; a failure shows which it was."""
    torch.manual_seed(torch_seed)
    if torch_seed:
        print(f"again with: --torch-seed={torch_seed}")


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


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Up to four processes of one group."""
    started = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()
