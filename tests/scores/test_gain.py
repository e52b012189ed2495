"""What is said of a gain is what the counts say, in the same words and digits wherever it is said."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coderl.publish import card
from coderl.report import headline, load_run, page, table
from coderl.runs.summary import fit_summary_text, summary_gain, summary_scores
from coderl.scores import Evaluation, save_results, summary_text
from coderl.scores.compare import compare_task
from coderl.scores.gain import gain_sentences
from coderl.scores.numbers import between, percent, points, points_between
from coderl.scores.statistics import bootstrap_interval, pass_at_k

N = 4
SETTINGS = {"temperature": 1.0, "top_p": 1.0}
Counts = list[tuple[int, int]]
"""For each problem, its samples that pass and its samples with a verdict."""


def evaluation(counts: Counts, contaminated: list[str] | None = None, **settings: Any) -> Evaluation:
    known = [(c, m) for c, m in counts if m]
    means = {k: [pass_at_k(m, c, k) for c, m in known if m >= k] for k in (1, N, N + 1)}
    passed, judged = (sum(column) for column in zip(*counts, strict=True))
    return Evaluation(
        task="embedded",
        pass_at_k={k: fmean(values) if values else None for k, values in means.items()},
        interval=bootstrap_interval(means[1]) if known else None,
        accuracy=None,
        success_rate=None,
        test_pass_rate=None,
        n=N,
        problems=len(counts),
        outcomes={"passed": passed, "failed": judged - passed},
        timeouts_rerun=0,
        infra_errors=N * len(counts) - judged,
        seconds=1.0,
        settings=SETTINGS | settings,
        contaminated=contaminated,
        disagreements=[],
        ids=[f"embedded/{i}" for i in range(len(counts))],
        correct=[c for c, _ in counts],
        counted=[m for _, m in counts],
        first=[None] * len(counts),
        generations=[["pass"] * N for _ in counts],
        references=[""] * len(counts),
    )


def finished(folder: Path, before: Evaluation | None, after: Evaluation | None) -> dict[str, Any]:
    """What PostFit writes at the end of a fit; returns the summary."""
    paths: dict[str, str] = {}
    for key, name, each in (("before", "before", before), ("evaluation", "grpo", after)):
        if each:
            paths[key] = str(folder / f"evaluation_results_m_{name}_20241201_143022.json")
            save_results({each.task: each}, Path(paths[key]))
    scores = [None if each is None else summary_scores(each) for each in (before, after)]
    summary = {
        "method": "grpo",
        "steps": 3,
        "resumed_at": 0,
        "seconds": 1.0,
        "before": scores[0],
        "after": scores[1],
        **summary_gain(scores[0], Path(paths["before"]) if before else None, after),
        "tasks": {"embedded": scores[1]} if after else {},
        "paths": paths,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "logs").mkdir()
    (folder / "adapter").mkdir()
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


counts = st.integers(0, N).flatmap(lambda m: st.tuples(st.integers(0, m), st.just(m)))
full = st.tuples(st.integers(0, N), st.just(N))
drawn = st.lists(
    st.tuples(st.one_of(full, full, counts), st.one_of(full, full, counts)), min_size=1, max_size=40
)
gained = st.lists(
    st.builds(lambda c, step: ((c, N), (c + step, N)), st.integers(0, N - 1), st.sampled_from([0, 1, 1, 1])),
    min_size=10,
    max_size=40,
)


@settings(max_examples=20, deadline=None)
@given(st.one_of(drawn, gained), st.booleans())
def test_console_summary_report_and_card_say_the_same(pairs: Any, swapped: bool) -> None:
    before, after = (list(side) for side in zip(*pairs, strict=True))
    if swapped:
        before, after = after, before
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        summary = finished(folder, evaluation(before), evaluation(after))
        said = summary["verdict"]
        run = load_run(folder)
        card.write(folder / "adapter", "m", folder)
        written = (folder / "adapter" / card.FILE).read_text()
        console = fit_summary_text(summary, folder / "summary.json")
        (row,) = table([run])
    assert said and all(sentence in console for sentence in said)
    assert " ".join(said) in headline(run) and " ".join(said) in written
    everything = console + headline(run) + written
    assert not re.search(r"\b(nan|None|inf|-0\.0)\b", everything)
    gain = summary["gain"]
    judged = [(a, b) for a, b in zip(before, after, strict=True) if a[1] and b[1]]
    assert (gain is None) == (not judged)
    if gain is None:
        assert not re.search("rose|fell|ris|fall|change", everything)
        return
    # By another way: from the counts.
    differences = [b[0] / b[1] - a[0] / a[1] for a, b in judged]
    low, high = bootstrap_interval(differences)
    first = said[0]
    assert f"on {len(judged)} problem" in first
    if gained_points := re.search(r"\(([-+][\d.]+) points", first):
        assert float(gained_points[1]) == pytest.approx(100 * fmean(differences), abs=0.05 + 1e-9)
    else:
        assert set(differences) == {0.0}
    if "rose" in first or "risen" in first:
        assert low > 0
    elif "fell" in first or "fallen" in first:
        assert high < 0
    else:
        assert (low < 0.0005 and high > -0.0005) or high - low < 1e-9
    assert row["gain in pass@1, points"] == points(gain["pass@1"]["difference"])
    assert row["gain in pass@1, points"] in first or "did not change" in first
    for side in ("before", "after"):
        shown = percent(gain["pass@1"][side])
        assert shown in first
        assert row[f"pass@1 {side}"] == shown
        if len(judged) == len(before):  # no problem is left out of the pairs
            assert f"| {shown} |" in written
    if gain.get(f"pass@{N}"):
        assert said[1].startswith(f"pass@{N} ") and row[f"pass@{N} after"] != "–"


def test_rose_is_said_of_noise_no_more_often_than_the_interval_allows() -> None:
    """The same policy before and after: 95 of 100 comparisons find nothing, and no word of a gain is said."""
    chance, false = np.random.default_rng(0), 0
    for _ in range(150):
        rates = chance.choice([0.1, 0.5, 0.9], size=60)
        sides = [{"n": N, "ids": [str(i) for i in range(60)], "counted": [N] * 60} for _ in range(2)]
        x, y = (side | {"correct": chance.binomial(N, rates).tolist()} for side in sides)
        (said,) = gain_sentences(x, y, compare_task("noise", x, y))
        false += bool(re.search("rose|fell|ris|fall", said))
    assert false / 150 < 0.09


@given(st.integers(0, 2000), st.integers(1, 2000))
def test_a_score_has_the_same_digits_as_a_share_and_in_per_cent(part: int, whole: int) -> None:
    share = min(part, whole) / whole
    assert float(percent(share).removesuffix(" %")) == pytest.approx(100 * float(f"{share:.3f}"))
    assert points(share) == f"+{percent(share)}".removesuffix(" %")
    assert points(-share).lstrip("+-") == percent(share).removesuffix(" %")


def test_what_is_not_known_is_a_dash() -> None:
    for unknown in (None, float("nan"), float("inf"), "x"):
        assert percent(unknown) == "–"
    for ends in (None, (), (0.5,), (0.0, 0.0), (1.0, 1.0), (0.1, 0.1 + 1e-17), (None, 1.0)):
        assert between(ends) == points_between(ends) == "–"
    assert between((0.0, 0.03)) == "0.0 to 3.0 %" and points_between([-0.02, 0.0441]) == "-2.0 to +4.4"


MANY = 30


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (
            [(0, N)] * MANY,
            [(N, N)] * MANY,
            "Held-out pass@1 rose from 0.0 % to 100.0 % (+100.0 points on every problem), on 30 problems of",
        ),
        ([(0, N)] * MANY, [(0, N)] * MANY, "Held-out pass@1 did not change: 0.0 % before and after"),
        ([(N, N)] * MANY, [(N, N)] * MANY, "Held-out pass@1 did not change: 100.0 % before and after"),
        (
            [(1, N)],
            [(3, N)],
            "no clear change (+50.0 points on the one problem, too few to tell): 25.0 % before",
        ),
        ([(3, N)] * 5, [(1, N)] * 5, "no clear change (-50.0 points on every problem, too few to tell): 75"),
        ([(0, 0)] * 3, [(N, N)] * 3, "Held-out pass@1 after training is 100.0 % (pass@4 100.0 %)."),
        ([(N, N)] * 3, [(0, 0)] * 3, "Held-out pass@1 after training is not known: no sample got a verdict."),
        (
            None,
            [(1, N), (3, N)],
            "Held-out pass@1 after training is 50.0 % (95 % interval 25.0 to 75.0 %, pass@4",
        ),
        (
            [(1, N), (3, N)],
            None,
            "Held-out pass@1 before training is 50.0 % (95 % interval 25.0 to 75.0 %, pass@4",
        ),
    ],
)
def test_edges_are_said_in_plain_words(
    tmp_path: Path, before: Counts | None, after: Counts | None, said: str
) -> None:
    sides = [None if counts is None else evaluation(counts) for counts in (before, after)]
    summary = finished(tmp_path, *sides)
    found, text = load_run(tmp_path), " ".join(summary["verdict"])
    assert said in text and text in headline(found)
    html = page([found])
    assert said in html.replace("&#43;", "+")
    assert not re.search(r"\b(nan|inf)\b|0\.0 to 0\.0|100\.0 to 100\.0", html.split("Settings</h2>")[0])


def test_a_fit_that_evaluates_nothing_says_nothing_of_scores(tmp_path: Path) -> None:
    summary = finished(tmp_path, None, None)
    assert (summary["gain"], summary["verdict"]) == (None, [])
    assert fit_summary_text(summary, tmp_path / "summary.json").startswith(
        "GRPO ended after 3 steps and 1 seconds.\n"
    )
    assert headline(load_run(tmp_path)) == "Nothing was measured in training."
    assert "pass@1" not in page([load_run(tmp_path)])


def test_problems_that_were_trained_on_are_not_called_held_out(tmp_path: Path) -> None:
    met = ["embedded/0"]
    summary = finished(tmp_path, evaluation([(0, N)] * 9), evaluation([(N, N)] * 9, contaminated=met))
    assert summary["verdict"][0].startswith("pass@1, not held out, rose from 0.0 % to 100.0 %")


def test_other_settings_after_training_than_before_are_named(tmp_path: Path) -> None:
    x, y = evaluation([(0, N)] * 9), evaluation([(N, N)] * 9, temperature=0.2, cpu="other")
    said = finished(tmp_path, x, y)["verdict"]
    assert said[-1] == (
        "The two were not measured alike (temperature 1 and then 0.2): training is not all that differs."
    )


def test_a_report_without_the_results_from_before_says_what_the_fit_said(tmp_path: Path) -> None:
    summary = finished(tmp_path, evaluation([(1, N), (2, N)] * 9), evaluation([(2, N), (4, N)] * 9))
    Path(summary["paths"]["before"]).unlink()
    assert headline(load_run(tmp_path)) == " ".join(summary["verdict"])
    assert "rose" in summary["verdict"][0]
    del summary["verdict"], summary["gain"]  # as an earlier version wrote it
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    said = headline(load_run(tmp_path))
    assert "rose" not in said and "more than chance cannot be told" in said


def test_problems_left_out_of_the_pairs_are_counted(tmp_path: Path) -> None:
    x, y = evaluation([(1, N)] * 8 + [(0, 0)]), evaluation([(3, N)] * 9)
    assert (
        "on 8 problems of embedded (left out: 1 without a verdict)" in finished(tmp_path, x, y)["verdict"][0]
    )


def test_problems_with_fewer_samples_than_k_are_not_counted_for_pass_at_k(tmp_path: Path) -> None:
    x, y = evaluation([(0, N)] * 8 + [(0, 2)]), evaluation([(0, N)] + [(3, N)] * 8)
    first, second = finished(tmp_path, x, y)["verdict"]
    assert "on 9 problems" in first and second.startswith(f"pass@{N} rose") and "on 8 problems." in second


def test_the_recipes_summary_rounds_alike() -> None:
    found = evaluation([(1, N)] * 9 + [(0, N)] * 191)  # 0.01125
    assert "pass@1: 0.011" in summary_text({"embedded": found}, "x.json")
    assert asdict(found)["pass_at_k"][1] == 0.01125 and percent(0.01125) == "1.1 %"
    assert "pass@1: 0.013" in summary_text({"embedded": evaluation([(1, N)] * 10 + [(0, N)] * 190)}, "x.json")
    assert percent(0.0125) == "1.3 %"  # 100 times it is 1.25, of which Python makes 1.2
