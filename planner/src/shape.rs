//! The sizes of a model that its cost depends on.

use std::path::Path;

use serde::{Deserialize, Serialize};
use volley_models::{FfnKind, ModelSpec, parse_config};

use crate::PlanError;

/// Sizes of one model, in elements. All MoE layers are alike, and so are all dense ones.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelShape {
    /// What to call it.
    pub name: String,
    /// Width of the residual stream (h).
    pub hidden: usize,
    /// Entries of the vocabulary.
    pub vocab: usize,
    /// Whether the head is the embedding.
    pub tied_embeddings: bool,
    /// Attention of each layer.
    pub attention: AttentionShape,
    /// Keys further back are neither read nor kept.
    pub sliding_window: Option<usize>,
    /// Layers with routed experts (L).
    pub moe_layers: usize,
    /// Layers with one dense FFN, which stays with attention.
    pub dense_layers: usize,
    /// Intermediate width of that FFN.
    pub dense_hidden: usize,
    /// Routed experts of a layer (E).
    pub experts: usize,
    /// Experts each token visits (K).
    pub top_k: usize,
    /// Intermediate width of one expert (h'). Every FFN is gated: three matrices.
    pub expert_hidden: usize,
    /// Intermediate width of all shared experts together; they stay with attention.
    pub shared_hidden: usize,
}

/// Sizes of one layer's attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttentionShape {
    /// Grouped-query attention; with as many key/value heads as heads, multi-head attention.
    Grouped {
        /// Query heads.
        heads: usize,
        /// Key/value heads.
        kv_heads: usize,
        /// Width of one head.
        head_dim: usize,
    },
    /// Multi-head latent attention (DeepSeek), computed in its absorbed form: all heads read one latent a token.
    Latent {
        /// Query heads.
        heads: usize,
        /// Rank of the queries' projection.
        q_rank: usize,
        /// Rank of the latent that is cached.
        kv_rank: usize,
        /// Width of the rotary part, cached once for all heads.
        rope_dim: usize,
        /// Width of a head's other part.
        nope_dim: usize,
        /// Width of a head's value.
        value_dim: usize,
    },
}

impl AttentionShape {
    /// Weights of a layer's projections.
    pub fn weights(&self, hidden: usize) -> f64 {
        self.projections(hidden)
            .iter()
            .map(|(_, weights)| weights)
            .sum()
    }

    /// The products of a layer's attention with the rows, in order, and the weights of each.
    pub fn projections(&self, hidden: usize) -> Vec<(&'static str, f64)> {
        let matrix = |rows: usize, columns: usize| rows as f64 * columns as f64;
        match *self {
            AttentionShape::Grouped {
                heads,
                kv_heads,
                head_dim,
            } => vec![
                ("QKV", matrix(hidden, (heads + 2 * kv_heads) * head_dim)),
                ("output", matrix(heads * head_dim, hidden)),
            ],
            AttentionShape::Latent {
                heads,
                q_rank,
                kv_rank,
                rope_dim,
                nope_dim,
                value_dim,
            } => vec![
                ("down to ranks", matrix(hidden, q_rank + kv_rank + rope_dim)),
                ("queries", matrix(q_rank, heads * (nope_dim + rope_dim))),
                ("keys absorbed", matrix(kv_rank, heads * nope_dim)),
                ("values", matrix(kv_rank, heads * value_dim)),
                ("output", matrix(heads * value_dim, hidden)),
            ],
        }
    }

    /// Elements that a layer caches for each token on each of `tp` GPUs. Key/value heads are divided as far as there
    /// are any; a latent is held by all.
    pub fn cached_elements(&self, tp: usize) -> f64 {
        match *self {
            AttentionShape::Grouped {
                kv_heads, head_dim, ..
            } => (2 * kv_heads.div_ceil(tp) * head_dim) as f64,
            AttentionShape::Latent {
                kv_rank, rope_dim, ..
            } => (kv_rank + rope_dim) as f64,
        }
    }

