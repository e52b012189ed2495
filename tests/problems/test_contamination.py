"""Contamination: how problems in both training and evaluation are found, refused, and recorded."""

from __future__ import annotations

import hashlib
import json
import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coderl.cli import main
from coderl.data import CodeDataModule
from coderl.embedded.source import EmbeddedSFT
from coderl.errors import UserError
from coderl.model.adapters import LoRA
from coderl.model.policy import Policy
from coderl.model.provenance import prior_training
from coderl.problems import (
    MBPP,
    Embedded,
    HumanEval,
    JSONLProblems,
    Overlap,
    ProblemSource,
    TrainingRecord,
)
from coderl.problems.contamination import FILE, canonical_id, overlaps, text_key
from coderl.problems.rows import problem_from_row
from coderl.publish.export import save_adapter, save_merged
from coderl.types import Problem
from tests.data.test_data_module import Recorder, quiet
from tests.support import tiny

MBPP_OVERLAPS = {"mbpp/602": "mbpp/217", "mbpp/704": "mbpp/248", "mbpp/872": "mbpp/216"}
"""MBPP's training problems that repeat test problems."""


def mbpp_form(name: str, text: str, test: str = "assert f(1) == 1") -> Problem:
    return problem_from_row(
        {"task_id": name, "text": text, "test_list": [test]}, "", source="", split="train"
    )


def humaneval_form(name: str, prompt: str) -> Problem:
    row = {"task_id": name, "prompt": prompt, "test": "def check(f): ...", "entry_point": "f"}
    return problem_from_row(row, "", source="", split="train")


def write(path: Path, *texts: str, name: str = "{}") -> str:
    rows = [
        {"task_id": name.format(i), "text": text, "code": "f = abs", "test_list": [f"assert f({i}) == {i}"]}
        for i, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# --- the key of a text


def reworded(text: str, seed: int) -> str:
    """The same words with other case, white space and punctuation."""
    rng = random.Random(seed)
    marks = ["", "", ",", ".", ";", "?", "!", " (", ")", '"', "`", " _", "#", " \u2014 ", ":"]
    blanks = [" ", "  ", "\n", "\t", "\r\n", "\u00a0"]
    words = [rng.choice([str.upper, str.lower, str.title])(word) + rng.choice(marks) for word in text.split()]
    return rng.choice(blanks) + "".join(word + rng.choice(blanks) for word in words)


@given(seed=st.integers(0, 10**9))
def test_case_white_space_punctuation_and_the_shown_test_do_not_change_the_key(seed: int) -> None:
    text = "Write a function to find the 2-digit sums of n - 2, n // 4 where a != b and so on."
    key = text_key(mbpp_form("a", text))
    assert key and len(key) == 16 and int(key, 16) >= 0
    assert text_key(mbpp_form("b", reworded(text, seed), f"assert g({seed}) == 0")) == key
    signature = "def f(a: int, b: int) -> int:\n"
    whole = text_key(humaneval_form("c", f'{signature}    """{text}"""\n'))
    assert text_key(humaneval_form("d", f"\n{signature.upper()}\t'''{reworded(text, seed)}\n'''")) == whole
    assert whole != key


def test_hyphens_and_slashes_between_words_are_punctuation() -> None:
    joined = text_key(mbpp_form("a", "Sort two-dimensional lists and/or tuples - in place."))
    assert joined == text_key(mbpp_form("a", "Sort two dimensional lists and or tuples in place"))


def test_a_shown_test_of_several_lines_or_of_another_data_set_does_not_change_the_key() -> None:
    key = text_key(mbpp_form("a", "Write a function."))
    assert text_key(mbpp_form("a", "Write a function.", "assert f(\n    1\n) == 1")) == key
    plus = replace(mbpp_form("a", "Write a function."), tests=(), test="assert f(2) == 2")  # as MBPP+ has it
    assert text_key(plus) == key


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("the sum of n, n - 2, n - 4", "the sum of n, n // 2, n // 4"),
        ("the pairs with a == b", "the pairs with a != b"),
        ("the numbers 1 and 2, 3", "the numbers 1 and 23"),
        ("the numbers above -1", "the numbers above 1"),
        ("the numbers a < b", "the numbers a <= b"),
        ("the smallest number", "the largest number"),
    ],
)
def test_other_operators_or_numbers_make_another_key(one: str, other: str) -> None:
    assert text_key(mbpp_form("a", one)) != text_key(mbpp_form("a", other))


