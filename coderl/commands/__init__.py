"""Commands that train nothing, a function each: its signature is the command line, its docstring the help.

Arguments come from :mod:`coderl.cli`, which names each command in its table; the work is done by the rooms
below.
"""
