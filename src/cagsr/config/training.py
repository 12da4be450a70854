"""Settings of the run and of everything but the reward."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal
from urllib.parse import urlparse

from annotated_types import Ge

from cagsr.config.ranges import (
    NonNegativeFloat,
    NonNegativeInt,
    Port,
    PositiveFloat,
    PositiveInt,
    PositiveShare,
    RunSeed,
    Share,
    ShareBelowOne,
)

ANSWERS_AT_ONCE = 128
"""Answers that are sampled together unless somebody says otherwise (docs/rollouts.md has what more and fewer cost)."""


@dataclass(frozen=True)
class ModelConfig:
    """Which model, how it is loaded and what of it is trained."""

    path: str
    """Folder or Hub id of a transformers model with safetensors weights and a tokenizer."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where to run; auto takes CUDA, then MPS, then CPU, and says which."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision; auto takes bfloat16 where the device computes in it natively, else float32, and says which."""
    attn_implementation: str | None = None
    """The model's own attention path (sdpa, flash_attention_2, eager); None leaves transformers' choice."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models you trust."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    pad_token: str | None = None
    """PAD for a tokenizer that has none or whose PAD is its EOS; added to the vocabulary if it is new, as <pad>."""
    language: str | None = None
    """Language of sounds, as de, for a Whisper model; None: as its generation config says, else en."""
    speech_task: Literal["transcribe", "translate"] | None = None
    """What a Whisper model does; None: as its generation config says, else transcribe."""


@dataclass(frozen=True)
class LoraConfig:
    """LoRA adapters (peft) instead of full fine-tuning; the reference model is then free (the adapter switched off)."""

    r: NonNegativeInt = 0
    """Rank of the adapters; 0 trains all weights."""
    alpha: PositiveInt = 32
    """Scale of the adapters (alpha / r)."""
    target_modules: str = "all-linear"
    """Which modules get an adapter: all-linear, or names separated by commas."""
    start: str | None = None
    """cagsr train: folder of a PEFT adapter to go on from, of the same base, rank and modules; None: a fresh one."""

    def conflicts(self) -> Iterator[str]:
        """Yield what does not go together, a sentence each."""
        if self.start is not None and self.r == 0:
            yield "--lora.start: an adapter to go on from needs its rank; give --lora.r."


@dataclass(frozen=True)
class DataConfig:
    """Where the prompts come from."""

    path: str
    """JSONL, JSON, CSV or Parquet file, a folder of them, or a Hub dataset id."""
    split: str = "train"
    """Split of a Hub dataset or a folder."""
    name: str | None = None
    """Configuration of a Hub dataset that has several."""
    prompt_column: str = "prompt"
    """Column with the prompt: text, or a list of chat messages."""
    split_text: ShareBelowOne = 0.0
    """For a file of plain texts: this share of each text (up to a space) is the prompt, the rest becomes the column
    completion; 0 takes the prompt column whole."""
    spans_column: str | None = None
    """Column with important character ranges of the prompt, as [[start, end], ...]."""
    limit: PositiveInt | None = None
    """Use only the first rows."""
    streaming: bool = False
    """Read rows as they are needed (for sets larger than memory); IDF is then estimated on the first rows."""
    max_prompt_length: PositiveInt | None = None
    """Longest prompt in tokens; None: what the model's context leaves after the response."""
    long_prompts: Literal["error", "drop", "truncate"] = "error"
    """What to do with a longer prompt. drop and truncate say how many rows they touched."""
    system_prompt: str | None = None
    """System message put before conversational prompts."""
    messages: Literal["last_turn", "first_turn"] = "last_turn"
    """How rows of chat messages without a prompt are read. last_turn: the assistant's last turn is the completion, all before it
    the prompt; first_turn (of a column turns too, a list of what the user says): the user's first message is the prompt, what
    he says later the column user_turns, and what he was answered answers_by_turn."""


