//! Mixtral: `MixtralConfig` of transformers.

use super::{
    ConfigError, derived_head_dim,
    fields::Fields,
    limits::{
        EXPERTS_MAX, HEAD_DIM_MAX, HEADS_MAX, LAYERS_MAX, POSITIONS_MAX, VOCAB_MAX, WIDTH_MAX,
    },
    refuse_other_activation, rope, special_tokens,
};
use crate::{Activation, Architecture, FfnKind, LayerSpec, ModelSpec, Norm, SpecialTokens};

/// Reads Mixtral's keys. The family has no biases and always normalises the chosen experts' weights.
pub(super) fn spec(top: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    refuse_other_activation(top, "hidden_act")?;
    let hidden = top.size("hidden_size", 4096, WIDTH_MAX)?;
    let heads = top.size("num_attention_heads", 32, HEADS_MAX)?;
    let kv_heads = match top.raw("num_key_value_heads") {
        Some(serde_json::Value::Null) => heads,
        _ => top.size("num_key_value_heads", 8, HEADS_MAX)?,
    };
    let head_dim = match top.optional_size("head_dim", HEAD_DIM_MAX)? {
        Some(head_dim) => head_dim,
        None => derived_head_dim(top, hidden, heads)?,
    };
    let max_positions = top.size("max_position_embeddings", 4096 * 32, POSITIONS_MAX)?;
    let layers = top.size("num_hidden_layers", 32, LAYERS_MAX)?;
    Ok(ModelSpec {
        architecture: Architecture::Mixtral,
        hidden,
        vocab: top.size("vocab_size", 32000, VOCAB_MAX)?,
        max_positions,
        heads,
        kv_heads,
        head_dim,
        experts: top.size_by_names(&["num_local_experts", "num_experts"], 8, EXPERTS_MAX)?,
        top_k: top.size("num_experts_per_tok", 2, EXPERTS_MAX)?,
        expert_hidden: top.size("intermediate_size", 14336, WIDTH_MAX)?,
        normalize_top_k: true,
        layers: vec![
            LayerSpec {
                ffn: FfnKind::Experts
            };
            layers
        ],
        norm: Norm::Rms {
            eps: super::norm_eps(top, 1e-5)?,
        },
        rope: rope::rope(top, 1e6, max_positions)?,
        qk_norm: false,
        clip_qkv: None,
        attention_bias: false,
        sliding_window: top.optional_size("sliding_window", POSITIONS_MAX)?,
        activation: Activation::Silu,
        tied_embeddings: top.flag("tie_word_embeddings", false)?,
        special: special_tokens(
            top,
            SpecialTokens {
                bos: Some(1),
                eos: vec![2],
            },
        )?,
        stored_as: None,
    })
}