@pytest.mark.parametrize("text", ["f", "...", "x = 1", "   ", "\ud800?!"])
def test_a_text_that_is_too_short_has_no_key(text: str) -> None:
    assert text_key(mbpp_form("a", text)) is None
    assert text_key(Problem("a", "")) is None


def test_keys_are_saved_in_files_and_do_not_change_between_versions() -> None:
    squeezed = "writeafunctiontoaddn- 1 "
    assert hashlib.sha256(squeezed.encode()).hexdigest()[:16] == "affa5f1f77e1e32c"
    assert text_key(mbpp_form("a", "Write a function to add n - 1.")) == "affa5f1f77e1e32c"


def test_texts_of_mbpp_have_different_keys_except_for_the_known_pairs(data_dir: Path) -> None:
    problems = JSONLProblems(str(data_dir / "mbpp.jsonl")).load("train")
    same_words, same_key = defaultdict(set), defaultdict(set)
    for problem in problems:
        text = problem.prompt.replace(problem.tests[0], "")
        same_words["".join(c for c in text.lower() if c.isalnum())].add(problem.id)
        same_key[text_key(problem)].add(problem.id)
    assert len(problems) == 974 and None not in same_key
    shared = [ids for ids in same_key.values() if len(ids) > 1]
    assert shared == [ids for ids in same_words.values() if len(ids) > 1]
    assert all(set(pair) in shared for pair in MBPP_OVERLAPS.items())


# --- ids


@pytest.mark.parametrize(
    ("name", "resolved"),
    [
        ("mbpp/11", "mbpp/11"),
        ("Mbpp/11", "mbpp/11"),
        ("mbppplus/11", "mbpp/11"),
        ("MbppPlus/11", "mbpp/11"),
        ("HumanEval/0", "humaneval/0"),
        ("HumanEvalPlus/0", "humaneval/0"),
        ("mine/a/B", "mine/a/b"),
        ("plain", "plain"),
    ],
)
def test_data_sets_that_use_the_numbers_of_another_share_its_ids(name: str, resolved: str) -> None:
    assert canonical_id(Problem(name, "")) == resolved


# --- overlaps

TEXTS = ["Return the sum of n.", "return the SUM of n", "Return the product of n.", "Sort a list.", "f"]
IDS = ["mbpp/1", "mbppplus/1", "MBPP/2", "mbpp/2", "mine/1", "mine/2", "mine/3"]
SETS = st.lists(st.builds(mbpp_form, st.sampled_from(IDS), st.sampled_from(TEXTS)), max_size=5)


def slow_overlaps(train: list[Problem], held_out: list[Problem]) -> list[Overlap]:
    found = []
    for one in train:
        ids = [other for other in held_out if canonical_id(one) == canonical_id(other)]
        texts = [other for other in held_out if text_key(one) and text_key(one) == text_key(other)]
        if ids or texts:
            found.append(Overlap(one.id, (ids or texts)[0].id, "id" if ids else "text"))
    return found


@given(train=SETS, held_out=SETS)
def test_overlaps_are_those_of_a_loop_over_all_pairs(train: list[Problem], held_out: list[Problem]) -> None:
    found = overlaps(train, held_out)
    assert found == slow_overlaps(train, held_out)
    assert len(found) == len(TrainingRecord.of(held_out).among(train))
    assert [overlap.train_id for overlap in found] == TrainingRecord.of(held_out).among(train)


@given(one=SETS, other=SETS, problem=st.builds(mbpp_form, st.sampled_from(IDS), st.sampled_from(TEXTS)))
def test_a_merged_record_knows_what_either_record_knows(
    one: list[Problem], other: list[Problem], problem: Problem
) -> None:
    both = TrainingRecord.of(one) | TrainingRecord.of(other)
    assert both == TrainingRecord.of(one + other)
    assert both.knows(problem) == (
        TrainingRecord.of(one).knows(problem) or TrainingRecord.of(other).knows(problem)
    )


# --- the guard


def fit(data: CodeDataModule) -> None:
    tiny.trainer(max_steps=1, limit_val_batches=0).fit(Recorder(), datamodule=data)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("split", ["test", "validation"])
def test_one_file_for_training_and_evaluation_is_refused(tmp_path: Path, split: str) -> None:
    file = write(tmp_path / "mine.jsonl", *TEXTS[2:4], "Reverse a string.")
    with pytest.raises(UserError) as caught:
        fit(CodeDataModule(JSONLProblems(file, **{split: file})))
    said = str(caught.value)
    assert said.startswith(
        f"jsonl: 3 of 3 training problems are in the {split} split: 0, 1 and 1 more; remove"
    )
    assert "--data.allow_contamination true" in said and "\n" not in said


