"""``coderl report``: figures are those of the files, nothing a model wrote is live, half a run is enough."""

from __future__ import annotations

import base64
import csv
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.patches import Rectangle

from coderl.cli import main, run
from coderl.errors import UserError
from coderl.report import changes, cover, curves, headline, lost, moments, page, won
from coderl.report.figures import MOST_POINTS, smoothed, thinned
from coderl.report.programs import Answers, Change, printable
from coderl.runs.metrics import Series, read_metrics
from coderl.runs.reading import load_run, load_runs
from coderl.scores.compare import compare

FIT = "fit -c quickstart.yaml --data.limit_test 6 --data.batch_size 2 --trainer.enable_progress_bar false"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps that was resumed for two more. Nobody writes to it."""
    folder = tmp_path_factory.mktemp("report") / "trained"
    assert run([*FIT.split(), "--trainer.max_steps", "2", "--trainer.default_root_dir", str(folder)])
    config, checkpoint = folder / "logs/version_0/config.yaml", folder / "checkpoints/last.ckpt"
    again = f"fit -c {config} --ckpt_path {checkpoint} --trainer.max_steps 4"
    assert run(again.split())
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run, to be changed."""
    kept = shutil.ignore_patterns("checkpoints", "adapter")
    copy = Path(shutil.copytree(finished, tmp_path / "trained", ignore=kept))
    summary = copy / "summary.json"
    summary.write_text(summary.read_text().replace(str(finished), str(copy)))
    return copy