@dataclass(frozen=True)
class SamplingConfig:
    """How answers are sampled."""

    num_generations: PositiveInt = 8
    """Candidates per prompt (G)."""
    temperature: NonNegativeFloat = 1.0
    """Divides the logits, in sampling and in scoring alike. 0 is greedy (not for training)."""
    top_p: PositiveShare = 1.0
    """Nucleus sampling; below 1 the scored policy is not the sampled one and the ratio is corrected and logged."""
    top_k: NonNegativeInt = 0
    """Keep the k likeliest tokens; 0 keeps all. Corrected as top_p is."""
    max_new_tokens: PositiveInt = 128
    """Longest answer in tokens."""
    min_new_tokens: NonNegativeInt = 0
    """Shortest answer in tokens (the stop token is forbidden before). Corrected as top_p is."""
    stop_strings: list[str] = field(default_factory=list)
    """Texts that end an answer, besides the model's stop tokens; a special token alone is one too."""

    def conflicts(self) -> Iterator[str]:
        """Yield what does not go together, a sentence each."""
        if self.min_new_tokens > self.max_new_tokens:
            yield (
                f"--sampling.min_new_tokens {self.min_new_tokens}: must lie between 0 and sampling.max_new_tokens "
                f"{self.max_new_tokens}."
            )


@dataclass(frozen=True)
class RolloutConfig:
    """Who samples the answers (docs/rollouts.md)."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """transformers: the policy itself, in this process; vllm: a vLLM server that gets the new weights after every update."""
    batch_size: PositiveInt = ANSWERS_AT_ONCE
    """transformers: answers sampled at once, all those to a prompt at least: of a step, of learning associations and of the
    held-out evaluation. A token costs little more for many answers than for one; the price is memory for their cache."""
    url: str = "http://127.0.0.1:8000"
    """vllm: address of the server."""
    wait: NonNegativeFloat = 240.0
    """vllm: seconds to wait at the start for the server to be up."""
    timeout: PositiveFloat = 600.0
    """vllm: seconds to wait for each of the server's replies."""
    weights: Literal["disk", "nccl"] = "disk"
    """vllm: how the weights travel. disk: safetensors in a folder that the server sees too; nccl: from GPU to GPU through
    TRL's client (vllm must be installed here as well)."""
    weights_dir: str | None = None
    """vllm, disk: folder of this run alone that trainer and server see under the same path; None: rollout-weights in
    output_dir."""
    group_port: Port = 51216
    """vllm, nccl: free port on which trainer and server meet."""
    importance_sampling_correction: bool = True
    """vllm: weigh each token by policy / engine, by the engine's own log-probabilities (truncated importance sampling)."""
    importance_sampling_cap: Annotated[float, Ge(1)] = 2.0
    """vllm: largest such weight."""
    max_logp_difference: NonNegativeFloat = 0.5
    """vllm: stop when the engine's log-probabilities differ from the scoring pass's by more than this, mean over tokens,
    nats: the server then holds other weights or samples otherwise. 0 never stops, nor does it with transformers, whose own
    limit is 0.05 in float32 and 0.5 in bfloat16."""
    task: str | None = None
    """Dotted path of a task of several turns (package.module.Task, see cagsr.tasks.task); None: one answer to each prompt."""

    def conflicts(self) -> Iterator[str]:
        """Yield what does not go together, a sentence each."""
        address = urlparse(self.url)
        if self.engine == "vllm" and (address.scheme not in ("http", "https") or not address.hostname):
            yield f"--rollout.url {self.url}: give the server's address as http://HOST:PORT."


@dataclass(frozen=True)
class AttentionConfig:
    """Which attention is read."""

    layers: str = "last-4"
    """last-N, all, or layer numbers separated by commas (0 is the first). Fewer than N layers: all of them."""
    heads: str = "all"
    """all, or head numbers separated by commas, the same in every layer."""
    source: Literal["policy", "reference"] = "policy"
    """Read from the moving policy (free) or from the frozen starting model (can't be gamed by moving attention)."""


