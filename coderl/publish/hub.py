"""The Hugging Face hub: fetching adapters, pushing adapters and models, errors in one line."""

from __future__ import annotations

import glob
import logging
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from coderl.errors import UsageError, UserError, first_line, named_line
from coderl.files import write_atomic
from coderl.model.adapter_files import ADAPTER_CONFIG, adapter_base, is_adapter
from coderl.publish import card
from coderl.publish.export import MODEL_FILES
from coderl.runs.folder import RunFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

PUSHED = (*MODEL_FILES, "*.safetensors", "*.safetensors.index.json", "LICENSE*", "NOTICE*", "USE_POLICY*")
"""Patterns of what is pushed: the files of a model, and no other file that lies there, such as secrets."""

log = logging.getLogger(__name__)

_CHECKPOINTS = ("*.ckpt", "checkpoint-*/trainer_state.json", "optimizer.pt", "*/optimizer.pt")
"""Files of training, Lightning's and transformers': a folder that holds any is more than a model."""


def fetch_adapter(name: str) -> Path:
    """Download an adapter.

    Args:
        name: Its id on the hub.

    Returns:
        A folder, in the hub's cache.

    Raises:
        UserError: There is no such adapter, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.jinja", "*.model", "*.txt", "adapter_model.*", card.FILE]
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the hub's client raises its own, httpx's, and the system's errors
        raise UserError(
            f"{name} is no folder here, and cannot be fetched from the hub: {_reason(error)}"
        ) from error
    if not is_adapter(folder):
        raise UserError(f"{name} on the hub holds no {ADAPTER_CONFIG}: it is no adapter")
    return folder


def require_pushable(folder: Path) -> None:
    """Refuse a folder that is neither an adapter nor a model, or that holds checkpoints besides.

    Raises:
        UserError: It is such a folder.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder} to push")
    kinds = [kind for kind in (ADAPTER_CONFIG, "config.json") if (folder / kind).is_file()]
    if not kinds or not any(folder.glob("*.safetensors")):
        near = [place for place in (RunFolder(folder).adapter, RunFolder(folder).merged) if place.is_dir()]
        hint = f"; push {' or '.join(map(str, near))}" if near else ""
        raise UserError(
            f"{folder} holds neither an adapter nor a model (a config and weights in safetensors){hint}"
        )
    found = next((file for pattern in _CHECKPOINTS for file in folder.rglob(pattern)), None)
    if found is not None:
        raise UserError(
            f"{folder} holds checkpoints ({found.relative_to(folder)}): move them elsewhere first"
        )


def require_id(name: str) -> None:
    """Refuse a name that cannot be an id on the hub.

    Raises:
        UsageError: It cannot be one.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"{name!r} is no hub id: {first_line(error)}") from error


def push(
    folder: Path,
    hub_id: str | None = None,
    *,
    private: bool = False,
    progress: Callable[[str], None] | None = None,
) -> str:
    """Upload an adapter or a model; the repository is made if it does not exist.

    Args:
        folder: The adapter's or the model's. The card's code gets the model's hub id, nothing else changes.
        hub_id: ``owner/name``, or the name alone of a repository of your own. None: the folder's name, or its
            run's.
        private: Make a new repository private. An existing one stays as it is.
        progress: Gets a line before the upload, and the warnings. None: the warnings are logged.

    Returns:
        The repository's address.

    Raises:
        UsageError: The id is not valid.
        UserError: The folder cannot be pushed, there is no token, or the hub did not take it.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import LocalTokenNotFoundError

    require_pushable(folder)
    require_id(card.model_name(folder) if hub_id is None else hub_id)
    files = _pushed_files(folder)
    for line in _warnings(folder, files):
        (progress or log.warning)(line)
    api = HfApi()
    try:
        if get_token() is None:
            raise LocalTokenNotFoundError
        if hub_id is None or "/" not in hub_id:
            hub_id = f"{api.whoami()['name']}/{hub_id or card.model_name(folder)}"
        url = api.create_repo(hub_id, private=private or None, exist_ok=True)
        if progress:
            progress(f"pushing {folder} to {url}")
        _upload(api, folder, url.repo_id, files)
    except Exception as error:  # the hub's client raises its own, httpx's, and the system's errors
        again = f"coderl push {folder}" + (f" --hub_model_id {hub_id}" if hub_id else "")
        raise UserError(
            f"not pushed: {_reason(error)}. What is in {folder} is complete; to push it again: "
            f"{again}{' --private' if private else ''}"
        ) from error
    return str(url)


