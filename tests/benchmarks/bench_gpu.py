"""Everything worth knowing about one GPU in ten minutes: does it all run, how fast, in how much memory.

    python -m tests.benchmarks.bench_gpu [--out DIR] [--size full|tiny] [--parts doctor,...] [--smollm2 GGUF]

Each part is a process with its own time limit; what one has found is written at once, as ``gpu.json`` and
``gpu.md`` in ``--out``, so that a lent machine may be taken away at any time. Without a GPU it runs on the
CPU, where only the size ``tiny`` makes sense. The parts:

doctor     what the machine has
grpo, ppo  a fit of the embedded model in NF4, with evaluation before and after, and merge
evaluate   the merged model, from the command line
plan       what `coderl doctor --plan` says of the step below
step       a step of a random CodeLlama-7B in NF4 with the original recipe's settings, 12 x 8 x 512 tokens
trl        the same by TRL's GRPOTrainer, where it is installed
learn      SmolLM2 on MBPP for what is left of the time, with its learning curve (needs --smollm2)
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from coderl.model.loading import resolve
from tests.benchmarks import bench_step

SHAPES: dict[str, dict[str, Any]] = {
    "full": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32016,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 1024,
    },
}
STEPS: dict[str, dict[str, Any]] = {
    "full": {"problems": 12, "group": 8, "tokens": 512, "rounds": 3},
    "tiny": {"problems": 2, "group": 2, "tokens": 8, "rounds": 2},
}
FITS = {
    "full": "--trainer.max_steps 8",
    "tiny": "--trainer.max_steps 1 --data.limit_test 2 --data.batch_size 2",
}
SUMS = [
    {
        "task_id": f"sums/{n}",
        "text": f"Write a function plus_{n} that adds {n} to a number.",
        "test_list": [f"assert plus_{n}(1) == {n + 1}"],
    }
    for n in range(1, 9)
]
"""Problems for the part evaluate."""
LIMITS = {
    "doctor": 60,
    "grpo": 120,
    "ppo": 120,
    "evaluate": 60,
    "plan": 60,
    "step": 240,
    "trl": 240,
    "learn": 540,
}
"""Seconds for each part."""


def fit(out: Path, name: str, flags: str) -> dict[str, Any]:
    """A fit of the embedded model."""
    folder = out / name
    coderl(f"fit -c quickstart.yaml {flags} --trainer.logger true --trainer.default_root_dir {folder}")
    summary = json.loads((folder / "summary.json").read_text())
    scores = {when: summary[when]["pass@1"] for when in ("before", "after")}
    return scores | {"seconds": summary["seconds"]} | phases(folder)


def phases(folder: Path) -> dict[str, Any]:
    """Medians over the steps of a run, by phase."""
    (path,) = folder.glob("logs/*/metrics.csv")
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("rollout_step")]
    names = [name for name in rows[0] if name.startswith(("seconds/", "speed/"))]
    middle = len(rows) // 2
    return {
        name.partition("/")[2]: sorted(float(row[name]) for row in rows if row[name])[middle]
        for name in names
    }


def coderl(arguments: str) -> str:
    """Run a command of coderl; its standard output."""
    words = [sys.executable, "-m", "coderl", *shlex.split(arguments)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        sys.exit(f"coderl {arguments[:60]}: {said[-1] if said else done.returncode}")
    return done.stdout


def shaped(folder: Path, shape: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> Path:
    """A random Llama of that shape, on disk once; the embedded model's tokenizer goes with it."""
    if not (folder / "config.json").exists():
        config = LlamaConfig(**shape, pad_token_id=2, bos_token_id=0, eos_token_id=1)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = LlamaForCausalLM._from_config(config, dtype=dtype)
        AutoTokenizer.from_pretrained(resolve("embedded")).save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def work_of(out: Path, size: str) -> dict[str, Any]:
    """The step as a work of :mod:`tests.benchmarks.bench_step`: the original recipe's, in NF4."""
    work = {name: value for name, value in STEPS[size].items() if name != "rounds"}
    return work | {
        "model": str(shaped(out / f"model-{size}", SHAPES[size])),
        "kl": 0.02,
        "quantization": "nf4",
    }


def step(out: Path, size: str) -> dict[str, Any]:
    """A step of the 7B model by phase, and its peak of memory."""
    return bench_step.summary(
        bench_step.turns_of(bench_step.our_side(work_of(out, size)), STEPS[size]["rounds"])
    )


def trl(out: Path, size: str) -> dict[str, Any]:
    """The same step by TRL, with QLoRA in bfloat16 and gradient checkpointing."""
    if importlib.util.find_spec("trl") is None:
        sys.exit("trl is not installed")
    options = {"dtype": "bfloat16", "nf4": True, "rows": 8, "checkpointing": True}
    work = work_of(out, size)
    side = bench_step.their_side(sys.executable, work | {"trl": options}, STEPS[size]["rounds"] + 1)
    return bench_step.summary(bench_step.turns_of(side, STEPS[size]["rounds"]))


