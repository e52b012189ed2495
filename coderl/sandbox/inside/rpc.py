"""Calls from the tests' process into the candidate's, in rpc grading.

The tests hold a stub (:class:`Function`) for each function of the program that they call, the candidate's
process holds the functions. Arguments and answers cross as plain data (:mod:`coderl.sandbox.inside.codec`);
what is none comes as an object that equals nothing. Mutable arguments change in place as the callee changed
them, a result that is one of the arguments is that very object, and an exception is raised again as the
nearest builtin exception.
"""

from __future__ import annotations

import builtins
import os
from collections import deque
from typing import Any

from .codec import CodecError, Limits, decode, encode
from .wire import frame, read_frame, write_all

LIMITS = Limits(size=64 << 20, nodes=2_000_000, depth=200, hashed=1 << 20, ordered=1 << 30)
"""For what crosses: both sides run against the clock, so hash collisions cost no more than the budget."""

_MUTABLE = (list, dict, set, deque, bytearray)
_HOLDERS = (*_MUTABLE, tuple)


class Gone(BaseException):
    """The candidate's process ended, or sent something that is not an answer.

    A BaseException, so that no test catches it by mistake.
    """


class _Socket:
    """Frames both ways on one descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def send(self, body: bytes) -> None:
        write_all(self.descriptor, frame(body))

    def receive(self) -> bytes:
        return read_frame(lambda count: os.read(self.descriptor, count))


class Server:
    """The candidate's side.

    Args:
        descriptor: The link.
        namespace: The candidate's globals.
    """

    def __init__(self, descriptor: int, namespace: dict[str, Any]) -> None:
        self._socket = _Socket(descriptor)
        self._namespace = namespace

    def serve(self) -> None:
        """Answer until the tests are through."""
        while True:
            try:
                request = self._socket.receive()
            except (EOFError, OSError):
                return
            try:
                reply = encode(self._answer(*decode(request, LIMITS)), LIMITS)
            except (CodecError, RecursionError) as error:
                reply = encode(("lost", str(error), ()), LIMITS)
            self._socket.send(reply)

    def _answer(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> tuple[str, Any, Any]:
        """``(kind, answer, changes)``; changes are the arguments that are not what they were."""
        given = [*args, *kwargs.values()]
        before = [encode(one, LIMITS) if isinstance(one, _HOLDERS) else b"" for one in given]
        try:
            if name not in self._namespace:
                raise NameError(f"name {name!r} is not defined")
            value = self._namespace[name](*args, **kwargs)
            same = next((at for at, one in enumerate(given) if one is value and before[at]), None)
            kind, answer = ("value", value) if same is None else ("same", same)
        except BaseException as error:
            # Names of the exception's classes, nearest first, and its arguments.
            kind, answer = "raised", ([kind.__name__ for kind in type(error).__mro__], list(error.args))
        changes = [
            (at, one) for at, one in enumerate(given) if before[at] and encode(one, LIMITS) != before[at]
        ]
        return kind, answer, changes


class Function:
    """Stands for a function of the candidate's."""

    def __init__(self, client: Client, name: str) -> None:
        self._client = client
        self.__name__ = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return self._client.call(self.__name__, args, kwargs)


class Client:
    """The tests' side.

    Args:
        descriptor: The link.

    Attributes:
        failure: Why no further call can be made, or None. A test may have swallowed the exception.
        asked: Whether anything was called at all.
    """

    def __init__(self, descriptor: int) -> None:
        self._socket = _Socket(descriptor)
        self.failure: Gone | None = None
        self.asked = False

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call one of the candidate's functions.

        Raises:
            Gone: No answer will come.
            BaseException: What the call raised.
        """
        if self.failure:
            raise self.failure
        self.asked = True
        try:
            self._socket.send(encode((name, list(args), kwargs), LIMITS))
            reply = decode(self._socket.receive(), LIMITS)
            if not (type(reply) is tuple and len(reply) == 3):
                raise Gone("not an answer")
            error, value = _result(*reply, [*args, *kwargs.values()])
        except (Gone, EOFError, OSError, CodecError) as gone:
            self.failure = gone if isinstance(gone, Gone) else Gone(str(gone))
            raise self.failure from None
        if error is not None:
            raise error
        return value


def _result(kind: Any, answer: Any, changes: Any, given: list[Any]) -> tuple[BaseException | None, Any]:
    """What a call raised, or what it returned; its arguments are changed as it changed them."""
    try:
        for at, changed in changes:
            _merged(given[at], changed)
        if kind == "value":
            return None, answer
        if kind == "same":
            return None, given[answer]
        if kind == "lost":
            return ValueError(f"the answer cannot be carried: {answer}"), None
        if kind == "raised":
            names, arguments = answer
            return _exception(names, arguments), None
    except (TypeError, ValueError, LookupError):
        pass
    raise Gone("not an answer")


def _exception(names: list[str], arguments: list[Any]) -> BaseException:
    """The nearest builtin exception, with the arguments it was raised with."""
    if {"StopIteration", "StopAsyncIteration"} & set(names):  # it would end a loop of the tests
        return RuntimeError("a call raised StopIteration")
    for name in names:
        kind = getattr(builtins, name, None) if isinstance(name, str) else None
        if isinstance(kind, type) and issubclass(kind, BaseException):
            try:
                return kind(*arguments)
            except Exception:  # UnicodeDecodeError and its like want arguments of their own
                continue
    return Exception(*arguments)


def _become(old: Any, new: Any) -> None:
    """Change a container in place into what its copy has become, and those within it likewise."""
    if type(old) is not type(new):
        raise TypeError("an argument cannot change its type")
    if isinstance(old, (set, bytearray)):
        old.clear()
        old.update(new) if isinstance(old, set) else old.extend(new)
    elif isinstance(old, dict):
        merged = {key: _merged(old.get(key), value) for key, value in new.items()}
        old.clear()
        old.update(merged)
    elif isinstance(old, (list, deque)):
        items = list(old)
        merged_items = [
            _merged(items[at] if at < len(items) else None, value) for at, value in enumerate(new)
        ]
        old.clear()
        old.extend(merged_items)


def _merged(old: Any, new: Any) -> Any:
    if type(old) is type(new) is tuple and len(old) == len(new):
        items = tuple(_merged(*both) for both in zip(old, new, strict=True))
        return old if all(item is one for item, one in zip(items, old, strict=True)) else items
    if type(old) is type(new) and isinstance(old, _MUTABLE):
        _become(old, new)
        return old
    return new
