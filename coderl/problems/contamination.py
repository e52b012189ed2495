"""Problems met again: what was trained on and is measured on too, by id and by the words of the task.

A score on problems that were trained on says little about others. Copies go by other ids, so the words of a
task count as well, whatever its punctuation and the test that it shows. Rewordings are not found.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from coderl.errors import UserError
from coderl.problems.sources import MBPP

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from coderl.types import Problem

FILE = "training_problems.json"
"""What lies beside the weights and says what they were trained on."""

SHORTEST = 8
"""Letters and digits. A task of fewer ("f", "Solve.") says too little to be known again by its words."""

_ALIASES = {
    "mbppplus": "mbpp",
    "mbpp+": "mbpp",
    "sanitized-mbpp": "mbpp",
    "humanevalplus": "humaneval",
    "humaneval+": "humaneval",
}
"""Data sets that keep the numbers of another."""

# Between words these are punctuation ("two-dimensional", "and/or"); elsewhere they compute.
_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_]{2})\s*[-/]\s*(?=[^\W\d_]{2})")
_COUNTS = re.compile(r"\d+|[^\W\d_]+|[-+*/%=<>^&|~]|!(?==)")


def text_key(problem: Problem) -> str | None:
    """What a task is known again by: a hash of its words, 16 hexadecimal digits.

    Case, white space, punctuation and the tests that the prompt shows do not count. Signs that compute do:
    ``n - 2`` is another task than ``n // 2``, and ``a == b`` than ``a != b``.

    Returns:
        The same from one version to the next, since it is kept in files; None where the text says too little.
    """
    text = unicodedata.normalize("NFKC", _task(problem)).casefold()
    parts = _COUNTS.findall(_BETWEEN_WORDS.sub(" ", text))
    if sum(len(part) for part in parts if part.isalnum()) < SHORTEST:
        return None
    # Numbers stay apart: "1, 2" is not "12". Between words white space means nothing.
    squeezed = "".join(f" {part} " if part.isdecimal() else part for part in parts)
    return hashlib.sha256(squeezed.encode()).hexdigest()[:16]


def _task(problem: Problem) -> str:
    """The prompt without the tests that it shows; docstring marks are punctuation anyway."""
    text = f"\n{problem.prompt}\n"
    for test in sorted(problem.tests, key=len, reverse=True):
        text = text.replace(f"\n{test}\n", "\n")
    # MBPP+ shows a test that is none of its own.
    return "\n".join(line for line in text.split("\n") if not line.startswith("assert"))


def same_id(problem: Problem) -> str:
    """The problem's id in lower case, with the data set's name that its number is from.

    MBPP+ and HumanEval+ keep the numbers of MBPP and HumanEval, and mostly the problems.
    """
    return _resolved(problem.id)


def _resolved(name: str) -> str:
    source, slash, number = name.casefold().partition("/")
    return _ALIASES.get(source, source) + slash + number


@dataclass(frozen=True)
class Overlap:
    """A training problem that is held out too.

    Attributes:
        train_id: Its id.
        test_id: The id of the held-out problem that it is.
        by: ``"id"`` where the ids are the same, ``"text"`` where only the words are.
    """

    train_id: str
    test_id: str
    by: Literal["id", "text"]

    def __str__(self) -> str:
        if self.train_id == self.test_id:
            return self.train_id
        return f"{self.train_id} (there {self.test_id}{', in the same words' if self.by == 'text' else ''})"


def overlaps(train: Iterable[Problem], held_out: Iterable[Problem]) -> list[Overlap]:
    """The training problems that are held out too, in order.

    Each comes once, with the first held-out problem of its id or else the first of its words.
    """
    by_id: dict[str, str] = {}
    by_text: dict[str, str] = {}
    for problem in held_out:
        by_id.setdefault(same_id(problem), problem.id)
        if key := text_key(problem):
            by_text.setdefault(key, problem.id)

    def found() -> Iterator[Overlap]:
        for problem in train:
            if (name := same_id(problem)) in by_id:
                yield Overlap(problem.id, by_id[name], "id")
            elif (key := text_key(problem)) is not None and key in by_text:
                yield Overlap(problem.id, by_text[key], "text")

    return list(found())


def describe(found: Sequence[Overlap]) -> str:
    """The first two by name, and how many more there are."""
    names = ", ".join(str(overlap) for overlap in found[:2])
    return f"{names} and {len(found) - 2} more" if len(found) > 2 else names


def as_published(overlap: Overlap) -> bool:
    """Whether MBPP's own splits have the two problems: three of its training problems are worded as tests."""
    test_split = _mbpp_split(overlap.test_id)
    return _mbpp_split(overlap.train_id) == "train" and test_split in ("validation", "test")


def _mbpp_split(name: str) -> str | None:
    source, _, number = _resolved(name).partition("/")
    found = [split for split, ids in MBPP.ids.items() if number.isdecimal() and int(number) in ids]
    return found[0] if source == MBPP.name and found else None


@dataclass(frozen=True)
class TrainingRecord:
    """The problems that a model was trained on.

    Attributes:
        ids: Their ids, see :func:`same_id`.
        texts: Keys of their words, see :func:`text_key`.
    """

    ids: frozenset[str]
    texts: frozenset[str]

    @classmethod
    def of(cls, problems: Iterable[Problem]) -> TrainingRecord:
        """What is known of training on these."""
        problems = list(problems)
        keys = (text_key(problem) for problem in problems)
        return cls(frozenset(map(same_id, problems)), frozenset(key for key in keys if key is not None))

    def __or__(self, other: TrainingRecord) -> TrainingRecord:
        return TrainingRecord(self.ids | other.ids, self.texts | other.texts)

    def knows(self, problem: Problem) -> bool:
        """Whether the problem is one of them, by id or by its words."""
        return same_id(problem) in self.ids or text_key(problem) in self.texts

    def among(self, problems: Iterable[Problem]) -> list[str]:
        """The ids of those that were trained on, in order."""
        return [problem.id for problem in problems if self.knows(problem)]

    def save(self, folder: Path) -> None:
        """Write :data:`FILE` into the folder. A reader, or a run killed meanwhile, never sees half a file."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        partial = path.with_name(f"{FILE}.{os.getpid()}.partial")
        body = {"ids": sorted(self.ids), "texts": sorted(self.texts)}
        partial.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, folder: Path) -> TrainingRecord | None:
        """What :meth:`save` wrote into the folder; None where there is nothing.

        Raises:
            UserError: The file cannot be read, or was not written by it.
        """
        path = folder / FILE
        fix = (
            "bring back the file that the training left, or remove it: nobody then knows what was trained on"
        )
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); {fix}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: malformed JSON ({error}); {fix}") from error
        if not isinstance(body, dict) or not all(_is_texts(body.get(name)) for name in ("ids", "texts")):
            raise UserError(f'{path}: is to hold {{"ids": [...], "texts": [...]}}, lists of strings; {fix}')
        return cls(frozenset(body["ids"]), frozenset(body["texts"]))


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def merge_records(*parts: TrainingRecord | None) -> TrainingRecord | None:
    """All that is known of a training in several parts; None where nothing is known of any."""
    known = [part for part in parts if part is not None]
    return reduce(or_, known) if known else None