class Reader(HTMLParser):
    """Tags, attributes and the text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.text += " "
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def body(folder: Path) -> list[dict[str, Any]]:
    """The results before and after, as they stand in the files."""
    paths = json.loads((folder / "summary.json").read_text())["paths"]
    return [json.loads((folder / Path(paths[key]).name).read_text()) for key in ("before", "evaluation")]


def write_log(folder: Path, version: int, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"logs/version_{version}/metrics.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, sorted({"step"}.union(*rows)))
        writer.writeheader()
        writer.writerows(rows)
    return path


def error_of(capsys: pytest.CaptureFixture[str], *args: str, code: int = 1) -> str:
    """Run, demand the exit code and one line on stderr."""
    assert main(["report", *args]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("coderl: error: ")
    return line


# -- the figures -----------------------------------------------------------------------------------------


def test_the_scores_on_the_page_are_those_in_the_files(finished: Path) -> None:
    found = load_run(finished)
    before, after = (side["embedded"] for side in body(finished))
    (comparison,) = compare(found.before, found.after)  # type: ignore[arg-type]
    words = Reader(page([found])).words
    for scores in (before, after):
        ends = [100 * end for end in scores["interval"]]
        assert f"{100 * scores['pass@1']:.1f} %" in headline(found)
        assert f"{ends[0]:.1f} to {ends[1]:.1f} %" in words
        assert ", ".join(f"{name} {count}" for name, count in scores["outcomes"].items()) in words
        assert f"{100 * scores['pass@8']:.1f} %" in words
    assert " ".join(found.summary["verdict"]) in headline(found) and headline(found) in words
    assert comparison.evidence in words
    assert f"{len(comparison.won)} problem" in words and f"{len(comparison.lost)} problem" in words
    for name in (*comparison.won, *comparison.lost):
        assert name in words
    assert found.summary["versions"]["torch"] in words and not found.missing


def test_metrics_are_read_from_all_logs_of_a_resumed_run(finished: Path) -> None:
    found = load_run(finished)
    rows: dict[float, dict[str, str]] = {}
    for version in (0, 1):
        with (finished / f"logs/version_{version}/metrics.csv").open() as file:
            rows |= {float(row["rollout_step"]): row for row in csv.DictReader(file) if row["rollout_step"]}
    assert list(rows) == [1, 2, 3, 4] and found.steps == 4 and found.step_name == "rollout step"
    for name in ("reward/mean", "outcome/passed", "seconds/update", "grad_norm"):
        assert found.metrics[name].steps.tolist() == list(rows)
        assert found.metrics[name].values.tolist() == [float(row[name]) for row in rows.values()]
    assert not any(name.startswith("final_eval") for name in found.metrics)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 8)), min_size=1, max_size=4))
def test_steps_that_a_resumed_run_repeated_replace_the_earlier_ones(
    tmp_path_factory: pytest.TempPathFactory, starts: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("joined")
    kept: list[tuple[int, int]] = []  # step, and the start that made it
    files = []
    for version, (first, count) in enumerate(starts):
        rows = [{"step": s, "rollout_step": s + 1, "m": version} for s in range(first, first + count)]
        files.append(write_log(folder, version, rows))
        if rows:
            kept = [pair for pair in kept if pair[0] <= first] + [
                (s + 1, version) for s in range(first, first + count)
            ]
    found = read_metrics(files)
    joined = [] if "m" not in found else list(zip(found["m"].steps, found["m"].values, strict=True))
    assert joined == kept


def test_starts_are_ordered_by_number_and_an_incomplete_last_line_is_ignored(tmp_path: Path) -> None:
    for version in (0, 2, 10):
        path = write_log(tmp_path, version, [{"step": version, "loss/sft": version}])
    with path.open("a") as file:
        file.write("1.5,1")
    found = load_run(tmp_path)
    assert [log.name for log in found.logs] == ["version_0", "version_2", "version_10"]
    assert found.metrics["loss/sft"].values.tolist() == [0, 2, 10]
    assert found.metrics["loss/sft"].steps.tolist() == [1, 3, 11]


@given(st.lists(st.floats(-10, 10) | st.just(math.nan), max_size=40), st.sampled_from([1, 3, 5, 9]))
def test_the_smoothed_line_is_a_centred_mean(values: list[float], width: int) -> None:
    line = smoothed(np.array(values), width)
    for place in range(len(values)):
        part = [v for i, v in enumerate(values) if abs(i - place) <= width // 2 and not math.isnan(v)]
        assert line[place] == pytest.approx(
            sum(part) / len(part) if part else math.nan, abs=1e-9, nan_ok=True
        )


@given(st.integers(1, 4000))
def test_long_runs_are_drawn_with_few_points_of_the_same_mean(count: int) -> None:
    series = Series(np.arange(1.0, count + 1), np.arange(float(count)) % 7.0)
    few, share = thinned(series)
    assert len(few) <= MOST_POINTS and (share == 1) == (count <= MOST_POINTS)
    sizes = [min(share, count - i) for i in range(0, count, share)]
    assert np.average(few.values, weights=sizes) == pytest.approx(series.values.mean())
    assert np.average(few.steps, weights=sizes) == pytest.approx(series.steps.mean())


def test_means_over_steps_are_means_over_their_samples(tmp_path: Path) -> None:
    """An epoch's last step may have few of them. Seconds count by the step."""
    counts, chance = [96, 96, 16] * 400, np.random.default_rng(0)
    values = chance.random(len(counts)).round(6)
    rows = [
        {"step": i, "rollout_step": i + 1, "rollout/samples": n, "reward/passed": v, "seconds/update": v}
        for i, (n, v) in enumerate(zip(counts, values.tolist(), strict=True))
    ]
    found = read_metrics([write_log(tmp_path, 0, rows)])
    passed, seconds = found["reward/passed"], found["seconds/update"]
    assert passed.mean() == pytest.approx(np.average(values, weights=counts))
    assert passed.mean(last=3) == pytest.approx(np.average(values[-3:], weights=counts[-3:]))
    assert seconds.mean() == pytest.approx(values.mean())
    few, share = thinned(passed)
    assert share > 1 and few.mean() == pytest.approx(passed.mean())
    assert few.values[0] == pytest.approx(np.average(values[:share], weights=counts[:share]))
    line = smoothed(values, 3, passed.weights)
    assert line[3] == pytest.approx(np.average(values[2:5], weights=counts[2:5]))


def test_an_interval_that_rounding_puts_beside_its_score_is_drawn(folder: Path) -> None:
    (results,) = folder.glob("evaluation_results_*_before_*")
    whole = json.loads(results.read_text())
    whole["embedded"] |= {"pass@1": 1 / 3, "interval": [math.nextafter(1 / 3, 1)] * 2}
    results.write_text(json.dumps(whole))
    assert cover(load_run(folder)) is not None


