"""Weights in and out: native MiniMind-V, the stock models of transformers, and the files of engines.

    from minimind_v_hf.conversion import from_native

    from_native.convert("sft_vlm_512.pth", "openai/clip-vit-base-patch16", "minimind-v/model", "MiniMind2-Small-V")

The commands in convert/ read a command line and call these functions.
"""

from . import from_native, to_gguf, to_llava, to_native, to_onnx
from .report import ConversionError


__all__ = ["ConversionError", "from_native", "to_gguf", "to_llava", "to_native", "to_onnx"]
