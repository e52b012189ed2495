"""Scores of an evaluation, the files they are saved in with every file name, and their summary as text."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from coderl.errors import UserError
from coderl.files import write_atomic
from coderl.scores.numbers import is_interval, percent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


RESULTS, GENERATIONS, REFERENCES = "evaluation_results", "generations", "references"
"""What the names of an evaluation's files begin with: its scores, its programs, their tests."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of one task, with what they rest on.

    Attributes:
        task: Name, such as ``"mbpp"``.
        pass_at_k: From k to the mean over problems, 0 to 1; None where k is above ``n``.
        interval: Bootstrap interval over problems of pass@1, 95 %; None where pass@1 is not known.
        accuracy: Share of problems whose first sample passes.
        success_rate: Share of problems with a sample that passes, that is, of positive reward.
        test_pass_rate: Share of single tests that held, over all samples.
        n: Samples asked for per problem.
        problems: Number of problems.
        outcomes: How many samples ended in each way, after the re-runs.
        timeouts_rerun: Time-outs of the first run; each was run once more.
        infra_errors: Samples without a verdict even after a retry. They are left out, not counted as wrong.
        seconds: Wall time of sampling and running.
        settings: Sampling, prompt form, isolation and processor: all that the scores depend on.
        contaminated: Ids of the problems that the model was trained on; None where that is not known.
        disagreements: Samples that pass in one grading and fail in the other, where both were run.
        ids: The problems, in order.
        correct: Per problem, samples that pass.
        counted: Per problem, samples with a verdict.
        first: Per problem, whether its first sample passes; None where it has no verdict.
        generations: Per problem, the whole programs, as the harness saves and loads them.
        references: Per problem, the program that the harness runs after a generation.
    """

    task: str
    pass_at_k: dict[int, float | None]
    interval: tuple[float, float] | None
    accuracy: float | None
    success_rate: float | None
    test_pass_rate: float | None
    n: int
    problems: int
    outcomes: dict[str, int]
    timeouts_rerun: int
    infra_errors: int
    seconds: float
    settings: dict[str, Any]
    contaminated: list[str] | None
    disagreements: list[dict[str, Any]]
    ids: list[str]
    correct: list[int]
    counted: list[int]
    first: list[bool | None]
    generations: list[list[str]] = field(repr=False)
    references: list[str] = field(repr=False)

    def scores(self) -> dict[str, float | None]:
        """``{"pass@1": x, ...}``; None where k is above ``n``."""
        return {f"pass@{k}": value for k, value in self.pass_at_k.items()}

    def to_json(self) -> dict[str, Any]:
        """Everything but the programs, for ``json.dump``; each pass@k first, under its own name."""
        apart = {"task", "pass_at_k", "generations", "references"}
        return self.scores() | {k: v for k, v in asdict(self).items() if k not in apart}


def results_name(model: str, method: str, when: datetime | None = None) -> str:
    """The original recipe's file name: ``evaluation_results_{model}_{method}_{YYYYMMDD_HHMMSS}.json``."""
    name = re.sub(r"[^\w.-]+", "-", f"{model}_{method}")
    return f"{RESULTS}_{name}_{when or datetime.now():%Y%m%d_%H%M%S}.json"


def stem_of(path: Path) -> str:
    """The part of a name that all files of an evaluation share, such as ``m_grpo_20241201_143022``.

    Args:
        path: A results file, or a file of generations or references.
    """
    for kind in (RESULTS, GENERATIONS, REFERENCES):
        if path.stem.startswith(f"{kind}_"):
            return path.stem.removeprefix(f"{kind}_")
    return path.stem


def programs_path(results: Path, task: str, kind: str = GENERATIONS) -> Path:
    """Where the programs of a task lie, or with ``REFERENCES`` their tests: beside the results file."""
    return results.with_name(f"{kind}_{stem_of(results)}_{task}.json")


def comparison_stem(name_a: str, name_b: str) -> str:
    """The name of a comparison's files, without suffix."""
    return f"comparison_{_file_name(name_a)}_vs_{_file_name(name_b)}"


def _file_name(name: str) -> str:
    """``name`` with nothing that a file name cannot hold."""
    plain = re.sub(r"[^\w.-]+", "-", name).encode()
    if len(plain) <= 100:
        return plain.decode()
    # Two of these make one name, and file systems allow 255 bytes. The hash keeps long names different.
    return f"{plain[:80].decode(errors='ignore')}-{hashlib.sha256(plain).hexdigest()[:8]}"


