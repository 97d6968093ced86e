"""The frozen encoder's patch vectors, computed once and kept on disk, for runs of several epochs.

An image of 224 pixels is 10 KB as a JPEG and 300 KB as vectors in bfloat16, but reading those takes a hundredth of the time
of encoding it: worth it up to tens of thousands of images.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..data import MiniMindVCollator
from ..data.images import file_state
from ..modeling_minimind_v import MiniMindVForConditionalGeneration
from .checkpoints import encoder_digest
from .freezing import is_frozen


def _name(source: str | bytes) -> str:
    return hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else str(source)


class FeatureCache:
    """Patch vectors of images, from a folder that `encode_images` filled.

    Pickled for another process it is its folder alone, which is opened there: the vectors stay on the disk.

    Args:
        folder: with `index.json` and `features.npy`.
    """

    def __init__(self, folder: str | os.PathLike):
        self._folder = Path(folder).absolute()
        index = json.loads((self._folder / "index.json").read_text(encoding="utf-8"))
        self.origin: str = index["origin"]
        self.states: dict[str, list[int]] = index["images"]
        self.rows: dict[str, int] = {name: row for row, name in enumerate(self.states)}
        self._features = np.load(self._folder / "features.npy", mmap_mode="r")

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return FeatureCache, (self._folder,)

    def __call__(self, sources: list[str | bytes]) -> torch.Tensor:
        """The patch vectors (images, patches, width) of images, in float32 or bfloat16."""
        vectors = torch.from_numpy(self._features[[self.rows[_name(source)] for source in sources]])
        return vectors.view(torch.bfloat16) if vectors.dtype == torch.int16 else vectors


@torch.no_grad()
def encode_images(
    model: MiniMindVForConditionalGeneration,
    collator: MiniMindVCollator,
    datasets: list[Any],
    folder: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 16,
) -> FeatureCache:
    """Encode every image of the data sets once, unless the folder has them already.

    It is done again when an image's file has changed since, in size or time, or the encoder, its image processor or `dtype`.

    Args:
        model: with a frozen encoder.
        collator: decodes and resizes.
        datasets: with the column `images`.
        folder: to fill; it is written under another name first.
        dtype: float32, which changes no loss, or bfloat16, of half the size.
        batch_size: images at a time.

    Raises:
        ValueError: the encoder learns, the folder holds something else, or the disk is too small.
    """
    folder, tower = Path(folder), model.model.vision_tower
    if not is_frozen(tower):
        raise ValueError("Vectors of images can be cached only while the encoder is frozen: trainable='all' changes them.")
    sources = {
        _name(source): source
        for dataset in datasets
        for batch in dataset.select_columns(["images"]).iter(1000)
        for images in batch["images"]
        for source in images
    }
    states = {name: list(file_state(source) or ()) if isinstance(source, str) else [] for name, source in sources.items()}
    origin = "\n".join([encoder_digest(model), str(dtype), collator.processor.image_processor.to_json_string()])
    if folder.exists():
        if not (folder / "index.json").exists():  # it is replaced below
            raise ValueError(f"{folder} holds something else than vectors of images: name a folder that does not exist yet.")
        cache = FeatureCache(folder)
        if cache.origin == origin and states.items() <= cache.states.items():
            return cache
    num_patches = model.config.image_seq_length * model.config.patches_per_token
    shape = (len(sources), num_patches, model.config.vision_config.hidden_size)
    folder.parent.mkdir(parents=True, exist_ok=True)
    size, free = int(np.prod(shape)) * dtype.itemsize, shutil.disk_usage(folder.parent).free
    if size > 0.9 * free:
        raise ValueError(f"The vectors of {len(sources):,} images take {size / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free.")
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    stored = np.int16 if dtype == torch.bfloat16 else np.float32
    features = np.lib.format.open_memmap(unfinished / "features.npy", mode="w+", dtype=stored, shape=shape)
    names = list(sources)
    for start in tqdm(range(0, len(names), batch_size), desc="Encoding images", unit="batch"):
        batch = [sources[name] for name in names[start : start + batch_size]]
        pixels = collator([{"input_ids": [0], "labels": [-100], "images": batch}])["pixel_values"]
        with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            vectors = tower(pixels.to(model.device)).last_hidden_state[:, -num_patches:].to(dtype).cpu()
        features[start : start + len(batch)] = (vectors.view(torch.int16) if dtype == torch.bfloat16 else vectors).numpy()
    features.flush()
    (unfinished / "index.json").write_text(json.dumps({"origin": origin, "images": states}), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.replace(folder)
    return FeatureCache(folder)


class CachedFeaturesCollator:
    """Collates like another collator, with cached patch vectors in place of pixels.

    Args:
        collator: for everything else.
        cache: has the images of every row.
    """

    def __init__(self, collator: MiniMindVCollator, cache: FeatureCache):
        self.collator, self.cache = collator, cache

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        samples = [sample for row in rows for sample in row.get("samples", [row])]
        sources = [source for sample in samples for source in sample["images"]]
        without_images = [
            {"samples": [{**sample, "images": []} for sample in row["samples"]]} if "samples" in row else {**row, "images": []}
            for row in rows
        ]
        batch: dict[str, Any] = self.collator(without_images)
        if sources:
            del batch["pixel_values"]
            batch["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(last_hidden_state=self.cache(sources))}
        return batch
