"""The curriculum samples by the pass history, and a resumed run samples what an uninterrupted one does."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from coderl.cli import main
from coderl.data import CodeDataModule, Curriculum, CurriculumSampler, PassHistory
from coderl.data.sampler import EpochSampler
from coderl.errors import UsageError, UserError
from coderl.types import Problem
from tests.data.test_data_module import Kill, Killed, Numbered, Recorder, quiet
from tests.support import tiny

GROUP = 4


def outcome(problem: Problem, time: int) -> tuple[int, int]:
    """How many samples of a problem passed and got a verdict at a step: all kinds of outcomes occur."""
    number = int(problem.prompt)
    known = GROUP - (number + time) % 2 if number % 4 else (time % 3) * 2
    return (known, 0, number * time % (known + 1))[number % 3], known


def observe(module: CodeDataModule, problems: list[Problem], time: int) -> None:
    passed, known = zip(*(outcome(p, time) for p in problems), strict=True)
    module.observe(problems, passed, known)


def data(count: int, batch_size: int = 3, seed: int = 42, **curriculum: Any) -> CodeDataModule:
    source = Numbered(count, validation=1)
    return CodeDataModule(source, batch_size, seed, curriculum=Curriculum(**curriculum))


def history_of(count: int, solved: int = 0) -> PassHistory:
    """A history in which the first ``solved`` problems always pass and the others half of the time."""
    history = PassHistory()
    for i in range(count):
        history.observe(f"train/{i}", *((20, 0) if i < solved else (10, 10)))
    return history


# --- history


@given(passed=st.floats(0, 60), failed=st.floats(0, 60))
def test_a_weight_is_the_expected_variance_under_the_posterior(passed: float, failed: float) -> None:
    odds = np.exp(np.linspace(-40, 40, 4001))  # on the scale of log odds the trapezoid rule is exact
    p, q = odds / (1 + odds), 1 / (1 + odds)
    density = p ** (1 + passed) * q ** (1 + failed)
    expected = (density * p * q).sum() / density.sum()
    history = PassHistory()
    history.observe("a", passed, failed)
    assert history.weight("a") == pytest.approx(expected, rel=1e-9)


def test_weights_are_highest_for_mixed_outcomes_and_lowest_for_equal_ones() -> None:
    history = PassHistory(decay=0.9)
    for _ in range(1000):
        history.observe("mixed", 4, 4)
        history.observe("solved", 8, 0)
        history.observe("hopeless", 0, 8)
    assert history.weight("unknown") == pytest.approx(1 / 6)
    assert 0.24 < history.weight("mixed") < 0.25
    assert history.weight("hopeless") == history.weight("solved") == pytest.approx(81 / (82 * 83))


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=12),
    st.floats(0, 1),
)
def test_older_samples_count_less_with_each_observation(seen: list[tuple[int, int]], decay: float) -> None:
    history = PassHistory(decay)
    for passed, failed in seen:
        history.observe("a", passed, failed)
    counted = [pair for pair in seen if any(pair)]  # without any verdict, nothing decays
    expected = [sum(pair[i] * decay**age for age, pair in enumerate(reversed(counted))) for i in (0, 1)]
    assert list(history.counts.get("a", (0, 0))) == pytest.approx(expected)


@settings(deadline=None, max_examples=25)
@given(st.dictionaries(st.text(), st.tuples(st.floats(0, 1e9), st.floats(0, 1e9)), max_size=5))
def test_a_history_is_the_same_after_saving_and_loading(
    tmp_path_factory: pytest.TempPathFactory, counts: dict[str, tuple[float, float]]
) -> None:
    history, read, loaded = PassHistory(), PassHistory(), PassHistory()
    history.counts = counts
    folder = tmp_path_factory.mktemp("history")
    history.save(folder / "new" / "curriculum.json")
    read.load(folder / "new" / "curriculum.json")
    torch.save(history.state_dict(), folder / "state")
    loaded.load_state_dict(torch.load(folder / "state", weights_only=True))
    assert read.counts == loaded.counts == counts
    assert [path.name for path in (folder / "new").iterdir()] == ["curriculum.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"a": 1}',
        '{"a": [1]}',
        '{"a": [1, -1]}',
        '{"a": [1, NaN]}',
        '{"a": [1, true]}',
        "\xff",
    ],
)
def test_a_history_that_cannot_be_read_is_a_one_line_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "old.json"
    path.write_bytes(text.encode("latin-1"))
    for broken in (path, tmp_path / "missing.json", tmp_path):
        with pytest.raises(UserError, match=r"data\.curriculum\.history") as caught:
            _ = data(3, history=str(broken)).history
        assert str(broken) in str(caught.value) and "\n" not in str(caught.value)


# --- sampling


def test_sampling_probabilities_are_in_proportion_to_the_weights() -> None:
    problems, history = Numbered(4).load("train"), history_of(4, solved=2)
    sampler = CurriculumSampler(problems, history, batch_size=1, seed=0)
    seen = Counter(i for _ in range(5000) for i in sampler)
    weights = [history.weight(p.id) for p in problems]
    for i, weight in enumerate(weights):  # 20,000 draws: four standard errors
        chance = weight / sum(weights)
        assert seen[i] / 20_000 == pytest.approx(chance, abs=4 * (chance * (1 - chance) / 20_000) ** 0.5)
    assert (seen[2] + seen[3]) / (seen[0] + seen[1]) == pytest.approx(weights[2] / weights[0], rel=0.15)


def test_sampling_starts_uniform_and_comes_to_prefer_problems_with_mixed_outcomes() -> None:
    module = data(30, batch_size=10)
    loader, seen = module.train_dataloader(), []
    for _ in range(60):
        for batch in loader:
            seen.append(Counter(int(p.prompt) < 10 for p in batch)[True])
            module.observe(batch, [2 if int(p.prompt) < 10 else 4 for p in batch], [4] * len(batch))
    assert np.mean(seen[-90:]) > 7 > 5 > np.mean(seen[:5])  # of ten; 3.3 by chance


def chunks(problems: list[Problem], batch: int, world: int, count: int) -> Iterator[list[list[int]]]:
    """Each rank's indices of ``count`` steps; the history is updated after each, as the data module does."""
    history = PassHistory()
    samplers = [CurriculumSampler(problems, history, batch, 7, rank, world) for rank in range(world)]
    streams = [itertools.chain.from_iterable(itertools.repeat(sampler)) for sampler in samplers]
    for time in range(count):
        left = samplers[0].num_samples - samplers[0].yielded
        step = [list(itertools.islice(stream, min(batch, left))) for stream in streams]
        for i in {i for part in step for i in part}:
            passed, known = outcome(problems[i], time)
            history.observe(problems[i].id, passed, known - passed)
        yield step


