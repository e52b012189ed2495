"""Presets: settings for families of models, applied over the shipped configs by the model's name or type.

A preset is a file of ``configs/models``: a config with one more key, ``match``, which holds a regular
expression for the model's name (the last part of its hub id or path) and the ``model_type`` of its
``config.json``.
"""

from __future__ import annotations

import os
import re
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import Namespace

from coderl.cli.config_files import configs_folder, find_config
from coderl.cli.overlays import flat, merge
from coderl.errors import UsageError, did_you_mean
from coderl.files import read_json_or_none
from coderl.runs.folder import is_epoch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lightning.pytorch.cli import ArgsType

AUTO, NONE = "auto", "none"
"""Values of ``--preset`` that are neither names nor paths."""

_PRINT = "--print_config"

WARM_START = ("policy",)
"""Arguments that SFT takes from a preset; the others configure reinforcement learning."""


@dataclass(frozen=True)
class Preset:
    """Settings for a family of models.

    Attributes:
        name: The file's name without its suffix, or the path it was given by.
        why: Why it was chosen, in words.
        settings: The config, without ``match``.
        shipped: Whether it is a file of ``configs/models``. These may set arguments that a class lacks.
    """

    name: str
    why: str
    settings: dict[str, Any]
    shipped: bool = True

    def settings_for(self, config: Namespace) -> dict[str, Any]:
        """The settings, with the class paths that a configuration names.

        Args:
            config: The command's configuration without the preset. Arguments of a shipped preset that its
                classes do not take are left out.
        """
        arguments = {key: self.settings.get(key, {}).get("init_args", {}) for key in ("model", "data")}
        if self.shipped:
            arguments = {key: _known(value, config[key].init_args) for key, value in arguments.items()}
            if "engine" not in config.model.init_args:  # it samples nothing: SFT
                arguments = {
                    "model": {k: v for k, v in arguments["model"].items() if k in WARM_START},
                    "data": {},
                }
        classes = {
            key: {"class_path": config[key].class_path, "init_args": value}
            for key, value in arguments.items()
        }
        return {**self.settings, **classes, "preset": self.name}


def parse(parsed: Callable[[ArgsType], Namespace], args: ArgsType, log: Callable[[str], None]) -> Namespace:
    """Parse a call, with the preset for its model.

    The call is parsed twice: which preset it needs is known by the model and the classes of the first parse.
    The second has the preset in the place where flags and configs of the user override it.

    Args:
        parsed: Parses a call.
        args: Arguments as on the shell, or a configuration.
        log: Called with a line on what the preset changed.

    Raises:
        UsageError: The call is wrong, or ``--preset``.
    """
    # jsonargparse prints and exits when it meets --print_config, so the first parse goes without it.
    quiet = [arg for arg in args if not arg.startswith(_PRINT)] if isinstance(args, list) else args
    try:
        plain = parsed(deepcopy(quiet))  # parsing changes a dict in place
    except UsageError:
        if quiet == args:
            raise
        return parsed(args)  # --print_config also prints a configuration that lacks required keys
    command = plain.subcommand
    config = plain[command]
    preset = choose(config.preset, *_base(config))
    if preset is None or (isinstance(args, list) and command not in args):
        return plain if quiet == args else parsed(args)
    settings = preset.settings_for(config)
    try:
        found = parsed(_with_preset(quiet, command, settings))
    except UsageError as error:
        why = str(error).removeprefix("--config: ")
        raise UsageError(f"--preset: {preset.name} does not fit: {why}") from error
    log(_summary_line(preset, settings, config, found[command]))
    return found if quiet == args else parsed(_with_preset(args, command, settings))


def choose(asked: str, model: str, gguf_file: str | None = None) -> Preset | None:
    """The preset that was asked for, or the one for the model.

    Presets of another ``model_type`` than the model's are out, where that is known. Of the others, the first
    that matches the model's name is chosen; where none does, the only one of the type, if there is just one.

    Args:
        asked: ``auto``, ``none``, a preset's name, or the path of one.
        model: Folder or hub id.
        gguf_file: Name of a GGUF file in ``model``, used as the model's name.

    Returns:
        None where no preset matches.

    Raises:
        UsageError: There is no preset of that name, or it cannot be read.
    """
    if asked == NONE:
        return None
    if asked != AUTO:
        path = _preset_path(asked)
        return Preset(asked, "asked for", _read(path)[1], shipped=path.parent == models_folder())
    known = [(path.stem, *_read(path)) for path in sorted(models_folder().glob("*.yaml"))]
    name, kind = gguf_file or _model_name(model), model_type(model)
    candidates = [entry for entry in known if kind in (None, entry[1].get("model_type"))]
    for stem, match, settings in candidates:
        if re.search(match["name"], name, flags=re.IGNORECASE):
            return Preset(stem, "by the model's name", settings)
    if kind is not None and len(candidates) == 1:
        return Preset(candidates[0][0], f"by the model's type, {kind}", candidates[0][2])
    return None


def models_folder() -> Path:
    """The folder of the shipped presets."""
    return configs_folder() / "models"


def model_type(model: str) -> str | None:
    """``model_type`` in the config.json of a folder, or of a hub model in the cache; None if unknown."""
    try:
        file: Any = Path(model).expanduser() / "config.json"
        if not file.is_file():
            from huggingface_hub import try_to_load_from_cache

            file = try_to_load_from_cache(model, "config.json")
    except (OSError, ValueError, RuntimeError):
        return None  # no such name or user: loading the weights reports it
    body = read_json_or_none(Path(file)) if isinstance(file, str | Path) else None
    found = body.get("model_type") if isinstance(body, dict) else None
    return found if isinstance(found, str) else None


