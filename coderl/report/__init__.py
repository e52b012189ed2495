"""``coderl report``: what a run won, as a page; and its parts for notebooks.

>>> from coderl.report import curves, headline, load_run
>>> run = load_run("checkpoints/embedded-embedded-grpo-qlora")  # doctest: +SKIP
>>> print(headline(run))  # doctest: +SKIP
>>> curves(run)  # doctest: +SKIP
"""

from coderl.report.command import report
from coderl.report.figures import cover, curves, outcomes, scores, seconds
from coderl.report.metrics import Series
from coderl.report.page import moments, page
from coderl.report.programs import Change, changes, lost, won
from coderl.report.run import Run, load_run, load_runs
from coderl.report.words import headline, table

__all__ = [
    "Change",
    "Run",
    "Series",
    "changes",
    "cover",
    "curves",
    "headline",
    "load_run",
    "load_runs",
    "lost",
    "moments",
    "outcomes",
    "page",
    "report",
    "scores",
    "seconds",
    "table",
    "won",
]
