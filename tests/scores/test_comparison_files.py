from __future__ import annotations

import json
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from coderl.errors import UsageError, UserError
from coderl.scores.compare import compare, compare_task, read_results, save
from coderl.scores.comparison import Comparison
from coderl.scores.plot import plot
from coderl.scores.statistics import sign_test
from coderl.scores.table import text
from tests.scores.test_comparison import task


def write(path: Path, body: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body))
    return path


# --- files


def two(folder: Path, a: Any, b: Any) -> tuple[Path, Path]:
    return write(folder / "evaluation_results_m_base.json", a), write(folder / "b.json", b)


def test_tasks_of_both_files_are_compared_and_others_named(tmp_path: Path) -> None:
    x = {"mbpp": task([1, 0]), "humaneval": task([1]), "own": task([]), "config": {}}
    y = {"mbpp": task([1, 1]), "mbppplus": task([1]), "own": task([1]), "config": {}}
    a, b = two(tmp_path, x, y)
    (result,) = compare(a, b)
    assert (result.task, result.name_a, result.name_b) == ("mbpp", "m_base", "b")
    assert result.warnings == [
        f"humaneval: only {a} has it; not compared",
        f"mbppplus: only {b} has it; not compared",
        "own: m_base holds no problems; not compared",
    ]


def test_files_of_one_name_are_named_with_their_folders(tmp_path: Path) -> None:
    body = {"mbpp": task([1])}
    names = ["x/run/evaluation_results_m.json", "y/run/evaluation_results_m.json"]
    (result,) = compare(*(write(tmp_path / name, body) for name in names))
    assert [result.name_a, result.name_b] == names
    (result,) = compare(write(tmp_path / "m.json", body), write(tmp_path / "evaluation_results_m.json", body))
    assert (result.name_a, result.name_b) == ("m.json", "evaluation_results_m.json")


