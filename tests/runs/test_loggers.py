"""CSV, W&B and TensorBoard: where they write, what arrives there, and what is left behind. No network."""

from __future__ import annotations

import csv
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from coderl.cli import main, run
from coderl.errors import UserError
from coderl.runs import loggers
from coderl.runs.loggers import device_tag, readable, resolve_loggers, wandb_id, wandb_name
from tests.cli.test_cli import FAKES
from tests.support import fakes

NAME = "codellama-7b-python-mbpp-ppo-qlora"
STAMP = r"\d{4}-\d{4}"
FIT = f"""fit -c quickstart.yaml --model PPO --model.kl_coefficient 0.05 --model.inner_epochs 2
    --trainer.default_root_dir checkpoints/{NAME} --trainer.max_steps 4
    --model.group_size 2 --model.evaluation.n 2 --data.batch_size 2 --data.limit_test 1
    --trainer.accelerator cpu --trainer.logger WandbLogger --trainer.logger+ TensorBoardLogger
    --trainer.callbacks+ RewardStopping --trainer.callbacks.window 1""".split()
RECIPE_KEYS = {
    "loss/policy",
    "loss/value",
    "policy/entropy",
    "policy/kl",
    "reward/mean",
    "reward/std",
    "reward/passed",
    "reward/test_pass_rate",
    "early_stopping/best",
    "early_stopping/waited",
}
AXES = {"rollout_step", "global_step"}


