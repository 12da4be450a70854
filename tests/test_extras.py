"""What ``pip install cagsr`` leaves out: the extras are declared, each is asked for in one sentence, and the rest works without."""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import apart
import tiny
from cagsr.commands.main import COMMANDS, main
from cagsr.errors import ConfigError
from cagsr.support.extras import EXTRAS, require

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OPTIONAL = PROJECT["optional-dependencies"]
INSTALLED = packages_distributions()
MODULES = sorted({module for modules in EXTRAS.values() for module in modules})


def _named(requirement: str) -> str:
    return re.match(r"[\w-]+", requirement)[0].lower().replace("-", "_")  # type: ignore[index]


def _distribution(module: str) -> str:
    """The distribution of a module; one that is not installed here is taken to have its name."""
    return INSTALLED.get(module, [module])[0].lower().replace("-", "_")


def test_the_extras_are_those_that_are_declared() -> None:
    assert {name: sorted(map(_distribution, modules)) for name, modules in EXTRAS.items()} == {
        name: sorted(_named(one) for one in OPTIONAL[name] if not one.startswith("cagsr[")) for name in EXTRAS
    }
    assert [one for one in OPTIONAL["compare"] if one.startswith("cagsr[")] == ["cagsr[trl,nltk]"]
    assert OPTIONAL["all"] == ["cagsr[pages,rate,serve,compare,trl,nltk,gguf,images,audio]"]
    assert set(COMMANDS["compare"].extras) == {"compare", "trl", "nltk"}


def test_all_that_is_imported_is_declared() -> None:
    declared = {
        _named(one) for one in [*PROJECT["dependencies"], *(one for extra in OPTIONAL.values() for one in extra)]
    }
    for path in (ROOT / "src").rglob("*.py"):
        for module in set(_imported(ast.parse(path.read_text(encoding="utf-8")))):
            if module not in sys.stdlib_module_names | {"cagsr", "triton"}:  # triton: torch's own, where there is a GPU
                assert _distribution(module) in declared, f"{path} imports {module}"


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No module of an extra is there."""
    for module in MODULES:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


LINES = {
    "quickstart": "quickstart",
    "sft": "sft --model start --data pairs.jsonl --output_dir out",
    "reward-model": "reward-model --model start --data pairs.jsonl --output_dir out",
    "dpo": "dpo --model start --data pairs.jsonl --output_dir out",
    "compare": "compare plan.yaml",
    "rate": "rate summary --db ratings.sqlite",
    "serve": "serve versions --folder served",
    "report": "report run",
}


def test_every_command_with_extras_is_tried_below() -> None:
    assert {name for name, command in COMMANDS.items() if command.extras} == set(LINES)


@pytest.mark.parametrize("name", LINES)
def test_a_command_whose_extra_is_missing_says_which(
    name: str, bare: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for extra in COMMANDS[name].extras:  # one by one, the others there
        for other in set(MODULES) - set(EXTRAS[extra]):
            monkeypatch.setitem(sys.modules, other, type(sys)(other))
        for module in EXTRAS[extra]:
            monkeypatch.setitem(sys.modules, module, None)
        capsys.readouterr()
        assert main(LINES[name].split()) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"cagsr {name}: error: cagsr {name} needs "), said
        assert said.count("\n") == 1
        assert all(module.replace("_", "-") in said for module in EXTRAS[extra])
        assert re.search(rf'pip install "cagsr\[[a-z,]*{extra}[a-z,]*\]"\.\n$', said), said
        assert list(bare.iterdir()) == []


def test_help_needs_no_extra(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert all(main([*line.split()[:1], "--help"]) == 0 for line in LINES.values())


def test_the_sentence_names_what_is_missing_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    require("it", *EXTRAS.keys() - {"embeddings", "onnx"})
    monkeypatch.setitem(sys.modules, "bokeh", None)
    require("--png", "pages", modules=["matplotlib"])
    with pytest.raises(ConfigError, match=r'^it needs bokeh, which is not installed: pip install "cagsr\[pages\]"\.$'):
        require("it", "trl", "pages")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "trl", None)
    sentence = r'it needs trl, bokeh and matplotlib, which are not installed: pip install "cagsr\[trl,pages\]"'
    with pytest.raises(ConfigError, match=sentence):
        require("it", "trl", "pages")


COMMAND_LINES = """
train --model start --data pairs.jsonl --output_dir run --steps 1 --run.batch_size 2 --sampling.num_generations 2
    --sampling.max_new_tokens 3 --evaluation.held_out 2 --model.device cpu
generate --model run/final --data pairs.jsonl --output answers.jsonl --sampling.max_new_tokens 3
diagnose --model start --data pairs.jsonl --output diagnosis.json --sampling.max_new_tokens 3
score --model start --data pairs.jsonl --output scores.jsonl
rank --model start --data pairs.jsonl --output best.jsonl --sampling.num_generations 2 --sampling.max_new_tokens 3
eval --model start --data pairs.jsonl --output eval.json --samples 2 --sampling.max_new_tokens 3
view --model start --data pairs.jsonl --out page.html
synthesize --data pairs.jsonl --output preferences.jsonl
view --model start --data pairs.jsonl --png page.png
"""


def test_training_and_reading_need_no_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process without any of the modules runs one command after the other."""
    tiny.save_model(tmp_path / "start")
    tiny.save_prompts(tmp_path / "prompts.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    pairs = "".join(json.dumps({**row, "completion": "the red cat likes food"}) + "\n" for row in rows)
    (tmp_path / "pairs.jsonl").write_text(pairs)
    commands = [line.split() for line in COMMAND_LINES.replace("\n    ", " ").strip().splitlines()]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({MODULES}))\n"
        "from cagsr.commands.main import main\n"
        f"for command in {commands}: print('STATUS', command[0], main(command), flush=True)"
    )
    monkeypatch.chdir(tmp_path)
    said = apart.finish(apart.python("-c", code))
    statuses = re.findall(r"STATUS (\w+) (\d)", said)
    assert statuses == [(command[0], "2" if "--png" in command else "0") for command in commands], said
    assert '--png needs matplotlib, which is not installed: pip install "cagsr[pages]".' in said
    assert not (tmp_path / "page.png").exists()
    # What is left out is named where it would have been.
    install = re.escape('pip install "cagsr[nltk]"')
    assert len(re.findall(rf"ROUGE-L against completion is not measured: {install}", said)) == 2, said
    assert 'run/metrics.jsonl (no curves.png: pip install "cagsr[pages]").' in said
    assert not (tmp_path / "run" / "curves.png").exists()
    left_out = " ".join(json.loads((tmp_path / "eval.json").read_text())["left_out"])
    assert re.search(rf"ROUGE-L \({install}\).*self-BLEU \({install}\)", left_out), left_out
