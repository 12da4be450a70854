"""Every setting of every command, as typed dataclasses with a line under each field.

The command line shows these lines as help, the run folder stores the resolved values as ``config.yaml``. Names follow
TRL where TRL has the setting. Each states with its type what it allows; ``validate`` holds a config to that. Importing
this needs no torch.
"""

from cagsr.config.reward import (
    AssociatedCoverageConfig,
    AssociationsConfig,
    CopyCoverageConfig,
    CoverageConfig,
    FocusConfig,
    GroundedCoverageConfig,
    LengthConfig,
    MeanMassConfig,
    RepetitionConfig,
    RewardConfig,
    SelfCertaintyConfig,
    UnsupportedConfig,
)
from cagsr.config.trainers import (
    CorruptionConfig,
    DpoConfig,
    PreferenceConfig,
    RewardModelConfig,
    SftConfig,
    SynthesizeConfig,
    TrainerConfig,
)
from cagsr.config.training import (
    Action,
    AttentionConfig,
    DataConfig,
    EvalConfig,
    Layers,
    LoraConfig,
    ModelConfig,
    MonitorConfig,
    PPOConfig,
    RolloutConfig,
    RunConfig,
    SalienceConfig,
    SamplingConfig,
    TrainConfig,
)
from cagsr.config.validation import validate

__all__ = [
    "Action",
    "AssociatedCoverageConfig",
    "AssociationsConfig",
    "AttentionConfig",
    "CopyCoverageConfig",
    "CorruptionConfig",
    "CoverageConfig",
    "DataConfig",
    "DpoConfig",
    "EvalConfig",
    "FocusConfig",
    "GroundedCoverageConfig",
    "Layers",
    "LengthConfig",
    "LoraConfig",
    "MeanMassConfig",
    "ModelConfig",
    "MonitorConfig",
    "PPOConfig",
    "PreferenceConfig",
    "RepetitionConfig",
    "RewardConfig",
    "RewardModelConfig",
    "RolloutConfig",
    "RunConfig",
    "SalienceConfig",
    "SamplingConfig",
    "SelfCertaintyConfig",
    "SftConfig",
    "SynthesizeConfig",
    "TrainConfig",
    "TrainerConfig",
    "UnsupportedConfig",
    "validate",
]
