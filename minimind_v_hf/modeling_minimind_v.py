"""MiniMind-V: an image encoder, a projector and the MiniMind decoder, in that order of use.

    pixels ──► vision_tower ──► multi_modal_projector ──┐
                                                        ▼ replaces the embeddings of the image tokens
    token ids ──► embed_tokens ───────────────────► language_model ──► lm_head ──► logits

Parameter names follow LLaVA. The decoder is in modeling_minimind.py, which is to be read first.
This file is copied into every saved model folder, so it depends on torch and transformers alone.

Legend of the shape comments, beside that of the decoder:
    N  images in the whole batch        P  image tokens per image (image_seq_length)
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling, MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging, torch_compilable_check

from .arguments_minimind_v import CACHE, check_lengths, check_pixels, refuse_unknown_arguments, takes_cache
from .configuration_minimind_v import MiniMindVConfig
from .head_minimind_v import ImageGenerationMixin, LanguageModelingHead, is_minimind
from .modeling_minimind import MiniMindModel, MiniMindPreTrainedModel


logger = logging.get_logger(__name__)


class _HasImages:
    image_outputs: BaseModelOutputWithPooling | None

    @property
    def image_hidden_states(self) -> torch.Tensor | None:
        """The images as the decoder reads them, (N, P, D)."""
        return None if self.image_outputs is None else self.image_outputs.pooler_output


@dataclass
class MiniMindVModelOutputWithPast(_HasImages, MoeModelOutputWithPast):
    """Adds `image_outputs`: what `get_image_features` gave."""

    image_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class MiniMindVCausalLMOutputWithPast(_HasImages, MoeCausalLMOutputWithPast):
    """Adds `image_outputs`: what `get_image_features` gave."""

    image_outputs: BaseModelOutputWithPooling | None = None


class MiniMindVProjector(nn.Module):
    """Translates patch vectors into the decoder's embedding space.

    One linear layer (native `vision_proj.vision_proj.0`), or LayerNorm, linear, activation, linear (native
    `vision_proj.mlp`). With `patches_per_token` n, every n consecutive patch vectors are first joined into one.
    """

    def __init__(self, config: MiniMindVConfig):
        super().__init__()
        self.patches_per_token = config.patches_per_token
        in_features = config.vision_config.hidden_size * config.patches_per_token
        out_features = config.get_text_config().hidden_size
        bias = config.multimodal_projector_bias
        self.norm = nn.LayerNorm(in_features) if config.projector_layer_norm else nn.Identity()
        self.linear_1 = nn.Linear(in_features, out_features, bias=bias)
        self.act: nn.Module = nn.Identity()
        self.linear_2: nn.Module = nn.Identity()
        if config.projector_num_layers == 2:
            self.act = ACT2FN[config.projector_hidden_act]
            self.linear_2 = nn.Linear(out_features, out_features, bias=bias)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        images, count, width = patches.shape
        patches = patches.reshape(images, count // self.patches_per_token, width * self.patches_per_token)
        return self.linear_2(self.act(self.linear_1(self.norm(patches))))  # (N, P, D)


class MiniMindVPreTrainedModel(MiniMindPreTrainedModel):
    """What the vision-language models declare to transformers, beyond what the decoder does.

    Which kernel computes the experts can be chosen, as transformers learns from the words @use_experts_implementation in
    this file.
    """

    config: MiniMindVConfig
    input_modalities = ("image", "text")
    _can_record_outputs = None  # the encoder and the decoder record their own


class MiniMindVModel(MiniMindVPreTrainedModel):
    """Encoder, projector and decoder, without a language-modelling head.

    Raises:
        ValueError: the config is that of a training checkpoint that leaves the encoder out.
    """

    def __init__(self, config: MiniMindVConfig):
        super().__init__(config)
        if getattr(config, "encoder_left_out", False):
            raise ValueError(
                "This is a checkpoint in the middle of a training run, without its image encoder: load it with "
                "minimind_v_hf.training.load_checkpoint(folder), or take the folder that the finished run has written."
            )
        config.vision_config._experts_implementation = None  # the choice among kernels is for the decoder's experts
        self.vision_tower = AutoModel.from_config(config.vision_config)
        if hasattr(self.vision_tower, "use_head"):
            self.vision_tower.use_head = False  # SigLIP's summary of a whole image: not needed here, and vLLM cannot run it
        self.multi_modal_projector = MiniMindVProjector(config)
        self.language_model = (
            MiniMindModel(config.text_config) if is_minimind(config.text_config) else AutoModel.from_config(config.text_config)
        )
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MiniMindVModelOutputWithPast:
        """Run the model. The arguments of `MiniMindModel.forward`, and:

        Args:
            pixel_values: the images of the whole batch in the order of their placeholders, (N, 3, height, width).
            mm_encoder_outputs: `{"image": get_image_features(...)}`, for images that are already encoded; without a
                `pooler_output`, its `last_hidden_state` is projected first.

        Raises:
            TypeError, ValueError: as `MiniMindModel.forward`; or images and placeholders do not match in number.
        """
        refuse_unknown_arguments(self, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds, and not both.")
        image_outputs = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and image_outputs is not None:
            raise ValueError("Give either pixel_values or mm_encoder_outputs['image'], and not both.")

        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # (B, T, D)
        check_lengths(inputs_embeds.shape[1], attention_mask, cache)
        if pixel_values is None and image_outputs is None:
            pixel_values = self._no_images(input_ids, inputs_embeds, cache)
        if pixel_values is not None:
            image_outputs = self.get_image_features(pixel_values, return_dict=True)
        if image_outputs is not None:
            image_features = self._projected(image_outputs).to(inputs_embeds.device, inputs_embeds.dtype)  # (N, P, D)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)  # (B, T, 1)
            inputs_embeds = inputs_embeds.masked_scatter(mask, image_features)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **{CACHE: cache},
            **kwargs,
        )
        return MiniMindVModelOutputWithPast(**outputs, image_outputs=image_outputs)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Encode images and project them into the decoder's embedding space.

        Args:
            pixel_values: (N, 3, height, width), or (batch, images, 3, height, width) as native MiniMind-V has it. N may be
                0, as in a batch of text alone.

        Returns:
            The encoder's output, with the projected images (N, P, D) as `pooler_output`.
        """
        if pixel_values.ndim == 5:
            pixel_values = pixel_values.flatten(0, 1)
        check_pixels(pixel_values, self.config.vision_config.image_size)
        if pixel_values.shape[0] == 0:  # not len(), which would fix the number of images in an exported graph
            outputs = self._encode_no_images(pixel_values)
        else:
            outputs = self.encode(pixel_values, **kwargs)
        outputs.pooler_output = None  # the encoder's own is one vector for the whole image
        outputs.pooler_output = self._projected(outputs)
        return outputs

    def encode(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """The encoder's output for images (N, 3, height, width); its last hidden state is (N, patches, width) for any encoder.

        Raises:
            ValueError: a convolutional encoder has another stride than the configuration says.
        """
        outputs = self.vision_tower(pixel_values.to(self.vision_tower.dtype), **{**kwargs, "return_dict": True})
        grid, vision = outputs.last_hidden_state, self.config.vision_config
        if grid.ndim == 4:  # (N, channels, rows, columns), as convolutional encoders have it
            outputs.last_hidden_state = grid.flatten(2).transpose(1, 2)
            if outputs.last_hidden_state.shape[1] != self.config.image_seq_length * self.config.patches_per_token:
                raise ValueError(
                    f"The encoder gives {grid.shape[2]} x {grid.shape[3]} patches for an image of {vision.image_size} x "
                    f"{vision.image_size} pixels: patch_size={vision.patch_size} in its config is not its stride."
                )
        return outputs

    def _projected(self, image_outputs: BaseModelOutputWithPooling) -> torch.Tensor:
        """The images in the decoder's embedding space, (N, P, D), projected where that is still to be done."""
        features = image_outputs.pooler_output
        if features is None:
            # Class and register tokens come before the patches; CLIP has one, SigLIP none
            num_patches = self.config.image_seq_length * self.config.patches_per_token
            dtype = self.multi_modal_projector.linear_1.weight.dtype
            features = self.multi_modal_projector(image_outputs.last_hidden_state[:, -num_patches:].to(dtype))
        return features if isinstance(features, torch.Tensor) else torch.stack(tuple(features))

    def get_placeholder_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, image_features: torch.Tensor
    ) -> torch.Tensor:
        """Where the image tokens are, as a mask (B, T, 1).

        Raises:
            ValueError: there are more or fewer image tokens than image features.
        """
        if input_ids is not None:
            mask = input_ids == self.config.image_token_id
        elif inputs_embeds is not None:
            image_token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(image_token)).all(dim=-1)
        else:
            raise ValueError("Give either input_ids or inputs_embeds.")
        num_features = image_features.shape[0] * image_features.shape[1]
        torch_compilable_check(
            mask.sum() == num_features,
            lambda: (
                f"The prompts hold {int(mask.sum())} image tokens, but {image_features.shape[0]} images of "
                f"{image_features.shape[1]} tokens give {num_features} features: pass as many images as placeholders, and "
                f"a processor with image_seq_length={self.config.image_seq_length}."
            ),
        )
        return mask.unsqueeze(-1)

    # ── That is the model. Below stands what training in several processes, generation and the Auto classes need of it ──

    def _no_images(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, cache: Cache | None
    ) -> torch.Tensor | None:
        """No images, as a tensor, where a batch of text alone must pass through the projector all the same; else None."""
        if cache is not None:
            return None
        learns = self.training and torch.is_grad_enabled() and not is_frozen(self.multi_modal_projector)
        if learns or is_sharded(self.vision_tower):
            # Parallel engines wait for the gradient of every parameter in every step, and for every process that holds a shard
            return inputs_embeds.new_zeros(0, 3, *[self.config.vision_config.image_size] * 2)
        if input_ids is not None and not torch.compiler.is_compiling() and self.has_placeholders(input_ids):
            # No error: without a cache, a model that has written the token itself gets it back here
            logger.warning_once("The prompt holds image tokens, but no pixel_values were given: they stand for no image.")
        return None

    def _encode_no_images(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        """What the encoder would give for a batch of no images, which encoders refuse."""
        if is_frozen(self.vision_tower) and not is_sharded(self.vision_tower):
            num_patches = self.config.image_seq_length * self.config.patches_per_token
            width = self.config.vision_config.hidden_size
            return BaseModelOutputWithPooling(last_hidden_state=pixel_values.new_zeros(0, num_patches, width))
        # A trainable encoder is to have gradients, and a sharded one is run by all processes together. So a blank image is
        # encoded, and left out of the result, in evaluation mode: a batch norm's statistics are to be those of images.
        training = self.vision_tower.training
        self.vision_tower.eval()
        blank = self.encode(pixel_values.new_zeros(1, *pixel_values.shape[1:]))
        self.vision_tower.train(training)
        return BaseModelOutputWithPooling(last_hidden_state=blank.last_hidden_state[:0])

    def has_placeholders(self, input_ids: torch.Tensor) -> bool:
        """Whether there are image tokens."""
        return bool((input_ids == self.config.image_token_id).any())

    def train(self, mode: bool = True) -> "MiniMindVModel":
        """Set training or evaluation mode; an encoder that does not learn stays in evaluation mode."""
        super().train(mode)
        self.vision_tower.train(mode and not is_frozen(self.vision_tower))
        return self

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load the weights; through `AutoModel`, into the model with the head.

        `AutoModel.from_pretrained(folder).generate()` is what users write, while engines such as vLLM call
        `AutoModel.from_config(config)`, which does not come by here, and need the base model.
        """
        # Of those who call this, only the Auto classes pass adapter_kwargs, and they always do
        if cls is MiniMindVModel and "adapter_kwargs" in kwargs:
            return MiniMindVForConditionalGeneration.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


class MiniMindVForConditionalGeneration(LanguageModelingHead, MiniMindVPreTrainedModel, ImageGenerationMixin):
    """MiniMind-V: reads images and text, and writes text."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _auto_class = "AutoModelForImageTextToText"

    def __init__(self, config: MiniMindVConfig):
        super().__init__(config)
        self.model = MiniMindVModel(config)
        text_config = config.get_text_config()
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        # Decoders other than ours may have another name for it
        embeddings = next(name for name, module in self.named_modules() if module is self.get_input_embeddings())
        self._tied_weights_keys = {"lm_head.weight": f"{embeddings}.weight"}
        self.post_init()

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> tuple | BaseModelOutputWithPooling:
        """See `MiniMindVModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_router_logits: bool | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        skip_logits: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MiniMindVCausalLMOutputWithPast:
        """Run the model. See `MiniMindVModel.forward` for the images and `MiniMindForCausalLM.forward` for the rest."""
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            output_router_logits=self.wants_router_logits(output_router_logits),
            **kwargs,
        )
        fields = self.head(outputs, labels, logits_to_keep, skip_logits, **kwargs)
        return MiniMindVCausalLMOutputWithPast(image_outputs=outputs.image_outputs, **fields)


def is_frozen(module: nn.Module) -> bool:
    """Whether no parameter of a module learns."""
    return not any(parameter.requires_grad for parameter in module.parameters())


def is_sharded(module: nn.Module) -> bool:
    """Whether each process holds a part of a module's weights (FSDP, DeepSpeed ZeRO-3), so that all must run it together."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    wrapped = any(isinstance(part, (FSDPModule, FullyShardedDataParallel)) for part in module.modules())
    return wrapped or any(hasattr(parameter, "ds_id") for parameter in module.parameters())


__all__ = ["MiniMindVForConditionalGeneration", "MiniMindVModel", "MiniMindVPreTrainedModel"]
