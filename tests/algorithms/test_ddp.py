"""Two ranks with half of the rows each take the same steps as one process with all rows."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy

from coderl.algorithms import SFT
from coderl.algorithms.distributed import mean_of_each
from coderl.errors import UsageError
from coderl.files import read_json_lines
from coderl.model.policy import Policy
from coderl.runs.folder import RunFolder
from tests.algorithms.test_resume import differences
from tests.support import ranks, tiny
from tests.support.fixed import rollout_of
from tests.support.ranks import CASES, Case

pytestmark = pytest.mark.slow

Left = tuple[Path, dict[str, Any], dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Left:
    """The model, each case's rollouts, and the results of every case on both ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    llama = tiny.checkpoint(folder / "llama")
    halves = {case[0]: halves_of(llama, case) for case in CASES}
    torch.save(halves, folder / "halves.pt")
    ranks.both(folder)
    one, two = (torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1))
    return llama, halves, one, two


def halves_of(llama: Path, case: Case) -> Any:
    """Rollouts with the case's rewards; the second rank's completions are shorter."""
    first = [rollout_of(llama, rewards, seed=i) for i, rewards in enumerate(case[2])]
    second = [rollout_of(llama, rewards, seed=9 + i, limit=5) for i, rewards in enumerate(case[3])]
    return first, second


def assert_same_weights(one: Any, two: Any, single: Any) -> None:
    """Weights are bit-identical on both ranks, and equal to those of a single process up to rounding.

    A step moves a weight by 1e-2, and AdamW divides by the gradient's size: where that is near 0, rounding in
    another order shows 1,000 times.
    """
    for name, weight in one.items():
        assert torch.equal(weight, two[name]), name
        message = partial("{}: {}".format, name)
        torch.testing.assert_close(weight, single[name], atol=1e-4, rtol=1e-3, msg=message)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_two_ranks_take_the_same_steps_as_one_process(left: Left, case: Case) -> None:
    llama, halves, *both = left
    one, two = (side[case[0]] for side in both)
    single = ranks.outcome(llama, case, halves[case[0]])
    assert_same_weights(one["weights"], two["weights"], single["weights"])
    assert one["passes"] == two["passes"] == single["passes"]
    for key in ("norm", "kl_old", "kl_coefficient"):
        assert one[key] == two[key] == pytest.approx(single[key], rel=2e-3, abs=1e-6)
    for mine, other, alone in zip(one["metrics"], two["metrics"], single["metrics"], strict=True):
        assert mine == pytest.approx(other, rel=0, abs=0, nan_ok=True)
        assert mine == pytest.approx(alone, rel=2e-3, abs=1e-5, nan_ok=True)
    assert (single["kl_coefficient"] != case[4].get("kl_coefficient", 0.1)) == ("adaptive_kl" in case[4])
    assert (single["passes"] < case[4].get("inner_epochs", 2) * 2) == (case[0] == "stop")


def test_one_rank_s_rows_alone_give_other_steps(left: Left) -> None:
    llama, halves, one, _ = left
    case = CASES[0]
    twice = (halves[case[0]][0],) * 2
    single = ranks.outcome(llama, case, twice)["weights"]
    assert any((single[n] - w).abs().max() > 1e-3 for n, w in one[case[0]]["weights"].items())


def test_sft_on_two_ranks_equals_sft_on_one(left: Left) -> None:
    llama, _, one, two = left
    single = ranks.tuned(llama, 4)
    assert_same_weights(one["sft"]["weights"], two["sft"]["weights"], single["weights"])
    assert one["sft"]["loss"] == two["sft"]["loss"] == pytest.approx(single["loss"], rel=1e-4)


def test_two_ranks_get_the_validation_scores_of_one_process(left: Left) -> None:
    llama, _, one, two = left
    single = ranks.validated(llama)
    assert one["validated"] == two["validated"] == single
    different = {program for row in single["programs"] for program in row}
    assert len(different) > 5  # an exchange would show


def test_each_rank_samples_from_its_own_random_generator(left: Left) -> None:
    one, two = (side["sampled"]["whole"] for side in left[2:])
    for a, b in zip(one, two, strict=True):
        assert not set(map(tuple, a["ids"])) & set(map(tuple, b["ids"]))
        assert a["history"] == b["history"] != {}
        assert all(torch.equal(a["weights"][name], b["weights"][name]) for name in a["weights"])
    for steps in (one, two):
        drawn = [tuple(ids) for step in steps for ids in step["ids"]]
        assert len(set(drawn)) > 0.9 * len(drawn)


def test_a_resumed_fit_on_two_ranks_equals_an_uninterrupted_one_bit_for_bit(left: Left) -> None:
    for side in left[2:]:
        pieces, whole = side["sampled"]["pieces"], side["sampled"]["whole"]
        for i, (got, expected) in enumerate(zip(pieces, whole, strict=True)):
            assert not differences(got, expected), f"step {i + 1}"
    one, two = (side["sampled"]["drawn"] for side in left[2:])
    assert one and two and one != two  # ranks refill as often as each has to


def test_all_ranks_end_when_none_has_had_a_reward_for_three_steps(left: Left) -> None:
    one, two = (side["without reward"] for side in left[2:])
    assert one == two
    assert one.startswith("after 3: no sample has had a reward in 3 steps in a row: 2 of 16 programs")


def test_each_rank_has_its_samples_in_its_own_file(left: Left) -> None:
    for rank in (0, 1):
        rows = [row for _, row in read_json_lines(RunFolder(left[0].parent / "kept").samples(rank))]
        assert [row["rollout_step"] for row in rows] == [1] * 8 + [2] * 8 + [3] * 8
        assert {row["rank"] for row in rows} == {rank}
        assert [row["reward"] is not None for row in rows] == [rank == 1] * 8 + [False] * 16


def test_a_strategy_that_shards_the_weights_is_a_one_line_error(llama: Path) -> None:
    module = SFT(Policy(str(llama), quantization="none"))
    module._trainer = SimpleNamespace(strategy=FSDPStrategy(), precision="32-true")  # type: ignore[assignment]
    with pytest.raises(UsageError, match=r"FSDPStrategy .* set trainer\.strategy: ddp") as caught:
        module.setup("fit")
    assert "\n" not in str(caught.value)


def test_logged_means_are_over_the_ranks_that_have_a_value() -> None:
    nan = float("nan")
    means = mean_of_each([{"a": 1.0, "b": nan, "c": nan}, {"a": 3.0, "b": 5.0, "c": nan, "d": 7.0}])
    assert means == pytest.approx({"a": 2.0, "b": 5.0, "c": nan, "d": 7.0}, nan_ok=True)
