"""MiniMind-V the Hugging Face way: a tiny vision-language model with config, model and processor for transformers.

Importing the package registers its classes with the Auto classes of transformers.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration_minimind_v import MiniMindVConfig, MiniMindVTextConfig, __version__
from .modeling_minimind import MiniMindForCausalLM, MiniMindModel
from .modeling_minimind_v import MiniMindVForConditionalGeneration, MiniMindVModel
from .onnx_model import MiniMindVOnnxModel
from .processing_minimind_v import MiniMindVProcessor


AutoConfig.register(MiniMindVTextConfig.model_type, MiniMindVTextConfig)
AutoConfig.register(MiniMindVConfig.model_type, MiniMindVConfig)
AutoModel.register(MiniMindVTextConfig, MiniMindModel)
AutoModel.register(MiniMindVConfig, MiniMindVModel)
AutoModelForCausalLM.register(MiniMindVTextConfig, MiniMindForCausalLM)
AutoModelForCausalLM.register(MiniMindVConfig, MiniMindVForConditionalGeneration)
AutoModelForImageTextToText.register(MiniMindVConfig, MiniMindVForConditionalGeneration)
AutoModelForMultimodalLM.register(MiniMindVTextConfig, MiniMindForCausalLM)
AutoModelForMultimodalLM.register(MiniMindVConfig, MiniMindVForConditionalGeneration)
AutoProcessor.register(MiniMindVConfig, MiniMindVProcessor)

__all__ = [
    "MiniMindForCausalLM",
    "MiniMindModel",
    "MiniMindVConfig",
    "MiniMindVForConditionalGeneration",
    "MiniMindVModel",
    "MiniMindVOnnxModel",
    "MiniMindVProcessor",
    "MiniMindVTextConfig",
    "__version__",
]
