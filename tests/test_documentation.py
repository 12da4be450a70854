"""What the documents show is true: commands parse, examples run, links and files exist, defaults are the real ones."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import apart
import cagsr
import tiny
from cagsr.commands.main import COMMANDS, main, part_of, with_positional
from cagsr.config import DataConfig, ModelConfig, RewardConfig, TrainConfig
from cagsr.config.validation import leaf_types
from cagsr.errors import ConfigError
from cagsr.flow import Attention, EpisodeBatch, Prompt, PromptBatch, Readings, RewardBatch
from cagsr.parse import ALIASES, parse_command, to_yaml

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "cagsr"
DOCUMENTS = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("examples/*/README.md"),
    ]
)
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
MODULE = "-m cagsr.commands.main "


def _blocks(text: str, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(text) if kind == language]


def _inline(text: str) -> list[str]:
    """Code spans outside fenced blocks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]


def _shell_lines(text: str) -> Iterator[str]:
    """Lines of shell blocks, continued lines joined, comments removed; then code spans."""
    for block in _blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            yield line.split(" #")[0].strip() if not line.startswith("#") else ""
    yield from _inline(text)


def _command_lines(text: str) -> list[str]:
    """The part after ``cagsr`` of each command line; a bare name in running text (``cagsr diagnose``) is one too."""
    found = []
    for line in _shell_lines(text):
        if line.startswith("cagsr "):
            found.append(line.removeprefix("cagsr "))
        elif MODULE in line:
            found.append(line.split(MODULE, 1)[1])
    return found


def _check_command(line: str) -> None:
    """Parse a command line as the program would, without running it; a bare command name must only exist."""
    name, *flags = shlex.split(line)
    if name in ("--help", "--version"):
        return
    assert name in COMMANDS, f"cagsr {line}: no such command"
    if not flags:
        return
    if flags == ["--help"]:
        return
    for flag, value in pairwise(flags):
        if flag in ("--output", "--markdown", "--report", "--out"):  # earlier commands have made the folder
            Path(value).parent.mkdir(parents=True, exist_ok=True)
    parse_command(part_of(name, "config"), with_positional(name, flags), prog="cagsr")


def _keys() -> set[str]:
    """Every dotted key and short name of every command."""
    keys = {"config", "help"} | set(ALIASES)
    for name in COMMANDS:
        keys |= {key for key, _ in leaf_types(part_of(name, "config"))}
    return keys


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the documents speak of: a model ``start``, prompts, a run's config, a recommendation."""
    tiny.save_model(tmp_path / "start")
    tiny.save_prompts(tmp_path / "prompts.jsonl")
    for folder in ("run", "quickstart/run"):
        (tmp_path / folder).mkdir(parents=True)
        config = TrainConfig(ModelConfig("start"), DataConfig("prompts.jsonl"), output_dir=folder)
        (tmp_path / folder / "config.yaml").write_text(to_yaml(config))
    for name in ("diagnosis", "calibrated"):
        (tmp_path / f"{name}.yaml").write_text("reward:\n  coverage:\n    weight: 0.5\n")
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_every_command_line_parses(name: str, workplace: Path) -> None:
    for line in _command_lines((ROOT / name).read_text(encoding="utf-8")):
        try:
            _check_command(line)
        except ConfigError as error:
            pytest.fail(f"{name}: cagsr {line}: {error}")


def test_every_command_is_shown() -> None:
    shown = {line.split()[0] for line in _command_lines((ROOT / "docs/commands.md").read_text(encoding="utf-8"))}
    assert set(COMMANDS) <= shown


@pytest.mark.parametrize(
    "line",
    [
        "train --model start --data prompts.jsonl --output_dir run --ppo.klcoef 1",
        "train --model start --data prompts.jsonl",
        "generate --model start --prompt x --sampling.temperature warm",
        "rank --config missing.yaml",
    ],
)
def test_a_wrong_command_line_would_fail(line: str, workplace: Path) -> None:
    with pytest.raises(ConfigError):
        _check_command(line)


def test_command_lines_are_found_in_blocks_and_in_text() -> None:
    block = "```bash\n# a comment\ncagsr train --a \\\n    1  # more\ntorchrun -m cagsr.commands.main sft\n```\n"
    text = f"See `cagsr diagnose` or\n\n{block}"
    assert _command_lines(text) == ["train --a      1", "sft", "diagnose"]


@pytest.mark.parametrize("name", NAMES)
def test_flags_and_settings_in_running_text_exist(name: str) -> None:
    keys, sections = _keys(), {field.name for field in dataclasses.fields(TrainConfig)}
    prefixes = {key.rpartition(".")[0] for key in keys}
    for span in _inline((ROOT / name).read_text(encoding="utf-8")):
        if span.startswith("--"):
            flag = span.split()[0].removeprefix("--").split("=")[0]
            assert flag in keys, f"{name}: no command has --{flag}"
        elif re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", span) and span.split(".")[0] in sections and ".json" not in span:
            assert span in keys | prefixes, f"{name}: there is no setting {span}"


