"""All that a lane is shown of coderl: zygote, runner, and the language they speak with the trusted side.

A lane's interpreter knows this folder as the package ``inside`` and nothing around it, so modules here import
each other relatively, and the standard library. What is decided about a program is decided outside.
"""
