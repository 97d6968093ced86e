"""One conversation with a saved model: its messages, its pictures, and the key/value cache that it goes on from.

A further question encodes only what is new: the conversation is rendered anew by the folder's chat template, and the tokens
that it shares with those in the cache are kept. So each picture passes the encoder once, and the answers are those of a
conversation without a cache. `chat.py` and `web_demo.py` talk through this.
"""

import argparse
import contextlib
import mimetypes
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    DynamicCache,
    PreTrainedModel,
    ProcessorMixin,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from .modeling_minimind_v import CACHE


PRECISIONS = ("auto", "float32", "bfloat16", "int8")


def load_model(folder: str, precision: str = "float32", **kwargs) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model of a folder or Hub id, on the GPU where there is one, and its processor.

    A folder carries its own code, which is what `trust_remote_code` allows to run. Where the package minimind_v_hf is
    installed it is imported, and transformers then prefers the package's code to the folder's.

    Args:
        folder: path or Hub id.
        precision: "float32", "bfloat16", "int8" for decoder weights rounded to int8, the rest being bfloat16 where the machine
            multiplies that in hardware and float32 elsewhere, or "auto" for the fastest: bfloat16 on a GPU, and on a CPU
            int8, or float32 without the package.
        kwargs: of `from_pretrained` of the model.

    Raises:
        ImportError: "int8" without the package.
        ValueError: there is no such model, or it cannot be loaded, with the reason.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quantize, fast_bf16 = None, False
    try:
        from .quantization import quantize_int8 as quantize
        from .training.metering import has_fast_bf16

        fast_bf16 = has_fast_bf16()
    except ImportError:
        if precision == "int8":
            raise ImportError("int8 weights need the package minimind_v_hf: pip install -e . where it lies") from None
    if precision == "auto":
        precision = "bfloat16" if device == "cuda" else "int8" if quantize else "float32"
    dtype = torch.bfloat16 if precision == "bfloat16" or (precision == "int8" and fast_bf16) else torch.float32
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=dtype, **kwargs)
    except (OSError, ValueError) as error:
        missing = "" if Path(folder).is_dir() else "there is no such folder, and on the Hub: "
        raise ValueError(f"Cannot load the model {folder!r}: {missing}{error}") from error
    model = model.to(device).eval()
    return (quantize(model) if precision == "int8" else model), processor


def url_path(url: str) -> str:
    """The path in a URL; of what is none, nothing."""
    try:
        return urlparse(url).path
    except ValueError:
        return ""


def media_kind(source: str) -> str | None:
    """ "image" or "video" for a file that is there, or a URL, with such an ending."""
    is_url = source.startswith(("http://", "https://"))
    try:
        if not is_url and not os.path.isfile(source):
            return None
    except ValueError:  # a null byte
        return None
    kind = mimetypes.guess_type(url_path(source) if is_url else source, strict=False)[0] or ""
    return kind.partition("/")[0] if kind.startswith(("image/", "video/")) else None


