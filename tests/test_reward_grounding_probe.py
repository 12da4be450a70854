"""The grounding probe: swaps, hidden states at the right tokens, the fit, the term by hand, and a whole run."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from cagsr.commands.main import main
from cagsr.config import AttentionConfig, ModelConfig, ProbeConfig, RewardConfig, SalienceConfig, SamplingConfig
from cagsr.errors import ConfigError, DataError
from cagsr.flow import EncodedPrompt, EpisodeBatch, Prompt
from cagsr.models.inputs import PassInputs
from cagsr.models.layer_probe import LayerProbe, at_tokens, hidden_states_of, layers_of
from cagsr.models.load import load_model
from cagsr.models.reference import Reference
from cagsr.prompts.counterfactual import Counterfactuals, held_words
from cagsr.prompts.prepare import encode_texts
from cagsr.prompts.salience import DocumentFrequency
from cagsr.prompts.stating_words import StatingWords
from cagsr.reward import learn_probe
from cagsr.reward.answers import AnswerScorer
from cagsr.reward.learn_probe import Examples, Probe, auc, fit, fit_probe, read_probe, spread
from cagsr.reward.terms.grounding_probe import denied
from cagsr.scoring.answers import answered, encode_response
from cagsr.scoring.scorer import Scorer

UNIFORM = SalienceConfig(weighting="uniform")
RECORDS = [
    Prompt(row, text)
    for row, text in enumerate(
        ["name[The Eagle], area[city centre]", "name[Cotto], area[riverside]", "name[The Cricketers], area[riverside]"]
        * 3
    )
]


def stating() -> StatingWords:
    return StatingWords(DocumentFrequency(100, {"name": 100, "area": 100, "the": 3, **dict.fromkeys(
        ("eagle", "cotto", "cricketers", "city", "centre", "riverside"), 2)}))  # fmt: skip


# ---- counterfactual prompts ----


def test_phrases_are_runs_of_stating_words():
    swaps = Counterfactuals(RECORDS, stating())
    text = RECORDS[0].text
    found = [(text[one.start : one.end], one.kind) for one in swaps.phrases(RECORDS[0])]
    assert found == [("The Eagle", "name"), ("city centre", "area")]
    # A template's words are nobody's.
    template = replace(RECORDS[0], template=((0, 21),))
    assert [one.kind for one in swaps.phrases(template)] == [""]


def test_one_phrase_that_the_answer_says_is_swapped_for_one_of_its_kind():
    swaps = Counterfactuals(RECORDS, stating())
    (found,) = swaps.of(RECORDS[0], "In the city centre.", 5, random.Random(0))
    assert found.text == "name[The Eagle], area[riverside]"
    assert found.lost == {"city", "centre"}
    both = swaps.of(RECORDS[0], "The Eagle is in the city centre.", 5, random.Random(0))
    assert {one.lost for one in both} == {
        frozenset({"city", "centre"}),
        frozenset({"eagle", "the"}),
        frozenset({"eagle"}),
    } & {one.lost for one in both}
    assert len(both) == 2
    assert len(swaps.of(RECORDS[0], "The Eagle is in the city centre.", 1, random.Random(0))) == 1
    assert swaps.of(RECORDS[0], "Nothing of it.", 5, random.Random(0)) == []
    assert held_words(RECORDS[1]) == {"name", "cotto", "area", "riverside"}


# ---- hidden states ----


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "t5", "bart"])
@pytest.mark.parametrize("share", [False, True])
def test_hidden_states_are_those_of_the_answers_own_tokens(kind: str, share: bool, tmp_path: Path):
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path, kind)), device="cpu"))
    prompts = encode_texts(["the red cat", "the red cat", "a big house near the dog"], loaded.tokenizer, UNIFORM, 40)
    said = [
        encode_response(loaded, one, text)
        for one, text in zip(prompts, ["a cat", "dog sees a bird", "tree"], strict=True)
    ]
    episodes = answered(loaded, prompts, said)
    episodes = replace(episodes, prompts=replace(episodes.prompts, group=torch.tensor([0, 0, 1])))
    inputs = PassInputs.of(episodes, share=share)
    with torch.no_grad(), hidden_states_of(loaded.model, {1: lambda states: states.float()}) as seen:
        loaded.hidden_states(inputs)
    found = at_tokens(loaded.architecture, loaded.model, inputs, seen[1])
    for row in range(3):
        prompt = episodes.prompts.ids[row][episodes.prompts.real[row]]
        own = episodes.ids[row][episodes.sampled[row]]
        with torch.no_grad(), hidden_states_of(loaded.model, {1: lambda states: states.float()}) as alone:
            if loaded.architecture.one_sequence:
                loaded.model(input_ids=torch.cat([prompt, own])[None])
                expected = alone[1][0][0, len(prompt) :]
            else:
                start = torch.tensor([loaded.model.config.decoder_start_token_id])
                loaded.model(input_ids=prompt[None], decoder_input_ids=torch.cat([start, own])[None])
                expected = alone[1][0][0, 1:]
        # The stop token's is read of shorter answers only; nobody asks for it.
        torch.testing.assert_close(found[row, : len(own) - 1], expected[: len(own) - 1], atol=1e-4, rtol=1e-4)
    assert (found[:, -1] == 0).all()
    assert len(layers_of(loaded.model)) == 2


@pytest.mark.parametrize("lora", [0, 2])
def test_the_reference_is_asked_where_there_is_one(lora: int, tmp_path: Path):
    """The policy moves and its own hidden states with it; what the probe says stays."""
    from cagsr.config import LoraConfig

    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path)), device="cpu"), LoraConfig(r=lora) if lora else None)
    prompts = encode_texts(["the red cat", "a big house"], loaded.tokenizer, UNIFORM, 40)
    episodes = answered(loaded, prompts, [encode_response(loaded, one, "a dog sees the tree") for one in prompts])
    probe = LayerProbe(0, torch.linspace(-1, 1, 32), 0.25)
    reference = Reference(loaded)
    scorer = Scorer(loaded, AttentionConfig(), SamplingConfig(), 1, reference=reference, probe=probe)
    before, _ = scorer.read(episodes)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if parameter.requires_grad and parameter.dim() == 2:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    after, _ = scorer.read(episodes)
    assert before.support is not None
    assert before.support.shape == episodes.ids.shape
    assert torch.equal(before.support, after.support)
    assert not torch.equal(before.logprobs, after.logprobs)
    moved = Scorer(loaded, AttentionConfig(), SamplingConfig(), 8, probe=probe).read(episodes)[0].support
    assert moved is not None
    assert not torch.allclose(moved, before.support, atol=1e-3)
    without, _ = Scorer(loaded, AttentionConfig(), SamplingConfig(), 8).read(episodes)
    assert without.support is None


# ---- the fit ----


def test_auc_by_hand():
    scores, positive = np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, True, False, True])
    assert auc(scores, positive) == pytest.approx((1 + 0.5 + 1 + 1) / 4)


def made_up(words: int, seed: int, informative: int) -> Examples:
    draw = np.random.default_rng(seed)
    supported = draw.random(words) < 0.8
    hidden = {layer: torch.from_numpy(draw.normal(size=(words, 6))).float() for layer in (0, 2, 4)}
    hidden[informative][:, 3] += torch.from_numpy(np.where(supported, 2.0, -2.0)).float()
    return Examples(hidden, supported, draw.integers(0, 40, words))


def test_the_layer_that_tells_is_chosen():
    found = fit_probe(made_up(600, 0, informative=2))
    assert found.layer.layer == 2
    assert found.auc > 0.97
    assert found.by_layer[0] < 0.65
    assert int(found.layer.weight.argmax()) == 3
    assert (found.supported, found.swapped) == (
        int(made_up(600, 0, 2).supported.sum()),
        int((~made_up(600, 0, 2).supported).sum()),
    )
    # Standardised and back: logits do not depend on the scale of a dimension.
    examples = made_up(600, 0, informative=2)
    weight, bias = fit(examples.hidden[2], examples.supported)
    scaled, same_bias = fit(examples.hidden[2] * torch.tensor([1, 1, 1, 10, 1, 1.0]), examples.supported)
    torch.testing.assert_close(scaled * torch.tensor([1, 1, 1, 10, 1, 1.0]), weight, atol=2e-3, rtol=2e-3)
    assert same_bias == pytest.approx(bias, abs=2e-3)
    with pytest.raises(ConfigError, match="needs 30 words"):
        fit_probe(made_up(60, 0, informative=2))


def test_layers_are_spread():
    assert spread(range(2)) == (0, 1)
    assert spread(range(8)) == tuple(range(8))
    assert spread(range(18)) == (0, 2, 5, 7, 10, 12, 15, 17)


def test_a_probe_is_kept_as_it_is(tmp_path: Path):
    found = fit_probe(made_up(600, 0, informative=2))
    path = tmp_path / "grounding_probe.json"
    path.write_text(json.dumps(found.to_json()))
    again = read_probe(path)
    assert torch.equal(again.layer.weight, found.layer.weight)
    assert replace(again, layer=found.layer) == found
    path.write_text("{}")
    with pytest.raises(DataError, match=r"grounding_probe\.json"):
        read_probe(path)


# ---- the term ----


def test_what_is_denied_by_hand():
    #                        word 0 (two pieces)  none  word 1  none
    support = torch.tensor([[2.0, -4.0, 9.0, 3.0, 5.0], [-1.0, 0.0, -2.0, 0.0, 0.0]])
    word = torch.tensor([[0, 0, -1, 1, -1], [0, -1, 1, -1, -1]])
    found = denied(support, word, torch.tensor([5, 4]))
    # Word 0 is denied by -1 on average, word 1 affirmed, which earns nothing.
    torch.testing.assert_close(found, torch.tensor([[0.0, -0.2, 0.0, 0.0, 0.0], [-0.25, 0.0, -0.5, 0.0, 0.0]]))
    assert denied(support, torch.full_like(word, -1), torch.tensor([5, 4])).tolist() == [[0.0] * 5] * 2


def test_an_answer_is_judged_alike_alone_and_beside_a_longer_one(tmp_path: Path):
    """The last token of a cut answer has a hidden state only where a longer one stands beside it: it is never asked."""
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path)), device="cpu"))
    frequency = DocumentFrequency(100, dict.fromkeys(("cat", "dog", "bird", "red"), 2))
    probe = Probe(LayerProbe(1, torch.linspace(-1, 1, 32), -3.0), 1.0, {1: 1.0}, 30, 30)
    asked = encode_texts(["the red cat"] * 2, loaded.tokenizer, UNIFORM, 40)
    cut = encode_response(loaded, asked[0], "a red dog", ended=False)
    longer = encode_response(loaded, asked[1], "a bird sees the red dog near the tree")
    reward = RewardConfig(watched=["grounding_probe"])
    scorer = AnswerScorer(loaded, reward, AttentionConfig(), UNIFORM, frequency=frequency, probe=probe)
    alone = scorer.raw_values(asked[:1], [cut])["grounding_probe"]
    beside = scorer.raw_values(asked, [cut, longer])["grounding_probe"]
    assert float(alone[0]) < 0
    assert float(beside[0]) == pytest.approx(float(alone[0]), abs=1e-6)


@pytest.mark.parametrize(("layer", "width"), [(0, 16), (5, 32)])
def test_a_probe_of_another_model_is_refused(layer: int, width: int, tmp_path: Path):
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path)), device="cpu"))
    with pytest.raises(ConfigError, match="probe is another model's"):
        Scorer(loaded, AttentionConfig(), SamplingConfig(), 8, probe=LayerProbe(layer, torch.zeros(width), 0.0))


def test_swaps_that_the_model_has_no_room_for_are_left_out(tmp_path: Path):
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path, "gpt2")), device="cpu"))
    texts = [
        *("likes " + "cat dog bird " * 4 + ". " + "the " * 38 for _ in range(2)),
        *(f"likes {one} ." for one in COLOURS),
    ]
    texts += [f"likes {'red blue green big ' * 6}. the the" for _ in range(2)]
    prompts = encode_texts([text.strip() for text in texts], loaded.tokenizer, UNIFORM, 60)
    frequency = DocumentFrequency.fit(one.prompt for one in prompts)
    found = learn_probe.examples_of(
        loaded, prompts, frequency, SamplingConfig(max_new_tokens=4), ProbeConfig(answers=16), 0, 16
    )
    assert set(found.hidden) == {0, 1}  # no position was asked that the model has not


# ---- a model that does look ----


@pytest.fixture(scope="module")
def copier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that says the colour and the animal of its prompt, mostly: trained for a few seconds."""
    folder = tmp_path_factory.mktemp("copier")
    tiny.save_model(folder, scale=1.0)
    rows = []
    draw = random.Random(0)
    for _ in range(240):
        colour, animal = draw.choice(COLOURS), draw.choice(ANIMALS)
        rows.append(
            {"prompt": f"tell me about the {colour} {animal}", "completion": f" the {animal} likes a {colour} house"}
        )
    data = folder / "sft.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = folder / "trained"
    flags = [
        "--learning_rate",
        "1e-2",
        "--epochs",
        "8",
        "--batch_size",
        "32",
        "--save_every",
        "0",
        "--model.device",
        "cpu",
    ]
    assert main(["sft", "--model", str(folder), "--data", str(data), "--output_dir", str(out), *flags]) == 0
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows[:80]))
    return folder


