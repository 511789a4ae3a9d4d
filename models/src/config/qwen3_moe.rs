//! Qwen3-MoE: `Qwen3MoeConfig` of transformers.

use super::{
    ConfigError, derived_head_dim,
    fields::Fields,
    limits::{
        EXPERTS_MAX, HEAD_DIM_MAX, HEADS_MAX, LAYERS_MAX, POSITIONS_MAX, VOCAB_MAX, WIDTH_MAX,
    },
    refuse_other_activation, rope, special_tokens,
};
use crate::{Activation, Architecture, FfnKind, LayerSpec, ModelSpec, Norm, SpecialTokens};

/// Reads Qwen3-MoE's keys. `max_window_layers` has no meaning in this family: transformers gives every layer the window.
pub(super) fn spec(top: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    refuse_other_activation(top, "hidden_act")?;
    let hidden = top.size("hidden_size", 2048, WIDTH_MAX)?;
    let heads = top.size("num_attention_heads", 32, HEADS_MAX)?;
    // The class declares no head_dim; the model takes the key if it is there, else divides.
    let head_dim = match top.optional_size("head_dim", HEAD_DIM_MAX)? {
        Some(head_dim) => head_dim,
        None => derived_head_dim(top, hidden, heads)?,
    };
    let max_positions = top.size("max_position_embeddings", 32768, POSITIONS_MAX)?;
    let sliding_window = match (
        top.flag("use_sliding_window", false)?,
        top.raw("sliding_window"),
    ) {
        (false, _) => None,
        (true, None) => Some(4096),
        (true, Some(_)) => top.optional_size("sliding_window", POSITIONS_MAX)?,
    };
    Ok(ModelSpec {
        architecture: Architecture::Qwen3Moe,
        hidden,
        vocab: top.size("vocab_size", 151_936, VOCAB_MAX)?,
        max_positions,
        heads,
        kv_heads: top.size("num_key_value_heads", 4, HEADS_MAX)?,
        head_dim,
        experts: top.size_by_names(&["num_experts", "num_local_experts"], 128, EXPERTS_MAX)?,
        top_k: top.size("num_experts_per_tok", 8, EXPERTS_MAX)?,
        expert_hidden: top.size("moe_intermediate_size", 768, WIDTH_MAX)?,
        normalize_top_k: top.flag("norm_topk_prob", false)?,
        layers: layers(top)?,
        norm: Norm::Rms {
            eps: super::norm_eps(top, 1e-6)?,
        },
        rope: rope::rope(top, 1e4, max_positions)?,
        qk_norm: true,
        clip_qkv: None,
        attention_bias: top.flag("attention_bias", false)?,
        sliding_window,
        activation: Activation::Silu,
        tied_embeddings: top.flag("tie_word_embeddings", false)?,
        special: special_tokens(top, SpecialTokens::default())?,
        stored_as: None,
    })
}

/// Layer `i` has experts if `mlp_only_layers` does not list it and `decoder_sparse_step` divides `i + 1`.
fn layers(top: &Fields<'_>) -> Result<Vec<LayerSpec>, ConfigError> {
    let count = top.size("num_hidden_layers", 24, LAYERS_MAX)?;
    let step = top.size("decoder_sparse_step", 1, usize::MAX)?;
    let dense_hidden = top.size("intermediate_size", 6144, WIDTH_MAX)?;
    let mut dense = vec![false; count];
    for value in top.list("mlp_only_layers")? {
        let Some(layer) = value.as_i64() else {
            return Err(top.wrong("mlp_only_layers", value, "a list of layer numbers"));
        };
        // A number that is no layer's is without effect in transformers as well.
        if let Some(flag) = usize::try_from(layer).ok().and_then(|i| dense.get_mut(i)) {
            *flag = true;
        }
    }
    Ok((0..count)
        .map(|layer| LayerSpec {
            ffn: if dense[layer] || !(layer + 1).is_multiple_of(step) {
                FfnKind::Dense {
                    hidden: dense_hidden,
                }
            } else {
                FfnKind::Experts
            },
        })
        .collect())
}