@dataclass(frozen=True)
class SalienceConfig:
    """Which words of the prompt matter."""

    weighting: Literal["idf", "uniform", "spans"] = "idf"
    """idf: rare words of the prompt set count more, boilerplate drops out; uniform: all words count alike;
    spans: only the words the user marked."""
    idf_floor: Share = 0.1
    """Words whose IDF is below this share of the largest IDF weigh nothing."""
    idf_power: NonNegativeFloat = 1.0
    """Weights are IDF to this power: 1 is plain IDF; 0 weighs all words above the floor alike, for prompts in which names
    that occur once would drown the rest."""
    markers: tuple[str, str] | None = None
    """A pair of texts around important passages of a prompt, removed before the model reads it, as << >>."""
    code: bool = False
    """Prompts are Python code: names count, and the words of docstrings and comments; keywords and numbers don't."""
    skip_sink: bool = True
    """Leave out the prompt's first token, where attention parks (the attention sink)."""
    pooling: Literal["sum", "max"] = "sum"
    """How the pieces of a word make the attention to the word: their total, or the largest."""
    turn_decay: Share = 1.0
    """In a conversation: what a word's weight is multiplied with for each exchange since it was said. 1: all of the history
    counts alike; 0: only the last user's message and the answer before it."""
    user_weight: NonNegativeFloat = 1.0
    """What the weights of words of the user's messages are multiplied with (also of a plain prompt)."""
    assistant_weight: NonNegativeFloat = 1.0
    """The same of earlier answers, the model's own or those in the data."""
    other_weight: NonNegativeFloat = 1.0
    """The same of messages of any other role: system, tool."""
    image_grid: PositiveInt = 4
    """An image without boxes is looked at in so many by so many regions."""
    image_weights: Literal["contrast", "uniform"] = "contrast"
    """contrast: regions count by how far their pixels are from the colour that most of the image has; uniform: all alike."""
    audio_seconds: PositiveFloat = 0.5
    """A sound without spans of its own is looked at in regions of so many seconds."""
    audio_weights: Literal["loudness", "uniform"] = "loudness"
    """loudness: regions count by how loud they are, silence nothing; uniform: all alike."""

    def role_weight(self, role: str) -> float:
        """What words that ``role`` said are multiplied with."""
        return {"user": self.user_weight, "assistant": self.assistant_weight}.get(role, self.other_weight)

    def conflicts(self) -> Iterator[str]:
        """Yield what does not go together, a sentence each."""
        if not any((self.user_weight, self.assistant_weight, self.other_weight)):
            yield "salience: every role's weight is 0, so no word matters; give --salience.user_weight one."