COLOURS = ("red", "blue", "green", "big")
ANIMALS = ("cat", "dog", "bird", "tree")


def test_examples_are_hidden_states_of_words_under_true_and_swapped_prompts(
    copier: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each against a pass of its own over prompt and answer; what no prompt says (house) is no example."""
    loaded = load_model(ModelConfig(str(copier / "trained"), device="cpu"))
    texts = [f"tell me about the {colour} {animal}" for colour in COLOURS for animal in ANIMALS]
    frequency = DocumentFrequency.fit(one.prompt for one in encode_texts(texts, loaded.tokenizer, UNIFORM, 40))
    prompts = encode_texts(texts, loaded.tokenizer, UNIFORM, 40, frequency)
    asked = [prompts[0], prompts[0]]  # the red cat
    said = [" the cat likes a red house", " a bird and a red dog"]
    responses = [encode_response(loaded, one, text) for one, text in zip(asked, said, strict=True)]

    def sampled(*_: object) -> Iterator[tuple[list[EncodedPrompt], EpisodeBatch]]:
        yield [prompts[0]], answered(loaded, asked, responses)

    monkeypatch.setattr(learn_probe, "sample_in_batches", sampled)
    config = ProbeConfig(answers=4, counterfactuals=2)
    monkeypatch.setattr(learn_probe, "ANSWERS_TO_A_PROMPT", 2)
    found = learn_probe.examples_of(loaded, prompts[:1] * 2 + prompts, frequency, SamplingConfig(), config, 0, 32)
    assert set(found.hidden) == {0, 1}
    # cat and red of the first answer, red of the second: under the true prompt, and each under one from which it was swapped.
    # "red cat" is one phrase here: another one of the set loses a word, or both.
    assert found.supported.sum() == 3
    assert (~found.supported).sum() >= 2

    def hidden(prompt: str, answer: int, word: str) -> torch.Tensor:
        ids = [*encode_texts([prompt], loaded.tokenizer, UNIFORM, 40)[0].ids, *responses[answer].ids]
        with torch.no_grad(), hidden_states_of(loaded.model, {1: lambda states: states.float()}) as seen:
            loaded.model(input_ids=torch.tensor([ids]))
        place = len(ids) - len(responses[answer].ids) + said[answer].split().index(word)
        return seen[1][0][0, place]

    true = [hidden(texts[0], answer, word) for answer, word in ((0, "cat"), (0, "red"), (1, "red"))]
    others = [one for one in texts if one != texts[0]]
    swapped = [
        hidden(other, answer, word)
        for other in others
        for answer, word in ((0, "cat"), (0, "red"), (1, "red"))
        if word not in other.split()
    ]
    for kind, expected in ((True, true), (False, swapped)):
        for row in found.hidden[1][torch.from_numpy(found.supported == kind)]:
            assert min(float((row - one).abs().max()) for one in expected) < 1e-4


def test_an_answer_that_the_probe_denies_is_worth_less(copier: Path):
    """The probe is set by hand to the direction in which the hidden states of two words differ."""
    loaded = load_model(ModelConfig(str(copier / "trained"), device="cpu"))
    texts = [f"tell me about the {colour} {animal}" for colour in COLOURS for animal in ANIMALS]
    frequency = DocumentFrequency.fit(one.prompt for one in encode_texts(texts, loaded.tokenizer, UNIFORM, 40))
    asked = encode_texts(["tell me about the red cat"] * 2, loaded.tokenizer, UNIFORM, 40, frequency)
    said = [encode_response(loaded, one, text) for one, text in zip(
        asked, [" the cat likes a house", " the bird likes a house"], strict=True)]  # fmt: skip
    episodes = answered(loaded, asked, said)
    with torch.no_grad(), hidden_states_of(loaded.model, {1: lambda states: states.float()}) as seen:
        loaded.hidden_states(PassInputs.of(episodes))
    states = at_tokens(loaded.architecture, loaded.model, PassInputs.of(episodes), seen[1])
    cat, bird = states[0, 1], states[1, 1]
    direction = cat - bird
    # Half the square of their distance for one, minus that for the other.
    probe = LayerProbe(1, direction, -float(direction @ (cat + bird)) / 2)
    reward = RewardConfig(watched=["grounding_probe"])
    known = Probe(probe, 1.0, {1: 1.0}, 30, 30)
    scorer = AnswerScorer(loaded, reward, AttentionConfig(), UNIFORM, frequency=frequency, probe=known)
    good, bad = scorer.raw_values(asked, said)["grounding_probe"].tolist()
    assert good == 0.0
    assert bad == pytest.approx(-float(direction @ direction) / 2 / len(said[1].ids), rel=1e-4)
    with pytest.raises(ConfigError, match="no probe is known here"):
        AnswerScorer(loaded, reward, AttentionConfig(), UNIFORM, frequency=frequency)


def test_a_probe_that_the_policy_has_left_behind_is_found_out(copier: Path, monkeypatch: pytest.MonkeyPatch):
    """The old one looks along a direction that tells nothing any more, one fitted anew finds the other."""
    examples = made_up(600, 0, informative=2)
    monkeypatch.setattr(learn_probe, "examples_of", lambda *_, **__: replace(examples, hidden={2: examples.hidden[2]}))
    loaded = load_model(ModelConfig(str(copier / "trained"), device="cpu"))
    reference = Reference(loaded)
    how = ([], DocumentFrequency(1, {}), SamplingConfig(), ProbeConfig(), reference)
    for direction, sees in ((3, True), (1, False)):
        probe = Probe(LayerProbe(2, torch.eye(6)[direction], 0.0), 1.0, {2: 1.0}, 30, 30)
        kept, again = learn_probe.probe_check(loaded, probe, *how, seed=0, batch_size=8)
        assert again > 0.97
        assert (kept > again - 0.05) == sees


def test_a_run_learns_its_probe_keeps_it_and_others_take_it(
    copier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run, prompts = tmp_path / "run", copier / "prompts.jsonl"
    flags = [
        *("train", "--model", str(copier / "trained"), "--model.device", "cpu", "--data", str(prompts)),
        *("--max_new_tokens", "8", "--reward.grounding_probe.weight", "1", "--reward.grounding_probe.dense"),
        *("--reward.probe.answers", "128", "--run.batch_size", "4", "--sampling.num_generations", "4"),
        *("--evaluation.held_out", "4", "--run.save_every", "1"),
    ]
    assert main([*flags, "--output_dir", str(run), "--steps", "2"]) == 0
    told = capsys.readouterr()
    assert "Grounding probe (" in told.out
    assert "Grounding probe on the trained policy's answers: AUC " in told.err
    probe = read_probe(run / "grounding_probe.json")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert metrics[1]["rewards/grounding_probe/mean"] <= 0.0
    assert metrics[1]["rewards/grounding_probe/std"] > 0.0
    # Resumed, the same probe goes on: it is not learned from a policy that has moved.
    assert main([*flags, "--output_dir", str(run), "--steps", "3", "--resume"]) == 0
    assert f"Grounding probe of {run / 'grounding_probe.json'}" in capsys.readouterr().out
    assert torch.equal(read_probe(run / "grounding_probe.json").layer.weight, probe.layer.weight)
    assert main([*flags, "--output_dir", str(tmp_path / "other"), "--steps", "1", "--reward.probe.layer", "7"]) == 2
    assert "--reward.probe.layer 7: the model has the layers 0 to 1." in capsys.readouterr().err
    best = tmp_path / "best.jsonl"
    ranking = [
        "rank",
        "--model",
        str(run / "final"),
        "--model.device",
        "cpu",
        "--data",
        str(prompts),
        "--data.limit",
        "3",
    ]
    assert main([*ranking, "--reward_from", str(run), "--max_new_tokens", "8", "--output", str(best)]) == 0
    (first, *_) = [json.loads(line) for line in best.read_text().splitlines()]
    assert "grounding_probe" in first["candidates"][0]["terms"]
    assert isinstance(AutoModelForCausalLM.from_pretrained(run / "final"), torch.nn.Module)
