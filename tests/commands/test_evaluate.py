"""``coderl evaluate``, called as on the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from coderl.cli import main
from coderl.commands.evaluate import command
from coderl.errors import UserError
from coderl.evaluation import load_task
from coderl.problems.contamination import TrainingRecord
from coderl.publish.export import save_adapter, save_merged
from tests.support import tiny

pytestmark = pytest.mark.slow

Body = dict[str, Any]
Programs = list[list[str]]
LIKELY = (1, 201)
"""The tokens <|eos|> and newline. A short answer stays in the comment that the prompt ends in, and passes."""
RUN = Path("checkpoints/tiny-7b-mbpp-grpo-qlora")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama whose answers end."""
    return tiny.checkpoint(tmp_path_factory.mktemp("models") / "Tiny-hf", likely=LIKELY)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with tasks, on whatever isolation this machine has."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    write("five.jsonl", 5)
    return tmp_path


def write(path: str, count: int) -> None:
    """Problems that are solved already; the prompt ends in a comment."""
    rows = [
        {
            "task_id": i,
            "prompt": f"def f():\n    return {i}\n# {'one ' * (i % 3)}{i}",
            "test": f"def check(candidate):\n    assert candidate() == {i}\n",
            "entry_point": "f",
        }
        for i in range(count)
    ]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(model: Path | str, *args: str) -> list[str]:
    """A small evaluation of all of five.jsonl."""
    small = ["--tasks", "five.jsonl", "--n_samples", "3", "--k", "1,2", "--max_length_generation", "64"]
    warm = ["--temperature", "1", "--top_p", "1", "--workers", "1"]
    return ["evaluate", "--model", str(model), *small, *warm, *args]


def results(folder: str = "evaluations") -> tuple[Body, dict[str, Programs]]:
    """The one results file of a folder, and the generations by task."""
    (path,) = Path(folder).glob("evaluation_results_*.json")
    stem = path.stem.removeprefix("evaluation_results_")
    body: Body = json.loads(path.read_text())
    tasks = [name for name in body if name != "config"]
    files = {f"{kind}_{stem}_{task}.json" for task in tasks for kind in ("generations", "references")}
    assert {file.name for file in Path(folder).iterdir()} == {path.name, *files}, "and nothing else"
    return body, {
        task: json.loads(Path(folder, f"generations_{stem}_{task}.json").read_text()) for task in tasks
    }


def evaluated(model: Path | str, *args: str, output: str = "evaluations") -> tuple[Body, Programs]:
    """Evaluate on five.jsonl; its scores without the time they took, and its generations."""
    assert main(arguments(model, "--output", output, *args)) == 0
    body, programs = results(output)
    return unhurried(body)["five"], programs["five"]


def unhurried(body: Body) -> Body:
    return {name: {k: v for k, v in task.items() if k != "seconds"} for name, task in body.items()}


def error_of(capsys: pytest.CaptureFixture[str], *args: str, code: int = 1) -> str:
    """Run, demand the exit code and that the last line on stderr says what is wrong, and give that line."""
    capsys.readouterr()
    assert main(["evaluate", *args]) == code
    out, err = capsys.readouterr()
    assert out == ""
    line = str(err.splitlines()[-1])
    assert line.startswith("coderl: error: ") and err.count("coderl: error: ") == 1
    return line


# --- results


