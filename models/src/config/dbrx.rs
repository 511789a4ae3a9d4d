//! DBRX: `DbrxConfig`, `DbrxAttentionConfig` and `DbrxFFNConfig` of transformers.
//!
//! Transformers 5.23 does not read `attn_config.rope_theta`, where every published DBRX states its base, and falls back to
//! 10,000, which no published DBRX was trained with; version 4 read it. Volley reads it after
//! `rope_parameters` and the top level, before the default, and warns where the two disagree.

use serde_json::Value;

use super::{
    ConfigError, derived_head_dim,
    fields::Fields,
    limits::{EXPERTS_MAX, HEADS_MAX, LAYERS_MAX, POSITIONS_MAX, VOCAB_MAX, WIDTH_MAX},
    rope, special_tokens,
};
use crate::{Activation, Architecture, FfnKind, LayerSpec, ModelSpec, Norm, SpecialTokens};

/// `torch.nn.LayerNorm`'s default, which the model does not override.
const NORM_EPS: f32 = 1e-5;

/// Reads DBRX's keys.
pub(super) fn spec(top: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let empty = Value::Object(serde_json::Map::new());
    let nothing = || Fields::root(super::CONFIG_FILE, &empty);
    let attention = top.section("attn_config")?.map_or_else(nothing, Ok)?;
    let ffn = top.section("ffn_config")?.map_or_else(nothing, Ok)?;

    let hidden = top.size_by_names(&["d_model", "hidden_size"], 2048, WIDTH_MAX)?;
    let heads = top.size_by_names(&["n_heads", "num_attention_heads"], 16, HEADS_MAX)?;
    let layers = top.size_by_names(&["n_layers", "num_hidden_layers"], 24, LAYERS_MAX)?;
    let max_positions = top.size_by_names(
        &["max_seq_len", "max_position_embeddings"],
        2048,
        POSITIONS_MAX,
    )?;
    if let Some(tied @ Value::Bool(true)) = top.raw("tie_word_embeddings") {
        return Err(top.unsupported("tie_word_embeddings", tied, "false for this family"));
    }
    let trained_theta = rope::theta(&attention)?;
    let rope = rope::rope(top, trained_theta.unwrap_or(1e4), max_positions)?;
    if let Some(trained) = trained_theta
        && trained != rope.theta
    {
        tracing::warn!(
            attn_config = trained,
            used = rope.theta,
            "config.json gives two bases for the rotary embedding. Transformers 5 writes such files when it saves a DBRX \
             again; if the texts are poor, set rope_parameters.rope_theta to that of attn_config."
        );
    }
    Ok(ModelSpec {
        architecture: Architecture::Dbrx,
        hidden,
        vocab: top.size("vocab_size", 32000, VOCAB_MAX)?,
        max_positions,
        heads,
        kv_heads: attention.size("kv_n_heads", 1, HEADS_MAX)?,
        head_dim: head_dim(top, hidden, heads)?,
        experts: ffn.size("moe_num_experts", 4, EXPERTS_MAX)?,
        top_k: ffn.size("moe_top_k", 1, EXPERTS_MAX)?,
        expert_hidden: ffn.size("ffn_hidden_size", 3584, WIDTH_MAX)?,
        normalize_top_k: normalize(&ffn)?,
        layers: vec![
            LayerSpec {
                ffn: FfnKind::Experts
            };
            layers
        ],
        norm: Norm::Layer { eps: NORM_EPS },
        rope,
        qk_norm: false,
        clip_qkv: attention
            .optional_number("clip_qkv", "a number above 0, or null", |clip| {
                clip > 0.0 && (clip as f32).is_finite() && clip as f32 > 0.0
            })?
            .map(|clip| clip as f32),
        attention_bias: false,
        sliding_window: None,
        activation: activation(&ffn)?,
        tied_embeddings: top.flag("tie_word_embeddings", false)?,
        special: special_tokens(top, SpecialTokens::default())?,
        stored_as: None,
    })
}

/// The model divides whatever `head_dim` says, but its rotary embedding would believe the key: only agreement runs.
fn head_dim(top: &Fields<'_>, hidden: usize, heads: usize) -> Result<usize, ConfigError> {
    let derived = derived_head_dim(top, hidden, heads)?;
    match top.present("head_dim") {
        Some(stated) if stated.as_u64() != Some(derived as u64) => {
            Err(top.unsupported("head_dim", stated, format!("{derived} = d_model / n_heads")))
        }
        _ => Ok(derived),
    }
}

/// `moe_normalize_expert_weights` is the p of the norm that divides the weights; softmax outputs sum to their 1-norm.
fn normalize(ffn: &Fields<'_>) -> Result<bool, ConfigError> {
    const KEY: &str = "moe_normalize_expert_weights";
    match ffn.raw(KEY) {
        None => Ok(true),
        Some(Value::Null) => Ok(false),
        Some(value) if value.as_f64() == Some(1.0) => Ok(true),
        Some(value) => Err(ffn.unsupported(KEY, value, "1 and null")),
    }
}

/// `ffn_act_fn` is an object with a `name`; absent or `null` means SiLU.
fn activation(ffn: &Fields<'_>) -> Result<Activation, ConfigError> {
    if let Some(function) = ffn.section("ffn_act_fn")? {
        super::refuse_other_activation(&function, "name")?;
    }
    Ok(Activation::Silu)
}
