"""Now in :mod:`coderl.model.policy`."""

from coderl.model.policy import Policy

__all__ = ["Policy"]
