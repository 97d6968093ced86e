"""A saved folder holds everything: it loads through the Auto classes in a process that cannot import this package."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import IMAGE_SIZE, MOE, make_config, make_image, make_model, make_processor

from minimind_v_hf import MiniMindForCausalLM


FILES = {
    "chat_template.jinja",
    "config.json",
    "arguments_minimind_v.py",
    "configuration_minimind_v.py",
    "generation_config.json",
    "model.safetensors",
    "head_minimind_v.py",
    "modeling_minimind.py",
    "modeling_minimind_v.py",
    "processing_minimind_v.py",
    "image_reading_minimind_v.py",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "video_reading_minimind_v.py",
}

CHILD = """
import json, sys
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from transformers import AutoTokenizer, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

try:
    import minimind_v_hf
    raise SystemExit("the package can be imported, so this proves nothing")
except ImportError:
    pass
folder, copy, image = sys.argv[1:]
kwargs = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(folder, **kwargs)
processor = AutoProcessor.from_pretrained(folder, **kwargs)
messages = [{"role": "user", "content": [{"type": "image", "path": image}, {"type": "text", "text": "What colour?"}]}]
inputs = processor.apply_chat_template(
    messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
)
result = {
    "config": type(config).__name__,
    "decoder": type(config.text_config).__name__,
    "base": type(AutoModel.from_config(config, **kwargs)).__name__,
    "processor": type(processor).__name__,
    "image_token": AutoTokenizer.from_pretrained(folder, **kwargs).image_token,
    "image_processor": type(AutoImageProcessor.from_pretrained(folder, **kwargs)).__name__,
    "models": [],
}
for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForCausalLM):
    model = auto.from_pretrained(folder, **kwargs).eval()
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1, :5].tolist()
    result["models"].append([type(model).__name__, output[0, inputs["input_ids"].shape[1]:].tolist(), logits])
try:
    AutoConfig.from_pretrained(folder, projector_num_layers=3, **kwargs)
except ValueError as error:
    result["refused_config"] = str(error)
try:
    model(**inputs, kv_store=1)
except TypeError as error:
    result["refused"] = str(error)
answer = pipeline("image-text-to-text", model=folder, **kwargs)(
    text=messages, max_new_tokens=6, generate_kwargs={"do_sample": False}
)
result["pipeline"] = answer[0]["generated_text"][-1]["content"]
model.save_pretrained(copy)
processor.save_pretrained(copy)
print(json.dumps(result))
"""


def run_isolated(code: str, *arguments: object, home) -> str:
    """Run code in a Python that sees neither this checkout nor the network. Returns the last line that it prints."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    # The package may be installed for development, so its import is blocked by name
    block = "import sys; sys.modules['minimind_v_hf'] = None\n"
    command = [sys.executable, "-I", "-c", block + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("text_config", [None, MOE], ids=["dense", "moe"])
def test_folder_loads_without_the_package_and_so_does_its_copy(text_config, tmp_path):
    model, processor = make_model(text_config), make_processor()
    folder, image = tmp_path / "folder", tmp_path / "red.png"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == FILES
    make_image(size=(IMAGE_SIZE, IMAGE_SIZE)).save(image)

    text = processor.apply_chat_template([{"role": "user", "content": "<image>What colour?"}], add_generation_prompt=True)
    inputs = processor(text=text, images=str(image), return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1, :5]

    for source, copy in ((folder, tmp_path / "copy"), (tmp_path / "copy", tmp_path / "copy of the copy")):
        result = json.loads(run_isolated(CHILD, source, copy, image, home=tmp_path))
        assert result["config"] == "MiniMindVConfig"
        assert result["decoder"] == "MiniMindVTextConfig"
        assert result["base"] == "MiniMindVModel"
        assert result["processor"] == "MiniMindVProcessor"
        assert result["image_token"] == "<image>"
        assert "unknown argument: 'kv_store'. The model's code is minimind_v_hf " in result["refused"]
        assert result["refused_config"] == "projector_num_layers=3: expected Literal[1, 2]."
        assert result["image_processor"] == "CLIPImageProcessorPil"
        for name, generated, some_logits in result["models"]:
            assert name == "MiniMindVForConditionalGeneration"
            assert generated == tokens.tolist()
            torch.testing.assert_close(torch.tensor(some_logits), logits, atol=1e-5, rtol=0)
        assert result["pipeline"] == processor.decode(tokens, skip_special_tokens=True)
        assert {path.name for path in copy.iterdir()} == FILES
        first, second = (json.loads((path / "config.json").read_text()) for path in (folder, copy))
        for part in ("text_config", "vision_config"):
            second[part].pop("dtype")  # loading notes it in the parts as well
            first[part].pop("dtype", None)
        assert first == second


def test_language_model_folder_loads_without_the_package(tmp_path):
    model = MiniMindForCausalLM(make_config(MOE).text_config).eval()
    model.save_pretrained(tmp_path / "llm")
    code = """
import json, sys, torch
from transformers import AutoModel, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
base = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    print(json.dumps([type(model).__name__, type(base).__name__, model(torch.tensor([[5, 6, 7]])).logits[0, -1, :4].tolist()]))
"""
    name, base, logits = json.loads(run_isolated(code, tmp_path / "llm", home=tmp_path))
    assert (name, base) == ("MiniMindForCausalLM", "MiniMindModel")
    with torch.no_grad():
        expected = model(torch.tensor([[5, 6, 7]])).logits[0, -1, :4]
    torch.testing.assert_close(torch.tensor(logits), expected, atol=1e-5, rtol=0)
