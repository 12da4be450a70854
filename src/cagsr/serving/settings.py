"""Settings of the server: what it serves, what it keeps, and when and within which budget it learns."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Interval

from cagsr.config import (
    AttentionConfig,
    LoraConfig,
    ModelConfig,
    MonitorConfig,
    PPOConfig,
    RewardConfig,
    SalienceConfig,
    SamplingConfig,
)
from cagsr.config.ranges import NonNegativeFloat, Port, PositiveFloat, PositiveInt, Seed


@dataclass(frozen=True)
class ServedModel(ModelConfig):
    """Which model is served, and how it is loaded."""

    path: str = ""
    """Folder or Hub id of a transformers model with safetensors weights and a tokenizer: the base of all versions."""


@dataclass(frozen=True)
class LimitsConfig:
    """What a request may ask for."""

    body_bytes: PositiveInt = 2**20
    """Largest body of a request."""
    prompt_tokens: PositiveInt | None = None
    """Longest prompt; None: what the model's context leaves beside the answer."""
    max_tokens: PositiveInt = 1024
    """Longest answer that can be asked for."""
    images: PositiveInt = 8
    """Most images in a request."""
    image_pixels: PositiveInt = 2**24
    """Most pixels of an image, width times height."""
    answers: PositiveInt = 16
    """Most answers to a prompt (n, best_of)."""
    waiting: PositiveInt = 128
    """Requests that may wait for the model; one more is refused (429)."""
    rows: PositiveInt = 32
    """Answers that are sampled together."""


@dataclass(frozen=True)
class ConsentConfig:
    """What is kept of whoever consents."""

    default: bool = False
    """Take a request that says nothing about consent for consenting."""
    prompts: PositiveInt = 10_000
    """Prompts that are kept; beyond them the oldest are removed."""
    bytes: PositiveInt = 64 * 2**20
    """Bytes of prompts and answers that are kept; beyond them the oldest are removed."""


@dataclass(frozen=True)
class LearningConfig:
    """When a new version is trained, and within which budget."""

    enabled: bool = True
    """Train in idle time; off: serve the versions that are there."""
    idle_seconds: NonNegativeFloat = 30.0
    """Seconds without a request before a training begins, or goes on after a pause."""
    new_prompts: PositiveInt = 64
    """Prompts kept since the last training before the next one begins."""
    when_busy: Literal["pause", "nice"] = "pause"
    """While requests come: pause the training, or let it go on at its lower priority."""
    steps: PositiveInt = 20
    """Steps of a training; each samples batch_size prompts and updates the adapter."""
    batch_size: PositiveInt = 8
    """Prompts per step (times sampling.num_generations answers)."""
    seconds: PositiveFloat = 900.0
    """Budget of a training, pauses not counted: then it ends with the steps that it has done."""
    memory_mb: PositiveInt = 8192
    """Budget of memory of the training's process, MiB; above it the training is given up."""
    kl: PositiveFloat = 10.0
    """Budget of KL to the base model, nats per answer: a training above it stops, a version above it isn't put in place."""
    nice: Annotated[int, Interval(ge=0, le=19)] = 10
    """By how much the training's priority is below the server's."""
    threads: PositiveInt = 1
    """Threads of the training."""
    held_out: str | None = None
    """File of prompts that every new version is compared on; None: a fifth of the prompts kept, by their hash."""
    held_out_prompts: PositiveInt = 64
    """At most so many of them."""


@dataclass(frozen=True)
class ServedLora(LoraConfig):
    """The adapter that is trained."""

    r: PositiveInt = 16
    """Rank of the adapters."""


@dataclass(frozen=True)
class ServedPPO(PPOConfig):
    """The optimisation of a training in idle time."""

    estimator: Literal["gae", "rloo", "grpo"] = "rloo"
    """Advantages: rloo (leave-one-out over the candidates) and grpo need no value head; gae has one to learn each time."""


@dataclass(frozen=True)
class ServeConfig:
    """Serve a model as OpenAI's servers do, and train an adapter in idle time on prompts whose senders consent."""

    model: ServedModel = field(default_factory=ServedModel)
    folder: str = "serve"
    """The server's folder: token, prompts, versions."""
    name: str | None = None
    """What the model is called in requests; None: the last part of its path."""
    port: Port = 8643
    """Port on 127.0.0.1; 0 takes a free one."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    consent: ConsentConfig = field(default_factory=ConsentConfig)
    learning: LearningConfig = field(default_factory=LearningConfig)
    lora: ServedLora = field(default_factory=ServedLora)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Of trainings; max_new_tokens is also the length of answers to requests that name none."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    salience: SalienceConfig = field(default_factory=SalienceConfig)
    reward_from: str | None = None
    """Folder of a cagsr train run whose reward judges answers and trains: settings, IDF table, scales. None: the reward given
    here; words are counted in the prompts that versions are compared on."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    seed: Seed = 0
    """Seeds the trainings."""
    ppo: ServedPPO = field(default_factory=ServedPPO)
    monitors: MonitorConfig = field(default_factory=MonitorConfig)

    @property
    def served_name(self) -> str:
        """What the model is called, without a version."""
        return self.name or self.model.path.rstrip("/").rpartition("/")[2]

    def conflicts(self) -> Iterator[str]:
        """Yield what does not go together, a sentence each."""
        if self.name is not None and ("@" in self.name or not self.name.strip()):
            yield f"--name {self.name!r}: a name without '@', which stands before a version's number."
        if self.sampling.max_new_tokens > self.limits.max_tokens:
            yield (
                f"--limits.max_tokens {self.limits.max_tokens}: is below --sampling.max_new_tokens {self.sampling.max_new_tokens}, "
                "the length of answers to requests that name none."
            )
        if self.learning.enabled and self.sampling.num_generations < 2:
            yield "--sampling.num_generations 1: training compares the answers to a prompt; give 2 or more."
        if self.learning.enabled and self.sampling.temperature == 0:
            yield "--sampling.temperature 0: training samples, so it must be above 0."
