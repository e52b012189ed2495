"""console.log: what a run prints, errors and interrupts included, and bars as one line each."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from coderl import __version__
from coderl.cli import main, run
from coderl.errors import UserError
from coderl.runs.console import ConsoleLog, LineFilter
from coderl.runs.folder import RunFolder
from tests.cli.test_cli import FAKES
from tests.support import fakes

RUN = Path("run")


def lines(*writes: str) -> list[str]:
    stream = LineFilter({})
    return [line for text in writes for line in stream.feed(text)] + stream.close()


# -- lines ---------------------------------------------------------------------------------------------------


@given(st.lists(st.text(st.characters(exclude_characters="\r\n\x1b"), min_size=1), max_size=8), st.data())
def test_text_comes_out_as_it_went_in_however_it_is_cut(texts: list[str], data: st.DataObject) -> None:
    whole = "\n".join(texts) + "\n" if texts else ""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=5)))
    parts = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert lines(*parts) == texts


@given(st.lists(st.sampled_from([*"ab: \r\n", "\x1b[A", "\x1b[1m", "\x1b"])))
def test_no_control_codes_come_through_whatever_is_written(texts: list[str]) -> None:
    assert not any({"\r", "\n", "\x1b"} & set(line) for line in lines(*texts))


def test_a_last_line_without_an_end_is_logged() -> None:
    assert lines("a\n", "half") == ["a", "half"]


def test_window_titles_without_an_end_take_little_time() -> None:
    text = "\x1b]0;" * 100_000
    started = time.monotonic()
    assert lines(text + "\n") == ["]0;" * 100_000]
    assert time.monotonic() - started < 10
    assert lines("\x1b]0;title\x07a \x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\\n") == ["a link"]


def test_colours_are_left_out() -> None:
    assert lines("\x1b[1;34mwandb\x1b[0m: hello\r\n") == ["wandb: hello"]


def test_a_line_that_overwrites_itself_is_its_last_state() -> None:
    assert sorted(lines("10 MB\r", "20 MB\r30 MB\n", "done\n")) == ["30 MB", "done"]
    assert lines("reading: 50%\rreading: 100%\n", "done\n") == ["reading: 100%", "done"]


def bars(draw: Any) -> list[str]:
    """What real tqdm bars write, as lines."""
    written: list[str] = []

    class Terminal(io.StringIO):
        def write(self, text: str) -> int:
            written.append(text)
            return len(text)

    draw(lambda **options: tqdm(file=Terminal(), mininterval=0, ascii=True, ncols=40, **options), written)
    return lines(*written)


@pytest.mark.parametrize("leave", [True, False])
def test_a_bar_is_one_line_its_last_state(leave: bool) -> None:
    def draw(bar: Any, _: list[str]) -> None:
        for _i in bar(iterable=range(50), desc="alone", leave=leave):
            pass

    (line,) = bars(draw)
    assert line.startswith("alone: 100%") and "50/50" in line


@pytest.mark.parametrize("leave", [True, False])
def test_nested_bars_are_a_line_each(leave: bool) -> None:
    def draw(bar: Any, _: list[str]) -> None:
        for i in bar(iterable=range(3), desc="outer", leave=leave):
            for _j in bar(iterable=range(5), desc=f"inner {i}", leave=leave):
                pass

    found = bars(draw)
    assert sorted(line.split(":")[0] for line in found) == ["inner 0", "inner 1", "inner 2", "outer"]
    assert all("100%" in line for line in found)


def test_bars_in_bars_in_bars_are_a_line_each() -> None:
    def draw(bar: Any, _: list[str]) -> None:
        for _i in bar(iterable=range(3), desc="outer"):
            for _j in bar(iterable=range(3), desc="middle", leave=False):
                for _k in bar(iterable=range(3), desc="inner", leave=False):
                    pass

    labels = [line.split(":")[0] for line in bars(draw)]
    assert (labels.count("outer"), labels.count("middle"), labels.count("inner")) == (1, 3, 9)


def test_a_bar_that_is_renamed_is_another() -> None:
    def draw(bar: Any, _: list[str]) -> None:
        shown = bar(total=2, desc="Epoch 0")
        shown.update(2)
        shown.reset()
        shown.set_description("Epoch 1")
        shown.update(1)
        shown.close()

    first, second = bars(draw)
    assert first.startswith("Epoch 0: 100%") and second.startswith("Epoch 1:  50%")


def test_text_beside_a_bar_has_a_line_of_its_own() -> None:
    def draw(bar: Any, written: list[str]) -> None:
        shown = bar(total=2, desc="Epoch 0", leave=False)
        shown.update(1)
        written.append("a warning\n")
        shown.update(1)
        shown.close()
        written.append("the end\n")

    warning, bar, end = bars(draw)
    assert (warning, end) == ("a warning", "the end") and bar.startswith("Epoch 0: 100%")


def test_many_finished_bars_come_out_in_order_and_once() -> None:
    def draw(bar: Any, _: list[str]) -> None:
        for i in range(100):
            for _j in bar(iterable=range(2), desc=f"bar {i}"):
                pass

    assert [line.split(":")[0] for line in bars(draw)] == [f"bar {i}" for i in range(100)]


# -- the streams ---------------------------------------------------------------------------------------------


def body(folder: Path) -> list[str]:
    """The log without the line that a run begins with."""
    head, *rest = (folder / "console.log").read_text().splitlines()
    assert re.fullmatch(rf"--- \d{{4}}-\d\d-\d\d [\d:+]+, coderl {re.escape(__version__)}: .+", head), head
    return rest


def test_both_streams_and_logging_handlers_are_logged_and_streams_stay_the_same_objects(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = logging.StreamHandler()  # holds the stream from before
    logger = logging.getLogger("test_console_log")
    logger.addHandler(handler)
    before = sys.stdout, sys.stderr, sys.stdout.write
    try:
        with ConsoleLog(tmp_path, ["fit", "-c", "a b.yaml"]):
            assert (sys.stdout, sys.stderr) == before[:2]
            assert sys.stdout.isatty() is False
            print("out")
            print("err", file=sys.stderr)
            logger.warning("logged")
    finally:
        logger.removeHandler(handler)
    assert (sys.stdout, sys.stderr, sys.stdout.write) == before
    print("after")
    assert body(tmp_path) == ["out", "err", "logged"]
    assert "coderl fit -c 'a b.yaml'" in (tmp_path / "console.log").read_text()
    assert capsys.readouterr() == ("out\nafter\n", "err\nlogged\n")


def test_streams_stay_terminals(tmp_path: Path) -> None:
    """With a pseudo-terminal: what asks whether somebody is there gets the same answer."""
    leader, follower = os.openpty()
    code = (
        "import sys; from pathlib import Path; from coderl.runs.console import ConsoleLog\n"
        "with ConsoleLog(Path('.')): print(sys.stdout.isatty(), sys.stderr.isatty(), sys.stdout.fileno())"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=follower, stderr=follower, check=True)
    os.close(follower)
    assert os.read(leader, 1000).split() == [b"True", b"True", b"1"]
    os.close(leader)
    assert body(tmp_path) == ["True True 1"]


def test_a_write_method_put_in_front_of_the_log_keeps_working_after_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As W&B does, for good."""
    heard: list[str] = []
    with ConsoleLog(tmp_path):
        write = sys.stdout.write
        sys.stdout.write = lambda text: heard.append(text) or write(text)  # type: ignore[func-returns-value, method-assign]
        print("one")
    print("two")
    assert [text for text in heard if text.strip()] == ["one", "two"]
    assert capsys.readouterr().out == "one\ntwo\n"
    assert body(tmp_path) == ["one"]