def without_match(config: str) -> str:
    """The value of ``--config``; for a preset's file its text without ``match``, which is no setting."""
    try:
        settings = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return config
    if isinstance(settings, dict) and settings.pop("match", None) is not None:
        return yaml.safe_dump(settings)
    return config


def _known(settings: dict[str, Any], arguments: Namespace) -> dict[str, Any]:
    """The settings that a class has arguments for; none for a part that is null in the configuration."""
    taken = {}
    for key, value in settings.items():
        if key not in arguments:
            continue
        inner = arguments[key] and arguments[key].get("init_args") if isinstance(value, dict) else None
        if inner is not None and "init_args" in value:
            value = {
                "class_path": arguments[key].class_path,
                "init_args": _known(value["init_args"], inner),
            }
        elif isinstance(value, dict) and arguments[key] is None and "class_path" not in value:
            continue
        taken[key] = value
    return taken


def _base(config: Namespace) -> tuple[str, str | None]:
    """The base model of a configuration, and its GGUF file; empty and None where it has no policy."""
    policy = config.model.get("init_args.policy")
    arguments = policy and policy.get("init_args", policy)
    return (arguments.get("model") or "", arguments.get("gguf_file")) if arguments else ("", None)


def _with_preset(args: Any, command: str, settings: dict[str, Any]) -> Any:
    """A call with the preset after the shipped config that names a model, and before everything else."""
    if not isinstance(args, list):
        whole = Namespace()
        for key, value in (args.as_dict() if isinstance(args, Namespace) else deepcopy(args)).items():
            whole[key] = value  # a Namespace nests keys with dots, which a dict from Python may have
        given = whole.as_dict()
        return given | {"subcommand": command, command: merge(settings, given[command])}
    place = args.index(command) + 1
    for after, value in _configs(args, place):
        path = Path(find_config(value)).absolute()
        if not path.is_relative_to(configs_folder()):
            break  # the user's own config, and all after it, override the preset
        if "model.init_args.policy.init_args.model" in flat(yaml.safe_load(path.read_text(encoding="utf-8"))):
            place = after
    return [*args[:place], "--config", yaml.safe_dump(settings), *args[place:]]


def _configs(args: list[str], start: int) -> Iterator[tuple[int, str]]:
    """Each config that is named from ``start`` on, as (index of the argument after it, its value)."""
    for i in range(start, len(args)):
        flag, equals, value = args[i].partition("=")
        if flag in ("-c", "--config"):
            yield (i + 1, value) if equals else (i + 2, args[i + 1])
        elif flag.startswith("-c"):
            yield i + 1, args[i][2:]


def _summary_line(preset: Preset, settings: dict[str, Any], plain: Namespace, found: Namespace) -> str:
    """Which of the preset's settings took effect, and which the user has overridden."""
    was, now = _short(plain.as_dict()), _short(found.as_dict())
    moved = [f"{key} {_shown(now[key])}" for key in now if "." in key and was.get(key) != now[key]]
    wanted = {key: value for key, value in _short(settings).items() if not key.endswith("class_path")}
    lost = [key for key, value in wanted.items() if "." in key and now.get(key) != value]
    effect = f"sets {', '.join(moved)}" if moved else "changes nothing"
    yours = f"; set otherwise by you: {', '.join(lost)}" if lost else ""
    return f"preset {preset.name} ({preset.why}) {effect}{yours}; --preset none turns it off"


def _short(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by key as flags write it, without ``init_args``."""
    values = flat(settings).items()
    return {k.replace("init_args.", ""): list(v) if isinstance(v, tuple) else v for k, v in values}


def _shown(value: Any) -> str:
    """A value as YAML writes it, such as ``[q_proj, k_proj]``."""
    return "[" + ", ".join(map(str, value)) + "]" if isinstance(value, list) else str(value)


def _model_name(model: str) -> str:
    """The part of a hub id or path that names the model: not the hub cache's hash, nor ``epoch-2``."""
    parts = model.split("/")
    if model.startswith((".", "~", "/")):
        parts = os.path.abspath(os.path.expanduser(model)).split("/")
    cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]
    if cached:
        return cached[-1]
    return parts[-2] if len(parts) > 1 and is_epoch(parts[-1]) else parts[-1]


def _preset_path(asked: str) -> Path:
    """The file of a preset, by its path or name."""
    if os.path.isfile(asked):
        return Path(asked).absolute()
    names = [path.stem for path in models_folder().glob("*.yaml")]
    name = asked.removeprefix("models/").removesuffix(".yaml")
    if name in names:
        return models_folder() / f"{name}.yaml"
    hint = did_you_mean(name, names) or f"; there are auto, none, {', '.join(sorted(names))}"
    raise UsageError(f"--preset: no preset {asked[:200]!r}{hint}")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ``match`` of a preset, and its other settings."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it holds no settings")
        match = settings.pop("match", {})
        for key in ("model", "data"):
            part = settings.get(key, {"init_args": {}})
            if not (
                isinstance(part, dict) and [*part] == ["init_args"] and isinstance(part["init_args"], dict)
            ):
                raise ValueError(f"{key} must hold init_args and nothing else")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"--preset: {path} cannot be used: {' '.join(str(error).split())}") from error
    return match if isinstance(match, dict) else {}, settings
