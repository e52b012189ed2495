"""``coderl report``: writes an HTML page and a PNG on a run, and overwrites nothing but an earlier report."""

from __future__ import annotations

from pathlib import Path

from coderl.errors import UsageError, UserError
from coderl.files import write_output
from coderl.report.figures import cover
from coderl.report.page import MARK, page, png
from coderl.report.programs import visible
from coderl.report.text import headline
from coderl.runs.folder import RunFolder
from coderl.runs.reading import load_runs

SIGNS = (f'<meta name="generator" content="{MARK},'.encode(), f"tEXtSoftware\0{MARK}".encode())
"""Bytes near the beginning of a page and a PNG that an earlier report wrote."""


def report(runs: list[str], output: str | None = None) -> None:
    """Report what training changed: one HTML page to send to a colleague, and one wide figure for a README.

    The page is one file, without scripts: held-out pass@1 before and after training with the paired
    difference, curves, outcomes, where the time goes, each benchmark, problems won and lost with the programs
    before and after, samples over time, settings. Of a run that has not ended it has what is there so far.

    Args:
        runs: Folders of runs, such as checkpoints/embedded-embedded-grpo-qlora. Several are set side by side.
        output: The page, a name in .html; the figure has the same name in .png. By default report.html in
            the folder of the run, or here for several. An earlier report is written over.

    Raises:
        UsageError: The output is no name for a page, or another file.
        UserError: A folder is no run's, a file in it is damaged, or the page cannot be written.
    """
    loaded = load_runs(runs)
    beside = Path() if len(loaded) > 1 else loaded[0].folder
    target = Path(output).expanduser() if output else RunFolder(beside).report
    if target.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--output {target}: is no name for a page; give one in .html")
    png_path = target.with_suffix(".png")
    for path in (target, png_path):
        _require_replaceable(path)
    text = page(loaded).encode()
    write_output(target, text)
    figure = cover(loaded)
    if figure is not None:
        write_output(png_path, png(figure))
    for run in loaded:
        print(visible(f"{run.name}: {headline(run)}" if len(loaded) > 1 else headline(run)))
    for path in (target, png_path) if figure is not None else (target,):
        print(f"📁 {path}")


def _require_replaceable(path: Path) -> None:
    """Refuse to write over anything but an earlier report.

    Raises:
        UsageError: Something else lies there.
        UserError: What lies there cannot be read.
    """
    if not path.exists():
        return
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; give --output the name of a file in .html")
    try:
        with path.open("rb") as file:
            start = file.read(1000)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); give another --output"
        ) from error
    if not any(sign in start for sign in SIGNS):
        raise UsageError(f"{path}: is there already and is no report; give another --output")