@quiet
def test_copies_with_other_ids_are_found_by_their_text_and_refused(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", "Sort a list.", "Return the product of n.", name="a/{}")
    test = write(tmp_path / "b.jsonl", "Reverse a string.", "SORT a list", name="b/{}")
    with pytest.raises(UserError, match=r"1 of 2 .*: a/0 \(there b/1, in the same words\); remove"):
        fit(CodeDataModule(JSONLProblems(train, test=test)))
    fit(CodeDataModule(JSONLProblems(train, test=test), limit_test=1))  # what is not measured on is no matter


@quiet
def test_problems_left_out_of_training_are_no_contamination(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", "Sort a list.", "Return the product of n.", name="a/{}")
    test = write(tmp_path / "b.jsonl", "Return the product of n.", name="b/{}")
    fit(CodeDataModule(JSONLProblems(train, test=test), limit_train=1))
    data = CodeDataModule(JSONLProblems(train, test=train))
    data.keep(lambda problem: problem.id == "a/0", "unsuitable")
    held_out = JSONLProblems(test).load("train")
    data.guard(held_out, "mine")
    with pytest.raises(UserError, match="1 of 2 training problems are in mine"):
        CodeDataModule(JSONLProblems(train)).guard(held_out, "mine")


@quiet
def test_equal_row_numbers_in_two_files_of_one_name_are_no_overlap(tmp_path: Path) -> None:
    row = {"test_list": ["assert f(1) == 1"]}
    files = []
    for folder, text in (("a", "Sort a list."), ("b", "Reverse a string.")):
        (tmp_path / folder).mkdir()
        files.append(tmp_path / folder / "problems.jsonl")
        files[-1].write_text(json.dumps(row | {"text": text}) + "\n")
    fit(CodeDataModule(JSONLProblems(str(files[0]), test=str(files[1]))))


@quiet
def test_allowed_contamination_is_logged_as_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "mine.jsonl", "Sort a list.", "Reverse a string.")
    fit(CodeDataModule(JSONLProblems(file, test=file), allow_contamination=True))
    assert warnings(caplog) == [
        "jsonl: CONTAMINATED, 2 of 2 training problems are in the test split: 0, 1; "
        "scores there say little of other problems"
    ]


@quiet
def test_training_on_humaneval_warns_of_contamination(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"task_id": "HumanEval/0", "prompt": "def f(n):\n", "test": "def check(f): ...", "entry_point": "f"}
    (tmp_path / "h.jsonl").write_text(json.dumps(row) + "\n")
    fit(CodeDataModule(HumanEval(str(tmp_path / "h.jsonl"))))
    assert [message.count("CONTAMINATED, 1 of 1") for message in warnings(caplog)] == [1, 1]
    copy = JSONLProblems(str(tmp_path / "h.jsonl"))
    with pytest.raises(UserError, match="HumanEval/0; remove"):
        CodeDataModule(copy).guard(HumanEval(str(tmp_path / "h.jsonl")).load("test"), "humaneval")


@quiet
def test_overlaps_within_mbpp_itself_are_named_and_kept(
    data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = MBPP(str(data_dir / "mbpp.jsonl"))
    fit(CodeDataModule(source))
    (line,) = warnings(caplog)
    assert "CONTAMINATED" not in line
    assert all(f"{train} (there {test}, in the same words)" in line for train, test in MBPP_OVERLAPS.items())
    assert TrainingRecord.of(source.load("train")).among(source.load("test")) == sorted(
        MBPP_OVERLAPS.values()
    )
    assert TrainingRecord.of(source.load("train")).among(source.load("validation")) == []


def test_mbpp_under_another_name_or_number_is_refused(data_dir: Path, tmp_path: Path) -> None:
    source = MBPP(str(data_dir / "mbpp.jsonl"))
    test = source.load("test")
    rows = [json.loads(line) for line in (data_dir / "mbpp.jsonl").read_text().splitlines()][10:13]
    for name, change in (("mine", {}), ("mbpp", {"task_id": 5000}), ("mbpp", {"text": "Another text."})):
        file = tmp_path / f"{name}.jsonl"
        file.write_text(json.dumps(rows[0] | change) + "\n")
        with pytest.raises(UserError, match="1 of 1 training problems are in mbpp: "):
            CodeDataModule(JSONLProblems(str(file))).guard(test, "mbpp")
    plus = [replace(p, id=p.id.replace("mbpp", "mbppplus"), prompt="") for p in source.load("train")[:4]]
    with pytest.raises(UserError, match=r"4 of 374 .*mbpp/601 \(there mbppplus/601\), .* and 2 more"):
        CodeDataModule(source).guard(plus, "mbppplus")


@pytest.mark.slow
@pytest.mark.parametrize("source", [Embedded(), EmbeddedSFT(size=300)], ids=lambda source: source.name)
def test_the_splits_in_the_package_do_not_overlap(
    source: ProblemSource, caplog: pytest.LogCaptureFixture
) -> None:
    CodeDataModule(source).guard(source.load("test"), "the test split")
    assert caplog.messages == []


def test_the_command_refuses_in_one_line_before_any_weights_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loads(*_: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Policy, "load", loads)
    write(tmp_path / "mine.jsonl", "Sort a list.", "Reverse a string.")
    files = ["--data.source.train", "mine.jsonl", "--data.source.test", "mine.jsonl"]
    command = ["fit", "-c", "quickstart.yaml", "--data.source", "JSONLProblems", *files]
    assert main(command) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("coderl: error: ")]
    assert "2 of 2 training problems are in the test split: 0, 1; remove them" in line
    with pytest.raises(AssertionError, match="weights were loaded"):
        main([*command, "--data.allow_contamination", "true"])


# --- training records


@given(problems=SETS)
def test_a_training_record_is_loaded_as_it_was_saved(
    tmp_path_factory: pytest.TempPathFactory, problems: list[Problem]
) -> None:
    folder = tmp_path_factory.mktemp("model") / "new"
    assert TrainingRecord.load(folder) is None
    TrainingRecord.of(problems).save(folder)
    assert TrainingRecord.load(folder) == TrainingRecord.of(problems)
    assert [path.name for path in folder.iterdir()] == [FILE]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"ids": [1], "texts": []}', b'{"ids": []}', b"\xff", b"[" * 99999]
)
def test_a_damaged_record_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(UserError, match="remove it") as caught:
        TrainingRecord.load(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / FILE)) and "\n" not in str(caught.value)


