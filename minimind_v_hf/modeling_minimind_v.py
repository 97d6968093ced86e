"""MiniMind-V: an image encoder, a projector and the MiniMind decoder, in that order of use.

    pixels ──► vision_tower ──► multi_modal_projector ──┐
                                                        ▼ replaces the embeddings of the image tokens
    token ids ──► embed_tokens ───────────────────► language_model ──► lm_head ──► logits

Parameter names follow LLaVA and Llama, so that LoRA targets, quantisers and tensor-parallel plans work as they are.
This file is copied into every saved model folder, so it depends on torch and transformers alone.

Legend of the shape comments:
    B  sequences in the batch           D  width of the decoder (hidden_size)
    T  tokens in this forward pass      H  query heads, K key/value heads, d  head_dim
    S  tokens that keys cover: T + past E  experts, k  experts per token, F  width of the feed-forward block
    N  images in the whole batch        P  image tokens per image (image_seq_length), V  vocabulary
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging, torch_compilable_check
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_minimind_v import MiniMindVConfig, MiniMindVTextConfig


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


# ── The decoder ──────────────────────────────────────────────────────────────────────────────────────────────────────


class MiniMindRotaryEmbedding(nn.Module):
    """Rotary position embedding (https://arxiv.org/abs/2104.09864), and YaRN (https://arxiv.org/abs/2309.00071).

    `config.rope_parameters["rope_type"]` chooses among the variants that transformers knows.
    """

    inv_freq: torch.Tensor

    def __init__(self, config: MiniMindVTextConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        init_fn = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = init_fn(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)  # (d/2,)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: MiniMindVTextConfig, *args, **kwargs) -> tuple[torch.Tensor, float]:
        """The frequencies base^(-2i/d) for i < d/2, and a scale of the attention, which plain RoPE leaves at 1."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # In float32 whatever the dtype of the model: in bfloat16, neighbouring late positions would fall together
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float)  # (B, T, d/2)
        angles = torch.cat((angles, angles), dim=-1)  # (B, T, d)
        return (
            (angles.cos() * self.attention_scaling).to(x.dtype),
            (angles.sin() * self.attention_scaling).to(x.dtype),
        )


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x_i, x_{i+d/2}) by 90 degrees."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_pos_emb(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries (B, H, T, d) and keys (B, K, T, d) by the angles of their positions, given as (B, T, d)."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def eager_attention_forward(
    module: "MiniMindAttention",
    query: torch.Tensor,  # (B, H, T, d)
    key: torch.Tensor,  # (B, K, S, d)
    value: torch.Tensor,  # (B, K, S, d)
    attention_mask: torch.Tensor | None,  # (B or 1, 1, T, S), added to the scores
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out: the reference for the faster ones, and the only one that returns its weights.

    Returns:
        The output (B, T, H, d) and the weights (B, H, T, S).
    """
    # Each key/value head serves a group of query heads
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)  # (B, H, S, d)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling  # (B, H, T, S)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class MiniMindAttention(nn.Module):
    """Grouped-query attention (https://arxiv.org/abs/2305.13245) with RoPE and, in minimind-3, q/k norm."""

    def __init__(self, config: MiniMindVTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True

        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps) if config.use_qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps) if config.use_qk_norm else nn.Identity()

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, T, D)
        position_embeddings: tuple[torch.Tensor, torch.Tensor],  # cos and sin, (B, T, d) each
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]  # (B, T)
        head_shape = (*input_shape, -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(head_shape)).transpose(1, 2)  # (B, H, T, d)
        key = self.k_norm(self.k_proj(hidden_states).view(head_shape)).transpose(1, 2)  # (B, K, T, d)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)  # (B, K, T, d)

        cos, sin = position_embeddings
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        if isinstance(cache, Cache) or (cache is not None and CACHE == "cache"):
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)  # (B, K, S, d)
        elif cache is not None:  # before 5.24, the attention function itself updates the cache of continuous batching
            kwargs["cache"] = cache

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )  # (B, T, H, d)
        return self.o_proj(output.reshape(*input_shape, -1).contiguous()), weights


