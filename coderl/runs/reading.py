"""Reads a run folder into a :class:`Run`; of a run that has not ended, or was killed, as far as it got."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coderl.errors import UserError
from coderl.files import read_json, read_json_lines
from coderl.runs.config import class_name, parse_config, policy_arguments
from coderl.runs.folder import RunFolder
from coderl.runs.metrics import Series, read_metrics
from coderl.scores.compare import compare, read_results
from coderl.scores.results import GENERATIONS, RESULTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coderl.scores.comparison import Comparison

FIX = "move it away to report without it"
MOST_SECONDS = 1e12
ROUNDING = 1e-9
LONGEST_NAME = 200  # bytes of a task's name, which becomes part of file names


@dataclass(frozen=True)
class Run:
    """A run as its folder holds it; one that has not ended, as far as it got.

    Attributes:
        folder: Where it lies.
        name: Its name beside other runs; by default its folder's.
        summary: ``summary.json``; empty while the run has not ended.
        config: The settings of the latest start, as ``config.yaml`` nests them; empty where there is none.
        config_text: The settings as the text of the file.
        metrics: From name, such as ``"reward/mean"``, to the values over the steps.
        completions: Sampled programs, as :class:`coderl.callbacks.CompletionTable` wrote them.
        before: Results file of the evaluation before training, if there is one.
        after: Results file of the evaluation after training, if there is one.
        logs: The folders that its starts logged to, oldest first.
        missing: A sentence for each thing that a finished run has and this one lacks.
    """

    folder: Path
    name: str
    summary: dict[str, Any]
    config: dict[str, Any]
    config_text: str
    metrics: dict[str, Series]
    completions: list[dict[str, Any]]
    before: Path | None
    after: Path | None
    logs: list[Path]
    missing: list[str]

    @property
    def finished(self) -> bool:
        """Whether the run ended by itself."""
        return bool(self.summary)

    @property
    def method(self) -> str:
        """Name of the algorithm, such as ``"GRPO"``."""
        return (
            class_name(self.config.get("model")) or str(self.summary.get("method", "")).upper() or "unknown"
        )

    @property
    def model(self) -> str:
        """The base model's hub id or path."""
        return str(self.summary.get("model") or policy_arguments(self.config).get("model") or "unknown")

    @property
    def steps(self) -> int:
        """Number of the last step logged; the optimizer steps of the summary where none was."""
        last = [series.steps[-1] for series in self.metrics.values()]
        return int(max(last)) if last else int(self.summary.get("steps", 0))

    @property
    def step_name(self) -> str:
        """``"rollout step"`` in reinforcement learning, ``"step"`` otherwise."""
        return "rollout step" if "reward/mean" in self.metrics else "step"

    @cached_property
    def tasks_before(self) -> dict[str, dict[str, Any]]:
        """The evaluation before training: from task to scores, counts per problem and settings."""
        return _results(self.before) if self.before else {}

    @cached_property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """The evaluation after training, in the same form. The held-out split comes first."""
        found: dict[str, dict[str, Any]] = _results(self.after) if self.after else {}
        return found or dict(self.summary.get("tasks") or {})

    @property
    def comparisons(self) -> list[Comparison]:
        """Problem by problem, before against after; empty where the two cannot be compared."""
        return self.compared[0]

    @cached_property
    def compared(self) -> tuple[list[Comparison], str]:
        """The comparisons, and the reason where there are none."""
        if self.before is None or self.after is None or not (self.tasks and self.tasks_before):
            return [], "no results file from before training"
        try:
            return compare(self.before, self.after), ""
        except UserError as error:  # the files are sound: they hold other tasks or problems
            return [], str(error)

    @property
    def held_out(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """The scores of the held-out split before and after training, each None where it is not known.

        Scores from before training on other problems than after it count as not known.
        """
        after = next(iter(self.tasks.values()), None)
        before = next(iter(self.tasks_before.values()), None)
        if before and after and self.after and not self.comparisons:
            return None, after
        return before or self.summary.get("before"), after


def load_run(folder: str | Path, name: str | None = None) -> Run:
    """Read a run folder.

    Args:
        folder: Such as ``checkpoints/embedded-embedded-grpo-qlora``.
        name: Name of the run; by default its folder's.

    Raises:
        UserError: It is no run folder, or a file in it cannot be read.
    """
    folder = Path(folder).expanduser()
    _require_run(folder)
    place, summary = RunFolder(folder), _summary(folder)
    text = _latest_config([path for path in place.configs() if holds(folder, path)])
    before, after = (_results_file(folder, summary, key) for key in ("before", "evaluation"))
    run = Run(
        folder=folder,
        name=name or folder.resolve().name,
        summary=summary,
        config=parse_config(text),  # where that is empty, the page still shows the text
        config_text=text,
        metrics=read_metrics([path for path in place.metrics() if holds(folder, path)]),
        completions=_completions(folder),
        before=before,
        after=after,
        logs=place.starts(),
        missing=_links_outside(place),
    )
    run.missing.extend(_missing(run))
    return run


def load_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read several run folders. Runs of equal names get as many parent folders in them as make them differ.

    Raises:
        UserError: One is no run folder, or a file in one cannot be read.
    """
    paths = list({Path(folder).expanduser().resolve(): folder for folder in folders}.items())
    names = [path.name for path, _ in paths]
    depth = 1
    while len(set(names)) < len(names):
        depth += 1
        names = ["/".join(path.parts[-depth:]) for path, _ in paths]
    return [load_run(folder, name) for (_, folder), name in zip(paths, names, strict=True)]


def _require_run(folder: Path) -> None:
    try:
        there = folder.is_dir()
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror or error})") from error
    if not there:
        what = "is a file" if folder.is_file() else "does not exist"
        raise UserError(f"{folder}: {what}; give the folder of a run, such as checkpoints/NAME")
    if RunFolder(folder).is_run():
        return
    inside = sorted(path for path in folder.glob("*") if RunFolder(path).is_run())
    made_by = RunFolder.of_model(folder)
    hint = "give the folder that a fit wrote to, such as checkpoints/NAME"
    if inside:
        hint = f"there are runs in it: give one or more of them, such as {inside[0]}"
    elif made_by and made_by.path.is_dir():
        hint = f"it is what was made of {made_by.path}: give that"
    raise UserError(f"{folder}: is no run folder (no summary.json and no logs in it); {hint}")


def holds(folder: Path, path: Path) -> bool:
    """Whether a file is there and lies in the run folder, links followed.

    A report is sent to others. In a run folder that somebody else sent, links and paths could lead to any
    file on this machine, and the page would hold it.
    """
    try:
        return path.is_file() and path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError):  # not a possible file name, or not accessible
        return False


def _links_outside(run: RunFolder) -> list[str]:
    """A line for each file that is not read because it is a link out of the run folder."""
    results = [path for kind in (RESULTS, GENERATIONS) for path in sorted(run.path.glob(f"{kind}_*"))]
    files = [run.summary, run.completions, *run.configs(), *results, *run.metrics()]
    outside = [path for path in files if os.path.isfile(path) and not holds(run.path, path)]
    return [f"{path.relative_to(run.path)} leads out of the run folder and is not read" for path in outside]


def _summary(folder: Path) -> dict[str, Any]:
    """``summary.json`` with the types that a report needs; empty where there is none."""
    path = RunFolder(folder).summary
    if not holds(folder, path):
        return {}
    body: dict[str, Any] = read_json(path, FIX, dict)
    kinds: dict[str, Any] = {
        "steps": int,
        "seconds": (int, float),
        "paths": dict,
        "versions": (dict, type(None)),
        "tasks": (dict, type(None)),
        "verdict": (list, type(None)),  # not in summaries of earlier versions
    }
    wrong = [key for key, kind in kinds.items() if not isinstance(body.get(key), kind)]
    wrong += [] if wrong or abs(body["seconds"]) < MOST_SECONDS else ["seconds"]
    scored = [body.get("before"), *(body.get("tasks") or {}).values()]
    wrong += [] if wrong or all(scores is None or _are_scores(scores) for scores in scored) else ["scores"]
    if wrong:
        raise UserError(f"{path}: is damaged ({wrong[0]} missing, or not what a fit writes); {FIX}")
    return body


def _are_scores(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    kinds = {"outcomes": dict, "settings": dict, "contaminated": list, "interval": list}
    if not all(value.get(key) is None or isinstance(value[key], kind) for key, kind in kinds.items()):
        return False
    ends, score = value.get("interval"), value.get("pass@1")
    shares = [*(ends or []), *(value[key] for key in value if key.startswith("pass@"))]
    known = [share for share in shares if share is not None]
    if not all(isinstance(share, int | float) and -ROUNDING <= share <= 1 + ROUNDING for share in known):
        return False
    return ends is None or _are_around(ends, score)


def _are_around(ends: list[Any], score: Any) -> bool:
    """Whether these are the ends of an interval that holds the score, if there is one."""
    if len(ends) != 2 or None in ends:
        return False
    inside = [ends[0], *([] if score is None else [score]), ends[1]]
    return all(low <= high + ROUNDING for low, high in pairwise(inside))


def _results(path: Path) -> dict[str, dict[str, Any]]:
    found = read_results(path)
    for name, scores in found.items():
        if Path(name).name != name or len(name.encode(errors="replace")) >= LONGEST_NAME:
            raise UserError(f"{path}: is damaged ({name[:40]!r} is no name of a task); {FIX}")
        if not _are_scores(scores):
            raise UserError(f"{path}: is damaged (the scores of {name!r} are none); {FIX}")
    return found


def _results_file(folder: Path, summary: dict[str, Any], key: str) -> Path | None:
    """The results file that the summary names, also in a moved run; without a summary the newest."""
    if summary:
        named = Path(str(summary["paths"].get(key, "")))
        places = [folder / named.name, named] if named.name else []
    else:
        early = sorted(folder.glob(f"{RESULTS}_*_before_*.json"), reverse=True)
        late = sorted(set(folder.glob(f"{RESULTS}_*.json")) - set(early), reverse=True)
        places = early if key == "before" else late
    return next((path for path in places if holds(folder, path)), None)


def _latest_config(files: list[Path]) -> str:
    """The text of the last file; empty without any."""
    try:
        return files[-1].read_text(encoding="utf-8", errors="replace") if files else ""
    except OSError as error:
        raise UserError(f"{files[-1]}: cannot be read ({error.strerror or error})") from error


def _completions(folder: Path) -> list[dict[str, Any]]:
    """The rows of ``completions.jsonl``. Rows of a resumed run replace those of the steps it repeated."""
    path = RunFolder(folder).completions
    if not holds(folder, path):
        return []
    rows: list[dict[str, Any]] = []
    try:
        for where, row in read_json_lines(path, unfinished=False):
            _convert_numbers(row, where)
            if rows and row["rollout_step"] < rows[-1]["rollout_step"]:
                rows = [before for before in rows if before["rollout_step"] < row["rollout_step"]]
            rows.append(row)
    except UserError as error:
        raise UserError(f"{error}; {FIX}") from None
    return rows


def _convert_numbers(row: dict[str, Any], where: str) -> None:
    """Make numbers of a row's step and reward, in place.

    Raises:
        UserError: They are none, or missing.
    """
    try:
        step, row["reward"] = float(row["rollout_step"]), float(row["reward"])
    except (ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise UserError(f"{where}: is damaged ({error})") from None
    row["rollout_step"] = int(step) if step.is_integer() else step


def _missing(run: Run) -> list[str]:
    """A sentence for each thing that a finished run has and this one lacks."""
    found = []
    if not run.finished:
        found.append("no summary.json: the run has not ended, or was killed; this is how far it got")
    if not run.metrics:
        found.append("no metrics.csv: no curves")
    if not run.config_text:
        found.append("no config.yaml: settings are not known")
    if run.method == "SFT":
        return found
    before, after = run.held_out
    if before is None and after is None:
        found.append("nothing was evaluated: no held-out scores")
    elif after is None:
        found.append("no evaluation after training: what was won is not known")
    elif before is None:
        why = run.compared[1] if run.before else "no evaluation before training"
        found.append(f"{why}: what was won is not known")
    elif not run.comparisons:
        found.append(f"{run.compared[1]}: no paired difference, and no problems won and lost")
    if not run.completions:
        found.append("no completions.jsonl: no sampled programs")
    return found
