"""Tokenizers of each model family: prompts and answers as ids, and tokens without an embedding row."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, LlamaTokenizer

from coderl.algorithms.sft import SFT
from coderl.errors import UserError
from coderl.model import tokenization
from coderl.model.policy import Policy
from coderl.model.tokenization import load_tokenizer
from coderl.rollout.text import completion_text
from coderl.types import Problem
from tests.support import families
from tests.support.families import FAMILIES
from tests.support.family_tokenizers import DEEPSEEK_BOS, DEEPSEEK_EOS

PROMPT = '"""\nReturn  twice 12 ( x ) .\nassert f(1) == [1,    22]\n"""\n'
ANSWERS = (
    "def f(x):\n    y =     123\n\n    return [x , 'a  b' ] .\n",
    "    return x\n",
    " x",
    "\n\n\tpass\n",
    "# \u00e9 \u20ac \u4e2d \U0001f600\n\nx = 1",
    "",
)
"""With text that tokenizers are known to change: leading spaces and lines, runs of spaces, " ."."""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("repositories")
    return {name: families.checkpoint(parent, name) for name in FAMILIES}


def unloaded(folder: Path, **options: Any) -> Policy:
    return Policy(str(folder), quantization="none", lora=None, **options)


def policy_of(folder: Path, **options: Any) -> Policy:
    made = unloaded(folder, **options)
    made.load(torch.device("cpu"), for_training=False)
    return made


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tokenizer_encodes_as_its_tokenizer_json_defines(
    repositories: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """Classes of transformers 5 do something else to some, and add tokens that the model does not know."""
    own, text = families.trained(name), PROMPT + "".join(ANSWERS) + "    7, <FILL_ME>"
    first = load_tokenizer(str(repositories[name]))
    first.save_pretrained(tmp_path)
    for tokenizer in (first, load_tokenizer(str(tmp_path))):
        assert len(tokenizer) == own.get_vocab_size()
        for part in (text, f" {text}", *ANSWERS):
            assert tokenizer(part)["input_ids"] == own.encode(part).ids


def test_a_byte_level_tokenizer_is_restored_where_its_class_is_sentencepiece(
    repositories: dict[str, Path],
) -> None:
    """As transformers 5.10 did with DeepSeek-Coder's."""
    folder, own = str(repositories["deepseek-coder"]), families.trained("deepseek-coder")
    believed = LlamaTokenizer.from_pretrained(folder)
    assert believed(PROMPT)["input_ids"] != own.encode(PROMPT).ids
    fixed = tokenization._as_stored(believed, folder)
    assert fixed(PROMPT)["input_ids"] == own.encode(PROMPT).ids
    assert (fixed.bos_token, fixed.eos_token) == (DEEPSEEK_BOS, DEEPSEEK_EOS)


BYTE_LEVEL = processors.ByteLevel(trim_offsets=False)
NO_TEMPLATE = [("codellama-7b", None), ("codellama-7b", BYTE_LEVEL), ("deepseek-coder", BYTE_LEVEL)]
"""Older versions of transformers went by tokenizer_config.json, whatever a post-processor said."""


def with_post_processor(parent: Path, name: str, post_processor: Any, **tokenizer_config: Any) -> Path:
    """The family's repository, its tokenizer.json with another post-processor; null flags are left out."""
    folder = families.checkpoint(parent, name, **tokenizer_config)
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.post_processor = post_processor
    made.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if v is not None}))
    return folder


@pytest.mark.parametrize(("name", "post_processor"), NO_TEMPLATE)
def test_a_bos_token_that_tokenizer_config_alone_asks_for_is_set(
    tmp_path: Path, name: str, post_processor: Any
) -> None:
    template = "{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]"
    folder = with_post_processor(tmp_path, name, post_processor, chat_template=template)
    policy, problem = policy_of(folder), Problem(id="p", prompt=PROMPT, instruction="Do it")
    own, bos = families.trained(name), policy.tokenizer.bos_token_id
    expected = [bos, *own.encode(PROMPT, add_special_tokens=False).ids]
    assert policy.encode(problem) == expected
    policy.tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved"))(PROMPT)["input_ids"] == expected
    plain: Any = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert plain(PROMPT)["input_ids"] == expected
    assert plain(PROMPT, add_special_tokens=False)["input_ids"] == expected[1:]
    assert plain(PROMPT, PROMPT)["input_ids"] == [*expected, *expected]
    chat = unloaded(folder, prompt_form="chat").encode(problem)
    assert chat[0] == bos and chat.count(bos) == 1


@pytest.mark.parametrize(("name", "post_processor"), NO_TEMPLATE)
def test_no_bos_token_is_set_where_tokenizer_config_says_so(
    tmp_path: Path, name: str, post_processor: Any
) -> None:
    folder = with_post_processor(tmp_path, name, post_processor, add_bos_token=False)
    assert unloaded(folder).encode(Problem(id="p", prompt=PROMPT)) == (
        families.trained(name).encode(PROMPT, add_special_tokens=False).ids
    )


