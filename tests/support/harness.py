"""bigcode-evaluation-harness itself, as NVIDIA packages it: its tasks and its scorer, to compare with.

The package is installed without what it declares (``pip install --no-deps nvidia-bigcode-eval``), so that
``bigcode_eval.tasks``, which imports every task, cannot be imported. The files needed here are imported one
by one below stand-ins for the packages that they lie in, and so are what they import of each other.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

Row = dict[str, Any]

ROOT = Path(__file__).parents[2]
PACKAGES = ("bigcode_eval", "bigcode_eval.tasks", "bigcode_eval.tasks.custom_metrics")
TASKS = {
    "mbpp": ("mbpp", "MBPP"),
    "mbppplus": ("mbppplus", "MBPPPlus"),
    "humaneval": ("humaneval", ""),
    "humaneval-unstripped": ("humaneval", ""),
    "humanevalplus": ("humanevalplus", ""),
    "humanevalplus-unstripped": ("humanevalplus", ""),
}
"""By the harness's name of a task: its module, and its class or nothing where the module makes classes."""


@dataclass(frozen=True)
class Scores:
    """What the harness says of generations.

    Attributes:
        pass_at_k: ``{"pass@1": x, ...}``, and the standard error of pass@1.
        passed: Per problem and sample, whether it passes.
        said: Per problem and sample, the harness's words: ``passed``, ``timed out`` or ``failed: ...``.
        seconds: Wall time that the scorer took.
    """

    pass_at_k: dict[str, float]
    passed: list[list[bool]]
    said: list[list[str]]
    seconds: float


def task(name: str, rows: Sequence[Row]) -> Any:
    """A task of the harness, made by its own code, on rows given here in place of the hub's."""
    file, kind = TASKS[name]
    loaded = module(f"tasks.{file}")
    make = getattr(loaded, kind) if kind else loaded.create_all_tasks()[name]
    with mock.patch.object(module("base"), "load_dataset", return_value={"test": list(rows)}):
        return make()


def score(
    generations: Sequence[Sequence[str]],
    references: Sequence[str],
    *,
    ks: Sequence[int] = (1, 5, 10),
    timeout: float = 3.0,
    workers: int = 2,
) -> Scores:
    """The harness's ``compute_code_eval``, in a small process of its own, of which it runs programs in forks.

    It confines them to nothing: harmless ones only.

    Args:
        generations: Per problem, whole programs.
        references: Per problem, what the harness runs after a program.
        ks: The k of pass@k. One above the number of samples is dropped.
        timeout: Seconds for a program with its tests.
        workers: Programs run at a time.
    """
    module("tasks.custom_metrics.code_eval")  # or the test is skipped
    asked = json.dumps([generations, references, list(ks), workers, timeout])
    # Programs that are killed leave folders behind, which go with this one.
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "tests.support.harness"],
            input=asked,
            env={**os.environ, "HF_ALLOW_CODE_EVAL": "1", "TMPDIR": folder},
            cwd=ROOT,
            check=False,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    return Scores(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Score what stands on stdin."""
    scorer = module("tasks.custom_metrics.code_eval").compute_code_eval
    generations, references, ks, workers, timeout = json.load(sys.stdin)
    began = time.perf_counter()
    pass_at_k, results = scorer(generations, references, k=ks, num_workers=workers, timeout=timeout)
    seconds = time.perf_counter() - began
    rows = [[result for _, result in results[i]] for i in range(len(generations))]
    found = Scores(
        {name: float(value) for name, value in pass_at_k.items()},
        [[result["passed"] for result in row] for row in rows],
        [[str(result["result"]) for result in row] for row in rows],
        seconds,
    )
    print(json.dumps(asdict(found)))


def estimates(correct: Sequence[int], counted: Sequence[int], ks: Sequence[int]) -> dict[int, float]:
    """The harness's pass@k of problems with so many right samples of so many."""
    estimate = module("tasks.custom_metrics.code_eval").estimate_pass_at_k
    return {k: float(estimate(counted, correct, k).mean()) for k in ks}


def module(name: str) -> Any:
    """One of the harness's modules; a skipped test where it is not installed."""
    modules = _modules()
    if not modules:
        pytest.skip("nvidia-bigcode-eval is not installed (pip install --no-deps nvidia-bigcode-eval)")
    return modules[f"bigcode_eval.{name}"]


@cache
def _modules() -> dict[str, ModuleType]:
    """What is used of the harness, by name; empty where it is not installed."""
    spec = importlib.util.find_spec("bigcode_eval")
    if spec is None or not spec.submodule_search_locations:
        return {}
    with _stand_ins(Path(spec.submodule_search_locations[0])):
        for name in (
            "base",
            "tasks.custom_metrics.code_eval",
            *(f"tasks.{module}" for module, _ in TASKS.values()),
        ):
            importlib.import_module(f"bigcode_eval.{name}")
        found = {name: module for name, module in sys.modules.items() if name.startswith("bigcode_eval.")}
    # It relies on processes being forks, which they are no longer by default from Python 3.14 on.
    execute: Any = found["bigcode_eval.tasks.custom_metrics.execute"]
    execute.multiprocessing = multiprocessing.get_context("fork")
    return found


@contextmanager
def _stand_ins(folder: Path) -> Iterator[None]:
    """Packages without their ``__init__``, and a ``datasets`` that takes no second to import."""
    kept = sys.modules.get("datasets")
    for name in PACKAGES:
        package = sys.modules[name] = ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
    hub: Any = ModuleType("datasets")
    hub.load_dataset = None
    sys.modules["datasets"] = hub
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "bigcode_eval"]:
            del sys.modules[name]
        del sys.modules["datasets"]
        if kept:
            sys.modules["datasets"] = kept


if __name__ == "__main__":
    main()
