"""A Trainer with telling metrics and with checkpoints that are light and never half written.

The loop itself, parallelism, precision and logging are those of transformers and accelerate.
"""

import contextlib
import functools
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import IterableDatasetShard
from torch import nn
from transformers import Trainer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, rotate_checkpoints
from transformers.utils import CONFIG_NAME, logging

from ..data import PixelNormalizer, RandomAffine
from ..files import make_readable
from ..modeling_minimind_v import MiniMindVForConditionalGeneration
from .checkpoints import (
    ENCODER,
    check_checkpoint,
    claim_output_dir,
    encoder_digest,
    explained_failure,
    last_checkpoint,
    mark_complete,
    require_complete,
    require_encoder,
    require_processor,
    what_is_saved,
)
from .freezing import is_frozen
from .metering import StepMeter, summing_dtype
from .muon import MuonWithAdamW
from .reports import write_model_card


logger = logging.get_logger(__name__)


class MiniMindVTrainer(Trainer):
    """A `Trainer` for MiniMind-V, with the same arguments and besides:

    * logits are computed only where there are labels;
    * it logs the language loss and the auxiliary loss apart, samples, tokens and images per second, the supervised share of
      the tokens and the padding share of the positions, and `mfu`, the share of the machine's matrix rate that trains;
    * a checkpoint is marked when it is complete, and one without the mark is not resumed; two runs do not share a folder;
    * intermediate checkpoints leave a frozen encoder out, unless `save_encoder` is set;
    * a run can be resumed with another number of processes: gradient accumulation makes up for it.

    Args:
        save_encoder: write a frozen encoder into intermediate checkpoints too.
        augment: how strongly training images are changed at random, as `RandomAffine` has it.
        muon: train with `MuonWithAdamW` instead of what `optim` says.
        encoder_learning_rate: with `muon`, that of the image encoder; `learning_rate` by default.
        data_counts: for the model card, what was read, as `DataReport`s by name.

    Raises:
        ValueError: label smoothing is asked for, which `Trainer` would compute against labels that are not shifted; one
            process has several cards; the model was loaded in shards; FSDP is of version 1, which was never tried; or
            checkpoints would be pushed to the Hub.
    """

    def __init__(
        self,
        *args,
        save_encoder: bool = False,
        augment: float = 0.0,
        muon: bool = False,
        encoder_learning_rate: float | None = None,
        data_counts: dict[str, Any] | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.augmentation, self.muon = RandomAffine(augment), muon
        self.encoder_learning_rate = self.args.learning_rate if encoder_learning_rate is None else encoder_learning_rate
        if muon and (self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.fp16):
            raise ValueError(
                "Muon needs whole matrices and unscaled gradients: no FSDP or DeepSpeed, and bf16 instead of fp16."
            )
        if any(hasattr(parameter, "ds_id") for parameter in self.model.parameters()):
            raise ValueError(
                "The weights are sharded already (ZeRO-3), and can be neither counted nor hashed: load the model with "
                "`load_start`, or before the TrainingArguments are made."
            )
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.args.label_smoothing_factor}: expected 0. Trainer does not shift the labels of "
                "models from outside transformers for it, so it would teach to repeat the present token."
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"One process for {self.args.n_gpu} cards would cut a batch of images into as many rows as there are texts: "
                "start with `accelerate launch`, or show it one card with CUDA_VISIBLE_DEVICES=0."
            )
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise ValueError("FSDP version 1: expected 2. Set fsdp_version: 2, as examples/accelerate/fsdp2.yaml does.")
        if self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END:
            raise ValueError(
                f"hub_strategy={self.args.hub_strategy.value}: expected 'end'. Only the finished model is pushed, since "
                "checkpoints leave a frozen encoder out."
            )
        self.save_encoder = save_encoder
        self.data_counts = data_counts or {}
        self.start = getattr(self.bare_model(), "name_or_path", "") or None
        self.train_seconds = 0.0  # over all parts of a run that was resumed
        self._resumed_step = 0
        self._loading_from = self.args.output_dir
        self._meter = StepMeter(self.bare_model(), self.accelerator)
        self._logged_step = 0
        # Summed loss and number of labels in an evaluation
        self._held_out = torch.zeros(2, dtype=summing_dtype(self.args.device), device=self.args.device)
        # Read now, since FSDP shards it later; it never changes
        self._encoder: dict[str, Any] | None = None
        if is_frozen(self.bare_model().model.vision_tower) and not save_encoder:
            self._encoder = {"sha256": encoder_digest(self.bare_model()), "source": self.start}

    def bare_model(self) -> MiniMindVForConditionalGeneration:
        """The model without what DDP, compilation or peft wrap around it."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All of them, as native has it; `Trainer` would spare biases and norms."""
        return [name for name, _ in model.named_parameters()]

    def create_optimizer(self, *others, **kwargs):
        if self.muon and self.optimizer is None:  # type: ignore[has-type]
            args, rates = self.args, (self.args.learning_rate, self.encoder_learning_rate)
            betas = args.adam_beta1, args.adam_beta2
            self.optimizer = MuonWithAdamW(self.model, *rates, args.weight_decay, betas, args.adam_epsilon)
        return super().create_optimizer(*others, **kwargs)

    # ── Data ──

    def get_train_dataloader(self):
        dataloader = super().get_train_dataloader()
        if isinstance(dataloader.dataset, IterableDatasetShard):
            dataloader.dataset.drop_last = True  # it would fill the last batches with rows that were seen already
        return dataloader

    def _get_train_sampler(self, *args, **kwargs):
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):
            # Drawn from the state of the whole process, the order would be another in a run that is resumed
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler.set_epoch = lambda epoch: setattr(sampler, "generator", torch.Generator().manual_seed(seed + epoch))
        return sampler

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        pixels = inputs.get("pixel_values")
        if pixels is not None:
            pixels = self.augmentation.train(self.model.training)(pixels)
            inputs["pixel_values"] = pixels if pixels.is_floating_point() else self._normalize_pixels(pixels)
        return inputs

    @functools.cached_property
    def _normalize_pixels(self) -> PixelNormalizer:
        return PixelNormalizer(self.processing_class.image_processor).to(self.args.device)

    # ── Loss and metrics ──

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._meter.start()
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {**inputs, "use_cache": False}
        if "position_ids" in inputs and len(inputs["input_ids"]) > 1:
            attention = self.bare_model().config.get_text_config()._attn_implementation or ""
            if "flash" in attention:
                raise ValueError(
                    f"{attention} keeps packed samples apart only in batches of one row, and this one has "
                    f"{len(inputs['input_ids'])}: pass per_device_train_batch_size=1 with longer rows, or "
                    "attn_implementation='sdpa'."
                )
        if model.training or self.compute_metrics is None:
            inputs["skip_logits"] = True
        if not model.training:
            inputs["labels"], num_items_in_batch = self._without_repeats(inputs["labels"]), None
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            aux_loss = outputs.get("aux_loss")
            self._meter.add(inputs, 0.0 if aux_loss is None else aux_loss * self._share(inputs, num_items_in_batch))
        else:
            learned = (inputs["labels"][:, 1:] != -100).sum().to(self._held_out)
            self._held_out += torch.stack([torch.where(learned > 0, loss.to(learned) * learned, 0.0), learned])
        return (loss, outputs) if return_outputs else loss

    def _share(self, inputs, num_items_in_batch):
        """How much of its step's auxiliary loss this batch brings, as the head of the model weighs it."""
        if num_items_in_batch is None:
            return 1 / (self.current_gradient_accumulation_steps * self.accelerator.num_processes)
        counted_together = 1 if self.args.average_tokens_across_devices else self.accelerator.num_processes
        return (inputs["labels"][:, 1:] != -100).sum() / num_items_in_batch / counted_together

    def _without_repeats(self, labels: torch.Tensor) -> torch.Tensor:
        """The labels (B, T) of an evaluation batch, less those of the rows that only fill up the processes' last batches."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return labels
        own = max(0, state.remainder - self.accelerator.process_index * self.args.eval_batch_size)
        return labels.masked_fill(torch.arange(len(labels), device=labels.device)[:, None] >= own, -100)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and "learning_rate" in logs:
            metrics = self._meter.read(self.state.global_step - self._logged_step)
            if metrics:
                aux_loss = metrics.pop("aux_loss")
                logs["language_loss"] = logs["loss"] - aux_loss
                if getattr(self.bare_model().config.get_text_config(), "num_experts", 0):
                    logs["aux_loss"] = aux_loss
                logs |= metrics
            self._logged_step = self.state.global_step
        super().log(logs, start_time)

    def evaluate(self, *args, **kwargs):
        with self._meter.paused():
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """As in `Trainer`, but the loss is the mean over all labels, whatever batches and processes they are spread over."""
        self._held_out.zero_()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, learned = self.accelerator.reduce(self._held_out, reduction="sum").tolist()
        if learned:
            output.metrics[f"{metric_key_prefix}_loss"] = loss / learned
        return output

    # ── Checkpoints ──

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        args = self.args
        if self.is_world_process_zero():
            claim_output_dir(args.output_dir)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"There is no complete checkpoint in {args.output_dir} to resume from.")
        self._resumed_step, self._seconds_before = 0, 0.0
        if resume_from_checkpoint:
            run = check_checkpoint(resume_from_checkpoint)
            if run["engine"] != self._engine():
                raise ValueError(
                    f"{resume_from_checkpoint} was written with {run['engine']}, and its optimizer cannot be read with "
                    f"{self._engine()}: start the run as it was started before."
                )
            if run["encoder"] is not None:
                digest = self._encoder["sha256"] if self._encoder else encoder_digest(self.bare_model())
                require_encoder(digest, run, resume_from_checkpoint)
            if self.processing_class is not None:
                require_processor(self.processing_class, resume_from_checkpoint)
            self._keep_batch_size(resume_from_checkpoint, run["global_batch_size"])
            self._loading_from, self._seconds_before = str(resume_from_checkpoint), run["seconds"]
            self._resumed_step = json.loads((Path(resume_from_checkpoint) / TRAINER_STATE_NAME).read_text())["global_step"]
        self._logged_step, self._began = self._resumed_step, time.monotonic()
        try:
            output = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(what_is_saved(args.output_dir)) from None
        self.train_seconds = self._seconds()
        return output

    def _seconds(self) -> float:
        """How long the run has trained, also before it was resumed."""
        return self._seconds_before + time.monotonic() - self._began

    def set_initial_training_values(self, args, dataloader):
        """As in `Trainer`, but no epoch is left to a run that was killed after its last step: it would take one step more."""
        num_train_epochs, *others, max_steps = super().set_initial_training_values(args, dataloader)
        if self._resumed_step > max_steps:
            logger.warning(
                f"Nothing is left to train: {self._loading_from} has {self._resumed_step} steps, and {max_steps} are asked "
                "for. The model is that of the checkpoint."
            )
        return 0 if self._resumed_step >= max_steps else num_train_epochs, *others, max_steps

    def _engine(self) -> str:
        """What shards weights and optimizer, or else the optimizer: with that, the form of a checkpoint."""
        if self.is_fsdp_enabled:
            return "FSDP"
        if self.is_deepspeed_enabled:
            stage = self.accelerator.state.deepspeed_plugin.zero_stage
            return f"DeepSpeed ZeRO-{stage} in {self.args.world_size} processes"
        return "Muon" if self.muon else "nothing sharded"

    def global_batch_size(self) -> int:
        """Samples in an optimiser step, over all processes."""
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def _keep_batch_size(self, checkpoint: str, wanted: int) -> None:
        """Make the batches those of the run that wrote the checkpoint, also with other processes than it had."""
        if self.global_batch_size() == wanted:
            return
        at_a_time = self.args.train_batch_size * self.args.world_size
        if wanted % at_a_time:
            raise ValueError(
                f"{checkpoint} was trained with {wanted} samples in a step, which {self.args.world_size} processes with "
                f"per_device_train_batch_size={self.args.train_batch_size} cannot make: pass a divisor of "
                f"{wanted // self.args.world_size if wanted % self.args.world_size == 0 else wanted}."
            )
        self.args.gradient_accumulation_steps = wanted // at_a_time
        logger.warning(
            f"gradient_accumulation_steps={self.args.gradient_accumulation_steps}, so that a step has {wanted} samples as in "
            "the run that is resumed."
        )

    def _save_checkpoint(self, model, trial):
        """As in `Trainer`; then comes the mark that the checkpoint is complete, and only after it may older ones go."""
        args, output_dir = self.args, Path(self._get_output_dir(trial))
        folder = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self._meter.paused(), explained_failure(folder, args.output_dir, args.should_save):
            if args.should_save:
                shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
            self.accelerator.wait_for_everyone()
            limit, args.save_total_limit = args.save_total_limit, None
            try:
                super()._save_checkpoint(model, trial)
            finally:
                args.save_total_limit = limit
            self.accelerator.wait_for_everyone()
            if args.should_save:
                run = {"global_batch_size": self.global_batch_size(), "seconds": self._seconds(), "encoder": self._encoder}
                mark_complete(folder, run | {"engine": self._engine()})
                rotate_checkpoints(str(output_dir), limit, self.state.best_model_checkpoint, use_mtime=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole model and its processor, as a folder for the Hub; no file of it is ever half written."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        folder = Path(output_dir or self.args.output_dir)
        unfinished = folder / ".unfinished"
        with explained_failure(unfinished, self.args.output_dir, self.args.should_save):
            super().save_model(str(unfinished), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                (unfinished / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle; the model card tells the recipe
                make_readable(unfinished)
                # config.json last: by it a finished run is known
                for path in sorted(unfinished.iterdir(), key=lambda path: path.name == CONFIG_NAME):
                    os.replace(path, folder / path.name)
                unfinished.rmdir()
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        model = self.bare_model()
        if self.model is not model:  # an adapter: peft saves that alone
            super()._save(output_dir, state_dict)
            return
        light = self._encoder and Path(output_dir or "").name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
        if light:
            state_dict = model.state_dict() if state_dict is None else state_dict
            state_dict = {name: tensor for name, tensor in state_dict.items() if not name.startswith(ENCODER)}
            model.config.encoder_left_out = True
        if state_dict is not None and model.config.tie_word_embeddings:
            state_dict.pop("lm_head.weight", None)  # gathered from shards, it is a second copy
        # FSDP gives the model a class of its own, whose code would be copied into the folder instead of ours
        wrapped = type(model)
        model.__class__ = next(base for base in wrapped.__mro__ if not base.__module__.startswith("torch."))
        try:
            super()._save(output_dir, state_dict)
        finally:
            model.__class__ = wrapped
            if light:
                del model.config.encoder_left_out

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        model = self.bare_model()
        absent = frozenset(name for name in model.state_dict() if self._encoder and name.startswith(ENCODER))
        require_complete(model, load_result, self._loading_from, absent)

    # ── The model card ──

    def create_model_card(self, *args, **kwargs) -> None:
        """Write the model card: recipe, data counts, results and curves. `Trainer` would write its own."""
        with self._gathered():
            if self.is_world_process_zero():
                write_model_card(self)

    def _gathered(self) -> contextlib.AbstractContextManager:
        """Around what counts the weights: under ZeRO-3 each process has a part of them alone."""
        if not is_deepspeed_zero3_enabled():
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(self.model.parameters()))