def test_curves_and_bars_show_the_metrics_and_scores(finished: Path) -> None:
    found = load_run(finished)
    panels = {axes.get_title(loc="left"): axes for axes in curves(found).axes}
    drawn = panels["Programs that pass in training"].get_lines()[0]
    values = found.metrics["reward/passed"]
    assert np.array_equal(np.asarray(drawn.get_ydata()), 100 * values.values)
    assert np.array_equal(np.asarray(drawn.get_xdata()), values.steps)
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in panels.values() if axes.axison)
    (bars,) = [axes for axes in cover(found).axes if "pass@1" in axes.get_title(loc="left")]  # type: ignore[union-attr]
    heights = [bar.get_height() for bar in bars.patches if isinstance(bar, Rectangle)]
    assert heights == pytest.approx([100 * side["embedded"]["pass@1"] for side in body(finished)])


# -- programs --------------------------------------------------------------------------------------------


def test_problems_won_and_lost_are_the_comparisons(finished: Path) -> None:
    found = load_run(finished)
    everything = changes(found)
    assert {change.id for change in won(everything)} == set(found.comparisons[0].won)
    assert {change.id for change in lost(everything)} == set(found.comparisons[0].lost)
    assert [change.gain for change in everything] == sorted((c.gain for c in everything), reverse=True)
    assert sum(c.gain for c in everything) / len(everything) == pytest.approx(found.comparisons[0].difference)
    stem = found.after.stem.removeprefix("evaluation_results_")  # type: ignore[union-attr]
    programs = json.loads((finished / f"generations_{stem}_embedded.json").read_text())
    place = body(finished)[1]["embedded"]["ids"].index(everything[0].id)
    assert everything[0].after.programs == programs[place]


LINES = st.lists(
    st.sampled_from(["", "a", "    return x", "    return y", "def f():"]), min_size=1, max_size=9
)


@given(LINES, LINES)
def test_side_by_side_are_all_lines_of_both_and_marked_are_those_that_differ(
    old: list[str], new: list[str]
) -> None:
    sides = ["\n".join(lines) for lines in (old, new)]
    change = Change("p", *(Answers([side], 0, 1, False) for side in sides))
    for place, side in enumerate(sides):
        shown = [row[place] for row in change.rows() if row[place] is not None]
        assert shown == printable(side).split("\n")
    assert all((left != right) == differs for left, right, differs in change.rows() if not differs)
    assert any(differs for *_, differs in change.rows()) == (printable(sides[0]) != printable(sides[1]))
    kept = [line[2:] for line in change.diff().split("\n") if line[:1] in " +"]
    assert kept == printable(sides[1]).split("\n")


@given(st.text(max_size=300))
def test_printable_text_has_visible_characters_and_a_limited_length(text: str) -> None:
    shown = printable(text)
    assert all(line.isprintable() for line in shown.split("\n"))
    shown.encode()
    if text.isprintable():
        assert shown == text


HOSTILE = (
    "</pre></details><script>alert(1)</script><img src=x onerror=alert(1)>\n"
    "{{ 7 * 191 }}{% raw %} &lt; \" ' <!-- \x1b[31m \x00 \u202e \ud800 ]]> <svg onload=alert(1)>\n"
    + "<b>"
    * 9000
)


