"""``cagsr train`` as a user runs it: what a run leaves behind, resuming, and bad input."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

import apart
import tiny
from cagsr.commands.main import main
from cagsr.runs.best import Best
from rows_sampled import rows_sampled_at_once

SMALL = [
    "--run.batch_size",
    "3",
    "--sampling.num_generations",
    "2",
    "--sampling.max_new_tokens",
    "5",
    "--evaluation.held_out",
    "2",
    "--evaluation.every",
    "3",
    "--model.device",
    "cpu",
    "--ppo.num_ppo_epochs",
    "2",
    "--ppo.num_mini_batches",
    "2",
]


@pytest.fixture
def start(tmp_path: Path) -> Path:
    return tiny.save_model(tmp_path / "start")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return tiny.save_prompts(tmp_path / "prompts.jsonl")


def arguments(start: Path, prompts: Path, run: Path, *more: str) -> list[str]:
    return ["train", "--model", str(start), "--data", str(prompts), "--output_dir", str(run), *SMALL, *more]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """Run, expect status 2 and one sentence without a traceback; return it."""
    capsys.readouterr()
    assert main(argv) == 2
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if "error:" in line]
    assert len(errors) == 1, said
    assert "Traceback" not in said
    return errors[0]


def test_answers_are_sampled_as_many_as_rollout_batch_size_at_once(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"tell me about {'the cat ' * n}"}) + "\n" for n in range(1, 26)))
    rows = rows_sampled_at_once(monkeypatch)
    own = ["--ppo.micro_batch_size", "1", "--rollout.batch_size", "4", "--reward.associated_coverage.weight", "1"]
    run = arguments(start, prompts, tmp_path / "run", *own, "--reward.associations.answers", "23", "--steps", "1")
    assert main(run) == 0
    held_out = [2, 2]  # sampled and greedy
    of_run = rows[:-1]  # the last are a test of the saved model
    assert of_run == [*[4] * 5, 3, *held_out, 4, 2, *held_out], "associations, held out, the step, held out again"


@pytest.mark.renders
def test_a_run_leaves_everything_it_promises(start: Path, prompts: Path, tmp_path: Path):
    run = tmp_path / "run"
    watched = ["--reward.watched", "lexical_support", "faithfulness"]
    assert main(arguments(start, prompts, run, "--steps", "4", "--run.save_every", "2", *watched)) == 0
    metrics = lines(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2, 3, 4]
    assert "eval/metric" in metrics[0]
    assert "eval/metric_greedy" in metrics[3]
    assert {"objective/kl", "policy/clipfrac_avg", "rewards/grounded_coverage/share", "val/ratio"} <= metrics[1].keys()
    sample = lines(run / "samples.jsonl")[0]
    assert sample["reward"] == pytest.approx(sum(sample["contributions"].values()), abs=1e-5)
    # What is watched is measured of every answer, and is no part of the reward.
    assert {"lexical_support", "faithfulness"} <= sample["terms"].keys() - sample["contributions"].keys()
    assert {"rewards/lexical_support/mean", "rewards/faithfulness/agreement"} <= metrics[1].keys()
    answers = lines(run / "held_out.jsonl")
    assert [row["step"] for row in answers] == [0, 0, 3, 3, 4, 4]
    assert {row["prompt"] for row in answers if row["step"] == 0} == {
        row["prompt"] for row in answers if row["step"] == 4
    }
    assert metrics[0]["eval/metric_greedy"] == pytest.approx(sum(row["metric"] for row in answers[:2]) / 2)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    assert not list(run.rglob("*.bin"))
    assert not list(run.rglob("*.pt"))
    assert AutoModelForCausalLM.from_pretrained(run / "final").config.model_type == "llama"
    assert AutoTokenizer.from_pretrained(run / "final").pad_token == "<pad>"
    card = (run / "final" / "README.md").read_text()
    assert "cagsr" in card
    assert (run / "curves.png").stat().st_size > 10_000
    # the stored config repeats the run
    again = tmp_path / "again"
    assert main(["train", "--config", str(run / "config.yaml"), "--output_dir", str(again)]) == 0
    assert (again / "metrics.jsonl").read_text() == (run / "metrics.jsonl").read_text()


@pytest.mark.parametrize("lora", [[], ["--lora_r", "2"]])
def test_a_run_may_end_with_its_best_evaluation(
    start: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lora: list[str],
):
    """The metric is best after step 2; what is saved is the policy of then, and its card and the last line say so."""
    (tmp_path / f"falling{len(lora)}.py").write_text(
        "VALUES = iter([0, 0.1, 0, 0.3, 0, 0.8, 0, 0.8, 0, 0.2])  # sampled, greedy: before, and after each step\n"
        "def metric(prompts, completions, **columns):\n"
        "    value = next(VALUES)\n"
        "    return [value] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    run = tmp_path / "run"
    own = ["--steps", "4", "--run.save_every", "1", "--run.save_total_limit", "9", "--evaluation.every", "1", *lora]
    asked = ["--run.load_best_model_at_end", "--evaluation.metric", f"falling{len(lora)}.metric"]
    assert main(arguments(start, prompts, run, *own, *asked)) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "The best evaluation was that of step 2: final/ is the policy as it was then." in told
    assert "greedy 0.100 -> 0.800" in told
    name = "final-adapter/adapter_model.safetensors" if lora else "final/model.safetensors"
    kept = load_file(run / "checkpoints" / "step-000002" / "policy.safetensors")
    last = load_file(run / "checkpoints" / "step-000004" / "policy.safetensors")
    saved = load_file(run / name)
    largest = next(key for key in kept if "q_proj" in key)
    same = next(key for key in saved if key.split("base_model.model.")[-1].replace(".weight", "") in largest)
    assert torch.equal(saved[same], kept[largest])
    assert not torch.equal(saved[same], last[largest])
    assert [path.name for path in (run / "best").iterdir()] == ["step-000002"]


def test_the_best_of_a_resumed_run_is_its_own(tmp_path: Path):
    """Until the next checkpoint the best of the last one stays; what came after it is forgotten with the steps."""
    modules = {"policy": torch.nn.Linear(1, 1, bias=False)}
    best = Best(tmp_path / "best", modules, False, Accelerator(cpu=True))

    def at(step: int, metric: float, weight: float) -> bool:
        torch.nn.init.constant_(modules["policy"].weight, weight)
        return best.observe(step, {"eval/metric": 0.0, "eval/metric_greedy": metric})

    assert best.restore() is None
    assert at(1, 0.5, 1.0)
    best.settled()  # a checkpoint at step 2
    assert not at(3, 0.5, 3.0)  # of equals the earlier one
    assert at(4, 0.9, 4.0)
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == ["step-000001", "step-000004"]
    best.resumed(2)
    assert best.known() == (1, 0.5)
    assert at(3, 0.95, 30.0)
    assert not at(4, 0.7, 40.0)
    best.settled()
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["step-000003"]
    assert best.restore() == 3
    assert float(modules["policy"].weight) == 30.0


@pytest.mark.parametrize(
    "extra", [[], ["--lora_r", "2"], ["--ppo.kl_controller", "adaptive", "--ppo.lr_scheduler", "linear"]]
)
def test_resumed_is_bit_for_bit_the_uninterrupted_run(start: Path, prompts: Path, tmp_path: Path, extra: list[str]):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    common = ["--steps", "5", "--run.save_every", "2", *extra]
    assert main(arguments(start, prompts, whole, *common)) == 0
    # stopped after step 3: the checkpoint of step 2 is the last, and step 3 is done again
    stop = ["--monitors.length_drift", "-1", "--monitors.length_drift_action", "stop", "--monitors.patience", "3"]
    assert main(arguments(start, prompts, halves, *common, *stop)) == 2
    for path in (halves / "checkpoints").glob("step-000003"):
        import shutil

        shutil.rmtree(path)
    assert main(arguments(start, prompts, halves, *common, "--resume")) == 0
    assert (halves / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert (halves / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    assert (halves / "held_out.jsonl").read_bytes() == (whole / "held_out.jsonl").read_bytes()
    name = "model.safetensors"
    assert (halves / "final" / name).read_bytes() == (whole / "final" / name).read_bytes()


def test_killed_at_random_moments_and_resumed(start: Path, prompts: Path, tmp_path: Path):
    """SIGKILL, several times, then resumed: the metrics are those of the uninterrupted run."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    common = ["--steps", "8", "--run.save_every", "1"]
    assert main(arguments(start, prompts, whole, *common)) == 0
    moments = random.Random(0)
    kills = 0
    for attempt in range(12):
        resume = ["--resume"] if attempt else []
        with apart.cagsr(*arguments(start, prompts, killed, *common), *resume) as process:
            target = 1 + 2 * kills  # let it get past another step or two, then kill it soon after
            while process.status is None and kills < 3:
                metrics = killed / "metrics.jsonl"
                if metrics.exists() and metrics.read_bytes().count(b"\n") > target:
                    time.sleep(moments.random() * 0.15)
                    process.kill()
                    break
                time.sleep(0.01)
            if (status := process.wait()) == 0:
                break
            assert status == -signal.SIGKILL, process.said
            kills += 1
    assert kills == 3
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_an_output_folder_with_another_run(start: Path, prompts: Path, tmp_path: Path, capsys):
    run = tmp_path / "a run"
    assert main(arguments(start, prompts, run, "--steps", "1")) == 0
    card = (run / "final" / "README.md").read_text()
    assert f"--config '{run}/config.yaml' " in card
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert "holds another run" in refused(capsys, arguments(start, prompts, run, "--steps", "1"))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert main(arguments(start, prompts, run, "--steps", "1", "--overwrite")) == 0
    # --overwrite is not stored: the run's config can be resumed, and used for another folder, without taking it back
    assert main(["train", "--config", str(run / "config.yaml"), "--resume", "--steps", "2"]) == 0
    assert lines(run / "metrics.jsonl")[-1]["step"] == 2


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "empty"),
        ('{"prompt": "the cat"}\n' * 6 + '{"prompt": "the\n', "row 7"),
        ('{"prompt": "the cat"}\n{"question": "the dog"}\n', "row 2"),
        ('{"prompt": "the cat"}\n{"prompt": ""}\n', "row 2"),
        ('{"prompt": "the cat"}\n{"prompt": "' + "cat " * 80 + '"}\n', "row 2"),
        ('{"prompt": "the cat"}\n{"prompt": "<bos> <eos>"}\n', "row 2"),
    ],
)
def test_bad_prompts(start: Path, tmp_path: Path, capsys, content: str, expected: str):
    prompts = tmp_path / "bad.jsonl"
    prompts.write_text(content)
    run = tmp_path / "run"
    sentence = refused(capsys, arguments(start, prompts, run))
    assert expected in sentence
    assert "bad.jsonl" in sentence
    assert not run.exists()


