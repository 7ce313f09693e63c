"""The experiment's configuration: one frozen class a concept, TOML in, JSON out.

A variant is a union on `type`. An unknown key is an error that names the nearest known one. Overrides
are TOML lines with dotted keys: `optim.learning_rate=2e-4`, `arms.full.seed=3`. The resolved config is
written as JSON (run.json), which keeps nulls; hand-written files stay TOML.
"""

from vlopd.config.analysis import (
    EvalConfig,
    GaussianNull,
    GeometryConfig,
    LowRankNull,
    NullConfig,
    PermutedNull,
    RowColumnNull,
    SampledConfig,
    SignFlippedNull,
    UlpNull,
)
from vlopd.config.arms import (
    RANDOM,
    CheckpointArm,
    DistillArm,
    ExtrapolateArm,
    ImportedArm,
    SourceArm,
    Subspace,
    TeacherArm,
    TransplantArm,
    checkpoints_of,
    mask_of,
)
from vlopd.config.base import ConfigError, DataError, UserError
from vlopd.config.data import CapitalsData, EmojiData, FileData, ReasoningData, ShapesData
from vlopd.config.experiment import ExperimentConfig, explain
from vlopd.config.input import config_of, load_config, parse_override, section_of
from vlopd.config.masks import (
    ComplementMask,
    DifferenceMask,
    EnergyMask,
    FileMask,
    IntersectionMask,
    MagnitudeMask,
    MaskConfig,
    PrincipalMask,
    RandomMask,
    Reference,
    TopFractionMask,
    UnionMask,
    VisibleMask,
    WholeMask,
)
from vlopd.config.models import (
    TEMPLATE_NAMES,
    CaptionContext,
    ContextConfig,
    ImageContext,
    MixedTeachers,
    ModelConfig,
    RoutedTeachers,
    SystemContext,
    TeacherConfig,
    TemplateContext,
)
from vlopd.config.objective import (
    JSD,
    K1,
    K2,
    K3,
    NLL,
    Divergence,
    ForwardKL,
    FullSupport,
    IntersectionTopK,
    LossConfig,
    ReverseKL,
    RewardConfig,
    RolloutConfig,
    SampledToken,
    SkewForwardKL,
    SkewReverseKL,
    StudentTopK,
    TeacherTopK,
    TopK,
    Writer,
)
from vlopd.config.recipe import Recipe
from vlopd.config.training import SGD, AdamW, Lion, Muon, OptimConfig, RMSProp

__all__ = [
    "TEMPLATE_NAMES",
    "AdamW", "CapitalsData", "CaptionContext", "CheckpointArm", "ComplementMask", "ConfigError",
    "ContextConfig", "DataError", "DifferenceMask", "DistillArm", "Divergence", "EmojiData",
    "EnergyMask", "EvalConfig", "ExperimentConfig", "ExtrapolateArm", "FileData", "FileMask",
    "ForwardKL", "FullSupport", "GaussianNull", "GeometryConfig", "ImageContext", "ImportedArm",
    "IntersectionMask", "IntersectionTopK", "JSD", "K1", "K2", "K3", "Lion", "LossConfig",
    "LowRankNull", "MagnitudeMask", "MaskConfig", "MixedTeachers", "ModelConfig", "Muon", "NLL",
    "NullConfig", "OptimConfig", "PermutedNull", "PrincipalMask", "RANDOM", "RMSProp",
    "RandomMask", "ReasoningData", "Recipe", "Reference", "ReverseKL", "RewardConfig",
    "RolloutConfig", "RoutedTeachers", "RowColumnNull", "SGD", "SampledConfig", "SampledToken",
    "ShapesData", "SignFlippedNull", "SkewForwardKL", "SkewReverseKL", "SourceArm", "StudentTopK",
    "Subspace", "SystemContext", "TeacherArm", "TeacherConfig", "TeacherTopK", "TemplateContext",
    "TopFractionMask", "TopK", "TransplantArm", "UlpNull", "UnionMask", "UserError",
    "VisibleMask", "WholeMask", "Writer", "checkpoints_of", "config_of", "explain", "load_config", "mask_of",
    "parse_override", "section_of",
]  # fmt: skip
