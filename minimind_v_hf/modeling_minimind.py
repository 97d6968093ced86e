"""The MiniMind decoder: a Llama-like language model whose generations differ by configuration alone.

    token ids ──► embed_tokens ──► layers: attention, feed-forward (dense or experts) ──► norm ──► lm_head ──► logits

Parameter names follow Llama, so that LoRA targets, quantisers and tensor-parallel plans work as they are.
This file is copied into every saved model folder, so it depends on torch and transformers alone.

Legend of the shape comments:
    B  sequences in the batch           D  width of the decoder (hidden_size)
    T  tokens in this forward pass      H  query heads, K  key/value heads, W  width of a head (head_dim)
    S  tokens that keys cover: T + past E  experts, A  experts that a token is sent to
    V  vocabulary                       I  width of the feed-forward block (intermediate_size)
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .arguments_minimind_v import CACHE, check_lengths, refuse_unknown_arguments, takes_cache
from .configuration_minimind_v import MiniMindVTextConfig
from .head_minimind_v import LanguageModelingHead


class MiniMindRotaryEmbedding(nn.Module):
    """Rotary position embedding (https://arxiv.org/abs/2104.09864), or another kind that transformers knows, such as YaRN."""

    inv_freq: torch.Tensor

    def __init__(self, config: MiniMindVTextConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        init_fn = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = init_fn(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)  # (W/2,)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: MiniMindVTextConfig, *args, **kwargs) -> tuple[torch.Tensor, float]:
        """The frequencies base^(-2i/W) for i < W/2, and a scale of the attention, which plain RoPE leaves at 1."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # In float32 whatever the dtype of the model: in bfloat16, neighbouring late positions would fall together
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float)  # (B, T, W/2)
        angles = torch.cat((angles, angles), dim=-1)  # (B, T, W)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x_i, x_{i+W/2}) of queries or keys (B, H or K, T, W) by the angles of their positions, (B, 1, T, W)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def eager_attention_forward(
    module: "MiniMindAttention",
    query: torch.Tensor,  # (B, H, T, W)
    key: torch.Tensor,  # (B, K, S, W)
    value: torch.Tensor,  # (B, K, S, W)
    attention_mask: torch.Tensor | None,  # (B or 1, 1, T, S), added to the scores
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out: the output (B, T, H, W) and, as of no faster one, the weights (B, H, T, S)."""
    # Each key/value head serves a group of query heads
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)  # (B, H, S, W)
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
        position_embeddings: tuple[torch.Tensor, torch.Tensor],  # cos and sin, (B, T, W) each
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]  # (B, T)
        head_shape = (*input_shape, -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(head_shape)).transpose(1, 2)  # (B, H, T, W)
        key = self.k_norm(self.k_proj(hidden_states).view(head_shape)).transpose(1, 2)  # (B, K, T, W)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)  # (B, K, T, W)

        cos, sin = position_embeddings
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # alike for all heads
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if isinstance(cache, Cache) or (cache is not None and CACHE == "cache"):
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)  # (B, K, S, W)
        elif cache is not None:  # before 5.24, the attention function itself updates the cache of continuous batching
            kwargs["cache"] = cache

        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attention_interface(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )  # (B, T, H, W)
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
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # D -> I -> D


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
        weights, experts = scores.topk(self.top_k, dim=-1, sorted=False)  # (B*T, A) each
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
        top_k_index: torch.Tensor,  # (B*T, A)
        top_k_weights: torch.Tensor,  # (B*T, A)
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

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # linear layers, embeddings, norms, and the frequencies of RoPE
        std = getattr(self.config.get_text_config(), "initializer_range", 0.02)  # other decoders' may have none
        if isinstance(module, (MiniMindTopKRouter, MiniMindExperts)):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, std=std)

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # with custom code, transformers leaves modules without weights of their own uninitialised

    def _grouped_mm_can_dispatch(self) -> bool:
        """Whether all experts can be computed in one product, which wants rows of a multiple of 16 bytes; if not, in a loop."""
        config = self.config.get_text_config()
        if getattr(config, "num_experts", 0) and (config.hidden_size % 8 or getattr(config, "moe_intermediate_size", 0) % 8):
            raise ValueError("hidden_size or moe_intermediate_size is no multiple of 8: use experts_implementation='eager'.")
        return super()._grouped_mm_can_dispatch()


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
            TypeError: an argument is neither known nor of use to the attention function.
            ValueError: both or neither of `input_ids` and `inputs_embeds` are given, there are no tokens, or the mask
                covers more than the cache and the tokens.
        """
        refuse_unknown_arguments(self, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds, and not both.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # (B, T, D)
        length = inputs_embeds.shape[1]
        check_lengths(length, attention_mask, cache, self.config.max_position_embeddings, position_ids)
        if position_ids is None:
            past_length = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(length, device=inputs_embeds.device).unsqueeze(0) + past_length  # (1, T)

        causal_mask = create_causal_mask(self.config, inputs_embeds, attention_mask, cache, position_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)  # after the mask, which takes a cache for a sign of no packing
        kwargs |= {CACHE: cache, "position_ids": position_ids}
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)

        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_embeddings=position_embeddings, attention_mask=causal_mask, **kwargs)
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: cache})


class MiniMindForCausalLM(LanguageModelingHead, MiniMindPreTrainedModel, GenerationMixin):
    """The MiniMind language model, for text alone."""

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
            output_router_logits=self.wants_router_logits(output_router_logits),
            **kwargs,
        )
        return MoeCausalLMOutputWithPast(**self.head(outputs, labels, logits_to_keep, skip_logits, **kwargs))


__all__ = ["MiniMindForCausalLM", "MiniMindModel", "MiniMindPreTrainedModel"]
