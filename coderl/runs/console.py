"""``console.log``: what a run prints, saved in its folder, with one line for a progress bar."""

from __future__ import annotations

import os
import re
import shlex
import sys
import threading
import traceback
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from coderl import __version__
from coderl.errors import DISK_FULL, UserError, exit_line
from coderl.runs.folder import RunFolder

_ANSI = re.compile(r"\x1b(?:\[[0-9;?]*[A-Za-z]|\][^\x07\x1b\r\n]*(?:\x07|\x1b\\)|)")
_MOST_BARS = 32


class LineFilter:
    r"""Cuts what is written to a stream into lines: of each line what follows its last ``\r``, no ANSI codes.

    A line that was drawn over itself is a progress bar. Nested bars end their lines with every refresh, so a
    bar's line is held back, and later states of the same label replace it. It is written once the bar clears
    its line or begins anew, or once it is full and other text follows.

    Args:
        bars: The bars held back, by label; the filters of two streams share them.
    """

    def __init__(self, bars: dict[str, str]) -> None:
        self._bars = bars
        self._text = ""
        self._is_bar = False
        self._returned = False

    def feed(self, text: str) -> list[str]:
        """The lines that are complete with ``text``."""
        lines: list[str] = []
        for part in re.findall(r"[^\r\n]+|[\r\n]", _ANSI.sub("", text)):
            if part == "\r":
                self._returned = True
            elif part == "\n":
                if self._is_bar:
                    lines += self._hold_back()
                elif self._text or not self._bars:  # else a nested bar moves down to its line
                    lines += [*self._release(full=True), self._text]
                self._text, self._is_bar, self._returned = "", False, False
            elif self._returned or self._is_bar:
                # Text right after a bar, without \r, is no state of it: it gets a line of its own.
                lines += self._hold_back(cleared=self._returned and not part.strip())
                self._text, self._is_bar, self._returned = part, self._returned, False
            else:
                self._text += part
        if self._returned and not self._text.strip():  # a bar has cleared its line: any text may follow
            self._text, self._is_bar, self._returned = "", False, False
        return lines

    def close(self) -> list[str]:
        """The last line, if it has no end, and every bar."""
        rest = self._hold_back() if self._is_bar else []
        text, self._text, self._is_bar = "" if self._is_bar else self._text, "", False
        return [*rest, *self._release(), *([text] if text else [])]

    def _hold_back(self, cleared: bool = False) -> list[str]:
        """Make the current text the state of its bar; the lines of bars that are over with it."""
        if not self._text.strip():
            return []
        label = self._text.partition(":")[0] if ":" in self._text else re.split(r"\d", self._text)[0]
        lines = []
        if label in self._bars and _percent(self._text) < _percent(self._bars[label]):
            lines += self._release(label)
        self._bars[label] = self._text
        if cleared or len(self._bars) > _MOST_BARS:
            lines += self._release(label if cleared else next(iter(self._bars)))
        return lines

    def _release(self, label: str | None = None, full: bool = False) -> list[str]:
        """Take bars out: one, the full ones or all; their lines, but for bars that have not begun."""
        labels = [label] if label is not None else list(self._bars)
        texts = [self._bars.pop(name) for name in labels if not full or _percent(self._bars[name]) == 100]
        return [text.rstrip() for text in texts if "| 0/" not in text]


def _percent(bar: str) -> int:
    found = re.search(r"(\d+)%", bar)
    return int(found[1]) if found else 0


class ConsoleLog:
    """While it is open, what Python code writes to stdout and stderr is also appended to ``console.log``.

    Only the ``write`` method of each stream is replaced. So :mod:`logging` handlers and progress bars that
    hold the stream are logged as well, and ``isatty`` and ``fileno`` answer as before. Output of C libraries
    and of other processes is not logged. An error that ends the block is logged as the command line prints
    it, or as a traceback. If the log cannot be written any more, it ends with one line on stderr, and the run
    goes on.

    Args:
        folder: The run folder.
        arguments: The command's arguments, as on the shell; None if the run was started from Python.
        said: Lines that were printed before the log was opened.

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
        self._filters: list[LineFilter] = []
        self._bars: dict[str, str] = {}
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
            if error.errno in DISK_FULL:
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
        for lines in self._filters:
            self._append(lines.close())
        if error is not None and not isinstance(error, SystemExit):
            line = exit_line(error)
            self._append("".join(traceback.format_exception(error)).splitlines() if line is None else [line])
        if self._file is not None:
            self._file.close()
            self._file = None

    def _listen(self, stream: TextIO) -> None:
        lines, write = LineFilter(self._bars), stream.write
        replaced_before = "write" in vars(stream) if hasattr(stream, "__dict__") else False

        def write_and_log(text: str) -> int:
            # A forked child may have inherited the lock while another thread held it: it would wait forever.
            if os.getpid() == self._process:
                with self._lock:
                    if self._file is not None:
                        self._append(lines.feed(text))
            return write(text)

        def restore() -> None:
            if stream.write is not write_and_log:
                return  # W&B, say, has put its own method in front of this one and goes on calling it
            if replaced_before:
                stream.write = write  # type: ignore[method-assign]
            else:
                del stream.write

        try:
            stream.write = write_and_log  # type: ignore[method-assign]
        except AttributeError:
            return  # a stream with __slots__, whose method cannot be replaced, is not logged
        self._filters.append(lines)
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
