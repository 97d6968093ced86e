"""What comes after the decoder: logits and, in training, losses; and images beside a prompt that is repeated.

This file is copied into every saved model folder, so it depends on torch and transformers alone.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging

from .arguments_minimind_v import CACHE
from .configuration_minimind_v import MiniMindVTextConfig


logger = logging.get_logger(__name__)

MAX_LOGITS = 2**25
"""How many logits a training step holds at a time when nobody reads them: 128 MiB in float32."""


class LanguageModelingHead:
    """The head of a language model: hidden states to logits and losses, alike with and without images."""

    config: PreTrainedConfig
    lm_head: nn.Linear
    loss_function: Callable
    training: bool
    get_decoder: Callable[[], PreTrainedModel]

    def head(
        self,
        outputs: MoeModelOutputWithPast,
        labels: torch.Tensor | None,
        logits_to_keep: int | torch.Tensor,
        skip_logits: bool,
        **kwargs: Unpack[TransformersKwargs],
    ) -> dict[str, Any]:
        """The output's fields: the decoder's, `logits` (B, T, V), `loss` and `aux_loss`. What is not wanted is None."""
        text_config = self.config.get_text_config()
        hidden_states = outputs.last_hidden_state
        logits = loss = aux_loss = None
        if skip_logits and labels is not None:
            loss = loss_at_labels(self.lm_head, hidden_states, labels, **kwargs)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept, :])
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=text_config.vocab_size, **kwargs)
        if is_minimind(text_config) and outputs.router_logits:
            aux_loss = load_balancing_loss(outputs.router_logits, hidden_states.shape[0], text_config)
            if self.training:
                self._warn_of_hidden_routers(outputs)
                if loss is not None:
                    share = 1.0
                    if labels is not None and kwargs.get("num_items_in_batch") is not None:
                        # So that the parts of a batch, in several steps or processes, add up to one auxiliary loss
                        share = shifted(labels, **kwargs).ne(-100).sum() / kwargs["num_items_in_batch"]
                    loss = loss + (share * aux_loss).to(loss.device)
        of_the_decoder = {name: getattr(outputs, name) for name in (CACHE, "hidden_states", "attentions", "router_logits")}
        return {"logits": logits, "loss": loss, "aux_loss": aux_loss, **of_the_decoder}

    def wants_router_logits(self, requested: bool | None) -> bool:
        """Whether the routers' logits are to be recorded: on request, or to balance the experts in training."""
        config = self.config.get_text_config()
        if requested is None:
            requested = getattr(config, "output_router_logits", False)
        return requested or (self.training and getattr(config, "num_experts", 0) > 0)

    def _warn_of_hidden_routers(self, outputs: MoeModelOutputWithPast) -> None:
        hidden = outputs.last_hidden_state.requires_grad and not outputs.router_logits[-1].requires_grad
        if hidden and self.get_decoder().gradient_checkpointing:
            logger.warning_once(
                "The experts are not balanced: the load-balancing loss has no gradient, since reentrant gradient checkpointing "
                "hides the routers. Pass gradient_checkpointing_kwargs={'use_reentrant': False}."
            )


