"""Runs a candidate and its tests: the jailed side, which lives in the run's child beside untrusted code.

The trusted side believes nothing of it except what it can check: in sealed grading the answers themselves,
in inline grading records that carry a token read before the candidate ran. In rpc grading a run of its own
holds the tests and no candidate, and its records can be believed.
"""

from __future__ import annotations

import ast
import importlib
import io
import itertools
import marshal
import os
import sys
import warnings
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .codec import SENT, TRUSTED, CodecError, Elements, Opaque, decode, encode
from .outer import run_outer
from .rpc import Client, Function, Server
from .wire import Record, pack_record, read_frame, write_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import CodeType

    Send = Callable[[Record], None]

_PLAIN_DATA = (str, bytes, bytearray, list, tuple, dict, set, frozenset, range, deque)
_MOST_ELEMENTS = 200_000
_IN_ORDER = replace(SENT, ordered=SENT.nodes)
_CLASSES_OF = type.__dict__["__mro__"].__get__
_SHORT = 200
"""Characters up to which an answer is looked at, whether it does anything."""


def serve(descriptor: int, link: int) -> None:
    """Read one payload, run it, and answer on the same descriptor.

    Args:
        descriptor: The run's socket.
        link: In rpc grading, the socket between the candidate's run and the tests'.
    """

    def send(record: Record) -> None:
        write_all(descriptor, pack_record(record))

    send(Record("ready"))
    payload = decode(read_frame(lambda count: os.read(descriptor, count)), TRUSTED)
    warnings.simplefilter("ignore")
    if payload["role"] == "tests":
        run_tests_remotely(Client(link), payload, send)
        return
    if payload["role"] == "outer":
        send(Record("outer", value=run_outer(payload["source"], payload["answers"])))
        return
    if "random" in payload["code"]:
        reseed()
    if payload.get("harness"):
        look_like_the_harness(payload["code"])
    namespace: dict[str, Any] = {}
    setup: Any = payload.get("setup", "")
    if "inner" in payload:
        setup, payload["tests"], payload["inputs"] = decode(payload.pop("inner"), TRUSTED)
        setup = marshal.loads(setup) if setup else ""
    outcome, message = define(payload["code"], setup, namespace, payload.get("given", ""))
    if outcome:
        send(Record("refused", value=(outcome, message)))
        return
    send(Record("defined"))
    if payload["role"] == "candidate":
        Server(link, namespace).serve()
    elif payload["role"] == "inline":
        run_inline(payload["tests"], payload["canaries"], namespace, payload.pop("token"), send)
    else:
        run_inner(payload, namespace, send)


def reseed() -> None:
    """Give the run random numbers of its own: the modules' state is the lane's, and the same for all runs."""
    for name in ("random", "numpy.random"):
        if name in sys.modules:
            sys.modules[name].seed()


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


def define(code: str, setup: str | CodeType, namespace: dict[str, Any], given: str = "") -> tuple[str, str]:
    """Run the candidate, then the setup, as source or bytecode.

    Returns:
        An outcome and a message, both empty without an error.
    """
    try:
        program = compile(code, "<candidate>", "exec", dont_inherit=True)
        if adds_nothing(code, given):
            return "no_code", "the program has no statement" if not given else "the answer adds no statement"
    except (SyntaxError, ValueError) as error:  # ValueError: null bytes, lone surrogates
        return "syntax_error", describe(error)
    except (RecursionError, MemoryError, OverflowError) as error:  # it is nested too deeply
        return "syntax_error", f"the parser gave up: {describe(error)}"
    try:
        exec(program, namespace)
        if setup:
            if isinstance(setup, str):
                setup = compile(setup, "<setup>", "exec", dont_inherit=True)
            exec(setup, namespace)
    except MemoryError as error:
        return "out_of_memory", describe(error)
    except BaseException as error:
        return "error", describe(error)
    return "", ""


