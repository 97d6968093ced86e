"""What goes into training steps, told as rates, shares, and use of the machine."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..hardware import matmul_rate
from ..modeling_minimind_v import MiniMindVForConditionalGeneration
from .freezing import is_frozen


def training_flops(model: MiniMindVForConditionalGeneration) -> dict[str, float]:
    """Floating-point operations of a training step, forward and backward, for what it is made of.

    Matrix products alone, two operations for each multiplication and addition; of a mixture of experts, the experts that
    a token passes through; of causal attention, the pairs that it allows. What is computed twice or on padding is no use
    and is not counted.

    Returns:
        Operations for each "token", "pair" (of a query and a key that it sees), "label", and "image".
    """
    inner, text, vision = model.model, model.config.get_text_config(), model.config.vision_config
    flops = dict.fromkeys(("token", "pair", "label", "image"), 0.0)
    # From the bottom up: a layer passes a gradient down if something below it learns
    below = not is_frozen(inner.multi_modal_projector) or not is_frozen(inner.get_input_embeddings())
    for layer in inner.language_model.layers:
        for weight in layer.parameters():
            if weight.dim() > 1:
                used = text.num_experts_per_tok / text.num_experts if weight.dim() == 3 else 1.0  # experts are stacked
                flops["token"] += 2 * weight.numel() * used * (1 + below + weight.requires_grad)
        learns = below or not is_frozen(layer)
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        flops["pair"] += 4 * text.num_attention_heads * head_dim * (1 + 2 * learns)
        below = learns
    flops["label"] = 2 * model.lm_head.weight.numel() * (1 + below + model.lm_head.weight.requires_grad)

    encoder_learns = not is_frozen(inner.vision_tower)
    flops["image"] = _encoder_flops(inner.vision_tower, vision.image_size) * (1 + 2 * encoder_learns)
    for weight in inner.multi_modal_projector.parameters():
        if weight.dim() > 1:
            tokens = model.config.image_seq_length
            flops["image"] += 2 * weight.numel() * tokens * (1 + encoder_learns + weight.requires_grad)
    return flops


def _encoder_flops(encoder: PreTrainedModel, size: int) -> int:
    """Of one image, forward, as torch counts them without computing: encoders differ too much for a formula."""
    tensors = {name: tensor.to("meta") for name, tensor in (*encoder.named_parameters(), *encoder.named_buffers())}
    pixels = torch.empty(1, 3, size, size, dtype=encoder.dtype, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        functional_call(encoder, tensors, (pixels,))
    return counter.get_total_flops()


def summing_dtype(device: torch.device) -> torch.dtype:
    """In which long sums are kept: float64, or float32 on Apple's GPUs, which have no other."""
    return torch.float32 if device.type == "mps" else torch.float64


class StepMeter:
    """Counts samples, tokens and images of training steps, on the device, and reads them out when somebody asks.

    Args:
        model: without wrappers.
        accelerator: knows the device, the precision and the other processes.
    """

    _FIELDS = ("samples", "tokens", "positions", "pairs", "images", "encoded", "labels", "aux_loss")

    def __init__(self, model: MiniMindVForConditionalGeneration, accelerator: Accelerator):
        self._model = model
        self._accelerator = accelerator
        self._pad_token_id = model.config.get_text_config().pad_token_id
        self._flops = training_flops(model)  # now, since an engine may shard the weights later
        self._rate = 0.0
        self._reset()

    def _reset(self) -> None:
        device = self._accelerator.device
        self._counts = torch.zeros(len(self._FIELDS), dtype=summing_dtype(device), device=device)
        self._started: float | None = None

    def start(self) -> None:
        """Start the clock, unless it runs."""
        if not self._rate:
            precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self._accelerator.mixed_precision)
            self._rate = matmul_rate(self._accelerator.device, precision or self._model.dtype or torch.float32)
        if self._started is None:
            self._started = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock, for work that is no training."""
        before = time.perf_counter()
        yield
        if self._started is not None:
            self._started += time.perf_counter() - before

    @torch.no_grad()
    def add(self, inputs: dict[str, Any], aux_loss: torch.Tensor | float) -> None:
        """Count a batch.

        Args:
            inputs: of the model: `input_ids` (B, T), `labels`, …
            aux_loss: what this batch adds to the auxiliary loss of its step.
        """
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        tokens = mask.bool() if mask is not None and mask.ndim == 2 else ids != self._pad_token_id
        positions = inputs.get("position_ids")  # packed samples start again at 0
        starts = tokens & (positions == 0) if positions is not None else tokens.any(dim=1)
        seen = positions + 1 if positions is not None else tokens.cumsum(dim=1)
        pixels = inputs.get("pixel_values")
        encoded = 0 if pixels is None else pixels.shape[:-3].numel()
        ready = (inputs.get("mm_encoder_outputs") or {}).get("image")
        images = encoded if ready is None else len(ready.last_hidden_state)
        labels = (inputs["labels"][:, 1:] != -100).sum()
        counts = (starts.sum(), tokens.sum(), ids.numel(), (seen * tokens).sum(), images, encoded, labels, aux_loss)
        self._counts += torch.stack([torch.as_tensor(count).to(self._counts) for count in counts])

    def read(self, steps: int) -> dict[str, float]:
        """What was counted since the last reading, over all processes; the count and the clock start anew.

        Args:
            steps: optimiser steps since then.
        """
        seconds = time.perf_counter() - (self._started or time.perf_counter())
        totals = self._accelerator.reduce(self._counts, reduction="sum").tolist()
        count = dict(zip(self._FIELDS, totals, strict=True))
        self._reset()
        if not (seconds and count["positions"]):
            return {}
        useful = sum(
            count[name] * self._flops[kind]
            for name, kind in (("tokens", "token"), ("pairs", "pair"), ("labels", "label"), ("encoded", "image"))
        )
        return {
            "aux_loss": count["aux_loss"] / steps,
            "samples_per_second": count["samples"] / seconds,
            "tokens_per_second": count["tokens"] / seconds,
            "images_per_second": count["images"] / seconds,
            "supervised_share": count["labels"] / count["tokens"],
            "padding_share": 1 - count["tokens"] / count["positions"],
            "mfu": useful / seconds / (self._rate * self._accelerator.num_processes),
        }
