"""Checks of the sandbox: its tier, the means of isolation, verdicts, and containment of hostile programs."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from coderl.commands.doctor.check import Check, Status
from coderl.sandbox import Program, Sandbox
from coderl.sandbox.probe import ALLOWED, weak_isolation_allowed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coderl.sandbox.jail import Jail
    from coderl.types import Execution

FIX_TIER = (
    "fix what is marked below; or, where nothing on this machine is worth protecting, accept it with "
    f"{ALLOWED}=1 or allow_weak_isolation"
)
FIX_SANDBOX = "this should not happen: do not train with it, and report the line above"
TESTS = ("assert f(2) == 4", "assert f(3) == 9")
_SOCKET = """
import socket
def attack():
    with socket.create_connection(("127.0.0.1", {port}), timeout=2) as found:
        return found.recv(64).decode()
"""
_PROCESS = """
import os
def attack():
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, b"{secret}")
        os._exit(0)
    return os.read(read, 64).decode()
"""
_FILE = """
def attack():
    with open({path!r}) as file:
        return file.read()
"""


def checks() -> Iterator[Check]:
    """Checks of the sandbox, each by using it."""
    with Sandbox(workers=1, timeout=10.0, allow_weak_isolation=True) as sandbox:
        try:
            jail = sandbox.jail
        except Exception as error:  # trying the means of isolation may fail in any way
            yield Check("isolation", "fail", f"cannot be found out: {error}", FIX_SANDBOX)
            return
        yield tier(jail)
        yield from primitives(jail)
        with _without_warnings():
            yield from trials(sandbox)


def tier(jail: Jail) -> Check:
    """The isolation tier, and whether training may run in it."""
    data = {"tier": jail.tier}
    detail = f"tier {jail.tier}: {jail.reason}"
    if jail.tier == "C":
        return Check("isolation", _weak(), detail, FIX_TIER, data)
    return Check("isolation", "ok", detail, data=data)


def primitives(jail: Jail) -> Iterator[Check]:
    """Each means of isolation, as the sandbox found it by using it."""
    for found in jail.primitives:
        status: Status = "ok" if found.works else "warn"
        yield Check(found.name, status, found.detail, data={"works": found.works})


def _weak() -> Status:
    """The status of isolation that protects nothing: a failure, unless the user has allowed it."""
    return "warn" if weak_isolation_allowed() else "fail"


def trials(sandbox: Sandbox) -> Iterator[Check]:
    """Run a right program, a wrong one, and hostile ones that pass if their attack succeeds."""
    try:
        yield verdicts(*sandbox.run([Program(f"def f(x): return x {sign} x", TESTS) for sign in "*+"]))
        with attacks() as programs:
            results = dict(zip(programs, sandbox.run(list(programs.values())), strict=True))
    except Exception as error:
        yield Check("verdicts", "fail", f"the sandbox cannot run: {error}", FIX_SANDBOX)
        return
    yield containment(results, sandbox.tier)


def verdicts(good: Execution, wrong: Execution) -> Check:
    """Whether the right program passed, and the wrong one only its first test."""
    found = [(run.outcome, run.passed) for run in (good, wrong)]
    milliseconds = 1000 * good.seconds
    if found == [("passed", 2), ("failed", 1)]:
        detail = f"a right program passes, a wrong one fails ({milliseconds:.0f} ms)"
        return Check("verdicts", "ok", detail, data={"milliseconds": round(milliseconds, 1)})
    said = "; ".join(f"{run.outcome} {run.passed}/{run.total} {run.message}".strip() for run in (good, wrong))
    return Check("verdicts", "fail", f"a right and a wrong program got: {said}", FIX_SANDBOX)


def containment(results: dict[str, Execution], tier: str) -> Check:
    """Whether every attack was stopped; in tier C they are not expected to be."""
    open_holes = [name for name, run in results.items() if run.outcome == "passed"]
    unknown = [name for name, run in results.items() if run.outcome == "infra_error"]
    data = {name: run.outcome for name, run in results.items()}
    if open_holes:
        status, fix = (_weak(), FIX_TIER) if tier == "C" else ("fail", FIX_SANDBOX)
        return Check("containment", status, f"programs can {', '.join(open_holes)}", fix, data)
    if unknown:
        return Check("containment", "fail", f"no answer to: {', '.join(unknown)}", FIX_SANDBOX, data)
    return Check("containment", "ok", f"programs cannot {', '.join(results)}", data=data)


@contextmanager
def attacks() -> Iterator[dict[str, Program]]:
    """Programs that pass only if their attack succeeds, by what the attack does.

    Each has to return a secret that only a successful attack can get: from a listening socket, from a child
    process, or from a file that every user may read.
    """
    secret = secrets.token_hex(16)
    folder = tempfile.mkdtemp(prefix="coderl-doctor-")
    os.chmod(folder, 0o755)  # open to all users: it is isolation, not ownership, that has to stop the program
    path = Path(folder, "secret")
    path.write_text(secret)
    path.chmod(0o644)
    expected = (f"assert attack() == {secret!r}",)
    with _listener(secret) as port:
        try:
            yield {
                "open sockets": Program(_SOCKET.format(port=port), expected),
                "start processes": Program(_PROCESS.format(secret=secret), expected),
                "read files": Program(_FILE.format(path=str(path)), expected),
            }
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _listener(secret: str) -> Iterator[int]:
    """A local port that sends the secret to whoever connects first."""
    import threading

    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            try:
                with server.accept()[0] as caller:
                    caller.sendall(secret.encode())
            except OSError:  # the server was shut down before anything connected
                return

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)  # wakes the thread, which closing would not
            thread.join(1.0)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence the sandbox's warning about tier C inside the block: the table says the same."""
    logger = logging.getLogger("coderl.sandbox")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