def adds_nothing(code: str, given: str) -> bool:
    """Whether a program is what was given, and nothing that does anything.

    Args:
        code: The program.
        given: What it begins with, such as a prompt; it may break off within a function, or be plain words.
    """
    added = len(code) - len(given)
    if added > _SHORT:
        return False
    body = _doing(ast.parse(code).body)
    begun: list[ast.stmt] = []
    for start in (f"{given}\n    pass", given):
        try:
            begun = _doing(ast.parse(start).body)
            break
        except (SyntaxError, ValueError):
            continue
    # In chat form an answer without code leaves the first part of a prompt, such as its imports, or nothing.
    return list(map(ast.dump, body)) == list(map(ast.dump, begun[: len(body)]))


def _doing(body: list[ast.stmt]) -> list[ast.stmt]:
    """The statements that do something, in functions as well."""
    found = [
        node
        for node in body
        if not isinstance(node, ast.Pass)
        and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    ]
    for node in found:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            node.body = _doing(node.body)
    return found


class Inner:
    """The names that an inner program calls (see :mod:`coderl.sandbox.checks.cut`)."""

    def __init__(self, send: Send, token: bytes, inputs: dict[str, list[list[bytes]]]) -> None:
        self._send = send
        self._token = token
        self._starts = {place: iter(starts) for place, starts in inputs.items()}
        self._given = {place: iter(starts[0]) for place, starts in inputs.items() if starts}
        self._values: list[bytes] = []

    def names(self) -> dict[str, Callable[..., Any]]:
        """What the program finds under which name."""
        return {
            "__send__": self.value,
            "__done__": self.done,
            "__fail__": self.fail,
            "__inputs__": self.inputs,
            "__given__": self.given,
        }

    def value(self, value: Any, how: str) -> None:
        """The value of an open side; it is encoded at once, for it may change."""
        if how == "truth":
            value = bool(value)
        elif how == "elements" and not isinstance(value, _PLAIN_DATA):
            if type(value).__module__ != "numpy" and hasattr(type(value), "__iter__"):
                value = Elements(itertools.islice(value, _MOST_ELEMENTS))
                if len(value) == _MOST_ELEMENTS:
                    value = Opaque()
        elif how == "type":
            value = list(_CLASSES_OF(type(value)))
        elif how == "constant" and not (value is None or value is ... or isinstance(value, type)):
            value = value if value is True or value is False else Opaque()
        # Where a dict is gone through, its order tells.
        self._values.append(encode(value, _IN_ORDER if how == "elements" else SENT))

    def done(self, _: int) -> None:
        """A test has come to its end."""
        values, self._values = self._values, []
        self._send(Record("values", self._token, values))

    def fail(self, _: int, error: BaseException) -> None:
        """A test has raised."""
        self._values = []
        self._send(Record("raised", self._token, _failure(error)))

    def given(self, place: str) -> Any:
        """What the program is given at a place, each time that it comes there."""
        return decode(next(self._given[place]), TRUSTED)

    def inputs(self, place: str) -> Iterator[Any]:
        """What a loop goes through, each time that it starts."""
        for data in next(self._starts[place]):
            yield decode(data, TRUSTED)


def run_inner(payload: dict[str, Any], namespace: dict[str, Any], send: Send) -> None:
    """Run the tests' inner program; the trusted side compares."""
    token = payload.pop("token")
    inner = Inner(send, token, payload["inputs"])
    namespace |= inner.names()
    for number, code in enumerate(payload["tests"]):
        try:
            exec(marshal.loads(code), namespace)
        except BaseException as error:
            inner.fail(number, error)
    send(Record("end", token))


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
    """Run trusted tests here, with stubs for the functions of the candidate there (see :mod:`.rpc`)."""
    namespace: dict[str, Any] = {}
    broken = _attempt(payload["helpers"], namespace)
    namespace |= {name: Function(client, name) for name in payload["names"]}
    broken = broken or _attempt(payload["setup"], namespace)
    for source in payload["tests"]:
        failure = broken or _attempt(source, namespace)
        if client.failure:
            send(Record("gone", value=("failed", str(client.failure))))
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
