"""A depth-pruned decoder for Transformers: Llama's parts, with layers of one attention and any number of FFNs.

Needs torch and transformers 5.15 or newer, and nothing else. Written by depthprune_runtime (Apache-2.0).
"""

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_depthprune import DepthPruneConfig

# Transformers 5.24 calls the KV cache `cache`; before, it is `past_key_values`. Callers may use either name.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class DepthPruneHeadNorm(nn.Module):
    """RMSNorm of every head with a gain of its own: [..., H, D] -> [..., H, D]."""

    def __init__(self, num_heads: int, head_dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_heads, head_dim))
        self.variance_epsilon = eps

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        wide = heads.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(heads.dtype)


class DepthPruneAttention(nn.Module):
    def __init__(self, config: DepthPruneConfig, layer_idx: int):
        super().__init__()
        layer = config.per_layer_config[layer_idx]
        heads, kv_heads = layer.num_attention_heads, layer.num_key_value_heads
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = heads // kv_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        types = getattr(config, "layer_types", None)
        self.layer_type = "full_attention" if types is None else types[layer_idx]
        self.sliding_window = config.sliding_window if self.layer_type == "sliding_attention" else None
        width, bias = config.hidden_size, layer.attention_bias
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=layer.attention_output_bias)
        self.has_qk_norm = layer.qk_norm is not None
        if layer.qk_norm == "shared":
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        elif layer.qk_norm == "per_head":
            self.q_norm = DepthPruneHeadNorm(heads, self.head_dim, config.rms_norm_eps)
            self.k_norm = DepthPruneHeadNorm(kv_heads, self.head_dim, config.rms_norm_eps)

    def forward(self, hidden_states, position_embeddings, attention_mask=None, cache=None, **kwargs):
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(hidden_shape)
        key = self.k_proj(hidden_states).view(hidden_shape)
        value = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        if self.has_qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        cos, sin = position_embeddings
        query, key = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*input_shape, -1).contiguous()), weights


class DepthPruneMLP(nn.Module):
    """A gated FFN with the norm before it."""

    def __init__(self, config: DepthPruneConfig, intermediate_size: int, down_bias: bool):
        super().__init__()
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=down_bias)
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states):
        hidden_states = self.norm(hidden_states)
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class DepthPruneLayer(GradientCheckpointingLayer):
    """FFNs, one attention, FFNs; a residual around each."""

    def __init__(self, config: DepthPruneConfig, layer_idx: int):
        super().__init__()
        layer = config.per_layer_config[layer_idx]
        sizes = layer.intermediate_sizes or []
        biases = layer.mlp_down_bias or [False] * len(sizes)
        self.mlps_before = layer.mlps_before
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = DepthPruneAttention(config, layer_idx)
        self.mlps = nn.ModuleList([DepthPruneMLP(config, *pair) for pair in zip(sizes, biases, strict=True)])

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_embeddings=None,
        past_key_values=None,
        cache=None,
        **kwargs,
    ):
        for mlp in self.mlps[: self.mlps_before]:
            hidden_states = hidden_states + mlp(hidden_states)
        output, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            cache=past_key_values if cache is None else cache,
            **kwargs,
        )
        hidden_states = hidden_states + output
        for mlp in self.mlps[self.mlps_before :]:
            hidden_states = hidden_states + mlp(hidden_states)
        return hidden_states


class DepthPrunePreTrainedModel(PreTrainedModel):
    config_class = DepthPruneConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DepthPruneLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": DepthPruneLayer, "attentions": DepthPruneAttention}

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, DepthPruneHeadNorm):
            nn.init.ones_(module.weight)


class DepthPruneModel(DepthPrunePreTrainedModel):
    def __init__(self, config: DepthPruneConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([DepthPruneLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def _masks(self, embeds, attention_mask, cache, position_ids):
        """Attention mask by layer type."""
        if isinstance(attention_mask, dict):
            return attention_mask
        # positional: the name of the cache changed
        arguments = (self.config, embeds, attention_mask, cache)
        makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        wanted = {layer.self_attn.layer_type for layer in self.layers if isinstance(layer, DepthPruneLayer)}
        return {kind: makers[kind](*arguments, position_ids=position_ids) for kind in wanted}

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        cache=None,
        **kwargs,
    ):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        cache = past_key_values if cache is None else cache
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)
        masks = self._masks(inputs_embeds, attention_mask, cache, position_ids)
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for layer in self.layers[: self.config.num_hidden_layers]:
            kind = layer.self_attn.layer_type if isinstance(layer, DepthPruneLayer) else None
            hidden_states = layer(
                hidden_states,
                attention_mask=masks.get(kind),
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                use_cache=use_cache,
                **{CACHE: cache},
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: cache})


class DepthPruneForCausalLM(DepthPrunePreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: DepthPruneConfig):
        super().__init__(config)
        self.model = DepthPruneModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        cache=None,
        **kwargs,
    ):
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE: past_key_values if cache is None else cache},
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )
