//! The shape of a model: everything that `config.json` decides, in one vocabulary for every architecture.
//!
//! A spec is plain data that has been checked once, when it was parsed (`config.rs`): a head count divides, a
//! top-k is not larger than the number of experts, no product of sizes overflows. Whoever holds a
//! [`ModelSpec`] need not check again.

use serde::Serialize;

/// The model families Volley runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Architecture {
    /// `MixtralForCausalLM`.
    Mixtral,
    /// `Qwen3MoeForCausalLM`.
    Qwen3Moe,
    /// `DbrxForCausalLM`.
    Dbrx,
}

/// One model, as `config.json` describes it. Sizes are in elements, not bytes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelSpec {
    /// The family.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Entries of the vocabulary: rows of the embedding and of the head.
    pub vocab: usize,
    /// Longest sequence, prompt and output together, in tokens.
    pub max_positions: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Experts per MoE layer. All MoE layers of the supported families are alike.
    pub experts: usize,
    /// Experts each token visits.
    pub top_k: usize,
    /// Width of one expert's intermediate activation.
    pub expert_hidden: usize,
    /// Whether the weights of the chosen experts are divided by their sum.
    pub normalize_top_k: bool,
    /// Every layer from the bottom up.
    pub layers: Vec<LayerSpec>,
    /// Kind of the norms (the per-head norms of queries and keys are always RMS).
    pub norm: Norm,
    /// Rotary embedding.
    pub rope: Rope,
    /// Whether queries and keys are RMS-normalised per head before the rotary embedding (Qwen3).
    pub qk_norm: bool,
    /// Clamp of the QKV projection's output to `[-c, c]` (DBRX).
    pub clip_qkv: Option<f32>,
    /// Whether the four attention projections carry biases.
    pub attention_bias: bool,
    /// Keys further back than this many positions (the row's own included) are not attended to.
    pub sliding_window: Option<usize>,
    /// Activation of the gated FFN.
    pub activation: Activation,
    /// Whether the head is the embedding.
    pub tied_embeddings: bool,
    /// Tokens with a meaning of their own.
    pub special: SpecialTokens,
    /// What the weights are stored as, if the configuration says so; decides `--dtype auto`.
    pub stored_as: Option<crate::ElementType>,
}

/// What follows attention in a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct LayerSpec {
    /// The feed-forward part.
    pub ffn: FfnKind,
}

/// Kind of a feed-forward part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FfnKind {
    /// Routed experts, on expert workers.
    Experts,
    /// One gated FFN for every token, computed where attention is.
    Dense {
        /// Width of its intermediate activation.
        hidden: usize,
    },
}

/// A normalisation over the hidden dimension. Neither kind has a bias.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Norm {
    /// `x / sqrt(mean(x^2) + eps) * w`.
    Rms {
        /// Added under the root.
        eps: f32,
    },
    /// `(x - mean(x)) / sqrt(var(x) + eps) * w`.
    Layer {
        /// Added under the root.
        eps: f32,
    },
}

/// Rotary position embedding, in the half-split ("neox") layout of Hugging Face checkpoints.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Rope {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// How the series is stretched for long contexts.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are stretched beyond the trained context.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// The stretch.
        factor: f64,
    },
    /// Low frequencies divided, high ones kept, a smooth ramp between (Llama 3).
    Llama3 {
        /// The stretch of low frequencies.
        factor: f64,
        /// Below this many turns in the original context a frequency counts as low.
        low_freq_factor: f64,
        /// Above this many turns it counts as high.
        high_freq_factor: f64,
        /// Context the model was trained with.
        original_positions: usize,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// The stretch.
        factor: f64,
        /// Turns above which a frequency is kept.
        beta_fast: f64,
        /// Turns below which it is divided.
        beta_slow: f64,
        /// Factor on cosine and sine.
        attention_factor: f64,
        /// Context the model was trained with.
        original_positions: usize,
    },
}

/// Activation of the gate half of a gated FFN.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
}

/// Tokens with a meaning of their own, from `generation_config.json` over `config.json`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct SpecialTokens {
    /// Begins a sequence, where the tokenizer asks for it.
    pub bos: Option<u32>,
    /// Any of these ends one.
    pub eos: Vec<u32>,
}

impl ModelSpec {
    /// Query heads that share one key/value head.
    pub fn heads_per_kv_head(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Indices of the layers that visit expert workers.
    pub fn moe_layers(&self) -> impl Iterator<Item = usize> + '_ {
        self.layers
            .iter()
            .enumerate()
            .filter(|(_, layer)| layer.ffn == FfnKind::Experts)
            .map(|(index, _)| index)
    }
}
