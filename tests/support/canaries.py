"""What hostile programs must not reach: put up in the test's process, looked at from there afterwards."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import psutil

import coderl.embedded

LEFT = "coderl-left"
"""The name under which rows leave things behind."""
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
_PUBLIC = ("/tmp", "/var/tmp", "/dev/shm", "/run", "/run/lock", "/dev/mqueue", "/home", "/")
_SIGNALS = (signal.SIGUSR1, signal.SIGCONT, signal.SIGIO, signal.SIGHUP, signal.SIGWINCH)


class Canaries:
    """A secret, a writable folder, listeners, a token in the environment, signal handlers.

    While they are up this process adopts what a sandbox might leave behind.

    Args:
        folder: A folder that everybody may enter.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.signals: list[int] = []
        self.secret = folder / "secret"
        self.secret.write_text("canary")
        self.writable = folder / "writable"
        self.writable.mkdir()
        self.writable.chmod(0o777)
        (self.writable / "file").write_text("here")
        (self.writable / "file").chmod(0o666)
        self.abstract = f"coderl-{secrets.token_hex(8)}"
        self.listeners = {
            "TCP": _listen(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            "UDP": _listen(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            "unix": _listen(socket.AF_UNIX, socket.SOCK_STREAM, str(folder / "socket")),
            "unix datagrams": _listen(socket.AF_UNIX, socket.SOCK_DGRAM, str(folder / "socket-datagrams")),
            "abstract": _listen(socket.AF_UNIX, socket.SOCK_STREAM, f"\0{self.abstract}"),
            "abstract datagrams": _listen(socket.AF_UNIX, socket.SOCK_DGRAM, f"\0{self.abstract}-datagrams"),
        }
        for path in folder.glob("socket*"):
            path.chmod(0o777)
        self.before = self.state()
        self.descriptors = _open_files()

    def fill(self, code: str) -> str:
        """A row's code with the names it is to attack."""
        places = {
            "SECRET": self.secret,
            "WRITABLE": self.writable,
            "TCP": self.listeners["TCP"].getsockname()[1],
            "UDP": self.listeners["UDP"].getsockname()[1],
            "UNIX": self.folder / "socket",
            "ABSTRACT": self.abstract,
            "PID": os.getpid(),
            "PACKAGE": Path(coderl.__file__).parent,
            "PROBLEMS": Path(coderl.embedded.__file__).with_name("problems.jsonl"),
        }
        for name, value in places.items():
            code = code.replace(f"@{name}@", str(value))
        return code

    def state(self) -> dict[str, object]:
        """Everything that hostile programs must leave as it is, while no sandbox is open."""
        found: dict[str, object] = {"host name": os.uname().nodename, "token": os.environ["HF_TOKEN"]}
        for path in (self.secret, self.writable, *sorted(self.writable.rglob("*"))):
            about = os.lstat(path)
            found[str(path)] = (
                about.st_mode,
                about.st_uid,
                about.st_mtime_ns,
                about.st_ctime_ns,
                about.st_size,
            )
        children = [
            child
            for child in psutil.Process().children(recursive=True)
            if child.status() != psutil.STATUS_ZOMBIE
        ]
        found["processes"] = sorted(child.pid for child in children)
        found["attributes"] = os.listxattr(self.writable / "file")
        found["priority"] = (
            os.getpriority(os.PRIO_PROCESS, 0),
            os.sched_getscheduler(0),
            os.sched_getaffinity(0),
        )
        for kind in ("shm", "sem", "msg"):
            table = Path("/proc/sysvipc", kind)
            keys = [line.split()[0] for line in table.read_text().splitlines()] if table.exists() else []
            found[f"SysV {kind}"] = "4242" in keys or "4243" in keys
        found["left"] = [folder for folder in _PUBLIC if os.path.lexists(f"{folder}/{LEFT}")]
        return found

    def disturbed(self) -> dict[str, object]:
        """What has changed, with its present state; connections, datagrams and signals too."""
        now = self.state()
        keys = self.before.keys() | now.keys()
        found = {key: now.get(key) for key in keys if self.before.get(key) != now.get(key)}
        heard = {name: True for name, listener in self.listeners.items() if _heard(listener)}
        # Only what was opened since: files of earlier tests in this process close when they are collected.
        opened = {
            number: file for number, file in _open_files().items() if self.descriptors.get(number) != file
        }
        return (
            found
            | heard
            | ({"descriptors": opened} if opened else {})
            | ({"signals": self.signals} if self.signals else {})
        )

    def close(self) -> None:
        for listener in self.listeners.values():
            listener.close()


def _listen(family: int, kind: int, address: str | tuple[str, int]) -> socket.socket:
    listener = socket.socket(family, kind)
    listener.bind(address)
    listener.setblocking(False)
    if kind == socket.SOCK_STREAM:
        listener.listen()
    return listener


def _open_files() -> dict[int, str]:
    """What each of this process's file descriptors leads to."""
    with os.scandir("/proc/self/fd") as entries:
        numbers = [int(entry.name) for entry in entries]
    found = {}
    for number in numbers:
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the scan itself
            found[number] = os.readlink(f"/proc/self/fd/{number}")
    return found


def _heard(listener: socket.socket) -> bool:
    """Whether a connection or a datagram waits."""
    try:
        if listener.type == socket.SOCK_STREAM:
            listener.accept()[0].close()
        else:
            listener.recv(100)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def canaries() -> Iterator[Canaries]:
    """Put everything up, and take it down."""
    folder = Path(tempfile.mkdtemp(prefix="canaries-", dir="/tmp"))
    folder.chmod(0o755)
    token = os.environ.get("HF_TOKEN")
    os.environ["HF_TOKEN"] = "canary"
    birds = Canaries(folder)

    def note(number: int, frame: FrameType | None) -> None:
        birds.signals.append(number)

    adopt = ctypes.CDLL(None).prctl
    adopt(_SUBREAPER, 1, 0, 0, 0)
    handlers = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield birds
    finally:
        adopt(_SUBREAPER, 0, 0, 0, 0)
        birds.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.environ.pop("HF_TOKEN")
        if token is not None:
            os.environ["HF_TOKEN"] = token
        shutil.rmtree(folder)
