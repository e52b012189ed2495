"""Completions a second: the engine's own decoding loop beside transformers' ``generate``.

    python -m tests.benchmarks.bench_decoding [--gguf FOLDER FILE] [--top-p 0.95] [--json FILE]

The two take turns on the same prompts, so that a busy machine slows both, and each returns decoded text that
is cut at stop strings. ``generate`` has all prompts in one batch with num_return_sequences and stop_strings,
as evaluation harnesses call it; it returns no log-probabilities, the engine does. The model is the embedded
one unless --gguf names another.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from coderl.model.padding import left_padded
from coderl.model.policy import Policy
from coderl.problems import Embedded, prompts
from coderl.rollout import GenerateEngine, Sampling
from coderl.types import Problem


@dataclass(frozen=True)
class Measurement:
    """One measurement.

    Attributes:
        seconds: Wall time.
        cpu: Seconds of this process's CPU time.
        completions: Number of completions.
        tokens: Their tokens in all, up to the end of each.
    """

    seconds: float
    cpu: float
    completions: int
    tokens: int


@dataclass(frozen=True)
class Figures:
    """Medians of several measurements, and the rate of each."""

    completions_per_second: float
    cpu_ms_per_completion: float
    tokens_per_completion: float
    rounds: list[float]

    @classmethod
    def of(cls, turns: list[Measurement]) -> Figures:
        rates = [turn.completions / turn.seconds for turn in turns]
        costs = [1000 * turn.cpu / turn.completions for turn in turns]
        lengths = [turn.tokens / turn.completions for turn in turns]
        middle = statistics.median
        return cls(middle(rates), middle(costs), middle(lengths), rates)


class TransformersGenerate:
    """transformers' ``generate``, with an evaluation harness's decoding of its ids."""

    def __init__(self, policy: Policy, problems: Sequence[Problem], n: int, sampling: Sampling) -> None:
        self.policy, self.n, self.stop = policy, n, problems[0].stop
        self.ends = torch.tensor(sorted(policy.eos_ids()), device=policy.device)
        pad = policy.tokenizer.pad_token_id
        assert isinstance(pad, int)
        self.ids, attention = left_padded([policy.encode(each) for each in problems], pad, policy.device)
        self.options: dict[str, Any] = {
            "attention_mask": attention.long(),
            "max_new_tokens": sampling.max_new_tokens,
            "num_return_sequences": n,
            "pad_token_id": pad,
            "eos_token_id": sorted(policy.eos_ids()),
            "stop_strings": list(self.stop),
            "tokenizer": policy.tokenizer,
            "do_sample": sampling.temperature > 0,
        }
        if sampling.temperature > 0:
            self.options |= {"temperature": sampling.temperature, "top_k": 0, "top_p": sampling.top_p}

    @torch.no_grad()
    def __call__(self) -> tuple[int, int]:
        """Numbers of completions and tokens; all after the first eos token or stop string is padding."""
        model: Any = self.policy.base
        sampled = model.generate(self.ids, **self.options)[:, self.ids.shape[1] :]
        texts = self.policy.tokenizer.batch_decode(sampled, skip_special_tokens=True)
        cut = [prompts.cut(str(text), self.stop) for text in texts]
        return len(cut), int((sampled != self.options["pad_token_id"]).sum())


class Engine:
    """The engine, on the same model as the other side."""

    def __init__(self, policy: Policy, problems: Sequence[Problem], n: int, sampling: Sampling) -> None:
        self.problems, self.n, self.sampling = problems, n, sampling
        self.engine = GenerateEngine(batch_size=len(problems) * n, merged_copy=False)
        self.engine.bind(policy)

    def __call__(self) -> tuple[int, int]:
        """Numbers of completions and tokens."""
        made = self.engine.generate(self.problems, self.n, self.sampling)
        return len(made), sum(len(each.ids) for each in made)


SIDES: dict[str, type[Engine | TransformersGenerate]] = {"ours": Engine, "generate": TransformersGenerate}


def measured(work: Callable[[], tuple[int, int]], seed: int) -> Measurement:
    torch.manual_seed(seed)
    began, cpu = time.perf_counter(), time.process_time()
    completions, tokens = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Measurement(time.perf_counter() - began, time.process_time() - cpu, completions, tokens)


def compare(chosen: argparse.Namespace) -> dict[str, Any]:
    """Measure both sides in turns, after one round to warm up."""
    folder, file = chosen.gguf or ("embedded", None)
    policy = Policy(folder, gguf_file=file, quantization="none", lora=None)
    policy.load(torch.device(chosen.device))
    policy.eval()
    sampling = Sampling(chosen.temperature, chosen.top_p, chosen.tokens)
    problems = Embedded().load("test")[: chosen.problems]
    works = {name: side(policy, problems, chosen.samples, sampling) for name, side in SIDES.items()}
    turns: dict[str, list[Measurement]] = {name: [] for name in works}
    load_before = os.getloadavg()[0]
    for seed in range(-1, chosen.rounds):
        for name, work in works.items():
            turn = measured(work, seed + 1)
            if seed >= 0:  # the round before warms up
                turns[name].append(turn)
    figures: dict[str, Any] = {name: asdict(Figures.of(some)) for name, some in turns.items()}
    ours, theirs = figures["ours"], figures["generate"]
    figures["ratio"] = ours["completions_per_second"] / theirs["completions_per_second"]
    figures["cpu_ratio"] = theirs["cpu_ms_per_completion"] / ours["cpu_ms_per_completion"]
    asked = {
        name: getattr(chosen, name) for name in ("problems", "samples", "tokens", "temperature", "top_p")
    }
    return figures | asked | {"load": [load_before, os.getloadavg()[0]]}


def table(figures: dict[str, Any]) -> None:
    batch = f"{figures['problems']} problems x {figures['samples']}, at most {figures['tokens']} tokens"
    drawn = f"temperature {figures['temperature']:g}, top_p {figures['top_p']:g}"
    print(f"{batch}, {drawn}, load {figures['load'][0]:.1f} at the start")
    print(
        f"\n{'':10}{'completions/s':>15}{'slowest':>10}{'fastest':>10}{'CPU ms each':>13}{'tokens each':>13}"
    )
    for name in SIDES:
        one = figures[name]
        rate, cost, length = (one[key] for key in list(one)[:3])
        print(
            f"{name:10}{rate:15.2f}{min(one['rounds']):10.2f}{max(one['rounds']):10.2f}{cost:13.1f}{length:13.1f}"
        )
    print(f"{'ratio':10}{figures['ratio']:15.2f}{figures['cpu_ratio']:33.2f}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    whole = {"rounds": (5, "turns that each side takes"), "problems": (12, "prompts in the batch")}
    whole |= {"samples": (8, "completions of each"), "tokens": (64, "most tokens of a completion")}
    for name, (default, words) in whole.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{words} (default %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="0 is greedy decoding (default %(default)g)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus (default %(default)g)")
    parser.add_argument("--device", default="cpu", help="where the model computes (default %(default)s)")
    parser.add_argument(
        "--gguf",
        nargs=2,
        metavar=("FOLDER", "FILE"),
        help="a GGUF model in place of the embedded one",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the figures")
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    figures = compare(chosen)
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    table(figures)


if __name__ == "__main__":
    main()
