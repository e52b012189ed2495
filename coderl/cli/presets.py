"""What suits a family of models: ``configs/models/*.yaml``, laid by themselves over the shipped configs.

A preset is a config with one more key, ``match``: a regular expression that is looked for in the model's name
(the last part of its hub id or path) and the ``model_type`` of its ``config.json``.
"""

from __future__ import annotations

import difflib
import json
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
from coderl.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lightning.pytorch.cli import ArgsType

AUTO, NONE = "auto", "none"
"""Values of ``--preset`` beside names and paths."""

_PRINT = "--print_config"

WARM_START = ("policy", "micro_batch_size")
"""What training that samples nothing takes from a preset: the rest is about reinforcement learning."""


@dataclass(frozen=True)
class Preset:
    """Settings for a family of models.

    Attributes:
        name: The file's name without its suffix, or the path it was given by.
        why: What it was chosen by, in words.
        settings: The config, without ``match``.
        shipped: Whether it is one of ``configs/models``, made for classes that may not be there.
    """

    name: str
    why: str
    settings: dict[str, Any]
    shipped: bool = True

    def under(self, config: Namespace) -> dict[str, Any]:
        """The settings, for the classes that a configuration names.

        Args:
            config: The command's configuration without the preset. Of a shipped preset, what these classes
                do not take is left out.
        """
        arguments = {key: self.settings.get(key, {}).get("init_args", {}) for key in ("model", "data")}
        if self.shipped:
            arguments = {key: _taken(value, config[key].init_args) for key, value in arguments.items()}
            if "engine" not in config.model.init_args:
                arguments = {
                    "model": {k: v for k, v in arguments["model"].items() if k in WARM_START},
                    "data": {},
                }
        classes = {
            key: {"class_path": config[key].class_path, "init_args": value}
            for key, value in arguments.items()
        }
        return {**self.settings, **classes, "preset": self.name}


def parse(parsed: Callable[[ArgsType], Namespace], args: ArgsType, say: Callable[[str], None]) -> Namespace:
    """Parse a call over the preset that suits its model.

    A first look at the call finds model and classes; the preset then goes between.

    Args:
        parsed: What parses one call.
        args: Arguments as on the shell, or a configuration.
        say: Takes the line on what the preset did.

    Raises:
        UsageError: The call is wrong, or ``--preset``.
    """
    quiet = [arg for arg in args if not arg.startswith(_PRINT)] if isinstance(args, list) else args
    try:
        plain = parsed(deepcopy(quiet))  # a dict would be changed
    except UsageError:
        if quiet == args:
            raise
        return parsed(args)  # what is not complete can be printed all the same
    command = plain.subcommand
    config = plain[command]
    preset = choose(config.preset, *_base(config))
    if preset is None or (isinstance(args, list) and command not in args):
        return plain if quiet == args else parsed(args)
    settings = preset.under(config)
    try:
        found = parsed(_laid_under(quiet, command, settings))
    except UsageError as error:
        why = str(error).removeprefix("--config: ")
        raise UsageError(f"--preset: {preset.name} does not fit: {why}") from error
    say(_words(preset, settings, config, found[command]))
    return found if quiet == args else parsed(_laid_under(args, command, settings))


def choose(asked: str, model: str, gguf_file: str | None = None) -> Preset | None:
    """The preset that was asked for, or the one that suits the model.

    The name decides first, among those whose ``model_type`` is the model's or where that is not known; else
    the type does, where a single preset has it.

    Args:
        asked: ``auto``, ``none``, a preset's name, or the path of one.
        model: Folder or hub id.
        gguf_file: Name of a GGUF file in ``model``, which tells more than the folder's.

    Returns:
        None where none suits.

    Raises:
        UsageError: There is no preset of that name, or it cannot be read.
    """
    if asked == NONE:
        return None
    if asked != AUTO:
        path = _path(asked)
        return Preset(asked, "asked for", _read(path)[1], shipped=path.parent == models_folder())
    known = [(path.stem, *_read(path)) for path in sorted(models_folder().glob("*.yaml"))]
    name, kind = gguf_file or _name(model), model_type(model)
    fitting = [entry for entry in known if kind in (None, entry[1].get("model_type"))]
    for stem, match, settings in fitting:
        if re.search(match["name"], name, flags=re.IGNORECASE):
            return Preset(stem, "by the model's name", settings)
    if kind is not None and len(fitting) == 1:
        return Preset(fitting[0][0], f"by the model's type, {kind}", fitting[0][2])
    return None


def models_folder() -> Path:
    """Where presets lie."""
    return configs_folder() / "models"


def model_type(model: str) -> str | None:
    """``model_type`` in the config.json of a folder, or of a hub model in the cache; None if unknown."""
    try:
        file: Any = Path(model).expanduser() / "config.json"
        if not file.is_file():
            from huggingface_hub import try_to_load_from_cache

            file = try_to_load_from_cache(model, "config.json")
        found = json.loads(Path(file).read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, RuntimeError, AttributeError, TypeError):
        return None  # not there, or to be told when weights load
    return found if isinstance(found, str) else None


