"""Every shipped config parses."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from coderl.cli import main
from coderl.errors import UsageError
from coderl.packaged import config_names, configs_folder, find_config


@pytest.mark.parametrize("name", config_names())
def test_parses(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = ["--config", "grpo.yaml"] if name.startswith("models/") else []  # those lie over an algorithm's
    assert main(["fit", *base, "--config", name, "--print_config"]) == 0, capsys.readouterr().err
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["class_path"].startswith("coderl.algorithms.")
    assert not list(tmp_path.iterdir())


def test_names_resolve_with_and_without_suffix_but_files_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in config_names():
        expected = str(configs_folder() / name)
        assert find_config(name) == expected
        assert find_config(name.removesuffix(".yaml")) == expected
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
        assert find_config(name) == name


def test_text_and_urls_are_no_names() -> None:
    for text in ("trainer: {max_epochs: 1}", "{}", "a\nb", "hf://someone/config.yaml"):
        assert find_config(text) == text


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"no config 'absent\.yaml'") as caught:
        find_config("absent.yaml")
    assert all(name in str(caught.value) for name in config_names())
    assert "\n" not in str(caught.value)
