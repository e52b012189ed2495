"""Answers for an evaluation: which are drawn together, from which stream, and what a kill leaves of them."""

from __future__ import annotations

import itertools
import json
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coderl.errors import UserError
from coderl.evaluation import EvaluationSettings, Evaluator, Ranks
from coderl.evaluation.sampling import Answers, Store, groups
from coderl.model.policy import Policy
from coderl.rollout import RolloutEngine, Sampling
from coderl.rollout.engine import seeded
from coderl.sandbox import Sandbox
from coderl.types import Completion, Problem

ASKED = {"model": "m", "n": 2, "seed": 0}
SAMPLING = Sampling(0.2, 0.95, 8)


def problems(lengths: Sequence[int]) -> list[Problem]:
    """Problems with prompts of these lengths, in characters."""
    return [Problem(f"task/{i}", "x" * length) for i, length in enumerate(lengths)]


class Fake(RolloutEngine):
    """Answers with the problem and what the random stream gives next; longer prompts draw more of it."""

    def __init__(self, batch_size: int = 4, fails_at: int | None = None) -> None:
        self.batch_size, self.fails_at = batch_size, fails_at
        self.calls: list[list[str]] = []

    def bind(self, policy: Policy) -> None:
        """Nothing to bind."""

    def sync(self) -> None:
        """Nothing to bring up."""

    def generate(
        self,
        problems: Sequence[Problem],
        n: int,
        sampling: Sampling,
        *,
        seed: int | None = None,
        ready: Any = None,
    ) -> list[Completion]:
        if len(self.calls) == self.fails_at:
            raise ZeroDivisionError
        self.calls.append([problem.id for problem in problems])
        assert seed is not None, "every draw of an evaluation follows from its seed"
        with seeded(seed):
            return [
                Completion(i, (), (), (), f"{problem.id} {torch.rand(len(problem.prompt) + 1).sum()}", True)
                for i, problem in enumerate(problems)
                for _ in range(n)
            ]


def draw(
    asked: Sequence[Problem],
    n: int,
    sampling: Sampling,
    engine: Fake,
    seed: int = 0,
    store: Store | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008
) -> list[list[str]]:
    """``n`` answers to each problem, as an evaluation samples them. Nothing is run."""
    settings = EvaluationSettings(n, (1,), sampling.temperature, sampling.top_p, seed=seed)
    return Evaluator(engine, Sandbox(), settings, sampling.max_new_tokens, ranks=ranks).sample(
        asked, store=store
    )


def ids(asked: Sequence[Problem], n: int, size: int) -> list[list[str]]:
    """The groups, by the problems' ids."""
    return [[asked[i].id for i in members] for members in groups(asked, n, size)]


# --- which problems are sampled together


@given(st.lists(st.integers(0, 9)), st.integers(1, 5), st.integers(1, 20))
def test_groups_hold_each_problem_once_longest_first(lengths: list[int], n: int, size: int) -> None:
    asked = problems(lengths)
    parts = groups(asked, n, size)
    order = [i for members in parts for i in members]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[i] for i in order] == sorted(lengths, reverse=True)
    assert all(a < b for a, b in itertools.pairwise(order) if lengths[a] == lengths[b])
    whole = size // n or 1
    assert all(len(members) == whole for members in parts[:-1])
    assert all(1 <= len(members) <= whole for members in parts[-1:])


# --- what they are drawn from


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.integers(1, 3), st.integers(1, 9))
def test_answers_come_in_the_order_of_the_problems(lengths: list[int], n: int, size: int) -> None:
    asked, engine = problems(lengths), Fake(size)
    texts = draw(asked, n, SAMPLING, engine)
    assert [len(row) for row in texts] == [n] * len(asked)
    assert all(text.startswith(f"{p.id} ") for p, row in zip(asked, texts, strict=True) for text in row)
    assert engine.calls == ids(asked, n, size)
    if n > 1 and min(lengths) > 0:
        assert all(len(set(row)) == n for row in texts), "samples of a problem are draws of their own"


