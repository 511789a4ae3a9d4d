//! What the tests of this crate share: seeded values and a source of weights that are made up of them.

use std::borrow::Cow;

use crate::spec::*;
use crate::weights::*;

/// splitmix64.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Random(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in `[-size, size)`.
    pub(crate) fn value(&mut self, size: f32) -> f32 {
        ((self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * size
    }

    pub(crate) fn values(&mut self, len: usize, size: f32) -> Vec<f32> {
        (0..len).map(|_| self.value(size)).collect()
    }
}

/// A matrix of values in `[-size, size)`, stored as `element`, by columns if `transposed`.
pub(crate) fn matrix(
    random: &mut Random,
    rows: usize,
    cols: usize,
    size: f32,
    element: ElementType,
    transposed: bool,
) -> MatrixView<'static> {
    let mut data = Vec::with_capacity(rows * cols * element.bytes());
    for _ in 0..rows * cols {
        let x = random.value(size);
        match element {
            ElementType::F32 => data.extend(x.to_le_bytes()),
            ElementType::F16 => data.extend(half::f16::from_f32(x).to_le_bytes()),
            ElementType::Bf16 => data.extend(half::bf16::from_f32(x).to_le_bytes()),
        }
    }
    let (row_stride, col_stride) = if transposed { (1, rows) } else { (cols, 1) };
    MatrixView {
        data: Cow::Owned(data),
        element,
        rows,
        cols,
        row_stride,
        col_stride,
    }
}

/// Weights that are a function of the seed and the role.
pub(crate) struct RandomWeights {
    pub(crate) spec: ModelSpec,
    pub(crate) element: ElementType,
    pub(crate) seed: u64,
}

impl WeightSource for RandomWeights {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn tensor(&self, id: TensorId) -> Result<MatrixView<'_>, WeightError> {
        use std::hash::{DefaultHasher, Hash, Hasher};
        let spec = &self.spec;
        let id = if id == TensorId::Head && spec.tied_embeddings {
            TensorId::Embedding
        } else {
            id
        };
        let mut hasher = DefaultHasher::new();
        (id, self.seed).hash(&mut hasher);
        let mut random = Random::new(hasher.finish());
        let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let ffn = |tensor, width| match tensor {
            ExpertTensor::Gate | ExpertTensor::Up => (width, spec.hidden),
            ExpertTensor::Down => (spec.hidden, width),
        };
        let (rows, cols) = match id {
            TensorId::Embedding | TensorId::Head => (spec.vocab, spec.hidden),
            TensorId::FinalNorm => (1, spec.hidden),
            TensorId::Expert(_, _, tensor) => ffn(tensor, spec.expert_hidden),
            TensorId::Dense(layer, tensor) => match tensor {
                DenseTensor::AttentionNorm | DenseTensor::FfnNorm | DenseTensor::OutputBias => {
                    (1, spec.hidden)
                }
                DenseTensor::Query => (q, spec.hidden),
                DenseTensor::Key | DenseTensor::Value => (kv, spec.hidden),
                DenseTensor::Output => (spec.hidden, q),
                DenseTensor::QueryBias => (1, q),
                DenseTensor::KeyBias | DenseTensor::ValueBias => (1, kv),
                DenseTensor::QueryNorm | DenseTensor::KeyNorm => (1, spec.head_dim),
                DenseTensor::Router => (spec.experts, spec.hidden),
                DenseTensor::Ffn(tensor) => match spec.layers[layer].ffn {
                    FfnKind::Dense { hidden } => ffn(tensor, hidden),
                    FfnKind::Experts => panic!("layer {layer} is not dense"),
                },
            },
        };
        let size = if rows == 1 {
            1.5
        } else {
            3.0 / (cols as f32).sqrt()
        };
        // As DBRX stores it.
        let transposed = spec.architecture == Architecture::Dbrx
            && matches!(id, TensorId::Expert(_, _, ExpertTensor::Down));
        Ok(matrix(
            &mut random,
            rows,
            cols,
            size,
            self.element,
            transposed,
        ))
    }
}

/// A small Mixtral.
pub(crate) fn mixtral() -> ModelSpec {
    ModelSpec {
        architecture: Architecture::Mixtral,
        hidden: 64,
        vocab: 101,
        max_positions: 512,
        heads: 8,
        kv_heads: 2,
        head_dim: 8,
        experts: 8,
        top_k: 2,
        expert_hidden: 96,
        normalize_top_k: true,
        layers: vec![
            LayerSpec {
                ffn: FfnKind::Experts
            };
            3
        ],
        norm: Norm::Rms { eps: 1e-5 },
        rope: Rope {
            theta: 1e4,
            scaling: RopeScaling::None,
        },
        qk_norm: false,
        clip_qkv: None,
        attention_bias: false,
        sliding_window: None,
        activation: Activation::Silu,
        tied_embeddings: false,
        special: SpecialTokens::default(),
        stored_as: None,
    }
}

/// A small Qwen3-MoE: per-head norms, heads wider than `hidden / heads`, a dense layer, tied embeddings, odd sizes.
pub(crate) fn qwen3_moe() -> ModelSpec {
    ModelSpec {
        architecture: Architecture::Qwen3Moe,
        hidden: 52,
        vocab: 97,
        heads: 6,
        kv_heads: 3,
        head_dim: 24,
        experts: 13,
        top_k: 4,
        expert_hidden: 37,
        layers: vec![
            LayerSpec {
                ffn: FfnKind::Experts,
            },
            LayerSpec {
                ffn: FfnKind::Dense { hidden: 77 },
            },
            LayerSpec {
                ffn: FfnKind::Experts,
            },
        ],
        norm: Norm::Rms { eps: 1e-6 },
        rope: Rope {
            theta: 1e5,
            scaling: RopeScaling::Yarn {
                factor: 4.0,
                beta_fast: 32.0,
                beta_slow: 1.0,
                attention_factor: 1.138_629_4,
                original_positions: 64,
            },
        },
        qk_norm: true,
        attention_bias: true,
        sliding_window: Some(21),
        tied_embeddings: true,
        ..mixtral()
    }
}

/// A small DBRX: layer norms, clipped projections, down matrices stored by columns, weights not normalised.
pub(crate) fn dbrx() -> ModelSpec {
    ModelSpec {
        architecture: Architecture::Dbrx,
        heads: 4,
        kv_heads: 4,
        head_dim: 16,
        layers: vec![
            LayerSpec {
                ffn: FfnKind::Experts
            };
            2
        ],
        norm: Norm::Layer { eps: 1e-5 },
        rope: Rope {
            theta: 5e5,
            scaling: RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_positions: 128,
            },
        },
        clip_qkv: Some(0.8),
        normalize_top_k: false,
        ..mixtral()
    }
}
