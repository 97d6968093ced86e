"""Checkpoints: a mark that they are complete, an owner for their folder, and loading those that leave the encoder out."""

import atexit
import contextlib
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, logging

from ..files import write_file
from ..modeling_minimind_v import MiniMindVForConditionalGeneration
from ..processing_minimind_v import MiniMindVProcessor


logger = logging.get_logger(__name__)

RUN_FILE = "minimind_v_run.json"
"""Written last into a checkpoint, which is complete with it: size and CRC-32 of each file, the global batch size and the
training seconds of the run, what shards it, and which encoder is left out."""

ENCODER = "model.vision_tower."

_LOCK_FILE = "_run.lock"  # what begins with "_" is not pushed to the Hub
_locks: dict[Path, FileLock] = {}


# ── The folder of a run ──────────────────────────────────────────────────────────────────────────────────────────────


def claim_output_dir(folder: str | os.PathLike) -> None:
    """Keep other runs out of a folder until this process ends, however it ends.

    Raises:
        ValueError: another run is writing into it.
    """
    path = Path(folder).resolve() / _LOCK_FILE
    if path in _locks:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=2)  # a process that was killed takes a moment to go
    except Timeout:
        raise ValueError(f"Another run is writing into {folder}: wait for its end, or choose another --output_dir.") from None
    _locks[path] = lock
    atexit.register(path.unlink, missing_ok=True)


def what_is_saved(folder: str | os.PathLike) -> str:
    """What a run that stops here leaves, in a sentence."""
    complete = [path for path in sort_checkpoints(str(folder)) if (Path(path) / RUN_FILE).exists()]
    if complete:
        return f"{complete[-1]} is saved, and the same command goes on from there."
    return "No checkpoint is saved yet: the same command starts from the beginning."


# ── Complete checkpoints ─────────────────────────────────────────────────────────────────────────────────────────────


def _checksum(path: Path) -> list[int]:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(2**20):
            checksum = zlib.crc32(block, checksum)
    return [path.stat().st_size, checksum]