def test_the_class_decides_on_the_bos_token_where_no_file_does(tmp_path: Path) -> None:
    folder = with_post_processor(tmp_path, "codellama-7b", None, add_bos_token=None)
    tokenizer: Any = load_tokenizer(str(folder))
    believed: Any = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("x")["input_ids"] == believed("x")["input_ids"] == [1, *tokenizer.encode("x")[1:]]


def test_no_bos_token_is_set_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    folder = with_post_processor(tmp_path, "deepseek-coder", BYTE_LEVEL, bos_token=None)
    own = families.trained("deepseek-coder").encode(PROMPT, add_special_tokens=False).ids
    assert load_tokenizer(str(folder))(PROMPT)["input_ids"] == own


def test_an_eos_token_that_tokenizer_json_sets_stays_when_bos_is_added(tmp_path: Path) -> None:
    ending = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tokenizer = load_tokenizer(str(with_post_processor(tmp_path, "codellama-7b", ending)))
    ids = tokenizer("x")["input_ids"]
    assert (ids[0], ids[-1], ids.count(1), ids.count(2)) == (1, 2, 1, 1)


STARTS: dict[str, tuple[list[str], list[str]]] = {
    "codellama-7b": (["<s>"], []),
    "codellama-13b": (["<s>"], []),
    "deepseek-coder": ([DEEPSEEK_BOS], []),
    "qwen2.5-coder": ([], []),
    "starcoder2": ([], []),
    "codet5p": (["<s>"], ["</s>"]),
}
"""Special tokens that a family sets before and after a text."""


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_has_the_special_tokens_of_its_family_around_it(
    repositories: dict[str, Path], name: str
) -> None:
    policy = policy_of(repositories[name])
    ids = policy.encode(Problem(id="p", prompt=PROMPT))
    found = policy.tokenizer.convert_ids_to_tokens(ids)
    before, after = STARTS[name]
    assert found[: len(before)] == before and found[len(ids) - len(after) :] == after
    within = found[len(before) : len(ids) - len(after)]
    assert not set(within) & set(policy.tokenizer.all_special_tokens)
    text = policy.tokenizer.decode(policy.tokenizer.convert_tokens_to_ids(within))
    assert text == PROMPT


ENDS: dict[str, tuple[set[str], str]] = {
    "codellama-7b": ({"</s>"}, "</s>"),
    "codellama-13b": ({"</s>"}, "</s>"),
    "deepseek-coder": ({DEEPSEEK_EOS}, DEEPSEEK_EOS),
    "qwen2.5-coder": ({"<|endoftext|>", "<|im_end|>"}, "<|endoftext|>"),
    "starcoder2": ({"<|endoftext|>"}, "<|endoftext|>"),
    "codet5p": ({"</s>"}, "<pad>"),
}
"""Tokens that end an answer, and what pads."""


@pytest.mark.parametrize("name", FAMILIES)
def test_eos_and_pad_tokens_are_those_of_the_family(repositories: dict[str, Path], name: str) -> None:
    policy = policy_of(repositories[name])
    ends, pad = ENDS[name]
    assert {policy.tokenizer.convert_ids_to_tokens(i) for i in policy.eos_ids()} == ends
    assert policy.tokenizer.pad_token == pad


@pytest.mark.parametrize("name", FAMILIES)
def test_an_encoded_answer_decodes_to_exactly_its_text(repositories: dict[str, Path], name: str) -> None:
    policy, problem = policy_of(repositories[name]), Problem(id="p", prompt=PROMPT)
    asked = policy.encode(problem)
    for answer in ANSWERS:
        ids = policy.encode_answer(problem, answer)
        assert ids[-1] == policy.tokenizer.eos_token_id
        assert completion_text(policy, problem, asked, ids) == answer
        assert completion_text(policy, problem, asked, ids[:-1]) == answer


def test_an_answer_of_codellama_starts_without_a_space(repositories: dict[str, Path]) -> None:
    """Encoded by itself a text gets a leading space; learned so, every program would be badly indented."""
    policy, problem = policy_of(repositories["codellama-7b"]), Problem(id="p", prompt=PROMPT)
    alone = policy.tokenizer("def f", add_special_tokens=False)["input_ids"]
    assert policy.tokenizer.convert_ids_to_tokens(alone)[0].startswith("\u2581")
    first = policy.tokenizer.convert_ids_to_tokens(policy.encode_answer(problem, "def f"))[0]
    assert first.startswith("d")


