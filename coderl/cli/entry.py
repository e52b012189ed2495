"""Entry points of the command line: :func:`main` for the shell, :func:`run` for notebooks and tests.

This module imports nothing heavy, so that ``coderl --help`` and errors in a command's name come at once.
Lightning and torch load with :mod:`coderl.cli.trainer`, once there is something to run.

Exit codes: 0 done, 1 failed or interrupted, 2 called wrongly.
"""

from __future__ import annotations

import os
import sys
import textwrap
from typing import TYPE_CHECKING, NamedTuple

from coderl import __version__
from coderl.cli.config_files import config_names
from coderl.errors import UsageError, did_you_mean, exit_line

if TYPE_CHECKING:
    from lightning.pytorch.cli import ArgsType

    from coderl.cli.trainer import CoderlCLI


class Tool(NamedTuple):
    """A command that trains nothing and takes no config.

    Attributes:
        function: Where the function is that runs it, as ``module:name``. It is imported when the command is
            called; its signature is the command line, its docstring the help.
        help: What it does, in one line.
    """

    function: str
    help: str


TOOLS = {
    "evaluate": Tool(
        "coderl.commands.evaluate:evaluate",
        "pass@k of a model: `coderl evaluate --model embedded --tasks mbpp,humaneval`",
    ),
    "report": Tool(
        "coderl.commands.report:report",
        "an HTML page on a run's results: `coderl report RUN`, or several side by side",
    ),
    "merge": Tool(
        "coderl.commands.merge:merge",
        "adapter and base as one model: `coderl merge --adapter_model_id RUN --output_dir OUT`",
    ),
    "push": Tool(
        "coderl.commands.push:push",
        "an adapter or a merged model to the hub: `coderl push RUN/adapter`",
    ),
    "check": Tool(
        "coderl.commands.check:check",
        "look at problems before training on them: `coderl check FILE.jsonl --mutants 10`",
    ),
    "execute": Tool(
        "coderl.commands.execute:execute",
        "run programs in the sandbox: `coderl execute IN.jsonl --output OUT.jsonl`",
    ),
    "doctor": Tool(
        "coderl.commands.doctor:doctor",
        "check this machine: isolation, GPU, bitsandbytes, hub, disk",
    ),
}
"""The commands that train nothing, by name."""

COMMANDS = {
    "fit": "train a policy: `coderl fit --config quickstart.yaml`",
    "validate": "evaluate a policy on the validation split",
    "test": "evaluate a policy on the test split",
    **{name: tool.help for name, tool in TOOLS.items()},
}
"""All commands, each with what it does in one line. Those that are no tools are methods of the Trainer."""

EXIT_DONE, EXIT_FAILED, EXIT_USAGE = 0, 1, 2


def help_text() -> str:
    """The text of ``coderl --help``."""
    configs = textwrap.fill(
        ", ".join(config_names()) or "(none)",
        110,
        initial_indent="  ",
        subsequent_indent="  ",
        break_on_hyphens=False,
    )
    commands = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    return f"""usage: coderl COMMAND [ARGUMENT ...]

Reinforcement learning for code models: PPO and GRPO on executed rewards over a 4-bit LoRA policy.

commands:
{commands}

options:
  -h, --help            show this help
  --version             show the version
  --print_completion S  print a completion script; S is shtab-bash or shtab-zsh (needs coderl[completion])

Each command has its own `--help` and `--print_config` (the configuration as it would run). The commands that
train take --config CONFIG and --KEY VALUE, each as often as you like, and `--model.help CLASS` (the arguments
of one class, with units). Later settings win: environment variables such as
CODERL_FIT__TRAINER__MAX_EPOCHS, then each --config in turn, then flags such as --trainer.max_epochs 2.

Models of known families get their settings from models/*.yaml; `--preset none` turns that off.

configs found by name from any folder:
{configs}"""


def run(args: ArgsType = None) -> CoderlCLI | None:
    """Run one command; errors are raised.

    Args:
        args: What would follow ``coderl`` on the shell, as a list; or a configuration as a dict with the key
            ``subcommand``. None reads ``sys.argv``.

    Returns:
        The finished command with its ``model``, ``datamodule`` and ``trainer``; None after ``--help``
        and the tools.

    Raises:
        UsageError: If the call itself is wrong: an unknown command, key or config.
        UserError: If what the call names cannot be used: a missing file, a run folder in use.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        # OpenMP threads that spin while they wait starve each other, and the sandbox, wherever cores are
        # shared: a step of the quickstart beside one busy process took 3.8 s, and 1.9 with threads that sleep
        # at once. On idle cores sleeping costs: 1.5 s, and 1.2 spinning. So they spin for about as long as
        # lies between two operations: 2.3 and 1.2 s. Set before torch loads, which brings GNU's runtime.
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if args is None:
        args = sys.argv[1:]
    if isinstance(args, list):
        if args[:1] in (["-h"], ["--help"], ["--version"]):
            print(help_text() if args[0] != "--version" else f"coderl {__version__}")
            return None
        _check_command(args)
        if args[0] in TOOLS:
            from coderl.cli.tools import run_tool

            run_tool(args[0], TOOLS[args[0]].function, args[1:])
            return None
    from coderl.cli.trainer import CoderlCLI

    return CoderlCLI.start(args)


def _check_command(args: list[str]) -> None:
    """Refuse an unknown command before torch and Lightning are imported, which takes seconds."""
    if not args:
        raise UsageError(
            "no command; `coderl --help` lists them, `coderl fit --config quickstart.yaml` starts"
        )
    command = args[0]
    if not command.startswith("-") and command not in COMMANDS:
        hint = did_you_mean(command, COMMANDS) or f"; the commands are {', '.join(COMMANDS)}"
        raise UsageError(f"unknown command {command!r}{hint}")


def main(args: ArgsType = None) -> int:
    """Run one command and return its exit code, with one line on stderr for an error that the user can fix.

    Args:
        args: See :func:`run`.

    Returns:
        0 done, 1 failed or interrupted, 2 called wrongly.
    """
    try:
        run(args)
    except SystemExit as stop:  # argparse ends --help and --print_config with it
        return stop.code if isinstance(stop.code, int) else EXIT_DONE if stop.code is None else EXIT_FAILED
    except BrokenPipeError:  # `coderl --help | head`; Python flushes stdout at exit and would fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (Exception, KeyboardInterrupt) as error:
        line = exit_line(error)
        if line is None:  # a bug: its traceback is needed
            raise
        print(line, file=sys.stderr)
        return EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED
    return EXIT_DONE
