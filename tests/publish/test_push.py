"""``coderl push`` and its kin, against a stand-in of the hub."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import close_session, constants

from coderl.callbacks import PostFit
from coderl.cli import main
from coderl.publish import hub as pushing
from coderl.publish.export import save_adapter, save_merged
from tests.callbacks.test_callbacks import fit, rl
from tests.support import tiny
from tests.support.hub import TOKEN, Hub, running

# The hub's client sends bytes in httpx's old way.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
RUN = Path("checkpoints/tiny-mbpp-grpo-qlora")
MERGED = Path("checkpoints/tiny-mbpp-grpo-qlora-merged")


@pytest.fixture(scope="module")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an adapter and a checkpoint, and its merged model."""
    folder = tmp_path_factory.mktemp("made")
    policy = tiny.policy(llama, quantization="nf4")
    tiny.stir(policy)
    save_adapter(policy, folder / RUN / "adapter")
    save_merged(policy, folder / MERGED)
    (folder / RUN / "checkpoints").mkdir()
    (folder / RUN / "checkpoints/last.ckpt").touch()
    return folder


@pytest.fixture(autouse=True)
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with them."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in in the hub's place, and a token that it takes."""
    with running() as stand_in:
        reach(stand_in.url, monkeypatch)
        yield stand_in
    close_session()