@dataclass(frozen=True)
class PPOConfig:
    """The optimisation."""

    estimator: Literal["gae", "rloo", "grpo"] = "gae"
    """Advantages: gae (value head), rloo (leave-one-out over the candidates) or grpo (z-score over the candidates)."""
    num_ppo_epochs: PositiveInt = 4
    """Passes over each batch of experience."""
    num_mini_batches: PositiveInt = 1
    """Gradient steps per pass."""
    micro_batch_size: PositiveInt | Literal["auto"] = 64
    """Sequences in a process's memory at once, in scoring and update; changes memory and speed, not the result. auto: as many
    as fit into the memory at hand, fewer where it runs out."""
    learning_rate: PositiveFloat = 1e-4
    """Peak learning rate of the policy."""
    value_learning_rate: NonNegativeFloat = 1e-3
    """Learning rate of the value head or critic."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW weight decay."""
    adam_eps: NonNegativeFloat = 1e-5
    """Adam epsilon."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient norm clipping."""
    gamma: Share = 1.0
    """Discount."""
    turn_discount: Share = 1.0
    """In episodes of several turns: what a later turn's reward counts for an earlier answer, for each turn between them. 0: each
    answer is trained on its own turn's reward alone."""
    lam: Share = 0.95
    """GAE lambda."""
    cliprange: NonNegativeFloat = 0.2
    """PPO clip range of the policy ratio."""
    cliprange_value: NonNegativeFloat = 0.2
    """PPO clip range of the value."""
    vf_coef: NonNegativeFloat = 0.1
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus."""
    ce_coef: NonNegativeFloat = 0.0
    """Weight of imitation: the cross-entropy of positions that a task or a user's code has marked for it."""
    objectives: list[str] = field(default_factory=list)
    """Your own summands of the loss as dotted paths (package.module.Objective): see cagsr.objectives.objective."""
    critic: Literal["head", "model"] = "head"
    """gae only: a value head on the policy's last hidden state, or a separate critic model."""
    kl_coef: NonNegativeFloat = 0.05
    """Weight of the KL to the frozen starting model."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """k1: log-ratio; k3: unbiased and never negative (Schulman, 2020)."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL penalty goes: into the per-token reward (detached) or the loss."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """adaptive moves kl_coef so that the KL approaches target_kl (Ziegler et al., 2019)."""
    target_kl: PositiveFloat = 6.0
    """adaptive: KL per sequence to aim at, nats."""
    horizon: PositiveInt = 10000
    """adaptive: sequences over which kl_coef adapts."""
    whiten_rewards: bool = False
    """Divide the per-token rewards by their standard deviation (the mean is kept)."""
    whiten_advantages: bool = True
    """Bring advantages to mean 0 and standard deviation 1 over response tokens."""
    missing_eos_penalty: float | None = 1.0
    """Subtracted from the reward of an answer that was cut at the length limit."""

    def conflicts(self) -> Iterator[str]:
        """Yield what does not go together, a sentence each."""
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            yield (
                "--ppo.kl_in loss: the gradient of k1 is zero on average, so it holds nothing; add --ppo.kl_estimator k3."
            )
        if self.kl_controller == "adaptive" and self.kl_coef == 0:
            yield "--ppo.kl_coef 0: the adaptive KL controller could never move it; start above 0."


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation during training."""

    path: str | None = None
    """Held-out prompts (as data.path); None takes held_out rows off the training prompts."""
    held_out: NonNegativeInt = 64
    """How many prompts to hold out."""
    every: NonNegativeInt = 10
    """Steps between evaluations; 0 evaluates only at the start and the end."""
    metric: str | None = None
    """Dotted path of f(prompts, completions, **columns) -> list of numbers, higher is better.
    None: ROUGE-L where the rows have a reference (completion, reference or references), else lexical relevance."""
    samples: NonNegativeInt = 8
    """Greedy answers kept at each evaluation in held_out.jsonl, always to the same prompts; 0 keeps none."""

    def conflicts(self) -> Iterator[str]:
        """Yield what does not go together, a sentence each."""
        if self.path is not None and self.held_out == 0:
            yield "--evaluation.held_out 0: no prompt of --evaluation.path would be read; give 1 or more."


Action = Literal["off", "warn", "stop"]
SaveDtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class MonitorConfig:
    """Early warnings, on from step 0."""

    kl: float = 20.0
    """Warn above this KL to the starting model, nats per sequence."""
    kl_action: Action = "warn"
    """What to do then."""
    length_drift: float = 0.5
    """Warn when the mean length leaves the first step's by this share."""
    length_drift_action: Action = "warn"
    """What to do then."""
    repetition: float = 0.2
    """Warn when repetition rises above the first step's by this much."""
    repetition_action: Action = "warn"
    """What to do then."""
    ended: float = 0.1
    """Warn when fewer of the answers than this share end by themselves."""
    ended_action: Action = "warn"
    """What to do then."""
    entropy: float = 0.3
    """Warn when the entropy falls below this share of the first step's."""
    entropy_action: Action = "warn"
    """What to do then."""
    dominance: float = 0.9
    """Warn when one term of several holds more than this share of the reward's variance."""
    dominance_action: Action = "warn"
    """What to do then."""
    flat: float = 0.9
    """Warn when the answers to more than this share of the prompts are all worth the same: nothing is learned from these."""
    flat_action: Action = "warn"
    """What to do then."""
    metric_drop: float = 0.05
    """Warn when the held-out metric lies this share below its best while the reward has risen."""
    metric_drop_action: Action = "warn"
    """What to do then."""
    forecast_action: Action = "off"
    """From its first ten steps, say at which step the reward will begin to hurt; terms that it does not pay are watched for it.
    stop: end the run there, and final/ is the policy of the best evaluation."""
    patience: PositiveInt = 3
    """Steps in a row (evaluations for metric_drop) before a monitor fires."""


@dataclass(frozen=True)
class RunConfig:
    """The run: length, seeds, files."""

    steps: PositiveInt = 100
    """Steps: each samples a batch of prompts and updates the policy on it."""
    batch_size: PositiveInt = 8
    """Prompts per step (times sampling.num_generations answers), divided among the processes."""
    seed: RunSeed = 0
    """Seeds sampling, shuffling and initialisation."""
    save_every: NonNegativeInt = 20
    """Steps between checkpoints; 0 saves only at the end."""
    save_total_limit: PositiveInt = 2
    """Checkpoints kept."""
    load_best_model_at_end: bool = False
    """final/ is the policy of the best evaluation (greedy, by evaluation.metric), not of the last step."""
    save_dtype: SaveDtype = "auto"
    """Precision of the weights in final/; auto takes the starting model's own. Weights are trained in float32, which
    float32 keeps and the others round."""
    sample_rows: NonNegativeInt = 8
    """Answers with their reward breakdown stored at each step in samples.jsonl."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Also send metrics to this tracker (through accelerate)."""
    profile: bool = False
    """Print where the time of a step goes, down to the costliest operators, and write it to profile.md."""
    overwrite: bool = False
    """Start anew in a folder that holds another run (its files are removed)."""
    resume: bool = False
    """Go on from the folder's last good checkpoint."""
