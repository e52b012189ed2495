"""The text of a completion, from its token ids: the same for every engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coderl.problems import prompts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from coderl.model.policy import Policy
    from coderl.types import Problem


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of a whole sequence, special tokens included, its spaces unchanged."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def completion_text(policy: Policy, problem: Problem, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    """The text of a completion up to the first stop string: the steps of bigcode-evaluation-harness.

    Args:
        policy: What sampled it; its weights are loaded.
        problem: What it answers.
        prompt_ids: The prompt's ids, as ``policy.encode`` gives them.
        ids: The sampled ids, with the end-of-sequence token if there was one.
    """
    tokenizer = policy.tokenizer

    def text_of(row: Sequence[int]) -> str:
        return decoded(tokenizer, row[1:] if list(row[:1]) == [tokenizer.bos_token_id] else row)

    # Only the last token is dropped: with a special token inside it, a program does not run.
    answer = ids[:-1] if ids and ids[-1] in policy.eos_ids() else ids
    stop = (*prompts.stop_strings(problem, policy.prompt_form), str(tokenizer.eos_token or ""))
    if policy.base.config.is_encoder_decoder:
        # CodeT5+ learned answers as its tokenizer writes all texts: with the bos token before them.
        return prompts.cut(text_of(answer), stop)
    # Decoded with its prompt, since many tokenizers drop the space that a text begins with.
    text = text_of([*prompt_ids, *answer])
    # Unknown characters are lost in tokenizing: then the prompt's decoded form is cut off.
    unchanged = policy.prompt_form == "completion" and text.startswith(problem.prompt)
    return prompts.cut(text[len(problem.prompt if unchanged else text_of(prompt_ids)) :], stop)