def save_results(
    evaluations: Mapping[str, Evaluation], path: Path, config: Mapping[str, Any] | None = None
) -> list[Path]:
    """Write the scores to ``path`` in the harness's layout, and each task's programs beside it.

    Args:
        evaluations: From task to evaluation.
        path: The JSON file, see :func:`results_name`.
        config: Value of the key ``"config"``. None: the settings of each task.

    Returns:
        The files written: ``path``, then for each task ``generations_..._{task}.json``, lists of whole
        programs, and ``references_..._{task}.json``.

    Raises:
        UserError: A file cannot be written.
    """
    tasks = {name.lower(): evaluation for name, evaluation in evaluations.items()}
    settings = dict(config) if config is not None else {name: e.settings for name, e in tasks.items()}
    body = {name: e.to_json() for name, e in tasks.items()} | {"config": settings}
    # Samples, and even ids, may hold lone surrogates, which UTF-8 has no bytes for: JSON's escapes stay on.
    texts = {path: json.dumps(body, indent=2)}
    for name, e in tasks.items():
        texts[programs_path(path, name)] = json.dumps(e.generations)
        texts[programs_path(path, name, REFERENCES)] = json.dumps(e.references)
    try:
        for file, text in texts.items():
            write_atomic(file, text + "\n")
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror or error}") from error
    return list(texts)


def logged_scores(evaluations: Mapping[str, Evaluation]) -> dict[str, float]:
    """The scores that are known, by the original recipe's keys, such as ``final_eval/mbpp_pass@1``."""
    return {
        f"final_eval/{name.lower()}_{metric}": value
        for name, evaluation in evaluations.items()
        for metric, value in evaluation.scores().items()
        if value is not None
    }


def summary_text(evaluations: Mapping[str, Evaluation], path: Path | str, logged: Sequence[str] = ()) -> str:
    """The original recipe's console summary.

    Args:
        evaluations: From task to evaluation.
        path: Where the results were saved.
        logged: The keys that were logged to W&B. Empty: that line is left out.
    """
    lines = ["🎯 Automatic evaluation completed! Results summary:", "=" * 60, ""]
    for name, evaluation in evaluations.items():
        lines += [f"📊 {name.upper()} Results:"]
        lines += [
            f"   {metric}: {_shown(metric, x, evaluation)}" for metric, x in evaluation.scores().items()
        ]
        lines += [f"   {note}" for note in _notes(evaluation)]
        lines.append("")
    lines.append(f"📁 Complete evaluation results saved to: {path}")
    if logged:
        lines.append(f"📊 Evaluation results logged to WandB: {list(logged)}")
    return "\n".join(lines)


def _shown(metric: str, value: float | None, evaluation: Evaluation) -> str:
    if value is not None:
        return f"{value:.3f}"
    return f"missing (needs {metric.removeprefix('pass@')} judged samples per problem, n is {evaluation.n})"


def _notes(evaluation: Evaluation) -> list[str]:
    """What the scores rest on, and anything that makes them less reliable."""
    notes = [_footing(evaluation), _details(evaluation)]
    if trained := evaluation.contaminated:
        notes.append(
            f"⚠️  NOT HELD OUT: {len(trained)} of {evaluation.problems} problems were in the training data "
            f"({_some(trained)})"
        )
    if short := sum(0 < count < evaluation.n for count in evaluation.counted):
        notes.append(f"{short} problems lack verdicts, and count for the k alone that they have samples for")
    if found := evaluation.disagreements:
        named = [
            f"{d['id']}#{d['sample']} {d['inline']} inline, {d['grading']} {d['outcome']}" for d in found
        ]
        notes.append(f"{len(found)} samples judged otherwise by inline grading: {_some(named, '; ')}")
    elif evaluation.settings.get("judging") == "auto":
        notes.append("inline grading, the harness's, agrees on every sample")
    return notes


def _footing(evaluation: Evaluation) -> str:
    """One line on what the scores rest on."""
    parts = [f"{evaluation.problems} problems, n {evaluation.n}"]
    if evaluation.interval and is_interval(evaluation.interval):
        low, high = evaluation.interval
        parts.insert(0, f"95 % interval of pass@1 {low:.3f} to {high:.3f}")
    chosen = [f"{k} {evaluation.settings[k]}" for k in ("temperature", "top_p") if k in evaluation.settings]
    timeouts = evaluation.outcomes.get("timeout", 0)
    parts += [*chosen, f"{timeouts} time-outs", f"{evaluation.infra_errors} infrastructure errors"]
    return f"({', '.join(parts)})"


def _details(evaluation: Evaluation) -> str:
    rates = {
        "tests passed": evaluation.test_pass_rate,
        "accuracy": evaluation.accuracy,
        "success rate": evaluation.success_rate,
    }
    shares = [f"{name} {percent(rate)}" for name, rate in rates.items() if rate is not None]
    return ", ".join([*shares, *(f"{name} {count}" for name, count in evaluation.outcomes.items())])


def _some(names: Sequence[str], between: str = ", ", most: int = 5) -> str:
    more = f"{between}and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more
