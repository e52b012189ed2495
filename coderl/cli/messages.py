"""Shortens jsonargparse's error messages to one line: what is wrong, where, and the nearest key."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from coderl.errors import did_you_mean

_KEY = re.compile(r'Parser key "(?P<key>[^"]+)":\s*(?P<rest>.*)')
_CLASS = re.compile(r"Problem with given class_path '(?P<name>[^']+)'")
_OPTION = re.compile(r"[Oo]ption '(?P<option>[^']+)'")
_REQUIRED = re.compile(r"the following arguments are required: (?P<names>.+)")
_IMPORT = re.compile(r"Expected a dot import path string: (?P<name>.+)")
_SPECIFIC = (_OPTION, _REQUIRED, _IMPORT)
_EXPECTED = re.compile(r"Expected an? <class '(?:\w+\.)*(?P<name>\w+)'>")
_CHOICES = re.compile(r"Expected a typing\.Literal\[(?P<choices>.+?)\](?:\. Got value: .*)?$")
_GIVEN = re.compile(r"(?:Given value|Got value): (?P<value>.+)")
_NOISE = re.compile(
    r"Does not validate|Subtypes:|Errors:|Given value|Expected a path but|Expected a <class 'NoneType'>"
)

_TRUNCATIONS = ("top_p", "top_k", "min_p", "typical_p", "repetition_penalty")
"""Sampling options of other libraries. Training refuses them, see :func:`_unknown_key`."""


@dataclass(frozen=True, slots=True)
class _Problem:
    """One leaf of jsonargparse's report, which is a tree of what was tried for each type of a union.

    Attributes:
        text: What is wrong.
        keys: The keys above it in the tree.
        owner: Class path of the innermost class above it; empty where there is none.
    """

    text: str
    keys: tuple[str, ...]
    owner: str

    @property
    def rank(self) -> int:
        """Lower is more specific. Of the problems of a union, the first of the lowest rank is reported."""
        return next((i for i, pattern in enumerate(_SPECIFIC) if pattern.search(self.text)), len(_SPECIFIC))

    @property
    def is_specific(self) -> bool:
        """Whether the text names an option, an argument or a class, not just that a value does not fit."""
        return self.rank < len(_SPECIFIC)


def explain(message: str, known: Iterable[str]) -> str:
    """Shorten jsonargparse's error message, which may fill a screen, to one line.

    Args:
        message: jsonargparse's message.
        known: Every key the command takes, such as ``trainer.max_epochs``.
    """
    known = list(known)
    if message.startswith("unrecognized arguments: "):
        flag = message.removeprefix("unrecognized arguments: ").split()[0]
        return f"unknown argument {flag}{did_you_mean(flag, [f'--{key}' for key in known])}"
    found = min(_problems(message), key=lambda problem: problem.rank, default=None)
    if found is None or not (found.keys or found.is_specific):
        return " ".join(message.split())
    where = ".".join(found.keys)
    if option := _OPTION.search(found.text):
        return _unknown_key(option["option"], where, found.owner, known)
    if found.keys == ("config",):
        return " ".join(message.removeprefix('Parser key "config":').split())
    if required := _REQUIRED.search(found.text):
        return _missing_key(required["names"], where, found.owner)
    if name := _IMPORT.search(found.text):
        return f"{where}: there is no class {name['name']!r}{did_you_mean(name['name'], _class_names())}"
    return _wrong_value(found.text, where, message)


def _problems(message: str) -> Iterator[_Problem]:
    """The leaves of a report, whose tree is written by indentation."""
    above: list[tuple[int, str, str]] = []  # (indent, key or "", class or "")
    for line in filter(str.strip, message.splitlines()):
        text = line.strip().removeprefix("- ").strip()
        indent = line.find(text)
        above = [entry for entry in above if entry[0] < indent]
        if key := _KEY.match(text):
            above.append((indent, key["key"], ""))
            text = key["rest"]
        elif owner := _CLASS.match(text):
            above.append((indent, "", owner["name"]))
            continue
        if text not in ("", "-") and not _NOISE.match(text):
            owners = [entry[2] for entry in above if entry[2]]
            yield _Problem(text, tuple(entry[1] for entry in above if entry[1]), owners[-1] if owners else "")


def _unknown_key(option: str, where: str, owner: str, known: list[str]) -> str:
    """The line for a key that does not exist, in a class or at the top."""
    if option in _TRUNCATIONS:
        return (
            f"{where}: {option} does not go with training: what it leaves out biases the importance ratio. "
            "Leave it out; evaluation takes model.evaluation.top_p"
        )
    if owner:
        hint = did_you_mean(option, _parameters(owner))
        if owner.rpartition(".")[2] in ("LightningModule", "CodeDataModule"):
            # Only the base class is known, so the config that names the class has not been read yet.
            hint = "; name an overlay after the config that it changes"
        return f"{where}: {owner.rpartition('.')[2]} has no argument {option!r}{hint}"
    group = option.partition(".")[0]
    groups = sorted({key.partition(".")[0] for key in known})
    hint = did_you_mean(option, known) or ("" if group in groups else did_you_mean(group, groups))
    return f"unknown key {option!r}{hint}"


def _missing_key(names: str, where: str, owner: str) -> str:
    """The line for required keys that are not set."""
    if not owner:
        missing = " and ".join(sorted(re.sub(r"\b(fit|validate|test)\.", "", names).split(", ")))
        return f"no {missing} given; name a config (such as --config quickstart.yaml), or set each by a flag"
    return f"{where}: {owner.rpartition('.')[2]} needs {names}"


def _wrong_value(text: str, where: str, message: str) -> str:
    """The line for a value of the wrong type; types and value may stand anywhere in the message."""
    types = [found["name"] for found in _EXPECTED.finditer(message) if found["name"] != "NoneType"]
    if _EXPECTED.match(text) and types:
        text = f"expected {' or '.join(dict.fromkeys(types))}"
    text = _CHOICES.sub(r"expected one of \g<choices>", text)
    given = _GIVEN.search(message)
    if given and not given["value"].startswith(("Namespace(", "NestedArg(")):
        text = f"{text}, got {given['value']!r}"
    return " ".join(f"{where}: {text}".removeprefix(": ").split())


def _parameters(class_path: str) -> list[str]:
    """Names of a class's arguments; empty where the class cannot be found."""
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
        return list(inspect.signature(found).parameters)
    except (ImportError, AttributeError, TypeError, ValueError):
        return []


def _class_names() -> list[str]:
    """Class names that need no module on the command line: coderl's, Lightning's callbacks and loggers."""
    prefixes = ("coderl.", "lightning.pytorch.callbacks", "lightning.pytorch.loggers")
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(prefixes)]
    return sorted({name for module in modules for name, _ in inspect.getmembers(module, inspect.isclass)})