def test_markup_in_programs_and_names_is_shown_as_text(folder: Path) -> None:
    for path in folder.glob("generations_*.json"):
        rows = json.loads(path.read_text())
        path.write_text(json.dumps([[HOSTILE + program for program in row] for row in rows]))
    rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"program": HOSTILE, "message": HOSTILE, "problem": HOSTILE, "outcome": HOSTILE}
    (folder / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (config,) = folder.glob("logs/version_1/config.yaml")
    config.write_text(f"# {HOSTILE}".encode(errors="replace").decode())
    without(folder, "logs/*/metrics.csv")
    moved = folder.rename(folder.with_name("<script>alert('name')<"))
    assert main(["report", str(moved)]) == 0
    html = (moved / "report.html").read_text()
    seen = Reader(html)
    assert not seen.tags & {"script", "iframe", "object", "embed", "link", "base", "form", "svg", "b>"}
    assert len(images(seen)) == seen.html.count("<img ")
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in seen.text and "{{ 7 * 191 }}" in seen.text and "1337" not in html
    assert not set("\x00\x1b\u202e") & set(html)
    assert len(html) < 3e6


def images(seen: Reader) -> list[str]:
    """The SVG texts of a page's images."""
    head = "data:image/svg+xml;base64,"
    sources = [value for name, value in seen.attributes if name == "src"]
    assert all(source.startswith(head) for source in sources)
    found = [base64.b64decode(source.removeprefix(head), validate=True).decode() for source in sources]
    for svg in found:
        ElementTree.fromstring(svg)  # a browser shows no image of XML that is not well-formed
    return found


def test_the_page_needs_no_other_file_and_no_script(finished: Path) -> None:
    html = page([load_run(finished)])
    seen = Reader(html)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert ("content", policy) in seen.attributes and "script" not in seen.tags
    links = {"href", "xlink:href", "srcset", "action", "data", "poster"}
    assert not [name for name, _ in seen.attributes if name in links]
    assert "url(" not in html and "@import" not in html
    drawn = images(seen)
    assert len(drawn) == 5  # summary, curves, every other metric, outcomes, time
    for svg in drawn:
        inside = Reader(svg)
        assert "script" not in inside.tags and "image" not in inside.tags
        assert not [name for name, _ in inside.attributes if name.startswith("on")]
        used = [value for name, value in inside.attributes if name == "xlink:href"]
        assert all(value.startswith("#") for value in used)


def test_figures_have_alternative_texts_and_a_white_ground_in_dark_mode(finished: Path) -> None:
    seen = Reader(page([load_run(finished)]))
    texts = [value for name, value in seen.attributes if name == "alt"]
    assert len(texts) == len(images(seen)) and all(len(text) > 20 for text in texts)
    assert any(text.startswith("Curves: Reward, Programs that pass in training") for text in texts)
    for svg in images(seen):
        ground = re.search(r'<g id="patch_1">\s*<path d="[^"]*" style="fill: (#\w+)', svg)
        assert ground and ground[1] == "#ffffff"


@pytest.mark.parametrize(
    "pattern", ["logs/version_1/config.yaml", "completions.jsonl", "generations_*_before_*", "summary.json"]
)
def test_a_link_out_of_the_run_folder_is_not_followed(folder: Path, pattern: str) -> None:
    (link,) = folder.glob(pattern)
    outside = folder.parent / "secret"
    text = link.read_text()
    outside.write_text(f"# secret\n{text}" if pattern.endswith("yaml") else text)
    link.unlink()
    link.symlink_to(outside)
    found = load_run(folder)
    assert f"{link.name} leads out of the run folder and is not read" in "; ".join(found.missing)
    assert "# secret" not in found.config_text
    if link.name.startswith("generations"):
        assert not any(change.before.programs for change in changes(found))


def test_results_elsewhere_are_not_read_and_a_moved_run_finds_its_own(folder: Path) -> None:
    (results,) = folder.glob("evaluation_results_*_before_*")
    inside = folder / "deep" / "renamed.json"
    inside.parent.mkdir()
    shutil.copy(results, inside)
    edit(folder, "paths", before=str(inside))
    assert load_run(folder).before == inside
    elsewhere = Path(shutil.move(inside, folder.parent / "renamed.json"))
    edit(folder, "paths", before=str(elsewhere))
    assert load_run(folder).before is None
    edit(folder, "paths", before=f"/gone/{results.name}")
    moved = folder.rename(folder.with_name("moved"))
    link = moved.with_name("link")
    link.symlink_to(moved)
    assert load_run(link).before == link / results.name and not load_run(link).missing


MARKS = "\x1b[31m\u202e\u2066"


def test_control_characters_in_names_and_values_are_escaped(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = body(folder)[1]["embedded"]
    whole["outcomes"] = {MARKS + name: count for name, count in whole["outcomes"].items()}
    whole["settings"] |= {MARKS: MARKS, "nested": {MARKS: [MARKS]}}
    for file in folder.glob("evaluation_results_*"):
        file.write_text(json.dumps({"embedded" + MARKS: whole | {"infra_errors": MARKS}}))
    edit(folder, "versions", **{MARKS: MARKS})
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"ended": MARKS, "model": MARKS, "paths": summary["paths"] | {MARKS: MARKS}}
    (folder / "summary.json").write_text(json.dumps(summary))
    write_log(folder, 2, [{"step": 9, "rollout_step": 10, "reward/" + MARKS: 1.0}])
    assert main(["report", str(folder)]) == 0
    html = (folder / "report.html").read_text()
    assert not {*MARKS[:1], *MARKS[-2:]} & {*html, *capsys.readouterr().out}
    assert html.count(r"\x1b[31m\u202e\u2066") > 10
    assert images(Reader(html))


# -- parts of runs ---------------------------------------------------------------------------------------


def without(folder: Path, *patterns: str) -> None:
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


AFTER = ("summary.json", "*_grpo_*.json")


@pytest.mark.parametrize(
    ("gone", "said", "told"),
    [
        (AFTER, "no summary.json", "Held-out pass@1 before training is "),
        ((*AFTER, "*_before_*.json"), "nothing was evaluated", "Programs that pass in training: "),
        (("logs",), "no config.yaml", "Held-out pass@1 "),
        (("*_before_*.json",), "no results file from before", "Held-out pass@1 "),
        (("generations_*", "completions.jsonl"), "no completions.jsonl", "Held-out pass@1 "),
    ],
)
def test_an_unfinished_run_is_reported_as_far_as_it_got(
    folder: Path, gone: tuple[str, ...], said: str, told: str
) -> None:
    without(folder, *gone)
    found = load_run(folder)
    assert told in headline(found) and said in "; ".join(found.missing)
    words = Reader(page([found])).words
    assert said in words and headline(found) in words


def test_a_start_that_was_killed_has_a_page_and_no_png(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without(folder, *AFTER, "*_before_*.json", "completions.jsonl", "logs/*/metrics.csv")
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"Nothing was measured in training.\n📁 {folder / 'report.html'}\n"
    assert not (folder / "report.png").exists()


def test_nan_and_infinite_metrics_are_gaps_in_the_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = [0.5, math.nan, 1.0, math.inf, 0.0]
    rows = [
        {"step": i, "rollout_step": i + 1, "reward/mean": v, "reward/passed": math.nan}
        for i, v in enumerate(values)
    ]
    write_log(tmp_path, 0, [*rows, {"step": 9, "val/pass@1": 0.25}])
    found = load_run(tmp_path)
    assert found.metrics["reward/mean"].mean() == pytest.approx(0.5)
    assert headline(found) == "The mean reward: 0.500 in the first of 5 rollout steps, 0.000 in the last."
    (axes,) = (axes for axes in curves(found).axes if axes.get_title(loc="left") == "Reward")
    drawn = np.asarray(axes.get_lines()[0].get_ydata())
    assert np.isnan(drawn).tolist() == [False, True, False, True, False]
    assert main(["report", str(tmp_path)]) == 0


def test_scores_on_different_problems_are_not_compared(folder: Path) -> None:
    (results,) = folder.glob("evaluation_results_*_before_*")
    whole = json.loads(results.read_text())
    whole["embedded"]["ids"] = [f"other/{i}" for i in range(len(whole["embedded"]["ids"]))]
    results.write_text(json.dumps(whole))
    found = load_run(folder)
    assert found.held_out[0] is None and not changes(found)
    assert "rose" not in headline(found) and "Held-out pass@1 after training is" in headline(found)
    assert any("no problem in common" in line for line in found.missing)


def test_vast_numbers_and_names_in_other_scripts_are_drawn(tmp_path: Path) -> None:
    folder = tmp_path / "名前 $x^2$ & <b>"
    rows = [
        {"step": i, "reward/报酬$_{": i, "grad_norm": 10.0 ** (300 * i), "seconds/a": 1e308} for i in range(2)
    ]
    write_log(folder, 0, rows)
    assert main(["report", str(folder)]) == 0
    assert "名前 $x^2$ &amp; &lt;b&gt;" in (folder / "report.html").read_text()


def test_a_supervised_run_has_its_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(tmp_path, 0, [{"step": i, "loss/sft": 2.0 - i / 10, "epoch": 0} for i in range(12)])
    (tmp_path / "logs/version_0/config.yaml").write_text("model: {class_path: coderl.algorithms.SFT}\n")
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith(
        "The loss: 1.800 nats per token in the first 5 of 12 steps, 1.100"
    )
    assert "evaluat" not in " ".join(load_run(tmp_path).missing)


def test_the_worst_and_best_programs_of_moments_are_shown(tmp_path: Path) -> None:
    write_log(tmp_path, 0, [{"step": 0, "reward/mean": 0}])
    rows = [
        {"rollout_step": s, "reward": r, "program": f"{s} {r}"} for s in range(1, 90, 4) for r in (0.5, 0, 1)
    ]
    again = [{"rollout_step": 81, "reward": 3, "program": "resumed"}]
    lines = [json.dumps(row) + "\n" for row in rows + again] + ['{"half": ']
    (tmp_path / "completions.jsonl").write_text("".join(lines))
    found = moments(load_run(tmp_path), most=5)
    assert [moment["step"] for moment in found] == [1, 21, 41, 61, 81]
    assert [moment["best"]["program"] for moment in found] == ["1 1", "21 1", "41 1", "61 1", "resumed"]
    assert found[0]["worst"]["program"] == "1 0"


# -- several runs ----------------------------------------------------------------------------------------


def test_several_runs_stand_side_by_side(
    finished: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without(folder, *AFTER)
    config = folder / "logs/version_1/config.yaml"
    config.write_text(config.read_text().replace("learning_rate: 0.002", "learning_rate: 0.5"))
    monkeypatch.chdir(folder.parent)
    assert main(["report", str(finished), str(folder), str(finished)]) == 0
    names = [f"{path.parent.name}/trained" for path in (finished, folder)]
    assert [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()[:2]] == names
    words = Reader(Path("report.html").read_text()).words
    assert "model.init_args.learning_rate 0.002 0.5" in words
    assert f"run {names[0]} {names[1]} method GRPO GRPO" in words
    drawn = curves(load_runs([finished, folder]), ["reward/mean"])
    colours = {line.get_color() for line in drawn.axes[0].get_lines()}
    assert len(colours) == 2 and [text.get_text() for text in drawn.legends[0].texts] == names
    assert Path("report.png").read_bytes().startswith(b"\x89PNG")


# -- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("summary.json", b'{"steps": 3', "summary.json: malformed JSON"),
        ("summary.json", b"[]", "summary.json: is damaged (it holds a JSON list)"),
        ("summary.json", b"{}", "summary.json: is damaged (steps missing"),
        ("logs/version_1/metrics.csv", b"step,a\n1\n2,2\n", "line 2 has 1 columns, not 2"),
        ("logs/version_1/metrics.csv", b"step,a\n1,x\n2,2\n", "line 2 has 'x' where a number should be"),
        ("logs/version_1/metrics.csv", b"a,b\n1,2\n", "no column `step`"),
        ("logs/version_1/metrics.csv", b"step,a\n,2\n", "line 2 has no step"),
        ("logs/version_1/metrics.csv", b"\xff\xfe\n", "is damaged"),
        ("logs/version_1/metrics.csv", b"step,a\n1,\x00\n", "is damaged"),
        ("completions.jsonl", b'{"rollout_step": 1}\n', "completions.jsonl:1: is damaged"),
        ("completions.jsonl", b'\n{"a\n', "completions.jsonl:2: malformed JSON"),
        ("completions.jsonl", b"[1]\n", "completions.jsonl:1: is no JSON object"),
    ],
)
def test_a_damaged_file_is_an_error_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], file: str, content: bytes, said: str
) -> None:
    (folder / file).write_bytes(content)
    line = error_of(capsys, str(folder))
    assert said in line and str(folder / file) in line and "move it away" in line
    assert not (folder / "report.html").exists()


