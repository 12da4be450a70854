"""The whole method in one file, top to bottom, on the library's own pieces. Reads in ten minutes; runs in one, on a CPU.

    python -m examples.minimal_loop                                          a tiny random model, made here
    python -m examples.minimal_loop --model start --data prompts.jsonl       your model, your prompts

Each step: sample G answers to some prompts; read log-probabilities and attention of all answers in one teacher-forced pass; make
a reward of what the attention says (no labels, no reward model); compare each answer with the others to its prompt (RLOO);
take one clipped policy-gradient step, held near the starting model by a KL penalty.

What ``cagsr train`` does besides, and this leaves out:

- several epochs and mini-batches a step, micro-batches, gradient accumulation, several processes (DDP, FSDP2), LoRA, bfloat16;
- GAE with a value head, GRPO, adaptive KL, entropy bonus, whitening, a penalty for answers that never end, learning rate
  schedules, your own objectives;
- the prompt that is read once for all its answers in the update (here every row reads its own);
- chat templates, files, streaming, salience by marked passages, terms that learn associations first, episodes of several turns;
- checkpoints and exact resuming, held-out evaluation, monitors that warn, the run's page, the check that decoding, scoring and
  update see the same policy.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cagsr.advantage.group import leave_one_out
from cagsr.advantage.kl import kl_k1
from cagsr.config import (
    AttentionConfig,
    CoverageConfig,
    GroundedCoverageConfig,
    ModelConfig,
    RepetitionConfig,
    RewardConfig,
    SalienceConfig,
    SamplingConfig,
)
from cagsr.flow import EpisodeBatch, RewardBatch
from cagsr.models.inputs import PassInputs
from cagsr.models.load import LoadedModel, load_model
from cagsr.objectives.policy import policy_loss
from cagsr.prompts.prepare import encode_texts
from cagsr.reward.build import build_reward
from cagsr.reward.micro_batch import TermVisitor
from cagsr.reward.registry import Resources
from cagsr.rollout.rows import prompt_batch
from cagsr.rollout.sample import sample_responses
from cagsr.scoring.scorer import Scorer
from cagsr.scoring.statistics import token_logprobs

COLOURS, ANIMALS = ("red", "blue", "green", "white"), ("cat", "dog", "bird", "horse")
PLACES = ("house", "tree", "river", "road")


def main() -> None:
    """Read the flags, run the loop, print a line a step."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    flags.add_argument("--model", help="folder or Hub id; none: a tiny random model")
    flags.add_argument("--data", type=Path, help="JSONL with a prompt a line; none: made up")
    flags.add_argument("--steps", type=int, default=60)
    flags.add_argument("--seed", type=int, default=0)
    given = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(given.seed)
        model = given.model or make_model(Path(folder))
        texts = made_up_prompts()
        if given.data:
            texts = [json.loads(line)["prompt"] for line in given.data.read_text(encoding="utf-8").splitlines()]
        found = loop(load_model(ModelConfig(model, device="cpu")), texts, given.steps, given.seed)
    first, last = sum(found[:10]) / 10, sum(found[-10:]) / 10
    print(f"grounded coverage, mean of ten steps: {first:.3f} at first, {last:.3f} at last")


def loop(loaded: LoadedModel, texts: list[str], steps: int, seed: int) -> list[float]:
    """Train a model in place on prompts; gives the mean grounded coverage of the answers, step by step."""
    # 1. What is wanted. Words are weighed by how rare they are among the prompts; the reward's terms look at the attention
    #    from each answer's tokens to these words.
    salience = SalienceConfig()
    prompts = encode_texts(texts, loaded.tokenizer, salience, max_length=10_000, frequency=None, source="the prompts")
    config = RewardConfig(
        coverage=CoverageConfig(weight=0.3),  # was each word looked at hard once?
        grounded_coverage=GroundedCoverageConfig(weight=1.0),  # ... by the very token that says it?
        repetition=RepetitionConfig(weight=-0.3),
    )
    reward = build_reward(config, device=loaded.device, resources=Resources(texts=loaded.texts))
    # 2. Who plays: the policy, and a frozen copy of it, from which it must not stray too far.
    policy, start = loaded.model, copy.deepcopy(loaded.model).requires_grad_(False)
    # (With LoRA the reference is the policy with its adapter off; here it is a copy, there at once.)
    frozen = SimpleNamespace(module=start, model=lambda: nullcontext(start))
    sampling = SamplingConfig(num_generations=8, max_new_tokens=8, temperature=1.0)
    scorer = Scorer(loaded, AttentionConfig(), sampling, micro_batch_size=64, reference=frozen)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3, weight_decay=0.0)
    kl_coef, cliprange, history = 0.02, 0.2, []
    order = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        chosen = [prompts[int(i)] for i in torch.randint(len(prompts), (8,), generator=order)]
        # 3. Sample: G answers to each prompt, (batch, response) token ids with a mask of what is real.
        batch = prompt_batch(loaded, chosen, sampling.num_generations)
        episodes = sample_responses(loaded, batch, sampling)
        # 4. Read: one pass over prompt + answer gives log-probabilities and attention together. A visitor is handed the
        #    attention and works the terms out at once, so that no map (batch, response, prompt) is kept.
        visitor = TermVisitor(episodes, reward.terms, salience.pooling)
        readings, reference_logprobs = scorer.read(episodes, visitor)
        # 5. Reward: each term centred on the mean of the prompt's answers and divided by its running deviation within
        #    prompts (which the reward keeps), weighed, summed, and paid at the tokens it belongs to.
        rewards = reward(RewardBatch(episodes, readings, reference_logprobs), visitor.values)
        # 6. Advantage: what an answer got, less the KL it cost, against the mean of the other answers to its prompt.
        mask = episodes.sampled  # of one turn: all that is no padding
        kl = kl_k1(readings.logprobs, reference_logprobs)
        sums = (rewards.per_token - kl_coef * kl).masked_fill(~mask, 0.0).sum(dim=1)
        advantages = leave_one_out(sums, batch.group)[:, None].expand_as(kl)
        # 7. Update: PPO's clipped objective. With one step a batch the ratio is 1 and nothing is clipped.
        loss = policy_loss(logprobs(loaded, episodes), readings.logprobs, advantages, mask, mask.sum(), cliprange).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        # 8. Watch. Contributions are centred, so they average to 0: what rises is the terms' raw values.
        history.append(float(rewards.terms["grounded_coverage"].mean()))
        means = "  ".join(f"{name} {float(values.mean()):.3f}" for name, values in rewards.terms.items())
        mean_kl = float((kl * mask).sum(dim=1).mean())
        print(f"step {step:3d}  {means}  KL {mean_kl:+.2f}  {episodes.completions[0]!r}", flush=True)
    return history


def logprobs(loaded: LoadedModel, episodes: EpisodeBatch) -> torch.Tensor:
    """Log-probabilities of the sampled tokens, ``(batch, response)``, with gradients; logits come aligned with the tokens."""
    logits = loaded.teacher_forced(PassInputs.of(episodes))
    return token_logprobs(logits, episodes.ids, temperature=1.0)


def made_up_prompts() -> list[str]:
    """Short prompts that differ in three words."""
    return [f"tell me of a {c} {a} by the {p} :" for c in COLOURS for a in ANIMALS for p in PLACES]


def make_model(folder: Path) -> str:
    """A tiny random Llama over the words of the prompts, saved as any other model."""
    special = ["<pad>", "<eos>", "<unk>"]
    vocabulary = dict.fromkeys([*special, *" ".join(made_up_prompts()).split()])
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    main()
