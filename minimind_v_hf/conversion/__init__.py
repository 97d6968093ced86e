"""Weights in and out: native MiniMind-V, and the stock models of transformers.

from minimind_v_hf.conversion import from_native

from_native.convert("sft_vlm_512.pth", "openai/clip-vit-base-patch16", "minimind-v/model", "MiniMind2-Small-V")
"""

from . import from_native, to_gguf, to_llava, to_native
from .report import ConversionError


__all__ = ["ConversionError", "from_native", "to_gguf", "to_llava", "to_native"]
