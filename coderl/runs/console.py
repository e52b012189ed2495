"""What a run prints, kept in its folder as ``console.log``: of a progress bar the last state."""

from __future__ import annotations

import errno
import itertools
import os
import re
import shlex
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from coderl import __version__
from coderl.errors import UserError
from coderl.runs.folder import RunFolder

_TOKEN = re.compile(
    r"\r?\n|\r|\x1b\[A|\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07\x1b\r\n]*(?:\x07|\x1b\\)|[^\r\n\x1b]+|\x1b"
)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_DEEPEST = 32
"""Rows that a bar may still come back to; those above are final."""


@dataclass
class _Row:
    text: str = ""
    bar: bool = False

    @property
    def label(self) -> str:
        """What a bar is called: ``Epoch 0`` of ``Epoch 0:  50%|...``."""
        return self.text.partition(":")[0].strip()

    @property
    def percent(self) -> int:
        """How far a bar is; 0 where it does not say."""
        found = re.search(r"(\d+)%", self.text)
        return int(found[1]) if found else 0

    def written(self) -> Iterator[str]:
        """The row as a line, if it says anything: no bar that has not begun."""
        if self.text.strip() and not (self.bar and "| 0/" in self.text):
            yield self.text.rstrip()


class Transcript:
    r"""Turns what is written to a terminal into lines: as much of one as progress bars need.

    Bars go back to the start of their line with ``\r``, and nested ones down with ``\n`` and up again with
    ``ESC [ A``. A bar is a line once it is cleared or begins anew, another takes its place or text follows
    below. Text that is printed while a bar is up gets a line of its own. Colours are left out.
    """

    def __init__(self) -> None:
        self._rows, self._at = [_Row()], 0
        self._returned = False
        self._beside = ""
        self._displaced: dict[str, _Row] = {}

    def feed(self, text: str) -> Iterator[str]:
        """The lines that are final with ``text``."""
        for token in _TOKEN.findall(text):
            if token == "\r":
                self._returned = True
            elif token.endswith("\n"):
                yield from self._newline()
            elif token == "\x1b[A":
                self._at, self._returned = max(self._at - 1, 0), False
            elif not token.startswith("\x1b"):
                yield from self._text(token)
        row = self._rows[self._at]
        if self._returned and not row.text:  # a bar has cleared its line: whatever comes need not be a bar
            row.bar = self._returned = False

    def done(self) -> Iterator[str]:
        """Bars above the cursor that are at their end: final once another stream goes on."""
        for row in self._rows[: self._at]:
            if row.percent == 100:
                yield from row.written()
                row.text = ""

    def close(self) -> Iterator[str]:
        """What was not final so far."""
        for row in [*self._displaced.values(), *self._rows, _Row(self._beside)]:
            yield from row.written()
        self.__init__()  # type: ignore[misc]

    def _text(self, text: str) -> Iterator[str]:
        row = self._rows[self._at]
        if self._returned:
            self._returned = False
            yield from self._draw(row, _Row(text, bar=True))
        elif row.bar:
            self._beside += text
        else:
            row.text += text

    def _draw(self, row: _Row, new: _Row) -> Iterator[str]:
        """A bar in place of what was in its row."""
        if not new.text.strip():
            yield from self._flushed(row)
            new = _Row(bar=True)
        elif row.label == new.label:
            if new.percent < row.percent:
                yield from row.written()
        else:
            if new.label not in self._displaced:
                yield from self._flushed()
            self._displaced.pop(new.label, None)
            for other in self._rows:  # a nested bar that is done moves up into the row of the bar around it
                if other.label == new.label and other.percent <= new.percent:
                    other.text = ""
            if row.text.strip():
                self._displaced[row.label] = _Row(row.text, row.bar)
        self._rows[self._at] = new

    def _newline(self) -> Iterator[str]:
        row, self._returned = self._rows[self._at], False
        if self._beside:
            yield self._beside
            self._beside = ""
        elif row.bar or (self._at and not row.text):  # down to a nested bar, or from a finished one
            self._at += 1
            if self._at == len(self._rows):
                self._rows.append(_Row())
            if self._at > _DEEPEST:
                self._at -= 1
                yield from self._rows.pop(0).written()
        else:
            yield from self._flushed(*self._rows[: self._at])
            yield row.text
            self._rows[: self._at + 1] = [_Row()]
            self._at = 0

    def _flushed(self, *rows: _Row) -> Iterator[str]:
        """Bars that others took the place of and that have not come back, then these."""
        displaced, self._displaced = self._displaced.values(), {}
        for row in [*displaced, *rows]:
            yield from row.written()


