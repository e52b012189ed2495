"""What ships in the package: small problems, a tiny code model, and the seeded code that builds them.

The generator here makes ``problems.jsonl`` and the texts that the tokenizer and the model in ``model/`` were
trained on. :class:`coderl.problems.Embedded` reads the problems, and policies load the model, as they do any
other: there is no code here for that.
"""
