"""Calls from the tests' process into the candidate's, in rpc grading.

The tests hold stubs (:class:`Remote`), the candidate's process holds the objects. What crosses is plain data
(:mod:`coderl.sandbox.inside.codec`) and numbers that stand for everything else: functions, instances,
iterators.

A call behaves as a direct one in this: positional and keyword arguments; mutable arguments change in place
as the callee changed them; a result that is one of the arguments is that very object; generators and
iterators are advanced one step at a time; an exception is raised again as the nearest builtin exception
class, with its arguments. It differs in this: nothing but a comparison of two of the candidate's own objects
is ever left to the candidate's ``__eq__``, and ``isinstance`` knows only plain data.
"""

from __future__ import annotations

import builtins
import operator
import os
from collections import deque
from typing import TYPE_CHECKING, Any

from .codec import CodecError, Limits, decode, encode
from .wire import frame, read_frame, write_all

if TYPE_CHECKING:
    from collections.abc import Callable

LIMITS = Limits(size=64 << 20, nodes=2_000_000, depth=200, hashed=1 << 20)
"""For what crosses: both sides run against the clock, so hash collisions cost no more than the budget."""

_OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda target, *args, **kwargs: target(*args, **kwargs),
    "iter": iter,
    "next": next,
    "len": len,
    "str": str,
    "getattr": getattr,
    "bool": bool,
    "getitem": operator.getitem,
    "setattr": setattr,
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
}
_MUTABLE = (list, dict, set, deque, bytearray)


class Gone(BaseException):
    """The candidate's process ended, or sent something that is not an answer.

    A BaseException, so that no test catches it by mistake.
    """


class Unfit(BaseException):
    """The tests pass an object of their own, which cannot cross."""


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
        self._objects: list[object] = []
        self._numbers: dict[int, int] = {}

    def serve(self) -> None:
        """Answer until the tests are through."""
        while True:
            try:
                request = self._socket.receive()
            except (EOFError, OSError):
                return
            try:
                reply = self._encode(self._answer(*decode(request, LIMITS, self._objects.__getitem__)))
            except (CodecError, RecursionError) as error:
                reply = self._encode(("lost", str(error), ()))
            self._socket.send(reply)

    def _encode(self, value: object) -> bytes:
        return encode(value, LIMITS, self._number)

    def _number(self, value: object) -> int:
        """The number that stands for an object; the object is kept, so that its identity stays taken."""
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._objects)
            self._objects.append(value)
        return self._numbers[id(value)]

    def _answer(
        self, operation: str, target: Any, args: list[Any], kwargs: dict[str, Any]
    ) -> tuple[str, Any, Any]:
        """``(kind, answer, changes)``; changes are the arguments that are not what they were."""
        given = [*args, *kwargs.values()]
        holders = (*_MUTABLE, tuple)
        before = [self._encode(value) if isinstance(value, holders) else b"" for value in given]
        try:
            if operation == "name":
                return "value", self._named(target), ()
            value = _OPERATIONS[operation](target, *args, **kwargs)
            same = next((at for at, one in enumerate(given) if one is value and before[at]), None)
            kind, answer = ("value", value) if same is None else ("same", same)
        except BaseException as error:
            # Names of the exception's classes, nearest first, and its arguments.
            kind, answer = "raised", ([kind.__name__ for kind in type(error).__mro__], list(error.args))
        changes = [
            (at, one) for at, one in enumerate(given) if before[at] and self._encode(one) != before[at]
        ]
        return kind, answer, changes

    def _named(self, name: str) -> Any:
        found = self._namespace.get(name, getattr(builtins, name, None))
        if found is None:
            raise NameError(f"name {name!r} is not defined")
        return found


