"""Training: what learns, the Trainer and its checkpoints, metrics, command lines, cached features and reports."""

from .arguments import (
    RunArguments,
    TrainingData,
    checkpoint_to_resume,
    load_data,
    load_start,
    make_collator,
    native_recipe,
    parse_arguments,
)
from .checkpoints import encoder_digest, load_checkpoint
from .features import CachedFeaturesCollator, FeatureCache, encode_images
from .freezing import TRAINABLE, freeze, is_frozen, parameter_table
from .metering import StepMeter, matmul_rate, training_flops
from .trainer import MiniMindVTrainer


__all__ = [
    "TRAINABLE",
    "CachedFeaturesCollator",
    "FeatureCache",
    "MiniMindVTrainer",
    "RunArguments",
    "StepMeter",
    "TrainingData",
    "checkpoint_to_resume",
    "encode_images",
    "encoder_digest",
    "freeze",
    "is_frozen",
    "load_checkpoint",
    "load_data",
    "load_start",
    "make_collator",
    "matmul_rate",
    "native_recipe",
    "parameter_table",
    "parse_arguments",
    "training_flops",
]
