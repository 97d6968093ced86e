"""ONNX graphs beside the model that they were made of: the same questions, answered by both."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from ..chat import encode_questions
from ..data.images import read_image
from ..onnx_model import GRAPHS, MiniMindVOnnxModel, graph_file
from ..processing_minimind_v import MiniMindVProcessor
from ..shapes import all_scenes, draw, questions
from .report import ConversionError


NEW_TOKENS = 32
GOOD = 0.95  # of the greedy tokens that a precision should have in common with float32


@dataclass
class Report:
    """How a precision answers.

    Args:
        dtype: one of `PRECISIONS`.
        size: of its three graphs, in bytes.
        equal: share of the tokens of the model's greedy answers that are the likeliest in these graphs as well.
        difference: the largest difference between the log-probabilities of those tokens.
    """

    dtype: str
    size: int
    equal: float
    difference: float

    @property
    def is_good(self) -> bool:
        return self.equal >= GOOD

    @property
    def warning(self) -> str:
        return f"{self.dtype} answers badly: only {self.equal:.1%} of the greedy tokens are those of the model"

    def row(self) -> tuple[str, str, str, str]:
        """For a table."""
        return (self.dtype, f"{self.size / 1e6:.1f} MB", f"{self.equal:.1%}", f"{self.difference:.1e}")


class Comparison:
    """Prompts, the greedy answers of a model, and their log-probabilities; to hold graphs against.

    The prompts, with none, one and two images, are one batch, padded on the left.

    Args:
        model: in float32.
        processor: of the model.
        images: files of images to ask about; if there are none, four are drawn.

    Raises:
        ConversionError: an image cannot be read.
    """

    def __init__(self, model: PreTrainedModel, processor: MiniMindVProcessor, images: Sequence[str | Path]):
        self.source = "given" if images else "drawn"
        self.image_token_id = processor.image_token_id
        rng = random.Random(0)
        scenes = rng.sample(all_scenes(), 4)
        try:
            shown = [read_image(str(path)) for path in images] or [draw(scene, rng) for scene in scenes]
        except ValueError as error:
            raise ConversionError(str(error)) from None
        asked = [questions(scene)[-1].text[number % 2] for number, scene in enumerate(scenes)]
        if images:
            asked = ["Describe the picture.", "描述一下这个图像的内容。"]
        sets = [[], *([image] for image in shown), [shown[0], shown[-1]]]
        contents = ["<image>" * len(row) + "\n" * bool(row) + asked[n % len(asked)] for n, row in enumerate(sets)]
        conversations = [[{"role": "user", "content": content}] for content in contents]
        self.inputs = encode_questions(processor, conversations, sets)
        print(f"The model answers {len(sets)} questions about {self.source} images", flush=True)
        self.prompt_length = self.inputs["input_ids"].shape[1]
        self.answers = self._generate(model)
        eos = model.generation_config.eos_token_id
        ended = torch.isin(self.answers, torch.tensor(eos if eos is not None else -1)).long()
        self.is_answer = ended.cumsum(dim=1) - ended == 0  # (B, T): up to the first end, which counts too
        self.log_probabilities = self._log_probabilities(model)

    def report(self, folder: Path, dtype: str) -> Report:
        """Hold the graphs of a precision against the model.

        Raises:
            ConversionError: in float32, the tokens differ.
        """
        model = MiniMindVOnnxModel.from_pretrained(folder, dtype)
        if dtype == "fp32":
            found = self._generate(model)
            if not torch.equal(found, self.answers):
                raise ConversionError(
                    f"the graphs answer otherwise than the model: {found.tolist()}, and the model {self.answers.tolist()}"
                )
        expected, found = self.log_probabilities, self._log_probabilities(model)
        equal = (found.argmax(-1) == self.answers)[self.is_answer].float().mean()
        taken = [each.gather(-1, self.answers[..., None])[..., 0][self.is_answer] for each in (expected, found)]
        size = sum(graph_file(folder, graph, dtype).stat().st_size for graph in GRAPHS)
        return Report(dtype, size, float(equal), float((taken[0] - taken[1]).abs().max()))

    def _generate(self, model: PreTrainedModel) -> torch.Tensor:
        # The folder's own settings may have penalties, which generate() would take over from it
        eos = model.generation_config.eos_token_id
        config = GenerationConfig(
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=0,
            suppress_tokens=[self.image_token_id],  # it would be read again without an image
        )
        before, model.generation_config = model.generation_config, config
        try:
            return model.generate(**self.inputs)[:, self.prompt_length :]
        finally:
            model.generation_config = before

    @torch.no_grad()
    def _log_probabilities(self, model: PreTrainedModel) -> torch.Tensor:
        """Of all tokens at each place of the answers, (B, T, V)."""
        input_ids = torch.cat((self.inputs["input_ids"], self.answers), dim=1)[:, :-1]
        mask = torch.cat((self.inputs["attention_mask"], torch.ones_like(self.answers)), dim=1)[:, :-1]
        logits = model(
            input_ids=input_ids,
            attention_mask=mask,
            pixel_values=self.inputs["pixel_values"],
            logits_to_keep=self.answers.shape[1],
        ).logits
        logits[..., self.image_token_id] = -torch.inf
        return logits.log_softmax(-1)