@given(count=st.integers(1, 20), batch=st.integers(1, 5), world=st.integers(1, 4))
def test_ranks_together_sample_what_one_process_would(count: int, batch: int, world: int) -> None:
    problems = Numbered(count).load("train")
    steps = list(chunks(problems, batch, world, 8))
    for step in steps:
        assert len({len(part) for part in step}) == 1  # every rank takes part in every step
        drawn = list(itertools.chain(*step))
        assert len(set(drawn)) == min(len(drawn), count)
    assume(count % world == 0)
    together = [[i for shares in zip(*step, strict=True) for i in shares] for step in steps]
    assert together == [part for (part,) in chunks(problems, batch * world, 1, 8)]


@given(count=st.integers(1, 20), batch=st.integers(1, 5), world=st.integers(1, 4))
def test_epochs_are_as_long_as_without_a_curriculum(count: int, batch: int, world: int) -> None:
    problems = Numbered(count).load("train")
    sampler = CurriculumSampler(problems, PassHistory(), batch, 0, world - 1, world)
    plain = EpochSampler(problems, 0, world - 1, world)
    assert [len(list(sampler)) for _ in range(2)] == [len(sampler)] * 2 == [len(list(plain))] * 2


def test_a_chunk_depends_only_on_seed_number_and_history() -> None:
    problems = Numbered(50).load("train")

    def chunk(seed: int, drawn: int, history: PassHistory) -> list[int]:
        torch.manual_seed(len(made))
        made.append(sampler := CurriculumSampler(problems, history, 20, seed))
        sampler.drawn = drawn
        return list(itertools.islice(sampler, 20))

    made: list[CurriculumSampler] = []
    first = chunk(1, 0, history_of(50))
    assert chunk(1, 0, history_of(50)) == first
    others = [
        chunk(1, 1, history_of(50)),
        chunk(2, 0, history_of(50)),
        chunk(1, 0, history_of(50, solved=25)),
    ]
    assert first not in others and others[0] != others[1]


