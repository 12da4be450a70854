"""The scoring pass: log-probabilities, values and attention of real tokens, whatever the padding and the batching."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from cagsr.config import AttentionConfig, LoraConfig, ModelConfig, SamplingConfig
from cagsr.flow import EpisodeBatch, Prompt, PromptBatch
from cagsr.models.actor_critic import ActorCritic
from cagsr.models.architecture import teacher_forced
from cagsr.models.inputs import PassInputs
from cagsr.models.load import LoadedModel, load_model
from cagsr.models.reference import Reference
from cagsr.models.sharing import shares_prompts, stop_sharing
from cagsr.reward.micro_batch import TermVisitor
from cagsr.rollout.sample import sample_responses
from cagsr.scoring.micro_batches import micro_batches
from cagsr.scoring.scorer import Scorer
from cagsr.scoring.statistics import entropy_of, logprobs_and
from conversations import conversations, token_by_token
from scored import scored, scored_with_maps

FAMILIES = ["llama", "qwen3", "gpt2", "gpt_neox", "gemma3", "mistral", "t5", "bart"]
TEXTS = ["the cat", "tell me about the small red bird near a house", "a big dog likes the tree", "blue . green"]


def rolled_out(loaded: LoadedModel, copies: int = 2) -> EpisodeBatch:
    texts = [text for text in TEXTS for _ in range(copies)]
    encoded = loaded.tokenizer(texts, return_tensors="pt", padding=True, padding_side=loaded.architecture.padding_side)
    prompts = PromptBatch(
        tuple(Prompt(row, text) for row, text in enumerate(texts, 1)),
        encoded.input_ids,
        encoded.attention_mask.bool(),
        torch.full_like(encoded.input_ids, -1),
        torch.ones(len(texts), 1),
        torch.arange(len(texts)) // copies,
    )
    torch.manual_seed(3)
    return sample_responses(loaded, prompts, SamplingConfig(max_new_tokens=9, temperature=1.3))


@pytest.mark.parametrize("kind", FAMILIES)
def test_one_batch_of_eight_equals_eight_batches_of_one(kind: str, tmp_path: Path):
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path, kind)), device="cpu"))
    rollout = rolled_out(loaded)
    actor_critic = ActorCritic(loaded, value="head")
    torch.nn.init.normal_(actor_critic.value_head.weight)
    sampling = SamplingConfig(temperature=1.3)
    together, maps = scored_with_maps(loaded, rollout, sampling, micro_batch_size=8, actor_critic=actor_critic)
    alone, maps_alone = scored_with_maps(loaded, rollout, sampling, micro_batch_size=1, actor_critic=actor_critic)
    for name in ("logprobs", "entropy", "certainty", "values"):
        torch.testing.assert_close(getattr(together, name), getattr(alone, name), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(maps, maps_alone, atol=2e-5, rtol=1e-4)
    mask = rollout.sampled
    assert (together.logprobs[~mask] == 0).all()
    assert (together.logprobs[mask] < 0).all()
    assert (maps[:, 0].sum(1) > 0.01).all()  # later rows may lie beyond a sliding window
    assert (maps.transpose(1, 2)[~rollout.prompts.real] == 0).all()


@pytest.mark.parametrize("kind", FAMILIES)
def test_scored_policy_is_the_sampled_one(kind: str, tmp_path: Path):
    """Teacher-forced log-probabilities equal those of decoding step by step with a cache."""
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path, kind)), device="cpu"))
    rollout = rolled_out(loaded, copies=1)
    readings = scored(loaded, rollout, SamplingConfig(temperature=1.3))
    row, length = 1, int(rollout.sampled[1].sum())
    prompt = rollout.prompts.ids[row][rollout.prompts.real[row]][None]
    cache, fed = None, prompt
    for t in range(length):
        if not loaded.architecture.one_sequence:
            start = torch.tensor([[loaded.model.config.decoder_start_token_id]])
            decoder = torch.cat([start, rollout.ids[row : row + 1, :t]], dim=1)
            logits = loaded.model(input_ids=prompt, decoder_input_ids=decoder).logits
        else:
            output = loaded.model(input_ids=fed, past_key_values=cache, use_cache=True)
            cache, logits = output.past_key_values, output.logits
            fed = rollout.ids[row : row + 1, t : t + 1]
        expected = torch.log_softmax(logits[0, -1].float() / 1.3, dim=-1)[rollout.ids[row, t]]
        torch.testing.assert_close(readings.logprobs[row, t], expected.detach(), atol=2e-5, rtol=1e-4)


def test_values_come_from_the_last_hidden_state(tmp_path: Path):
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path)), device="cpu"))
    inputs = PassInputs.of(rolled_out(loaded))
    logits, hidden = teacher_forced(loaded.model, loaded.architecture, inputs, loaded.pad_token_id, with_hidden=True)
    assert hidden is not None
    torch.testing.assert_close(loaded.model.get_output_embeddings()(hidden), logits)
    assert not loaded.model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_critic_of_its_own_computes_no_logits(kind: str, tmp_path: Path):
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path, kind)), device="cpu"))
    rollout = rolled_out(loaded)
    shared, apart = ActorCritic(loaded, value="head"), ActorCritic(loaded, value="model")
    assert apart.critic is not None
    for one in (shared, apart):  # the critic still is what the policy is
        torch.nn.init.constant_(one.value_head.weight, 0.1)
    positions: list[int] = []
    head = apart.critic.get_output_embeddings()
    head.register_forward_hook(lambda _, args, output: positions.append(output.shape[1]))
    for share in (False, True):
        inputs = PassInputs.of(rollout, share=share)
        mask, statistics = rollout.sampled, logprobs_and(entropy_of, temperature=1.0)
        with torch.no_grad():
            (found, expected), (same, values) = shared(inputs, statistics, mask), apart(inputs, statistics, mask)
        torch.testing.assert_close(values[mask], expected[mask], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(same, found, atol=1e-5, rtol=1e-5)
    assert set(positions) == {0}


def test_value_head_starts_at_zero(tmp_path: Path):
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path)), device="cpu"))
    for value in ("head", "model"):
        rollout, statistics = rolled_out(loaded), logprobs_and(temperature=1.0)
        _, values = ActorCritic(loaded, value=value)(PassInputs.of(rollout), statistics, rollout.sampled)
        assert values is not None
        assert (values == 0).all()


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(r=2)])
def test_reference_stays_where_the_policy_started(tmp_path: Path, lora: LoraConfig):
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path)), device="cpu"), lora)
    rollout = rolled_out(loaded)
    scorer = Scorer(loaded, AttentionConfig(), SamplingConfig(), 8, reference=Reference(loaded))
    policy, before = scorer.read(rollout)
    torch.testing.assert_close(policy.logprobs, before, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    moved, after = scorer.read(rollout)
    torch.testing.assert_close(after, before, atol=0, rtol=0)
    assert (moved.logprobs - before).abs().max() > 1e-2


@pytest.mark.parametrize("kind", FAMILIES)
def test_in_bfloat16_the_reference_starts_as_the_policy_to_the_bit(kind: str, tmp_path: Path):
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path, kind)), device="cpu", dtype="bfloat16"))
    assert loaded.compute_dtype == torch.bfloat16
    rollout = rolled_out(loaded)
    reference = Reference(loaded)
    assert any(weight.dtype == torch.bfloat16 for weight in reference.module.parameters())
    policy, logprobs = Scorer(loaded, AttentionConfig(), SamplingConfig(), 8, reference=reference).read(rollout)
    assert torch.equal(policy.logprobs, logprobs)


def test_micro_batches_are_a_partition_sorted_by_length(tmp_path: Path):
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path)), device="cpu"))
    rollout = rolled_out(loaded)
    chosen = torch.tensor([6, 1, 3, 0, 7])
    chunks = micro_batches(rollout, 2, chosen)
    assert [len(chunk) for chunk in chunks] == [2, 2, 1]
    assert sorted(torch.cat(chunks).tolist()) == [0, 1, 3, 6, 7]
    lengths = rollout.prompts.real.sum(1) + rollout.sampled.sum(1)
    assert lengths[torch.cat(chunks)].tolist() == sorted(lengths[chosen].tolist())


# ---- episodes of several turns ----

TURNS = conversations([4, 7], [0, 1, 0, 1, 0], [(2, 3, 2), (3,), (1, 1, 4), (2, 2, 3), (4, 2, 1)])


@pytest.mark.parametrize("micro_batch_size", [2, 8])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "gemma3"])
def test_two_turns_are_read_as_token_by_token(kind: str, share: bool, micro_batch_size: int, tmp_path: Path):
    """Prompt, answer, reply, answer: what was sampled alone is scored, and it is seen to look at what stands before it."""
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path, kind)), device="cpu"))
    assert shares_prompts(loaded, TURNS)
    if not share:
        stop_sharing(loaded.model)
    actor_critic = ActorCritic(loaded, value="head")
    torch.nn.init.normal_(actor_critic.value_head.weight)
    found, maps = scored_with_maps(loaded, TURNS, micro_batch_size=micro_batch_size, actor_critic=actor_critic)
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    logprobs, expected = token_by_token(eager, TURNS)
    torch.testing.assert_close(found.logprobs, logprobs, atol=2e-5, rtol=1e-5)
    assert maps.shape == (5, 7, 7 + 7)
    torch.testing.assert_close(maps, expected, atol=1e-5, rtol=1e-4)
    assert float(maps[0, 5:, 7:].sum()) > 1e-3  # the second answer looks at the reply
    assert found.support is None  # no probe was asked
    for value in (*(one for one in vars(found).values() if one is not None), maps):
        assert (value[~TURNS.sampled] == 0).all()
    assert (found.entropy[TURNS.sampled] > 0).all()
    assert (found.values[TURNS.sampled] != 0).all()


def test_two_turns_are_one_plain_forward(tmp_path: Path):
    """The log-probabilities are those of one forward over all that was said, with every token at its own position."""
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path)), device="cpu"))
    found = scored(loaded, TURNS, SamplingConfig(temperature=0.7))
    for row in range(5):
        prompt, said = TURNS.prompts.ids[row][TURNS.prompts.real[row]], TURNS.ids[row][TURNS.real[row]]
        with torch.no_grad():
            logits = loaded.model(input_ids=torch.cat([prompt, said])[None], use_cache=False).logits[0]
        plain = (logits / 0.7).log_softmax(-1)[len(prompt) - 1 : -1].gather(1, said[:, None])[:, 0]
        sampled = TURNS.sampled[row, : len(said)]
        torch.testing.assert_close(found.logprobs[row, : len(said)], plain * sampled, atol=2e-5, rtol=1e-5)


def test_words_of_two_turns_are_pooled_over_all_that_is_seen(tmp_path: Path):
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path)), device="cpu"))
    visitor = TermVisitor(TURNS, [], "sum", keep_maps=True)
    Scorer(loaded, AttentionConfig(layers="all"), SamplingConfig(), 2).policy(TURNS, visitor)
    attention = visitor.attention()
    assert attention is not None
    assert TURNS.context is not None
    assert attention.words.shape == (5, 7, 4)  # the prompt's word, and one of each segment
    for row, column in TURNS.sampled.nonzero().tolist():
        for word in range(4):
            pieces = attention.maps[row, column, TURNS.context.words[row] == word]
            assert float(attention.words[row, column, word]) == pytest.approx(float(pieces.sum()), abs=1e-6)
    # The first answer sees neither what was replied to it nor what was said then; itself it sees as it grows.
    assert (attention.words[0, :2, 2:] == 0).all()
    assert (attention.words[0, 5:, :3] > 0).all()


def test_a_reference_reads_two_turns_too(tmp_path: Path):
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path)), device="cpu"))
    policy = TermVisitor(TURNS, [], "sum", keep_maps=True)
    Scorer(loaded, AttentionConfig(), SamplingConfig(), 8).read(TURNS, policy)
    reference = TermVisitor(TURNS, [], "sum", keep_maps=True)
    scorer = Scorer(loaded, AttentionConfig(source="reference"), SamplingConfig(), 8, reference=Reference(loaded))
    readings, logprobs = scorer.read(TURNS, reference)
    assert (logprobs[~TURNS.sampled] == 0).all()
    torch.testing.assert_close(logprobs, readings.logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reference.attention().maps, policy.attention().maps, atol=1e-5, rtol=1e-4)
