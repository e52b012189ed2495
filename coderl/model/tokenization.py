"""Tokenizers: loading one that does what its files say, ids that a model lacks, texts that follow others."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from coderl.errors import UserError, named_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer as its tokenizer.json defines it, with a pad token.

    Args:
        source: A folder or hub id, see :func:`coderl.model.loading.resolve`.

    Raises:
        UserError: If there is none, it cannot be read, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    # It advises another tokenizer_class where _as_stored is about to correct the tokenizer anyway.
    logging.getLogger("transformers.models.auto.tokenization_auto").setLevel(logging.ERROR)
    try:
        tokenizer = _as_stored(AutoTokenizer.from_pretrained(source), source)
    except Exception as error:  # the hub's, json's, tokenizers' own
        raise UserError(f"no tokenizer could be loaded from {source}: {named_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {source} has no eos_token: set one in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        # Safe, because masks come from generation lengths and never from token ids.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _as_stored(tokenizer: PreTrainedTokenizerBase, source: str) -> PreTrainedTokenizerBase:
    """``tokenizer``, or one built from tokenizer.json alone where the two would encode differently.

    Some tokenizer classes of transformers 5 take only vocabulary and merges from that file and make up the
    rest (transformers' issues 45488 and 46489). Then StarCoder2 does not split digits, CodeLlama gains tokens
    for infilling that its embedding has no rows for, and DeepSeek-Coder loses its spaces (up to 5.10).
    """
    from transformers import TokenizersBackend
    from transformers.models.auto.tokenization_auto import get_tokenizer_config
    from transformers.utils.hub import cached_file

    if (
        not isinstance(tokenizer, TokenizersBackend)
        or cached_file(source, "tokenizer.json", _raise_exceptions_for_missing_entries=False) is None
    ):
        return tokenizer
    has_own_class = type(tokenizer) is not TokenizersBackend
    stored: Any = TokenizersBackend.from_pretrained(source) if has_own_class else tokenizer
    # Special tokens may be named by the class alone.
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        if getattr(stored, name) is None and (token := getattr(tokenizer, name)) in stored.get_vocab():
            setattr(stored, name, token)
    adds_bos = get_tokenizer_config(source).get("add_bos_token", _adds_bos(tokenizer))
    if adds_bos and not _adds_bos(stored):
        _add_bos(stored)
    # Where both encode the same, the class is kept: other programs look at its name.
    return tokenizer if has_own_class and _encode_the_same(stored, tokenizer) else stored


def _adds_bos(tokenizer: Any) -> bool:
    return bool(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])


def _add_bos(tokenizer: Any) -> None:
    """Make the tokenizer begin each text with its bos token.

    Transformers 5 ignores the flag ``add_bos_token`` where there is a tokenizer.json. Older versions obeyed
    it, so tokenizer.json need not add the token; DeepSeek-Coder's is reported not to (swift-transformers'
    issue 161).
    """
    if tokenizer.bos_token_id is None:
        return
    # Setting either flag builds the post-processor anew from both, so the end must be set too. What is lost
    # of a ByteLevel post-processor concerns offsets only.
    tokenizer.add_eos_token = tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
    tokenizer.add_bos_token = True


def _encode_the_same(one: Any, other: Any) -> bool:
    """Whether two tokenizers with the same vocabulary and merges encode every text the same.

    Compared are the steps before and after the vocabulary, and the special tokens around a text.
    """

    def steps(tokenizer: Any) -> list[Any]:
        backend = tokenizer.backend_tokenizer
        parts = (backend.normalizer, backend.pre_tokenizer, backend.decoder)
        return [None if part is None else part.__getstate__() for part in parts]

    same = steps(one) == steps(other) and len(one) == len(other)
    return same and bool(one("a")["input_ids"] == other("a")["input_ids"])


def ids_without_row(tokenizer: PreTrainedTokenizerBase, rows: int, model: str) -> set[int]:
    """Ids of special tokens that the model's embedding has no rows for.

    Many a fine-tuned CodeLlama lists such tokens. They do no harm as long as no text contains them.

    Args:
        tokenizer: The model's.
        rows: Number of rows of the embedding.
        model: Its name, for errors.

    Raises:
        UserError: If ordinary tokens have no row, or the bos, eos or pad token, which are written here.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if i >= rows and token.special}
    written = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    if len(tokenizer) - len(special) > rows or special & written:
        raise UserError(f"{model}: its tokenizer has {len(tokenizer)} tokens, its embedding {rows} rows")
    return special


def encode_continuation(
    tokenizer: PreTrainedTokenizerBase, before: str, text: str, add_special_tokens: bool
) -> list[int]:
    """Token ids of ``text`` as a model writes it after ``before``: they decode to exactly that text.

    Args:
        tokenizer: Any of transformers'.
        before: The text that it follows.
        text: What is to be encoded.
        add_special_tokens: Whether special tokens are set before ``before``.
    """

    def encoded(text: str, add: bool) -> list[int]:
        return list(tokenizer(text, add_special_tokens=add)["input_ids"])

    def decoded(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def after(head: list[int], whole: list[int]) -> list[list[int]]:
        return [whole[len(head) :]] if whole[: len(head)] == head else []

    head = encoded(before, add_special_tokens)
    candidates = [encoded(text, False)]
    # Encoded by itself, a text may gain a leading space (CodeLlama), which would break a program's indents.
    if decoded([*head, *candidates[0]]) != decoded(head) + text:
        # The two encoded together; not where a token reaches over from one into the other.
        candidates += after(head, encoded(before + text, add_special_tokens))
        # The text after a newline, over which no token reaches.
        candidates += after(encoded("\n", False), encoded("\n" + text, False))
    exact = (ids for ids in candidates if decoded([*head, *ids]) == decoded(head) + text)
    # None is exact where the tokenizer alters the text whatever precedes it.
    return next(exact, candidates[-1])
