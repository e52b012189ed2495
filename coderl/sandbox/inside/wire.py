"""The messages between the trusted side, a lane's zygote, and a run's child.

Control socket (sequenced packets, trusted side and zygote): the lane's settings, answered by ``HELLO``; then
``JOB`` with one end of a fresh socket pair, answered by ``DONE`` after everything the run started is dead.
``STOP`` may come in between. In rpc grading a job brings an end of a second pair, the link between two runs.
Run socket (stream, trusted side and child): one frame with the payload in, frames of records out. The zygote
never reads it, so that no child can find an earlier run's tests in memory it shares with the zygote.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .codec import SENT, CodecError, Limits, Opaque, decode, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HELLO = struct.Struct(">4sI")  # b"hey!", user id of the runs
JOB = struct.Struct(">IddQI")  # run number, seconds, processor seconds, bytes of address space, tasks
STOP = struct.Struct(">I")  # number of the run that need not go on
DONE = struct.Struct(">IBiddId")
"""Run number, how it ended, exit status or -signal, seconds, processor seconds, times that it gave way, and
seconds by which the lane itself woke up late."""
LENGTH = struct.Struct(">I")
GREETING = b"hey!"
EXITED, TIMED_OUT, NOT_STARTED, STOPPED, FILLED = range(5)
SETTINGS_LIMIT = 1 << 17
"""Bytes of a lane's settings, which are one packet."""

OUTPUT_LIMIT = 16 << 20
"""Bytes that one run may answer with, all records together."""

_RECORD = Limits(size=OUTPUT_LIMIT, nodes=4, depth=1)
_CLAIM = Limits(size=4_096, nodes=4, depth=1)
"""What of a record is decoded at once is small; the rest is left to whoever knows what there can be."""

Kind = Literal["ready", "broken", "refused", "defined", "values", "raised", "passed", "outer", "gone", "end"]


class Record(NamedTuple):
    """One message of a child.

    Attributes:
        kind: A :data:`Kind`. ``ready`` and ``broken`` come before the candidate has run, so they can be
            believed; everything after them comes from a process that the candidate shares.
        token: Proof, of a kind, that the record comes from the runner.
        value: ``(outcome, message)``; or, still encoded, answers (``values``) and closed sides (``outer``).
    """

    kind: str
    token: bytes = b""
    value: Any = None


def frame(body: bytes) -> bytes:
    """The body with its length in front."""
    return LENGTH.pack(len(body)) + body


def pack_record(record: Record) -> bytes:
    """One record as a frame.

    Raises:
        CodecError: Its value is too large.
    """
    return frame(encode((record.kind, record.token, encode(record.value, SENT)), SENT))


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of it, in as many pieces as the other side takes it."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def read_frame(read: Callable[[int], bytes]) -> bytes:
    """One frame's body.

    Args:
        read: Gives at most that many bytes, and none at the end, as ``os.read`` on one descriptor does.
    """
    (length,) = LENGTH.unpack(_read_exactly(read, LENGTH.size))
    return _read_exactly(read, length)


def _read_exactly(read: Callable[[int], bytes], count: int) -> bytes:
    parts: list[bytes] = []
    while count:
        part = read(min(count, 1 << 20))
        if not part:
            raise EOFError("the other side closed the socket")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def records(data: bytes) -> Iterator[Record]:
    """The well-formed records at the head of the data; what follows the first malformed one is dropped."""
    at = 0
    while at + LENGTH.size <= len(data):
        (length,) = LENGTH.unpack_from(data, at)
        at += LENGTH.size
        if at + length > len(data):
            return
        try:
            fields = decode(data[at : at + length], _RECORD)
        except CodecError:
            return
        if not (type(fields) is tuple and tuple(map(type, fields)) == (str, bytes, bytes)):
            return
        kept = fields[0] in ("values", "outer")
        yield Record(fields[0], fields[1], fields[2] if kept else _answer(fields[2]))
        at += length


def _answer(data: bytes) -> Any:
    """A record's value; one that cannot be read is equal to nothing, and costs only itself."""
    try:
        return decode(data, _CLAIM)
    except CodecError:
        return Opaque()