def reach(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the hub's client go there: it has read its environment long ago."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "no-such-file")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    close_session()


def on_disk(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def error_of(capsys: pytest.CaptureFixture[str], *args: str | Path, code: int = 1) -> str:
    """Push, demand the exit code and one line that says what is wrong, and give it."""
    capsys.readouterr()
    assert main(["push", *map(str, args)]) == code
    out, err = capsys.readouterr()
    line = str(err.splitlines()[-1])
    assert out == "" and line.startswith("coderl: error: ") and err.count("coderl: error: ") == 1
    return line


# --- what arrives


def test_every_byte_of_a_merged_model_arrives(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["push", str(MERGED), "--hub_model_id", "team/model"]) == 0
    assert capsys.readouterr().out == f"{hub.url}/team/model\n"
    assert hub.repos == {"team/model": on_disk(MERGED)}
    assert set(hub.repos["team/model"]) >= {"model.safetensors", "config.json", "README.md", "merge.json"}
    assert hub.large and not hub.private
    assert b'name = "team/model"  #' in hub.repos["team/model"]["README.md"]


def test_by_default_a_model_is_called_as_its_folder_and_an_adapter_as_its_run(hub: Hub) -> None:
    assert main(["push", str(MERGED), "--private"]) == 0
    assert main(["push", str(RUN / "adapter")]) == 0
    assert hub.repos == {f"me/{MERGED.name}": on_disk(MERGED), f"me/{RUN.name}": on_disk(RUN / "adapter")}
    assert hub.private == {f"me/{MERGED.name}"}


def test_a_name_without_an_owner_gets_the_users_name(hub: Hub) -> None:
    assert main(["push", str(MERGED), "--hub_model_id", "mine"]) == 0
    assert list(hub.repos) == ["me/mine"]


def test_a_warning_says_that_others_lack_the_adapters_base(
    hub: Hub, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(RUN / "adapter")]) == 0
    assert f"names {llama} as its base, which others do not have" in capsys.readouterr().err


def test_only_the_files_of_a_model_are_pushed(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    files = on_disk(MERGED)
    (MERGED / "LICENSE").write_text("MIT")
    others = (
        ".env",
        "secrets.json",
        "token.json",
        "token",
        "notes.txt",
        "data.jsonl",
        "key.pem",
        ".git/config",
    )
    for name in (*others, "sub/config.json"):
        (MERGED / name).parent.mkdir(exist_ok=True)
        (MERGED / name).write_text("hf_secret")
    Path("elsewhere").write_text("hf_secret")
    (MERGED / "added_tokens.json").symlink_to(Path("elsewhere").resolve())
    (MERGED / "vocab.json").symlink_to("config.json")
    shutil.copytree(MERGED, MERGED / "epoch-1")
    assert main(["push", str(MERGED)]) == 0
    assert set(hub.repos[f"me/{MERGED.name}"]) == {*files, "LICENSE", "vocab.json"}
    shown = capsys.readouterr().err
    assert "not pushed, because they are not part of the model: .env, .git, added_tokens.json" in shown
    assert "and 3 more" in shown


def test_weights_that_are_links_to_elsewhere_are_refused(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    (MERGED / "model.safetensors").rename("blob")
    (MERGED / "model.safetensors").symlink_to(Path("blob").resolve())
    assert "is a link to outside of" in error_of(capsys, MERGED) and not hub.asked


def test_a_card_that_somebody_wrote_arrives_as_it_is(hub: Hub) -> None:
    (MERGED / "README.md").write_text('---\nlicense: mit\n---\n\nname = "mine"\n')
    before = on_disk(MERGED)
    assert main(["push", str(MERGED)]) == 0
    assert hub.repos[f"me/{MERGED.name}"] == before == on_disk(MERGED)


def test_a_merged_model_is_pushed_once_it_is_there(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        "merge",
        "--adapter_model_id",
        str(RUN),
        "--output_dir",
        "out",
        "--device",
        "cpu",
        "--push_to_hub",
    ]
    capsys.readouterr()
    assert main([*asked, "--hub_model_id", "team/out"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(Path("out").resolve()), f"{hub.url}/team/out"]
    assert hub.repos == {"team/out": on_disk(Path("out"))}
    hub.fails["/commit/"] = 503
    shutil.rmtree("out")
    assert main(asked) == 1
    assert "the hub" not in capsys.readouterr().out and Path("out/model.safetensors").is_file()


# --- what goes wrong


@pytest.mark.parametrize(
    ("fails", "hub_id", "part"),
    [
        ({"whoami": 401}, None, "the hub does not take the token"),
        ({"create": 401}, "me/it", "the hub does not take the token"),
        ({"create": 403}, "me/it", "the token has no right to that"),
        ({}, "others/it", "the token has no right to that (You don't have the rights"),
        ({}, "nobody/it", "the hub knows no such owner or repository"),
        ({"preupload": 404}, "me/it", "the hub knows no such owner or repository"),
        ({"create": 500}, "me/it", "is in trouble (status 500"),
        ({"commit": 502}, "me/it", "is in trouble (status 502"),
        ({"create": 429}, "me/it", "too many requests"),
        ({"create": 400}, "me/it", "the hub refused it (status 400)"),
        ({"/lfs/": 403}, "me/it", "the token has no right to that"),
    ],
)
def test_what_the_hub_does_not_take_is_one_line_and_stays_here(
    hub: Hub, capsys: pytest.CaptureFixture[str], fails: dict[str, int], hub_id: str | None, part: str
) -> None:
    hub.fails, before = fails, on_disk(MERGED)
    chosen = ["--hub_model_id", hub_id] if hub_id else []
    line = error_of(capsys, MERGED, *chosen)
    assert part in line and TOKEN not in line
    assert line.endswith(" ".join(["to push it again: coderl push", str(MERGED), *chosen]))
    assert on_disk(MERGED) == before


def test_a_token_that_the_hub_does_not_know(
    hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    line = error_of(capsys, MERGED)
    assert "the hub does not take the token" in line and "hf_old" not in line


def test_a_missing_token(
    hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    for chosen in ([], ["--hub_model_id", "me/it"]):
        assert "there is no token for the hub: `hf auth login`" in error_of(capsys, MERGED, *chosen)
    assert not hub.asked


def test_a_hub_that_cannot_be_reached_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"  # bound, and nobody listens
        reach(url, monkeypatch)
        assert f"{url} cannot be reached (" in error_of(capsys, MERGED)
    close_session()


def test_offline_mode_is_named_as_the_reason(
    hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    assert "HF_HUB_OFFLINE is set" in error_of(capsys, MERGED)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_cannot_be_read(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    (MERGED / "model.safetensors").chmod(0)
    assert "model.safetensors: Permission denied" in error_of(capsys, MERGED)


@pytest.mark.parametrize(
    ("place", "code", "part"),
    [
        ("nowhere", 1, "there is no folder nowhere"),
        (MERGED / "config.json", 1, "there is no folder"),
        ("checkpoints", 1, "holds neither an adapter nor a model"),
        (RUN, 1, f"push {RUN}/adapter or {MERGED}"),
        ("half", 1, "holds neither an adapter nor a model"),
        ("trainers", 1, "holds checkpoints (last.ckpt)"),
        ("bad name!", 2, "'bad name!' is no hub id"),
    ],
)
def test_folders_that_cannot_be_pushed_are_refused(
    hub: Hub, capsys: pytest.CaptureFixture[str], place: Path | str, code: int, part: str
) -> None:
    for name in ("trainers", "bad name!", "half"):
        shutil.copytree(MERGED, name)
    Path("trainers/last.ckpt").touch()
    Path("half/model.safetensors").unlink()
    assert part in error_of(capsys, place, code=code) and not hub.asked


@pytest.mark.parametrize("name", ["", "a/b/c", "a b", "--x", "me/..", "x" * 200])
def test_invalid_ids_are_refused(hub: Hub, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert "is no hub id" in error_of(capsys, MERGED, f"--hub_model_id={name}", code=2) and not hub.asked


def test_an_adapter_that_the_hub_does_not_have(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["merge", "--adapter_model_id", "me/typo", "--output_dir", "out", "--device", "cpu"]
    for status, part in {None: "knows no such owner", 500: "is in trouble", 403: "has no right"}.items():
        hub.fails = {"me/typo": status} if status else {}
        assert main(asked) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert "me/typo is no folder here, and cannot be fetched from the hub" in line and part in line


# --- after a fit


def test_a_fit_ends_with_its_models_on_the_hub(
    hub: Hub, llama: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(7)
    with caplog.at_level(logging.WARNING):
        fit(rl(llama), Path("run"), PostFit(push_to_hub=True), steps=1)
    assert f"names {llama} as its base, which others do not have" in caplog.text
    assert hub.repos == {"me/run": on_disk(Path("run/adapter")), "me/run-merged": on_disk(Path("run-merged"))}
    shown = capsys.readouterr().out
    assert f"{hub.url}/me/run\n" in shown and f"{hub.url}/me/run-merged\n" in shown


def test_a_push_that_fails_is_logged_and_the_fit_ends_well(
    hub: Hub, llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.fails["create"] = 500
    torch.manual_seed(7)
    with caplog.at_level(logging.WARNING):
        fit(rl(llama), Path("run"), PostFit(push_to_hub=True, hub_model_id="team/it"), steps=1)
    lines = [record.message for record in caplog.records if "not pushed" in record.message]
    assert [line.partition("to push it again: ")[2] for line in lines] == [
        "coderl push run/adapter --hub_model_id team/it",
        "coderl push run-merged --hub_model_id team/it-merged",
    ]
    assert json.loads(Path("run/summary.json").read_text())["steps"] == 1


def test_other_errors_are_named_by_their_class_or_file() -> None:
    assert pushing._reason(ValueError("first\nsecond")) == "ValueError: first"
    assert pushing._reason(OSError(28, "No space left on device", "x")) == "x: No space left on device"
