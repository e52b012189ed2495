"""``coderl execute``, called as on the command line."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coderl.cli import main
from coderl.commands.execute.rows import count_lines, read_rows
from coderl.commands.execute.verdicts import FIELDS, Verdicts
from coderl.errors import UserError
from coderl.sandbox import Program, Sandbox
from coderl.sandbox.jail import Jail
from coderl.types import Execution

Row = dict[str, Any]
TESTS = ["assert f(2) == 4", "assert f(3) == 9"]
GOOD = "def f(x): return x * x"
RIGHT: Row = {"id": "good", "code": GOOD, "tests": TESTS}
CHECK = "def check(candidate):\n    assert candidate(2) == 4\n"
MIXED: list[Row] = [
    RIGHT,
    {"id": "wrong", "code": "def f(x): return 2 * x", "tests": TESTS},
    {"id": 7, "code": "def f(x: return", "tests": TESTS},
    {"id": 7, "code": "def f(x):\n    while True: pass", "tests": TESTS},
    {"id": "é\ud800", "code": "", "tests": TESTS, "setup": None, "other": [1]},
    {
        "id": "setup",
        "code": "def f(n): return n.v",
        "tests": ["assert f(N()) == 3"],
        "setup": "class N: v = 3",
    },
    {"id": "check", "code": GOOD, "test": CHECK, "entry_point": "f", "tests": None},
    {"id": "prompt", "code": GOOD, "test": CHECK, "entry_point": "f", "prompt": "def f(x):\n    'Square.'\n"},
    {"id": "untested", "code": GOOD, "tests": []},
]
WARNING = "model-written programs run with weak isolation"
"""What every start in tier C begins with."""
OUTCOMES = ["passed", "failed", "syntax_error", "timeout", "no_code", *["passed"] * 3, "failed"]
PASSED = [2, 1, 0, 0, 0, 1, 1, 1, 0]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, on whatever isolation this machine has."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    return tmp_path


def write(rows: list[Row], path: str = "in.jsonl") -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def verdicts(path: str = "out.jsonl") -> list[Row]:
    lines = Path(path).read_bytes().split(b"\n")
    assert lines.pop() == b"", "it ends with a whole line"
    return [json.loads(line) for line in lines]


def environment() -> dict[str, str]:
    """This process's, so that coderl is found from any folder."""
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}


def execute(*args: str) -> int:
    return main(["execute", *args, "--workers", "1"])


def error_of(capsys: pytest.CaptureFixture[str], *args: str, code: int = 1) -> str:
    """Run, demand the exit code and one single line on stderr, and give the line."""
    assert execute(*args) == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(WARNING)]
    assert line.startswith("coderl: error: ")
    return line


def judge_at_once(monkeypatch: pytest.MonkeyPatch, *outcomes: str) -> None:
    """A sandbox that starts nothing and gives these outcomes, over and over."""

    def stream(self: Sandbox, programs: Iterator[Program], ahead: int | None = None) -> Iterator[Execution]:
        for number, _ in enumerate(programs):
            yield Execution(outcomes[number % len(outcomes)], 0, 1, "why", 0.5)  # type: ignore[arg-type]

    monkeypatch.setattr(Sandbox, "start", lambda self: None)
    monkeypatch.setattr(Sandbox, "stream", stream)


def test_each_row_gets_its_verdict_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(write(MIXED), "--output", "out.jsonl", "--timeout", "1") == 0
    found = verdicts()
    assert [row["id"] for row in found] == [row["id"] for row in MIXED]
    assert [row["outcome"] for row in found] == OUTCOMES
    assert [row["passed"] for row in found] == PASSED
    for row in found:
        assert set(row) == {"id", *FIELDS}
        assert row["tier"] in ("A", "B", "C")
        assert row["grading"] in ("sealed", "rpc", "inline")
        assert 0 < row["seconds"] < 30
        assert bool(row["message"]) == (row["outcome"] != "passed")
    out, err = capsys.readouterr()
    shares = dict(line.split()[0:3:2] for line in out.splitlines() if line.endswith("%"))
    assert shares["passed"] == "44.4%" and shares["failed"] == "22.2%" and shares["timeout"] == "11.1%"
    assert "9 programs in " in out and "sealed " in out and f"tier: {found[0]['tier']}" in out
    assert "running programs" not in err, "no bar where stderr is no terminal"


@pytest.mark.parametrize("grading", ["sealed", "inline"])
def test_the_grading_that_was_asked_for_is_used(grading: str) -> None:
    assert execute(write([RIGHT]), "--output", "out.jsonl", "--grading", grading) == 0
    assert verdicts()[0]["grading"] == grading


