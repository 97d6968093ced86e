"""What a forward pass takes: the name of its cache, the arguments that it hands on, and lengths that fit each other.

This file is copied into every saved model folder, so it depends on torch and transformers alone.
"""

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import wraps

import torch
import transformers
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import TransformersKwargs, logging
from transformers.utils.deprecation import deprecate_kwarg

from .configuration_minimind_v import __version__


logger = logging.get_logger(__name__)

CACHE = next(field.name for field in fields(MoeModelOutputWithPast) if field.name in ("cache", "past_key_values"))
"""What the installed transformers calls the cache: `cache` since 5.24, `past_key_values` before."""


def takes_cache(forward: Callable) -> Callable:
    """Let a forward pass whose argument is `cache` take `past_key_values` as well, which is deprecated since 5.24."""
    if CACHE == "cache":
        return deprecate_kwarg("past_key_values", version="5.40.0", new_name="cache")(forward)

    @wraps(forward)
    def renamed(*args, **kwargs):
        if kwargs.get("past_key_values") is not None:
            kwargs["cache"] = kwargs["past_key_values"]
        kwargs.pop("past_key_values", None)
        return forward(*args, **kwargs)

    return renamed


KNOWN_ARGUMENTS = frozenset(TransformersKwargs.__optional_keys__) | {
    *("use_cache", "output_router_logits", "shift_labels"),  # shift_labels: accelerate's sequence parallelism
    *("attention_instances", "forward_batch"),  # vLLM, SGLang
    *("tokenizer", "assistant_tokenizer", "debug_io"),  # generate: for the strings that end an answer, and such
    # Continuous batching; those with seqlen until 5.18
    *("read_index", "write_index", "block_table", "logits_indices", "logits_processor_args", "max_seqlen_q", "max_seqlen_k"),
}
"""Arguments that a forward pass hands on, beside those that it takes itself and those that the attention function names."""


def refuse_unknown_arguments(model: PreTrainedModel, kwargs: dict) -> None:
    """Raise a TypeError for an argument that nothing would read: by another name, a cache would be lost without an error.

    What is None passes: nothing is lost with it, and libraries hand on arguments that they were not given themselves.
    """
    unknown = [name for name, value in kwargs.items() if name not in KNOWN_ARGUMENTS and value is not None]
    if unknown:
        attention = ALL_ATTENTION_FUNCTIONS.get(model.config.get_text_config()._attn_implementation)
        parameters = inspect.signature(attention).parameters if attention is not None else {}
        optional = {name for name, parameter in parameters.items() if parameter.default is not parameter.empty}
        unknown = [name for name in unknown if name not in optional - {"dropout", "scaling"}]
    if unknown:
        raise TypeError(
            f"{type(model).__name__}.forward got an unknown argument: {', '.join(map(repr, unknown))}. The model's code is "
            f"minimind_v_hf {__version__}, and transformers is {transformers.__version__}: is the name misspelt, or one of the "
            "two too old for the other?"
        )


def check_lengths(
    tokens: int,
    attention_mask: torch.Tensor | None,
    cache: Cache | None = None,
    max_positions: int | None = None,
    position_ids: torch.Tensor | None = None,
) -> None:
    """Raise a ValueError for a lost cache or for no tokens, and warn of more tokens than the model has positions for.

    By shapes alone, so that no device is waited for. A static cache is as long as it can become, whatever it holds, and is
    passed over, as are the caches of engines.

    Raises:
        TypeError: the cache is none, such as the tuples that transformers took before version 5.
        ValueError: see above.
    """
    if cache is not None and not hasattr(cache, "update"):
        raise TypeError(f"The cache is a {type(cache).__name__}: expected a Cache of transformers, such as DynamicCache().")
    if (
        torch.compiler.is_exporting()
        or not (cache is None or isinstance(cache, Cache))
        or getattr(cache, "is_compileable", False)
    ):
        return
    past = 0 if cache is None else cache.get_seq_length()
    if tokens == 0:
        raise ValueError("The prompt is empty: give at least one token.")
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 and attention_mask.shape[1] > past + tokens:
        raise ValueError(
            f"The attention mask covers {attention_mask.shape[1]} tokens, but there are {past} in the cache and {tokens} in "
            "this step: the cache was lost on the way, or the mask belongs to other tokens."
        )
    # Without a cache, given positions may start again within a row, which then may be of any length
    packed = cache is None and position_ids is not None
    if not (max_positions is None or packed or torch.compiler.is_compiling()) and past + tokens > max_positions:
        logger.warning_once(
            f"The sequence has grown beyond the {max_positions} positions that the model is meant for "
            "(max_position_embeddings): expect worse answers."
        )


def check_pixels(pixel_values: torch.Tensor, size: int) -> None:
    """Raise a ValueError for pixels that are not the image processor's: floating-point numbers, `size` by `size`."""
    if tuple(pixel_values.shape[-2:]) != (size, size):  # there are encoders that would interpolate, and give other patches
        raise ValueError(
            f"pixel_values are {pixel_values.shape[-2]}x{pixel_values.shape[-1]} pixels, but the encoder expects "
            f"{size}x{size}: use the image processor that belongs to the model."
        )
    if not pixel_values.is_floating_point():
        raise ValueError(f"pixel_values are {pixel_values.dtype}: expected the image processor's floating-point numbers.")
