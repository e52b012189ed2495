"""The ways to grade a program, one file for each: what is sent, what comes back, and the verdict.

:mod:`.base` holds their interface, :class:`~coderl.sandbox.checks.base.Check`, and what all verdicts share;
:mod:`.choose` the table that ``auto`` goes through. Lanes and processes are the pool's business.
"""
