"""Learning curves: quickstart's setting, GRPO beside its variants and PPO, as one table and one figure.

    python -m tests.benchmarks.bench_learning [--variants grpo,dapo] [--seeds 42,1,2] [--steps N] [-- FLAGS]

Every run is a ``coderl fit`` in a process of its own, with all of quickstart but the variant's flags; what
follows ``--`` goes to every run. Seeds come in the outer loop, so that a benchmark that is stopped early has
compared all variants on the first ones. Called again it goes on where it stopped: finished runs are read,
half-finished ones removed and made anew. Two at once, with the same --out, leave each other's runs alone.
A run that fails is told on stderr and the others go on; the exit code is 1 then. In --out lie, for a run, its
folder, its flags (``.flags.json``), and what it said (``.log``, ``.err``). The table goes to stdout. The
README's figure is made with ``--figure tests/benchmarks/learning.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import yaml

from coderl.cli.config_files import find_config
from tests.benchmarks.learning_curves import Curve, finished, markdown, table
from tests.benchmarks.learning_figure import draw
from tests.benchmarks.learning_runs import Run, perform, say

QUICKSTART = "quickstart.yaml"
# On-policy, with one inner epoch, gspo's gradient is grpo's and cispo's is dapo's: those two take two, and
# `grpo-2` stands beside them. All make equally many optimizer steps: with two epochs, on half the samples.
GRPO, PPO = "--model.scale group --model.loss_type", "--model PPO --model.inner_epochs 1 --model.lam 1.0"
VARIANTS = {
    "grpo": f"{GRPO} grpo",
    "dapo": f"{GRPO} dapo",
    "dr_grpo": "--model.loss_type dr_grpo --model.scale none",
    "reinforce++": "--model.loss_type dapo --model.baseline reinforce++ --model.scale batch",
    "grpo-2": f"{GRPO} grpo --model.inner_epochs 2",
    "gspo-2": f"{GRPO} gspo --model.inner_epochs 2 --model.clip 0.02 --model.clip_high 0.03",
    "cispo-2": f"{GRPO} cispo --model.inner_epochs 2",
    "ppo": f"{PPO} --model.critic_learning_rate 1e-2",
    "ppo-critic": f"{PPO} --model.critic_learning_rate 1e-2 --model.critic_adapter true",
    "original": f"{GRPO} grpo --model.kl_coefficient 0.02 --model.learning_rate 3e-6"
    " --model.policy.lora.alpha 16 --model.schedule constant_with_warmup",
}
"""What each variant changes in quickstart.yaml."""
REFERENCE = "grpo"
"""The variant that stands in grey behind each of the others."""


def quickstart_steps() -> int:
    config = yaml.safe_load(Path(find_config(QUICKSTART)).read_text(encoding="utf-8"))
    return int(config["trainer"]["max_steps"])


def planned(chosen: argparse.Namespace) -> list[Run]:
    """All runs in the order they are made in."""
    steps = chosen.steps or quickstart_steps()
    runs = []
    for seed in chosen.seeds:
        for variant in chosen.variants:
            flags = shlex.split(VARIANTS[variant])
            always = [f"--seed_everything={seed}", f"--trainer.max_steps={steps}"]
            runs.append(
                Run(variant, seed, ("-c", QUICKSTART, *flags, *always, *chosen.extra), chosen.out.resolve())
            )
    return runs


def names(text: str) -> list[str]:
    if unknown := [name for name in text.split(",") if name not in VARIANTS]:
        raise argparse.ArgumentTypeError(f"no variant {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    return text.split(",")


def numbers(text: str) -> list[int]:
    return [int(seed) for seed in text.split(",")]


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else "", epilog="what follows -- goes to every run"
    )
    parser.add_argument(
        "--variants", type=names, default=list(VARIANTS), help=f"of {','.join(VARIANTS)} (default all)"
    )
    parser.add_argument("--seeds", type=numbers, default=[42, 1, 2], help="default 42,1,2")
    parser.add_argument("--steps", type=int, help="optimizer steps of a run (default quickstart's)")
    parser.add_argument("--threads", type=int, help="OpenMP threads of a run (default torch's choice)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("checkpoints/learning"),
        help="folder of the runs (default %(default)s)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="the table's figures (default OUT/learning.json)"
    )
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="default OUT/learning.png")
    parser.add_argument("--no-runs", action="store_true", help="only read the runs that are there")
    end = list(words).index("--") if "--" in words else len(words)
    chosen = parser.parse_args(words[:end])
    chosen.extra = list(words[end + 1 :])
    chosen.json = chosen.json or chosen.out / "learning.json"
    chosen.figure = chosen.figure or chosen.out / "learning.png"
    return chosen


def stopped(signum: int, frame: object) -> NoReturn:
    """End as at Ctrl-C, which takes the run in hand along."""
    raise KeyboardInterrupt


def figures(curves: Sequence[Curve], failed: dict[str, str], chosen: argparse.Namespace) -> dict[str, Any]:
    """Everything for the JSON file."""
    runs = [{k: v for k, v in asdict(curve).items() if k != "steps"} for curve in curves]
    return {
        "rows": [asdict(row) for row in table(curves)],
        "runs": runs,
        "failed": failed,
        "flags": {variant: VARIANTS[variant] for variant in chosen.variants},
        "extra": chosen.extra,
        "threads": chosen.threads,
        "cores": len(os.sched_getaffinity(0)),
    }


def main(words: Sequence[str]) -> int:
    chosen = arguments(words)
    signal.signal(signal.SIGTERM, stopped)
    failed: dict[str, str] = {}
    runs = planned(chosen)
    for run in runs if not chosen.no_runs else []:
        if why := perform(run, chosen.threads):
            failed[run.folder.name] = why
            say(run, f"FAILED, {why}")
    there = [run for run in runs if run.folder.name not in failed]
    curves = [curve for run in there if (curve := finished(run.folder)) is not None]
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps(figures(curves, failed, chosen), indent=1) + "\n", encoding="utf-8")
    if curves:
        print(markdown(table(curves)))
        draw(curves, chosen.figure, REFERENCE)
    return 1 if failed or not curves else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