class Remote:
    """Stands for an object in the candidate's process."""

    def __init__(self, client: Client, number: int) -> None:
        self._client = client
        self._number = number

    def _ask(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        return self._client.ask(operation, self, args, kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return self._ask("call", *args, **kwargs)

    def __iter__(self) -> Any:
        made = self._ask("iter")
        return made if isinstance(made, Remote) else iter(made)

    def __next__(self) -> Any:
        return self._ask("next")

    def __len__(self) -> int:
        return operator.index(self._ask("len"))

    def __getitem__(self, key: Any) -> Any:
        return self._ask("getitem", key)

    def __contains__(self, item: Any) -> bool:
        return any(
            each is item or each == item for each in self
        )  # decided here, not by the candidate's __contains__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            self._ask("setattr", name, value)

    def __bool__(self) -> bool:
        return self._ask("bool") is True

    def __str__(self) -> str:
        return str(self._ask("str"))

    def __hash__(self) -> int:
        return self._number

    def _compare(self, name: str, other: object) -> Any:
        return self._ask(name, other) is True if isinstance(other, Remote) else NotImplemented

    def __eq__(self, other: object) -> Any:
        return self._compare("eq", other)

    def __ne__(self, other: object) -> Any:
        return self._compare("ne", other)

    def __lt__(self, other: object) -> Any:
        return self._compare("lt", other)

    def __le__(self, other: object) -> Any:
        return self._compare("le", other)

    def __gt__(self, other: object) -> Any:
        return self._compare("gt", other)

    def __ge__(self, other: object) -> Any:
        return self._compare("ge", other)


class Named(Remote):
    """Stands for a global name of the candidate's; looked up when it is first used."""

    def __init__(self, client: Client, name: str) -> None:
        self._client = client
        self.__name__ = name

    def __getattr__(self, name: str) -> Any:
        if name == "_number":
            found = self._client.named(self.__name__)
            if not isinstance(found, Remote):
                raise TypeError(f"{type(found).__name__!r} object is not callable")
            self._number = found._number
            return self._number
        return super().__getattr__(name)


class Client:
    """The tests' side.

    Args:
        descriptor: The link.

    Attributes:
        failure: Why no further call can be made, or None. A test may have swallowed the exception.
        asked: Whether anything was asked at all.
    """

    def __init__(self, descriptor: int) -> None:
        self._socket = _Socket(descriptor)
        self._remotes: dict[int, Remote] = {}
        self.failure: Gone | Unfit | None = None
        self.asked = False

    def ask(self, operation: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Have an operation done on one of the candidate's objects.

        Raises:
            Gone: No answer will come.
            Unfit: An argument cannot cross.
            BaseException: What the operation raised.
        """
        if self.failure:
            raise self.failure
        self.asked = self.asked or operation != "name"
        try:
            request = encode((operation, target, list(args), kwargs), LIMITS, self._known)
            self._socket.send(request)
            reply = decode(self._socket.receive(), LIMITS, self._remote)
        except Unfit as unfit:
            # What the candidate answered must not choose the grading: a list it should have answered would
            # have been asked here, and nothing would cross.
            asked = operation == "call" and isinstance(target, Named)
            self.failure = unfit if asked else Gone(f"{unfit} to what is not plain data")
            raise self.failure from None
        except (Gone, EOFError, OSError, CodecError) as error:
            self.failure = error if isinstance(error, Gone) else Gone(str(error))
            raise self.failure from None
        try:
            return self._result(operation, reply, [*args, *kwargs.values()])
        except Gone as gone:
            self.failure = gone
            raise

    def named(self, name: str) -> Any:
        """A global of the candidate's, or a builtin as the candidate sees it: plain data, or a stub.

        Raises:
            NameError: There is none.
        """
        found = self.ask("name", name, (), {})
        self.asked = self.asked or not isinstance(found, Remote)
        return found

    def _known(self, value: object) -> int:
        if isinstance(value, Remote):
            return value._number
        name = getattr(value, "__name__", None)
        if isinstance(name, str) and getattr(builtins, name, None) is value:
            return Named(self, name)._number  # such as int or len, which are there as well
        if isinstance(value, BaseException) or __name__ in (
            getattr(value, "__module__", ""),
            type(value).__module__,
        ):
            # The candidate may have raised it or brought it about, such as the type of a Remote, and must not
            # choose the grading.
            raise Gone("the tests pass an exception, or a part of a stub")
        raise Unfit(f"the tests pass a {type(value).__name__}")

    def _remote(self, number: int) -> Remote:
        return self._remotes.setdefault(number, Remote(self, number))

    def _result(self, operation: str, reply: Any, given: list[Any]) -> Any:
        if not (type(reply) is tuple and len(reply) == 3):
            raise Gone("not an answer")
        kind, answer, changes = reply
        try:
            for at, changed in changes:
                _merged(given[at], changed)
            if kind == "value":
                return answer
            if kind == "same":
                return given[answer]
            if kind == "lost":
                raise _Raised(ValueError(f"the answer cannot be carried: {answer}"))
            if kind == "raised":
                names, arguments = answer
                raise _Raised(_exception(operation, names, arguments))
        except (TypeError, ValueError, LookupError):
            raise Gone("not an answer") from None
        except _Raised as raised:
            error = raised.error
        else:
            raise Gone("not an answer")
        raise error


class _Raised(Exception):
    """Carries what the candidate raised past our own handlers."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def _exception(operation: str, names: list[str], arguments: list[Any]) -> BaseException:
    """The nearest builtin exception, with the arguments it was raised with.

    Only advancing an iterator may raise StopIteration: raised by a call, it would end a loop of the tests.
    """
    if operation != "next" and {"StopIteration", "StopAsyncIteration"} & set(names):
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
