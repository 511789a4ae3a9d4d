//! Where weights come from: one trait between checkpoints (or dummy values) and the modules that pack them.
//!
//! A source is asked by *role* ([`TensorId`]), never by a name: names, fusions and transpositions of an architecture stay
//! with the checkpoint. It answers with a strided view into the mapped file, so that a worker touches the
//! bytes of its own tensors only and each weight is copied once, into the layout of the kernel.

use std::borrow::Cow;

use half::{bf16, f16};
use serde::Serialize;

use crate::{FfnKind, ModelSpec};

/// Type of a stored element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ElementType {
    /// 32-bit IEEE float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// bfloat16.
    Bf16,
}

impl ElementType {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            ElementType::F32 => 4,
            ElementType::F16 | ElementType::Bf16 => 2,
        }
    }
}

/// A tensor by its role in the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TensorId {
    /// `[vocab, hidden]`.
    Embedding,
    /// `[hidden]`.
    FinalNorm,
    /// `[vocab, hidden]`; the embedding where the model ties them.
    Head,
    /// A tensor on the attention side of a layer.
    Dense(usize, DenseTensor),
    /// One expert's matrix: layer, expert, which.
    Expert(usize, usize, ExpertTensor),
}

/// Tensors of a layer that live on attention workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DenseTensor {
    /// Norm before attention, `[hidden]`.
    AttentionNorm,
    /// Norm before the FFN, `[hidden]`.
    FfnNorm,
    /// `[heads * head_dim, hidden]`.
    Query,
    /// `[kv_heads * head_dim, hidden]`.
    Key,
    /// `[kv_heads * head_dim, hidden]`.
    Value,
    /// `[hidden, heads * head_dim]`.
    Output,
    /// `[heads * head_dim]`, where the spec has attention biases.
    QueryBias,
    /// `[kv_heads * head_dim]`, likewise.
    KeyBias,
    /// `[kv_heads * head_dim]`, likewise.
    ValueBias,
    /// `[hidden]`, likewise.
    OutputBias,
    /// Per-head norm of queries, `[head_dim]`, where the spec has it.
    QueryNorm,
    /// Per-head norm of keys, `[head_dim]`, likewise.
    KeyNorm,
    /// `[experts, hidden]`, in MoE layers.
    Router,
    /// A dense layer's FFN, shaped as an expert's with the layer's own width.
    Ffn(ExpertTensor),
}

/// The three matrices of a gated FFN: `down(act(gate(x)) * up(x))`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExpertTensor {
    /// `[expert_hidden, hidden]`.
    Gate,
    /// `[expert_hidden, hidden]`.
    Up,
    /// `[hidden, expert_hidden]`.
    Down,
}

impl TensorId {
    /// Rows and columns of this tensor in a model of this shape (a vector is one row), or `None` where the model has
    /// no such tensor.
    pub fn shape(self, spec: &ModelSpec) -> Option<(usize, usize)> {
        let dense = |layer: usize, tensor: DenseTensor| {
            let ffn = spec.layers.get(layer)?.ffn;
            let queries = spec.heads * spec.head_dim;
            let keys = spec.kv_heads * spec.head_dim;
            match tensor {
                DenseTensor::AttentionNorm | DenseTensor::FfnNorm => Some((1, spec.hidden)),
                DenseTensor::Query => Some((queries, spec.hidden)),
                DenseTensor::Key | DenseTensor::Value => Some((keys, spec.hidden)),
                DenseTensor::Output => Some((spec.hidden, queries)),
                DenseTensor::QueryBias => spec.attention_bias.then_some((1, queries)),
                DenseTensor::KeyBias | DenseTensor::ValueBias => {
                    spec.attention_bias.then_some((1, keys))
                }
                DenseTensor::OutputBias => spec.attention_bias.then_some((1, spec.hidden)),
                DenseTensor::QueryNorm | DenseTensor::KeyNorm => {
                    spec.qk_norm.then_some((1, spec.head_dim))
                }
                DenseTensor::Router => {
                    (ffn == FfnKind::Experts).then_some((spec.experts, spec.hidden))
                }
                DenseTensor::Ffn(which) => match ffn {
                    FfnKind::Experts => None,
                    FfnKind::Dense { hidden } => Some(which.shape(spec.hidden, hidden)),
                },
            }
        };
        match self {
            TensorId::Embedding | TensorId::Head => Some((spec.vocab, spec.hidden)),
            TensorId::FinalNorm => Some((1, spec.hidden)),
            TensorId::Dense(layer, tensor) => dense(layer, tensor),
            TensorId::Expert(layer, expert, which) => {
                let routed = spec.layers.get(layer)?.ffn == FfnKind::Experts;
                (routed && expert < spec.experts)
                    .then(|| which.shape(spec.hidden, spec.expert_hidden))
            }
        }
    }

    /// Whether the tensor is a vector, which a checkpoint stores with one dimension.
    pub fn is_vector(self) -> bool {
        match self {
            TensorId::FinalNorm => true,
            TensorId::Dense(_, tensor) => !matches!(
                tensor,
                DenseTensor::Query
                    | DenseTensor::Key
                    | DenseTensor::Value
                    | DenseTensor::Output
                    | DenseTensor::Router
                    | DenseTensor::Ffn(_)
            ),
            TensorId::Embedding | TensorId::Head | TensorId::Expert(..) => false,
        }
    }