def mark_complete(folder: Path, run: dict[str, Any]) -> None:
    """Write the mark of a checkpoint, with what is to be known of its run. No file may be written into it afterwards."""
    files = {path.relative_to(folder).as_posix(): _checksum(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    write_file(folder / RUN_FILE, json.dumps({**run, "files": files}, indent=2) + "\n")


def check_checkpoint(folder: str | os.PathLike) -> dict[str, Any]:
    """What `mark_complete` wrote of a run, once every file of its checkpoint is what it was then.

    Raises:
        ValueError: it is unfinished, of another trainer, without its optimizer, or a file is damaged or missing.
    """
    path = Path(folder) / RUN_FILE
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        files = dict(run["files"])
    except FileNotFoundError:
        raise ValueError(f"{folder} is unfinished, or of another trainer: it has no {RUN_FILE}.") from None
    except (OSError, ValueError, TypeError, KeyError):
        raise ValueError(f"{path} is damaged: resume from another checkpoint.") from None
    for name, written in files.items():
        if not (path := Path(folder) / name).is_file():
            raise ValueError(f"{path} is missing: resume from another checkpoint.")
        if _checksum(path) != written:
            raise ValueError(f"{path} is damaged: resume from another checkpoint.")
    if not any("optim" in name for name in files):
        raise ValueError(
            f"{folder} has no optimizer (--save_only_model): training cannot go on from it, but start from its weights."
        )
    return run


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """The newest checkpoint of a run that is complete and undamaged, with a warning for each newer one that is not.

    Raises:
        ValueError: there are complete checkpoints, and none can be used.
    """
    damaged = []
    for checkpoint in reversed(sort_checkpoints(str(folder))):
        try:
            check_checkpoint(checkpoint)
        except ValueError as error:
            logger.warning(f"{error} The checkpoint before it is taken, if there is one.")
            if (Path(checkpoint) / RUN_FILE).exists():
                damaged.append(str(error))
        else:
            return checkpoint
    if damaged:
        raise ValueError(f"No checkpoint in {folder} can be used: {damaged[0]} Remove them to start from the beginning.")
    return None


@contextlib.contextmanager
def explained_failure(folder: Path, output_dir: str, is_writer: bool) -> Iterator[None]:
    """Around what writes a folder of a run: if it fails, that is removed, and the error tells of the disk and of what is saved.

    Args:
        folder: what is written.
        output_dir: of the run, with its checkpoints.
        is_writer: whether this process may remove it: another one fails too when its peer is killed.

    Raises:
        OSError: in the place of what safetensors, torch and Python raise.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(output_dir).free
        if is_writer:
            shutil.rmtree(folder, ignore_errors=True)
        cause = "the disk is full" if free < 2**24 else f"with {free / 1e9:.1f} GB free on its disk"
        raise OSError(f"{folder} could not be written, {cause}: {error}. {what_is_saved(output_dir)}") from error


def claim_new_output_dir(args: TrainingArguments, finished: str = CONFIG_NAME) -> None:
    """Keep other runs out of the output folder, and this run out of a folder with the model of a finished one.

    Args:
        args: with the output folder.
        finished: the file in it by which a finished run is known.

    Raises:
        ValueError: another run is writing into it, or a finished one has, and nobody asked to go on with that.
    """
    if args.process_index == 0:
        claim_output_dir(args.output_dir)
    if args.resume_from_checkpoint is None and (Path(args.output_dir) / finished).exists():
        raise ValueError(f"{args.output_dir} holds the model of a finished run: choose another --output_dir, or remove it.")


def checkpoint_to_resume(args: TrainingArguments, finished: str = CONFIG_NAME) -> str | None:
    """The checkpoint to go on from: the one that was asked for, or the last in the output folder, or None for a new run.

    Args:
        args: with the output folder.
        finished: the file in it by which a finished run is known.

    Raises:
        ValueError: there is none that can be used, where one is asked for, or the output folder is not this run's.
    """
    claim_new_output_dir(args, finished)
    asked = args.resume_from_checkpoint
    if asked not in (None, "true", "True", True):
        check_checkpoint(asked)
        return asked
    last = last_checkpoint(args.output_dir)
    if last is None and asked is not None:
        raise ValueError(f"--resume_from_checkpoint: there is no complete checkpoint in {args.output_dir}.")
    if last is not None and args.should_log:
        print(f"Going on from {last}.")
    return last


# ── Checkpoints without their encoder ────────────────────────────────────────────────────────────────────────────────


def encoder_digest(model: MiniMindVForConditionalGeneration) -> str:
    """SHA-256 of the encoder's weights, by which a checkpoint without them knows the right ones again."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.model.vision_tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())  # a number has no dimension
    return digest.hexdigest()


def load_checkpoint(
    folder: str | os.PathLike, encoder: MiniMindVForConditionalGeneration | str | os.PathLike | None = None
) -> MiniMindVForConditionalGeneration:
    """Load the model of a training checkpoint, and re-attach the frozen encoder where it was left out.

    Args:
        folder: a `checkpoint-N` folder.
        encoder: a model with the encoder, or its folder or Hub id; by default what the training run started from.

    Raises:
        ValueError: it is no complete checkpoint of a whole model, or the encoder is not the one that it was trained with.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds a LoRA adapter, not a model: load it beside the model that it was trained for, with "
            f"PeftModel.from_pretrained(model, {str(folder)!r})."
        )
    if not (folder / RUN_FILE).exists():
        raise ValueError(f"{folder} is no complete checkpoint: it has no {RUN_FILE}.")
    run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
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
    state |= load_file(folder / SAFE_WEIGHTS_NAME)
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


def require_processor(processor: MiniMindVProcessor, folder: str | os.PathLike) -> None:
    saved = MiniMindVProcessor.from_pretrained(folder)
    colours = [(list(each.image_processor.image_mean), list(each.image_processor.image_std)) for each in (saved, processor)]
    is_other = {
        "another tokenizer": saved.tokenizer.get_vocab() != processor.tokenizer.get_vocab(),
        "another mean or deviation of the images": colours[0] != colours[1],
    }
    for what, differs in is_other.items():
        if differs:
            raise ValueError(
                f"{folder} was trained with {what} than this run's. What is learned from the rows changes with them and with "
                f"--seed: keep them as they were, or pass --processor {folder}."
            )


def require_complete(model: PreTrainedModel, result: Any, folder: str | os.PathLike, absent: frozenset[str]) -> None:
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    missing = sorted(set(result.missing_keys) - absent - tied)
    if missing or result.unexpected_keys:
        raise ValueError(
            f"{folder} does not fit the model: it lacks {missing[:5] or 'nothing'} and has besides "
            f"{result.unexpected_keys[:5] or 'nothing'}."
        )
