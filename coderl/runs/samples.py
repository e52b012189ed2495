"""The file of everything that a run has sampled: gzipped JSON lines, a gzip member for each step."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

STEP = "rollout_step"
_CHUNK = 1 << 20


def append_whole(path: Path, data: bytes) -> None:
    """Add bytes to the end of a file, all or none; it and the folders above it are made.

    Raises:
        OSError: They cannot be written. The file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        try:
            left = memoryview(data)
            while left:  # a disk that is nearly full takes a part
                left = left[file.write(left) :]
        except BaseException:  # what follows half a member, or half a line, could not be read
            file.truncate(end)
            raise


def append_samples(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add the samples of a step to the file.

    Args:
        path: The file; its name ends in ``.jsonl.gz``.
        rows: The step's samples, each with the step's number as :data:`STEP`.

    Raises:
        OSError: They cannot be written. The file is as it was.
    """
    lines = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    append_whole(path, gzip.compress(lines.encode("ascii"), mtime=0))


def drop_samples(path: Path, step: int) -> int:
    """Cut the samples of a step and of all later ones off the file, and what a killed process left of one.

    Args:
        path: The file; it need not exist.
        step: The first step that is to go, counted from 1.

    Returns:
        The number of bytes that went.

    Raises:
        OSError: The file cannot be read, or not be written.
    """
    if not path.exists():
        return 0
    kept, size = 0, path.stat().st_size
    for end, last in _members(path):
        if last >= step:
            break
        kept = end
    if kept < size:
        os.truncate(path, kept)
    return size - kept


def _members(path: Path) -> Iterator[tuple[int, int]]:
    """Where each gzip member ends, in bytes, and the step of its rows; up to one that is damaged."""
    with path.open("rb") as file:
        position, left = 0, b""
        while left or (left := file.read(_CHUNK)):
            member, head = zlib.decompressobj(31), b""  # 31: with a gzip header
            while not member.eof:
                try:
                    text = member.decompress(left)
                except zlib.error:
                    return
                position += len(left) - len(member.unused_data)
                if b"\n" not in head:
                    head += text
                left = member.unused_data
                if not member.eof and not (left := file.read(_CHUNK)):
                    return
            try:
                step = int(json.loads(head.partition(b"\n")[0])[STEP])
            except (ValueError, LookupError, TypeError):
                return
            yield position, step