    /// Floating-point operations of scores and weighted sum for each query and cached token, all heads together.
    pub fn flops_per_cached_token(&self) -> f64 {
        match *self {
            AttentionShape::Grouped {
                heads, head_dim, ..
            } => (4 * heads * head_dim) as f64,
            AttentionShape::Latent {
                heads,
                kv_rank,
                rope_dim,
                ..
            } => (2 * heads * (2 * kv_rank + rope_dim)) as f64,
        }
    }
}

impl ModelShape {
    /// The models that are known by name.
    pub fn presets() -> Vec<Self> {
        let gqa = |heads, kv_heads, head_dim| AttentionShape::Grouped {
            heads,
            kv_heads,
            head_dim,
        };
        let moe =
            |name: &str, vocab, hidden, attention, layers, experts, top_k, expert_hidden| Self {
                name: name.to_owned(),
                hidden,
                vocab,
                tied_embeddings: false,
                attention,
                sliding_window: None,
                moe_layers: layers,
                dense_layers: 0,
                dense_hidden: 0,
                experts,
                top_k,
                expert_hidden,
                shared_hidden: 0,
            };
        vec![
            moe(
                "mixtral-8x7b",
                32_000,
                4096,
                gqa(32, 8, 128),
                32,
                8,
                2,
                14_336,
            ),
            moe(
                "mixtral-8x22b",
                32_768,
                6144,
                gqa(48, 8, 128),
                56,
                8,
                2,
                16_384,
            ),
            moe("dbrx", 100_352, 6144, gqa(48, 8, 128), 40, 16, 4, 10_752),
            // The paper gives 317 B parameters and no vocabulary. Its table is taken to mean 8 query heads for each of 8 key/value heads.
            moe(
                "scaled-moe",
                100_352,
                8192,
                gqa(64, 8, 128),
                48,
                32,
                4,
                8192,
            ),
            moe(
                "qwen3-30b-a3b",
                151_936,
                2048,
                gqa(32, 4, 128),
                48,
                128,
                8,
                768,
            ),
            Self {
                dense_layers: 3,
                dense_hidden: 18_432,
                shared_hidden: 2048,
                ..moe(
                    "deepseek-v3",
                    129_280,
                    7168,
                    AttentionShape::Latent {
                        heads: 128,
                        q_rank: 1536,
                        kv_rank: 512,
                        rope_dim: 64,
                        nope_dim: 128,
                        value_dim: 128,
                    },
                    58,
                    256,
                    8,
                    2048,
                )
            },
        ]
    }

