"""The command line: flags, files, short names, and one sentence for every mistake."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import apart
from cagsr.commands import main as commands_main
from cagsr.commands.main import COMMANDS, main, part_of
from cagsr.config import (
    AttentionConfig,
    DataConfig,
    ModelConfig,
    RewardConfig,
    RunConfig,
    SalienceConfig,
    SamplingConfig,
    SftConfig,
    TrainConfig,
)
from cagsr.config.validation import leaf_types
from cagsr.errors import ConfigError, DataError, MonitorStop
from cagsr.parse import ALIASES, flatten, parse_command, to_yaml

NEEDED = ["--model", "m", "--data", "d", "--output_dir", "o"]


def parse(*words: str, config_class: type[Any] = TrainConfig) -> Any:
    return parse_command(config_class, words, prog="cagsr test")


def error_of(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(*words)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_file(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_file


# ---- flags ----


def test_flags_reach_nested_settings_and_leave_the_rest_at_their_defaults() -> None:
    config = parse(
        *NEEDED, "--reward.coverage.weight", "2", "--reward.repetition.weight", "-0.5", "--data.limit", "None"
    )
    expected = TrainConfig(model=ModelConfig(path="m"), data=DataConfig(path="d"), output_dir="o")
    reward = expected.reward
    reward = replace(
        reward, coverage=replace(reward.coverage, weight=2.0), repetition=replace(reward.repetition, weight=-0.5)
    )
    assert config == replace(expected, reward=reward)


@pytest.mark.parametrize("spelling", ["--ppo.learning_rate", "--ppo.learning-rate"])
@pytest.mark.parametrize("joined", [True, False])
def test_underscores_and_hyphens_and_the_equals_sign(spelling: str, joined: bool) -> None:
    words = [f"{spelling}=0.25"] if joined else [spelling, "0.25"]
    assert parse(*NEEDED, *words).ppo.learning_rate == 0.25


def test_short_names_stand_for_the_dotted_ones() -> None:
    config = parse(*NEEDED, "--steps", "7", "--seed=3", "--lora-r", "4", "--resume")
    assert (config.run.steps, config.run.seed, config.lora.r, config.run.resume) == (7, 3, 4, True)
    assert set(ALIASES.values()) <= set(flatten(config))


def test_a_short_name_that_is_a_setting_of_the_command_itself_stays_that() -> None:
    config = parse(*NEEDED, "--steps", "7", "--seed", "3", config_class=SftConfig)
    assert (config.steps, config.seed) == (7, 3)


def test_lists_and_pairs() -> None:
    config = parse(*NEEDED, "--sampling.stop_strings", "a", "b c", "--salience.markers", "<<", ">>")
    assert config.sampling.stop_strings == ["a", "b c"]
    assert config.salience.markers == ("<<", ">>")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--run.resume"], True),
        (["--run.no_resume"], False),
        (["--run.resume", "True"], True),
        (["--run.resume=false"], False),
        (["--resume", "false", "--steps", "3"], False),
    ],
)
def test_switches(words: list[str], expected: bool) -> None:
    assert parse(*NEEDED, *words).run.resume is expected


def test_a_switch_that_the_file_turned_on_can_be_turned_off(write: Any) -> None:
    file = write("run: {resume: true}")
    assert parse(*NEEDED, "--config", file).run.resume is True
    assert parse(*NEEDED, "--config", file, "--run.no_resume").run.resume is False


# ---- files ----


def test_flags_override_the_file_and_required_keys_come_from_either(write: Any) -> None:
    file = write("model: {path: from_file}\ndata.path: p\nppo:\n  learning_rate: 1e-5\n  gamma: 0.5\n")
    config = parse(f"--config={file}", "--ppo.gamma", "0.75", "--output_dir", "o")
    assert (config.model.path, config.data.path, config.output_dir) == ("from_file", "p", "o")
    # YAML 1.1 reads 1e-5 as text; here it is a number all the same.
    assert config.ppo.learning_rate == 1e-5
    assert config.ppo.gamma == 0.75


def test_a_file_may_write_numbers_where_text_is_meant(write: Any) -> None:
    assert parse(*NEEDED, "--config", write("attention: {layers: 3}")).attention.layers == "3"


@settings(max_examples=10, deadline=None)
@given(
    learning=st.floats(1e-9, 1.0),
    stops=st.lists(st.text(max_size=5), max_size=3),
    markers=st.none() | st.tuples(st.text(min_size=1, max_size=3), st.text(min_size=1, max_size=3)),
    limit=st.none() | st.integers(1, 10**9),
    text=st.text(max_size=8),
    flag=st.booleans(),
)
def test_yaml_round_trip(
    tmp_path_factory: Any, learning: float, stops: list[str], markers: Any, limit: int | None, text: str, flag: bool
) -> None:
    config = TrainConfig(
        model=ModelConfig(path=text),
        data=DataConfig(path="null", limit=limit),
        output_dir="1e3",
        sampling=SamplingConfig(stop_strings=stops, temperature=learning),
        salience=SalienceConfig(markers=markers),
        attention=AttentionConfig(layers="1,2"),
        reward=RewardConfig(functions=["a.b", "c.d"], function_weights=[learning, 1.0]),
        run=RunConfig(resume=flag),
    )
    path = tmp_path_factory.mktemp("yaml") / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert parse("--config", str(path)) == config


# ---- mistakes ----


def test_a_misspelt_flag_suggests_the_right_one() -> None:
    assert error_of(*NEEDED, "--ppo.learning_rat", "1") == (
        "unknown flag --ppo.learning_rat; did you mean '--ppo.learning_rate'?"
    )
    assert "'--ppo.learning_rate'" in error_of(*NEEDED, "--learning_rate", "1")
    assert "--help" in error_of(*NEEDED, "--xyzzy", "1")


def test_a_misspelt_key_in_the_file_suggests_the_right_one(write: Any) -> None:
    file = write("ppo:\n  learning_rat: 1\n")
    expected = f"{file}: unknown key 'ppo.learning_rat'; did you mean 'ppo.learning_rate'?"
    assert error_of(*NEEDED, "--config", file) == expected
    assert "did you mean 'reward'?" in error_of(*NEEDED, "--config", write("rewards: {}"))


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--ppo.learning_rate", "abc"], ["--ppo.learning_rate", "number", "'abc'"]),
        (["--run.steps", "3.5"], ["--run.steps", "integer", "'3.5'"]),
        (["--model.dtype", "float8"], ["--model.dtype", "'float32'", "'bfloat16'", "'float8'"]),
        (["--run.steps"], ["--run.steps", "needs a value"]),
        (["--output_dir", "a", "b"], ["--output_dir", "one value", "'b'"]),
        (["--run.resume", "maybe"], ["--run.resume", "switch", "--run.no_resume"]),
        (["--salience.markers", "x"], ["--salience.markers", "'x'"]),
        (["--config"], ["--config", "YAML"]),
        (["--config", "/nowhere/c.yaml"], ["/nowhere/c.yaml", "does not exist"]),
    ],
)
def test_a_wrong_value_names_the_flag(words: list[str], parts: list[str]) -> None:
    message = error_of(*NEEDED, *words)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("ppo: {learning_rate: fast}", ["'ppo.learning_rate'", "number", "'fast'"]),
        ("run: {steps: true}", ["'run.steps'", "true"]),
        ("run: {steps: [1]}", ["'run.steps'", "integer"]),
        ("sampling: {stop_strings: stop}", ["'sampling.stop_strings'", "list"]),
        ("ppo: 3", ["'ppo'", "group"]),
        ("- 1", ["list"]),
        ("a: [1", ["line", "YAML"]),
    ],
)
def test_a_wrong_value_in_the_file_names_file_and_key(write: Any, text: str, parts: list[str]) -> None:
    file = write(text)
    message = error_of(*NEEDED, "--config", file)
    assert all(part in message for part in [file, *parts]), message


def test_missing_settings_are_named_with_the_flags_that_give_them(write: Any) -> None:
    assert error_of("--model", "m").startswith("--data, --output_dir are missing")
    assert error_of("--config", write("output_dir: o\ndata: {path: d}")).startswith("--model is missing")
    assert error_of("surplus").startswith("'surplus' is no flag")


# ---- the command ----


@dataclass(frozen=True)
class FakeConfig:
    """Settings of a command for these tests."""

    data: DataConfig
    fail: str = "no"
    """How to end."""
    numbers: list[int] = field(default_factory=list)
    """Some numbers."""


@pytest.fixture
def fake_command(monkeypatch: pytest.MonkeyPatch) -> list[FakeConfig]:
    """Put a fake in the place of ``cagsr score`` and collect the configs it is run with."""
    seen: list[FakeConfig] = []
    failures: dict[str, BaseException] = {
        "data": DataError("prompts.jsonl, row 7: malformed JSON; mend that line."),
        "stop": MonitorStop("the KL is above 20; the last checkpoint is intact."),
        "interrupt": KeyboardInterrupt(),
        "bug": ZeroDivisionError("a bug"),
        "disk": OSError(28, "No space left on device", "out.jsonl"),
    }

    def run(config: FakeConfig) -> None:
        seen.append(config)
        if config.fail in failures:
            raise failures[config.fail]

    parts = {"config": FakeConfig, "run": run}
    monkeypatch.setattr(commands_main, "part_of", lambda name, part: parts[part])
    return seen


def test_main_runs_the_command_with_its_config(fake_command: list[FakeConfig]) -> None:
    assert main(["score", "--data", "d", "--numbers", "1", "2"]) == 0
    assert fake_command == [FakeConfig(DataConfig("d"), numbers=[1, 2])]


@pytest.mark.parametrize(
    ("how", "status", "part"),
    [
        ("data", 2, "cagsr train: error: prompts.jsonl, row 7: malformed JSON; mend that line."),
        ("stop", 2, "cagsr train: error: the KL is above 20"),
        ("interrupt", 130, "cagsr train: interrupted; go on with --resume"),
        ("disk", 2, "No space left on device: out.jsonl"),
    ],
)
def test_failures_become_one_line_and_an_exit_status(
    fake_command: list[FakeConfig], capsys: pytest.CaptureFixture[str], how: str, status: int, part: str
) -> None:
    assert main(["train", "--data", "d", "--fail", how]) == status
    printed = capsys.readouterr()
    assert part in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_bugs_keep_their_traceback(fake_command: list[FakeConfig]) -> None:
    with pytest.raises(ZeroDivisionError):
        main(["score", "--data", "d", "--fail", "bug"])


def test_unknown_commands_and_flags_exit_with_status_2(
    fake_command: list[FakeConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scoer"]) == 2
    assert "did you mean 'score'?" in capsys.readouterr().err
    assert main(["score", "--dat", "d"]) == 2
    assert capsys.readouterr().err.startswith("cagsr score: error: unknown flag --dat")
    assert not fake_command


def test_the_help_names_every_command_and_the_version_is_told(
    fake_command: list[FakeConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([]) == main(["--help"]) == main(["--version"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in COMMANDS)
    assert main(["score", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "How to end." in printed
    assert "--data.prompt_column" in printed
    assert "--data = --data.path" in printed
    assert COMMANDS["score"].examples in printed


WITH_A_REWARD = {"train", "score", "rank", "calibrate", "diagnose", "view", "serve"}
"""Commands with a reward among their settings: a term is one file with its formula, which needs torch."""


def test_help_and_mistakes_of_commands_without_a_reward_need_no_torch() -> None:
    names = sorted(set(COMMANDS) - WITH_A_REWARD)
    code = (
        "import sys\nfrom cagsr.commands.main import main\n"
        f"assert main(['--help']) == 0 and not any(main([name, '--help']) for name in {names})\n"
        "assert main(['sft', '--modle', 'x']) == 2 and main(['trian']) == 2\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        # settings, plans and runs are read without what models are made of, whose import takes seconds
        "import cagsr.compare.worker, cagsr.compare.comparison_report, cagsr.run_page.read_run\n"
        "assert not {'transformers.modeling_utils', 'accelerate', 'peft', 'scipy.stats'} & set(sys.modules)"
    )
    said = apart.finish(apart.python("-c", code))
    assert "did you mean '--model'?" in said
    assert "did you mean 'train'?" in said


def test_commands_with_a_reward_are_those_that_have_one() -> None:
    with_one = {
        name for name in COMMANDS if any(key.startswith("reward.") for key, _ in leaf_types(part_of(name, "config")))
    }
    assert with_one == WITH_A_REWARD


def test_the_config_of_a_training_run_serves_other_commands(tmp_path, capsys):
    from cagsr.commands.rank import Config as RankConfig
    from cagsr.config import DataConfig, ModelConfig, RewardConfig, SelfCertaintyConfig, TrainConfig

    trained = TrainConfig(
        model=ModelConfig("start"),
        data=DataConfig("prompts.jsonl"),
        output_dir="run",
        reward=RewardConfig(self_certainty=SelfCertaintyConfig(weight=0.7)),
    )
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(trained))
    found = parse_command(RankConfig, ["--config", str(file), "--model", "run/final"], prog="cagsr rank")
    assert found.reward.self_certainty.weight == 0.7
    assert found.model.path == "run/final"
    assert "left out what only training has: output_dir" in capsys.readouterr().err
    # a slip is still a slip
    file.write_text("reward:\n  self_certanty: {weight: 1}\n")
    with pytest.raises(ConfigError, match=r"reward\.self_certainty"):
        parse_command(RankConfig, ["--config", str(file), "--model", "m"], prog="cagsr rank")