def test_draw_leaves_out_the_given_ids_and_returns_fewer_where_few_are_left() -> None:
    for module in (data(6), CodeDataModule(Numbered(6))):
        ids = {p.id for p in module.problems("train")}
        drawn = [p.id for p in module.draw(9, {"train/1", "train/4", "no such"})]
        assert len(drawn) == 4 and set(drawn) == ids - {"train/1", "train/4"}
        assert len(module.draw(2, set())) == 2
        assert module.draw(3, ids) == module.draw(0, set()) == []


def test_draw_uses_the_global_generator_and_the_weights() -> None:
    module, plain = data(10), CodeDataModule(Numbered(10))
    module.load_state_dict(history_of(10, solved=5).state_dict())
    torch.manual_seed(0)
    state = torch.get_rng_state()
    drawn = [p.id for _ in range(4000) for p in module.draw(1, set())]
    torch.set_rng_state(state)
    assert [p.id for _ in range(4000) for p in module.draw(1, set())] == drawn
    always_solved = sum(int(name[6:]) < 5 for name in drawn) / 4000
    solved, mixed = (module.history.weight(f"train/{i}") for i in (0, 9))  # type: ignore[union-attr]
    assert always_solved == pytest.approx(solved / (solved + mixed), abs=0.02)  # four standard errors
    alike = Counter(p.id for _ in range(4000) for p in plain.draw(1, set()))
    assert all(alike[f"train/{i}"] == pytest.approx(400, abs=80) for i in range(10))


def test_a_problem_listed_twice_in_a_rollout_is_one_observation() -> None:
    module = data(4)
    one, two, *_ = module.problems("train")
    module.observe([one, two, one], [1, 0, 2], [4, 0, 3])
    module.observe([one], [1], [1])
    assert module.state_dict() == {"counts": {"train/0": pytest.approx([0.9 * 3 + 1, 0.9 * 4])}}


def test_without_a_curriculum_nothing_is_kept(tmp_path: Path) -> None:
    module = CodeDataModule(Numbered(4))
    observe(module, module.problems("train"), 1)
    module.load_state_dict(history_of(4).state_dict())
    assert module.state_dict() == {} and module.history is None
    assert type(module.train_dataloader().sampler) is EpochSampler


# --- resuming


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 9), batch=st.integers(1, 4), steps=st.integers(0, 20))
def test_a_new_loader_continues_from_the_state_of_the_old_one(count: int, batch: int, steps: int) -> None:
    def stream(module: CodeDataModule, loader: Any, start: int) -> Iterator[list[str]]:
        time = start
        while True:
            for problems in loader:
                observe(module, problems, time)
                time += 1
                yield [p.id for p in problems]

    old = data(count, batch)
    loader = old.train_dataloader()
    batches = stream(old, loader, 0)
    for _ in range(steps):
        next(batches)
    saved = json.loads(json.dumps([old.state_dict(), loader.state_dict()]))
    new = data(count, batch)
    resumed = new.train_dataloader()
    new.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert list(itertools.islice(stream(new, resumed, steps), 12)) == list(itertools.islice(batches, 12))
    assert new.state_dict() == old.state_dict()


