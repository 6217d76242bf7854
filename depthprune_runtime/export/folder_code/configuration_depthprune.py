"""Config of a depth-pruned decoder: layers of one attention and any number of FFNs, each with its own widths.

Needs transformers 5.15 or newer, and nothing else. Written by depthprune_runtime (Apache-2.0).
"""

from transformers import PreTrainedConfig


class DepthPruneConfig(PreTrainedConfig):
    """What differs by layer stands in `per_layer_config`; the attributes here are what holds where it is silent.

    A layer runs `mlps_before` of its FFNs, then its attention, then its other FFNs. `qk_norm` is null, `shared` (one
    gain for all heads, as in Qwen3) or `per_head`. `depthprune` tells what the model was made from.
    """

    model_type = "depthprune"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    # tools that know no heterogeneous models read the widest layer's numbers rather than fail
    allow_global_per_layer_attribute_access = True
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlps.*.gate_proj": "colwise",
        "layers.*.mlps.*.up_proj": "colwise",
        "layers.*.mlps.*.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    sliding_window: int | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    attention_dropout: float = 0.0
    qk_norm: str | None = None
    mlps_before: int = 0
    intermediate_sizes: list | None = None
    mlp_down_bias: list | None = None
    depthprune: dict | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
