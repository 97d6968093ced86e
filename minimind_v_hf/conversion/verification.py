"""A written folder is loaded in a fresh process, as a user does, and must give what the converted model gives."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .report import ConversionError


# What a user does, in a process that cannot import this package; its last line on either stream is the result
_CHILD = """
import sys
sys.modules["minimind_v_hf"] = None
import torch, transformers
transformers.utils.logging.set_verbosity_error()
folder, remote_code, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
inputs, options, expected, answer = torch.load("given.pt", weights_only=True)
auto_class = transformers.AutoModelForImageTextToText if len(inputs) > 1 else transformers.AutoModelForCausalLM
model = auto_class.from_pretrained(folder, trust_remote_code=remote_code == "True", dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(**inputs).logits
difference = (logits - expected).abs().max().item()
if not difference <= 1e-5 * max(1, expected.abs().max().item()):  # NaN is none either
    sys.exit(f"it gives other logits than the converted model: they differ by {difference:.2e}")
if not torch.equal(model.generate(**inputs, **options), answer):
    sys.exit("it answers otherwise than the converted model, when it generates with a cache")
print(difference)
"""


def verify(model: PreTrainedModel, folder: Path, remote_code: bool) -> float:
    """Load a folder in float32 in a process of its own, and compare its logits and its greedy answer, with a cache.

    Args:
        model: what the folder should hold. Its parameters become float32.
        folder: the written one.
        remote_code: whether the folder brings its own code.

    Returns the largest difference of the logits. Raises ConversionError where the folder does not load, or answers otherwise.
    """
    model, inputs = model.float().eval(), sample_inputs(model.config)
    suppressed = [model.config.image_token_id] if len(inputs) > 1 else None  # an answer holds no image
    options = {"min_new_tokens": 16, "max_new_tokens": 16, "do_sample": False, "suppress_tokens": suppressed}
    with torch.no_grad(), tempfile.TemporaryDirectory() as work:
        given = (inputs, options, model(**inputs).logits, model.generate(**inputs, **options, use_cache=False))
        torch.save(given, Path(work, "given.pt"))
        arguments = [str(folder.resolve()), str(remote_code), str(torch.get_num_threads())]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": work}
        command = [sys.executable, "-I", "-c", _CHILD, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=work, env=environment, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ConversionError(f"the written folder, loaded in a fresh process, is wrong: {reason}")
    return float(done.stdout.split()[-1])


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
    pixel_values = torch.randn((1, vision.num_channels, vision.image_size, vision.image_size), generator=generator)
    return {"input_ids": torch.cat((text[:, :6], image, text[:, 6:]), dim=1), "pixel_values": pixel_values}