def test_a_groups_stream_follows_from_the_seed_and_its_place_alone(tmp_path: Path) -> None:
    asked = problems([9, 3, 7, 1, 5])
    texts = draw(asked, 2, SAMPLING, Fake(4))
    for number, members in enumerate(groups(asked, 2, 4)):
        torch.manual_seed(number)  # whatever the stream was before
        with Store(tmp_path / f"{number}.jsonl", ASKED, 4) as store:
            store.add({p.id: ["kept", "kept"] for i, p in enumerate(asked) if i not in members})
            engine = Fake(4)
            alone = draw(asked, 2, SAMPLING, engine, store=store)
        assert engine.calls == [[asked[i].id for i in members]]
        assert [alone[i] for i in members] == [texts[i] for i in members]
    assert draw(asked, 2, SAMPLING, Fake(4), seed=1) != texts
    assert len({row[0].split()[1] for row in draw(problems([2, 2, 2]), 1, SAMPLING, Fake(1))}) == 3


@pytest.mark.parametrize("fails_at", [None, 1])
def test_the_callers_stream_is_left_as_it_was(fails_at: int | None) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    try:
        draw(problems([1, 2, 3]), 1, SAMPLING, Fake(1, fails_at))
        assert fails_at is None
    except ZeroDivisionError:
        assert fails_at is not None
    assert torch.equal(torch.rand(4), expected)


class Exchange(Exception):
    """What a process would tell the others."""


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_several_processes_give_what_one_gives(ranks: int) -> None:
    """Each stops where it would hear of the others, and goes there once more when all have been heard."""
    asked = problems([4, 8, 1, 6, 2])
    engines = [Fake(2) for _ in range(ranks)]

    def process(rank: int, gather: Callable[..., list[Any]]) -> list[list[str]]:
        return draw(asked, 2, SAMPLING, engines[rank], ranks=Ranks(rank, ranks, gather))

    def tell(found: Any, patience: float = 0.0) -> list[Any]:
        if isinstance(found, int):  # how many sequences it holds at a time, by which all cut
            return [2, found + 5]
        raise Exchange(found)

    def hear(found: Any, patience: float = 0.0) -> list[Any]:
        return [found] if isinstance(found, int) else told

    told: list[Answers] = []
    for rank in range(ranks):
        with pytest.raises(Exchange) as stopped:
            process(rank, tell)
        told.append(stopped.value.args[0])
    calls = [call for engine in engines for call in engine.calls]
    assert sorted(calls) == sorted(ids(asked, 2, 2)), "no group is drawn twice"
    sizes = [len(engine.calls) for engine in engines]
    assert max(sizes) - min(sizes) <= 1
    expected = draw(asked, 2, SAMPLING, Fake(2))
    assert [process(rank, hear) for rank in range(ranks)] == [expected] * ranks


# --- what is kept


def drawn(path: Path, size: int = 2, fails_at: int | None = None) -> tuple[list[list[str]], Fake]:
    """Answers to five problems, two each, through a file."""
    engine = Fake(99, fails_at)
    with Store(path, ASKED, size) as store:
        return draw(problems([1, 2, 0, 2, 1]), 2, SAMPLING, engine, store=store), engine


def test_killed_at_any_byte_it_goes_on_and_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    path = tmp_path / "store.jsonl"
    texts, _ = drawn(path)
    whole = path.read_bytes()
    assert whole.count(b"\n") == 1 + 5
    for kept in range(len(whole) + 1):
        path.write_bytes(whole[:kept])
        again, engine = drawn(path)
        assert again == texts
        assert path.read_bytes() == whole
        assert len(engine.calls) == 5 - max(0, whole[:kept].count(b"\n") - 1)


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_groups_are_kept_as_they_come_and_stay_as_they_were_cut(fails_at: int, tmp_path: Path) -> None:
    """Memory may be shorter the second time: groups keep the size of the first."""
    expected, _ = drawn(tmp_path / "unbroken.jsonl", size=4)
    path = tmp_path / "folder" / "store.jsonl"
    with pytest.raises(ZeroDivisionError):
        drawn(path, size=4, fails_at=fails_at)
    assert path.read_bytes().count(b"\n") == 1 + fails_at
    texts, engine = drawn(path, size=2)
    assert texts == expected
    assert len(engine.calls) == 3 - fails_at


