"""Cost curves: seconds and memory of a GRPO step against samples, lengths and model size.

    python -m tests.benchmarks.bench_cost [--rounds 3] [--json FILE] [--figure docs/cost.png]

A random Llama in float32 with LoRA and KL 0.02, whose completions are all of the longest length. One thing is
varied at a time, the others stay at :data:`BASE`. Each point is a process of its own, and a median; memory is
the peak of its resident set.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import bench_step
from tests.benchmarks.bench_gpu import shaped

BASE = {"samples": 32, "prompt": 128, "completion": 64, "width": 256}
GROUP = 8
POINTS: dict[str, tuple[int, ...]] = {
    "samples": (8, 16, 32, 64, 128),
    "prompt": (32, 128, 256, 512),
    "completion": (16, 64, 128, 256),
    "width": (128, 256, 384, 512),
}
"""Values by what is varied: sequences a step, tokens, tokens, and the width of a model of 8 layers."""
LABELS = {
    "samples": "samples a step (groups of 8)",
    "prompt": "prompt, tokens",
    "completion": "completion, tokens",
    "width": "weights, millions",
}
PHASES = {"rollout": "#0072B2", "scoring": "#E69F00", "update": "#D55E00"}


def measure(settings: dict[str, int], folder: Path, rounds: int) -> dict[str, Any]:
    """One point."""
    width = settings["width"]
    shape = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": 8,
        "num_attention_heads": width // 32,
        "vocab_size": 8192,
    }
    work = {
        "model": str(shaped(folder / str(width), shape, torch.float32)),
        "problems": settings["samples"] // GROUP,
        "group": GROUP,
        "tokens": settings["completion"],
        "prompt": settings["prompt"],
        "kl": 0.02,
        "quantization": "none",
    }
    found = bench_step.summary(bench_step.turns_of(bench_step.our_side(work), rounds))
    return found | {"weights": 8192 * width * 2 + 8 * 13 * width * width}


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Seconds by phase above, memory below; each column varies one thing."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(found), figsize=(13, 5.5), sharey="row", layout="constrained")
    for column, (name, points) in enumerate(found.items()):
        xs = [p["weights"] / 1e6 if name == "width" else p["at"] for p in points]
        above, below = axes[0][column], axes[1][column]
        for phase, colour in PHASES.items():
            above.plot(xs, [p["phases"][phase] for p in points], "o-", color=colour, label=phase)
        above.plot(xs, [p["seconds"] for p in points], "ko-", label="step")
        above.set(xscale="log", yscale="log")
        below.plot(xs, [p["peak_gb"] for p in points], "ko-")
        below.set(xscale="log", xlabel=LABELS[name])
        for axis in (above, below):
            axis.set_xticks(xs, [f"{x:.0f}" for x in xs])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    most = max(point["peak_gb"] for points in found.values() for point in points)
    axes[1][0].set_ylim(0, 1.1 * most)
    axes[0][0].set_ylabel("seconds")
    axes[1][0].set_ylabel("peak of memory, GB")
    axes[0][0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3, help="steps of a point (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the figures; read, where it exists")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw them")
    chosen = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    if chosen.json and chosen.json.exists():
        found = json.loads(chosen.json.read_text())
    known: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, values in POINTS.items() if not found else ():
            found[name] = []
            for value in values:
                settings = BASE | {name: value}
                key = json.dumps(settings)
                if key not in known:
                    known[key] = measure(settings, Path(folder), chosen.rounds)
                point = known[key] | {"at": value}
                found[name].append(point)
                phases = ", ".join(f"{phase} {point['phases'][phase]:.2f}" for phase in PHASES)
                print(
                    f"{name:11}{value:6}{point['seconds']:8.2f} s  {point['peak_gb']:.2f} GB  {phases}",
                    flush=True,
                )
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if chosen.figure:
        draw(found, chosen.figure)


if __name__ == "__main__":
    main()
