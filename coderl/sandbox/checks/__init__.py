"""The ways to grade a program, one file for each: what is sent, what comes back, and the verdict.

:mod:`.base` holds their interface, :class:`~coderl.sandbox.checks.base.Check`, and what all verdicts share;
:mod:`.choose` the table that ``auto`` goes through. What they ask of the text of tests is in :mod:`.names`
(which names mean what), :mod:`.claims` (what an assert claims) and :mod:`.cut` (which statements run where).
Lanes and processes are the pool's business.
"""
