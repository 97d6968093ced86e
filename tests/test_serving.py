"""`transformers serve` and continuous batching: a real server process, asked by a real OpenAI client, and paged attention."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import IMAGE_SIZE, MOE, image_url, make_config, make_image, make_model, make_processor, running_server
from transformers import AutoModelForMultimodalLM, ContinuousBatchingConfig, GenerationConfig

from minimind_v_hf import MiniMindForCausalLM, MiniMindVProcessor


NEW_TOKENS = 6
ENVIRONMENT = {"HF_HUB_DISABLE_UPDATE_CHECK": "1"}


def is_word(text: str) -> bool:
    return text.isascii() and text.isalpha()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("serving") / "model"
    model, processor = make_model(MOE), make_processor()
    # A random model would write image tokens, halves of characters and Markdown, and end at once
    tokenizer = processor.tokenizer
    special = set(tokenizer.all_special_ids)
    model.generation_config.suppress_tokens = [i for i in range(320) if i in special or not is_word(tokenizer.decode([i]))]
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    """The address of `transformers serve`, in a process that cannot import this package."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    code = "import sys; sys.modules['minimind_v_hf'] = None; from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-I", "-c", code, "serve", str(folder), "--trust-remote-code", "--device", "cpu"]
    environment = ENVIRONMENT | {"HF_HOME": str(folder.parent / "cache")}
    with running_server([*command, "--host", "127.0.0.1"], "/health", folder.parent, environment) as address:
        yield f"{address}/v1"


def greedy_answer(folder, question: str, images: list) -> tuple[int, str]:
    """The length of the prompt and the answer, by `generate()`."""
    model, processor = AutoModelForMultimodalLM.from_pretrained(folder), MiniMindVProcessor.from_pretrained(folder)
    text = processor.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    inputs = processor(text=text, images=images or None, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    length = inputs["input_ids"].shape[1]
    return length, processor.decode(output[0, length:], skip_special_tokens=True)


def test_an_openai_client_gets_the_greedy_tokens(server, folder):
    from openai import OpenAI

    client = OpenAI(base_url=server, api_key="none", timeout=120)
    answers = set()
    for colours in ((), ("red",), ("blue",), ("red", "blue")):
        images = [{"type": "image_url", "image_url": {"url": image_url(colour)}} for colour in colours]
        question = [{"role": "user", "content": [*images, {"type": "text", "text": "What colour?"}]}]
        request = {"model": str(folder), "messages": question, "temperature": 0, "max_tokens": NEW_TOKENS}
        answer = client.chat.completions.create(**request)
        streamed = [chunk.choices[0] for chunk in client.chat.completions.create(**request, stream=True) if chunk.choices]

        images = [make_image(colour, (IMAGE_SIZE, IMAGE_SIZE)) for colour in colours]
        length, expected = greedy_answer(folder, "<image>" * len(colours) + "What colour?", images)
        assert answer.choices[0].message.content == expected
        assert answer.choices[0].finish_reason == "length"
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (length, NEW_TOKENS)
        assert "".join(choice.delta.content or "" for choice in streamed) == expected
        assert streamed[-1].finish_reason == "length"
        answers.add(expected)
    assert len(answers) > 2  # the images matter


def test_transformers_chat_prints_the_greedy_answer(server, folder):
    flags = ["do_sample=False", f"max_new_tokens={NEW_TOKENS}"]
    command = [sys.executable, "-m", "transformers.cli.transformers", "chat", str(folder), server.removesuffix("/v1"), *flags]
    # To be offline would forbid it any server
    environment = os.environ | ENVIRONMENT | {"HF_HUB_OFFLINE": "0", "HF_HOME": str(folder.parent / "cache")}
    typed = "What colour?\nn\n!exit\n"  # the n: not to go on beyond the token limit
    talk = subprocess.run(command, input=typed, env=environment, cwd=folder.parent, capture_output=True, text=True, timeout=240)
    assert talk.returncode == 0, talk.stderr[-3000:]

    assert greedy_answer(folder, "What colour?", [])[1] in talk.stdout


@pytest.mark.parametrize("has_vision", [False, True])
@pytest.mark.parametrize("text_config", [None, MOE], ids=["dense", "moe"])
def test_continuous_batching_gives_the_greedy_tokens(text_config, has_vision):
    model = make_model(text_config) if has_vision else MiniMindForCausalLM(make_config(text_config).text_config).eval()
    greedy = GenerationConfig(do_sample=False, max_new_tokens=8, eos_token_id=300, pad_token_id=0)
    prompts = [torch.randint(3, 180, (length,)).tolist() for length in (5, 17, 9, 30, 2)]
    alone = [model.generate(torch.tensor([ids]), generation_config=greedy)[0, len(ids) :].tolist() for ids in prompts]
    # Unless it is told how much, the cache takes most of the memory
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    answers = model.generate_batch(prompts, generation_config=greedy, continuous_batching_config=small, progress_bar=False)
    assert [answer.generated_tokens for answer in answers.values()] == alone


def test_continuous_batching_refuses_images_which_it_would_not_see():
    model = make_model()
    with pytest.raises(ValueError, match="takes no images"):
        model.generate_batch([[5, 6], [5, model.config.image_token_id, 6]])