def test_one_file_is_not_compared_with_itself(tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", {"mbpp": task([1])})
    (tmp_path / "b.json").symlink_to(a)
    for b in (a, tmp_path / "b.json"):
        with pytest.raises(UsageError, match="are one file; give two"):
            compare(a, b)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("{", "malformed JSON"),
        ("[" * 100_000, "malformed JSON"),
        ("\xff", "malformed JSON"),
        ('[["def f(): pass"]]', "is no results file; give an evaluation_results_"),
        ('{"config": {}}', "is no results file"),
        ('{"name": "x", "tasks": {}}', "is no results file"),
        (
            '{"mbpp": {"pass@1": 0.1}, "config": {}}',
            r"mbpp has no counts per problem \(ids, correct, counted",
        ),
        ('{"mbpp": {"pass@1": 0.1, "ids": ["a"], "correct": [1]}}', r"\(counted missing\): an older file"),
        ('{"mbpp": {"ids": ["a"], "correct": [1], "counted": [1, 1]}}', "not lists of one length"),
        ('{"mbpp": {"ids": 1, "correct": 1, "counted": 1}}', "not lists of one length"),
        ('{"mbpp": {"ids": ["a"], "correct": [2], "counted": [1]}}', "2 correct of 1 samples of problem 'a'"),
        ('{"mbpp": {"ids": ["a"], "correct": [0.5], "counted": [1]}}', "which are no counts"),
        ('{"mbpp": {"ids": [7], "correct": [0], "counted": [1]}}', "which are no counts"),
        ('{"mbpp": {"ids": ["a", "a"], "correct": [0, 1], "counted": [1, 1]}}', "has problem 'a' twice"),
    ],
)
def test_files_that_cannot_be_compared_are_refused_in_a_line(tmp_path: Path, body: str, words: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(body.encode("latin-1"))
    with pytest.raises(UserError, match=words) as caught:
        read_results(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_missing_file_or_a_folder_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.json: cannot be read \(No such file or directory\); give an"):
        read_results(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (
            {"mbpp": task([1])},
            {"humaneval": task([1])},
            "no task in common: .* has mbpp and .* has humaneval",
        ),
        ({"mbpp": task([])}, {"mbpp": task([1])}, "^mbpp: m_base holds no problems$"),
        ({"mbpp": task([1])}, {"mbpp": task([])}, "^mbpp: b holds no problems$"),
        (
            {"mbpp": task([1], ids=["x"])},
            {"mbpp": task([1], ids=["y"])},
            "^mbpp: m_base and b have no problem in common$",
        ),
        ({"mbpp": task([1])}, {"mbpp": task([0]) | {"counted": [0]}}, "no problem was judged on both sides"),
    ],
)
def test_nothing_in_common_is_refused_in_a_line(tmp_path: Path, a: Any, b: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        compare(*two(tmp_path, a, b))


# --- tables and figures


def example(count: int = 60) -> list[Comparison]:
    generator = random.Random(0)
    x = task([generator.randrange(6) for _ in range(count)], 5, (1, 5))
    y = task([min(5, c + generator.randrange(2)) for c in x["correct"]], 5, (1, 5))
    z = task([int(generator.random() < 0.4) for _ in range(count)], settings={"seed": 1})
    names = ("some$_$model_" * 20, "模型")  # no formula, and no letters of the font
    return [compare_task("mbpp", x, y, names), compare_task("humaneval", z, z | {"settings": {}}, names)]


def test_the_tables_show_scores_verdict_and_the_first_ids() -> None:
    won = 25
    x, y = task([0] * won + [1] * 3 + [1] * 22), task([1] * won + [0] * 3 + [1] * 22, settings={"seed": 0})
    lines = text([compare_task("mbpp", x, y, ("base", "grpo"))]).splitlines()
    assert lines[:4] == ["A: base", "B: grpo", "", "mbpp: 50 problems compared"]
    assert lines[5].split()[:6] == ["pass@1", "50.0", "%", "94.0", "%", "+44.0"]
    assert lines[6] == f"B is better: the interval excludes 0 (McNemar exact, p = {sign_test(25, 3):.2g})"
    told = " ".join(" ".join(lines).split())
    first = ", ".join(f"mbpp/{i}" for i in range(20))
    assert f"B does better on 25: {first} ... and 5 more, all in comparison_base_vs_grpo.json A does" in told
    assert "A does better on 3: mbpp/25, mbpp/26, mbpp/27 no difference on 22" in told
    assert lines[-2:] == ["Warnings", "  mbpp: seed differs: not noted for A, 0 for B"]
    assert max(map(len, lines)) <= 100


def test_a_tiny_loss_is_not_printed_as_minus_zero() -> None:
    x, y = task([1] + [0] * 2999), task([0] * 3000)
    assert "-0.0" not in text([compare_task("mbpp", x, y)])


def test_save_writes_every_id_and_a_figure_with_both_colours(tmp_path: Path) -> None:
    from PIL import Image

    comparisons = example()
    files = save(comparisons, tmp_path / "new")
    assert sorted(files) == sorted((tmp_path / "new").iterdir())
    assert all(len(file.name.encode()) < 240 and "$" not in file.name for file in files)
    body = json.loads(files[0].read_text())
    assert (body["a"], body["b"]) == (comparisons[0].name_a, "模型")
    mbpp = body["tasks"]["mbpp"]
    assert (mbpp["won"], mbpp["ids"]) == (list(comparisons[0].won), [f"mbpp/{i}" for i in range(60)])
    assert (mbpp["difference"], mbpp["p_value"]) == (comparisons[0].difference, comparisons[0].p_value)
    assert [b - a for (a, _), (b, _) in zip(mbpp["a"], mbpp["b"], strict=True)].count(0) == mbpp["tied"]
    with Image.open(files[1]) as image:
        image.load()
        assert image.format == "PNG"
        assert image.width == 1600
        for strip in range(2):  # each half has ink of both sides' colours on white
            half = image.convert("RGB").crop(
                (0, image.height * strip // 2, 1600, image.height * (strip + 1) // 2)
            )
            colours = {colour for _, colour in half.getcolors(1 << 20) or ()}
            assert {(255, 255, 255), (0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)} <= colours


def test_drawing_leaves_the_settings_of_matplotlib_alone(tmp_path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 17.0, "text.usetex": True}):
        before = dict(matplotlib.rcParams)
        plot(example()[:1], tmp_path / "x.png")  # not in TeX, which may not be there
        assert dict(matplotlib.rcParams) == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_the_figure_shows_the_computed_scores() -> None:
    from matplotlib.figure import Figure

    from coderl.scores.plot import _draw_differences, _draw_problems, _draw_scores, _draw_shares

    comparison = compare_task("mbpp", task([0, 1, 5, 2, 2], 5, (1, 5)), task([1, 1, 4, 3, 2], 5, (1, 5)))
    first, second, third, fourth = Figure().subplots(1, 4)
    _draw_scores(first, comparison)
    _draw_differences(second, comparison)
    _draw_problems(third, comparison)
    _draw_shares(fourth, comparison)
    scores, differences = ([list(line.get_xdata()) for line in panel.lines] for panel in (first, second))
    shown: list[list[float]] = []
    for score in comparison.scores.values():
        shown += [list(score.interval_a), [score.a], list(score.interval_b), [score.b]]
        assert [100 * end for end in score.interval] in differences
        assert [100 * score.difference] in differences
    assert scores == [[100 * value for value in values] for values in shown]
    for panel in (first, second):  # nothing lies outside
        ends = [x for line in panel.lines for x in line.get_xdata() if len(line.get_ydata()) == 2]
        assert panel.get_xlim()[0] <= min(ends) <= max(ends) <= panel.get_xlim()[1]
    assert [bar.get_width() for bar in third.patches] == [-1, 2]
    (bubbles,) = fourth.collections
    places = sorted((round(float(x)), round(float(y))) for x, y in bubbles.get_offsets())
    assert places == [(0, 20), (20, 20), (40, 40), (40, 60), (100, 80)]


def test_figures_of_degenerate_comparisons_are_drawn(tmp_path: Path) -> None:
    cases = [
        compare_task("one", task([0]), task([0])),
        compare_task("all", task([3], 3), task([0], 3), ("", "")),
        compare_task("many" * 30, task([0] * 5, 200, range(1, 9)), task([1] * 5, 200, range(1, 9))),
    ]
    for case in (*([case] for case in cases), cases):
        plot(case, tmp_path / "x.png")
        assert (tmp_path / "x.png").read_bytes().endswith(b"IEND\xaeB`\x82")


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file grows over so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_no_half_of_a_file_and_keeps_the_one_before(tmp_path: Path) -> None:
    comparisons = example()
    files = save(comparisons, tmp_path)
    before = {file: file.read_bytes() for file in files}
    for limit in (100, len(before[files[0]]) + 1):  # the first write fails, or the second
        for file in files:
            file.write_bytes(b"old")
        with full_disk(limit), pytest.raises(UserError, match=r"cannot be written \(File too large\)"):
            save(comparisons, tmp_path)
        assert files[1].read_bytes() == b"old"
        assert files[0].read_bytes() == (b"old" if limit == 100 else before[files[0]])
        assert sorted(tmp_path.iterdir()) == sorted(files)


def test_a_folder_that_cannot_be_one_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot be written"):
            save(example(3), folder)
