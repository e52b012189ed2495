"""Rebuild the shipped problems and the tokenizer: ``python -m coderl.embedded.build``.

The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from coderl.embedded.generate import sft_examples, shipped_rows
from coderl.files import write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
SEED = 42
ENTRIES = 1024
"""Size of the vocabulary, special tokens included."""
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with single digits, trained on the given texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ENTRIES,
        special_tokens=[BOS, EOS, PAD],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def tokenizer_texts(seed: int = SEED, size: int = 4000) -> list[str]:
    """Texts to train the tokenizer on: generated problems with correct and mistaken solutions."""
    return [problem.prompt + problem.solution for problem in sft_examples(seed, size, 0.3)]


def build(folder: Path, seed: int = SEED) -> None:
    """Write ``problems.jsonl`` and ``model/``'s tokenizer into ``folder``."""
    write_atomic(folder / "problems.jsonl", "".join(json.dumps(row) + "\n" for row in shipped_rows(seed)))
    train_tokenizer(tokenizer_texts(seed)).save_pretrained(folder / "model")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=HERE, help="where to write")
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    build(options.folder, options.seed)


if __name__ == "__main__":
    main()
