"""A prompt read once for its answers: the same logits, hidden states, gradients and attention, for fewer positions."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

import tiny
from cagsr.config import LoraConfig, ModelConfig
from cagsr.flow import EpisodeBatch, Prompt, PromptBatch
from cagsr.models.architecture import teacher_forced
from cagsr.models.inputs import PassInputs, SharedPrompts
from cagsr.models.load import LoadedModel, load_model
from cagsr.models.sharing import shares_prompts
from cagsr.rollout.rows import episode_rows
from cagsr.scoring.micro_batches import micro_batches

FAMILIES = ["llama", "qwen3", "gpt2", "gpt_neox", "gemma3", "mistral", "t5", "bart"]


def made_up(loaded: LoadedModel, responses: list[int], prompts: list[int], group: list[int]) -> EpisodeBatch:
    """Random tokens: rows of the given response lengths, answering prompts of the given lengths."""
    generator = torch.Generator().manual_seed(1)
    size, of_row = loaded.model.get_input_embeddings().weight.shape[0], torch.tensor(group)
    width = max(prompts)
    ids = torch.randint(3, size, (len(prompts), width), generator=generator)
    places = torch.arange(width)[None]
    lengths = torch.tensor(prompts)[:, None]
    mask = places < lengths if not loaded.architecture.one_sequence else places >= width - lengths
    texts = tuple(Prompt(number + 1, "") for number in group)
    words = torch.full_like(ids[of_row], -1)
    batch = PromptBatch(texts, ids[of_row], mask[of_row], words, torch.ones(len(group), 1), of_row)
    answer = torch.randint(3, size, (len(group), max(responses)), generator=generator)
    answered = torch.arange(max(responses))[None] < torch.tensor(responses)[:, None]
    return EpisodeBatch.of_one_turn(
        batch, answer, answered, torch.ones(len(group), dtype=torch.bool), tuple("" for _ in group)
    )


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_hidden_states_and_gradients_are_those_of_the_plain_pass(kind: str, rank: int, tmp_path: Path):
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path, kind)), device="cpu"), LoraConfig(r=rank))
    # Rows of one prompt need not lie side by side; the Mistral's window of 6 is shorter than prompt and answer.
    rollout = made_up(loaded, [1, 5, 3, 4, 5, 1], [4, 7], [0, 1, 0, 0, 1, 1])
    assert shares_prompts(loaded, rollout)
    mask = rollout.sampled
    everyone = torch.arange(6)
    seen = []
    for share in (False, True):
        inputs = PassInputs.of(episode_rows(rollout, everyone), share=share)
        assert (inputs.shared is not None) == share
        loaded.model.zero_grad()
        logits, hidden = teacher_forced(
            loaded.model, loaded.architecture, inputs, loaded.pad_token_id, with_hidden=True
        )
        assert hidden is not None
        (logits[mask].log_softmax(-1).square().sum() + hidden[mask].square().sum()).backward()
        gradient = torch.cat([p.grad.flatten() for p in loaded.model.parameters() if p.grad is not None])
        seen.append((logits[mask].detach(), hidden[mask].detach(), gradient))
    for plain, shared in zip(*seen, strict=True):
        torch.testing.assert_close(shared, plain, rtol=1e-4, atol=2e-6 * float(plain.abs().max()))
    assert float(seen[0][2].abs().max()) > 0.1


def test_a_prompt_is_fed_once(tmp_path: Path):
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path)), device="cpu"))
    fed: list[int] = []
    loaded.model.get_input_embeddings().register_forward_pre_hook(lambda _, args: fed.append(args[0].numel()))
    rollout = made_up(loaded, [4] * 6, [8, 8], [0, 0, 0, 1, 1, 1])
    for share, positions in ((False, [6 * 11]), (True, [2 * 8, 6 * 3])):
        fed.clear()
        inputs = PassInputs.of(episode_rows(rollout, torch.arange(6)), share=share)
        loaded.teacher_forced(inputs)
        assert fed == positions


def test_one_answer_a_prompt_is_one_forward():
    assert SharedPrompts.of(torch.tensor([0, 1, 2, 2])) is None
    found = SharedPrompts.of(torch.tensor([7, 5, 7, 7]))
    assert found is not None
    assert found.first.tolist() == [1, 0]
    assert found.of_row.tolist() == [1, 0, 1, 1]


def test_not_under_gradient_checkpointing_and_not_without_a_cache_of_rows(tmp_path: Path):
    config = ModelConfig(str(tiny.save_model(tmp_path)), device="cpu", gradient_checkpointing=True)
    loaded = load_model(ModelConfig(str(tmp_path), device="cpu"))
    rollout = made_up(loaded, [2, 3], [3], [0, 0])
    assert not shares_prompts(load_model(config), rollout)
    state_space = MambaForCausalLM(
        MambaConfig(vocab_size=28, hidden_size=16, state_size=4, num_hidden_layers=1, pad_token_id=0)
    ).eval()
    assert not shares_prompts(dataclasses.replace(loaded, model=state_space), rollout)


def test_not_where_the_logits_come_out_different(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path)), device="cpu"))
    body = type(loaded.model.model)
    forward = body.forward

    def forgetful(self: torch.nn.Module, *args: object, past_key_values: object = None, **options: object) -> object:
        output = forward(self, *args, past_key_values=past_key_values, **options)
        if past_key_values is not None:
            output.last_hidden_state = output.last_hidden_state * 1.01
        return output

    forgetful.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(body, "forward", forgetful)
    assert not shares_prompts(loaded, made_up(loaded, [2, 3], [3], [0, 0]))


def test_micro_batches_take_the_order_that_feeds_fewer_positions(tmp_path: Path):
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path)), device="cpu"))
    group = [0, 1, 0, 1]
    # Long prompts: a micro-batch a prompt (2 x (20 + 2 x 5) = 60 positions; by length 2 x 2 x 20 + 2 x 1 + 2 x 5 = 92).
    parts = micro_batches(made_up(loaded, [5, 5, 1, 1], [20, 20], group), 2, share=True)
    assert [sorted(part.tolist()) for part in parts] == [[0, 2], [1, 3]]
    # Long answers: by their length (2 x 2 x 2 + 2 x 1 + 2 x 30 = 70; a prompt each 2 x (2 + 2 x 30) = 124).
    parts = micro_batches(made_up(loaded, [30, 30, 1, 1], [2, 2], group), 2, share=True)
    assert [sorted(part.tolist()) for part in parts] == [[2, 3], [0, 1]]
    some = micro_batches(made_up(loaded, [30, 30, 1, 1], [2, 2], group), 2, torch.tensor([3, 0]), share=True)
    assert [part.tolist() for part in some] == [[3, 0]]