def test_a_model_is_scored_and_everything_is_saved(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task, programs = evaluated(model)
    problems = load_task("five.jsonl").problems
    assert task["ids"] == [problem.id for problem in problems]
    assert [len(row) for row in programs] == [3] * 5
    for problem, row in zip(problems, programs, strict=True):
        assert all(program.startswith(problem.prompt) for program in row)
    assert task["counted"] == [3] * 5
    assert 0 < sum(task["correct"]) < 15, "some answers run, some do not"
    assert task["pass@1"] == pytest.approx(sum(task["correct"]) / 15)
    settings = task["settings"]
    assert {k: settings[k] for k in ("temperature", "top_p", "max_length", "seed", "form", "timeout")} == {
        "temperature": 1.0,
        "top_p": 1.0,
        "max_length": 64,
        "seed": 0,
        "form": "completion",
        "timeout": 3.0,
    }
    assert (settings["model"], settings["adapter"], settings["quantization"]) == (str(model), None, "none")
    assert settings["merged_copy"] is False  # neither adapter nor quantization
    assert settings["grading"] == {"inline": 15}
    shown = capsys.readouterr().out
    assert "📊 FIVE Results:" in shown and f"   pass@1: {task['pass@1']:.3f}" in shown
    assert "evaluation_results_tiny_base_" in shown


def test_saved_generations_score_as_the_model_did(model: Path) -> None:
    task, programs = evaluated(model)
    (file,) = Path("evaluations").glob("generations_*")
    saved = file.read_bytes()
    assert (
        main(
            [
                "evaluate",
                "--load_generations_path",
                str(file),
                "--tasks",
                "five.jsonl",
                "--output",
                "o",
                "--k",
                "1,2",
                "--workers",
                "1",
            ]
        )
        == 0
    )
    body, again = results("o")
    assert again["five"] == programs and file.read_bytes() == saved
    apart = ("settings", "seconds")
    assert {k: v for k, v in body["five"].items() if k not in apart} == {
        k: v for k, v in task.items() if k not in apart
    }


def test_pass_at_k_above_n_is_reported_as_missing(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task, _ = evaluated(model, "--k", "2,4")
    assert task["pass@4"] is None and task["pass@1"] is not None and task["pass@2"] is not None
    assert "pass@4: missing (needs 4 judged samples per problem, n is 3)" in capsys.readouterr().out


def test_limit_takes_the_first_problems(model: Path) -> None:
    ids = [problem.id for problem in load_task("five.jsonl").problems]
    for limit, expected in (("2", ids[:2]), ("99999999999", ids)):
        task, programs = evaluated(model, "--limit", limit, output=limit)
        assert (task["ids"], len(programs), task["problems"]) == (expected, len(expected), len(expected))


def test_greedy_answers_do_not_depend_on_the_seed(model: Path) -> None:
    _, first = evaluated(model, "--temperature", "0", "--seed", "1", output="1")
    _, second = evaluated(model, "--temperature", "0", "--seed", "2", output="2")
    assert first == second
    assert all(len(set(row)) == 1 for row in first)
    _, warm = evaluated(model, output="3")
    assert any(len(set(row)) > 1 for row in warm)


def test_prompts_that_leave_no_room_for_an_answer_are_counted(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, programs = evaluated(model, "--max_length_generation", "1")
    assert programs == [[p.prompt] * 3 for p in load_task("five.jsonl").problems]
    assert (
        "five: 5 of 5 prompts leave no room for an answer in --max_length_generation 1"
        in capsys.readouterr().err
    )


def test_tasks_evaluated_together_score_as_each_by_itself(model: Path) -> None:
    write("two.jsonl", 2)
    _, alone = evaluated(model, output="alone")
    assert main(arguments(model, "--tasks", "two.jsonl, five.jsonl,five.jsonl")) == 0
    body, programs = results()
    assert list(body) == ["two", "five", "config"]
    assert programs["five"] == alone


def test_two_results_of_the_same_second_are_both_kept(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "coderl.commands.evaluate.run.results_name", lambda *_: "evaluation_results_m_base_now.json"
    )
    for _ in range(2):
        assert main(arguments(model, "--limit", "1")) == 0
    assert len(list(Path("evaluations").glob("evaluation_results_*"))) == 2
    assert len(list(Path("evaluations").glob("generations_*"))) == 2


def test_two_results_files_are_compared(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated(model, "--seed", "0", output="a")
    evaluated(model, "--seed", "1", output="b")
    files = [str(next(Path(name).glob("evaluation_results_*"))) for name in "ab"]
    assert main(["evaluate", "--compare", *files, "--output", "c"]) == 0
    assert "seed differs: 0 for A, 1 for B" in capsys.readouterr().out
    assert {path.suffix for path in Path("c").iterdir()} == {".json", ".png"}
    assert "are one file" in error_of(capsys, "--compare", files[0], files[0], code=2)
    generations = str(next(Path("a").glob("generations_*")))
    assert "is no results file" in error_of(capsys, "--compare", files[0], generations)


# --- models and adapters


@pytest.fixture
def trained(model: Path) -> Path:
    """A run folder, its merged models with their training records, and the model as peft merges it."""
    policy = tiny.policy(model)
    tiny.stir(policy, 0.3)
    known = TrainingRecord.of(load_task("five.jsonl").problems[1:3])
    save_adapter(policy, RUN / "adapter", known)
    merged = RUN.with_name(f"{RUN.name}-merged")
    save_merged(policy, merged, known)
    save_merged(policy, merged / "epoch-2", known)
    policy.net.merge_and_unload().save_pretrained("peft")
    policy.tokenizer.save_pretrained("peft")
    return RUN


def test_an_adapter_and_its_merged_model_give_the_same_answers(model: Path, trained: Path) -> None:
    greedy = ("--temperature", "0", "--n_samples", "1", "--quantization", "none")
    merged = f"{trained}-merged"
    ways = {
        "run": (trained,),
        "adapter": (trained / "adapter",),
        "given": (model, "--adapter", str(trained / "adapter")),
        "merged": (merged,),
        "epoch": (f"{merged}/epoch-2",),
    }
    answers = {}
    for way, (name, *more) in ways.items():
        task, answers[way] = evaluated(name, *map(str, more), *greedy, output=way)
        (path,) = Path(way).glob("evaluation_results_*")
        label = "tiny-7b-epoch-2" if way == "epoch" else "tiny-7b"
        assert path.name.startswith(f"evaluation_results_{label}_grpo_")
        adapted = way in ("run", "adapter", "given")
        assert task["settings"]["adapter"] == (str(trained / "adapter") if adapted else None)
        assert task["settings"]["model"] == (str(model) if adapted else str(name))
        assert task["contaminated"] == ["five/1", "five/2"]
    _, base = evaluated(model, *greedy, output="base")
    _, answers["peft"] = evaluated("peft", *greedy, output="other")
    assert all(found == answers["run"] for found in answers.values())
    assert base != answers["run"]


def test_an_adapters_base_is_quantized_as_in_training(
    trained: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, _ = evaluated(trained)
    assert task["settings"]["quantization"] == "none"
    noted = trained / "adapter" / "policy.json"
    text = noted.read_text()
    for output, other in (("noted", text.replace("none", "nf4")), ("bare", None)):  # peft notes nothing
        if other is None:
            noted.unlink()
        else:
            noted.write_text(other)
        task, _ = evaluated(trained, output=output)
        assert task["settings"]["quantization"] == "nf4"
    noted.write_text(text)
    assert (
        "NOT HELD OUT: 2 of 5 problems were in the training data (five/1, five/2)" in capsys.readouterr().out
    )
    task, _ = evaluated(model, "--quantization", "nf4", output="base")
    assert (task["settings"]["quantization"], task["contaminated"]) == ("nf4", None)
    assert "NOT HELD OUT" not in capsys.readouterr().out


def test_chat_needs_a_template(model: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no chat template" in error_of(capsys, *arguments(model, "--chat")[1:])
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    talking = tiny.checkpoint(folder / "talking", likely=LIKELY, chat_template=template)
    task, programs = evaluated(talking, "--chat")
    assert task["settings"]["form"] == "chat"
    assert not any(program.startswith("def f") for row in programs for program in row)


def test_auto_grading_names_the_samples_that_inline_grading_passes_wrongly() -> None:
    cheat = "class Any:\n    def __eq__(self, other): return other == 1\ndef f(): return Any()"
    honest = "def f(): return 1"
    Path("t.jsonl").write_text(json.dumps({"text": "One.", "test_list": ["assert f() == 1"]}) + "\n")
    Path("g.json").write_text(json.dumps([[honest, cheat]]))
    common = ["evaluate", "--load_generations_path", "g.json", "--tasks", "t.jsonl", "--workers", "1"]
    assert (
        main([*common, "--output", "inline"]) == main([*common, "--output", "auto", "--grading", "auto"]) == 0
    )
    inline, auto = (results(name)[0]["t"] for name in ("inline", "auto"))
    assert (inline["pass@1"], inline["disagreements"]) == (1.0, [])
    assert auto["pass@1"] == 0.5
    assert [(d["id"], d["sample"]) for d in auto["disagreements"]] == [("t/1", 1)]


# --- interrupted and resumed


def kept() -> list[Path]:
    """The files that keep answers until results are saved."""
    return list(Path("evaluations").glob(".*.jsonl"))


def groups_kept() -> int:
    return sum(path.read_bytes().count(b"\n") - 1 for path in kept())


def stop(number: signal.Signals, args: list[str]) -> tuple[int, str]:
    """Run in a process of its own until one more group is kept, stop it, and give exit code and stderr."""
    before = max(0, groups_kept())
    process = subprocess.Popen(
        [sys.executable, "-m", "coderl", *args],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    started = time.monotonic()
    while groups_kept() <= before:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() - started < 100
        time.sleep(0.005)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def test_a_stopped_evaluation_resumes_to_the_same_results(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("five.jsonl", 12)
    args = ("--batch_size", "3")  # a group holds one problem
    unbroken = evaluated(model, *args, output="unbroken")
    code, _ = stop(signal.SIGKILL, arguments(model, *args))
    assert code == -signal.SIGKILL
    code, err = stop(signal.SIGINT, arguments(model, *args))
    assert code == 1
    assert err.splitlines()[-1] == "coderl: interrupted; give the same command again to go on from here"
    assert "Traceback" not in err
    count = groups_kept()
    assert 2 <= count < 12
    assert not list(Path("evaluations").glob("*.json"))
    assert evaluated(model, *args) == unbroken
    assert not kept(), "what was kept is gone when the results are there"
    assert f"; {count} problems are answered already" in capsys.readouterr().err


def test_answers_are_kept_where_results_cannot_be_saved(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise UserError("x.json could not be written: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(command, "save_results", full)
        assert "No space left" in error_of(capsys, *arguments(model)[1:])
    assert len(kept()) == 1
    with monkeypatch.context() as patch:
        patch.setattr("coderl.rollout.GenerateEngine.generate", None)  # nothing is sampled again
        task, programs = evaluated(model)
    assert (task, programs) == evaluated(model, output="unbroken")


def test_another_seed_does_not_resume_from_kept_answers(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "save_results", lambda *_: (_ for _ in ()).throw(UserError("full")))
    assert [main(arguments(model, "--seed", seed)) for seed in "0112"] == [1] * 4
    assert len(kept()) == 3
