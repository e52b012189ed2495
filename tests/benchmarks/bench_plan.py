"""What `coderl doctor --plan` foresees beside what a step then takes, on this machine.

    python -m tests.benchmarks.bench_plan [--works embedded,...] [--json FILE]

Prompts and completions are as long as they may be. Measured is the peak of the resident set over two steps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import bench_step
from tests.benchmarks.bench_gpu import coderl, shaped

COMMON: dict[str, Any] = {"kl": 0.02, "group": 8}
WORKS: dict[str, dict[str, Any]] = {
    "random": {"model": "random", "problems": 8, "prompt": 128, "tokens": 64, "quantization": "none"},
    "random-long": {"model": "random", "problems": 2, "prompt": 256, "tokens": 256, "quantization": "none"},
    "random-nf4": {"model": "random", "problems": 12, "prompt": 64, "tokens": 128, "quantization": "nf4"},
    "smollm2": {"model": "smollm2", "problems": 2, "prompt": 128, "tokens": 64, "quantization": "none"},
    "smollm2-long": {"model": "smollm2", "problems": 1, "prompt": 256, "tokens": 192, "quantization": "none"},
    "smollm2-nf4": {"model": "smollm2", "problems": 4, "prompt": 128, "tokens": 32, "quantization": "nf4"},
}
"""The random model never ends a completion before its longest length."""
RANDOM = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 10,
    "num_attention_heads": 12,
    "vocab_size": 16384,
}


def foreseen(work: dict[str, Any]) -> dict[str, Any]:
    """What the plan says."""
    settings = {
        "policy.model": bench_step.model_of(work),
        "policy.quantization": work["quantization"],
        "policy.lora.r": bench_step.RANK,
        "group_size": work["group"],
        "max_prompt_tokens": work["prompt"],
        "max_new_tokens": work["tokens"],
        "kl_coefficient": work["kl"],
    }
    flags = " ".join(f"--model.{name} {value}" for name, value in settings.items())
    flags += f" --data.batch_size {work['problems']}"
    return dict(json.loads(coderl(f"doctor --json --plan 'quickstart.yaml {flags}'")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--works", default=",".join(WORKS), help="which, by name (default all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the figures")
    chosen = parser.parse_args()
    found = {}
    print(f"{'':15}{'foreseen':>10}{'measured':>10}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        random = str(shaped(Path(folder) / "random", RANDOM, torch.float32))
        for name in chosen.works.split(","):
            work = COMMON | WORKS[name]
            work["model"] = random if work["model"] == "random" else work["model"]
            plan = foreseen(work)
            turns = bench_step.turns_of(bench_step.our_side(work), 1)
            measured = max(turn["peak"] for turn in turns)
            found[name] = {"foreseen": plan, "measured": measured}
            ratio = plan["peak"] / measured
            print(f"{name:15}{plan['peak'] / 1e9:10.2f}{measured / 1e9:10.2f}{ratio:8.2f}", flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