def test_bad_model_and_settings(start: Path, prompts: Path, tmp_path: Path, capsys):
    run = tmp_path / "run"
    assert "no such folder" in refused(capsys, arguments(tmp_path / "nothing", prompts, run))
    (start / "model.safetensors").rename(start / "pytorch_model.bin")
    assert "pickled" in refused(capsys, arguments(start, prompts, run))
    (start / "pytorch_model.bin").rename(start / "model.safetensors")
    cases = {
        "--ppo.learning_rat": ("1e-3", "ppo.learning_rate"),
        "--sampling.temperature": ("0", "must be above 0"),
        "--sampling.max_new_tokens": ("64", "no room for a prompt"),
        "--reward.coverage.weight": ("many", "reward.coverage.weight"),
        "--attention.layers": ("last", "layers"),
        "--evaluation.metric": ("nowhere.metric", "nowhere.metric"),
        "--ppo.kl_in": ("loss", "k3"),
        "--run.seed": ("-1", "must lie between 0 and"),
        "--seed": ("4294967296", "--run.seed 4294967296"),
    }
    for flag, (value, expected) in cases.items():
        assert expected in refused(capsys, arguments(start, prompts, run, flag, value)), flag
    config = tmp_path / "config.yaml"
    config.write_text("ppo:\n  learning_rat: 0.001\n")
    assert "ppo.learning_rate" in refused(capsys, [*arguments(start, prompts, run), "--config", str(config)])
    assert not run.exists()