def test_a_full_disk_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = TrainingRecord.of(tiny.problems(2))
    old.save(tmp_path)

    def full(self: Path, data: bytes) -> None:
        with self.open("wb") as file:
            file.write(data[:9])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        TrainingRecord.of(tiny.problems(3)).save(tmp_path)
    assert TrainingRecord.load(tmp_path) == old
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_chain_of_trainings_records_all_of_them(llama: Path, tmp_path: Path) -> None:
    first, second, third = ([mbpp_form(f"{name}/1", f"Sort by {name} first.")] for name in ("a", "b", "c"))
    fresh = tiny.policy(llama)
    assert prior_training(fresh) is None
    save_merged(fresh, tmp_path / "unknown")
    assert not (tmp_path / "unknown" / FILE).exists()
    save_merged(fresh, tmp_path / "merged", TrainingRecord.of(first))
    then = tiny.policy(tmp_path / "merged")
    assert prior_training(then) == TrainingRecord.of(first)
    save_adapter(then, tmp_path / "adapter", TrainingRecord.of(second))
    assert TrainingRecord.load(tmp_path / "adapter") == TrainingRecord.of(first + second)
    last = tiny.policy(tmp_path / "merged", adapter=str(tmp_path / "adapter"))
    save_merged(last, tmp_path / "end", TrainingRecord.of(third))
    assert TrainingRecord.load(tmp_path / "end") == TrainingRecord.of(first + second + third)
    save_merged(last, tmp_path / "end")
    assert TrainingRecord.load(tmp_path / "end") == TrainingRecord.of(first + second)


def test_prior_training_comes_from_local_folders_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    known = TrainingRecord.of(tiny.problems(1))
    known.save(tmp_path / "embedded")
    known.save(tmp_path / "model")
    assert prior_training(Policy("embedded")) is None  # the model in the package, not the folder
    assert prior_training(Policy("owner/name")) is None
    assert prior_training(Policy("model")) == known
    assert prior_training(Policy("owner/name", adapter="model", lora=LoRA())) == known
    assert prior_training(Policy("model", quantization="none", lora=None, from_scratch=True)) is None