    /// The preset of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn preset(name: &str) -> Result<Self, PlanError> {
        let presets = Self::presets();
        match presets
            .iter()
            .find(|shape| shape.name.eq_ignore_ascii_case(name))
        {
            Some(shape) => Ok(shape.clone()),
            None => Err(PlanError::unknown(
                "model (preset, or directory with a config.json)",
                name,
                presets.iter().map(|shape| shape.name.as_str()),
            )),
        }
    }

    /// A preset's name, a `config.json`, or a directory that has one.
    ///
    /// # Errors
    /// There is no such preset or file, or the file describes no model that Volley runs.
    pub fn find(model: &str) -> Result<Self, PlanError> {
        let path = Path::new(model);
        let file = if path.is_dir() {
            path.join("config.json")
        } else {
            path.to_owned()
        };
        if !file.is_file() {
            return Self::preset(model);
        }
        let place = file.display().to_string();
        let bytes = std::fs::read(&file).map_err(|source| PlanError::File {
            path: place.clone(),
            source,
        })?;
        let (spec, _) = parse_config(&bytes, None).map_err(|source| PlanError::Model {
            path: place.clone(),
            source: Box::new(source),
        })?;
        let folder = file.parent().and_then(Path::file_name);
        let name = folder.map_or(place.clone(), |name| name.to_string_lossy().into_owned());
        Self::from_spec(name, &spec, &place)
    }

    /// The shape of a model that has been opened.
    ///
    /// # Errors
    /// It has no layer with experts.
    pub fn of_spec(name: String, spec: &ModelSpec) -> Result<Self, PlanError> {
        let place = name.clone();
        Self::from_spec(name, spec, &place)
    }

    fn from_spec(name: String, spec: &ModelSpec, place: &str) -> Result<Self, PlanError> {
        let moe_layers = spec.moe_layers().count();
        if moe_layers == 0 {
            return Err(PlanError::invalid(
                place,
                "no layer has experts",
                "a dense model has nothing to disaggregate",
            ));
        }
        let dense_hidden = spec.layers.iter().map(|layer| match layer.ffn {
            FfnKind::Dense { hidden } => hidden,
            FfnKind::Experts => 0,
        });
        Ok(Self {
            name,
            hidden: spec.hidden,
            vocab: spec.vocab,
            tied_embeddings: spec.tied_embeddings,
            attention: AttentionShape::Grouped {
                heads: spec.heads,
                kv_heads: spec.kv_heads,
                head_dim: spec.head_dim,
            },
            sliding_window: spec.sliding_window,
            moe_layers,
            dense_layers: spec.layers.len() - moe_layers,
            dense_hidden: dense_hidden.max().unwrap_or(0),
            experts: spec.experts,
            top_k: spec.top_k,
            expert_hidden: spec.expert_hidden,
            shared_hidden: 0,
        })
    }

    /// All layers.
    pub fn layers(&self) -> usize {
        self.moe_layers + self.dense_layers
    }

    /// Weights of one expert of one layer.
    pub fn expert_weights(&self) -> f64 {
        (3 * self.hidden * self.expert_hidden) as f64
    }

    /// Weights of the experts of all layers.
    pub fn all_expert_weights(&self) -> f64 {
        self.expert_weights() * (self.experts * self.moe_layers) as f64
    }

    /// Weights that an attention node holds: projections, router, shared experts, dense FFNs, embedding and head.
    pub fn attention_side_weights(&self) -> f64 {
        let hidden = self.hidden as f64;
        let ffn = 3.0
            * hidden
            * (self.moe_layers * self.shared_hidden + self.dense_layers * self.dense_hidden) as f64;
        let router = hidden * (self.experts * self.moe_layers) as f64;
        let tables = hidden * (self.vocab * if self.tied_embeddings { 1 } else { 2 }) as f64;
        self.attention.weights(self.hidden) * self.layers() as f64 + ffn + router + tables
    }

    /// Tokens of a context of `tokens` that attention reads and the cache keeps.
    pub fn cached_tokens(&self, tokens: f64) -> f64 {
        self.sliding_window
            .map_or(tokens, |window| tokens.min(window as f64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_have_the_published_number_of_parameters() {
        // Billions, as the models' cards and the paper give them.
        for (name, billions) in [
            ("mixtral-8x7b", 46.7),
            ("mixtral-8x22b", 141.0),
            ("dbrx", 132.0),
            ("scaled-moe", 317.0),
            ("qwen3-30b-a3b", 30.5),
            ("deepseek-v3", 671.0),
        ] {
            let shape = ModelShape::preset(name).unwrap();
            let ours = (shape.all_expert_weights() + shape.attention_side_weights()) / 1e9;
            assert!(
                (ours / billions - 1.0).abs() < 0.02,
                "{name}: {ours} B, published {billions} B"
            );
        }
    }

    #[test]
    fn a_configuration_and_its_preset_agree() {
        let config = br#"{"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
            "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32,
            "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000}"#;
        let (spec, _) = parse_config(config, None).unwrap();
        let shape = ModelShape::from_spec("mixtral-8x7b".to_owned(), &spec, "config.json").unwrap();
        assert_eq!(
            ModelShape {
                sliding_window: None,
                ..shape
            },
            ModelShape::preset("mixtral-8x7b").unwrap()
        );
    }

    #[test]
    fn an_unknown_model_is_told_the_known_ones() {
        let error = ModelShape::find("mixtral-9x9b").unwrap_err().to_string();
        assert!(
            error.contains("mixtral-9x9b") && error.contains("dbrx"),
            "{error}"
        );
    }
}