def records(path: Path) -> Iterator[Any]:
    """What an offline run wrote: protocol buffers in a LevelDB log (blocks of 32 KiB, records in parts)."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    data = path.read_bytes()
    place, parts = 7, b""  # behind the file's own header
    while place + 7 <= len(data):
        left = -place % 32768 or 32768
        _, length, kind = struct.unpack_from("<IHB", data, place) if left >= 7 else (0, 0, 0)
        if not kind:
            place += left
            continue
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


class Offline:
    """An offline W&B run, read back."""

    def __init__(self, folder: Path) -> None:
        (path,) = folder.glob("*.wandb")
        found = list(records(path))
        self.run = next(record.run for record in found if record.HasField("run"))
        self.history = [
            {
                item.key or ".".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            for record in found
            if record.HasField("history")
        ]
        self.config = {
            item.key: json.loads(item.value_json)
            for record in found
            if record.HasField("config")
            for item in record.config.update
        }
        metrics = [record.metric for record in found if record.HasField("metric")]
        self.axes = {metric.name or metric.glob_name: metric.step_metric for metric in metrics}
        self.exit_code = next(record.exit.exit_code for record in found if record.HasField("exit"))


def shell(arguments: list[str], folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """``coderl`` in a process group of its own, of which nothing may be left."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    home = {"HOME": str(folder / "home"), "PYTHONPATH": str(Path(fakes.__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-m", "coderl", *arguments],
        cwd=folder,
        env=inherited | home | env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    out, err = process.communicate(timeout=240)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a fit logged to W&B, offline, and to TensorBoard, and was resumed."""
    folder = tmp_path_factory.mktemp("offline")
    resume = ["--ckpt_path", f"checkpoints/{NAME}/checkpoints/last.ckpt", "--trainer.max_steps", "6"]
    for arguments in (FIT, [*FIT, *resume]):
        done = shell(arguments, folder, WANDB_MODE="offline")
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def parts(offline: Path) -> list[Offline]:
    """What its two parts left for W&B."""
    return [Offline(part) for part in sorted(offline.glob(f"checkpoints/{NAME}/wandb/offline-run-*"))]


@pytest.mark.slow
def test_the_original_recipes_keys_arrive_in_wandb_with_both_axes(parts: list[Offline]) -> None:
    first = parts[0]
    steps = [row for row in first.history if "reward/mean" in row]
    assert [(row["rollout_step"], row["global_step"]) for row in steps] == [(1, 2), (2, 4)]
    assert all(row.keys() >= RECIPE_KEYS | AXES for row in steps)
    assert [row["early_stopping/waited"] for row in steps] == [0, steps[1]["early_stopping/waited"]]
    (after,) = [row for row in first.history if "final_eval/embedded_pass@1" in row]
    assert after.keys() >= AXES
    assert first.axes["*"] == "rollout_step"
    assert first.axes.keys() >= AXES
    assert first.exit_code == 0


@pytest.mark.slow
def test_the_run_name_and_the_configuration_arrive_in_wandb(parts: list[Offline]) -> None:
    first = parts[0]
    assert re.fullmatch(rf"{NAME}-cpu-{STAMP}", first.run.display_name)
    assert first.run.project == "coderl"
    assert first.config["model"]["class"] == "PPO"
    assert first.config["model"]["kl_coefficient"] == 0.05
    assert first.config["model"]["policy"]["model"] == "embedded"
    assert first.config["trainer"]["callbacks"]["RewardStopping"]["window"] == 1
    assert first.config["seed_everything"] == 42


@pytest.mark.slow
def test_the_table_of_completions_arrives_in_wandb(offline: Path, parts: list[Offline]) -> None:
    (row,) = [row for row in parts[0].history if "completions._type" in row]
    assert row["completions._type"] == "table-file"
    assert row["rollout_step"] == 1
    (file,) = offline.rglob(f"files/{row['completions.path']}")
    table = json.loads(file.read_text())
    logged = (offline / f"checkpoints/{NAME}/completions.jsonl").read_text().splitlines()
    assert [dict(zip(table["columns"], cells, strict=True)) for cells in table["data"]] == [
        json.loads(line) for line in logged
    ]


@pytest.mark.slow
def test_a_resumed_fit_goes_on_with_its_wandb_run(parts: list[Offline]) -> None:
    first, second = parts
    assert second.run.run_id == first.run.run_id
    assert [row["rollout_step"] for row in second.history if "reward/mean" in row] == [3]


@pytest.mark.slow
def test_wandb_writes_to_the_run_folder_and_nowhere_else(offline: Path) -> None:
    assert {path.name for path in offline.iterdir()} == {"checkpoints", "home"}
    assert {path.name for path in (offline / "checkpoints").iterdir()} == {NAME, f"{NAME}-merged"}
    elsewhere = [path for path in (offline / "home").rglob("*wandb*/**/*") if path.is_file()]
    assert all(path.suffix == ".log" for path in elsewhere), elsewhere


@pytest.mark.slow
def test_tensorboard_has_what_csv_has_and_goes_on_too(offline: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = offline / f"checkpoints/{NAME}"
    assert [path.name for path in (folder / "tensorboard").iterdir()] == ["version_0"]
    events = accumulator.EventAccumulator(str(folder / "tensorboard/version_0")).Reload()
    rows = []
    for version in ("version_0", "version_1"):
        with (folder / "logs" / version / "metrics.csv").open() as file:
            rows += [row for row in csv.DictReader(file) if row["reward/mean"]]
    for key in (RECIPE_KEYS | AXES) - {"early_stopping/best"}:
        values = [event.value for event in events.Scalars(key)]
        wanted = [float(row[key]) for row in rows]
        # On the axis, the held-out figures are there as well.
        assert [value for value in values if value in wanted] == wanted or key == "global_step"
        assert set(wanted) <= set(values)
    assert "final_eval/embedded_pass@1" in events.Tags()["scalars"]


# -- starting W&B --------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A fit of a fake model in an empty folder."""
    monkeypatch.chdir(tmp_path)
    Path("fakes.yaml").write_text(yaml.safe_dump(FAKES))
    return ["fit", "-c", "fakes.yaml", "--trainer.default_root_dir", "run"]


WANDB = ["--trainer.logger", "WandbLogger"]


@pytest.mark.slow
def test_a_missing_wandb_login_is_an_error_in_one_line_at_the_start(
    config: list[str], tmp_path: Path
) -> None:
    done = shell([*config, *WANDB], tmp_path)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("coderl: error: W&B is not logged in")
    assert all(way in line for way in ("wandb login", "WANDB_MODE=offline", "-c no-wandb.yaml"))
    assert "Traceback" not in done.stderr
    assert [path.name for path in Path("run").iterdir()] == ["console.log"]


def test_disabled_wandb_writes_nothing(config: list[str]) -> None:
    assert os.environ["WANDB_MODE"] == "disabled"
    before = {key for key in os.environ if "WANDB" in key}
    assert main([*config, *WANDB]) == 0
    assert not list(Path().rglob("*wandb*"))
    assert list(Path("run").glob("logs/version_0/config.yaml"))
    assert {key for key in os.environ if "WANDB" in key} == before


