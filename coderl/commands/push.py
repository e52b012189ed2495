"""``coderl push``: uploads an adapter or a merged model to the hub."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path


def push(folder: str, hub_model_id: str | None = None, private: bool = False) -> None:
    """Upload an adapter or a merged model to the Hugging Face hub.

    Needs a token that may write: `hf auth login`, or HF_TOKEN. Pushing again sends what has changed.

    Args:
        folder: Of an adapter (a run's adapter/) or of a merged model (a run's name with -merged).
        hub_model_id: Where to, as owner/name; by default your own name and the folder's, or for adapter/ its
            run's.
        private: Make a new repository private. One that exists stays as it is.

    Raises:
        UsageError: The id is not valid.
        UserError: The folder is neither adapter nor model, there is no token, or the hub did not take it.
    """
    from coderl.publish import hub  # loads torch, which --help does not need

    # Stdout gets the address alone, for scripts.
    progress = partial(print, file=sys.stderr)
    print(hub.push(Path(folder).expanduser(), hub_model_id, private=private, progress=progress))
