"""Contamination: problems that are in both training and evaluation, found by id and by text.

A score on problems that were trained on says little about others. Copies often have other ids, so the text
of a task is compared as well, without punctuation and the tests that it shows. Rewordings are not found.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from coderl.errors import UserError
from coderl.files import read_json, write_atomic
from coderl.problems.sources import MBPP

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from coderl.types import Problem

FILE = "training_problems.json"
"""Name of the file beside weights that lists the problems they were trained on."""

MIN_CHARACTERS = 8
"""Fewest letters and digits of a text that identifies a task. "Solve." would match too many."""

_ALIASES = {
    "mbppplus": "mbpp",
    "mbpp+": "mbpp",
    "sanitized-mbpp": "mbpp",
    "humanevalplus": "humaneval",
    "humaneval+": "humaneval",
}
"""Data sets that use the problem numbers of another one, with the name of that one."""

# Between words these are punctuation ("two-dimensional", "and/or"); elsewhere they are operators.
_HYPHENS = re.compile(r"(?<=[^\W\d_]{2})\s*[-/]\s*(?=[^\W\d_]{2})")
_WORDS = re.compile(r"\d+|[^\W\d_]+|[-+*/%=<>^&|~]|!(?==)")


def text_key(problem: Problem) -> str | None:
    """A hash of a task's text, 16 hexadecimal digits. Copies of a problem have the same key.

    Case, white space, punctuation and the tests that the prompt shows do not change it. Operators do:
    ``n - 2`` is another task than ``n // 2``, and ``a == b`` than ``a != b``.

    Returns:
        The key, or None where the text is too short. Keys are saved beside weights, so they must be the same
        in every version.
    """
    text = unicodedata.normalize("NFKC", _without_tests(problem)).casefold()
    parts = _WORDS.findall(_HYPHENS.sub(" ", text))
    if sum(len(part) for part in parts if part.isalnum()) < MIN_CHARACTERS:
        return None
    # White space between words is dropped, but numbers stay apart: "1, 2" is not "12".
    squeezed = "".join(f" {part} " if part.isdecimal() else part for part in parts)
    return hashlib.sha256(squeezed.encode()).hexdigest()[:16]


def _without_tests(problem: Problem) -> str:
    """The prompt without the tests that it shows."""
    text = f"\n{problem.prompt}\n"
    for test in sorted(problem.tests, key=len, reverse=True):
        text = text.replace(f"\n{test}\n", "\n")
    # MBPP+ shows a test of MBPP that is not among its own.
    return "\n".join(line for line in text.split("\n") if not line.startswith("assert"))


def canonical_id(problem: Problem) -> str:
    """The problem's id in lower case, under the name of the data set that numbered it.

    MBPP+ and HumanEval+ use the numbers of MBPP and HumanEval, for mostly the same problems.
    """
    return _canonical(problem.id)


def _canonical(name: str) -> str:
    source, slash, number = name.casefold().partition("/")
    return _ALIASES.get(source, source) + slash + number


@dataclass(frozen=True)
class Overlap:
    """A problem that is in both the training and the held-out set.

    Attributes:
        train_id: Its id in the training set.
        test_id: Its id in the held-out set.
        by: ``"id"`` where these are the same, ``"text"`` where only the texts are.
    """

    train_id: str
    test_id: str
    by: Literal["id", "text"]

    def __str__(self) -> str:
        if self.train_id == self.test_id:
            return self.train_id
        return f"{self.train_id} (there {self.test_id}{', in the same words' if self.by == 'text' else ''})"


def overlaps(train: Iterable[Problem], held_out: Iterable[Problem]) -> list[Overlap]:
    """The training problems that are in the held-out set as well, in order.

    Each occurs once, with the first held-out problem of its id, or else the first with its text.
    """
    by_id: dict[str, str] = {}
    by_text: dict[str, str] = {}
    for problem in held_out:
        by_id.setdefault(canonical_id(problem), problem.id)
        if key := text_key(problem):
            by_text.setdefault(key, problem.id)

    def found() -> Iterator[Overlap]:
        for problem in train:
            if (name := canonical_id(problem)) in by_id:
                yield Overlap(problem.id, by_id[name], "id")
            elif (key := text_key(problem)) is not None and key in by_text:
                yield Overlap(problem.id, by_text[key], "text")

    return list(found())


def describe(found: Sequence[Overlap]) -> str:
    """The first two overlaps in words, and how many more there are."""
    names = ", ".join(str(overlap) for overlap in found[:2])
    return f"{names} and {len(found) - 2} more" if len(found) > 2 else names


def as_published(overlap: Overlap) -> bool:
    """Whether MBPP itself has this overlap: three of its training problems repeat test problems."""
    test_split = _mbpp_split(overlap.test_id)
    return _mbpp_split(overlap.train_id) == "train" and test_split in ("validation", "test")


def _mbpp_split(name: str) -> str | None:
    """The split of an MBPP problem, by its id; None for other problems."""
    source, _, number = _canonical(name).partition("/")
    found = [split for split, ids in MBPP.ids.items() if number.isdecimal() and int(number) in ids]
    return found[0] if source == MBPP.name and found else None


@dataclass(frozen=True)
class TrainingRecord:
    """The problems that a model was trained on, by id and by text.

    Attributes:
        ids: Their canonical ids, see :func:`canonical_id`.
        texts: Hashes of their texts, see :func:`text_key`.
    """

    ids: frozenset[str]
    texts: frozenset[str]

    @classmethod
    def of(cls, problems: Iterable[Problem]) -> TrainingRecord:
        """The record of training on these problems."""
        problems = list(problems)
        keys = (text_key(problem) for problem in problems)
        return cls(frozenset(map(canonical_id, problems)), frozenset(key for key in keys if key is not None))

    def __or__(self, other: TrainingRecord) -> TrainingRecord:
        return TrainingRecord(self.ids | other.ids, self.texts | other.texts)

    def knows(self, problem: Problem) -> bool:
        """Whether the problem was trained on, by its id or its text."""
        return canonical_id(problem) in self.ids or text_key(problem) in self.texts

    def among(self, problems: Iterable[Problem]) -> list[str]:
        """The ids of those that were trained on, in order."""
        return [problem.id for problem in problems if self.knows(problem)]

    def save(self, folder: Path) -> None:
        """Write :data:`FILE` into the folder, atomically."""
        body = {"ids": sorted(self.ids), "texts": sorted(self.texts)}
        write_atomic(folder / FILE, json.dumps(body, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> TrainingRecord | None:
        """The record that :meth:`save` wrote into the folder; None where there is no file.

        Raises:
            UserError: The file cannot be read, or holds something else.
        """
        path = folder / FILE
        fix = (
            "restore the file that the training wrote, or remove it: then it is not known what was trained on"
        )
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:
            pass  # such as no permission: there may be a record, so read_json reports the error
        body = read_json(path, fix)
        if not isinstance(body, dict) or not all(_are_strings(body.get(name)) for name in ("ids", "texts")):
            raise UserError(f'{path}: must hold {{"ids": [...], "texts": [...]}}, lists of strings; {fix}')
        return cls(frozenset(body["ids"]), frozenset(body["texts"]))


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def merge_records(*parts: TrainingRecord | None) -> TrainingRecord | None:
    """One record of several trainings, such as SFT and then RL; None where all of them are None."""
    known = [part for part in parts if part is not None]
    return reduce(or_, known) if known else None