BEFORE = (
    "",
    "x",
    "def f(",
    "a = [",
    "    ",
    " ",
    "\n",
    "x\n",
    '"""\nDo it .\n"""\n',
    "def",
    "\u00e9",
    "f(x):\n ",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_continuation_decodes_to_exactly_its_text(repositories: dict[str, Path], name: str) -> None:
    """Also where a token would span the end of one text and the start of the other."""
    tokenizer: Any = load_tokenizer(str(repositories[name]))
    decoded = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    for before in BEFORE:
        head = tokenizer(before)["input_ids"]
        for text in (*ANSWERS, "def", "x)", ")", "(x)", "    y", "\u00e9", "\n", "return  1"):
            ids = tokenization.encode_continuation(tokenizer, before, text, True)
            assert decoded([*head, *ids]) == decoded(head) + text, (before, text)


@pytest.mark.parametrize(
    ("name", "template", "bos"),
    [
        ("qwen2.5-coder", families.QWEN_TEMPLATE, 0),
        ("deepseek-coder", families.DEEPSEEK_TEMPLATE, 1),
        ("codellama-7b", "{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]", 1),
    ],
)
def test_a_chat_has_the_bos_token_once_where_its_template_writes_it(
    tmp_path: Path, name: str, template: str, bos: int
) -> None:
    folder = families.checkpoint(tmp_path, name, chat_template=template)
    policy, problem = policy_of(folder, prompt_form="chat"), Problem(id="p", prompt="x", instruction="Do it")
    ids = policy.encode(problem)
    assert ids.count(policy.tokenizer.bos_token_id) == bos  # Qwen has none
    for answer in ANSWERS:
        assert completion_text(policy, problem, ids, policy.encode_answer(problem, answer)) == answer


# --- tokens without a row


INFILLING = ["\u2581<PRE>", "\u2581<MID>", "\u2581<SUF>", "\u2581<EOT>"]


def test_special_tokens_without_a_row_are_refused_only_in_texts_that_contain_them(tmp_path: Path) -> None:
    """CodeLlama's Python models, saved after fine-tuning, list tokens for infilling that they do not know."""
    folder = families.checkpoint(tmp_path, "codellama-7b", additional_special_tokens=INFILLING)
    policy = policy_of(folder)
    assert len(policy.tokenizer) == policy.base.config.vocab_size + len(INFILLING)
    policy.encode(Problem(id="p", prompt=PROMPT))
    with pytest.raises(UserError, match=r"does not know the token \u2581<MID> in the prompt of odd"):
        policy.encode(Problem(id="odd", prompt="x = \u2581<MID>\n"))


@pytest.mark.parametrize("loaded", [True, False])  # a run leaves problems out before it reads weights
def test_tokens_without_a_row_are_refused_in_prompts_and_in_answers(tmp_path: Path, loaded: bool) -> None:
    folder = families.checkpoint(tmp_path, "codellama-7b", extra_special_tokens=["<extra>"])
    policy = (policy_of if loaded else unloaded)(folder)
    problem = Problem(id="p/1", prompt=PROMPT)
    with pytest.raises(UserError, match="does not know the token <extra> in the prompt of odd"):
        policy.encode(Problem(id="odd", prompt="x = '<extra>'\n"))
    with pytest.raises(UserError, match="does not know the token <extra> in the answer to p/1"):
        policy.encode_answer(problem, "x = '<extra>'")
    ids = [*policy.encode(problem), *policy.encode_answer(problem, "x = 'extra'")]
    assert max(ids) < json.loads((folder / "config.json").read_text())["vocab_size"]


def test_a_solution_with_such_a_token_is_named_before_sft_starts(tmp_path: Path) -> None:
    folder = families.checkpoint(tmp_path, "codet5p", extra_special_tokens=["<extra>"])
    learner = SFT(unloaded(folder))
    assert learner.fits(Problem(id="p", prompt=PROMPT, solution="x = 1"))
    with pytest.raises(UserError, match="does not know the token <extra> in the answer to odd"):
        learner.fits(Problem(id="odd", prompt=PROMPT, solution="x = '<extra>'"))


@pytest.mark.parametrize("more", [{"pad_token": "[PAD]"}, {"eos_token": "<|end|>"}])
def test_eos_and_pad_tokens_need_a_row(tmp_path: Path, more: dict[str, Any]) -> None:
    folder = families.checkpoint(tmp_path, "codellama-7b", **more)
    with pytest.raises(UserError, match=r"its tokenizer has 641 tokens, its embedding 640 rows"):
        unloaded(folder).encode(Problem(id="p", prompt=PROMPT))
    with pytest.raises(UserError, match=r"its tokenizer has 641 tokens, its embedding 640 rows"):
        policy_of(folder)


def test_ordinary_tokens_need_a_row(tmp_path: Path) -> None:
    folder = families.checkpoint(tmp_path, "qwen2.5-coder")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"word{i}" for i in range(rows - len(tokenizer) + 1)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=f"has {rows + 1} tokens, its embedding {rows} rows"):
        policy_of(folder)