def test_a_chunk_interrupted_by_a_resume_is_not_drawn_again() -> None:
    problems, history = Numbered(9).load("train"), history_of(9)
    old, new = (CurriculumSampler(problems, history, 6, 0, 1, 2) for _ in range(2))
    whole = list(CurriculumSampler(problems, history, 6, 0, 1, 2))
    begun = list(itertools.islice(old, 2))
    history.load_state_dict(history_of(9, solved=8).state_dict())  # the chunk was drawn before
    new.load_state_dict(old.state_dict())
    assert begun + list(new) == whole


def test_an_epoch_begins_with_a_new_chunk() -> None:
    problems, history = Numbered(9).load("train"), history_of(9)
    whole = list(itertools.islice(CurriculumSampler(problems, history, 6, 0), 8))
    broken = CurriculumSampler(problems, history, 6, 0)
    assert list(itertools.islice(broken, 2)) == whole[:2]
    assert len(set(itertools.islice(broken, 6))) == 6
    list(itertools.islice(broken, 2))
    fewer = CurriculumSampler(problems[:4], history, 6, 0)
    fewer.load_state_dict(broken.state_dict())
    rest = list(fewer)  # the epoch has had two, and the chunk was of other problems
    assert len(rest) == 2 and set(rest) <= set(range(4))


def test_a_curriculum_can_be_turned_on_and_off_in_mid_epoch() -> None:
    problems, history = Numbered(9).load("train"), history_of(9)
    plain, drawn = EpochSampler(problems, 0), CurriculumSampler(problems, history, 3, 0)
    list(itertools.islice(plain, 3))
    drawn.load_state_dict(plain.state_dict())
    assert len(list(drawn)) == 6
    list(itertools.islice(drawn, 3))
    plain.load_state_dict(drawn.state_dict())
    assert len(list(plain)) == 6


class Learner(Recorder):
    """Reports outcomes to the data module and draws further problems, as the algorithms do."""

    def training_step(self, batch: list[Problem], batch_idx: int) -> None:
        module: CodeDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        time = self.trainer.fit_loop.total_batch_idx
        super().training_step(batch, batch_idx)
        torch.manual_seed(time)
        observe(module, batch, time)
        more = module.draw(2, {p.id for p in batch})
        self.seen[-1] = (self.current_epoch, [p.id for p in [*batch, *more]])


def fit(folder: Path, *callbacks: Callback, resume: Path | None = None, **options: Any) -> Any:
    """The batches of a fit, and the history at its end."""
    learner, module = Learner(), data(7, batch_size=2)
    trainer = tiny.trainer(
        default_root_dir=folder,
        max_epochs=3,
        callbacks=list(callbacks),
        enable_checkpointing=bool(callbacks),
        num_sanity_val_steps=0,
        **options,
    )
    with contextlib.suppress(Killed):
        trainer.fit(learner, datamodule=module, ckpt_path=resume, weights_only=True)
    return learner.seen, module.state_dict()


EVERY: dict[str, Any] = {"every_n_train_steps": 1, "save_on_exception": False}


@quiet
@pytest.mark.parametrize(("limit", "step"), [(4, step) for step in range(1, 12)] + [(3, 2), (3, 3), (3, 4)])
def test_a_killed_fit_resumes_as_if_uninterrupted(tmp_path: Path, limit: int, step: int) -> None:
    whole, known = fit(tmp_path / "whole", limit_train_batches=limit)
    assert len(whole) == 3 * limit
    begun, _ = fit(tmp_path, ModelCheckpoint(tmp_path, "at", **EVERY), Kill(step), limit_train_batches=limit)
    resume = ModelCheckpoint(tmp_path, "on", **EVERY)
    rest, knows = fit(tmp_path, resume, resume=tmp_path / "at.ckpt", limit_train_batches=limit)
    assert begun + rest == whole
    assert knows == known
    written = PassHistory()
    written.load(tmp_path / "curriculum.json")
    assert written.state_dict() == known
    assert [path.name for path in tmp_path.glob("curriculum*")] == ["curriculum.json"]


