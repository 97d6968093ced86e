"""llama.cpp, through xllamacpp in a process of its own: what it answers from a GGUF, beside what the model answers."""

import base64
import importlib.util
import io
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..chat import encode_questions
from ..processing_minimind_v import MiniMindVProcessor
from ..shapes import all_scenes, draw, questions
from .report import ConversionError


TOP = 100  # log-probabilities that are compared, the largest ones
IMAGES = 4
NEW_TOKENS = 16
# The server keeps half a character, and its log-probabilities, to itself: so it is made to say "!", whatever is likeliest
_ONE_TOKEN = {"max_tokens": 1, "temperature": 0, "logit_bias": [["!", 1e3]]}

# It may abort, and would take this process with it
_CHILD = """
import json, sys
import xllamacpp
given = json.load(sys.stdin)

def serve(mmproj):
    params = xllamacpp.CommonParams()
    params.model.path = given["decoder"]
    if mmproj:
        params.mmproj.path = mmproj
    params.n_ctx, params.n_gpu_layers, params.mmproj_use_gpu = given["context"], 0, False
    params.warmup = params.fit_params = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = given["threads"]
    # As in transformers; by default the cache is in float16
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)

# With an mmproj, it takes no token ids
server = serve(None)
answers = [server.handle_completions(request) for request in given["text"]]
if given["chat"]:
    server = serve(given["mmproj"])
    answers += [server.handle_chat_completions(request) for request in given["chat"]]
print("ANSWERS", json.dumps(answers))
"""


class Agreement(NamedTuple):
    """How two engines agree about the next token."""

    equal: int
    """Times that both find the same token likeliest."""
    asked: int
    difference: float
    """The largest difference of two log-probabilities, among the `TOP` largest."""

    @property
    def share(self) -> float:
        """Of tokens that are equal."""
        return self.equal / self.asked

    def __str__(self) -> str:
        return f"{self.equal} of {self.asked} tokens equal, log-probabilities differ by up to {self.difference:.1e}"


def is_installed() -> bool:
    """Whether there is a llama.cpp to ask."""
    return importlib.util.find_spec("xllamacpp") is not None


def ask(
    decoder: Path, mmproj: Path | None, text: list[dict[str, Any]], chat: list[dict[str, Any]], context: int
) -> list[dict[str, Any]]:
    """What llama.cpp's server answers, with a cache in float32.

    Args:
        decoder: a GGUF file.
        mmproj: that of its encoder.
        text: what is sent to the OpenAI endpoint of completions.
        chat: the same for chat completions.
        context: tokens of prompt and answer at most.

    Raises:
        ConversionError: it does not load the files, or has no answer.
    """
    given = {
        "decoder": str(decoder),
        "mmproj": mmproj and str(mmproj),
        "text": text,
        "chat": chat,
        "context": context,
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-I", "-c", _CHILD]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, errors="replace", check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")), None)
    if done.returncode != 0 or line is None:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ConversionError(f"llama.cpp does not run {decoder.name}: {reason}")
    answers = json.loads(line.removeprefix("ANSWERS "))
    for answer in answers:
        if "choices" not in answer:
            raise ConversionError(f"llama.cpp does not answer from {decoder.name}: {answer}")
    return answers


class Questions(NamedTuple):
    """Requests for one token each, and the log-probabilities that the model gives for it."""

    requests: list[dict[str, Any]]
    expected: torch.Tensor
    """(requests, V)"""
    longest: int
    """Tokens of the longest prompt."""


def ask_about_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat_template: str) -> Questions:
    """Questions without an image, and each token of a model's greedy answers to them; the model is in float32."""
    image_token = getattr(model.config, "image_token_id", -1)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "suppress_tokens": [image_token]}
    requests, logits, longest = list[dict[str, Any]](), list[torch.Tensor](), 0
    for _, question in drawn_questions():
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            chat_template=chat_template,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )["input_ids"]
        with torch.no_grad():
            tokens = model.generate(input_ids=prompt, **options)
            logits.append(model(input_ids=tokens).logits[0, prompt.shape[1] - 1 : -1])
        prefixes = [tokens[0, :length].tolist() for length in range(prompt.shape[1], tokens.shape[1])]
        requests += [{"prompt": prefix, "logprobs": TOP, **_ONE_TOKEN} for prefix in prefixes]
        longest = max(longest, tokens.shape[1])
    return Questions(requests, torch.cat(logits).log_softmax(-1), longest)


def ask_about_images(model: PreTrainedModel, processor: MiniMindVProcessor) -> Questions:
    """Questions about drawn images of the encoder's size, and the first token of their answers."""
    size = model.config.vision_config.image_size
    requests, logits, longest = list[dict[str, Any]](), list[torch.Tensor](), 0
    for drawing, question in drawn_questions():
        image, text = drawing.resize((size, size)), {"type": "text", "text": f"\n{question}"}
        content = [{"type": "image_url", "image_url": {"url": data_url(image)}}, text]
        request = {"messages": [{"role": "user", "content": content}], "logprobs": True, "top_logprobs": TOP}
        requests.append(request | _ONE_TOKEN)
        inputs = encode_questions(processor, [[{"role": "user", "content": [{"type": "image"}, text]}]], [[image]])
        longest = max(longest, inputs["input_ids"].shape[1])
        with torch.no_grad():
            logits.append(model(**inputs).logits[0, -1])
    return Questions(requests, torch.stack(logits).log_softmax(-1), longest)


def drawn_questions() -> list[tuple[Image.Image, str]]:
    """Small images and a question about each, in English and in Chinese."""
    rng = random.Random(0)
    scenes = rng.sample(all_scenes(), IMAGES)
    return [(draw(scene, rng), questions(scene)[-1].text[number % 2]) for number, scene in enumerate(scenes)]


def data_url(image: Image.Image) -> str:
    """An image as an OpenAI client sends it."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def compare(text: Questions, images: Questions | None, decoder: Path, mmproj: Path | None) -> list[Agreement]:
    """How llama.cpp agrees with the model, after text and, unless `images` is None, after images.

    Raises:
        ConversionError: it does not run these files.
    """
    kinds = [text, images] if images else [text]
    chat = images.requests if images else []
    answers = iter(ask(decoder, mmproj, text.requests, chat, max(kind.longest for kind in kinds) + 64))
    return [_agreement([next(answers) for _ in kind.requests], kind.expected) for kind in kinds]


def _agreement(answers: list[dict[str, Any]], expected: torch.Tensor) -> Agreement:
    """Of the answers with the log-probabilities (answers, V)."""
    equal, difference = 0, 0.0
    for answer, row in zip(answers, expected, strict=True):
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        equal += top[0]["id"] == int(row.argmax())
        difference = max(difference, *(abs(entry["logprob"] - float(row[entry["id"]])) for entry in top))
    return Agreement(equal, len(answers), difference)