def test_a_damaged_evaluation_is_an_error_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (programs,) = folder.glob("generations_*_before_*")
    programs.write_text('[["one"]]')
    assert "not a list of programs for each of the problems" in error_of(capsys, str(folder))
    (results,) = folder.glob("evaluation_results_*_before_*")
    results.write_text("{")
    assert f"{results}: malformed JSON" in error_of(capsys, str(folder))


ODD: list[dict[str, Any]] = [
    {"contaminated": 5},
    {"outcomes": [1]},
    {"interval": [0.99, 0.01]},
    {"interval": 5},
    {"interval": ["a", "b"]},
    {"interval": [math.nan, math.nan]},
    {"pass@1": math.inf, "interval": None},
    {"pass@1": 10**400, "interval": None},
]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("place", ["results", "summary"])
def test_impossible_scores_are_an_error_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], odd: dict[str, Any], place: str
) -> None:
    (file,) = folder.glob("evaluation_results_*_before_*" if place == "results" else "summary.json")
    whole = json.loads(file.read_text())
    (whole if place == "results" else whole["tasks"])["embedded"] |= odd
    file.write_text(json.dumps(whole))
    line = error_of(capsys, str(folder))
    assert (
        f"{file}: is damaged" in line
        and ("the scores of 'embedded'" if place == "results" else "scores missing, or") in line
    )


