"""The command's arguments; comparing two results files; printing and saving results.

Comparing needs no torch, so what loads torch is imported in the function, after the comparison.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from coderl.errors import UsageError, UserError
from coderl.evaluation import EvaluationSettings
from coderl.evaluation.tasks import TASKS, TIMEOUT
from coderl.files import free_path
from coderl.scores import results_name, save_results, summary_text
from coderl.scores.compare import compare as compare_results
from coderl.scores.compare import save
from coderl.scores.results import stem_of
from coderl.scores.table import text
from coderl.types import ComputeDtype, Judging, Quantization

if TYPE_CHECKING:
    from coderl.scores import Evaluation


def evaluate(
    model: str | None = None,
    tasks: str = "mbpp,humaneval",
    adapter: str | None = None,
    gguf_file: str | None = None,
    quantization: Quantization | None = None,
    compute_dtype: ComputeDtype = "auto",
    device: str = "auto",
    chat: bool = False,
    n_samples: int = 15,
    k: str = "1,5,10",
    temperature: float = 0.2,
    top_p: float = 0.95,
    max_length_generation: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    grading: Judging = "inline",
    timeout: float | None = None,
    workers: int | None = None,
    memory_mb: int = 2048,
    file_mb: int = 64,
    allow_weak_isolation: bool = False,
    output: str = "evaluations",
    load_generations_path: str | None = None,
    compare: tuple[str, str] | None = None,
) -> None:
    """Measure pass@k of a model, or of saved programs, or set two evaluations side by side.

    Prompts, stop words, programs and time-outs are those of bigcode-evaluation-harness, and so are the files:
    generations saved here are scored there to the same figures, and the other way round. An evaluation that
    is stopped goes on where it stood when the same command is given again, and ends as one that was not.

    Args:
        model: A hub id, a folder of weights, the folder of an adapter, a run's folder, or embedded.
        tasks: Names with commas between: {tasks}; or paths of .jsonl files of your own.
        adapter: Folder of an adapter on --model, where it does not name its base itself. It is not merged.
        gguf_file: Name of a GGUF file in the folder --model.
        quantization: nf4 holds the base in 4 bits, none does not; by default as an adapter was trained, and
            none without one.
        compute_dtype: Of the weights; auto is bfloat16 on a GPU that has it, else float16; float32 on a CPU.
        device: Where the model runs, such as cuda:1; auto is the first GPU, else the CPU.
        chat: Ask through the model's chat template, the answer opened at a fenced block. Such scores do not
            compare with those of the completion form.
        n_samples: Samples per problem.
        k: The k of pass@k, with commas between. One above --n_samples is reported as missing.
        temperature: Of sampling; 0 is greedy.
        top_p: Nucleus sampling; 1 is off.
        max_length_generation: Longest prompt with its completion, in tokens; by default 2048, or what the
            model reads where that is less.
        batch_size: Sequences decoded together, at most; by default as many as free memory holds.
        seed: Of the samples.
        limit: Only the first so many problems of each task.
        grading: inline runs tests beside the program, as the harness does; auto reaches verdicts that cannot
            be forged, and names the samples that inline grading judges otherwise.
        timeout: Seconds for a program with all its tests; by default the task's ({timeouts}).
        workers: Programs that run at a time; by default one for each usable core, 16 at most.
        memory_mb: MiB of memory (address space) for one program.
        file_mb: MiB that the files of one program may take.
        allow_weak_isolation: Run even where only resource limits protect this machine (tier C).
        output: Folder for the results.
        load_generations_path: Score the programs in this file, a list of lists of whole programs, without a
            model; --tasks then names one task.
        compare: Two results files: paired difference, its interval, and the problems won and lost by the
            second.

    Raises:
        UsageError: What is asked for does not go together, or an argument is out of range.
        UserError: A model, task or file cannot be read, or results cannot be written.
    """
    _one_of(model=model, load_generations_path=load_generations_path, compare=compare)
    if compare is not None:
        compare_files(Path(compare[0]), Path(compare[1]), Path(output))
        return
    if model is None and (adapter or gguf_file or quantization or chat):
        raise UsageError("--adapter, --gguf_file, --quantization and --chat are about a --model: give one")
    _require_counts(
        n_samples=n_samples, max_length_generation=max_length_generation, limit=limit, batch_size=batch_size
    )
    from coderl.commands.evaluate.run import ModelRun, load_tasks, score_generations, warn_of_faults
    from coderl.model.loading import find_device
    from coderl.model.policy import Policy
    from coderl.model.provenance import quantization_of
    from coderl.runs.model_ref import find_model
    from coderl.sandbox import Sandbox

    settings = EvaluationSettings(
        n_samples, _numbers(k), temperature, top_p, max_length_generation, seed, grading
    )
    _require_writable(Path(output))
    seconds = TIMEOUT if timeout is None else timeout
    with Sandbox(workers, seconds, "auto", memory_mb, file_mb, allow_weak_isolation) as sandbox:
        sandbox.start()  # where isolation is refused, that is reported before anything loads
        loaded = load_tasks(tasks, limit, timeout)
        warn_of_faults(loaded, sandbox, chat)
        if temperature == 0 and n_samples > 1:
            print("temperature 0: all samples are alike, --n_samples 1 --k 1 says as much", file=sys.stderr)
        if load_generations_path is not None:
            generations = Path(load_generations_path)
            evaluations = score_generations(generations, loaded, sandbox, settings)
            _save_and_print(evaluations, Path(output, results_name(stem_of(generations), "generations")))
            return
        ref = find_model(str(model), adapter, gguf_file)
        policy = Policy(
            ref.base,
            gguf_file=gguf_file,
            quantization=quantization or quantization_of(ref.adapter),
            compute_dtype=compute_dtype,
            adapter=ref.adapter,
            prompt_form="chat" if chat else "completion",
        )
        run = ModelRun(ref, policy, settings, find_device(device), batch_size)
        run.evaluate(loaded, sandbox, Path(output), _save_and_print)


# The benchmarks are listed in one place.
evaluate.__doc__ = (evaluate.__doc__ or "").format(
    tasks=", ".join(TASKS),
    timeouts=", ".join(f"{s:g}" for s in sorted({t.timeout for t in TASKS.values()})),
)


def _one_of(**ways: object) -> None:
    """Refuse a call that names none of these, or more than one."""
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        what = " and ".join(f"--{name}" for name in given)
        raise UsageError(
            f"{what} do not go together: give one of them"
            if given
            else "nothing to evaluate: give --model, --load_generations_path FILE, or --compare A.json B.json"
        )


def _require_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UsageError(f"--{name} is {count}; give 1 or more")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--k is {text!r}: give whole numbers with commas between, such as 1,5,10") from None


def _require_writable(folder: Path) -> None:
    """Make the folder, and refuse one that cannot be written to before hours of work, not after them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"--output {folder} cannot be written to: {error.strerror or error}; name another folder"
        ) from error


def _save_and_print(evaluations: dict[str, Evaluation], path: Path) -> None:
    """Save the results, and print them."""
    path = free_path(path)  # two evaluations may end in the same second
    save_results(evaluations, path)
    print(summary_text(evaluations, path))
    lost = [name for name, evaluation in evaluations.items() if evaluation.pass_at_k[1] is None]
    if lost:
        raise UserError(f"{lost[0]}: no program got a verdict; coderl doctor says what the sandbox lacks")


def compare_files(first: Path, second: Path, output: Path) -> None:
    """Compare two results files: a table on the console, JSON and a figure in the folder ``output``."""
    found = compare_results(first, second)
    written = save(found, output)
    print(text(found))
    for path in written:
        print(f"📁 {path}")
