"""A folder that convert/to_onnx.py wrote, as a model of transformers: `generate()` over ONNX Runtime.

    model = MiniMindVOnnxModel.from_pretrained("MiniMind2-Small-V-onnx", dtype="q4")
    processor = MiniMindVProcessor.from_pretrained("MiniMind2-Small-V-onnx")

Sampling, beams, streaming and stopping criteria are transformers' own; three graphs do the computing.
"""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, LlavaConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from .arguments_minimind_v import CACHE, check_lengths, takes_cache
from .head_minimind_v import ImageGenerationMixin
from .modeling_minimind_v import MiniMindVModel


GRAPHS = ("vision_encoder", "embed_tokens", "decoder_model_merged")
SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "q4": "_q4", "q4f16": "_q4f16"}
"""What transformers.js appends to a graph's name for each precision."""


_OF_NO_USE = ("return_dict", "tokenizer", "assistant_tokenizer")
"""Arguments that `generate` hands on, and which change nothing here."""


def graph_file(folder: str | os.PathLike, graph: str, dtype: str) -> Path:
    """Where a folder has a graph in a precision."""
    return Path(folder, "onnx", f"{graph}{SUFFIXES[dtype]}.onnx")


def precisions(folder: str | os.PathLike) -> list[str]:
    """The precisions in which a folder has all three graphs; none of a folder without ONNX graphs."""
    return [dtype for dtype in SUFFIXES if all(graph_file(folder, graph, dtype).is_file() for graph in GRAPHS)]