@pytest.mark.parametrize("name", ["../../etc/x", "a/b", "x" * 300, "\u540d" * 90, "\x1b[31m/"])
def test_a_task_name_that_is_no_file_name_is_an_error_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    for file in folder.glob("evaluation_results_*"):
        file.write_text(json.dumps({name: json.loads(file.read_text())["embedded"]}))
    assert "no name of a task" in error_of(capsys, str(folder))


@pytest.mark.parametrize("path", ["/" + "x" * 5000, "a\0b", "../..", 5, None, ["a"]])
def test_an_impossible_path_of_a_results_file_counts_as_missing(folder: Path, path: Any) -> None:
    edit(folder, "paths", before=path)
    assert load_run(folder).before is None


def edit(folder: Path, key: str, **values: Any) -> None:
    """Change what the summary says."""
    whole = json.loads((folder / "summary.json").read_text())
    whole[key] |= values
    (folder / "summary.json").write_text(json.dumps(whole))


def test_seconds_and_rewards_too_large_for_a_float_are_an_error_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(whole | {"seconds": 10**400}))
    assert "seconds missing, or not what a fit writes" in error_of(capsys, str(folder))
    (folder / "summary.json").unlink()
    (folder / "completions.jsonl").write_text(json.dumps({"rollout_step": 1, "reward": 10**400}) + "\n")
    assert "completions.jsonl:1: is damaged" in error_of(capsys, str(folder))
    assert "cannot be read" in error_of(capsys, "x" * 300)