def without_match(config: str) -> str:
    """What stood after ``--config``; a file that says which models it matches as text without that."""
    try:
        settings = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return config
    if isinstance(settings, dict) and settings.pop("match", None) is not None:
        return yaml.safe_dump(settings)
    return config


def _taken(settings: dict[str, Any], arguments: Namespace) -> dict[str, Any]:
    """Those of the settings that are arguments of a class; of a part that is switched off none."""
    taken = {}
    for key, value in settings.items():
        if key not in arguments:
            continue
        inner = arguments[key] and arguments[key].get("init_args") if isinstance(value, dict) else None
        if inner is not None and "init_args" in value:
            value = {"class_path": arguments[key].class_path, "init_args": _taken(value["init_args"], inner)}
        elif isinstance(value, dict) and arguments[key] is None and "class_path" not in value:
            continue
        taken[key] = value
    return taken


def _base(config: Namespace) -> tuple[str, str | None]:
    """The base model of a configuration, and the GGUF file in it."""
    policy = config.model.get("init_args.policy")
    arguments = policy and policy.get("init_args", policy)
    return (arguments.get("model") or "", arguments.get("gguf_file")) if arguments else ("", None)


def _laid_under(args: Any, command: str, settings: dict[str, Any]) -> Any:
    """A call with the preset over the shipped config that names the model, and under all else."""
    if not isinstance(args, list):
        whole = Namespace()
        for key, value in (args.as_dict() if isinstance(args, Namespace) else deepcopy(args)).items():
            whole[key] = value  # where there may be dots in keys
        given = whole.as_dict()
        return given | {"subcommand": command, command: merge(settings, given[command])}
    place = args.index(command) + 1
    for behind, value in _configs(args, place):
        path = Path(find_config(value)).absolute()
        if not path.is_relative_to(configs_folder()):
            break
        if _names_model(path):
            place = behind
    return [*args[:place], "--config", yaml.safe_dump(settings), *args[place:]]


def _configs(args: list[str], start: int) -> Iterator[tuple[int, str]]:
    """Each config that is named from there on, after the place behind it."""
    for i in range(start, len(args)):
        flag, equals, value = args[i].partition("=")
        if flag in ("-c", "--config"):
            yield (i + 1, value) if equals else (i + 2, args[i + 1])
        elif flag.startswith("-c"):
            yield i + 1, args[i][2:]


def _names_model(config: Path) -> bool:
    keys = flat(yaml.safe_load(config.read_text(encoding="utf-8")))
    return "model.init_args.policy.init_args.model" in keys


def _words(preset: Preset, settings: dict[str, Any], plain: Namespace, found: Namespace) -> str:
    """What became of the preset's settings, in one line."""
    was, now = _short(plain.as_dict()), _short(found.as_dict())
    moved = [f"{key} {_shown(now[key])}" for key in now if "." in key and was.get(key) != now[key]]
    wanted = {key: value for key, value in _short(settings).items() if not key.endswith("class_path")}
    lost = [key for key, value in wanted.items() if "." in key and now.get(key) != value]
    told = f"sets {', '.join(moved)}" if moved else "changes nothing"
    yours = f"; set otherwise by you: {', '.join(lost)}" if lost else ""
    return f"preset {preset.name} ({preset.why}) {told}{yours}; --preset none turns it off"


def _short(settings: dict[str, Any]) -> dict[str, Any]:
    """From keys as flags have them, without ``init_args``, to values."""
    values = flat(settings).items()
    return {k.replace("init_args.", ""): list(v) if isinstance(v, tuple) else v for k, v in values}


def _shown(value: Any) -> str:
    return "[" + ", ".join(map(str, value)) + "]" if isinstance(value, list) else str(value)


def _name(model: str) -> str:
    """The last part of a hub id or path that says something: not the hub cache's hash, nor an epoch."""
    parts = model.split("/")
    if model.startswith((".", "~", "/")):
        parts = os.path.abspath(os.path.expanduser(model)).split("/")
    cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]
    if cached:
        return cached[-1]
    return parts[-2] if len(parts) > 1 and re.fullmatch(r"epoch-\d+", parts[-1]) else parts[-1]


def _path(asked: str) -> Path:
    if os.path.isfile(asked):
        return Path(asked).absolute()
    names = [path.stem for path in models_folder().glob("*.yaml")]
    name = asked.removeprefix("models/").removesuffix(".yaml")
    if name in names:
        return models_folder() / f"{name}.yaml"
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are auto, none, {', '.join(sorted(names))}"
    raise UsageError(f"--preset: no preset {asked[:200]!r}; {hint}")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a preset matches, and its settings."""
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
