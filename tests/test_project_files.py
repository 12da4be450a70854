"""For those who carry on: the same checks before a commit, in CI and by hand, on the promised Pythons; and who to cite."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import yaml

import cagsr

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def _recipe(target: str) -> list[str]:
    """The commands of a target of the Makefile."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", text, re.M)
    assert found is not None
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in found[1].splitlines()]


def test_ci_runs_on_the_pythons_that_are_promised() -> None:
    workflow = _yaml(".github/workflows/ci.yml")
    [job] = workflow["jobs"].values()
    pythons = job["strategy"]["matrix"]["python-version"]
    prefix = "Programming Language :: Python :: "
    named = [one.removeprefix(prefix) for one in PROJECT["classifiers"] if one.startswith(f"{prefix}3.")]
    assert pythons == named
    assert PROJECT["requires-python"] == f">={pythons[0]}"
    assert [step["with"]["python-version"] for step in job["steps"] if "with" in step] == [
        "${{ matrix.python-version }}"
    ]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"Python {', '.join(pythons[:-1])} or {pythons[-1]}." in readme


def test_ci_runs_what_the_readme_says() -> None:
    workflow = _yaml(".github/workflows/ci.yml")
    [job] = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert {"push", "pull_request"} <= set(workflow[True])  # YAML 1.1 reads "on" as true
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o100
    assert [line for line in script.read_text(encoding="utf-8").splitlines() if line.startswith("make")] == [
        "make lint",
        "make test",
    ]


def test_before_a_commit_runs_what_lint_runs() -> None:
    [repository] = _yaml(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"  # nothing to download
    hooks = repository["hooks"]
    assert [shlex.split(hook["entry"]) for hook in hooks] == [shlex.split(line) for line in _recipe("lint")]
    for hook in hooks:
        assert (hook["language"], hook["pass_filenames"], hook["always_run"]) == ("system", False, True)


def test_the_citation_is_of_this_version_and_of_the_papers() -> None:
    citation = _yaml("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    assert citation["version"] == PROJECT["version"] == cagsr.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation["keywords"] == PROJECT["keywords"]
    papers = {one["identifiers"][0]["value"]: one for one in citation["references"]}
    assert set(papers) == {"arXiv:2502.10482", "arXiv:2506.11108"}
    for identifier, paper in papers.items():
        assert paper["url"] == f"https://arxiv.org/abs/{identifier.removeprefix('arXiv:')}"
        assert [one["family-names"] for one in paper["authors"]] == ["Kiruluta", "Lemos", "Burity"]