def plan(out: Path, size: str) -> dict[str, Any]:
    """What was foreseen for the step."""
    work = work_of(out, size)
    flags = (
        f"--model.policy.model {work['model']} --data.batch_size {work['problems']} --model.group_size "
        f"{work['group']} --model.max_new_tokens {work['tokens']}"
    )
    found = json.loads(coderl(f"doctor --json --plan {shlex.quote('grpo.yaml ' + flags)}"))
    return {"peak_gb": found["peak"] / 1e9, "chosen": found["lines"]}


def learn(out: Path, weights: str, seconds: float) -> dict[str, Any]:
    """SmolLM2 on MBPP: the share of programs that pass, in each fifth of the steps."""
    path, folder = Path(weights), out / "learn"
    limit = time.strftime("%d:%H:%M:%S", time.gmtime(seconds)).replace("01:", "00:", 1)
    coderl(
        f"fit -c smollm2.yaml --model.policy.model {path.parent} --model.policy.gguf_file {path.name} "
        "--model.policy.adapter null --trainer.max_steps -1 --trainer.logger true --model.learning_rate 1e-4 "
        f"--trainer.max_time {limit} --trainer.default_root_dir {folder} --trainer.callbacks null"
    )
    with next(folder.glob("logs/*/metrics.csv")).open() as file:
        passed = [float(row["reward/passed"]) for row in csv.DictReader(file) if row.get("reward/passed")]
    fifth = max(1, len(passed) // 5)
    curve = [sum(some) / len(some) for i in range(0, len(passed), fifth) if (some := passed[i : i + fifth])]
    return {"steps": len(passed), "passed": curve} | phases(folder)


def perform(name: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """One part, in this process."""
    out, size = chosen.out, chosen.size
    if name == "doctor":
        checks = json.loads(coderl("doctor --json"))["checks"]
        return {c["name"]: c["detail"] for c in checks if c["name"] in ("GPU", "versions", "isolation")}
    if name == "grpo":
        return fit(out, "grpo", FITS[size])
    if name == "ppo":
        return fit(out, "ppo", f"--model PPO --model.inner_epochs 1 {FITS[size]}")
    if name == "evaluate":
        rows = out / "sums.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in SUMS))
        few = "--n_samples 2 --k 1" if size == "tiny" else "--n_samples 50 --k 1"
        flags = f"--max_length_generation 256 --allow_weak_isolation --output {out / 'evaluation'}"
        coderl(f"evaluate --model {out / 'grpo-merged'} --tasks {rows} {few} {flags}")
        (results,) = (out / "evaluation").glob("evaluation_results_*.json")
        return {"sums": json.loads(results.read_text())["sums"]["pass@1"]}
    if name == "learn":
        return learn(out, chosen.smollm2, chosen.seconds)
    return {"plan": plan, "step": step, "trl": trl}[name](out, size)


def in_a_process(name: str, chosen: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """One part in a process group of its own, which is ended when its time is up."""
    words = [sys.executable, "-m", "tests.benchmarks.bench_gpu", "--part", name, "--size", chosen.size]
    words += ["--out", str(chosen.out), "--seconds", str(seconds - 60)]
    words += ["--smollm2", chosen.smollm2] if chosen.smollm2 else []
    log = chosen.out / f"{name}.log"
    began = time.monotonic()
    with log.open("w") as said:
        child = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=said, text=True, start_new_session=True
        )
        try:
            output, _ = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
            return {"failed": f"not done within {seconds:.0f} s"}
    took = {"wall": round(time.monotonic() - began, 1)}
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if child.returncode or not lines:
        last = [line for line in log.read_text().splitlines() if line.strip()]
        return took | {"failed": last[-1][:300] if last else f"exit status {child.returncode}"}
    return dict(json.loads(lines[-1])) | took


def table(found: dict[str, dict[str, Any]]) -> str:
    """The parts and their figures, as Markdown."""
    rows = [
        f"| {name} | {'; '.join(f'{k} {shown(v)}' for k, v in part.items())} |"
        for name, part in found.items()
    ]
    return "\n".join(["| part | figures |", "|---|---|", *rows]) + "\n"


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {shown(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("bench-gpu"), help="folder (default %(default)s)")
    parser.add_argument("--size", choices=list(SHAPES), default="full", help="(default %(default)s)")
    parser.add_argument("--parts", default=",".join(LIMITS), help="which, in order (default all)")
    parser.add_argument("--smollm2", metavar="GGUF", help="SmolLM2's weights, for the part learn")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds for all (default %(default)g)")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    chosen.out = chosen.out.absolute()
    if chosen.part:
        print(json.dumps(perform(chosen.part, chosen)))
        return
    unknown = set(chosen.parts.split(",")) - LIMITS.keys()
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}: there are {', '.join(LIMITS)}")
    chosen.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + chosen.budget
    found: dict[str, dict[str, Any]] = {}
    for name in chosen.parts.split(","):
        left = min(LIMITS[name], end - time.monotonic())
        if name == "learn" and not chosen.smollm2:
            continue
        found[name] = in_a_process(name, chosen, left) if left > 5 else {"failed": "no time was left"}
        print(table({name: found[name]}).splitlines()[-1], flush=True)
        (chosen.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (chosen.out / "gpu.md").write_text(table(found), encoding="utf-8")
    print(f"\n{table(found)}")
    sys.exit(any("failed" in part for part in found.values()))


if __name__ == "__main__":
    main()