class ConsoleLog:
    """While it is open, what Python code writes to stdout and stderr is also appended to ``console.log``.

    The streams stay what they are: their ``write`` is replaced, so that handlers of :mod:`logging` and bars
    that hold them are heard, and ``isatty`` and ``fileno`` answer as before. What a library writes below
    Python, and what other processes write, is not seen. An error that ends the block is written as the
    command line will show it. A log that can no longer be written is given up with one line: the run goes on.

    Args:
        folder: The run folder.
        arguments: What was asked for, as on the shell; None if it was not asked for there.
        said: Lines that were printed before it could be opened.

    Raises:
        UserError: On entering, if the folder cannot be written to.
        OSError: On entering, if the disk is full.
    """

    def __init__(self, folder: Path, arguments: list[str] | None = None, said: Sequence[str] = ()) -> None:
        self.path = RunFolder(folder).console_log
        self._command = "from Python" if arguments is None else shlex.join(["coderl", *arguments])
        self._said = said
        self._file: Any = None
        self._lock = threading.RLock()  # a signal handler may print while a line is being written
        self._streams = ExitStack()
        self._transcripts: list[Transcript] = []
        self._process = os.getpid()

    def __enter__(self) -> ConsoleLog:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
            now = datetime.now().astimezone().isoformat(" ", "seconds")
            gap = b"\n" if self.path.stat().st_size else b""
            self._file.write(gap + f"--- {now}, coderl {__version__}: {self._command}\n".encode())
        except OSError as error:
            if self._file is not None:
                self._file.close()
            error.filename = str(self.path)
            if error.errno in _FULL:
                raise
            raise UserError(
                f"the run folder {self.path.parent} cannot be written to ({error.strerror}): name another "
                "with --trainer.default_root_dir DIR"
            ) from error
        self._append(self._said)
        for stream in {id(s): s for s in (sys.stdout, sys.stderr) if s is not None}.values():
            self._listen(stream)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._streams.close()
        for transcript in self._transcripts:
            self._append(transcript.close())
        if error is not None:
            self._append(last_words(error))
        if self._file is not None:
            self._file.close()
            self._file = None

    def _listen(self, stream: TextIO) -> None:
        transcript, write = Transcript(), stream.write
        own = "write" in vars(stream) if hasattr(stream, "__dict__") else False

        def heard(text: str) -> int:
            if os.getpid() == self._process:  # a fork may have copied the lock while it was taken
                with self._lock:
                    if self._file is not None:
                        lines = list(transcript.feed(text))
                        others = [other for other in self._transcripts if lines and other is not transcript]
                        self._append(itertools.chain(*(other.done() for other in others), lines))
            return write(text)

        def restore() -> None:
            if stream.write is not heard:
                return  # somebody listens in front of this, as W&B does, and goes on handing text down to it
            if own:
                stream.write = write  # type: ignore[method-assign]
            else:
                del stream.write

        try:
            stream.write = heard  # type: ignore[method-assign]
        except AttributeError:
            return  # somebody's own stream, with __slots__: it is done without
        self._transcripts.append(transcript)
        self._streams.callback(restore)

    def _append(self, lines: Iterable[str]) -> None:
        text = "".join(f"{line}\n" for line in lines)
        if not text or self._file is None:
            return
        try:
            self._file.write(text.encode(errors="replace"))
        except OSError as error:
            file, self._file = self._file, None
            file.close()
            why = error.strerror or error
            print(f"coderl: {self.path} ends here ({why}); the run goes on", file=sys.stderr)


def last_words(error: BaseException) -> list[str]:
    """What :func:`coderl.cli.main` says of an error that ends a run, or its traceback."""
    if isinstance(error, UserError):
        return [f"coderl: error: {error}"]
    if isinstance(error, KeyboardInterrupt):
        return ["coderl: interrupted" + "".join(f"; {way}" for way in error.args)]
    if isinstance(error, SystemExit):
        return []
    if isinstance(error, OSError) and error.errno in _FULL:
        where = f" at {error.filename}" if error.filename else ""
        return [f"coderl: error: the disk is full{where}: make room, then go on (a fit with --ckpt_path)"]
    return "".join(traceback.format_exception(error)).splitlines()
