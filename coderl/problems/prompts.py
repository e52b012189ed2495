"""Prompts, stop strings and post-processing: makes a prompt of a problem, and a program of a completion.

The completion forms are those of bigcode-evaluation-harness (the MBPP one is InCoder's: a docstring with the
task and one test), unchanged to the letter so that scores are comparable. The chat form is this
project's own: the task as a user's message, the answer opened at a fenced block. A score never mixes the two.
"""

from __future__ import annotations

import ast
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from coderl.sandbox.checks.base import BadTests, parse
from coderl.sandbox.program import Program

if TYPE_CHECKING:
    from collections.abc import Iterable

    from coderl.types import Judging, Problem

PromptForm = Literal["completion", "chat"]

MBPP_STOP: tuple[str, ...] = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```")
HUMANEVAL_STOP: tuple[str, ...] = (
    "\nclass",
    "\ndef",
    "\n#",
    "\n@",
    "\nprint",
    "\nif",
    "\n```",
    "<file_sep>",
)

CHAT_OPENING = "```python\n"
"""Start of the assistant's answer; the model continues from here."""
CHAT_STOP: tuple[str, ...] = ("\n```",)


def mbpp_prompt(text: str, first_test: str) -> str:
    """InCoder's docstring prompt, as the harness's ``mbpp`` task writes it.

    A text that would end the docstring, or that no string literal can hold as it is, such as a Windows path,
    is escaped. MBPP has none.
    """
    prompt = f'"""\n{text}\n{first_test}\n"""\n'
    if _is_docstring(prompt):
        return prompt
    escaped = f"{text}\n{first_test}".replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    return f'"""\n{escaped}\n"""\n'


def _is_docstring(source: str) -> bool:
    try:
        body = parse(source).body
    except BadTests:
        return False
    return len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)


@lru_cache(maxsize=256)  # samples of a problem follow one another, and texts may be large
def is_python(source: str) -> bool:
    """Whether a trusted text is Python."""
    try:
        parse(source)
    except BadTests:
        return False
    return True


def humaneval_prompt(raw: str) -> str:
    """HumanEval's signature and docstring, stripped as in the harness's ``humaneval`` task."""
    return raw.strip()


def mbpp_instruction(text: str, first_test: str) -> str:
    """An MBPP task as a request, with the one test that the completion prompt shows too."""
    return f"{text}\nYour code should pass this test:\n{first_test}"


def humaneval_instruction(raw: str) -> str:
    """A HumanEval task as a request for the whole function."""
    return f"Complete this Python function. Answer with the whole function.\n```python\n{raw.strip()}\n```"


def cut(text: str, stop: Iterable[str]) -> str:
    """``text`` up to the earliest of the strings in ``stop``; all of it where none occurs."""
    found = [at for word in stop if word and (at := text.find(word)) >= 0]
    return text[: min(found)] if found else text


def stop_strings(problem: Problem, form: PromptForm) -> tuple[str, ...]:
    """The strings that end an answer to ``problem``."""
    return CHAT_STOP if form == "chat" else problem.stop


def chat_messages(problem: Problem) -> list[dict[str, str]]:
    """The conversation for a chat template; the answer then opens with :data:`CHAT_OPENING`."""
    return [{"role": "user", "content": problem.instruction or problem.prompt}]


def program(problem: Problem, completion_text: str, form: PromptForm) -> str:
    """The whole program that is run for an answer.

    Args:
        problem: The task that was asked.
        completion_text: What the model wrote after the prompt (completion form) or after
            :data:`CHAT_OPENING` (chat form).
        form: How it was asked.

    Returns:
        Completion form: the prompt and the answer up to the first stop string. Chat form: the code in the
        fenced block, after the imports and helpers that a HumanEval prompt gives before the function.
    """
    if form == "completion":
        return problem.prompt + cut(completion_text, problem.stop)
    code = completion_text.removeprefix(CHAT_OPENING)
    # With the newline, a block that is closed at once ("```" as the first thing) is empty.
    block = cut("\n" + code, CHAT_STOP).removeprefix("\n")
    # Imports and helpers before the function of a HumanEval prompt; nothing for other prompts.
    preamble, found, _ = problem.prompt.rpartition(f"def {problem.entry_point}(")
    return preamble + block if problem.entry_point and found else block


def right_program(prompt: str, solution: str) -> str:
    """The whole right program of a problem's prompt and solution; empty where there is no solution.

    A solution continues its prompt. Where a prompt is plain words, it is the whole program itself.
    """
    if not solution.strip():
        return ""
    return solution if is_python(solution) and not is_python(prompt + solution) else prompt + solution


def to_program(
    problem: Problem, code: str, grading: Judging | None = None, timeout: float | None = None
) -> Program:
    """What the sandbox runs for the whole program ``code`` as an answer to ``problem``."""
    helpers = "" if problem.tests else problem.prompt
    return Program(
        code,
        problem.tests,
        problem.setup,
        problem.test,
        problem.entry_point,
        helpers,
        timeout,
        grading,
        harness=grading == "inline",
        reference=right_program(problem.prompt, problem.solution),
    )
