"""``cagsr compare``: methods x seeds from one YAML file, resumable, to one report."""

import os
import shlex
from dataclasses import dataclass, field

from cagsr.config.ranges import OutputFile, PositiveInt
from cagsr.errors import ConfigError
from cagsr.support.progress import say


@dataclass(frozen=True)
class Config:
    """Run a declared comparison, or go on with it, and write its report."""

    plan: str
    """YAML file of the comparison (given without a flag: cagsr compare plan.yaml)."""
    fast: bool = False
    """The plan's small version (its section 'fast'), in a work folder of its own."""
    variables: list[str] = field(default_factory=list)
    """Values for the plan's variables, as model=DIR."""
    jobs: PositiveInt | None = None
    """Jobs at a time; None: one a core, at most 4."""
    threads: PositiveInt | None = None
    """Threads of each job; None: the jobs share the cores."""
    report: OutputFile | None = None
    """Markdown file of the report, .html beside it; None: report.md in the work folder."""
    report_only: bool = False
    """Write the report of what is done, without running anything."""


def run(config: Config) -> None:
    """Run what is missing and write the report."""
    from pathlib import Path

    from cagsr.compare.comparison_report import finding, write_report
    from cagsr.compare.jobs import plan_jobs
    from cagsr.compare.plan import read_plan
    from cagsr.compare.results import Results
    from cagsr.compare.scheduler import run_jobs

    file = Path(config.plan)
    plan = read_plan(file, fast=config.fast, variables=config.variables)
    jobs = plan_jobs(plan)
    failures = []
    if not config.report_only:
        parallel = config.jobs or min(4, os.cpu_count() or 1)
        words = [config.plan, *(["--fast"] if config.fast else []), *config.variables]
        failures = run_jobs(plan, jobs, words, parallel=parallel, threads=config.threads)
    command = f"cagsr compare {config.plan}{' --fast' if config.fast else ''}"
    command += f" --variables {shlex.join(config.variables)}" if config.variables else ""
    path = Path(config.report) if config.report is not None else plan.folder / "report.md"
    results = Results(plan, jobs)
    markdown, page = write_report(results, command, failures, path)
    say(finding(results))
    say(f"Report: {markdown} and {page}.")
    if failures:
        first = failures[0]
        raise ConfigError(
            f"{len(failures)} of {len(jobs)} jobs failed, the first one {first.job.name} ({first.reason}; its whole output is in "
            f"{first.log}); mend it and give the same command again."
        )
