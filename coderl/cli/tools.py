"""Runs the commands that train nothing: jsonargparse makes a command line of a function's signature."""

from __future__ import annotations

import argparse
import inspect
from importlib import import_module
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, auto_cli

from coderl.cli.messages import explain
from coderl.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable


class ToolParser(ArgumentParser):
    """A parser with the usual forms: ``--private``, ``--compare A B``, ``RUN1 RUN2``.

    jsonargparse alone would want ``--private true`` and lists in brackets.
    """

    def add_argument(self, *args: Any, **options: Any) -> Any:
        """Add an argument: bool is a flag, a pair takes two words, a positional list takes all words."""
        # jsonargparse passes types that argparse does not know inside an action of its own, as `_typehint`.
        if options.get("type") is bool:
            del options["type"]
            options["action"] = "store_true"
        elif getattr(options.get("action"), "_typehint", None) == (tuple[str, str] | None):
            options = {"help": options["help"], "default": None, "nargs": 2, "metavar": ("A", "B")}
        elif getattr(options.get("action"), "_typehint", None) == list[str] and args[0][0] != "-":
            options = {"help": options["help"], "nargs": "+"}
        return super().add_argument(*args, **options)


def run_tool(name: str, function: str, args: list[str]) -> None:
    """Run a command.

    Args:
        name: What it is called on the command line.
        function: The function that runs it, as ``module:name``.
        args: The arguments after the command's name.

    Raises:
        UsageError: If an argument does not exist, is missing or has a value that does not fit.
    """
    module, _, attribute = function.partition(":")
    command: Callable[..., None] = getattr(import_module(module), attribute)
    try:
        auto_cli(
            command,
            args=args,
            parser_class=ToolParser,
            prog=f"coderl {name}",
            description=(inspect.getdoc(command) or "").partition("\nArgs:")[0],
            exit_on_error=False,
            allow_abbrev=False,
        )
    except argparse.ArgumentError as error:
        message = str(error)
        if message.startswith("the following arguments are required"):
            missing = message.partition(": ")[2]
            line = f"no {missing} given; `coderl {name} --help` shows what it takes"
        else:
            line = explain(message, inspect.signature(command).parameters)
        raise UsageError(line) from error
