"""What a training script is told: the native recipe as defaults, and the command line."""

import argparse
import importlib.util
import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import is_tensorboard_available

from ..data import RandomAffine
from ..hardware import has_fast_bf16
from .freezing import TRAINABLE


@dataclass
class RunArguments:
    """What each training script asks for beyond `TrainingArguments`: the model and the data."""

    model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the model to start from, with its processor; or give --config."}
    )
    config: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "For fresh weights: the name of a preset, or folder or Hub id of a MiniMind-V configuration; or, in a YAML "
            "file, the fields of one."
        },
    )
    processor: str | None = field(
        default=None,
        metadata={
            "help": "With --config: folder or Hub id of a MiniMind-V processor, or of a tokenizer; without, a tokenizer is "
            "trained on the training data."
        },
    )
    vision_tower: str | None = field(
        default=None, metadata={"help": "With --config: folder or Hub id of the image encoder whose weights to take."}
    )
    language_model: str | None = field(
        default=None, metadata={"help": "With --config: folder or Hub id of the language model whose weights to take."}
    )
    data_files: list[str] = field(default_factory=list, metadata={"help": "The training data: files, or patterns of names."})
    image_folder: str | None = field(
        default=None, metadata={"help": "Folder or zip archive that names of images are relative to."}
    )
    eval_files: list[str] = field(
        default_factory=list,
        metadata={"help": "Held-out data, for evaluation: by default after each epoch."},
    )
    max_length: int = field(default=640, metadata={"help": "Longest sample in tokens, with its images; longer ones are cut."})
    pack_length: int | None = field(
        default=None,
        metadata={"help": "Fill rows of so many tokens with several samples each: hardly any padding, more samples in a step."},
    )
    cache_features: str | None = field(
        default=None,
        metadata={
            "help": "Folder to keep the frozen encoder's output in: later epochs need no encoder (300 to 600 KB an image)."
        },
    )
    threads: int | None = field(
        default=None, metadata={"help": "CPU threads of each process; 1 is fastest for the matrices of a very small model."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read the training data as it is used; needs --max_steps."})
    strict: bool = field(default=False, metadata={"help": "Stop at rows that would be repaired or dropped."})
    max_dropped: float = field(
        default=0.01, metadata={"help": "Share of rows that may be dropped, or lose an <image>, before the run is refused."}
    )
    random_system: float = field(
        default=0.0, metadata={"help": "Probability of a random system message where there is none (minimind-3v: 0.2)."}
    )
    drop_empty_thinking: float = field(
        default=0.0, metadata={"help": "Probability of leaving empty thinking blocks out (minimind-3v: 0.8)."}
    )


@dataclass
class FreezingArguments:
    """What a script asks for that freezes parts of the model."""

    trainable: str = field(
        default="projector", metadata={"help": f"What to train, the rest is frozen: {', '.join(TRAINABLE)}."}
    )


@dataclass
class StageArguments(FreezingArguments):
    """What the scripts of the two stages ask for besides."""

    augment: float = field(
        default=0.0,
        metadata={
            "help": "Shift, scale, turn and shear each training image at random, by up to this share (0.1 is much); none is "
            "mirrored or recoloured. Held-out images stay as they are."
        },
    )
    independent_turns: bool = field(
        default=False,
        metadata={
            "help": "Let each turn of a row see the image and itself alone: for questions about an image that are no "
            "conversation, which could be answered from the turns before. Prompts then leave out the turns before, too."
        },
    )
    muon: bool = field(
        default=False,
        metadata={
            "help": "Train linear layers and convolutions with Muon and the rest, experts too, with AdamW: better for small "
            "models from nothing."
        },
    )
    encoder_learning_rate: float | None = field(
        default=None, metadata={"help": "With --muon, the learning rate of the image encoder; by default --learning_rate."}
    )
    samples: int = field(
        default=8, metadata={"help": "Held-out rows to answer at each evaluation, for a sheet of images with the answers."}
    )
    save_encoder: bool = field(default=False, metadata={"help": "Write a frozen encoder into intermediate checkpoints too."})


def native_recipe() -> dict[str, Any]:
    """The `TrainingArguments` that both native stages share, and what makes them practical here."""
    return {
        # AdamW, with a cosine from the learning rate to a tenth of it, whose steps count from 1
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine_warmup_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "bf16": has_fast_bf16(),
        "use_cpu": not torch.accelerator.is_available(),
        "remove_unused_columns": False,
        # Each process collates for itself: a batch of images cannot be sliced into rows
        "accelerator_config": {"dispatch_batches": False},
        "dataloader_num_workers": min(4, max(1, (os.cpu_count() or 2) // 2)),
        "logging_steps": 10,
        "save_total_limit": 2,
        "hub_strategy": "end",  # checkpoints are no whole models
        "report_to": ["tensorboard"] if is_tensorboard_available() else [],
    }


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


class _Parser(HfArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_arguments(
    stage: dict[str, Any],
    description: str | None,
    *others: type,
    training: type = TrainingArguments,
    needs: dict[str, str] | None = None,
) -> tuple:
    """Read the command line of a training script: an optional YAML or JSON file first, then flags, which win over the file.

    Args:
        stage: defaults of this stage, for fields of all these classes, over `native_recipe()`.
        description: for `--help`.
        others: more dataclasses, with fields of the script's own.
        training: a subclass of `TrainingArguments`, in its stead.
        needs: modules that the script uses, with the extra of this package that installs each.

    Returns:
        `RunArguments`, `TrainingArguments`, and one of each of the others.
    """
    kinds = (RunArguments, training, *others)
    # A subclass may have fields that RunArguments has too, as TRL's: both are told
    parser = _Parser(
        kinds, description=description, formatter_class=_HelpFormatter, conflict_handler="resolve", allow_abbrev=False
    )
    parser.usage = "%(prog)s [RECIPE.yaml] --model FOLDER --data_files FILE … --image_folder FOLDER --output_dir FOLDER …"
    known = {argument.name for kind in kinds for argument in fields(kind) if argument.init}
    defaults = native = native_recipe() | stage
    given: set[str] = set()
    argv = sys.argv[1:]
    if argv and Path(argv[0]).suffix in (".yaml", ".yml", ".json"):
        path = argv.pop(0)
        try:
            recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))  # JSON is YAML too
        except (OSError, yaml.YAMLError) as error:
            parser.error(f"cannot read {path}: {error}")
        if not isinstance(recipe, dict):
            parser.error(f"{path}: expected names with values, got {recipe!r}")
        if unknown := sorted(str(name) for name in recipe if name not in known):
            parser.error(f"{path}: there is no argument {', '.join(unknown)}")
        wanted = {argument.name for kind in kinds for argument in fields(kind) if argument.default is not None}
        if empty := sorted(name for name, value in recipe.items() if value is None and name in wanted):
            parser.error(f"{path}: {', '.join(empty)} has no value")
        if not isinstance(recipe.get("config", ""), (str, dict)):
            parser.error(f"{path}: config: expected a name or fields with values, got {recipe['config']!r}")
        defaults, given = native | recipe, {*recipe}
    parser.set_defaults(**defaults)
    values = vars(parser.parse_args(argv))
    for module, extra in (needs or {}).items():
        if importlib.util.find_spec(module) is None:
            parser.error(f'this script needs {module}: pip install -e ".[{extra}]"')
    # What belongs to native's schedule and precision gives way to another choice of either
    own_schedule = values["lr_scheduler_type"] != native["lr_scheduler_type"]
    if own_schedule and values["lr_scheduler_kwargs"] is native["lr_scheduler_kwargs"]:
        values["lr_scheduler_kwargs"] = None
    flags = {flag.partition("=")[0].removeprefix("--").replace("-", "_") for flag in argv if flag.startswith("--")}
    if "num_train_epochs" in flags and "max_steps" not in flags:
        values["max_steps"] = -1  # the file's, which Trainer would put before the epochs
    if values["eval_files"] and values["eval_strategy"] == "no":
        values["eval_strategy"] = "epoch"
    if values["fp16"]:
        values["bf16"] = False
    if values["ddp_find_unused_parameters"] is None:
        values["ddp_find_unused_parameters"] = values.get("trainable") == "all"  # an encoder's last layers may be of no use
    try:
        run, args, *more = parser.parse_dict(values)
        _check(run, args, values.get("trainable"), values.get("augment"))
        if values.get("independent_turns") and run.pack_length is not None:
            raise ValueError("--independent_turns and --pack_length: one mask cannot keep both turns and samples apart.")
        if values.get("muon") and "optim" in given | flags:
            raise ValueError("--muon and --optim: Muon is an optimizer, with AdamW for what is no matrix; leave --optim out.")
        if values.get("encoder_learning_rate") is not None and not values.get("muon"):
            raise ValueError("--encoder_learning_rate needs --muon: other optimizers have one learning rate for all.")
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    return run, args, *more


def _check(run: RunArguments, args: TrainingArguments, trainable: str | None, augment: float | None) -> None:
    """Refuse what cannot work, before anything is loaded."""
    if (run.model is None) == (run.config is None):
        raise ValueError("Give either --model, to start from trained weights, or --config, to start from fresh ones.")
    parts = [name for name in ("processor", "vision_tower", "language_model") if getattr(run, name) is not None]
    if run.model is not None and parts:
        raise ValueError(f"--{parts[0]} belongs to --config: --model {run.model} brings its own.")
    if not run.data_files:
        raise ValueError("Give the training data with --data_files, and the folder of its images with --image_folder.")
    if trainable not in (None, *TRAINABLE):
        raise ValueError(f"trainable={trainable!r}: expected one of {', '.join(TRAINABLE)}.")
    RandomAffine(augment or 0.0)  # which refuses a share that is none
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise ValueError(f"--num_train_epochs {args.num_train_epochs}: expected a positive number, or --max_steps.")
    if run.streaming and run.config is not None and run.processor is None:
        raise ValueError("--streaming needs --processor: a tokenizer would be trained on all the rows before the first step.")
    if run.threads is not None and run.threads < 1:
        raise ValueError(f"--threads {run.threads}: expected 1 or more.")
    if run.streaming and args.max_steps <= 0:
        raise ValueError("--streaming does not know how long the data is: give the number of steps with --max_steps.")
    if run.pack_length is not None and run.pack_length < run.max_length:
        raise ValueError(
            f"--pack_length {run.pack_length}: expected at least --max_length, {run.max_length}, for a sample to fit."
        )
    if run.cache_features and (run.streaming or trainable == "all" or augment):
        raise ValueError("--cache_features needs a frozen encoder, no --augment, and data that is not streamed.")
    if not run.eval_files and args.eval_strategy != "no":
        raise ValueError(f"--eval_strategy {args.eval_strategy.value} needs --eval_files: the held-out data.")