@pytest.mark.parametrize("pad", [None, "<eos>"])
def test_tokenizer_without_a_pad_of_its_own(prompts: Path, tmp_path: Path, capsys, pad: str | None):
    start = tiny.save_model(tmp_path / "padless", pad=pad)
    run = tmp_path / "run"
    assert "--model.pad_token" in refused(capsys, arguments(start, prompts, run))
    assert not run.exists()
    assert main(arguments(start, prompts, run, "--steps", "1", "--model.pad_token", "<new_pad>")) == 0
    assert AutoTokenizer.from_pretrained(run / "final").pad_token == "<new_pad>"


def test_a_reward_that_is_not_a_number_stops_with_term_step_and_prompt(
    start: Path, prompts: Path, tmp_path: Path, capsys, monkeypatch
):
    (tmp_path / "broken_reward.py").write_text(
        "calls = 0\n"
        "def late_nan(prompts, completions, completion_ids, **columns):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    return [float('nan') if calls == 3 and i == 4 else 1.0 * i for i in range(len(prompts))]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    run = tmp_path / "run"
    more = ["--reward.functions", "broken_reward.late_nan", "--run.save_every", "1", "--steps", "5"]
    sentence = refused(capsys, arguments(start, prompts, run, *more))
    assert "late_nan" in sentence
    assert "step 3" in sentence
    assert "tell me about" in sentence
    assert "step-000002" in sentence
    assert [row["step"] for row in lines(run / "metrics.jsonl")] == [0, 1, 2]
    from cagsr.runs.checkpoint import latest_checkpoint

    assert latest_checkpoint(run / "checkpoints").step == 2


def test_a_profile_says_where_the_time_went(start: Path, prompts: Path, tmp_path: Path, capsys):
    run = tmp_path / "run"
    assert main(arguments(start, prompts, run, "--steps", "4", "--profile")) == 0
    text = (run / "profile.md").read_text()
    timings = lines(run / "timings.jsonl")
    kept = [row for row in timings if row["step"] != 2]  # the step whose operators were recorded is left out
    seconds = sum(row["rollout_seconds"] for row in kept) / len(kept)
    assert f"| rollout | {seconds:.3f} |" in text
    for row in timings:
        inside = sum(row[f"{part}_seconds"] for part in ("rollout", "scoring", "reference", "reward"))
        assert 0.5 * row["collect_seconds"] < inside <= row["collect_seconds"]
    assert "aten::" in text
    assert "Where the time of" in capsys.readouterr().out
    # A profile is no setting of the run: it can be resumed without.
    assert "profile: true" not in (run / "config.yaml").read_text()


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoder_models_train_end_to_end(kind: str, prompts: Path, tmp_path: Path):
    start = tiny.save_model(tmp_path / "start", kind)
    run = tmp_path / "run"
    assert main(arguments(start, prompts, run, "--steps", "2")) == 0
    rows = lines(run / "metrics.jsonl")
    assert rows[-1]["step"] == 2
    assert rows[1]["rewards/grounded_coverage/std"] > 0


def test_unreadable_attention_is_refused(prompts: Path, tmp_path: Path, capsys):
    import torch
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    size = len(tiny.SPECIAL) + len(tiny.WORDS)
    model = BloomForCausalLM(BloomConfig(vocab_size=size, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0))
    model.save_pretrained(tmp_path / "bloom")
    tiny.tokenizer().save_pretrained(tmp_path / "bloom")
    sentence = refused(capsys, arguments(tmp_path / "bloom", prompts, tmp_path / "run"))
    assert "bloom" in sentence
    assert not (tmp_path / "run").exists()


def test_what_is_said_of_tokens_and_templates_is_no_markup(start: Path, prompts: Path, tmp_path: Path, capsys):
    """A chat template whose turns end with what rich would take for a closing tag."""
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.add_tokens([AddedToken("[/s]", special=True)])
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}[/s]{% endfor %}"
    tokenizer.save_pretrained(start)
    model = AutoModelForCausalLM.from_pretrained(start)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(start)
    assert main(arguments(start, prompts, tmp_path / "run", "--steps", "1", "--evaluation.held_out", "0")) == 0
    said = "".join(capsys.readouterr())
    assert "'[/s]' ends answers too" in " ".join(said.split())
