"""Training: what learns, the Trainer and its checkpoints, metrics, command lines, cached features and reports."""

from .arguments import FreezingArguments, RunArguments, StageArguments, native_recipe, parse_arguments
from .checkpoints import checkpoint_to_resume, claim_new_output_dir, encoder_digest, load_checkpoint
from .features import CachedFeaturesCollator, FeatureCache, cache_features
from .freezing import TRAINABLE, freeze, is_frozen, parameter_table
from .loading import TrainingData, load_data, load_start, make_collator
from .metering import StepMeter, training_flops
from .reports import SampleSheet
from .trainer import MiniMindVTrainer


__all__ = [
    "TRAINABLE",
    "CachedFeaturesCollator",
    "FeatureCache",
    "FreezingArguments",
    "MiniMindVTrainer",
    "RunArguments",
    "SampleSheet",
    "StageArguments",
    "StepMeter",
    "TrainingData",
    "cache_features",
    "checkpoint_to_resume",
    "claim_new_output_dir",
    "encoder_digest",
    "freeze",
    "is_frozen",
    "load_checkpoint",
    "load_data",
    "load_start",
    "make_collator",
    "native_recipe",
    "parameter_table",
    "parse_arguments",
    "training_flops",
]