    /// Every tensor of a model, from the bottom up.
    pub fn all(spec: &ModelSpec) -> impl Iterator<Item = TensorId> + '_ {
        let layer = |layer: usize| {
            let dense = DenseTensor::ALL.map(|tensor| TensorId::Dense(layer, tensor));
            let experts = (0..spec.experts).flat_map(move |expert| {
                ExpertTensor::ALL.map(|which| TensorId::Expert(layer, expert, which))
            });
            dense.into_iter().chain(experts)
        };
        std::iter::once(TensorId::Embedding)
            .chain((0..spec.layers.len()).flat_map(layer))
            .chain([TensorId::FinalNorm, TensorId::Head])
            .filter(|id| id.shape(spec).is_some())
    }
}

impl DenseTensor {
    /// Every tensor that any layer may have on the attention side.
    pub const ALL: [DenseTensor; 16] = [
        DenseTensor::AttentionNorm,
        DenseTensor::FfnNorm,
        DenseTensor::Query,
        DenseTensor::Key,
        DenseTensor::Value,
        DenseTensor::Output,
        DenseTensor::QueryBias,
        DenseTensor::KeyBias,
        DenseTensor::ValueBias,
        DenseTensor::OutputBias,
        DenseTensor::QueryNorm,
        DenseTensor::KeyNorm,
        DenseTensor::Router,
        DenseTensor::Ffn(ExpertTensor::Gate),
        DenseTensor::Ffn(ExpertTensor::Up),
        DenseTensor::Ffn(ExpertTensor::Down),
    ];
}

impl ExpertTensor {
    /// The three.
    pub const ALL: [ExpertTensor; 3] = [ExpertTensor::Gate, ExpertTensor::Up, ExpertTensor::Down];

    /// Rows and columns, for an FFN between `hidden` and `inner` features.
    fn shape(self, hidden: usize, inner: usize) -> (usize, usize) {
        match self {
            ExpertTensor::Gate | ExpertTensor::Up => (inner, hidden),
            ExpertTensor::Down => (hidden, inner),
        }
    }
}

/// A matrix (or a vector, as one column-less row: `rows = 1`) inside somebody's bytes, by strides in elements.
#[derive(Debug, Clone)]
pub struct MatrixView<'a> {
    /// The bytes, little-endian; element `(r, c)` stands at element `r * row_stride + c * col_stride`.
    pub data: Cow<'a, [u8]>,
    /// Type of the elements.
    pub element: ElementType,
    /// Output features of a linear layer.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Elements from one row to the next.
    pub row_stride: usize,
    /// Elements from one column to the next.
    pub col_stride: usize,
}

impl MatrixView<'_> {
    /// Element `(row, col)` widened to f32, which is exact for every [`ElementType`].
    #[inline]
    pub fn at(&self, row: usize, col: usize) -> f32 {
        let i = row * self.row_stride + col * self.col_stride;
        match self.element {
            ElementType::F32 => {
                let b = &self.data[4 * i..4 * i + 4];
                f32::from_le_bytes([b[0], b[1], b[2], b[3]])
            }
            ElementType::F16 => {
                f16::from_le_bytes([self.data[2 * i], self.data[2 * i + 1]]).to_f32()
            }
            ElementType::Bf16 => {
                bf16::from_le_bytes([self.data[2 * i], self.data[2 * i + 1]]).to_f32()
            }
        }
    }

    /// Copies row `row` into `out`, widened to f32. `out` has `cols` elements.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        debug_assert_eq!(out.len(), self.cols);
        for (col, value) in out.iter_mut().enumerate() {
            *value = self.at(row, col);
        }
    }

    /// The whole matrix, row-major, widened to f32.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        for (row, slice) in out.chunks_exact_mut(self.cols.max(1)).enumerate() {
            self.read_row(row, slice);
        }
        out
    }
}

/// Why a weight could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightError {
    /// The checkpoint lacks a tensor that the configuration calls for.
    #[error(
        "{file}: there is no tensor `{name}`, which config.json calls for; is the checkpoint complete, and of this architecture?"
    )]
    Missing {
        /// Where it was looked for.
        file: String,
        /// Its name in the checkpoint.
        name: String,
    },
    /// A tensor's shape contradicts the configuration.
    #[error("{file}: tensor `{name}` has shape {found:?}, but config.json calls for {expected:?}")]
    Shape {
        /// Where it stands.
        file: String,
        /// Its name in the checkpoint.
        name: String,
        /// Shape in the file.
        found: Vec<usize>,
        /// Shape by the configuration.
        expected: Vec<usize>,
    },
    /// The model has no such tensor: no bias, no such layer, no such expert.
    #[error("{id:?} is no tensor of this model")]
    Absent {
        /// What was asked for.
        id: TensorId,
    },
    /// A tensor's elements are of a type that Volley does not compute with.
    #[error("{file}: tensor `{name}` is stored as {found}; Volley reads F32, F16 and BF16")]
    Element {
        /// Where it stands.
        file: String,
        /// Its name in the checkpoint.
        name: String,
        /// Type in the file.
        found: String,
    },
}

/// Somewhere weights come from. Implementations are shared between the threads that load.
pub trait WeightSource: Send + Sync {
    /// The model these weights are of.
    fn spec(&self) -> &ModelSpec;

    /// A view of one tensor, with its shape checked against the spec.
    ///
    /// # Errors
    /// When the tensor is absent, of another shape or of an element type that is not read.
    fn tensor(&self, id: TensorId) -> Result<MatrixView<'_>, WeightError>;

    /// Says that a tensor will be asked for soon, so that a source on disk can begin to read it. Nothing need come of it.
    fn prefetch(&self, _id: TensorId) {}
}
