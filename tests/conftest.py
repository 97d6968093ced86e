"""Tiny models, tokenizers and images, made here: no test needs the network or a published weight."""

import base64
import io
import math
import os
import random
import re
import signal
import socket
import subprocess
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


# Before torch: models this tiny gain nothing from a second thread, and processes beside one another lose a lot
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from minimind_v_hf import MiniMindVConfig, MiniMindVForConditionalGeneration, MiniMindVProcessor
from minimind_v_hf.preparation import prepare_tokenizer, train_tokenizer


CORPUS = [
    "What colour is the circle?",
    "How many shapes are there?",
    "图中有几个图形？",
    "左上的图形是什么颜色？",
    "The quick brown fox jumps over the lazy dog, and writes to mail@example.com.",
]
IMAGE_SIZE, PATCH_SIZE = 16, 4


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def make_tokenizer(vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without an image token, like MiniMind2's."""
    return train_tokenizer(CORPUS, vocab_size)


def make_image_processor(size: int = IMAGE_SIZE) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def make_config(text_config: dict | None = None, vision_config: dict | None = None, **kwargs) -> MiniMindVConfig:
    """A config with 16 image tokens and two layers of everything."""
    text = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"max_position_embeddings": 512, "initializer_range": 0.2}  # large weights, so that outputs differ
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    kwargs.setdefault("image_token_id", prepare_tokenizer(make_tokenizer()).image_token_id)
    return MiniMindVConfig(text_config=text | (text_config or {}), vision_config=vision | (vision_config or {}), **kwargs)


RESNET = {
    "model_type": "resnet",
    "image_size": 16,
    "patch_size": 8,
    "embedding_size": 4,
    "hidden_sizes": [4, 6],
    "depths": [1, 1],
    "layer_type": "basic",
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1}


def make_processor(image_processor=None, tokenizer=None, image_seq_length: int = 16) -> MiniMindVProcessor:
    tokenizer = prepare_tokenizer(tokenizer or make_tokenizer())
    vision_config = {"image_size": math.isqrt(image_seq_length) * PATCH_SIZE}
    config = make_config({"vocab_size": len(tokenizer)}, vision_config, image_token_id=tokenizer.image_token_id)
    return MiniMindVProcessor.build(image_processor or make_image_processor(), tokenizer, config)


def make_model(text_config: dict | None = None, **kwargs) -> MiniMindVForConditionalGeneration:
    attention = {"attn_implementation": kwargs.pop("attn_implementation")} if "attn_implementation" in kwargs else {}
    model = MiniMindVForConditionalGeneration._from_config(make_config(text_config, **kwargs), **attention)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero when fresh, which would hide a forgotten one
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make_image(colour: str = "red", size: tuple[int, int] = (20, 20)) -> Image.Image:
    return Image.new("RGB", size, colour)


def image_url(colour: str) -> str:
    """An image as an OpenAI client sends it."""
    file = io.BytesIO()
    make_image(colour, (IMAGE_SIZE, IMAGE_SIZE)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@contextmanager
def running_server(command: Sequence[str | Path], health: str, folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """A server in a process of its own, which cannot import this package. Gives its address once it answers at `health`.

    The command is given `--port` last. Its log is in the folder.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | environment
    log = folder / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen([*command, "--port", str(port)], env=environment, cwd=folder, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{health}", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def processor() -> MiniMindVProcessor:
    return make_processor()


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request) -> MiniMindVForConditionalGeneration:
    torch.manual_seed(0)
    return make_model(MOE if request.param == "moe" else None)


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def refused(capsys, main: Callable[[list[str]], object], command: list[str]) -> str:
    """The one line on stderr with which a script refuses a command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert re.fullmatch(r"\S+: error: .+\n", message)
    return message
