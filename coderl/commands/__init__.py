"""Commands that train nothing: evaluate, merge, push, report, execute, check, doctor.

Each is one function: :mod:`coderl.cli` makes the command line from its signature, and the help from its
docstring. Results go to files and to the console. What is of use in Python too belongs in the packages below.
"""
