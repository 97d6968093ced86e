"""The frozen encoder's patch vectors, kept on disk while the first epoch passes: later epochs need no encoder.

An image of 224 pixels is 10 KB as a JPEG and 300 KB as vectors in bfloat16, but reading those takes a hundredth of the time
of encoding it: worth it up to tens of thousands of images.
"""

import hashlib
import itertools
import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from ..data import MiniMindVCollator
from ..data.images import file_state
from ..modeling_minimind_v import MiniMindVForConditionalGeneration, is_sharded
from .checkpoints import encoder_digest
from .freezing import is_frozen


logger = logging.get_logger(__name__)

_ARRAYS = ("features.npy", "checksums.npy")


def _name(source: str | bytes) -> str:
    return hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else str(source)


class FeatureCache:
    """Patch vectors of images, in a folder that `cache_features` made and that training fills.

    Several processes may read and write it. Vectors count only with their checksum, which is written after them: however a
    run ends, none are half written.

    Pickled for another process it is its folder alone, which is opened there: the vectors stay on the disk.

    Args:
        folder: with `index.json`, `features.npy` (images, patches, width) and `checksums.npy` (images,), 0 where there is none.
    """

    def __init__(self, folder: str | os.PathLike):
        self._folder = Path(folder).absolute()
        index = json.loads((self._folder / "index.json").read_text(encoding="utf-8"))
        self.origin: str = index["origin"]
        self.states: dict[str, list[int]] = index["images"]
        self.rows: dict[str, int] = {name: row for row, name in enumerate(self.states)}
        self._features, self._checksums = (np.load(self._folder / name, mmap_mode="r") for name in _ARRAYS)
        self._opened = [os.stat(self._folder / name) for name in _ARRAYS]

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return FeatureCache, (self._folder,)

    def read(self, sources: list[str | bytes]) -> tuple[torch.Tensor, torch.Tensor]:
        """What is known of images.

        Returns:
            Their patch vectors (images, patches, width), in float32 or bfloat16, and those that are still to be encoded:
            their places among `sources`, their rows in the cache, and the number of its file, (missing, 3).
        """
        rows = [self.rows[_name(source)] for source in sources]
        vectors = self._features[rows]
        missing = [
            (place, row, self._opened[0].st_ino)
            for place, row in enumerate(rows)
            if not self._checksums[row] or _checksum(vectors[place]) != self._checksums[row]
        ]
        tensor = torch.from_numpy(vectors)
        tensor = tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor
        return tensor, torch.tensor(missing, dtype=torch.long).view(-1, 3)

    def write(self, rows: list[int], vectors: torch.Tensor) -> None:
        """Keep patch vectors (images, patches, width) in these rows, unless another run has replaced the folder since."""
        vectors = vectors.cpu().contiguous()
        arrays = (vectors.view(torch.int16) if vectors.dtype == torch.bfloat16 else vectors).numpy()
        # Not through the map, where a full disk would end the process without a word
        checksums = [np.uint32(_checksum(array)) for array in arrays]
        for name, opened, stored, values in zip(
            _ARRAYS, self._opened, (self._features, self._checksums), (list(arrays), checksums), strict=True
        ):
            with open(self._folder / name, "r+b") as file:
                if not os.path.samestat(os.fstat(file.fileno()), opened):
                    return  # its rows are other images, or another encoder's
                for row, value in zip(rows, values, strict=True):
                    file.seek(stored.offset + row * value.nbytes)
                    file.write(value.tobytes())

    @torch.compiler.disable
    @torch.no_grad()
    def encode_missing(
        self, model: MiniMindVForConditionalGeneration, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict]:
        """Before a forward pass: encode the images that `CachedFeaturesCollator` found nothing of, and keep what they give.

        Args:
            model: whose arguments the others are.

        Returns:
            The arguments (args, kwargs), with the patch vectors of every image.

        Raises:
            ValueError: each process has a part of the encoder alone, and all would have to encode together.
        """
        uncached = kwargs.get("uncached")
        if uncached is None or uncached[0, 2] != self._opened[0].st_ino:  # of another cache of this model
            return args, kwargs
        del kwargs["uncached"]
        tower, pixels = model.model.vision_tower, kwargs.pop("pixel_values")
        if is_sharded(tower):
            raise ValueError(
                "--cache_features is filled by processes with the whole encoder, not where each holds a part of it, as under "
                "ZeRO-3: fill it in a run without."
            )
        vectors = kwargs["mm_encoder_outputs"]["image"].last_hidden_state
        places, rows, _ = uncached.unbind(1)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=vectors.dtype == torch.bfloat16):
            encoded = model.model.encode(pixels).last_hidden_state[:, -vectors.shape[1] :].to(vectors.dtype)
        self.write(rows.tolist(), encoded)
        vectors[places] = encoded
        return args, kwargs


