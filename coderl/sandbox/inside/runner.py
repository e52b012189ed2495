"""Runs a candidate and its tests: the jailed side, which lives in the run's child beside untrusted code.

The trusted side believes nothing of it except what it can check: in sealed grading the answers themselves,
in inline grading records that carry a token read before the candidate ran. In rpc grading a run of its own
holds the tests and no candidate, and its records can be believed.
"""

from __future__ import annotations

import ast
import importlib
import io
import marshal
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

from .codec import TRUSTED, CodecError, decode
from .rpc import Client, Named, Server, Unfit
from .wire import Record, pack_record, read_frame, write_all

if TYPE_CHECKING:
    from collections.abc import Callable

    Send = Callable[[Record | bytes], None]

_SHORT = 64
"""Bytes of bytecode under which a module may be nothing but a docstring."""


def serve(descriptor: int, link: int) -> None:
    """Read one payload, run it, and answer on the same descriptor.

    Args:
        descriptor: The run's socket.
        link: In rpc grading, the socket between the candidate's run and the tests'.
    """

    def send(record: Record | bytes) -> None:
        write_all(descriptor, record if isinstance(record, bytes) else pack_record(record))

    send(Record("ready"))
    payload = decode(read_frame(lambda count: os.read(descriptor, count)), TRUSTED)
    warnings.simplefilter("ignore")
    if payload["role"] == "tests":
        run_tests_remotely(Client(link), payload, send)
        return
    if payload.get("harness"):
        look_like_the_harness(payload["code"])
    namespace: dict[str, Any] = {}
    outcome, message = define(payload["code"], payload.get("setup", ""), namespace)
    if outcome:
        send(Record("refused", value=(outcome, message)))
        return
    send(Record("defined"))
    if payload["role"] == "candidate":
        Server(link, namespace).serve()
    elif payload["role"] == "inline":
        run_inline(payload["tests"], payload["canaries"], namespace, payload.pop("token"), send)
    else:
        run_sealed(payload["steps"], namespace, send)


class _Swallow(io.StringIO):
    """A stream that discards what is written and cannot be read, as programs have in the harness."""

    def write(self, text: str, /) -> int:
        return len(text) if isinstance(text, str) else super().write(text)

    def read(self, *_: Any) -> str:
        raise OSError

    readline = readlines = read  # type: ignore[assignment]

    def readable(self) -> bool:
        return False


_TAKEN_AWAY = {
    "builtins": "exit quit help",
    "os": "kill system putenv remove removedirs rmdir fchdir setuid fork forkpty killpg rename renames "
    "truncate replace unlink fchmod fchown chmod chown chroot lchflags lchmod lchown getcwd chdir",
    "shutil": "rmtree move chown",
    "subprocess": "Popen",
}
_NO_MODULES = ("ipdb", "joblib", "resource", "psutil", "tkinter")


def look_like_the_harness(code: str) -> None:
    """Change streams and builtins as bigcode-evaluation-harness does, where that can decide a verdict.

    Its ``reliability_guard`` puts None in the place of what it names. Here that guards nothing (the jail
    does), but a program that calls ``os.getcwd`` fails there.
    """
    sys.stdin, sys.stdout, sys.stderr = _Swallow(), _Swallow(), _Swallow()
    if "tempfile" in code:  # the harness has used tempfile by now, which remembers its folder
        importlib.import_module("tempfile").gettempdir()
    for name, attributes in _TAKEN_AWAY.items():
        # Importing them takes longer than most runs; few programs would notice. (tempfile is shutil's user.)
        if name in sys.modules or any(word in code for word in ("shutil", "subprocess", "tempfile")):
            module = importlib.import_module(name)
            for attribute in attributes.split():
                setattr(module, attribute, None)
    for name in _NO_MODULES:
        sys.modules[name] = None  # type: ignore[assignment]


def describe(error: BaseException) -> str:
    """The error's type and the head of its text, as one line."""
    try:
        text = str(error)[:200]
    except Exception:
        text = ""
    return f"{type(error).__name__}: {text}".strip(": ")


def define(code: str, setup: str, namespace: dict[str, Any]) -> tuple[str, str]:
    """Run the candidate, then the setup. Returns an outcome and a message, both empty without an error."""
    try:
        program = compile(code, "<candidate>", "exec", dont_inherit=True)
        if len(program.co_code) < _SHORT and not _has_statement(code):
            return "no_code", "the program has no statement"
    except (SyntaxError, ValueError) as error:  # ValueError: null bytes, lone surrogates
        return "syntax_error", describe(error)
    except (RecursionError, MemoryError, OverflowError) as error:
        return "error", f"the parser gave up: {describe(error)}"
    try:
        exec(program, namespace)
        if setup:
            exec(compile(setup, "<setup>", "exec", dont_inherit=True), namespace)
    except MemoryError as error:
        return "out_of_memory", describe(error)
    except BaseException as error:
        return "error", describe(error)
    return "", ""


def _has_statement(code: str) -> bool:
    body = ast.parse(code).body
    return any(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in body)


def run_sealed(steps: list[bytes], namespace: dict[str, Any], send: Send) -> None:
    """Send the value of each step's expression; the trusted side compares."""
    for code in steps:
        try:
            value = eval(marshal.loads(code), namespace)
            packed = pack_record(Record("value", value=value))  # may raise: it may be too large to carry
        except BaseException as error:
            packed = pack_record(Record("raised", value=_failure(error)))
        send(packed)
    send(Record("end"))


def _failure(error: BaseException) -> tuple[str, str]:
    if isinstance(error, CodecError):
        return "failed", f"the answer cannot be carried: {error}"
    return ("out_of_memory" if isinstance(error, MemoryError) else "failed"), describe(error)


def run_inline(
    tests: list[str], canaries: list[str], namespace: dict[str, Any], token: bytes, send: Send
) -> None:
    """Run the tests beside the candidate, then the canaries, each of which must raise."""
    passed = 0
    for source in tests:
        failure = _attempt(source, namespace)
        passed += failure is None
        send(Record("passed", token) if failure is None else Record("raised", token, failure))
    if passed == len(tests) and any(_attempt(source, namespace) is None for source in canaries):
        send(Record("raised", token, ("failed", "a false assert passes")))
        return
    send(Record("end", token))


def run_tests_remotely(client: Client, payload: dict[str, Any], send: Send) -> None:
    """Run trusted tests here, with stubs for what the candidate defines there (see :mod:`.rpc`)."""
    namespace: dict[str, Any] = {}
    broken = _attempt(payload["helpers"], namespace)
    namespace |= {name: importlib.import_module(name) for name in payload["modules"]}
    namespace |= {name: Named(client, name) for name in payload["names"]}
    try:
        namespace |= {name: client.named(name) for name in payload["values"]}
    except BaseException as error:
        broken = _failure(error)
    broken = broken or _attempt(payload["setup"], namespace)
    for source in payload["tests"]:
        failure = broken or _attempt(source, namespace)
        if client.failure:
            kind = "unfit" if isinstance(client.failure, Unfit) else "gone"
            send(Record(kind, value=("failed", str(client.failure))))
            return
        send(Record("passed") if failure is None else Record("raised", value=failure))
    if not client.asked:
        send(Record("raised", value=("failed", "the tests never call it")))
    send(Record("end"))


def _attempt(source: str, namespace: dict[str, Any]) -> tuple[str, str] | None:
    try:
        exec(compile(source, "<test>", "exec", dont_inherit=True), namespace)
    except BaseException as error:
        return _failure(error)
    return None
