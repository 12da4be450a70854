"""``cagsr report``: a run's page, as one file or served while training goes on."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cagsr.config.ranges import Port
from cagsr.errors import ConfigError
from cagsr.support.progress import say


@dataclass(frozen=True)
class Config:
    """Show a run, or several over each other, as a self-contained HTML page."""

    runs: list[str]
    """Folders of cagsr train runs (or of a quickstart): one, or several to draw over each other."""
    out: str | None = None
    """HTML file for the page; None: report.html in the run's folder, or here for several runs."""
    serve: bool = False
    """Serve the page on this machine instead, fresh while training goes on; waits for a run that has not begun."""
    port: Port = 0
    """With --serve: the port; 0 takes a free one."""

    def conflicts(self) -> Iterator[str]:
        """Yield what does not go together, a sentence each."""
        if not self.runs:
            yield "--runs is empty: name the folder of a run."
        if self.serve and self.out is not None:
            yield "--out and --serve exclude each other: the served page has a link that saves it as one file."


def run(config: Config) -> None:
    """Write the page, or serve it until interrupted."""
    from cagsr.run_page.read_run import find_run, labels, read_run

    paths = [Path(one) for one in config.runs]
    names = labels(paths)
    if config.serve:
        from cagsr.run_page.live_page import application
        from cagsr.support.localhost import listen, serve_until_interrupted

        for path in paths:
            find_run(path, wait=True)
        bound = listen(config.port)
        line = f"http://127.0.0.1:{bound.getsockname()[1]}/ shows {', '.join(names)}; Ctrl-C ends it."
        serve_until_interrupted(application(paths), bound, lambda: say(line))
        return

    from cagsr.run_page.run_html import render_page
    from cagsr.runs.folder import REPORT
    from cagsr.support.atomic import disk_errors, write_text_atomically

    folders = [find_run(path) for path in paths]
    runs = [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
    out = Path(config.out) if config.out is not None else folders[0] / REPORT if len(folders) == 1 else Path(REPORT)
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder: give the name of a file.")
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(out, render_page(runs))
    say(*(f"{one.label}: {one.state.sentence}" for one in runs))
    say(f"{out}: {out.stat().st_size / 1e6:.2f} MB, open it in a browser.")