def test_one_process_at_a_time_writes(tmp_path: Path) -> None:
    path = tmp_path / "store.jsonl"
    with Store(path, ASKED, 2) as store:
        store.add({"task/0": ["a", "b"]})
        before = path.read_bytes()
        with pytest.raises(UserError, match=r"^.*store\.jsonl is being written: the same evaluation .*$"):
            Store(path, ASKED, 2)
        assert path.read_bytes() == before
    with Store(path, ASKED, 2) as store:
        assert store.rows == {"task/0": ["a", "b"]}
        store.remove()
    assert not path.exists()
    Store(path, ASKED, 2).remove()


@pytest.mark.parametrize(
    ("asked", "odd"), [(ASKED | {"seed": 1, "n": 3}, "n, seed"), ({"model": "m", "n": 2}, "seed")]
)
def test_answers_to_something_else_are_refused(asked: dict[str, Any], odd: str, tmp_path: Path) -> None:
    path = tmp_path / "store.jsonl"
    drawn(path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=rf"store\.jsonl holds answers with other settings \({odd}\)"):
        Store(path, asked, 2)
    assert path.read_bytes() == before


def test_settings_are_compared_as_json_keeps_them(tmp_path: Path) -> None:
    """A tuple comes back as a list, which is no other setting."""
    for _ in range(2):
        Store(tmp_path / "store.jsonl", {"versions": ("1", "2"), "limit": None}, 2).close()


HEAD = json.dumps({"asked": ASKED, "size": 2}).encode()


@pytest.mark.parametrize(
    "lines",
    [
        [b"junk"],
        [b"[]"],
        [b"{}"],
        [b'{"asked": [], "size": 2}'],
        [b'{"asked": {}, "size": null}'],
        [HEAD, b"\xff"],
        [HEAD, b"\0" * 20],
        [HEAD, b"[]"],
        [HEAD, b"[" * 100_000],
        [HEAD, b'{"task/0": ["a", "b"]', b'{"task/1": ["a", "b"]}'],
        [HEAD, b'{"task/0": 7}'],
        [HEAD, b'{"task/0": ["a", 7]}'],
        [HEAD, b'{"task/0": ["a"]}'],
    ],
)
def test_a_damaged_file_is_said_to_be(lines: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "store.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"store\.jsonl (is damaged|holds answers .*): remove it"):
        drawn(path)
    assert path.read_bytes() == before


@contextmanager
def largest(size: int) -> Iterator[None]:
    """No file grows over so many bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # in Python, EFBIG and no signal
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("spare", [0, 1, 20])
def test_a_full_disk_keeps_what_was_there(spare: int, tmp_path: Path) -> None:
    path = tmp_path / "store.jsonl"
    texts, _ = drawn(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]))
    with (
        largest(path.stat().st_size + spare),
        pytest.raises(UserError, match=r"store\.jsonl could not be written: .*run the same command again"),
    ):
        drawn(path)
    assert path.read_bytes().startswith(b"".join(lines[:3]))
    again, engine = drawn(path)
    assert again == texts
    assert len(engine.calls) == 3
    assert path.read_bytes() == b"".join(lines)


def test_a_full_disk_at_the_start_is_said_too(tmp_path: Path) -> None:
    path = tmp_path / "store.jsonl"
    with largest(10), pytest.raises(UserError, match="could not be written"):
        Store(path, ASKED, 2)
    drawn(path)


@pytest.mark.parametrize("text", ["x\ud800", "\u2028\x85\r\n\n", '\0"\\', "é\U0001f600", ""])
def test_any_text_comes_back_as_it_was(text: str, tmp_path: Path) -> None:
    path = tmp_path / "store.jsonl"
    with Store(path, ASKED, 2) as store:
        store.add({"task/0": [text, text]})
    with Store(path, ASKED, 2) as store:
        assert store.read(problems([1]), 2) == {0: [text, text]}


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "store.jsonl", tmp_path):
        with pytest.raises(UserError, match=r"could not be written: (File exists|Is a directory)$"):
            Store(path, ASKED, 2)
