"""The command line: which command is meant, its configuration, and one line for each error.

Arguments come in from a shell or from Python. LightningCLI trains; the other commands are
:mod:`coderl.commands`'. What they do does not belong here, and no package below imports this one.
"""

from coderl.cli.entry import main, run

__all__ = ["main", "run"]