@quiet
def test_a_later_run_starts_from_the_history_of_an_earlier_one(tmp_path: Path) -> None:
    _, known = fit(tmp_path)
    later = data(7, history=str(tmp_path / "curriculum.json"))
    assert later.state_dict() == known
    missing = data(7, history="missing.json")
    with pytest.raises(UserError, match=r"missing\.json"):
        tiny.trainer(max_epochs=1).fit(Loads(), datamodule=missing)
    missing.load_state_dict(known)  # a checkpoint's history stands in for the file
    assert missing.state_dict() == known


class Loads(Recorder):
    def configure_model(self) -> None:
        raise AssertionError("weights were loaded")


class RankLearner(Learner):
    """Writes the batches of each rank to a file."""

    def on_train_end(self) -> None:
        state = self.trainer.datamodule.state_dict()  # type: ignore[attr-defined]
        rank, folder = self.trainer.global_rank, Path(self.trainer.default_root_dir)
        (folder / f"rank-{rank}.json").write_text(json.dumps([self.seen, state]))


@quiet
def test_two_ranks_share_the_problems_and_one_history(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        default_root_dir=tmp_path, max_epochs=3, strategy="ddp_fork", devices=2, num_sanity_val_steps=0
    )
    trainer.fit(RankLearner(), datamodule=data(8, batch_size=2))
    parts, states = zip(*(json.loads((tmp_path / f"rank-{i}.json").read_text()) for i in (0, 1)), strict=True)
    assert states[0] == states[1]
    expected = PassHistory()
    for time, step in enumerate(zip(*parts, strict=True)):
        drawn = [name for _, names in step for name in names[:2]]
        assert len(set(drawn)) == 4
        for name in drawn:
            passed, known = outcome(Problem(name, prompt=name[6:]), time)
            expected.observe(name, passed, known - passed)
    assert len(parts[0]) == 6
    assert states[0] == expected.state_dict()
    assert json.loads((tmp_path / "curriculum.json").read_text()) == states[0]["counts"]


# --- command line


@pytest.mark.parametrize(
    ("args", "decay"),
    [
        (["--data.curriculum", "Curriculum"], 0.9),
        (["--data.curriculum.decay", "0.8"], 0.8),
        (["--data.curriculum", "Curriculum", "--data.curriculum.decay", "0.8"], 0.8),
        (["--data.curriculum", "{class_path: Curriculum, init_args: {decay: 0.7}}"], 0.7),
        (["--data.curriculum", "{decay: 0.7}"], 0.7),
        ([], None),
    ],
)
def test_command_line_spellings(
    capsys: pytest.CaptureFixture[str], args: list[str], decay: float | None
) -> None:
    assert main(["fit", "-c", "quickstart.yaml", *args, "--print_config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["curriculum"]
    if decay is None:
        assert shown is None
    else:
        assert shown["class_path"] == "coderl.data.Curriculum"
        assert shown["init_args"] == {"decay": decay, "history": None}


@pytest.mark.parametrize(
    ("option", "code", "message"),
    [
        (["--data.curriculum.history", "no/such.json"], 1, "no/such.json: cannot be read"),
        (["--data.curriculum.decay", "1.5"], 2, "data.curriculum.decay is 1.5"),
    ],
)
def test_command_line_errors_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    option: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "-c", "quickstart.yaml", "--trainer.accelerator", "cpu", *option]) == code
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("coderl: error")]
    assert message in line


def test_decay_must_be_between_0_and_1() -> None:
    for decay in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="decay"):
            Curriculum(decay)