def test_it_reads_standard_input_and_writes_standard_output(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\ufeff" + json.dumps(RIGHT) + "\r\n\n" + json.dumps(MIXED[1])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert execute("-") == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["outcome"] for line in out.splitlines()] == ["passed", "failed"]
    assert "2 programs in " in err


def test_files_named_gz_are_gzipped() -> None:
    write([RIGHT])
    Path("in.jsonl.gz").write_bytes(gzip.compress(Path("in.jsonl").read_bytes()))
    assert execute("in.jsonl.gz", "--output", "out.jsonl.gz") == 0
    assert json.loads(gzip.decompress(Path("out.jsonl.gz").read_bytes()))["outcome"] == "passed"
    Path("torn.jsonl.gz").write_bytes(Path("in.jsonl.gz").read_bytes()[:-12])
    with pytest.raises(UserError, match=r"torn\.jsonl\.gz cannot be read"):
        list(read_rows("torn.jsonl.gz"))


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("{", ["malformed JSON"]),
        ("[" * 100_000, ["malformed JSON"]),
        ("[1]", ["is no JSON object", '"entry_point"']),
        ("null", ["is no JSON object"]),
        ({"code": GOOD, "tests": TESTS}, ["'id' is missing"]),
        ({"id": [1], "code": GOOD, "tests": TESTS}, ["'id' is list"]),
        ({"id": True, "code": GOOD, "tests": TESTS}, ["'id' is bool"]),
        ({"id": 1, "tests": TESTS}, ["'code' is missing"]),
        ({"id": 1, "code": 1, "tests": TESTS}, ["'code' is int, not a string"]),
        ({"id": 1, "code": GOOD}, ["neither 'tests' nor 'test'"]),
        ({"id": 1, "code": GOOD, "tests": TESTS[0]}, ["'tests' is to be a list of strings"]),
        ({"id": 1, "code": GOOD, "tests": [1]}, ["'tests' is to be a list of strings"]),
        ({"id": 1, "code": GOOD, "tests": TESTS, "setup": 1}, ["'setup' is int"]),
        ({"id": 1, "code": GOOD, "test": CHECK}, ["'entry_point' is missing"]),
    ],
)
def test_an_invalid_row_is_named_and_the_verdicts_before_it_are_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str | Row, parts: list[str]
) -> None:
    judge_at_once(monkeypatch, "passed", "failed")
    write([RIGHT, MIXED[1]])
    with open("in.jsonl", "a") as file:
        file.write((line if isinstance(line, str) else json.dumps(line)) + "\n" + json.dumps(RIGHT) + "\n")
    said = error_of(capsys, "in.jsonl", "--output", "out.jsonl")
    assert "in.jsonl:3: " in said and "2 verdicts in out.jsonl, --resume goes on" in said
    assert all(part in said for part in parts), said
    assert [row["outcome"] for row in verdicts()] == ["passed", "failed"]