def test_a_resumed_run_appends_to_the_log(tmp_path: Path) -> None:
    for word in ("first", "second"):
        with ConsoleLog(tmp_path):
            print(word)
    text = (tmp_path / "console.log").read_text()
    assert text.count("--- ") == 2 and text.index("first") < text.rindex("--- ") < text.index("second")


@pytest.mark.parametrize(
    ("error", "last"),
    [
        (UserError("no such file"), "coderl: error: no such file"),
        (KeyboardInterrupt("go on with: x"), "coderl: interrupted; go on with: x"),
        (ZeroDivisionError("a bug"), "ZeroDivisionError: a bug"),
    ],
)
def test_the_error_that_ends_a_run_is_the_last_line(tmp_path: Path, error: BaseException, last: str) -> None:
    with pytest.raises(type(error)), ConsoleLog(tmp_path):
        raise error
    assert body(tmp_path)[-1] == last
    assert ("Traceback" in (tmp_path / "console.log").read_text()) == isinstance(error, ZeroDivisionError)


class Fixed:
    """A stream whose methods cannot be replaced."""

    __slots__ = ("text",)

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def test_a_stream_whose_write_cannot_be_replaced_is_not_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = Fixed()
    monkeypatch.setattr(sys, "stdout", fixed)
    with ConsoleLog(tmp_path):
        print("not heard")
        print("heard", file=sys.stderr)
    assert fixed.text == "not heard\n" and body(tmp_path) == ["heard"]


