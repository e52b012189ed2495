"""The commands that train nothing: each is one function, and jsonargparse's ``auto_cli`` calls it."""

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


class _Parser(ArgumentParser):
    """Gives a bool as a flag, a pair as two words and a list as the words there are.

    jsonargparse would want ``true`` and lists in brackets.
    """

    def add_argument(self, *args: Any, **options: Any) -> Any:
        if options.get("type") is bool:
            del options["type"]
            options["action"] = "store_true"
        elif getattr(options.get("action"), "_typehint", None) == (tuple[str, str] | None):
            options = {"help": options["help"], "default": None, "nargs": 2, "metavar": ("A", "B")}
        elif getattr(options.get("action"), "_typehint", None) == list[str] and args[0][0] != "-":
            options = {"help": options["help"], "nargs": "+"}
        return super().add_argument(*args, **options)


def run_tool(name: str, args: list[str]) -> None:
    """Run a tool: the function ``name`` in the module ``coderl.name``.

    Args:
        name: The command.
        args: What follows it.

    Raises:
        UsageError: If an argument does not exist, is missing or has a value that does not fit.
    """
    function: Callable[..., None] = getattr(import_module(f"coderl.commands.{name}"), name)
    try:
        auto_cli(
            function,
            args=args,
            parser_class=_Parser,
            prog=f"coderl {name}",
            description=(inspect.getdoc(function) or "").partition("\nArgs:")[0],
            exit_on_error=False,
            allow_abbrev=False,
        )
    except argparse.ArgumentError as error:
        raise UsageError(_explain(name, function, str(error))) from error


def _explain(name: str, function: Callable[..., None], message: str) -> str:
    if message.startswith("the following arguments are required"):
        return f"no {message.partition(': ')[2]} given; `coderl {name} --help` shows what it takes"
    return explain(message, inspect.signature(function).parameters)
