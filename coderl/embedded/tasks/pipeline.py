"""Tasks that walk over something: keep some items, transform them, reduce them to one value.

One engine serves lists, digits, ranges, words, characters, dictionaries, pairs, sets and matrices: a source
says what is walked over, and the parts what is done. Solutions come as comprehensions and as loops.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

from coderl.embedded.tasks.base import Composition, Part, Task, fill, function, join_name, printed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random


@dataclass(frozen=True, slots=True)
class Source:
    """What a task walks over.

    Attributes:
        topic: Topic of its tasks.
        key: Names it.
        kind: Kind of input.
        parameters: Parameter list; several names to choose from, or one.
        walk: Iterable over the items; ``{p}`` is the parameter.
        item: Target of the ``for``; several to choose from, or one.
        noun: Words for the items.
        tail: Where they come from, such as ``"in a list"``.
        name: Word it lends to a function's name.
        wrong: Plausible mistakes in ``walk``.
        draws: Literals ``{k}`` in ``walk`` and ``tail`` is drawn from.
    """

    topic: str
    key: str
    kind: str
    parameters: tuple[str, ...]
    walk: str
    item: tuple[str, ...]
    noun: str
    tail: str
    name: str = ""
    wrong: tuple[str, ...] = ()
    draws: tuple[object, ...] = ()

    def part(self) -> Part:
        """The walk as a part, so that its literal is drawn like any other."""
        return Part(self.key, self.tail, self.walk, self.name, self.wrong, self.draws)


@dataclass(frozen=True, slots=True)
class Reduction:
    """How items become the result, as an expression over ``{gen}``, ``{seq}`` or as a loop.

    Attributes:
        key: Names it.
        texts: Wordings over ``{items}``.
        code: Expression. Empty where only a loop will do.
        name: Word it lends to a function's name.
        wrong: Expressions that are plausible mistakes.
        loop: Accumulator name, first value, update and wrong first value. Empty where there is no loop form.
    """

    key: str
    texts: tuple[str, ...]
    code: str
    name: str
    wrong: tuple[str, ...] = ()
    loop: tuple[str, str, str, str] | tuple[()] = ()


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A task with every choice made but the style: the thing mistakes are made in."""

    name: str
    parameter: str
    item: str
    walk: str
    condition: str
    value: str
    reduction: Reduction

    def render(self, *, loop: bool) -> str:
        """Its source, as a loop or as one returned expression."""
        return self._loop() if loop else self._expression()

    def _expression(self) -> str:
        plain = self.value == self.item and not self.condition
        test = f" if {self.condition}" if self.condition else ""
        gen = self.walk if plain else f"{self.value} for {self.item} in {self.walk}{test}"
        seq = self.walk if plain else f"[{gen}]"
        listed = f"list({self.walk})" if plain else f"[{gen}]"
        pairs = f"{self.item}: {self.value} for {self.item} in {self.walk}{test}"
        code = fill(self.reduction.code, gen=gen, seq=seq, list=listed, pairs=pairs)
        return function(self.name, self.parameter, f"return {code}")

    def _loop(self, early: bool = False) -> str:
        accumulator, first, update, _ = self.reduction.loop  # type: ignore[misc]
        update = fill(update, r=accumulator, m=self.value, x=self.item)
        inner = [f"    if {self.condition}:", f"        {update}"] if self.condition else [f"    {update}"]
        end = f"    return {accumulator}" if early else f"return {accumulator}"
        lines = (f"{accumulator} = {first}", f"for {self.item} in {self.walk}:", *inner, end)
        return function(self.name, self.parameter, *lines)

    def early(self) -> str:
        """The loop with its ``return`` one level too deep."""
        return self._loop(early=True)


def compositions(
    source: Source, filters: tuple[Part, ...], maps: tuple[Part, ...], reductions: tuple[Reduction, ...]
) -> Iterator[Composition]:
    """Every composition of the given parts that makes sense."""
    for condition, change, reduction in product(filters, maps, reductions):
        if _sensible(condition, change, reduction):
            key = f"{source.topic}/{source.key}/{condition.key}/{change.key}/{reduction.key}"
            yield Composition(source.topic, key, partial(_draw, source, condition, change, reduction, key))


def _sensible(condition: Part, change: Part, reduction: Reduction) -> bool:
    if reduction.key == "count":
        return bool(condition.code) and change.key == "self"
    if reduction.key == "dict":
        return change.key != "self"
    return bool(condition.code) or change.key != "self" or reduction.key not in {"list"}


def _draw(source: Source, condition: Part, change: Part, reduction: Reduction, key: str, rng: Random) -> Task:
    walk, condition, change = source.part().drawn(rng), condition.drawn(rng), change.drawn(rng)
    parameter, item = rng.choice(source.parameters), rng.choice(source.item)
    name = join_name(rng, reduction.name, change.name, condition.name, walk.name)
    right = Pipeline(
        name,
        parameter,
        item,
        fill(walk.code, p=parameter),
        fill(condition.code, x=item),
        fill(change.code, x=item),
        reduction,
    )
    loop = bool(reduction.loop) and (not reduction.code or rng.random() < 0.4)
    items = f"{fill(condition.text, noun=source.noun)} {walk.text}"
    text = fill(rng.choice(reduction.texts), items=fill(change.text, items=items))
    return Task(
        source.topic,
        key,
        f"Write a function to {text}.",
        name,
        source.kind,
        right.render(loop=loop),
        tuple(_mistakes(right, walk, condition, change, loop)),
    )


def _mistakes(
    right: Pipeline, walk: Part, condition: Part, change: Part, loop: bool
) -> Iterator[tuple[str, str]]:
    for code in walk.wrong:
        yield "source", replace(right, walk=fill(code, p=right.parameter)).render(loop=loop)
    for code in condition.wrong:
        yield "condition", replace(right, condition=fill(code, x=right.item)).render(loop=loop)
    for code in change.wrong:
        yield "value", replace(right, value=fill(code, x=right.item)).render(loop=loop)
    if condition.code:
        yield "forgotten", replace(right, condition="").render(loop=loop)
    if loop:
        yield from _loop_mistakes(right)
    else:
        for code in right.reduction.wrong:
            yield (
                "reduction",
                replace(right, reduction=replace(right.reduction, code=code)).render(loop=False),
            )
    yield printed(right.render(loop=loop))


def _loop_mistakes(right: Pipeline) -> Iterator[tuple[str, str]]:
    accumulator, first, update, wrong = right.reduction.loop  # type: ignore[misc]
    yield "early return", right.early()
    if wrong:
        loop = (accumulator, wrong, update, "")
        yield "first value", replace(right, reduction=replace(right.reduction, loop=loop)).render(loop=True)
    if "+=" in update or "*=" in update:
        loop = (accumulator, first, update.replace("+=", "=").replace("*=", "="), "")
        yield "overwritten", replace(right, reduction=replace(right.reduction, loop=loop)).render(loop=True)
