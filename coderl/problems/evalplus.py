"""EvalPlus: the problems of HumanEval and MBPP with many more tests (Liu et al. 2023, arXiv:2305.01210).

Rows are those of the hub's data sets. The files that EvalPlus itself releases hold inputs in place of a
``test`` and cannot be read here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from coderl.files import read_json_lines
from coderl.problems.rows import FORMS, Row, problem_from_row, text_field
from coderl.problems.sources import HumanEval, ProblemSource, hub_rows, local_file, unique_problems

if TYPE_CHECKING:
    from coderl.types import Problem


class HumanEvalPlus(HumanEval):
    """HumanEval+, 164 problems: HumanEval's prompts with about 80 times the tests.

    Read from ``path``, else ``$CODERL_DATA_DIR/HumanEvalPlus.jsonl`` (or ``.jsonl.gz``), else the hub's
    ``evalplus/humanevalplus``.

    Args:
        path: A file with the hub's rows. None: look in the places above.
        strip_prompt: Whether to strip white space around a prompt, as the harness's ``humanevalplus`` does.
    """

    name = "humanevalplus"
    hub = "evalplus/humanevalplus"
    files = ("HumanEvalPlus.jsonl", "HumanEvalPlus.jsonl.gz")
    packaged = False


class MBPPPlus(ProblemSource):
    """MBPP+, 378 problems: a checked subset of MBPP, of *all* its splits, with about 35 times the tests.

    Read from ``path``, else ``$CODERL_DATA_DIR/MbppPlus.jsonl`` (or ``.jsonl.gz``), else the hub's
    ``evalplus/mbppplus``. There is one split, ``"test"``.

    Args:
        path: A file with the hub's rows. None: look in the places above.
        plus: True: the tests of MBPP+. False: MBPP's own three, on the same problems.
    """

    name = "mbppplus"
    hub = "evalplus/mbppplus"
    files = ("MbppPlus.jsonl", "MbppPlus.jsonl.gz")

    def __init__(self, path: str | None = None, plus: bool = True) -> None:
        self.path, self.plus = path, plus

    def load(self, split: str) -> list[Problem]:
        """The problems, by task id."""
        if split != "test":
            return []
        file = local_file(self.path, *self.files)
        rows = read_json_lines(file, FORMS) if file else hub_rows(self.hub, None, "test", self.files[0])
        return unique_problems(rows, self.name, split, read=self._problem)

    def _problem(self, row: Row, where: str, *, source: str, split: str) -> Problem:
        base = problem_from_row(row, where, source=source, split=split)
        if not self.plus:
            return replace(base, setup="")
        return replace(base, tests=(), setup="", test=text_field(row, "test", where))
