"""Checkpoints that leave a frozen encoder out, and know it again."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from ..modeling_minimind_v import MiniMindVForConditionalGeneration


RUN_FILE = "minimind_v_run.json"
"""In a checkpoint: the global batch size of its run, and which encoder it leaves out."""

ENCODER = "model.vision_tower."


def encoder_digest(model: MiniMindVForConditionalGeneration) -> str:
    """SHA-256 of the encoder's weights, by which a checkpoint without them knows the right ones again."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.model.vision_tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_checkpoint(
    folder: str | os.PathLike, encoder: MiniMindVForConditionalGeneration | str | os.PathLike | None = None
) -> MiniMindVForConditionalGeneration:
    """Load the model of a training checkpoint, and re-attach the frozen encoder where it was left out.

    Args:
        folder: a `checkpoint-N` folder.
        encoder: a model with the encoder, or its folder or Hub id; by default what the training run started from.

    Raises:
        ValueError: the encoder is not the one that the checkpoint was trained with.
    """
    run = json.loads((Path(folder) / RUN_FILE).read_text(encoding="utf-8"))
    if run["encoder"] is None:
        return MiniMindVForConditionalGeneration.from_pretrained(folder)
    source = encoder if encoder is not None else run["encoder"]["source"]
    if not isinstance(source, PreTrainedModel):
        if not source:
            raise ValueError(f"{folder} leaves its encoder out and knows no folder that has it: pass encoder=.")
        source = MiniMindVForConditionalGeneration.from_pretrained(source)
    config = source.config.from_pretrained(folder)
    del config.encoder_left_out
    model = MiniMindVForConditionalGeneration(config)
    state = {ENCODER + name: tensor for name, tensor in source.model.vision_tower.state_dict().items()}
    state |= load_file(Path(folder) / SAFE_WEIGHTS_NAME)
    result = model.load_state_dict(state, strict=False)
    require_complete(model, result, folder, frozenset())
    require_encoder(encoder_digest(model), run, folder)
    return model.eval()


def require_encoder(digest: str, run: dict[str, Any], folder: str | os.PathLike) -> None:
    if digest != run["encoder"]["sha256"]:
        raise ValueError(
            f"{folder} leaves its frozen encoder out, and the encoder at hand has other weights than the one that it was "
            "trained with. Start from the same model as the run that wrote it."
        )


def require_complete(model: PreTrainedModel, result: Any, folder: str | os.PathLike, absent: frozenset[str]) -> None:
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    missing = sorted(set(result.missing_keys) - absent - tied)
    if missing or result.unexpected_keys:
        raise ValueError(
            f"{folder} does not fit the model: it lacks {missing[:5] or 'nothing'} and has besides "
            f"{result.unexpected_keys[:5] or 'nothing'}."
        )
