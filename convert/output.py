"""Where a conversion goes: a new folder that appears complete or not at all, and is tried out before it appears."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from convert.native_files import ConversionError


MAX_SHARD_SIZE = "5GB"

_MODEL_FILES = (".json", ".safetensors", ".bin", ".py", ".jinja", ".txt", ".model", ".md", ".gitattributes")

# What a user does, in a process that cannot see this package
_CHILD = """
import sys
sys.modules["minimind_v_hf"] = None
import torch, transformers
from safetensors.torch import load_file, save_file
transformers.utils.logging.set_verbosity_error()
auto_class, remote_code, folder, inputs, outputs, new_tokens, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=remote_code == "yes", dtype=torch.float32)
model.eval()
inputs = load_file(inputs)
with torch.no_grad():
    result = {"logits": model(**inputs).logits}
if int(new_tokens):
    result["tokens"] = model.generate(**inputs, max_new_tokens=int(new_tokens), do_sample=False, eos_token_id=-1)
save_file(result, outputs)
"""


def check_output(output: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Refuse an output that would destroy something, before any work is done.

    Args:
        output: the folder to be written.
        overwrite: whether a model folder that is there may be replaced.
        inputs: files and folders that the conversion reads.

    Raises:
        ConversionError: the output is a file, holds something, or holds one of the inputs.
    """
    resolved = output.resolve()
    for path in inputs:
        if path.exists() and (path.resolve() == resolved or resolved in path.resolve().parents):
            raise ConversionError(f"--output {output} is or holds the input {path}: choose another folder")
    if not output.exists():
        return
    if not output.is_dir():
        raise ConversionError(f"--output {output} is a file, where a folder was expected")
    entries = sorted(output.iterdir())
    if not entries:
        return
    if not overwrite:
        raise ConversionError(f"--output {output} is not empty: choose another folder, or pass --overwrite to replace it")
    foreign = [entry for entry in entries if not (entry.is_file() and entry.name.endswith(_MODEL_FILES))]
    if foreign or not (output / "config.json").is_file():
        reason = f"it holds {foreign[0].name}" if foreign else "it has no config.json"
        raise ConversionError(f"--overwrite replaces model folders only, and {output} is none: {reason}. Choose another folder")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output`, which takes its place at the end, and vanishes where something goes wrong."""
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        yield staging
        staging.chmod(0o777 & ~_umask())
        for file in staging.iterdir():
            file.chmod(0o666 & ~_umask())  # safetensors writes for the owner alone
        if output.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{output.name}-old-", dir=output.parent))
            output.rename(old)  # onto an empty folder
            staging.rename(output)
            shutil.rmtree(old)
        else:
            staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def save_model(
    model: PreTrainedModel, folder: Path, dtype: torch.dtype, state_dict: dict[str, torch.Tensor] | None = None
) -> None:
    """Write model, configuration and code; the configuration says `dtype`, also where the encoder is stored in another.

    Args:
        model: what to write.
        folder: where to.
        dtype: what the configuration says.
        state_dict: the tensors, where other names are wanted than the model's own.
    """
    model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE, state_dict=state_dict)
    model.config.dtype = dtype  # transformers writes that of the first tensor, which is the encoder's
    model.config.save_pretrained(folder)


@contextmanager
def open_folder(folder: Path) -> Iterator[tuple[set[str], Callable[[str], torch.Tensor]]]:
    """The names of the tensors in a model folder, and how to get one of them.

    Raises:
        ConversionError: the folder holds no readable safetensors files.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConversionError(f"{folder} holds no weights: there is no .safetensors file")
    with ExitStack() as stack:
        try:
            opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"the weights in {folder} are damaged ({error})") from None
        owner = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - it is no dict
        yield set(owner), lambda name: owner[name].get_tensor(name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sample_inputs(config) -> dict[str, torch.Tensor]:
    """A prompt for trying out a model: some tokens and, if it has eyes, a picture of noise.

    Returns:
        `input_ids` (1, tokens) and, with eyes, `pixel_values` (1, 3, height, width) in float32.
    """
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, config.get_text_config().vocab_size, (1, 16), generator=generator)
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return {"input_ids": text}
    text[text == config.image_token_id] = 0
    image = torch.full((1, config.image_seq_length), config.image_token_id)
    size = (1, vision.num_channels, vision.image_size, vision.image_size)
    pixel_values = torch.randn(size, generator=generator).mul(16).round() / 16  # which half precision holds exactly
    return {"input_ids": torch.cat((text[:, :6], image, text[:, 6:]), dim=1), "pixel_values": pixel_values}


@contextmanager
def computing_in_float32(model: nn.Module) -> Iterator[None]:
    """Make a model compute in float32, with the weights of one module at a time widened.

    CPUs compute in half precision twenty times slower, and a second copy of the model would take memory.
    """
    stored: dict[nn.Module, list[tuple[nn.Parameter, torch.Tensor]]] = {}

    def widen(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        # Attention as PyTorch has it reads its output projection's weights without calling it
        parameters = list(module.parameters(recurse=isinstance(module, nn.MultiheadAttention)))
        stored[module] = [(parameter, parameter.data) for parameter in parameters]
        for parameter in parameters:
            parameter.data = parameter.data.float()
        return tuple(map(_widened, args)), {name: _widened(value) for name, value in kwargs.items()}

    def restore(module: nn.Module, args: tuple, output: Any) -> None:
        for parameter, data in stored.pop(module):
            parameter.data = data

    with ExitStack() as stack:
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                stack.callback(module.register_forward_pre_hook(widen, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(restore).remove)
        yield


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def run_in_fresh_process(
    folder: Path, inputs: dict[str, torch.Tensor], auto_class: str, remote_code: bool, new_tokens: int = 0
) -> dict[str, torch.Tensor]:
    """Load a folder in float32 in a process of its own, without this package, and run it.

    Args:
        folder: the model.
        inputs: keyword arguments of its forward.
        auto_class: of transformers, for example `AutoModelForImageTextToText`.
        remote_code: whether the folder brings its own code.
        new_tokens: greedy tokens to generate.

    Returns:
        `logits` and, if asked for, `tokens`.

    Raises:
        ConversionError: the folder cannot be loaded or run.
    """
    with tempfile.TemporaryDirectory() as work:
        given, wanted = Path(work, "inputs.safetensors"), Path(work, "outputs.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, given)
        arguments = [auto_class, "yes" if remote_code else "no", folder, given, wanted, new_tokens, torch.get_num_threads()]
        done = subprocess.run(
            [sys.executable, "-I", "-c", _CHILD, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=work,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": work},
            check=False,
        )
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise ConversionError(f"the converted folder does not run in a fresh process: {reason}")
        return {name: tensor.clone() for name, tensor in load_file(wanted).items()}


def largest_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest absolute difference; NaN equals NaN, and infinite is what only one of them has."""
    first, second = first.double(), second.double()
    if first.shape != second.shape or not torch.equal(first.isnan(), second.isnan()):
        return float("inf")
    return float((first - second).nan_to_num(nan=0.0).abs().max())