@pytest.mark.parametrize("name", NAMES)
def test_metric_names_in_the_text_are_those_that_are_logged(name: str) -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py"))
    for span in _inline((ROOT / name).read_text(encoding="utf-8")):
        if re.fullmatch(r"(objective|policy|val|response|eval|sampling|loss)/[a-z_0-9]+", span):
            assert f'"{span}"' in code, f"{name}: nothing logs {span}"


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files_and_headings(name: str) -> None:
    document = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", document.read_text(encoding="utf-8"))):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        path = (document.parent / file).resolve() if file else document
        assert path.exists(), f"{name}: {target} does not exist"
        if anchor:
            assert anchor in _anchors(path), f"{name}: {file or name} has no heading #{anchor}"


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_files_named_in_the_text_exist(name: str) -> None:
    document = ROOT / name
    text = document.read_text(encoding="utf-8")
    # Files that an example itself shows are the reader's.
    own = {match for block in _blocks(text, "python") for match in re.findall(r"^# (\w+\.py)$", block, re.M)}
    for span in _inline(text):
        if re.fullmatch(r"[\w./-]+\.py|[\w-]+/", span) and span not in own | RUN_FOLDERS:
            places = (ROOT, SOURCE, document.parent)
            assert any((place / span).exists() for place in places), f"{name}: no file {span}"


RUN_FOLDERS = {
    "run/",
    "final/",
    "final-adapter/",
    "best/",
    "final-differs/",
    "checkpoints/",
    "quickstart/",
    "rollout-weights/",
    "adapter/",
    "differs/",
}
"""Folders that commands make."""


@pytest.mark.parametrize("name", NAMES)
def test_make_targets_and_modules_exist(name: str) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for line in _shell_lines((ROOT / name).read_text(encoding="utf-8")):
        if match := re.match(r"make (\w+)", line):
            assert match[1] in targets, f"{name}: the Makefile has no target {match[1]}"
        if match := re.match(r"python -m ((?:examples|benchmarks)[\w.]*)(.*)", line):
            path = ROOT / match[1].replace(".", "/")
            module = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
            assert module.exists(), f"{name}: no module {match[1]}"
            code = module.read_text(encoding="utf-8")
            for flag in re.findall(r"--([a-z]\w*)", match[2]):  # argparse, or a field of tyro's dataclass
                assert re.search(rf'"--{flag}"|^    {flag}: ', code, re.M), f"{name}: {match[1]} has no --{flag}"


def _python_examples() -> dict[str, str]:
    """File name (the first line's comment) -> code."""
    blocks = [block for path in DOCUMENTS for block in _blocks(path.read_text(encoding="utf-8"), "python")]
    return {block.splitlines()[0].removeprefix("# "): block for block in blocks}


def test_python_blocks_compile_and_are_all_run_below() -> None:
    for block in _python_examples().values():
        ast.parse(block)
    # ask_server.py asks a server, in tests/test_serving_api.py.
    own = {"my_rewards.py", "my_terms.py", "my_tasks.py", "my_objectives.py", "ask_server.py"}
    assert set(_python_examples()) == {"read_attention.py", "left_padded.py", "train.py", *own}


def test_the_attention_example_reads_what_eager_gives(workplace: Path) -> None:
    made: dict[str, object] = {}
    exec(_python_examples()["read_attention.py"], made)
    prompt, response, model = made["prompt"], made["response"], made["model"]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        layers = model(torch.tensor([prompt + response]), output_attentions=True).attentions
    mean = torch.stack(layers).mean(dim=(0, 2))  # over layers and heads
    # The row before a token predicts it.
    expected = mean[:, len(prompt) - 1 : len(prompt) + len(response) - 1, : len(prompt)]
    torch.testing.assert_close(made["attention"], expected, atol=1e-5, rtol=0)