def _checksum(vectors: np.ndarray) -> int:
    return zlib.crc32(vectors.data) or 1


def cache_features(
    model: MiniMindVForConditionalGeneration,
    collator: MiniMindVCollator,
    datasets: list[Any],
    folder: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
) -> "CachedFeaturesCollator":
    """Keep the encoder's output for every image of the data sets, from its first forward pass with this model on.

    What the folder holds already is used. It is made anew, with a warning, if it lacks one of the images, or if one has
    changed since, in size or time, or the encoder, its image processor or `dtype`.

    Args:
        model: with a frozen encoder.
        collator: decodes and resizes.
        datasets: with the column `images`.
        folder: of the cache.
        dtype: float32, which changes no loss, or bfloat16, of half the size, in which autocast computes.

    Raises:
        ValueError: the encoder learns, the folder holds something else, or the disk is too small.
    """
    if not is_frozen(model.model.vision_tower):
        raise ValueError("Vectors of images can be cached only while the encoder is frozen: trainable='all' changes them.")
    cache = _open_cache(model, collator, datasets, Path(folder), dtype)
    model.register_forward_pre_hook(cache.encode_missing, with_kwargs=True)
    return CachedFeaturesCollator(collator, cache)


def _open_cache(model, collator, datasets, folder: Path, dtype: torch.dtype) -> FeatureCache:
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
        if (folder / "checksums.npy").exists():  # earlier versions wrote none
            cache = FeatureCache(folder)
            if cache.origin == origin and states.items() <= cache.states.items():
                return cache
        logger.warning(f"{folder} is made anew: it holds vectors of other images, or of another encoder.")
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
    np.lib.format.open_memmap(unfinished / "features.npy", mode="w+", dtype=stored, shape=shape)
    np.save(unfinished / "checksums.npy", np.zeros(len(sources), np.uint32))
    (unfinished / "index.json").write_text(json.dumps({"origin": origin, "images": states}), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.replace(folder)
    return FeatureCache(folder)


class CachedFeaturesCollator:
    """Collates like another collator, with cached patch vectors in place of pixels; made by `cache_features`.

    Of images without vectors it gives the pixels, and `uncached`: `FeatureCache.encode_missing` has them encoded.

    Args:
        collator: for everything else.
        cache: has a row for the images of every row.
    """

    def __init__(self, collator: MiniMindVCollator, cache: FeatureCache):
        self.collator, self.cache = collator, cache

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        sources = [source for row in rows for sample in row.get("samples", [row]) for source in sample["images"]]
        if not sources:
            return self.collator(rows)
        vectors, uncached = self.cache.read(sources)
        missing, places = set(uncached[:, 0].tolist()), itertools.count()

        def without_cached(sample: dict[str, Any]) -> dict[str, Any]:
            return {**sample, "images": [source for source in sample["images"] if next(places) in missing]}

        batch: dict[str, Any] = self.collator(
            [
                {"samples": [without_cached(sample) for sample in row["samples"]]} if "samples" in row else without_cached(row)
                for row in rows
            ]
        )
        batch["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(last_hidden_state=vectors)}
        if missing:
            batch["uncached"] = uncached
        else:
            del batch["pixel_values"]
        return batch
