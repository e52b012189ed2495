"""Prompts and stop strings, to the letter, and programs made of completions."""

from __future__ import annotations

import ast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from coderl.problems.prompts import (
    CHAT_OPENING,
    CHAT_STOP,
    HUMANEVAL_STOP,
    MBPP_STOP,
    chat_messages,
    cut,
    humaneval_instruction,
    humaneval_prompt,
    mbpp_instruction,
    mbpp_prompt,
    program,
    stop_strings,
)
from coderl.types import Problem

MBPP = Problem(
    id="mbpp/602",
    prompt=mbpp_prompt("Write a function to add.", "assert add(1, 2) == 3"),
    instruction=mbpp_instruction("Write a function to add.", "assert add(1, 2) == 3"),
    tests=("assert add(1, 2) == 3",),
    stop=MBPP_STOP,
)
RAW = 'import math\n\ndef helper(x):\n    return x\n\n\ndef area(r: float) -> float:\n    """Area."""\n'
HUMANEVAL = Problem(
    id="HumanEval/0",
    prompt=humaneval_prompt(RAW),
    instruction=humaneval_instruction(RAW),
    test="def check(candidate):\n    assert candidate(0) == 0\n",
    entry_point="area",
    stop=HUMANEVAL_STOP,
)


def test_golden_prompts() -> None:
    assert MBPP.prompt == '"""\nWrite a function to add.\nassert add(1, 2) == 3\n"""\n'
    assert humaneval_prompt("\n\ndef f():\n    '''x'''\n    ") == "def f():\n    '''x'''"


def test_golden_stop_strings() -> None:
    assert MBPP_STOP == ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```")
    assert HUMANEVAL_STOP == (
        "\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```", "<file_sep>",
    )  # fmt: skip
    assert stop_strings(MBPP, "completion") == MBPP_STOP
    assert stop_strings(HUMANEVAL, "completion") == HUMANEVAL_STOP
    assert stop_strings(MBPP, "chat") == stop_strings(HUMANEVAL, "chat") == CHAT_STOP


@given(st.text("ab\n#", max_size=30), st.lists(st.text("ab\n#", min_size=1, max_size=3), max_size=4))
def test_cut_is_the_longest_prefix_before_any_stop(text: str, stop: list[str]) -> None:
    starts = [i for i in range(len(text)) if any(text.startswith(word, i) for word in stop)]
    assert cut(text, stop) == text[: starts[0] if starts else len(text)]


def test_empty_stop_strings_cut_nothing() -> None:
    assert cut("abc", ("",)) == "abc"


@pytest.mark.parametrize("stop", MBPP_STOP)
def test_mbpp_program_keeps_its_docstring_and_drops_the_tail(stop: str) -> None:
    code = "def add(a, b):\n    return a + b\n"
    assert program(MBPP, code + stop + " junk", "completion") == MBPP.prompt + code


def test_a_second_function_ends_humaneval_but_not_mbpp() -> None:
    tail = "\n    return 1\n\ndef other():\n    pass"
    assert program(HUMANEVAL, tail, "completion") == HUMANEVAL.prompt + "\n    return 1\n"
    assert program(MBPP, tail, "completion").endswith("pass")


@pytest.mark.parametrize(
    "text", ["x = 1\n```\nThat is it.", "x = 1\n```", "x = 1", CHAT_OPENING + "x = 1\n```"]
)
def test_chat_program_is_the_fenced_block(text: str) -> None:
    assert program(MBPP, text, "chat") == "x = 1"


def test_chat_block_closed_at_once_is_empty() -> None:
    assert program(MBPP, "```\nSorry.", "chat") == ""


def test_chat_answer_to_humaneval_sees_the_helpers_of_its_prompt() -> None:
    whole = program(HUMANEVAL, "def area(r):\n    return helper(math.pi * r * r)\n```", "chat")
    names = [getattr(node, "name", "") for node in ast.parse(whole).body]
    assert names == ["", "helper", "area"]


def test_chat_messages_ask_with_the_instruction_else_the_prompt() -> None:
    assert chat_messages(MBPP) == [{"role": "user", "content": MBPP.instruction}]
    assert "assert add(1, 2) == 3" in MBPP.instruction
    assert chat_messages(Problem(id="x", prompt="p"))[0]["content"] == "p"


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@given(text=st.text(max_size=60), test=st.text(max_size=30))
@example(text="", test="\\8")
def test_any_text_becomes_a_docstring(text: str, test: str) -> None:
    prompt = mbpp_prompt(text, test)
    try:
        value = ast.literal_eval(prompt.strip())
    except (ValueError, SyntaxError):  # null bytes, which no source can hold
        assert "\0" in text + test
        return
    plain = f"\n{text}\n{test}\n"
    assert isinstance(value, str)
    if "\\" not in plain:
        assert value == plain.replace("\r\n", "\n").replace("\r", "\n")


def test_a_text_is_escaped_where_it_must_be_alone() -> None:
    assert mbpp_prompt(r"A \d digit.", "assert f(1)") == '"""\nA \\d digit.\nassert f(1)\n"""\n'
    for text in (r"C:\Users\ann", r"\N", r"\x", 'three """ quotes', 'ends with "'):
        ast.parse(mbpp_prompt(text, "assert f(1)"))
