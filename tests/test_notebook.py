"""A run in a notebook: what is shown, that it is drawn anew while it trains, and the example from its first cell to its last."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import apart
import run_pages
from cagsr.config import DataConfig, ModelConfig, TrainConfig
from cagsr.errors import RunError
from cagsr.notebook import RunView, run_view, train

EXAMPLE = Path(__file__).parent.parent / "examples" / "notebook.ipynb"
SIZES = {"pairs": 40, "sft_steps": 2, "prompts": 8, "held_out": 4, "steps": 2, "batch_size": 2}


def test_a_run_shows_itself_and_nothing_in_it_is_markup(tmp_path: Path) -> None:
    warning = {"step": 7, "name": "kl", "sentence": f"KL {run_pages.HOSTILE}", "action": "stop"}
    rows = [run_pages.sample(step, run_pages.HOSTILE, f"{run_pages.HOSTILE} {step}", 0.25) for step in (1, 7)]
    held_out = [
        {"step": step, "prompt": "p", "completion": said, "metric": 0.75}
        for step, said in ((0, "the cat"), (7, "the red cat"))
    ]
    folder = run_pages.make_run(
        tmp_path / "run", done=7, final=False, warnings=[warning], samples=rows, held_out=held_out
    )
    html = RunView(folder)._repr_html_()
    assert "A monitor stopped the training at step 7 of 20" in html
    assert re.search(r"<b>Step 7, .*</b> \(stopped the run\): KL &lt;/script&gt;", html)
    assert 'the<ins> red</ins> cat</td><td class="number">0.75</td>' in html  # against the start's answer
    assert html.count('src="data:image/png;base64,') == 1
    assert re.search(r"KL.*</td><td class=\"number\">0.37</td><td class=\"number\">2.59</td>", html)
    assert html.strip().startswith('<div class="cagsr-run">')
    assert not re.search(r"<script|onerror=alert\(2\)>|https?://|<img src=x", html)
    assert len(re.findall(r"<img ", html)) == 1


def test_a_run_without_curves_or_answers_is_shown_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Training has not begun" in RunView(tmp_path / "nothing")._repr_html_()
    folder = run_pages.make_run(tmp_path / "run", samples=[])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    html = RunView(folder)._repr_html_()
    assert "The curves need matplotlib: <code>pip install &#34;cagsr[pages]&#34;</code>" in html
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "sft.yaml").write_text("{}")
    with pytest.raises(RunError, match="is the folder of a cagsr sft"):
        RunView(tmp_path / "model").read()


class Notebook:
    """Stands in for IPython: what was shown, and how often it was drawn anew."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        module: Any = ModuleType("IPython")
        module.get_ipython, module.display = object, SimpleNamespace(display=self.display)
        module.version_info = (9, 0)  # matplotlib asks
        self.module = module

    def display(self, view: RunView, display_id: bool) -> Notebook:
        assert display_id
        self.update(view)
        return self

    def update(self, view: RunView) -> None:
        self.shown.append(view._repr_html_())


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_it_is_drawn_while_it_trains_and_once_more_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    config = TrainConfig(ModelConfig("start"), DataConfig("prompts.jsonl"), str(tmp_path / "run"))
    clock = iter(
        [0.0, 0.1, 1.0, 2.0, 5.0, 5.1]
    )  # step 0 drawn in 0.1 s; step 1 comes too early, as does step 2; step 3 is drawn

    def trained(given: TrainConfig, console: Any, after_step: Any) -> None:
        assert given is config
        for step in range(4):
            run_pages.make_run(tmp_path / "run", done=step, final=False, samples=[])
            if after_step is not None:
                after_step(step)
        run_pages.make_run(tmp_path / "run", done=20, samples=[])
        if ends == "badly":
            raise RunError("full")

    monkeypatch.setattr(run_view, "train_run", trained)
    notebook = Notebook()
    monkeypatch.setitem(sys.modules, "IPython", notebook.module)
    monkeypatch.setattr(run_view.time, "monotonic", lambda: next(clock))
    if ends == "well":
        assert train(config) == RunView(tmp_path / "run")
    else:
        with pytest.raises(RunError, match="full"):
            train(config)
    steps = [re.search(r"before its first step|at step 3 of|finished: 20", one) for one in notebook.shown]
    assert [one and one[0] for one in steps] == ["before its first step", "at step 3 of", "finished: 20"]
    # No notebook, nothing shown.
    monkeypatch.setitem(sys.modules, "IPython", None)
    if ends == "well":
        assert train(config).model == tmp_path / "run" / "final"
    assert len(notebook.shown) == 3


def _cells() -> list[str]:
    """The code of the example, at the sizes of a test."""
    notebook = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    code = [one for one in notebook["cells"] if one["cell_type"] == "code"]
    assert all(one["outputs"] == [] and one["execution_count"] is None for one in code)  # they are not kept
    cells = ["".join(one["source"]) for one in code]
    sizes, count = re.subn(r"^(.*) = [\d, ]+$", lambda one: f"{one[1]} = {list(SIZES.values())}", cells[0], flags=re.M)
    assert count == 1
    assert f"{', '.join(SIZES)} = " in sizes
    return [sizes, *cells[1:]]


def run_the_example(folder: str) -> None:
    """As a notebook does, but for its kernel; prints what was drawn."""
    import os

    os.chdir(folder)
    notebook = Notebook()
    sys.modules["IPython"] = notebook.module
    made: dict[str, Any] = {}
    for cell in _cells():
        exec(cell, made)
    print(f"drawn {len(notebook.shown)} times; {made['run'].read().state.sentence}")
    print(f"after: {len(made['after'])} answers; {'data:image/png' in notebook.shown[-1]}")


def test_the_example_runs(tmp_path: Path) -> None:
    told = apart.call(run_the_example, str(tmp_path))
    assert re.search(r"drawn [2-9] times; Training is finished: 2 steps\.", told)
    assert "after: 3 answers; True" in told
    assert (tmp_path / "notebook" / "run" / "final" / "model.safetensors").is_file()


def test_the_example_runs_in_a_kernel(tmp_path: Path) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLE, as_version=4)
    for cell, source in zip([one for one in notebook.cells if one.cell_type == "code"], _cells(), strict=True):
        cell.source = source
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = {one.id: one.get("outputs", []) for one in notebook.cells}
    (shown,) = [one.data["text/html"] for one in outputs["look"]]
    drawn = [html for one in outputs["train"] if "cagsr-run" in (html := one.get("data", {}).get("text/html", ""))]
    assert len(drawn) == 1  # one output, drawn anew
    assert "Training is finished: 2 steps." in drawn[0]
    assert "data:image/png;base64," in shown
