"""All settings of ``cagsr train``."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from cagsr.config.episodes import ConversationConfig, CurriculumConfig, StepsConfig, SupervisionConfig
from cagsr.config.training import (
    AttentionConfig,
    DataConfig,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    MonitorConfig,
    PPOConfig,
    RolloutConfig,
    RunConfig,
    SalienceConfig,
    SamplingConfig,
)
from cagsr.reward.settings import RewardConfig


@dataclass(frozen=True)
class TrainConfig:
    """Train a model with CAGSR: PPO on unlabelled prompts, the reward read from the model's own attention."""

    model: ModelConfig
    data: DataConfig
    output_dir: str
    """Run folder: config, metrics, samples, checkpoints, final model."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    conversation: ConversationConfig = field(default_factory=ConversationConfig)
    steps: StepsConfig = field(default_factory=StepsConfig)
    supervision: SupervisionConfig = field(default_factory=SupervisionConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    salience: SalienceConfig = field(default_factory=SalienceConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    monitors: MonitorConfig = field(default_factory=MonitorConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def conflicts(self) -> Iterator[str]:
        """Yield what does not go together, a sentence each."""
        sampling, ppo = self.sampling, self.ppo
        task, user = self.rollout.task, self.conversation.user
        if task is not None and user is not None:
            yield "--rollout.task and --conversation.user both say how an episode goes on: leave one of them out."
        several = [
            flag
            for flag, there in (
                ("--steps.by", self.steps.by != "none"),
                ("--rollout.task", task is not None),
                ("--conversation.user", user is not None),
            )
            if there
        ]
        for name in ("context_gain", "target_probability", "faithfulness"):
            if several and self.reward.asks(name):
                yield f"--reward.{name} judges single answers, and {several[0]} makes several of an episode: leave one of them out."
        if self.run.load_best_model_at_end and self.evaluation.held_out == 0:
            yield "--run.load_best_model_at_end: nothing is evaluated with --evaluation.held_out 0, so no step is the best."
        supervision = self.supervision.mode
        if supervision != "none":
            others = {
                "--steps.by": self.steps.by != "none",
                "--rollout.task": task is not None,
                "--conversation.user": user is not None,
                "--rollout.engine vllm": self.rollout.engine == "vllm",
            }
            if others_named := [name for name, there in others.items() if there]:
                yield (
                    f"--supervision.mode {supervision}: references are single answers; leave {' and '.join(others_named)} out."
                )
            if sampling.num_generations < 2:
                yield f"--supervision.mode {supervision}: one answer to each prompt is given: set --num_generations 2 or more."
        if supervision != "visurf" and self.supervision.reward != "smooth":
            yield "--supervision.reward says what a reference is paid, with --supervision.mode visurf alone."
        if supervision != "s3ft" and self.supervision.margin != 0:
            yield "--supervision.margin says which own answers are accepted, with --supervision.mode s3ft alone."
        if supervision == "visurf" and self.supervision.reward != "own" and ppo.estimator == "gae":
            yield (
                "--supervision.mode visurf: gae compares no answers, and what a reference is paid is a comparison; "
                "use --ppo.estimator rloo or grpo, or --supervision.reward own."
            )
        if self.curriculum.kind != "none" and sampling.num_generations < 2:
            yield (
                f"--curriculum.kind {self.curriculum.kind} compares a prompt's answers; set --num_generations 2 or more."
            )
        if user is None and self.conversation != ConversationConfig():
            yield "--conversation.* says how a conversation is played: give --conversation.user, or leave the others out."
        if self.reward.execution.weight != 0 and self.steps.by != "none":
            yield "--reward.execution.weight: a step is no program; leave --steps.by out."
        if (supervision == "s3ft") and ppo.ce_coef == 0:
            yield "--supervision.mode s3ft imitates: give --ppo.ce_coef 1."
        if self.steps.by != "none" and (task is not None or user is not None):
            yield "--steps.by takes single answers apart: leave --rollout.task and --conversation.user out."
        if (task is not None or user is not None) and self.rollout.engine == "vllm":
            named = "--rollout.task" if task is not None else "--conversation.user"
            yield f"{named}: episodes of several turns are sampled by transformers alone; leave --rollout.engine out."
        if user == "replay" and self.data.messages != "first_turn":
            yield "--conversation.user replay: the data is asked turn by turn; give --data.messages first_turn."
        if sampling.temperature == 0:
            yield f"--sampling.temperature {sampling.temperature}: training samples, so it must be above 0."
        if ppo.estimator != "gae" and sampling.num_generations < 2:
            yield (
                f"--ppo.estimator {ppo.estimator}: compares candidates, so sampling.num_generations must be 2 or more."
            )
        if self.reward.normalize == "within_prompt" and sampling.num_generations < 2:
            yield (
                "--reward.normalize within_prompt: compares candidates, so sampling.num_generations must be 2 or more; or "
                "use --reward.normalize running."
            )
        if ppo.num_mini_batches > self.run.batch_size * sampling.num_generations:
            yield f"--ppo.num_mini_batches {ppo.num_mini_batches}: more than there are answers in a step."