@contextlib.contextmanager
def errors_in_one_line(parser: argparse.ArgumentParser) -> Iterator[None]:
    """End a program with its usage and the reason, where the reason is what it was given."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        parser.error(str(error))


@dataclass
class Answer:
    """What a question brought.

    Args:
        text: the answer.
        tokens: how many tokens it has, the end token included.
        cached_tokens: tokens of the prompt that the cache held already.
        new_tokens: tokens of the prompt that were encoded now.
        new_images: pictures that were encoded now.
        first_token_seconds: until the first token, encoding included.
        seconds: until the last token.
        stopped: the answer was cut short by `stop`.
    """

    text: str
    tokens: int
    cached_tokens: int
    new_tokens: int
    new_images: int
    first_token_seconds: float
    seconds: float
    stopped: bool

    @property
    def tokens_per_second(self) -> float:
        """The rate after the first token; 0 for an answer of one token, which has none."""
        return (self.tokens - 1) / max(self.seconds - self.first_token_seconds, 1e-9)


class _Watch(StoppingCriteria):
    """Looks on after each token: notes when the first one came, and stops on request."""

    def __init__(self, stop: threading.Event):
        self.stop = stop
        self.start = time.perf_counter()
        self.first: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        self.first = self.first or time.perf_counter() - self.start
        return torch.full((len(input_ids),), self.stop.is_set(), device=input_ids.device)


class Conversation:
    """Messages with pictures, and their cache.

    Args:
        model: as `load_model` gives it.
        processor: likewise.
        system: a system message, or None for what the chat template does without one.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, system: str | None = None):
        self.model = model
        self.processor = processor
        self.system = system
        self.reset()

    def reset(self) -> None:
        """Forget everything that was said and shown."""
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        self.pixel_values: list[torch.Tensor] = []  # one (1, 3, height, width) per picture
        self.cached_ids: list[int] = []
        self.cache = DynamicCache(config=self.model.config.get_text_config())
        self._attached: list[torch.Tensor] = []

    def attach(self, *, image: Any = None, video: Any = None) -> int:
        """Read a picture or a video, which goes before the next question. Returns the number of pictures that it makes.

        Raises:
            ValueError: it cannot be read, with the reason.
            ImportError: a video is given, and PyAV is not installed.
        """
        source = {"images": [image]} if video is None else {"videos": [video]}
        pixel_values = self.processor(**source, return_tensors="pt")["pixel_values"]
        self._attached += pixel_values.split(1)
        return len(pixel_values)

    def detach(self) -> None:
        """Drop what was attached since the last question."""
        self._attached = []

    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int = 256,
        streamer: BaseStreamer | None = None,
        stop: threading.Event | None = None,
        **sampling,
    ) -> Answer:
        """Put a question, with what was attached.

        Args:
            question: what to ask.
            max_new_tokens: longest answer.
            streamer: is given the tokens as they come.
            stop: when set, the answer ends after the current token; what was said by then stays in the conversation.
            sampling: of `generate`.

        Raises:
            ValueError: the conversation is longer than the model's positions. It is then as it was before the question.
        """
        question = question.encode(errors="replace").decode()  # what was typed may not be text
        # Pictures as in the training data: in front, then a line break
        content: list[dict] = [{"type": "image"}] * len(self._attached)
        content.append({"type": "text", "text": ("\n" if content else "") + question})
        messages = [*self.messages, {"role": "user", "content": content}]
        pixel_values = self.pixel_values + self._attached
        ids = self._token_ids(messages, len(pixel_values))
        room = self.model.config.get_text_config().max_position_embeddings - len(ids)
        if room < 1:
            raise ValueError(
                f"The conversation has grown to {len(ids)} tokens, and this model has positions for {len(ids) + room}. "
                "Start a new one, or show it fewer pictures."
            )

        kept = self._keep_shared(ids)
        encoded = ids[:kept].count(self.processor.image_token_id) // self.processor.image_seq_length
        new_pixels = pixel_values[encoded:]
        watch = _Watch(stop or threading.Event())
        input_ids = torch.tensor([ids], device=self.model.device)
        images = {"pixel_values": torch.cat(new_pixels).to(self.model.device, self.model.dtype)} if new_pixels else {}
        output = self.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            **images,
            **{CACHE: self.cache},
            max_new_tokens=min(max_new_tokens, room),
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([watch]),
            **{"do_sample": False, **sampling},
        )[0].tolist()
        seconds = time.perf_counter() - watch.start

        self.cached_ids = output[:-1]  # the last token was drawn, but not yet read
        text = self.processor.tokenizer.decode(output[len(ids) :], skip_special_tokens=True)
        # As a list: in a string, an <image> that the model wrote would stand for a picture
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
        self.pixel_values, self._attached = pixel_values, []
        return Answer(
            text=text,
            tokens=len(output) - len(ids),
            cached_tokens=kept,
            new_tokens=len(ids) - kept,
            new_images=len(new_pixels),
            first_token_seconds=watch.first or seconds,
            seconds=seconds,
            stopped=watch.stop.is_set(),
        )

    def _token_ids(self, messages: list[dict], num_images: int) -> list[int]:
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        runs = [self.processor.replace_image_token({}, index) for index in range(num_images)]
        (expanded,), _ = self.processor.get_text_with_replacements([prompt], runs)
        return self.processor.tokenizer(expanded, add_special_tokens=False)["input_ids"]  # the template wrote them

    def _keep_shared(self, ids: list[int]) -> int:
        """Cut the cache down to the tokens that a prompt shares with it, and return how many they are.

        Usually nothing is cut. But a template may drop earlier thoughts, and an answer may be written in other tokens than
        the tokenizer would choose for its text.
        """
        limit = min(len(ids) - 1, len(self.cached_ids))  # the last token must be read to go on from
        kept = next((i for i in range(limit) if ids[i] != self.cached_ids[i]), limit)
        # A picture is kept whole or not at all
        while kept and ids[:kept].count(self.processor.image_token_id) % self.processor.image_seq_length:
            kept -= 1
        if surplus := self.cache.get_seq_length() - kept:
            self.cache.crop(-surplus)
        return kept
