"""vLLM serves a saved folder through its Transformers backend, and gives the greedy tokens of transformers.

Runs where vLLM is installed, which wants an environment of its own: see the README.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import IMAGE_SIZE, MOE, make_image, make_model, make_processor


pytest.importorskip("vllm")

NEW_TOKENS = 12
TEXTS = {"dense": {}, "moe": MOE, "3v-moe": {"num_experts": 4, "num_experts_per_tok": 1, "use_qk_norm": True}}
SIGLIP = {"model_type": "siglip_vision_model"}  # has a head that vLLM cannot run
PROJECTORS = {"3v-moe": {"projector_num_layers": 2, "projector_layer_norm": True, "vision_config": SIGLIP}}
QUESTIONS = [
    [{"type": "image", "colour": "red"}, {"type": "text", "text": "What colour is the circle?"}],
    [{"type": "image", "colour": "red"}, {"type": "text", "text": "图中"}, {"type": "image", "colour": "blue"}],
    [{"type": "text", "text": "How many shapes?"}],
]

# In one process, without which the engine takes half a minute more to start
CHILD = """
import json, sys
from PIL import Image

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    folder, size, new_tokens, questions = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
    llm = LLM(
        model=folder, trust_remote_code=True, model_impl="transformers", dtype="float32", enforce_eager=True,
        max_model_len=256, max_num_seqs=4, limit_mm_per_prompt={"image": 2}, distributed_executor_backend="uni",
    )
    conversations = []
    for question in questions:
        content = []
        for item in question:
            if item["type"] == "image":
                item = {"type": "image_pil", "image_pil": Image.new("RGB", (size, size), item["colour"])}
            content.append(item)
        conversations.append([{"role": "user", "content": content}])
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    outputs = llm.chat(conversations, sampling, use_tqdm=False)
    result = [[len(output.prompt_token_ids), list(output.outputs[0].token_ids)] for output in outputs]
    print("RESULT", json.dumps(result))
"""


@pytest.mark.parametrize("kind", TEXTS)
def test_vllm_gives_the_greedy_tokens(kind, tmp_path):
    model = make_model({"head_dim": 32} | TEXTS[kind], **PROJECTORS.get(kind, {}))  # vLLM's attention knows no narrower heads
    processor = make_processor()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    expected = []
    for question in QUESTIONS:
        images = [make_image(item["colour"], (IMAGE_SIZE, IMAGE_SIZE)) for item in question if item["type"] == "image"]
        text = processor.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        inputs = processor(text=text, images=images or None, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=-1)
        expected.append([length, output[0, length:].tolist()])

    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    script = tmp_path / "serve.py"
    script.write_text(CHILD)
    command = [sys.executable, "-I", script, tmp_path, str(IMAGE_SIZE), str(NEW_TOKENS), json.dumps(QUESTIONS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    result = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    assert json.loads(result.removeprefix("RESULT ")) == expected
    assert torch.tensor([tokens for _, tokens in expected]).unique(dim=0).shape[0] > 1  # the questions matter
