"""The embedded default: small problems, the tiny code model in the package, and the code that builds both."""