class MiniMindMLP(nn.Module):
    """The SwiGLU feed-forward block (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: MiniMindVTextConfig, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # D -> F -> D


class MiniMindTopKRouter(nn.Module):
    """Chooses the experts of each token by the largest softmax scores (native `mlp.gate`)."""

    def __init__(self, config: MiniMindVTextConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = F.linear(hidden_states, self.weight)  # (B*T, E)
        scores = F.softmax(logits, dim=-1, dtype=torch.float32)
        weights, experts = scores.topk(self.top_k, dim=-1, sorted=False)  # (B*T, k) each
        if self.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return logits, weights.to(logits.dtype), experts


@use_experts_implementation
class MiniMindExperts(nn.Module):
    """All experts of a layer in two tensors. `config._experts_implementation` chooses a faster forward than the loop here."""

    def __init__(self, config: MiniMindVTextConfig):
        super().__init__()
        width = config.moe_intermediate_size
        self.num_experts = config.num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B*T, D)
        top_k_index: torch.Tensor,  # (B*T, k)
        top_k_weights: torch.Tensor,  # (B*T, k)
    ) -> torch.Tensor:
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, choice = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            expert_output = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            expert_output = expert_output * top_k_weights[token, choice, None]
            output.index_add_(0, token, expert_output.to(output.dtype))
        return output


class MiniMindMoE(nn.Module):
    """A mixture of experts: each token passes through `num_experts_per_tok` of them, and through the shared ones."""

    def __init__(self, config: MiniMindVTextConfig):
        super().__init__()
        self.gate = MiniMindTopKRouter(config)
        self.experts = MiniMindExperts(config)
        # Several shared experts side by side are one wider block
        shared_width = config.num_shared_experts * config.moe_intermediate_size
        self.shared_experts = MiniMindMLP(config, shared_width) if shared_width else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1])  # (B*T, D)
        _, weights, experts = self.gate(tokens)
        output = self.experts(tokens, experts, weights).reshape(x.shape)
        if self.shared_experts is not None:
            output = output + self.shared_experts(x)
        return output


def load_balancing_loss(router_logits: tuple[torch.Tensor, ...], batch_size: int, config: MiniMindVTextConfig) -> torch.Tensor:
    """The auxiliary loss that keeps the experts equally busy, summed over layers, as the native trainers define it.

    With f_e the number of times that expert e is chosen per token and p_e its mean score, both over the tokens of one
    sequence (MiniMind2) or of the whole batch (minimind-3), padding included:

        MiniMind2   coef * mean over sequences of  sum_e (E / k) f_e p_e
        minimind-3  coef * E * sum_e f_e p_e

    Args:
        router_logits: one tensor (B*T, E) per layer.
        batch_size: B.
        config: gives k, `seq_aux` and `router_aux_loss_coef`.

    Returns:
        A scalar, with the coefficient applied.
    """
    groups = batch_size if config.seq_aux else 1
    k = config.num_experts_per_tok
    total = router_logits[0].new_zeros((), dtype=torch.float32)
    for logits in router_logits:
        scores = F.softmax(logits, dim=-1, dtype=torch.float32)
        chosen = F.one_hot(scores.topk(k, dim=-1).indices, config.num_experts).sum(dim=1).float()  # (B*T, E)
        f = chosen.view(groups, -1, config.num_experts).mean(dim=1)  # (groups, E)
        p = scores.view(groups, -1, config.num_experts).mean(dim=1)
        balance = (f * p).sum(dim=-1).mean() * config.num_experts
        total = total + (balance / k if config.seq_aux else balance)
    return config.router_aux_loss_coef * total


class MiniMindDecoderLayer(GradientCheckpointingLayer):
    """Attention, then the feed-forward block, each behind an RMSNorm and added to the residual stream."""

    def __init__(self, config: MiniMindVTextConfig, layer_idx: int):
        super().__init__()
        self.self_attn = MiniMindAttention(config, layer_idx)
        self.mlp = MiniMindMoE(config) if config.num_experts else MiniMindMLP(config, config.intermediate_size)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        attention_output, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attention_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))  # (B, T, D)


class MiniMindPreTrainedModel(PreTrainedModel):
    """What every MiniMind decoder declares to transformers."""

    config: MiniMindVTextConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MiniMindDecoderLayer"]
    _skip_keys_device_placement = [CACHE]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: dict | None = {
        "hidden_states": MiniMindDecoderLayer,
        "attentions": MiniMindAttention,
        "router_logits": OutputRecorder(MiniMindTopKRouter, index=0),
    }
    _auto_class = "AutoModel"

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: `_init_weights` never touches what was loaded, so transformers need not guess which modules were.

        Its guess leaves modules without weights of their own uninitialised, CLIP's attention among them.
        """
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # linear layers, embeddings, norms, and the frequencies of RoPE
        std = getattr(self.config.get_text_config(), "initializer_range", 0.02)  # other decoders' may have none
        if isinstance(module, MiniMindTopKRouter):
            init.normal_(module.weight, std=std)
        elif isinstance(module, MiniMindExperts):
            init.normal_(module.gate_up_proj, std=std)
            init.normal_(module.down_proj, std=std)


