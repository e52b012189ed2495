"""The types of the problem generator: parts, tasks and compositions; and how sources are put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random


@dataclass(frozen=True, slots=True)
class Part:
    """One interchangeable piece of a task, such as a condition or a reduction.

    Attributes:
        key: Name of what the piece computes, without literals.
        text: The piece in words; ``{k}`` stands for the literal, other braces for what it is applied to.
        code: Its source, with the same placeholders.
        name: Its word in the function's name. May be empty.
        wrong: Plausible mistakes: sources that do nearly the same.
        draws: Literals that ``{k}`` is drawn from.
    """

    key: str
    text: str
    code: str
    name: str = ""
    wrong: tuple[str, ...] = ()
    draws: tuple[object, ...] = ()

    def drawn(self, rng: Random) -> Part:
        """This piece with the same random literal filled into text, code and mistakes."""
        if not self.draws:
            return self
        k = str(rng.choice(self.draws))
        wrong = tuple(fill(code, k=k, more=_shift(k, 1), less=_shift(k, -1)) for code in self.wrong)
        return Part(self.key, fill(self.text, k=k), fill(self.code, k=k), self.name, wrong)


@dataclass(frozen=True, slots=True)
class Task:
    """One function to write, with literals, names and wording chosen.

    Attributes:
        topic: Its topic, such as ``"strings"``.
        key: Key of its composition.
        text: The request, one sentence.
        name: Name of the function.
        kind: Kind of input, see :mod:`coderl.embedded.inputs`.
        solution: Correct source.
        buggy: ``(kind of mistake, source)`` pairs. Some may still be correct: only running them tells.
    """

    topic: str
    key: str
    text: str
    name: str
    kind: str
    solution: str
    buggy: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Composition:
    """What is computed, with literals, names and wording still open. Splits are made of compositions."""

    topic: str
    key: str
    draw: Callable[[Random], Task]


def fill(text: str, **marks: str) -> str:
    """``text`` with each ``{mark}`` replaced."""
    # Not str.format: sources hold braces of their own.
    for mark, value in marks.items():
        text = text.replace("{" + mark + "}", value)
    return text


def join_name(rng: Random, *words: str) -> str:
    """A function name of at most two of the given words, in an order drawn at random."""
    kept = [word for word in dict.fromkeys(words) if word]
    if len(kept) > 2:
        kept = [kept[0], rng.choice(kept[1:])]
    if len(kept) > 1 and rng.random() < 0.3:
        kept[0], kept[-1] = kept[-1], kept[0]
    return "_".join(kept)


def function(name: str, parameters: str, *lines: str) -> str:
    """Source of a function with the given body lines."""
    return "\n".join([f"def {name}({parameters}):", *(f"    {line}" for line in lines)]) + "\n"


def printed(source: str) -> tuple[str, str]:
    """A beginner's mistake, as ``(kind, source)``: the last result is printed instead of returned."""
    head, _, value = source.rstrip().rpartition("return ")
    return ("print", f"{head}print({value})\n")


def _shift(k: str, by: int) -> str:
    return str(int(k) + by) if k.lstrip("-").isdigit() else k