class MiniMindVOnnxModel(PreTrainedModel, ImageGenerationMixin):
    """MiniMind-V over ONNX Runtime, for answers on a CPU; made by `from_pretrained`.

    Args:
        config: of the folder; it tells the image token and the shape of the cache.
        sessions: an `onnxruntime.InferenceSession` for each of the `GRAPHS`.
    """

    config_class = LlavaConfig
    config: LlavaConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    _supports_sdpa = True  # nothing here asks for an attention function, so any choice will do
    has_placeholders, get_placeholder_mask = MiniMindVModel.has_placeholders, MiniMindVModel.get_placeholder_mask

    def __init__(self, config: LlavaConfig, sessions: dict[str, Any]):
        super().__init__(config)
        self.sessions = sessions
        decoder = sessions["decoder_model_merged"]
        cached = [each for each in decoder.get_inputs() if each.name.startswith("past_key_values.")]
        self.cache_names = [each.name for each in cached]
        self.cache_dtype = torch.float16 if cached[0].type == "tensor(float16)" else torch.float32

    @classmethod
    def from_pretrained(  # nothing of what loads PyTorch models applies
        cls, folder: str | os.PathLike, dtype: str = "auto", num_threads: int | None = None
    ) -> "MiniMindVOnnxModel":
        """Open the graphs of a folder.

        Args:
            folder: written by convert/to_onnx.py.
            dtype: "fp32", "fp16", "q8", "q4" or "q4f16", where the folder has it; or "auto" for the one that the export
                found best.
            num_threads: of ONNX Runtime; by default PyTorch's.

        Raises:
            ImportError: onnxruntime is not installed.
            ValueError: the folder has no such graphs, or they are damaged.
        """
        try:
            import onnxruntime
        except ImportError:
            raise ImportError('ONNX folders need onnxruntime: pip install -e ".[onnx]"') from None
        found = precisions(folder)
        if not found:
            raise ValueError(f"{folder} holds no ONNX graphs: expected a folder that convert/to_onnx.py wrote.")
        config = LlavaConfig.from_pretrained(folder)
        if dtype == "auto":
            dtype = getattr(config, "transformers.js_config", {}).get("dtype", found[0])
        if dtype not in found:
            raise ValueError(f"{folder} has no graphs in {dtype}: expected one of {', '.join(found)}, or auto.")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads or torch.get_num_threads()
        sessions = {}
        for graph in GRAPHS:
            path = graph_file(folder, graph, dtype)
            try:
                sessions[graph] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # ONNX Runtime has no common class for what may be wrong with a file
                raise ValueError(f"{path} cannot be opened: {str(error).splitlines()[0]}") from error
        model = cls(config, sessions).eval()
        model.generation_config = GenerationConfig.from_pretrained(folder)
        return model

    def save_pretrained(self, *args, **kwargs):
        """Raises NotImplementedError: the graphs do not change."""
        raise NotImplementedError("An ONNX folder does not change: copy it.")

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of what goes in and comes out."""
        return torch.float32

    def _run(self, graph: str, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        arrays = {name: tensor.contiguous().numpy() for name, tensor in inputs.items()}
        return [torch.from_numpy(output) for output in self.sessions[graph].run(None, arrays)]

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Encode images (N, 3, height, width). Returns their vectors (N, P, D) as `pooler_output`."""
        (features,) = self._run("vision_encoder", {"pixel_values": pixel_values.float()})
        return BaseModelOutputWithPooling(pooler_output=features)

    @takes_cache
    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Run the graphs. The arguments are those of `MiniMindVForConditionalGeneration.forward`.

        Returns:
            `logits` (B, T, V), float32, and the cache.

        Raises:
            TypeError: an argument is not known, or asks for what the graphs do not give.
            ValueError: images and image tokens do not match in number, the cache was lost, or it is not a growing one.
        """
        unknown = [
            name for name, value in kwargs.items() if value is not None and value is not False and name not in _OF_NO_USE
        ]
        if unknown:
            raise TypeError(f"An ONNX folder gives logits alone, and has no use for {', '.join(unknown)}.")
        batch, tokens = input_ids.shape
        cache = DynamicCache(config=self.config.get_text_config()) if cache is None else cache
        if not isinstance(cache, DynamicCache):
            raise ValueError(f"cache: expected a DynamicCache, which grows with the tokens, got {type(cache).__name__}.")
        check_lengths(tokens, attention_mask, cache, self.config.get_text_config().max_position_embeddings)
        past = cache.get_seq_length()
        if attention_mask is None:
            attention_mask = torch.ones(batch, past + tokens, dtype=torch.long)
        if position_ids is None:
            position_ids = torch.arange(past, past + tokens).expand(batch, tokens)
        inputs = {
            "inputs_embeds": self._embed(input_ids, pixel_values, mm_encoder_outputs),
            "attention_mask": attention_mask.long(),
            "position_ids": position_ids,
            "num_logits_to_keep": torch.tensor(logits_to_keep),
        }
        logits, *present = self._run("decoder_model_merged", inputs | self._past(cache, batch))
        for number, (key, value) in enumerate(zip(present[::2], present[1::2], strict=True)):
            if past:
                cache.layers[number].keys, cache.layers[number].values = key, value
            else:
                cache.update(key, value, number)
        return CausalLMOutputWithPast(logits=logits, **{CACHE: None if use_cache is False else cache})

    def _embed(self, input_ids, pixel_values, mm_encoder_outputs) -> torch.Tensor:
        """The vectors of tokens and images, (B, T, D)."""
        (embeddings,) = self._run("embed_tokens", {"input_ids": input_ids})
        images = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            images = self.get_image_features(pixel_values)
        if images is None:
            return embeddings
        features = images.pooler_output
        return embeddings.masked_scatter(self.get_placeholder_mask(input_ids, None, features), features)

    def _past(self, cache: DynamicCache, batch: int) -> dict[str, torch.Tensor]:
        """Keys and values so far, by the names of the graph's inputs."""
        if cache.get_seq_length():
            states = [states for layer in cache.layers for states in (layer.keys, layer.values)]
        else:
            text = self.config.get_text_config()
            empty = torch.zeros(batch, text.num_key_value_heads, 0, text.head_dim, dtype=self.cache_dtype)
            states = [empty] * len(self.cache_names)
        return dict(zip(self.cache_names, states, strict=True))


__all__ = ["MiniMindVOnnxModel", "precisions"]
