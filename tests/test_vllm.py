"""vLLM gives the greedy tokens of transformers: offline and to an OpenAI client through its Transformers backend, and with
its own LLaVA from a converted folder.

Runs where vLLM is installed, which wants an environment of its own: see the README.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import IMAGE_SIZE, MOE, image_url, make_image, make_model, make_processor, running_server

from convert import to_llava


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
        model=folder, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4,
        limit_mm_per_prompt={"image": 2}, distributed_executor_backend="uni", **json.loads(sys.argv[5]),
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


REMOTE_CODE = {"trust_remote_code": True, "model_impl": "transformers"}
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
ENVIRONMENT |= {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}


def save(kind, folder):
    """A model of random weights, and the length of each prompt with the greedy tokens of transformers."""
    model = make_model({"head_dim": 32} | TEXTS[kind], **PROJECTORS.get(kind, {}))  # vLLM's attention knows no narrower heads
    processor = make_processor()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    expected = []
    for question in QUESTIONS:
        images = [make_image(item["colour"], (IMAGE_SIZE, IMAGE_SIZE)) for item in question if item["type"] == "image"]
        text = processor.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        inputs = processor(text=text, images=images or None, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=-1)
        expected.append([length, output[0, length:].tolist()])
    assert torch.tensor([tokens for _, tokens in expected]).unique(dim=0).shape[0] > 1  # the questions matter
    return expected


def offline(folder, options):
    """What vLLM answers, in a process of its own that cannot import this package."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | ENVIRONMENT
    script = folder / "serve.py"
    script.write_text(CHILD)
    arguments = [folder, str(IMAGE_SIZE), str(NEW_TOKENS), json.dumps(QUESTIONS), json.dumps(options)]
    done = subprocess.run(
        [sys.executable, "-I", script, *arguments],
        capture_output=True,
        text=True,
        env=environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT ")).removeprefix("RESULT "))


@pytest.mark.parametrize("kind", TEXTS)
def test_vllm_gives_the_greedy_tokens(kind, tmp_path):
    expected = save(kind, tmp_path)
    assert offline(tmp_path, REMOTE_CODE) == expected


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_an_openai_client_gets_the_greedy_tokens(kind, tmp_path):
    from openai import OpenAI

    expected = save(kind, tmp_path)
    command = [sys.executable, "-I", "-m", "vllm.entrypoints.openai.api_server", "--model", tmp_path, "--trust-remote-code"]
    command += ["--model-impl", "transformers", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    command += ["--limit-mm-per-prompt", '{"image": 2}', "--distributed-executor-backend", "uni", "--host", "127.0.0.1"]
    with running_server(command, "/health", tmp_path, ENVIRONMENT) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none", timeout=120)
        for question, (length, tokens) in zip(QUESTIONS, expected, strict=True):
            content = [
                {"type": "image_url", "image_url": {"url": image_url(item["colour"])}} if item["type"] == "image" else item
                for item in question
            ]
            request = {
                "model": str(tmp_path),
                "messages": [{"role": "user", "content": content}],
                "temperature": 0,
                "max_tokens": NEW_TOKENS,
                "extra_body": {"ignore_eos": True, "return_token_ids": True},
            }
            answer = client.chat.completions.create(**request)
            assert answer.usage.prompt_tokens == length
            assert answer.choices[0].token_ids == tokens
            streamed = [chunk.choices[0] for chunk in client.chat.completions.create(**request, stream=True) if chunk.choices]
            assert len(streamed) > 2
            assert "".join(choice.delta.content or "" for choice in streamed) == answer.choices[0].message.content


@pytest.mark.parametrize("gelu", [False, True])
def test_its_own_llava_gives_the_greedy_tokens(gelu, tmp_path):
    pytest.importorskip("torchvision")
    expected = save("dense", tmp_path / "ours")
    command = ["--model", str(tmp_path / "ours"), "--output", str(tmp_path / "llava"), *(["--gelu"] if gelu else [])]
    to_llava.main(command)
    # MiniMind2-V's projector has no activation: "linear" to transformers, which vLLM knows by another name
    identity = {} if gelu else {"projector_hidden_act": "torch.nn.modules.linear.Identity"}
    assert offline(tmp_path / "llava", {"model_impl": "vllm", "hf_overrides": identity}) == expected
