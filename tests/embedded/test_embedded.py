"""The embedded problems are correct, do not overlap, follow from the seed, and survive their tokenizer."""

from __future__ import annotations

import ast
import json
from collections import Counter
from functools import cache
from random import Random
from typing import Any

import pytest

from coderl.embedded import build, generate
from coderl.embedded.checks import asserts, normalised, passes, signature
from coderl.embedded.generate import by_topic, compositions, mistaken, sft_examples, shipped_rows, splits
from coderl.embedded.inputs import KINDS, battery
from coderl.embedded.tasks import Task, catalogue
from coderl.problems.prompts import mbpp_prompt


@cache
def rows() -> list[dict[str, Any]]:
    lines = (build.HERE / "problems.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def name_of(source: str) -> str:
    (function,) = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    return function.name


def results(row: dict[str, Any]) -> tuple[str, ...]:
    """The results of a shipped solution on the battery of its kind of input."""
    return signature(row["code"], name_of(row["code"]), row["kind"])


@cache
def sft_tasks() -> list[Task]:
    """One task of every composition in the SFT split."""
    rng = Random(7)
    return [composition.draw(rng) for found in by_topic("sft").values() for composition in found]


def test_there_are_enough_problems_of_every_topic_in_both_splits() -> None:
    count = Counter((row["split"], row["topic"]) for row in rows())
    assert sum(n for (split, _), n in count.items() if split == "train") >= 300
    assert sum(n for (split, _), n in count.items() if split == "test") >= 100
    topics = {topic for _, topic in count}
    assert len(topics) >= 10
    assert all(count[split, topic] >= 9 for split in ("train", "test") for topic in topics)


def test_every_solution_passes_three_different_asserts_of_its_own_function() -> None:
    for row in rows():
        assert len(set(row["test_list"])) == 3
        assert all(test.startswith(f"assert {name_of(row['code'])}(") for test in row["test_list"])
        assert passes(row["code"], row["test_list"]), row["task_id"]
        assert len({test.rpartition(" == ")[2] for test in row["test_list"]}) > 1


def test_no_two_shipped_problems_are_the_same() -> None:
    assert len({row["task_id"] for row in rows()}) == len(rows())
    assert len({normalised(row["code"]) for row in rows()}) == len(rows())


@pytest.mark.slow
def test_held_out_problems_compute_what_no_other_split_computes() -> None:
    held_out = {results(row): row["task_id"] for row in rows() if row["split"] == "test"}
    train = {results(row) for row in rows() if row["split"] == "train"}
    stream = {signature(task.solution, task.name, task.kind) for task in sft_tasks()}
    assert len(stream) > 1000
    assert [number for done, number in held_out.items() if done in train or done in stream] == []
    assert not train & stream


@pytest.mark.slow
def test_held_out_solutions_are_no_renamed_copies() -> None:
    held_out = {normalised(row["code"]) for row in rows() if row["split"] == "test"}
    train = {normalised(row["code"]) for row in rows() if row["split"] == "train"}
    stream = {normalised(task.solution) for task in sft_tasks()}
    assert not held_out & train
    assert not held_out & stream
    assert not train & stream


def test_normalising_replaces_names_and_nothing_else() -> None:
    one = "def f(xs):\n    return sum(x for x in xs)\n"
    assert normalised(one) == normalised("def g(a):\n    return sum(b for b in a)\n")
    assert normalised(one) != normalised("def f(xs):\n    return max(x for x in xs)\n")


def test_signatures_differ_for_an_off_by_one_and_not_for_another_formula() -> None:
    right, wrong = ("def f(n):\n    return sum(range(n))\n", "def f(n):\n    return sum(range(n + 1))\n")
    other_words = "def g(m):\n    return m * (m - 1) // 2\n"
    assert signature(right, "f", "count") != signature(wrong, "f", "count")
    assert signature(right, "f", "count") == signature(other_words, "g", "count")


def test_compositions_have_one_split_each_and_every_split_has_every_topic() -> None:
    assert len({c.key for c in catalogue()}) == len(catalogue())
    assert set(splits()) == {c.key for c in compositions()}
    assert by_topic("sft").keys() == by_topic("train").keys() == by_topic("test").keys()


def test_asserts_catch_nearly_every_mistake() -> None:
    rng = Random(3)
    caught = total = 0
    for composition in rng.sample(compositions(), 200):
        task = composition.draw(rng)
        tests = asserts(task, rng, [code for _, code in task.buggy], candidates=32)
        if len(tests) < 3:
            continue
        total += len(task.buggy)
        found = mistaken(task, tests)
        assert all(not passes(code, tests) for _, code in found)
        assert passes(task.solution, tests)
        caught += len(found)
    assert caught / total > 0.9


@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_the_sft_examples_have_the_given_share_of_mistakes(rate: float) -> None:
    problems = sft_examples(5, 400, rate)
    wrong = sum(not passes(problem.solution, problem.tests) for problem in problems)
    assert wrong / len(problems) == pytest.approx(rate, abs=0.0 if rate in {0.0, 1.0} else 0.1)
    assert all(problem.tests[0] in problem.prompt for problem in problems)


def test_the_sft_examples_are_the_same_for_the_same_seed_only() -> None:
    assert sft_examples(1, 50, 0.5) == sft_examples(1, 50, 0.5)
    assert sft_examples(1, 50, 0.5) != sft_examples(2, 50, 0.5)


@pytest.mark.slow
def test_the_shipped_files_are_what_build_makes(tmp_path: Any) -> None:
    build.build(tmp_path)
    names = ("problems.jsonl", "model/tokenizer.json", "model/tokenizer_config.json")
    assert [n for n in names if (tmp_path / n).read_bytes() != (build.HERE / n).read_bytes()] == []


def test_another_seed_ships_other_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    # One topic shows it, in a tenth of the time.
    topics = {split: dict(list(by_topic(split).items())[:1]) for split in ("train", "test")}
    monkeypatch.setattr(generate, "by_topic", topics.__getitem__)
    first, again, other = (shipped_rows(seed, train=10, test=5) for seed in (1, 1, 2))
    assert len(first) == 15 and first == again
    assert other != first


def test_the_tokenizer_decodes_every_problem_exactly_and_splits_digits() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(build.HERE / "model")
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert len(tokenizer) <= 1024
    for row in rows():
        text = mbpp_prompt(row["text"], row["test_list"][0]) + row["code"]
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("1234").input_ids) == 4
    assert tokenizer.decode(tokenizer("é ✓").input_ids) == "é ✓"


def test_batteries_are_varied() -> None:
    assert all(len({repr(arguments) for arguments in battery(kind)}) > 5 for kind in KINDS)
