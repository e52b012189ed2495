"""The embedded default: our own small problems, the tiny code model that ships, and what makes both again."""
