"""A written folder is loaded in a fresh process, as a user does, and must give what the converted model gives."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig, PreTrainedModel

from .native_files import ConversionError


TOLERANCE = 1e-5  # between the logits of two processes, times the largest logit
NEW_TOKENS = 16

# What a user does, in a process that cannot import this package
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
    logits = model(**inputs).logits
suppress = [model.config.image_token_id] if "pixel_values" in inputs else None
options = {"max_new_tokens": int(new_tokens), "do_sample": False, "eos_token_id": -1, "suppress_tokens": suppress}
tokens = model.generate(**inputs, **options)
save_file({"logits": logits, "tokens": tokens}, outputs)
"""


def verify(model: PreTrainedModel, folder: Path, remote_code: bool) -> float:
    """Load a folder in float32 in a process of its own, and compare its logits and its greedy answer, with a cache.

    Args:
        model: what the folder should hold. Its parameters become float32.
        folder: the written one.
        remote_code: whether the folder brings its own code.

    Returns:
        The largest difference of the logits. NaN equals NaN.

    Raises:
        ConversionError: the folder does not load, or gives other logits or tokens.
    """
    model = model.float().eval()
    inputs = sample_inputs(model.config)
    auto_class = "AutoModelForImageTextToText" if "pixel_values" in inputs else "AutoModelForCausalLM"
    found = _run_in_fresh_process(folder, inputs, auto_class, remote_code)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        prompt = model(**inputs).logits
        # One pass without a cache over prompt and answer: each token must be the likeliest one where it stands
        answer = model(**{**inputs, "input_ids": found["tokens"][:, :-1]}).logits[:, length - 1 :]
    if not prompt.isfinite().all() and all(parameter.isfinite().all() for parameter in model.parameters()):
        raise ConversionError("the converted model gives NaN or infinite logits, though its weights are finite")
    if "pixel_values" in inputs:
        answer[..., model.config.image_token_id] = -torch.inf  # which the answer may not hold: it has no image
    scale = TOLERANCE * max(1.0, float(prompt.nan_to_num(0, 0, 0).abs().max()))
    difference = largest_difference(found["logits"], prompt)
    if difference > scale:
        raise ConversionError(
            f"the written folder gives other logits than the converted model: they differ by {difference:.2e}"
        )
    chosen = answer.gather(-1, found["tokens"][:, length:, None])[..., 0]
    if bool((answer.amax(-1) - chosen > 10 * scale).any()):  # the margin is for two tokens that are equally likely
        raise ConversionError("the written folder answers otherwise than the converted model, when it generates with a cache")
    return difference


def sample_inputs(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """A prompt for trying out a model: text tokens and, for a vision-language model, an image of noise.

    Returns:
        `input_ids` (1, tokens) and, where there is an encoder, `pixel_values` (1, 3, height, width) in float32.
    """
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, config.get_text_config().vocab_size, (1, 16), generator=generator)
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return {"input_ids": text}
    text[text == config.image_token_id] = 0
    image = torch.full((1, config.image_seq_length), config.image_token_id)
    size = (1, vision.num_channels, vision.image_size, vision.image_size)
    pixel_values = torch.randn(size, generator=generator)
    return {"input_ids": torch.cat((text[:, :6], image, text[:, 6:]), dim=1), "pixel_values": pixel_values}


def _run_in_fresh_process(
    folder: Path, inputs: dict[str, torch.Tensor], auto_class: str, remote_code: bool
) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as work:
        given, wanted = Path(work, "inputs.safetensors"), Path(work, "outputs.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, given)
        remote = "yes" if remote_code else "no"
        arguments = [auto_class, remote, folder.resolve(), given, wanted, NEW_TOKENS, torch.get_num_threads()]
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
