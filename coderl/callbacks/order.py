"""Which callback comes last, however a config lists them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning import Trainer
    from lightning.pytorch.callbacks import Callback


def run_last(trainer: Trainer, callback: Callback) -> None:
    """Move ``callback`` behind all others, from the next hook on.

    Args:
        trainer: Whose list is replaced, not changed: Lightning is iterating over it.
        callback: One of the list.
    """
    listed: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    trainer.callbacks = [*(one for one in listed if one is not callback), callback]  # type: ignore[attr-defined]
