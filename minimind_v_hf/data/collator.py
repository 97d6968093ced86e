"""Samples to a batch: pads or packs token ids and labels, decodes and resizes the images."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers.utils import logging

from ..processing_minimind_v import MiniMindVProcessor
from .images import read_image
from .reading import check_share
from .tokenizing import IGNORE_INDEX


logger = logging.get_logger(__name__)


class PixelNormalizer(nn.Module):
    """The rescaling and normalisation of an image processor, for bytes that are already on the device.

    Args:
        image_processor: gives scale, mean and standard deviation.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, image_processor: Any):
        super().__init__()
        factor = image_processor.rescale_factor if image_processor.do_rescale else 1.0
        mean, std = (image_processor.image_mean, image_processor.image_std) if image_processor.do_normalize else (0.0, 1.0)
        std = torch.as_tensor(std, dtype=torch.float64).expand(3)
        mean = torch.as_tensor(mean, dtype=torch.float64).expand(3)
        self.register_buffer("scale", (factor / std).float().view(3, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).float().view(3, 1, 1), persistent=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Normalise uint8 pixels (images, 3, height, width) to float32; floats are normalised already and pass."""
        if pixel_values.is_floating_point():
            return pixel_values
        return pixel_values * self.scale + self.shift


class RandomAffine(nn.Module):
    """Shifts, scales, turns and shears each image a little, in training mode; left stays left, and colours stay.

    Args:
        strength: with 0.1 an image is scaled by 0.9 to 1.1, turned and sheared by up to 0.1, shifted by up to 0.05 of its side;
            with 0 it stays as it is.

    Raises:
        ValueError: the strength is not from 0 to 0.5.
    """

    def __init__(self, strength: float):
        super().__init__()
        if not 0 <= strength <= 0.5:
            raise ValueError(f"augment={strength}: expected a share from 0 to 0.5.")
        self.strength = strength

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Change pixels (images, 3, height, width), uint8 or floating-point, whose edges go on where the image ends."""
        if not (self.training and self.strength and len(pixel_values)):
            return pixel_values
        pixels = pixel_values.float()
        moves = torch.empty(len(pixels), 2, 3, device=pixels.device).uniform_(-self.strength, self.strength)
        grid = nn.functional.affine_grid(moves + torch.eye(2, 3, device=pixels.device), list(pixels.shape), align_corners=False)
        changed = nn.functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
        return changed.to(pixel_values.dtype) if pixel_values.is_floating_point() else changed.round().to(pixel_values.dtype)


@dataclass
class MiniMindVCollator:
    """Collates rows of `tokenize_conversations`, or packed ones of `pack`.

    Args:
        processor: gives the padding token and the image processor.
        pad_to_multiple_of: rounds the length of the rows up, for kernels that like it so.
        uint8_pixels: leave the pixels as bytes, a quarter of the volume to hand from worker to device; `PixelNormalizer`
            must then be applied there.
        max_dropped: of a stream, whose images nobody has decoded before: the share of samples, from 0 to 1, that may be
            dropped, and logged, since an image of theirs is damaged. By default none may.
        independent_turns: let each turn of a conversation see the images of the first turn, with what stands before them,
            and itself alone, as if it were a row of its own. A question cannot then be answered from what was said before.
            Not for packed rows.
    """

    processor: MiniMindVProcessor
    pad_to_multiple_of: int | None = None
    uint8_pixels: bool = False
    max_dropped: float | None = None
    independent_turns: bool = False
    _seen: int = field(default=0, init=False, repr=False)
    _lost: int = field(default=0, init=False, repr=False)
    _normalize: PixelNormalizer = field(init=False, repr=False)
    _image_size: tuple[int, int] = field(init=False, repr=False)

    def __post_init__(self):
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of={self.pad_to_multiple_of}: expected a positive integer.")
        self._normalize = PixelNormalizer(self.processor.image_processor)
        height, width = self._resize([Image.new("RGB", (8, 8))]).shape[-2:]
        self._image_size = height, width

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows with `input_ids`, `labels` and `images`, or with `samples`, a list of such.

        Returns:
            * `input_ids` and `labels` (rows, longest row), padded on the right.
            * `pixel_values` (images in the whole batch, 3, height, width), none in a batch of text alone: its shape
              then begins with 0.
            * `attention_mask` (rows, longest row); or, if a row is packed, `position_ids` instead, which begin at 0 with
              each sample and with the padding. From these transformers makes a mask that keeps samples apart (of another
              decoder than ours only with `use_cache=False`). Flash attention reads them in batches of one row only. With
              `independent_turns` both: `position_ids` that go on after the images in every turn, and an `attention_mask`
              (rows, 1, longest row, longest row) of float32, 0 for what a token sees and the lowest number for what not.

        Raises:
            ValueError: an image cannot be read; or more of them than `max_dropped` allows, or some of every row; or rows are
                packed that are to have `independent_turns`.
        """
        groups, images = self._read([row.get("samples", [row]) for row in rows])
        length = max(sum(len(sample["input_ids"]) for sample in group) for group in groups)
        length += -length % (self.pad_to_multiple_of or 1)
        shape = (len(groups), length)
        input_ids = np.full(shape, self.processor.tokenizer.pad_token_id, dtype=np.int64)
        labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        attention_mask = np.zeros(shape, dtype=np.int64)
        position_ids = np.zeros(shape, dtype=np.int64)
        for row, group in enumerate(groups):
            start = 0
            for sample in group:
                end = start + len(sample["input_ids"])
                input_ids[row, start:end] = sample["input_ids"]
                labels[row, start:end] = sample["labels"]
                labels[row, start] = IGNORE_INDEX  # what comes first follows from nothing, least of all from a neighbour
                position_ids[row, start:end] = np.arange(end - start)
                start = end
            attention_mask[row, :start] = 1
            position_ids[row, start:] = np.arange(length - start)

        packed = any("samples" in row for row in rows)
        if packed and self.independent_turns:
            raise ValueError("independent_turns and packed rows: one mask cannot keep both turns and samples apart.")
        batch = {"input_ids": input_ids, "labels": labels}
        batch |= {"position_ids": position_ids} if packed else {"attention_mask": attention_mask}
        if self.independent_turns:
            batch |= self._apart(input_ids, labels, attention_mask)
        pixel_values = self._resize(images)
        return {
            **{name: torch.from_numpy(array) for name, array in batch.items()},
            "pixel_values": pixel_values if self.uint8_pixels else self._normalize(pixel_values),
        }

    def _apart(self, input_ids: np.ndarray, labels: np.ndarray, attention_mask: np.ndarray) -> dict[str, np.ndarray]:
        places = np.arange(input_ids.shape[1])
        spoken = labels != IGNORE_INDEX
        begins = np.zeros_like(spoken)
        begins[:, 1:] = spoken[:, :-1] & ~spoken[:, 1:]  # a turn, after each answer
        turns = begins.cumsum(axis=1)
        images = (input_ids == self.processor.image_token_id) & (turns == 0)
        end = (images * (places + 1)).max(axis=1, keepdims=True)  # of what all turns share
        turns[end[:, 0] == 0] = 0  # text alone stays as it is
        shared = places < end
        start = np.maximum.accumulate(np.where(begins & (end > 0), places, end), axis=1)
        sees = shared[:, None, :] | (turns[:, :, None] == turns[:, None, :])
        sees &= (places[:, None] >= places) & (attention_mask[:, None, :] > 0)
        sees |= np.eye(len(places), dtype=bool)  # padding sees itself: nothing at all would give no number
        hidden = np.where(sees, np.float32(0), np.finfo(np.float32).min)
        return {"position_ids": np.where(shared, places, end + places - start), "attention_mask": hidden[:, None]}

    def _read(self, groups: list[list[dict[str, Any]]]) -> tuple[list[list[dict[str, Any]]], list[Image.Image]]:
        """The samples whose images can be read, in their rows, and all these images."""
        readable, images = [], []
        for group in groups:
            kept = []
            for sample in group:
                self._seen += 1
                try:
                    images += [read_image(source, max(self._image_size)) for source in sample["images"]]
                    kept.append(sample)
                except ValueError as error:
                    if self.max_dropped is None:
                        raise
                    self._lost += 1
                    logger.warning(f"Dropped a row with a damaged image: {error}")
                    check_share(self._lost, max(self._seen, 1000), self.max_dropped, [str(error)])
            readable += [kept] if kept else []
        if not readable:
            raise ValueError("Of no row of a batch can the images be read.")
        return readable, images

    def _resize(self, images: list[Image.Image]) -> torch.Tensor:
        """Images in the encoder's size, as bytes (images, 3, height, width)."""
        if not images:
            return torch.zeros(0, 3, *self._image_size, dtype=torch.uint8)
        # Normalised afterwards, all at once: the image processor takes each image by itself
        outputs = self.processor.image_processor(images, do_rescale=False, do_normalize=False, return_tensors="pt")
        return outputs["pixel_values"]