def test_a_forked_process_does_not_wait_for_the_log(tmp_path: Path) -> None:
    with ConsoleLog(tmp_path) as console:
        taken, done = threading.Event(), threading.Event()

        def hold() -> None:
            with console._lock:
                taken.set()
                done.wait(60)

        holder = threading.Thread(target=hold)
        holder.start()
        taken.wait(60)
        console._process += 1  # as if this were a child, forked while another thread was writing
        writer = threading.Thread(target=print, args=("from the child",), daemon=True)
        writer.start()
        writer.join(10)
        alive = writer.is_alive()
        done.set()
        holder.join()
        writer.join()
    assert not alive and "from the child" not in (tmp_path / "console.log").read_text()


def test_a_full_disk_ends_the_log_and_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.RawIOBase):
        def write(self, text: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with ConsoleLog(tmp_path) as console:
        print("fits")
        console._file.close()
        console._file = Full()
        print("does not")
        print("goes on")
    out, err = capsys.readouterr()
    assert out == "fits\ndoes not\ngoes on\n"
    assert err == f"coderl: {tmp_path / 'console.log'} ends here (No space left on device); the run goes on\n"
    assert body(tmp_path) == ["fits"]


def test_a_folder_that_cannot_be_written_to_is_an_error_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run cannot be written to .*--trainer.default_root_dir"):
        ConsoleLog(tmp_path / "file" / "run").__enter__()


# -- runs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A fit of a fake model in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(fakes.__file__).parents[2]))
    Path("fakes.yaml").write_text(yaml.safe_dump(FAKES))
    return ["fit", "-c", "fakes.yaml", "--trainer.default_root_dir", str(RUN)]


def test_a_fit_and_its_resumed_part_are_one_log(config: list[str]) -> None:
    assert main(config) == 0
    assert main([*config, "--ckpt_path", "run/checkpoints/last.ckpt", "--trainer.max_epochs", "2"]) == 0
    heads = [line for line in Path("run/console.log").read_text().splitlines() if line.startswith("--- ")]
    assert len(heads) == 2
    assert heads[0].endswith(f"coderl {' '.join(config)}") and heads[1].endswith("--trainer.max_epochs 2")


def test_a_refused_start_writes_nothing(config: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(config) == 0
    before = Path("run/console.log").read_bytes()
    assert main(config) == 1
    assert "is not empty" in capsys.readouterr().err
    assert Path("run/console.log").read_bytes() == before


def test_a_failed_start_can_be_repeated_in_its_folder(
    config: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise UserError("the weights are torn")

    with monkeypatch.context() as patched:
        patched.setattr(fakes.Tiny, "setup", broken)
        assert main(config) == 1
    assert body(RUN)[-1] == "coderl: error: the weights are torn"
    assert main(config) == 0


def test_a_folder_with_files_of_a_failed_start_alone_can_be_used(tmp_path: Path) -> None:
    for name in ("console.log", "wandb/offline-run-1-a/run-a.wandb", "tensorboard/version_0/events.out.1"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    RunFolder(tmp_path).require_fresh()
    (tmp_path / "completions.jsonl").touch()
    with pytest.raises(UserError, match="not empty"):
        RunFolder(tmp_path).require_fresh()


def test_the_traceback_of_a_bug_is_in_the_log(config: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fakes.Tiny, "training_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(config)
    assert body(RUN)[-1] == "ZeroDivisionError: division by zero"


def test_a_fast_dev_run_leaves_no_log(config: list[str]) -> None:
    assert main([*config, "--trainer.fast_dev_run", "true"]) == 0
    assert not (RUN / "console.log").exists()


def start(config: list[str], **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-m", "coderl", *config]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.slow
def test_ctrl_c_and_the_command_to_resume_are_in_the_log(config: list[str]) -> None:
    args = ["--model.pause", "0.05", "--trainer.callbacks+", "SaveOnInterrupt", "--data.size", "10000"]
    process = start([*config, *args, "--trainer.enable_progress_bar", "true"], start_new_session=True)
    started = time.monotonic()
    while not Path("stepped").exists() and time.monotonic() - started < 60:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    found = body(RUN)
    assert "coderl: finishing this step, then saving; Ctrl-C again stops at once" in found
    assert found[-1] == err.splitlines()[-1] and found[-1].startswith("coderl: interrupted; go on with: ")
    assert sum(line.startswith("Epoch 0:") for line in found) == 1


def test_a_limit_on_file_sizes_ends_the_log_and_not_the_run(config: list[str]) -> None:
    """The system's own refusal to write, at 10 kB."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from coderl.runs.console import ConsoleLog\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({10_000}, {resource.RLIM_INFINITY}))\n"
        "with ConsoleLog(Path('run')):\n"
        "    for i in range(2000): print('line', i)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "line 1999"
    assert done.stderr == "coderl: run/console.log ends here (File too large); the run goes on\n"
    assert Path("run/console.log").stat().st_size <= 10_000