def test_the_left_padded_example_gives_gradients(workplace: Path) -> None:
    made: dict[str, object] = {}
    exec(_python_examples()["left_padded.py"], made)
    attention = made["reading"].attention
    assert attention.shape == (2, made["responses"]["input_ids"].shape[1], made["prompts"]["input_ids"].shape[1])
    assert not attention[~made["responses"]["attention_mask"].bool()].any()
    assert not attention.transpose(1, 2)[~made["prompts"]["attention_mask"].bool()].any()
    gradient = made["model"].model.layers[0].self_attn.q_proj.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_the_reward_terms_of_the_example_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workplace / "my_rewards.py").write_text(_python_examples()["my_rewards.py"])
    monkeypatch.syspath_prepend(workplace)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    line = (
        "score --model start --data pairs.jsonl --output scores.jsonl "
        "--reward.functions my_rewards.LooksBack my_rewards.no_links --reward.function_weights 0.5 1"
    )
    rows = [{"prompt": "tell me about the red cat", "completion": text} for text in ("the red cat", "a http bird")]
    (workplace / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(line.split()) == 0
    scored = [json.loads(row) for row in (workplace / "scores.jsonl").read_text().splitlines()]
    assert all(0 < row["terms"]["looks_back"] < 1 for row in scored)
    # The tiny tokenizer's word for http is <unk>, so the text that is judged must be the file's own.
    assert [row["terms"]["no_links"] for row in scored] == [0.0, -1.0]


def test_a_term_a_task_and_an_objective_of_the_page_train(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("my_terms", "my_tasks", "my_objectives"):
        (workplace / f"{name}.py").write_text(_python_examples()[f"{name}.py"])
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(workplace)
    text = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    flags = [line.split("--output_dir run ")[1].split() for line in text.splitlines() if line.startswith("cagsr train")]
    assert len(flags) == 3
    small = (
        "train --model start --model.device cpu --data prompts.jsonl --output_dir extended --steps 1 --run.batch_size 2 "
        "--num_generations 2 --max_new_tokens 4 --sampling.stop_strings the --evaluation.held_out 2"
    )
    assert main([*small.split(), *(flag for line in flags for flag in line)]) == 0
    last = json.loads((workplace / "extended" / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < last["rewards/looks_back/mean"] < 1
    assert "loss/confidence_avg" in last


def test_looks_back_by_hand() -> None:
    made: dict[str, object] = {}
    exec(_python_examples()["my_rewards.py"], made)
    mask = torch.tensor([[True, True, True, True], [True, True, True, False]])
    mass = torch.tensor([[0.9, 0.9, 0.4, 0.2], [0.9, 0.5, 0.1, 0.7]])
    ids = torch.zeros_like(mask, dtype=torch.int64)
    prompts = PromptBatch((Prompt(1, ""),) * 2, ids[:, :1], mask[:, :1], ids[:, :1], mass[:, :1], ids[:, 0])
    readings = Readings(mass, mass, mass, mass)
    episodes = EpisodeBatch.of_one_turn(prompts, ids, mask, mask[:, 0], ("", ""))
    batch = RewardBatch(episodes, readings, None, Attention(mass[:, :, None], mass[:, :, None]))
    # Late tokens: 3 and 4 of four, 2 and 3 of three.
    torch.testing.assert_close(made["LooksBack"]()(batch), torch.tensor([0.3, 0.3]))


def test_the_training_example_makes_a_config(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[TrainConfig] = []
    module = importlib.import_module("cagsr.train")

    def record(config: TrainConfig) -> object:
        given.append(config)
        return module.TrainResult(Path("run"), {}, {})

    monkeypatch.setattr(module, "train", record)
    exec(_python_examples()["train.py"], {})
    assert given == [TrainConfig(ModelConfig("start"), DataConfig("prompts.jsonl"), output_dir="run")]


@pytest.mark.parametrize(("name", "column"), [("README.md", 3), ("docs/reward.md", 6)])
def test_the_table_of_terms_has_the_real_defaults(name: str, column: int) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    start = text.index("| term |")
    rows = [row.split("|") for row in text[start:].split("\n\n")[0].splitlines()[2:]]
    shown = {row[1].strip(" `"): row[column].strip() for row in rows}
    terms = {field.name: getattr(RewardConfig(), field.name) for field in dataclasses.fields(RewardConfig)}
    expected = {key: value for key, value in terms.items() if hasattr(value, "weight")}
    assert set(shown) == set(expected)
    for term, cell in shown.items():
        weight = re.match(r"(?:weight )?(-?[\d.]+)", cell)
        assert weight is not None, cell
        assert float(weight[1]) == expected[term].weight, term
        for key, value in re.findall(r"(threshold|entropy_floor|n) ([\d.]+)", cell):
            assert float(value) == getattr(expected[term], key), (term, key)


def test_the_table_of_settings_has_the_real_defaults() -> None:
    text = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    config = TrainConfig(ModelConfig("m"), DataConfig("d"), output_dir="o")
    table = text[text.index("| setting |") :].split("\n\n")[0]
    rows = re.findall(r"^\| (`[\w.`, ]+`) \| ([^|]+) \|", table, re.M)
    assert len(rows) > 5
    for names, values in rows:
        for name, value in zip(re.findall(r"`([\w.]+)`", names), values.split(","), strict=False):
            section, _, key = name.partition(".")
            default = getattr(getattr(config, section), key)
            assert value.strip() == ("none" if default is None else f"{default}"), name


def test_importing_the_package_loads_no_torch() -> None:
    """Nor do settings without a reward, whose terms compute."""
    code = (
        "import sys, cagsr; dir(cagsr); cagsr.SftConfig; print('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert apart.finish(apart.python("-c", code)).strip() == "False"


def test_every_public_name_is_there() -> None:
    assert all(getattr(cagsr, name) is not None for name in cagsr.__all__)
    assert cagsr.PromptAttentionReader is importlib.import_module("cagsr.attention").PromptAttentionReader
    assert set(cagsr.__all__) <= set(dir(cagsr))
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        cagsr.Nonsense  # noqa: B018


def test_sources_cite_what_everyone_can_read() -> None:
    """Papers, issues and documents that are here: not the notes of those who wrote them."""
    for folder in ("src", "examples", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not re.search(r"\b(method|peers)\.md", path.read_text(encoding="utf-8")), path