class ImageGenerationMixin(GenerationMixin):
    """Generation for prompts with images."""

    config: PreTrainedConfig
    base_model: Any

    def generate_batch(self, inputs: list[list[int]], *args, **kwargs):
        """Continuous batching of transformers, for prompts of text alone: it takes no images.

        Raises:
            ValueError: a prompt holds image tokens.
        """
        if any(self.config.image_token_id in prompt for prompt in inputs):
            raise ValueError("generate_batch takes no images, and a prompt holds image tokens: use generate() for it.")
        return super().generate_batch(inputs, *args, **kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Repeat each sequence for beams or for several answers, and with it its images: [A, B] becomes [A, B, A, B].

        transformers 5.18 makes [A, A, B, B] of them, which gives every sequence with several images the wrong ones.
        """
        images = (model_kwargs.get("mm_encoder_outputs") or {}).pop("image", None)
        cache = model_kwargs.get(CACHE)
        first = cache is None or cache.get_seq_length() == 0
        if images is None and input_ids is not None and first and self.base_model.has_placeholders(input_ids):
            raise ValueError(
                f"The prompt holds image tokens (id {self.config.image_token_id}), but no pixel_values were given: pass the "
                "images beside the prompt, as the processor returns them."
            )
        if images is not None and expand_size > 1:
            inputs_embeds = model_kwargs.get("inputs_embeds")
            features = images.pooler_output
            mask = self.base_model.get_placeholder_mask(input_ids if inputs_embeds is None else None, inputs_embeds, features)
            groups = features.split((mask.sum(dim=(1, 2)) // self.config.image_seq_length).tolist())
            images.pooler_output = torch.cat([group for group in groups for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if images is not None:
            model_kwargs["mm_encoder_outputs"]["image"] = images
        return input_ids, model_kwargs


def is_minimind(text_config: PreTrainedConfig) -> bool:
    """Whether a config is that of our decoder.

    By name: in a folder loaded with remote code, config and model come from two copies of the configuration module.
    """
    return text_config.model_type == MiniMindVTextConfig.model_type


def load_balancing_loss(router_logits: tuple[torch.Tensor, ...], batch_size: int, config: MiniMindVTextConfig) -> torch.Tensor:
    """The auxiliary loss that keeps the experts equally busy, summed over layers, as the native trainers define it.

    `often` is how many times an expert is chosen per token, and `score` its mean score, both over the tokens of one sequence
    (MiniMind2) or of the whole batch (minimind-3), padding included:

        MiniMind2   coef * mean over sequences of  E / A * sum over experts of  often * score
        minimind-3  coef * E * sum over experts of  often * score

    Args:
        router_logits: one tensor (B*T, E) per layer.
        batch_size: B.
        config: gives E, A, `seq_aux` and `router_aux_loss_coef`.

    Returns:
        A scalar, with the coefficient applied.
    """
    groups = batch_size if config.seq_aux else 1
    active = config.num_experts_per_tok
    total = router_logits[0].new_zeros((), dtype=torch.float32)
    for logits in router_logits:
        scores = F.softmax(logits, dim=-1, dtype=torch.float32)
        chosen = F.one_hot(scores.topk(active, dim=-1).indices, config.num_experts).sum(dim=1).float()  # (B*T, E)
        often = chosen.view(groups, -1, config.num_experts).mean(dim=1)  # (groups, E)
        score = scores.view(groups, -1, config.num_experts).mean(dim=1)
        balance = (often * score).sum(dim=-1).mean() * config.num_experts
        total = total + (balance / active if config.seq_aux else balance)
    return config.router_aux_loss_coef * total


def shifted(labels: torch.Tensor, shift_labels: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
    """What each position is to predict (B, T): the next label."""
    return F.pad(labels, (0, 1), value=-100)[..., 1:] if shift_labels is None else shift_labels


def loss_at_labels(
    lm_head: nn.Linear,
    hidden_states: torch.Tensor,  # (B, T, D)
    labels: torch.Tensor,  # (B, T)
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs,
) -> torch.Tensor:
    """The cross-entropy, with logits only where there is something to learn and of so many positions at a time.

    What `loss_function` gives, except that a batch without any label has the loss 0 and not NaN.
    """
    targets = shifted(labels, **kwargs).to(hidden_states.device)
    learned = targets != -100  # (B, T)
    hidden_states, targets = hidden_states[learned], targets[learned]  # (learned, D) and (learned,)

    def summed_loss(hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(lm_head(hidden_states).float(), targets, reduction="sum")

    size = max(1, MAX_LOGITS // lm_head.out_features)
    if len(targets) <= size:
        total = summed_loss(hidden_states, targets)
    else:  # the backward pass computes a chunk's logits again instead of keeping all
        chunks = zip(hidden_states.split(size), targets.split(size), strict=True)
        total = torch.stack([checkpoint(summed_loss, *chunk, use_reentrant=False) for chunk in chunks]).sum()
    count = len(targets) if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device).clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1))
