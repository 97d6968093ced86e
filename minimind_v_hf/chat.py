"""Answers of a saved model: to a list of questions in batches, and in a conversation that goes on from its key/value cache.

    model, processor = load_model("runs/quickstart/model")
    conversation = Conversation(model, processor)
    conversation.attach(image="photo.jpg")
    print(conversation.ask("What colour is the shape at the top left?").text)

A further question encodes only what is new: the conversation is rendered anew by the folder's chat template, and the tokens
that it shares with those in the cache are kept. So each image passes the encoder once, and the answers are those of a
conversation without a cache.
"""

import contextlib
import json
import mimetypes
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    DynamicCache,
    PreTrainedModel,
    ProcessorMixin,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from .arguments_minimind_v import CACHE
from .hardware import has_fast_bf16
from .onnx_model import SUFFIXES, MiniMindVOnnxModel, precisions
from .processing_minimind_v import MiniMindVProcessor


PRECISIONS = ("auto", "float32", "bfloat16", *SUFFIXES)
"""The last ones are of ONNX folders, to which float32 is fp32."""


# ── Loading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def load_model(folder: str | os.PathLike, precision: str = "float32", **kwargs) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model of a folder or Hub id, on the GPU where there is one, and its processor.

    The code is this package's for MiniMind-V; another kind of model runs the code in its folder (`trust_remote_code`).

    Args:
        folder: path or Hub id.
        precision: "float32", "bfloat16", or "auto" for the faster one: bfloat16 where the machine has it in hardware.
            A folder that convert/to_onnx.py wrote has precisions of its own, of which "auto" is what the export found best.
        kwargs: of `from_pretrained` of the model.

    Raises:
        ValueError: there is no such model, it cannot be loaded, or it lacks weights; the message has the reason.
    """
    folder, device = os.fspath(folder), "cuda" if torch.cuda.is_available() else "cpu"
    path = Path(folder)
    is_hub_id = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", folder) and (path.parent == Path() or not path.parent.is_dir())
    if not path.exists() and not is_hub_id:  # the Hub would be asked for minutes where there is no network
        raise ValueError(f"Cannot load the model {folder!r}: there is no such folder.")
    is_onnx = bool(precisions(folder))
    if is_onnx and kwargs:
        raise ValueError(
            f"The model {folder!r} is in ONNX, which knows nothing of {', '.join(kwargs)}: take the one it was made of."
        )
    if precision in SUFFIXES and not is_onnx:
        raise ValueError(f"The model {folder!r} has no precision {precision!r}: convert/to_onnx.py makes a folder that has.")
    is_bf16 = precision == "bfloat16" or (precision == "auto" and has_fast_bf16())
    try:
        if is_onnx:
            processor = MiniMindVProcessor.from_pretrained(folder)
            return MiniMindVOnnxModel.from_pretrained(folder, "fp32" if precision == "float32" else precision), processor
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        processor.apply_chat_template([{"role": "user", "content": "?"}], add_generation_prompt=True)
        # Other shapes are let pass here, so that all that is wrong is in one message below, and no table precedes it
        with _quiet_loading():
            model, loading = AutoModelForImageTextToText.from_pretrained(
                folder,
                trust_remote_code=True,
                dtype=torch.bfloat16 if is_bf16 else torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **kwargs,
            )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(model.generation_config, name)
            if not all(isinstance(token, int | None) for token in (value if isinstance(value, list) else [value])):
                raise ValueError(f"generation_config.json has {name}={value!r}, where token ids were expected")
    except Exception as error:  # a damaged file may raise anything in the libraries that read it
        raise ValueError(f"Cannot load the model {folder!r}: {_reason(Path(folder), error)}") from error
    refuse_other_weights(folder, model, loading)
    return model.to(device).eval(), processor


def refuse_other_weights(source: str, model: PreTrainedModel, loading: dict[str, Any]) -> None:
    """Refuse a model whose weights are not those that its config asks for.

    Args:
        source: the folder or Hub id, for the message.
        model: as loaded.
        loading: what `from_pretrained(output_loading_info=True)` gave with it.

    Raises:
        ValueError: weights are missing, left over, of another shape, NaN or infinite.
    """
    problems = {
        "no weights for": sorted(loading["missing_keys"]),
        "weights of other shapes than its config says:": [
            f"{name} is {tuple(found)}, expected {tuple(wanted)}" for name, found, wanted in loading["mismatched_keys"]
        ],
        "weights that its config has no use for:": sorted(loading["unexpected_keys"]),
        "NaN or infinite values in": [
            name for name, weight in model.named_parameters() if weight.is_floating_point() and not weight.isfinite().all()
        ],
    }
    for problem, names in problems.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"Cannot load the model {source!r}: it has {problem} {', '.join(names[:3])}{more}. Save it again.")


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _reason(folder: Path, error: Exception) -> str:
    """Why a model could not be loaded, in one line, with the file that is to blame where it can be told."""
    if not folder.is_dir():
        return f"there is no such folder, and on the Hub: {_one_line(error)}"
    if not (folder / "config.json").is_file():
        return "the folder has no config.json"
    for path in sorted(folder.iterdir()):
        try:
            if path.suffix == ".json" and not isinstance(json.loads(path.read_bytes()), dict):
                raise ValueError("expected an object in braces")
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
        except (OSError, ValueError, RecursionError, SafetensorError) as damage:
            return f"{path.name} is damaged ({_one_line(damage)})"
    return _one_line(error)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else text[:300] + " …"
    return text if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {text}"


# ── A list of questions ──────────────────────────────────────────────────────────────────────────────────────────────


def encode_questions(processor: ProcessorMixin, conversations: list[list[dict]], images: list[list[Any]]) -> BatchFeature:
    """A batch of prompts, padded on the left.

    Args:
        processor: of the model that will answer.
        conversations: messages, of which the last is a question.
        images: of each conversation, in the order of their placeholders: whatever the processor takes.
    """
    prompts = processor.apply_chat_template(conversations, add_generation_prompt=True)
    return processor(text=prompts, images=images if any(images) else None, padding=True, return_tensors="pt")


def answer_questions(model: PreTrainedModel, processor: ProcessorMixin, inputs: BatchFeature, **options) -> list[str]:
    """The answers to a batch of prompts: greedy, and of at most 64 tokens, unless `options` of `generate` say otherwise.

    Args:
        model: in any mode, which it keeps.
        processor: of the model.
        inputs: as `encode_questions` gives them, which may be on another device.
    """
    training = model.training
    model.eval()
    try:
        output = model.generate(
            **inputs.to(model.device), **{"max_new_tokens": 64, "do_sample": False, "use_cache": True, **options}
        )
    finally:
        model.train(training)
    answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in answers]


# ── A conversation ───────────────────────────────────────────────────────────────────────────────────────────────────


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


@dataclass
class Answer:
    """What a question brought.

    Args:
        text: the answer.
        tokens: how many tokens it has, the end token included.
        cached_tokens: tokens of the prompt that the cache held already.
        new_tokens: tokens of the prompt that were encoded now.
        new_images: images that were encoded now.
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
    """Messages with images, and their cache.

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
        """Forget all messages and images."""
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        self.pixel_values: list[torch.Tensor] = []  # one (1, 3, height, width) per image
        self.cached_ids: list[int] = []
        self.cache = DynamicCache(config=self.model.config.get_text_config())
        self._attached: list[torch.Tensor] = []

    def attach(self, *, image: Any = None, video: Any = None) -> int:
        """Read an image or a video, which goes before the next question. Returns the number of images that it makes.

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
            stop: when set, the answer ends after the current token; what was written by then stays in the conversation.
            sampling: of `generate`.

        Raises:
            ValueError: the conversation is longer than the model's positions. It is then as it was before the question.
        """
        question = question.encode(errors="replace").decode()  # half a surrogate pair is no text
        # Images as in the training data: in front, then a line break
        content: list[dict] = [{"type": "image"}] * len(self._attached)
        content.append({"type": "text", "text": ("\n" if content else "") + question})
        messages = [*self.messages, {"role": "user", "content": content}]
        pixel_values = self.pixel_values + self._attached
        ids = self._token_ids(messages, len(pixel_values))
        room = self.model.config.get_text_config().max_position_embeddings - len(ids)
        if room < 1:
            fewer = "show it fewer images, " if pixel_values else ""
            raise ValueError(
                f"The conversation has grown to {len(ids)} tokens, and this model has positions for {len(ids) + room}: "
                f"shorten the question, {fewer}or start a new conversation."
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
            max_new_tokens=min(max_new_tokens, room),
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([watch]),
            **{CACHE: self.cache, "do_sample": False, **sampling},
        )[0].tolist()
        seconds = time.perf_counter() - watch.start

        self.cached_ids = output[:-1]  # the last token was drawn, but not yet read
        text = self.processor.tokenizer.decode(output[len(ids) :], skip_special_tokens=True)
        # As a list: in a string, an <image> that the model wrote would stand for an image
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
        # An image is kept whole or not at all
        while kept and ids[:kept].count(self.processor.image_token_id) % self.processor.image_seq_length:
            kept -= 1
        if surplus := self.cache.get_seq_length() - kept:
            self.cache.crop(-surplus)
        return kept
