from __future__ import annotations

import os
from pathlib import Path

import pytest

# Set before anything imports torch, transformers or wandb: small tensors are fastest on one thread, and no
# test may reach the network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "disabled"
KEPT = ("CODERL_DATA_DIR", "CODERL_ENDURANCE")
for key in [key for key in os.environ if key.startswith("CODERL_") and key not in KEPT]:
    del os.environ[key]  # the command line reads settings from such variables


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing that an earlier session kept is read, and nothing is left in the user's cache."""
    os.environ["CODERL_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the public ``mbpp.jsonl``."""
    folder = os.environ.get("CODERL_DATA_DIR")
    if not folder or not Path(folder, "mbpp.jsonl").is_file():
        pytest.skip("CODERL_DATA_DIR names no folder that holds mbpp.jsonl")
    return Path(folder)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer, as a checkpoint folder."""
    from tests.support import tiny

    return tiny.checkpoint(tmp_path_factory.mktemp("llama"))
