"""From sampled ids to text as bigcode-evaluation-harness decodes it, and where stop strings end it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from coderl.model.policy import Policy
from coderl.rollout import GenerateEngine, Sampling
from coderl.rollout.decode import Row, StopCriteria, TokenTexts
from coderl.rollout.text import completion_text
from coderl.types import Problem
from tests.support import tiny

WORDS = ["x", "=", "1", "ab", "\u2581x", "\u2581=", "\u2581ab", "\u2581", "a", "b", "\ufffc"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece(*, has_bytes: bool = True, bos: bool = True) -> PreTrainedTokenizerFast:
    """One like CodeLlama's: words bring their space, which a text loses at its start; bytes for the rest."""
    vocabulary = ["<unk>", "<s>", "</s>", "<pad>", *(BYTES if has_bytes else ["\n"]), *WORDS]
    made = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(vocabulary)},
            [("\u2581", "x"), ("\u2581", "="), ("a", "b"), ("\u2581", "ab")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=has_bytes,
        )
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    made.pre_tokenizer = pre_tokenizers.Sequence([])
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def with_tokenizer(
    folder: Path, tokenizer: PreTrainedTokenizerFast, family: str = "llama", **options: Any
) -> Policy:
    tiny.checkpoint(folder, family, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    made = tiny.policy(folder, family, lora=None, **options)
    made.base.generation_config.eos_token_id = None  # the tokenizer's alone
    return made


def test_the_space_before_an_answer_is_kept(tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    assert tokenizer.decode(tokenizer.convert_tokens_to_ids(["\u2581x", "="])) == "x="
    policy = with_tokenizer(tmp_path, tokenizer)
    problem = Problem(id="p", prompt="x =\n")
    torch.manual_seed(0)
    got = engine_for(policy).generate([problem], 300, Sampling(2.0, max_new_tokens=6))
    spaces = 0
    for completion in got:
        answer = [i for i in completion.ids if i != tokenizer.eos_token_id]
        whole = tokenizer.decode([*completion.prompt_ids[1:], *answer])
        # Bytes that make no character take those before them along, even the prompt's last.
        assert problem.prompt + completion.text == whole or "\n" not in whole
        spaces += completion.text.startswith(" ") and not str(tokenizer.decode(answer)).startswith(" ")
    assert spaces > 0


def engine_for(policy: Policy) -> GenerateEngine:
    engine = GenerateEngine()
    engine.bind(policy)
    return engine


def text_of(policy: Policy, problem: Problem, ids: list[int]) -> str:
    return completion_text(policy, problem, policy.encode(problem), ids)


def test_special_tokens_stay_in_the_text_except_a_final_end_of_sequence_token(llama: Path) -> None:
    policy = tiny.policy(llama)
    tokenizer: Any = policy.tokenizer
    problem, eos = Problem(id="p", prompt="x = 1\n", stop=("\nif",)), int(tokenizer.eos_token_id)
    before, after = tokenizer("y = 2")["input_ids"], tokenizer("\nz = 3")["input_ids"]
    pad = int(tokenizer.pad_token_id)
    assert pad != eos
    whole = f"y = 2{tokenizer.pad_token}\nz = 3"
    assert text_of(policy, problem, [*before, pad, *after]) == whole
    assert text_of(policy, problem, [*before, pad, *after, eos]) == whole
    assert text_of(policy, problem, [*before, *tokenizer("\nif x:")["input_ids"], *after]) == "y = 2"
    policy.base.generation_config.eos_token_id = [eos, pad]
    assert text_of(policy, problem, [*before, pad, *after, pad]) == whole
    # Written out letter by letter the end is no token, but an end all the same.
    spelled = [i for letter in tokenizer.eos_token for i in tokenizer(letter)["input_ids"]]
    assert eos not in spelled
    assert text_of(policy, problem, [*before, *spelled, *after]) == "y = 2"


def test_a_prompt_that_decoding_changes_is_cut_off_in_its_decoded_form(tmp_path: Path) -> None:
    policy = with_tokenizer(tmp_path, sentencepiece(has_bytes=False))
    problem = Problem(id="p", prompt="x = \u2192 1\n")
    decoded = policy.tokenizer.decode(policy.encode(problem)[1:])
    assert not str(decoded).startswith(problem.prompt)
    ids: Any = policy.tokenizer.convert_tokens_to_ids(["\u2581x", "=", "1"])
    assert text_of(policy, problem, ids) == " x=1"


@pytest.mark.parametrize("bos", [True, False])
def test_a_chat_prompt_is_cut_off(tmp_path: Path, bos: bool) -> None:
    tokenizer = sentencepiece(bos=False)
    tokenizer.chat_template = ("<s>" if bos else "") + "{{ messages[0]['content'] }} ab\n"
    policy = with_tokenizer(tmp_path, tokenizer, prompt_form="chat")
    problem = Problem(id="p", prompt="ab", instruction="ab")
    asked = policy.encode(problem)
    assert (asked[0] == tokenizer.bos_token_id) is bos
    ids: Any = tokenizer.convert_tokens_to_ids(["\u2581x", "=", "1", "<0x0A>", *["<0x60>"] * 3, "x"])
    assert text_of(policy, problem, ids) == " x=1"
    assert tokenizer.decode(asked[bos:]) == "ab ab```python\n"


def test_an_encoder_decoders_completion_is_decoded_without_its_prompt(tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    policy = with_tokenizer(tmp_path, tokenizer, "t5")
    ids: Any = tokenizer.convert_tokens_to_ids(["\u2581x", "\u2581=", "1", "</s>"])
    assert text_of(policy, Problem(id="p", prompt="x =\n"), ids) == "x =1"


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_stop_strings_are_met_at_the_token_that_completes_them(kind: str) -> None:
    """Compared with decoding the whole completion after each token; some characters take several tokens."""
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny.TOKENIZER) if kind == "bytes" else sentencepiece()
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    words = ("x x", "\u20ac=", "x\n", "ab\u00e9", "", "x = x")
    texts = ["x", " x", "=", " =", "\n", "ab", "\u20ac", "\u00e9", "1"]
    mark = tokenizer("\u20ac", add_special_tokens=False)["input_ids"]  # words that follow it have no space
    choices = [
        tokenizer("\u20ac" + text, add_special_tokens=False)["input_ids"][len(mark) :] for text in texts
    ]
    assert all(choices) and len(choices[6]) > 1
    choices += [[tokenizer.pad_token_id], choices[6][-2:]]
    by_word: Counter[str] = Counter()
    generator = torch.Generator().manual_seed(0)
    for _ in range(600):
        row, criteria = Row(99), StopCriteria(TokenTexts(tokenizer), {tokenizer.eos_token_id}, words)
        picks = torch.randint(len(choices), (40,), generator=generator).tolist()
        for token in (token for pick in picks for token in choices[pick]):
            row.ids.append(token)
            answer = tokenizer.decode([*before, *row.ids], skip_special_tokens=False)[1:]
            met = [word for word in words if word and word in answer]
            assert criteria.met(row) is bool(met), answer
            if met:
                by_word.update(met)
                break
    assert set(by_word) == set(words) - {""}
    assert not StopCriteria(TokenTexts(tokenizer), (), ()).met(Row(9, ids=choices[0]))
    assert StopCriteria(TokenTexts(tokenizer), {7}, ()).met(Row(9, ids=[7]))