def test_a_folder_that_is_no_run_is_an_error_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    around = folder.parent
    (around / "empty").mkdir()
    (around / "trained-merged").mkdir()
    assert "does not exist" in error_of(capsys, str(around / "nowhere"))
    assert "is a file" in error_of(capsys, str(folder / "summary.json"))
    assert "is no run folder" in error_of(capsys, str(around / "empty"))
    monkeypatch.chdir(around / "empty")
    assert "is no run folder" in error_of(capsys, ".")
    assert f"such as {folder}" in error_of(capsys, str(around))
    assert f"what was made of {folder}: give that" in error_of(capsys, str(around / "trained-merged"))
    assert "no runs given" in error_of(capsys, code=2)


def test_only_an_earlier_report_is_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder = str(folder)
    without(folder, "logs/*/metrics.csv")
    assert main(["report", run_folder]) == 0 and main(["report", run_folder]) == 0
    capsys.readouterr()
    for name in ("notes.html", "taken.png"):
        (folder / name).write_text("mine, of coderl report, <meta name='generator'>")
    (folder / "folder.html").mkdir()
    for output, said in (
        ("notes.html", "is no report"),
        ("taken.html", "taken.png: is there already"),
        ("folder.html", "is a folder"),
        ("summary.json", "is no name for a page"),
    ):
        assert said in error_of(capsys, run_folder, "--output", str(folder / output), code=2)
    assert (folder / "notes.html").read_text() == (folder / "taken.png").read_text()
    assert (folder / "notes.html").read_text().startswith("mine")
    assert not (folder / "taken.html").exists()
    (folder / "locked").write_text("")
    assert "cannot be written" in error_of(capsys, run_folder, "--output", str(folder / "locked/a.html"))


def test_a_run_is_read_by_name_from_python(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.parent)
    found = load_run("trained")
    assert (found.method, found.model, found.finished) == ("GRPO", "embedded", True)
    with pytest.raises(UserError, match="does not exist"):
        load_run("absent")


HEAVY = "{'torch', 'lightning', 'torchmetrics', 'transformers', 'datasets'}"


@pytest.mark.parametrize(
    "code",
    [
        "import coderl.scores.comparison, coderl.scores.compare, coderl.scores.plot, coderl.scores.table",
        "import coderl.report",
        "from coderl.cli import main; assert main(['report', '--help']) == 0",
        "from coderl.cli import main; assert main(['report', sys.argv[1], '--output', sys.argv[2]]) == 0",
    ],
)
def test_reports_and_comparisons_load_no_torch(finished: Path, tmp_path: Path, code: str) -> None:
    script = f"import sys; {code}; print({HEAVY} & set(sys.modules))"
    command = [sys.executable, "-c", script, str(finished), str(tmp_path / "page.html")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_what_a_notebook_imports_loads_no_drawing_before_there_is_a_figure() -> None:
    code = (
        "import sys, coderl.report; print({'torch', 'matplotlib', 'lightning', 'jinja2'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