def test_a_row_with_invalid_tests_is_named_and_the_verdicts_before_it_are_kept(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write([RIGHT, MIXED[1], RIGHT | {"tests": ["assert f( == 4"]}, RIGHT])
    said = error_of(capsys, "in.jsonl", "--output", "out.jsonl")
    assert "in.jsonl:3: a test is not valid Python" in said and "'assert f( == 4'" in said
    assert [row["outcome"] for row in verdicts()] == ["passed", "failed"]


def test_an_unusable_input_leaves_the_output_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out.jsonl").write_text("precious\n")
    Path("empty.jsonl").write_text("\n")
    Path("bytes.jsonl").write_bytes(b"\xff\xfe")
    os.mkdir("folder")
    for name, part in {
        "absent.jsonl": "does not exist",
        "empty.jsonl": "holds no programs",
        "bytes.jsonl": "bytes.jsonl:1: malformed JSON",
        "folder": "Is a directory",
    }.items():
        assert part in error_of(capsys, name, "--output", "out.jsonl")
    assert "is the input itself" in error_of(capsys, "out.jsonl", "--output", "./out.jsonl", code=2)
    assert Path("out.jsonl").read_text() == "precious\n"


@pytest.mark.parametrize(
    ("output", "part"),
    [
        ("absent/out.jsonl", "the folder absent does not exist"),
        (".", "Is a directory"),
        ("", "No such file"),
        ("/dev/full", "the disk is full; 0 verdicts"),
    ],
)
def test_an_output_that_cannot_be_written_is_an_error_of_one_line(
    capsys: pytest.CaptureFixture[str], output: str, part: str
) -> None:
    assert part in error_of(capsys, write([RIGHT]), "--output", output)
    if output == ".":
        assert "to go on from it" in error_of(capsys, "in.jsonl", "--output", output, "--resume")


def test_a_line_that_was_written_in_part_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full in the middle of the second line."""
    with Verdicts("out.jsonl") as output:
        (row, *_) = read_rows(write([RIGHT]))
        output.write(row, Execution("passed"))
        before = Path("out.jsonl").read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))  # in Python, EFBIG and no signal
        try:
            with pytest.raises(UserError, match=r"out\.jsonl cannot be written"):
                output.write(row, Execution("failed"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Path("out.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("args", "part"),
    [
        ([], "no input given"),
        (["in.jsonl", "more"], "unknown argument more"),
        (["in.jsonl", "--outptu", "x"], "did you mean --output?"),
        (["in.jsonl", "--timeout", "soon"], "timeout: expected float"),
        (["in.jsonl", "--timeout", "-1"], "timeout is -1"),
        (["in.jsonl", "--workers", "0"], "workers is 0"),
        (["in.jsonl", "--grading", "kind"], "expected one of 'auto', 'sealed', 'partly', 'rpc', 'inline'"),
        (["in.jsonl", "--resume"], "--resume needs an --output"),
        (["in.jsonl", "--resume", "--output", "out.gz"], "--resume needs an --output"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], args: list[str], part: str
) -> None:
    assert main(["execute", *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("coderl: error: ") and part in line


def test_help_describes_input_and_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["execute", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in (
        "Seconds of wall time",
        "--allow_weak_isolation",
        "entry_point",
        "--resume goes on",
        *FIELDS,
    ):
        assert part in shown


def test_execute_starts_without_torch() -> None:
    code = (
        "import sys; from coderl.cli import main; main(['execute', '--help']); "
        "import coderl.commands.execute; "
        "sys.exit(bool({'torch', 'lightning', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, env=environment())


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_resume_keeps_whole_lines_and_goes_on_after_them(
    cut: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """``cut`` bytes of the second line were written when the first run was killed."""
    write(MIXED)
    first = {"id": "good", **dict.fromkeys(FIELDS, 0), "outcome": "passed", "grading": "rpc", "tier": "B"}
    torn = json.dumps({"id": "wrong", **dict.fromkeys(FIELDS, 0)})[:cut]
    Path("out.jsonl").write_text(json.dumps(first) + "\n" + torn)
    assert execute("in.jsonl", "--output", "out.jsonl", "--resume", "--timeout", "1") == 0
    assert verdicts()[0] == first
    assert [row["outcome"] for row in verdicts()] == OUTCOMES
    out = capsys.readouterr().out
    assert "8 programs in " in out and "1 from before" in out and "rpc" in out
    before = Path("out.jsonl").read_bytes()
    assert execute("in.jsonl", "--output", "out.jsonl", "--resume") == 0
    assert Path("out.jsonl").read_bytes() == before
    assert "0 programs in " in capsys.readouterr().out


def test_resume_without_an_output_starts_one_and_without_resume_it_is_overwritten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judge_at_once(monkeypatch, "passed")
    write([RIGHT])
    assert execute("in.jsonl", "--output", "out.jsonl", "--resume") == 0
    assert len(verdicts()) == 1
    assert execute("in.jsonl", "--output", "out.jsonl") == 0
    assert len(verdicts()) == 1


@pytest.mark.parametrize("there", ['{"id": "other"}', "text", "[]", json.dumps({"id": "good"})])
def test_resume_refuses_the_output_of_another_input(capsys: pytest.CaptureFixture[str], there: str) -> None:
    Path("out.jsonl").write_text(there + "\n")
    assert "out.jsonl:1: cannot go on" in error_of(
        capsys, write([RIGHT]), "--output", "out.jsonl", "--resume"
    )
    assert Path("out.jsonl").read_text() == there + "\n"


def test_resume_refuses_an_output_that_is_longer_than_the_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    judge_at_once(monkeypatch, "passed")
    assert execute(write([RIGHT, RIGHT]), "--output", "out.jsonl") == 0
    capsys.readouterr()
    said = error_of(capsys, write([RIGHT]), "--output", "out.jsonl", "--resume")
    assert "out.jsonl:2: " in said and "nothing more" in said


def test_programs_without_a_verdict_end_in_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    judge_at_once(monkeypatch, "passed", "infra_error")
    said = error_of(capsys, write([RIGHT] * 4), "--output", "out.jsonl")
    assert "2 of 4 programs got no verdict (infra_error), the first at in.jsonl:2: why" in said
    assert len(verdicts()) == 4
    assert execute("in.jsonl", "--output", "out.jsonl", "--resume") == 1, "they still have none"


def test_weak_isolation_is_refused_unless_allowed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL")
    monkeypatch.setattr(Sandbox, "jail", Jail("C", "a reason"))
    Path("out.jsonl").write_text("precious\n")
    assert "weak isolation (tier C: a reason)" in error_of(capsys, write([RIGHT]), "--output", "out.jsonl")
    assert Path("out.jsonl").read_text() == "precious\n"
    assert execute(write([RIGHT]), "--output", "out.jsonl", "--allow_weak_isolation") == 0
    assert verdicts()[0]["outcome"] == "passed"


def test_a_large_file_never_sits_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    judge_at_once(monkeypatch, "passed")
    row = json.dumps(RIGHT | {"code": "#" * 2000}) + "\n"
    with open("in.jsonl", "w") as file:
        for _ in range(10_000):
            file.write(row)
    assert execute("in.jsonl", "--output", "first.jsonl") == 0  # what is imported once is not counted
    tracemalloc.start()
    try:
        assert execute("in.jsonl", "--output", "out.jsonl") == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(verdicts()) == 10_000
    assert peak < 2 << 20 < os.path.getsize("in.jsonl") // 8


@pytest.mark.parametrize("ahead", [1, 5])
def test_stream_reads_at_most_as_many_programs_ahead_as_allowed(ahead: int) -> None:
    read = 0

    def programs() -> Iterator[Program]:
        nonlocal read
        for number in range(40):
            read += 1
            yield Program(f"def f(x): return x + {number % 2}", ("assert f(1) == 1",))

    distance = []
    with Sandbox(workers=2, allow_weak_isolation=True) as sandbox:
        for number, verdict in enumerate(sandbox.stream(programs(), ahead)):
            distance.append(read - number)
            assert verdict.outcome == ("failed" if number % 2 else "passed")
    assert len(distance) == 40 and max(distance) <= ahead


def test_stream_gives_the_verdicts_before_an_error_of_its_source() -> None:
    def programs() -> Iterator[Program]:
        yield from [Program(GOOD, tuple(TESTS))] * 3
        raise ZeroDivisionError

    seen: list[str] = []
    with Sandbox(workers=1, allow_weak_isolation=True) as sandbox:
        with pytest.raises(ZeroDivisionError):
            seen.extend(verdict.outcome for verdict in sandbox.stream(programs()))
        assert seen == ["passed"] * 3
        stopped = sandbox.stream(Program(GOOD, tuple(TESTS)) for _ in range(10**9))
        assert next(stopped).outcome == "passed"
        stopped.close()  # type: ignore[attr-defined]
        assert sandbox.run([Program(GOOD, tuple(TESTS))])[0].outcome == "passed"


def test_lines_are_counted_in_plain_files_only() -> None:
    write([RIGHT] * 3)
    assert count_lines("in.jsonl") == 3
    assert count_lines("-") is count_lines("/dev/zero") is None


SLOW = "def f(x):\n    while True: pass"


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_verdicts_so_far_are_kept_when_it_is_stopped(signal_number: signal.Signals, folder: Path) -> None:
    write([RIGHT] * 3 + [RIGHT | {"code": SLOW}] * 50)
    process = subprocess.Popen(
        [sys.executable, "-m", "coderl", "execute", "in.jsonl", "--output", "out.jsonl", "--timeout", "2"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment(),
    )
    wait_until(lambda: Path("out.jsonl").exists() and len(verdicts()) >= 3, process)
    os.killpg(process.pid, signal_number)
    _, err = process.communicate(timeout=30)
    found = verdicts()
    assert [row["outcome"] for row in found[:3]] == ["passed"] * 3 and len(found) < 53
    if signal_number == signal.SIGINT:
        (line,) = [line for line in err.splitlines() if not line.startswith(WARNING)]
        assert line == f"coderl: interrupted; {len(found)} verdicts in out.jsonl, --resume goes on from there"
        assert process.returncode == 1
    wait_until(lambda: not alive(process.pid))


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    started = time.monotonic()
    while not holds():
        assert process is None or process.poll() is None, process.communicate()[1]
        assert time.monotonic() - started < 30
        time.sleep(0.05)


def alive(group: int) -> bool:
    """Whether a process group still has members."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_it_ends_quietly_when_the_reader_of_its_output_closes(folder: Path) -> None:
    write([RIGHT] * 200)
    process = subprocess.Popen(
        [sys.executable, "-m", "coderl", "execute", "in.jsonl"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdout is not None and process.stderr is not None
    assert json.loads(process.stdout.readline())["id"] == "good"
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(30) == 1
    assert not [line for line in err.splitlines() if not line.startswith(WARNING)]