def _upload(api: HfApi, folder: Path, hub_id: str, files: list[str]) -> None:
    """Send the files, the card with the model's id in its code. If that fails the card is as it was."""
    path = folder / card.FILE
    old = path.read_text(encoding="utf-8") if path.is_file() else None
    if old is not None and (new := card.with_hub_id(old, hub_id)) != old:
        write_atomic(path, new)
    try:
        api.upload_folder(
            repo_id=hub_id,
            folder_path=folder,
            commit_message="Upload with coderl",
            allow_patterns=[glob.escape(file) for file in files],
        )
    except BaseException:
        if old is not None:
            write_atomic(path, old)
        raise


def _pushed_files(folder: Path) -> list[str]:
    """The files of a folder that :data:`PUSHED` names, relative to it.

    Raises:
        UserError: A file of weights is a link to somewhere else.
    """
    inside = folder.resolve()
    files = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        # fnmatch's * matches slashes too: without the count, files of models of epochs would go along.
        if not path.is_file() or not any(
            fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in PUSHED
        ):
            continue
        if path.resolve().is_relative_to(inside):
            files.append(name)
        elif name.endswith(".safetensors"):  # any other link that leads out of the folder is left out
            raise UserError(f"{path} is a link to outside of {folder}: put the file itself there")
    return files


def _warnings(folder: Path, files: list[str]) -> Iterator[str]:
    """Lines on what others will not get, or not be able to use."""
    if left := sorted({path.name for path in folder.iterdir()} - {name.partition("/")[0] for name in files}):
        more = f" and {len(left) - 8} more" if len(left) > 8 else ""
        yield f"not pushed, because they are not part of the model: {', '.join(left[:8])}{more} (in {folder})"
    base = adapter_base(folder)
    if base is not None and Path(base).is_dir():
        yield (
            f"{folder}/{ADAPTER_CONFIG} names {base} as its base, which others do not have: they have to "
            "name the base themselves"
        )


def _reason(error: Exception) -> str:
    """What went wrong with the hub, and what to do, in one line."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token for the hub: `hf auth login`, or set HF_TOKEN to one that may write"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the hub is not asked: unset it"
    if isinstance(error, HfHubHTTPError):
        return _http_reason(error)
    # "Error while uploading ...", "An error happened while trying to locate ...": the reason is their cause.
    if isinstance(error.__cause__, Exception) and isinstance(error, RuntimeError | FileNotFoundError):
        return _reason(error.__cause__)
    # httpx's lost connections and timeouts, by name: the client may use httpx or a copy of it.
    is_transport = any(kind.__name__ == "TransportError" for kind in type(error).__mro__)
    if isinstance(error, ConnectionError | TimeoutError) or is_transport:
        return (
            f"{constants.ENDPOINT} cannot be reached ({first_line(error)}): check the network, HTTPS_PROXY "
            "and HF_ENDPOINT"
        )
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}"
    return named_line(error)


def _http_reason(error: HfHubHTTPError) -> str:
    """What a status of the hub means, and what to do, in one line."""
    from huggingface_hub import constants

    status = error.response.status_code
    answer = f" ({first_line(error.server_message)})" if error.server_message else ""
    if status == 401:
        return (
            f"the hub does not take the token{answer}: `hf auth login` with one that may write, or set "
            "HF_TOKEN"
        )
    if status == 403:
        return (
            f"the token has no right to that{answer}: one with write access to this owner's models is needed"
        )
    if status == 404:
        return f"the hub knows no such owner or repository, or not for this token{answer}: check the id"
    if status == 429:
        return f"the hub has had too many requests{answer}: wait a while"
    if status >= 500:
        return f"{constants.ENDPOINT} is in trouble (status {status}{answer}): try again later"
    return f"the hub refused it (status {status}){answer}"
