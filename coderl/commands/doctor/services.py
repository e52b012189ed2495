"""Checks of the Hugging Face hub and Weights & Biases. Tokens are looked for, and never printed."""

from __future__ import annotations

import netrc
import os
import threading
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from coderl.commands.doctor.check import Check

if TYPE_CHECKING:
    from collections.abc import Iterator

SECONDS = 4.0
"""How long the hub may take to answer, looking up its name included."""


def checks() -> Iterator[Check]:
    """Checks of the hub and W&B."""
    yield hub()
    yield wandb()


def hub() -> Check:
    """Whether the hub answers, and whether there is a token for it."""
    from huggingface_hub import constants, get_token

    token = get_token() is not None
    said = "a token is there" if token else "no token (only gated models and pushing need one)"
    data = {"endpoint": constants.ENDPOINT, "offline": constants.HF_HUB_OFFLINE, "token": token}
    if constants.HF_HUB_OFFLINE:
        detail = f"left alone, HF_HUB_OFFLINE is set: only what is in the cache loads; {said}"
        return Check("hub", "ok", detail, data=data | {"reachable": None})
    problem = reach(constants.ENDPOINT)
    data["reachable"] = not problem
    if problem:
        fix = "check the network and HTTPS_PROXY, or set HF_ENDPOINT to a mirror; the quickstart needs no hub"
        return Check("hub", "warn", f"{constants.ENDPOINT}: {problem}; {said}", fix, data)
    return Check("hub", "ok", f"{constants.ENDPOINT} answers; {said}", data=data)


def reach(url: str, seconds: float = SECONDS) -> str:
    """Send a HEAD request, and wait no longer than the time limit.

    Args:
        url: Where to.
        seconds: The time limit; a request that takes longer goes on in its thread, and is ignored.

    Returns:
        What went wrong; empty where the server answers.
    """
    problem = [f"no answer within {seconds:g} s"]

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "coderl-doctor"})
            with urllib.request.urlopen(request, timeout=seconds):
                problem[0] = ""
        except urllib.error.HTTPError as error:
            # Another status may be a proxy's and not the hub's. 429 is the hub's: it is there, and busy.
            problem[0] = "" if error.code == 429 else f"answers with HTTP status {error.code}"
            error.close()
        except urllib.error.URLError as error:
            problem[0] = f"cannot be reached ({error.reason})"
        except (OSError, ValueError, HTTPException) as error:
            problem[0] = f"cannot be reached ({error})"

    # Looking up a name has no time limit, so it happens in a thread, which is not waited for after the limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return problem[0]


def wandb() -> Check:
    """Whether runs can log to W&B, which only configs with a WandbLogger do."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    mode = os.environ.get("WANDB_MODE", "online")
    logged_in = bool(os.environ.get("WANDB_API_KEY")) or _in_netrc(host)
    data = {"logged_in": logged_in, "mode": mode, "host": host}
    if mode in ("offline", "disabled", "dryrun"):
        return Check("W&B", "ok", f"WANDB_MODE is {mode}: nothing is sent", data=data)
    if logged_in:
        return Check("W&B", "ok", f"logged in to {host}", data=data)
    fix = "`wandb login`, or WANDB_MODE=offline; only configs with a WandbLogger, such as grpo.yaml, need it"
    return Check("W&B", "warn", f"not logged in to {host}", fix, data)


def _in_netrc(host: str) -> bool:
    path = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