@pytest.mark.parametrize(
    ("kind", "text", "parts"),
    [
        ("CommError", "Timed out: connection refused\nConsider more", ["cannot be started", "Timed out"]),
        ("UsageError", "Invalid project name", ["W&B: Invalid project name"]),
        ("UsageError", "No API key configured.", ["not logged in"]),
    ],
)
def test_errors_of_wandb_at_the_start_are_one_line(
    kind: str,
    text: str,
    parts: list[str],
    config: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import wandb

    def refused(**_: Any) -> None:
        raise getattr(wandb.errors, kind)(text)

    monkeypatch.setattr(wandb, "init", refused)
    assert main([*config, *WANDB]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("coderl: error: W&B")
    assert all(part in line for part in parts)
    assert not Path("run/checkpoints").exists()


def test_wandb_failing_during_a_fit_is_a_warning(
    config: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def broken(self: WandbLogger, *_: Any, **__: Any) -> None:
        calls.append(self)
        raise ConnectionResetError("the service is gone")

    def logs(self: fakes.Tiny) -> None:
        self.log("loss", 1.0)

    monkeypatch.setattr(WandbLogger, "log_metrics", broken)
    monkeypatch.setattr(fakes.Tiny, "on_train_batch_start", lambda self, *_: logs(self))
    assert main([*config, *WANDB]) == 0
    assert len(calls) == 2
    assert [r.getMessage() for r in caplog.records if r.name == "coderl.runs.loggers"] == [
        "W&B did not take everything (ConnectionResetError: the service is gone); metrics.csv has it"
    ]


def test_a_wandb_run_that_was_open_before_stays_open(config: list[str]) -> None:
    import wandb

    own = wandb.init(mode="disabled")
    try:
        with pytest.warns(UserWarning, match="already in progress"):
            assert main([*config, *WANDB]) == 0
        assert wandb.run is own
    finally:
        own.finish()
        wandb.teardown()
    assert wandb.run is None


# -- settling ------------------------------------------------------------------------------------------------

TRAINER = Namespace(accelerator="cpu", devices="auto")


def asked(kind: str, /, **arguments: Any) -> Namespace:
    known: dict[str, dict[str, Any]] = {
        "CSVLogger": {"name": "lightning_logs"},
        "TensorBoardLogger": {"name": "lightning_logs", "version": None},
        "WandbLogger": {"name": None, "project": None, "version": None, "id": None, "dir": None},
    }
    init_args = Namespace(**({"save_dir": "."} | known[kind] | arguments))
    return Namespace(class_path=f"lightning.pytorch.loggers.{kind}", init_args=init_args)


def settle(given: Any, folder: Path = Path("run"), resumed: bool = False) -> Any:
    return resolve_loggers(given, folder, "tiny-mbpp-grpo-qlora", TRAINER, resumed)


@pytest.mark.parametrize("given", [None, True])
def test_csv_is_always_there(given: Any) -> None:
    (made,) = settle(given)
    assert made.class_path.endswith(".CSVLogger")
    assert (made.init_args.save_dir, made.init_args.name) == ("run", "logs")


def test_csv_comes_first_and_once() -> None:
    kinds = [made.class_path.rpartition(".")[2] for made in settle([asked("WandbLogger")])]
    assert kinds == ["CSVLogger", "TolerantWandbLogger"]
    (own,) = settle(asked("CSVLogger"))
    assert (own.init_args.save_dir, own.init_args.name) == ("run", "logs")


def test_switched_off_is_off() -> None:
    assert settle(False) is False


def test_explicit_settings_of_loggers_are_left_alone(tmp_path: Path) -> None:
    given = asked("WandbLogger", name="mine", project="ours", save_dir="there")
    (_, made) = settle(given, tmp_path)
    assert (made.init_args.name, made.init_args.project, made.init_args.save_dir) == ("mine", "ours", "there")
    (_, made) = settle(asked("TensorBoardLogger", name="mine", version=7), tmp_path, resumed=True)
    assert (made.init_args.name, made.init_args.version) == ("mine", 7)


def test_wandbs_environment_variables_are_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_NAME", "theirs")
    monkeypatch.setenv("WANDB_PROJECT", "their-project")
    (_, made) = settle(asked("WandbLogger"))
    assert made.init_args.name is None
    assert made.init_args.project == "their-project"


def test_settling_leaves_the_given_configuration_unchanged() -> None:
    given = asked("WandbLogger")
    before = given.clone()
    settle([given])
    assert given == before


def test_logger_objects_made_in_python_are_left_alone(tmp_path: Path) -> None:
    own = CSVLogger(tmp_path)
    assert settle(own) == [own]


def test_the_name_begins_with_a_folder_of_its_form_else_with_the_runs() -> None:
    for folder, first in ((f"checkpoints/{NAME}", NAME), ("checkpoints/mine", "tiny-mbpp-grpo-qlora")):
        name = wandb_name(Path(folder), "tiny-mbpp-grpo-qlora", TRAINER)
        assert re.fullmatch(rf"{re.escape(first)}-cpu-{STAMP}", name)


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("lightning.fabric.accelerators.cuda", "lightning.pytorch.accelerators.cuda"):
        monkeypatch.setattr(f"{module}.num_cuda_devices", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("devices", "visible", "tag"),
    [
        ([1], None, "gpu1"),
        (1, None, "gpu0"),
        ("1", None, "gpu0"),
        ("1,", None, "gpu1"),
        (2, None, "gpu0-1"),
        ([0, 2], None, "gpu0-2"),
        (-1, None, "gpu0-1-2-3"),
        ("auto", None, "gpu0-1-2-3"),
        (1, "3,5,6,7", "gpu3"),
        ([1, 2], "3,5,6,7", "gpu5-6"),
        ([1], "GPU-8f1c,GPU-77aa,GPU-1,GPU-2", "gpu1"),
    ],
)
def test_the_name_has_the_machines_own_numbers(
    devices: Any, visible: str | None, tag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for accelerator in ("auto", "gpu", "cuda"):
        assert device_tag(Namespace(accelerator=accelerator, devices=devices)) == tag
    assert device_tag(Namespace(accelerator="cpu", devices=devices)) == "cpu"


def test_a_resumed_fit_continues_the_latest_wandb_run_of_its_folder(tmp_path: Path) -> None:
    assert wandb_id(tmp_path) is None
    for name in (
        "offline-run-20260601_123400-zz9",
        "run-20260602_080000-abc-1",
        "run-20260601_235959-q",
        "debug",
    ):
        (tmp_path / "wandb" / name).mkdir(parents=True)
    assert wandb_id(tmp_path) == "abc-1"
    (_, fresh) = settle(asked("WandbLogger"), tmp_path)
    assert fresh.init_args.id is None and fresh.init_args.name
    (_, resumed) = settle(asked("WandbLogger"), tmp_path, resumed=True)
    assert (resumed.init_args.id, resumed.init_args.name) == ("abc-1", None)


@pytest.mark.slow
def test_importing_coderl_leaves_lightnings_loggers_as_they_are() -> None:
    code = (
        "from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger\n"
        "kinds = CSVLogger, TensorBoardLogger, WandbLogger\n"
        "before = [(vars(kind).copy(), kind.__init__.__defaults__) for kind in kinds]\n"
        "import coderl.runs.loggers, coderl.cli.trainer\n"
        "assert before == [(vars(kind), kind.__init__.__defaults__) for kind in kinds]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["TensorBoardLogger", "lightning.pytorch.loggers.TensorBoardLogger"])
def test_tensorboard_needs_no_folder_and_its_saved_config_starts_another_run(
    config: list[str], name: str
) -> None:
    pytest.importorskip("tensorboard")
    assert main([*config, "--trainer.logger", name]) == 0
    assert list(Path("run/tensorboard/version_0").glob("events.*"))
    (saved,) = Path("run").glob("logs/version_0/config.yaml")
    logger = yaml.safe_load(saved.read_text())["trainer"]["logger"]
    assert logger["class_path"] == "lightning.pytorch.loggers.TensorBoardLogger"
    assert main(["fit", "-c", str(saved), "--trainer.default_root_dir", "again"]) == 0
    assert list(Path("again/tensorboard/version_0").glob("events.*"))


@pytest.mark.parametrize("name", ["WandbLogger", "lightning.pytorch.loggers.WandbLogger"])
def test_a_saved_config_names_lightnings_wandb_logger(config: list[str], name: str) -> None:
    assert main([*config, "--trainer.logger", name]) == 0
    (saved,) = Path("run").glob("logs/version_0/config.yaml")
    logger = yaml.safe_load(saved.read_text())["trainer"]["logger"]
    assert logger["class_path"] == "lightning.pytorch.loggers.WandbLogger"
    assert main(["fit", "-c", str(saved), "--trainer.default_root_dir", "again"]) == 0


def test_a_list_of_loggers_in_a_config_needs_no_folders(config: list[str]) -> None:
    names = ["TensorBoardLogger", "lightning.pytorch.loggers.CSVLogger"]
    overlay = {"trainer": {"logger": [{"class_path": name} for name in names]}}
    Path("loggers.yaml").write_text(yaml.safe_dump(overlay))
    assert main([*config, "-c", "loggers.yaml"]) == 0
    assert (
        Path("run/tensorboard/version_0").is_dir() and Path("run/logs/version_0/metrics.csv").parent.is_dir()
    )


def test_a_resumed_fit_continues_the_latest_tensorboard_version(tmp_path: Path) -> None:
    for version in (0, 2, 10):
        (tmp_path / f"tensorboard/version_{version}").mkdir(parents=True)
    assert settle(asked("TensorBoardLogger"), tmp_path)[1].init_args.version is None
    assert settle(asked("TensorBoardLogger"), tmp_path, resumed=True)[1].init_args.version == 10


def test_without_tensorboard_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'coderl\[tensorboard\]'"):
        settle(asked("TensorBoardLogger"))


def test_a_saved_config_can_be_laid_over_another_folder(config: list[str]) -> None:
    assert main([*config, "--trainer.logger", "true"]) == 0
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    (saved,) = Path("run").glob("logs/version_0/config.yaml")
    again = run(["fit", "-c", str(saved), "--trainer.default_root_dir", "again"])
    assert again is not None
    assert Path(str(again.trainer.log_dir)) == Path("again/logs/version_0")
    assert Path("again/checkpoints/last.ckpt").is_file()
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")} == before


# -- the configuration, readable -----------------------------------------------------------------------------


def test_classes_are_folded_up_and_lists_of_them_keyed() -> None:
    entry: Callable[[str, int], dict[str, Any]] = lambda name, n: {  # noqa: E731
        "class_path": f"coderl.callbacks.{name}",
        "init_args": {"n": n},
    }
    config = {
        "trainer": {"logger": {"class_path": "x.Y"}, "callbacks": [entry("A", 1), entry("B", 2)]},
        "model": {"class_path": "coderl.algorithms.GRPO", "init_args": None, "dict_kwargs": {"clip": 0.2}},
        "ks": [1, 8],
        "twice": [entry("A", 1), entry("A", 2)],
    }
    assert readable(config) == {
        "trainer": {"callbacks": {"A": {"class": "A", "n": 1}, "B": {"class": "B", "n": 2}}},
        "model": {"class": "GRPO", "clip": 0.2},
        "ks": [1, 8],
        "twice": [{"class": "A", "n": 1}, {"class": "A", "n": 2}],
    }


def test_classes_of_one_name_in_a_list_are_all_kept() -> None:
    both = [{"class_path": "a.Reward", "init_args": {"x": 1}}, {"class_path": "b.Reward"}]
    assert readable(both) == [{"class": "Reward", "x": 1}, {"class": "Reward"}]
    assert readable([]) == []


def test_each_logger_but_csv_logs_the_configuration(tmp_path: Path) -> None:
    class Told(CSVLogger):
        pass

    class Other(Logger):
        name = version = None
        params: Any = None

        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            raise NotImplementedError

        def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
            self.params = params

    told, other = Told(tmp_path), Other()
    with loggers.open_loggers([told, other], tmp_path, lambda: {"seed_everything": 1}, "global_step"):
        pass
    assert other.params["seed_everything"] == 1
    assert not list(tmp_path.iterdir())
