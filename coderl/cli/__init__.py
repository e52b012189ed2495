"""The command line: which command was meant, what its configuration is, and one line for whatever is wrong.

Words come in from a shell or a notebook; LightningCLI trains, :mod:`coderl.commands` does the rest. No module
below knows that there is a command line.
"""

from coderl.cli.entry import main, run

__all__ = ["main", "run"]