class MiniMindModel(MiniMindPreTrainedModel):
    """The MiniMind decoder without a head."""

    def __init__(self, config: MiniMindVTextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MiniMindDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = MiniMindRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: token ids (B, T); or give `inputs_embeds` (B, T, D).
            attention_mask: 1 for tokens, 0 for padding (B, S); or a ready 4-D mask.
            position_ids: (B, T). Positions that start again at 0 within a row mark packed sequences, which do not
                attend to each other (when neither a cache nor a mask is given).
            cache: any transformers `Cache`; also taken as `past_key_values`.
            use_cache: return a cache for the next call.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds` are given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds, and not both.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # (B, T, D)
        if position_ids is None:
            past_length = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length
            position_ids = position_ids.unsqueeze(0)  # (1, T)

        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
        )
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)  # after the mask, which takes a cache for a sign of no packing
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)

        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                **{CACHE: cache},
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: cache})


class MiniMindForCausalLM(MiniMindPreTrainedModel, GenerationMixin):
    """The MiniMind language model, without eyes."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: MiniMindVTextConfig):
        super().__init__(config)
        self.model = MiniMindModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_router_logits: bool | None = None,
        skip_logits: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeCausalLMOutputWithPast:
        """Run the language model. The arguments of `MiniMindModel.forward`, and:

        Args:
            labels: token ids (B, T) to predict, -100 where nothing is to be learned; shifted inside.
            logits_to_keep: compute the logits of the last so many positions only (0: of all), or of these positions.
            skip_logits: with `labels`, give the loss alone: logits are computed where there are labels, and not kept.
            num_items_in_batch: (in kwargs) labelled positions in the whole batch that this forward pass is a part of, in
                gradient accumulation or data parallelism: losses are then this part's share of the whole batch's.

        Returns:
            `logits` (B, T, V); `loss`, the cross-entropy plus, in training, `aux_loss` of a mixture of experts.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=_wants_router_logits(self, output_router_logits),
            **kwargs,
        )
        logits, loss, aux_loss = _head(self, outputs, labels, logits_to_keep, skip_logits, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            **{CACHE: getattr(outputs, CACHE)},
        )


def _wants_router_logits(model: PreTrainedModel, requested: bool | None) -> bool:
    """Whether a model of ours must record what its routers said: because it is asked to, or to balance them in training."""
    config = model.config.get_text_config()
    if requested is None:
        requested = getattr(config, "output_router_logits", False)
    return requested or (model.training and getattr(config, "num_experts", 0) > 0)


_MAX_LOGITS = 2**25
"""How many logits a training step holds at a time when nobody wants to see them: 128 MiB in float32."""


def _head(model, outputs, labels, logits_to_keep, skip_logits, **kwargs):
    """Hidden states to logits and losses, alike for the text-only and the vision-language model."""
    text_config = model.config.get_text_config()
    hidden_states = outputs.last_hidden_state
    logits = loss = aux_loss = None
    if skip_logits and labels is not None:
        loss = _loss_at_labels(model, hidden_states, labels, **kwargs)
    else:
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = model.lm_head(hidden_states[:, kept, :])
        if labels is not None:
            loss = model.loss_function(logits=logits, labels=labels, vocab_size=text_config.vocab_size, **kwargs)
    if _is_ours(text_config) and outputs.router_logits:
        routers_hidden = hidden_states.requires_grad and not outputs.router_logits[-1].requires_grad
        if routers_hidden and model.training and model.get_decoder().gradient_checkpointing:
            logger.warning_once(
                "The experts are not balanced: the load-balancing loss has no gradient, since reentrant gradient checkpointing "
                "hides the routers. Pass gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        aux_loss = load_balancing_loss(outputs.router_logits, hidden_states.shape[0], text_config)
        if loss is not None and model.training:
            share = 1.0
            if kwargs.get("num_items_in_batch") is not None:
                # So that the parts of a batch, in several steps or processes, add up to one auxiliary loss
                share = _shifted(labels, **kwargs).ne(-100).sum() / kwargs["num_items_in_batch"]
            loss = loss + (share * aux_loss).to(loss.device)
    return logits, loss, aux_loss


def _shifted(labels: torch.Tensor, shift_labels: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
    """What each position is to predict (B, T): the next label."""
    return F.pad(labels, (0, 1), value=-100)[..., 1:] if shift_labels is None else shift_labels


def _loss_at_labels(model, hidden_states, labels, num_items_in_batch=None, **kwargs) -> torch.Tensor:
    """The cross-entropy, with logits only where there is something to learn and of so many positions at a time.

    What `loss_function` gives, except that a batch without any label has the loss 0 and not NaN.
    """
    targets = _shifted(labels, **kwargs).to(hidden_states.device)
    learned = targets != -100  # (B, T)
    hidden_states, targets = hidden_states[learned], targets[learned]  # (M, D) and (M,)

    def summed_loss(hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model.lm_head(hidden_states).float(), targets, reduction="sum")

    size = max(1, _MAX_LOGITS // model.lm_head.out_features)
    if len(targets) <= size:
        total = summed_loss(hidden_states, targets)
    else:  # the backward pass computes a chunk's logits again instead of keeping all
        chunks = zip(hidden_states.split(size), targets.split(size), strict=True)
        total = torch.stack([checkpoint(summed_loss, *chunk, use_reentrant=False) for chunk in chunks]).sum()
    count = len(targets) if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device).clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1))


# ── The vision-language model ────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class MiniMindVModelOutputWithPast(MoeModelOutputWithPast):
    """Adds `image_outputs`: what `get_image_features` gave."""

    image_outputs: BaseModelOutputWithPooling | None = None

    @property
    def image_hidden_states(self) -> torch.Tensor | None:
        """The images as the decoder reads them, (N, P, D)."""
        return None if self.image_outputs is None else self.image_outputs.pooler_output


@dataclass
class MiniMindVCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """Adds `image_outputs`: what `get_image_features` gave."""

    image_outputs: BaseModelOutputWithPooling | None = None

    @property
    def image_hidden_states(self) -> torch.Tensor | None:
        """The images as the decoder reads them, (N, P, D)."""
        return None if self.image_outputs is None else self.image_outputs.pooler_output


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
    """What the vision-language models declare to transformers, beyond what the decoder does."""

    config: MiniMindVConfig
    input_modalities = ("image", "text")
    _can_record_outputs = None  # the encoder and the decoder record their own


def _is_ours(text_config: PreTrainedConfig) -> bool:
    # By name: in a folder loaded with remote code, config and model come from two copies of the configuration module
    return text_config.model_type == MiniMindVTextConfig.model_type


def _decoder_from_config(text_config: PreTrainedConfig) -> PreTrainedModel:
    """Our decoder, which AutoModel does not know in a folder loaded with remote code, or any that it does know."""
    return MiniMindModel(text_config) if _is_ours(text_config) else AutoModel.from_config(text_config)


def _is_trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


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
            self.vision_tower.use_head = False  # SigLIP's summary of a whole picture: not needed here, and vLLM cannot run it
        self.multi_modal_projector = MiniMindVProjector(config)
        self.language_model = _decoder_from_config(config.text_config)
        self.post_init()

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

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def train(self, mode: bool = True) -> "MiniMindVModel":
        """Set training or evaluation mode; an encoder that does not learn stays in evaluation mode."""
        super().train(mode)
        self.vision_tower.train(mode and _is_trainable(self.vision_tower))
        return self

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
        num_images = pixel_values.shape[0]  # not len(), which would fix the number of images in an exported graph
        if num_images == 0:
            # Encoders refuse an empty batch, and distributed training wants every parameter in every step: a picture is
            # encoded, and its vectors are left out again
            pixel_values = pixel_values.new_zeros(1, *pixel_values.shape[1:])
        size = self.config.vision_config.image_size
        if tuple(pixel_values.shape[-2:]) != (size, size):  # some encoders would interpolate, and give other patches
            raise ValueError(
                f"pixel_values are {pixel_values.shape[-2]}x{pixel_values.shape[-1]} pixels, but the encoder expects "
                f"{size}x{size}: use the image processor that belongs to the model."
            )
        outputs = self.vision_tower(pixel_values.to(self.vision_tower.dtype), **{**kwargs, "return_dict": True})
        outputs.pooler_output = self._project(outputs.last_hidden_state[:num_images])
        return outputs

    def _project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # Class and register tokens come before the patches; CLIP has one, SigLIP none
        num_patches = self.config.image_seq_length * self.config.patches_per_token
        return self.multi_modal_projector(hidden_states[:, -num_patches:])  # (N, P, D)

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
            ValueError: images and placeholders do not match in number.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds, and not both.")
        image_outputs = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and image_outputs is not None:
            raise ValueError("Give either pixel_values or mm_encoder_outputs['image'], and not both.")

        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # (B, T, D)
        learns = self.training and torch.is_grad_enabled() and _is_trainable(self.multi_modal_projector)
        if learns and pixel_values is None and image_outputs is None and cache is None:
            # Also a batch of text alone passes through the projector, whose gradients parallel engines wait for
            pixel_values = inputs_embeds.new_zeros(0, 3, *[self.config.vision_config.image_size] * 2)
        if pixel_values is not None:
            image_outputs = self.get_image_features(pixel_values, return_dict=True)
        image_features = None
        if image_outputs is not None:
            image_features = image_outputs.pooler_output
            if image_features is None:
                image_features = self._project(
                    image_outputs.last_hidden_state.to(self.multi_modal_projector.linear_1.weight.dtype)
                )
            if not isinstance(image_features, torch.Tensor):
                image_features = torch.stack(tuple(image_features))
            image_features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)  # (N, P, D)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            inputs_embeds = inputs_embeds.masked_scatter(mask, image_features)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **{CACHE: cache},
            **kwargs,
        )
        return MiniMindVModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=getattr(outputs, "router_logits", None),
            image_outputs=image_outputs,
            **{CACHE: getattr(outputs, CACHE)},
        )


class MiniMindVForConditionalGeneration(MiniMindVPreTrainedModel, GenerationMixin):
    """MiniMind-V: looks at images, reads text, and writes text."""

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
            output_router_logits=_wants_router_logits(self, output_router_logits),
            **kwargs,
        )
        logits, loss, aux_loss = _head(self, outputs, labels, logits_to_keep, skip_logits, **kwargs)
        return MiniMindVCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            image_outputs=outputs.image_outputs,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def generate_batch(self, inputs: list[list[int]], *args, **kwargs):
        """Continuous batching of transformers, for prompts of text alone: it takes no images, and would not see them.

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
        if images is not None and expand_size > 1:
            inputs_embeds = model_kwargs.get("inputs_embeds")
            features = images.pooler_output
            mask = self.model.get_placeholder_mask(input_ids if inputs_embeds is None else None, inputs_embeds, features)
            groups = features.split((mask.sum(dim=(1, 2)) // self.config.image_seq_length).tolist())
            images.pooler_output = torch.cat([group for group in groups for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if images is not None:
            model_kwargs["mm_encoder_outputs"]["image"] = images
        return input_ids, model_kwargs


__all__ = [
    "MiniMindForCausalLM",
    "MiniMindModel",
    "MiniMindPreTrainedModel",
    "MiniMindVForConditionalGeneration",
    "MiniMindVModel",
    "MiniMindVPreTrainedModel",
]
