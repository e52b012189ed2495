"""A run on disk: its folder with every name in it, what it logs while it lasts, and how it is read again.

Fits write here through the loggers and the console log; reports, cards and commands read through
:class:`~coderl.runs.folder.RunFolder` and :func:`~coderl.runs.reading.load_run`. Nothing here trains. The
loggers need Lightning; the other modules load neither it nor torch.
"""
