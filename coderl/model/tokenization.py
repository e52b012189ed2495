"""Texts as token ids: tokens that a model does not know, and texts that follow others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coderl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def unknown(tokenizer: PreTrainedTokenizerBase, rows: int, model: str) -> set[int]:
    """Ids of tokens that the model's embedding has no rows for.

    Only special tokens that nothing here writes may be such: many a fine-tuned CodeLlama has them.

    Args:
        tokenizer: The model's.
        rows: Of the embedding.
        model: Its name, for errors.

    Raises:
        UserError: If there are others.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if i >= rows and token.special}
    written = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    if len(tokenizer) - len(special) > rows or special & written:
        raise UserError(f"{model}: its tokenizer has {len(tokenizer)} tokens, its embedding {rows} rows")
    return special


def following(
    tokenizer: PreTrainedTokenizerBase, before: str, text: str, add_special_tokens: bool
) -> list[int]:
    """Token ids of a text that a model writes after another.

    By itself a text may get a space before it (CodeLlama's tokenizer), which a program must not have. It is
    taken from both texts together then or, where a token would reach over from one into the other, from after
    a line's end.

    Args:
        tokenizer: Any of transformers'.
        before: The text that it follows.
        text: What is to be encoded.
        add_special_tokens: Whether the tokenizer sets its tokens before ``before``.
    """

    def encoded(text: str, add: bool) -> list[int]:
        return list(tokenizer(text, add_special_tokens=add)["input_ids"])

    def decoded(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def after(head: list[int], whole: list[int]) -> list[list[int]]:
        return [whole[len(head) :]] if whole[: len(head)] == head else []

    head = encoded(before, add_special_tokens)
    ways = [encoded(text, False)]
    if decoded([*head, *ways[0]]) != decoded(head) + text:
        ways += after(head, encoded(before + text, add_special_tokens))
        ways += after(encoded("\n", False), encoded("\n" + text, False))
    exact = (ids for ids in ways if decoded([*head, *ids]) == decoded(head) + text)
    return next(exact, ways[-1])  # none is where the tokenizer alters a text whatever is before it
