"""Samples to a batch: pads token ids and labels, decodes the pictures."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from .data import IGNORE_INDEX
from .processing_minimind_v import MiniMindVProcessor, load_image


@dataclass
class MiniMindVCollator:
    """Collates rows of `tokenize_conversations`.

    Args:
        processor: gives the padding token and the image processor.
    """

    processor: MiniMindVProcessor

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate samples with `input_ids`, `labels` and `images` (paths, or whatever `load_image` takes).

        Returns:
            `input_ids`, `labels` and `attention_mask` (batch, longest sample), padded on the right, and, where there
            are pictures, `pixel_values` (images in the whole batch, 3, height, width).

        Raises:
            ValueError: a picture cannot be read.
        """
        input_ids = [torch.tensor(sample["input_ids"]) for sample in samples]
        labels = [torch.tensor(sample["labels"]) for sample in samples]
        pad_token_id = self.processor.tokenizer.pad_token_id
        batch = {
            "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=pad_token_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True),
        }
        images = []
        for sample in samples:
            for source in sample["images"]:
                try:
                    images.append(load_image(source))
                except ValueError as error:
                    raise ValueError(f"Cannot read the image {source!s}: {error}") from error
        if images:
            batch["pixel_values"] = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        return batch
