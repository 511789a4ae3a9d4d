//! The packed weights of an attention worker, and how many bytes they are.

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::ModelSpec;
use crate::crew::Member;
use crate::dtype::WeightTypes;
use crate::ffn::GatedFfn;
use crate::kernels::{Arena, ArenaBlock, Isa, PackedMatrix, WeightType, round_to_bf16, widen_bf16};
use crate::memory::{ModuleError, Progress};
use crate::spec::FfnKind;
use crate::weights::{DenseTensor, ElementType, ExpertTensor, MatrixView, TensorId, WeightSource};

/// Everything but the experts.
#[derive(Debug)]
pub(super) struct DenseWeights {
    pub(super) embedding: Embedding,
    pub(super) layers: Vec<LayerWeights>,
    pub(super) final_norm: Vec<f32>,
    pub(super) head: PackedMatrix,
}

/// One layer.
#[derive(Debug)]
pub(super) struct LayerWeights {
    pub(super) attention_norm: Vec<f32>,
    /// Queries, keys and values side by side.
    pub(super) qkv: PackedMatrix,
    pub(super) qkv_bias: Option<Vec<f32>>,
    pub(super) query_norm: Option<Vec<f32>>,
    pub(super) key_norm: Option<Vec<f32>>,
    pub(super) output: PackedMatrix,
    pub(super) output_bias: Option<Vec<f32>>,
    pub(super) ffn_norm: Vec<f32>,
    pub(super) ffn: LayerFfn,
}

/// What follows attention.
#[derive(Debug)]
pub(super) enum LayerFfn {
    /// The router, f32 whatever the rest is: its logits decide which experts a token visits.
    Experts {
        router: PackedMatrix,
    },
    Dense(GatedFfn),
}

/// Where token embeddings are read from.
#[derive(Debug)]
pub(super) enum Embedding {
    /// Rows of their own.
    Rows(ArenaBlock, ElementType),
    /// The head's panels, where the model ties them: one copy, at the price of a scattered read per token.
    Head,
}

impl DenseWeights {
    /// Bytes of the arena, and of vectors beside it; nothing if that overflows.
    pub(super) fn bytes(spec: &ModelSpec, types: WeightTypes) -> Option<(usize, usize)> {
        let kind = types.dense;
        let (q, kv) = projections(spec)?;
        let mut arena = PackedMatrix::bytes(kind, spec.vocab, spec.hidden)?;
        let mut vectors = spec.hidden;
        if !spec.tied_embeddings {
            arena =
                arena.checked_add(Arena::block_bytes(embedding_words(spec, types.embedding)?)?)?;
        }
        let qkv = PackedMatrix::bytes(kind, q.checked_add(kv.checked_mul(2)?)?, spec.hidden)?;
        let attention = qkv.checked_add(PackedMatrix::bytes(kind, spec.hidden, q)?)?;
        for layer in &spec.layers {
            let ffn = match layer.ffn {
                FfnKind::Experts => {
                    PackedMatrix::bytes(WeightType::F32, spec.experts, spec.hidden)?
                }
                FfnKind::Dense { hidden } => GatedFfn::bytes(kind, spec.hidden, hidden)?,
            };
            arena = arena.checked_add(attention)?.checked_add(ffn)?;
            vectors += 2 * spec.hidden;
            vectors += if spec.attention_bias {
                q + 2 * kv + spec.hidden
            } else {
                0
            };
            vectors += if spec.qk_norm { 2 * spec.head_dim } else { 0 };
        }
        Some((arena, vectors.checked_mul(4)?))
    }

    pub(super) fn load(
        source: &dyn WeightSource,
        types: WeightTypes,
        crew: &mut Member,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self, ModuleError> {
        let spec = source.spec();
        let (total_bytes, _) = Self::bytes(spec, types).ok_or(ModuleError::TooLarge {
            what: "the dense weights",
        })?;
        let mut arena = Arena::new(total_bytes, crew);
        let mut report = |arena: &Arena<'_>| {
            progress(Progress {
                packed_bytes: arena.used_bytes(),
                total_bytes,
            });
        };
        for first in [TensorId::Head, TensorId::Embedding] {
            source.prefetch(first);
        }
        let head = PackedMatrix::pack(&mut arena, types.dense, &[source.tensor(TensorId::Head)?]);
        report(&arena);
        let embedding = if spec.tied_embeddings {
            Embedding::Head
        } else {
            let words = embedding_words(spec, types.embedding).expect("counted above");
            let view = source.tensor(TensorId::Embedding)?;
            Embedding::fill(arena.block(words), types.embedding, &view)
        };
        report(&arena);
        let mut layers = Vec::with_capacity(spec.layers.len());
        for layer in 0..spec.layers.len() {
            // Read while this layer is packed.
            for tensor in DenseTensor::ALL {
                source.prefetch(TensorId::Dense(layer + 1, tensor));
            }
            layers.push(LayerWeights::load(source, &mut arena, types.dense, layer)?);
            report(&arena);
        }
        Ok(DenseWeights {
            embedding,
            layers,
            final_norm: source.tensor(TensorId::FinalNorm)?.to_f32(),
            head,
        })
    }

    /// Writes the embedding of `token` to `out`, `[hidden]`.
    pub(super) fn embed(&self, token: u32, out: &mut [f32]) {
        let first = token as usize * out.len();
        match &self.embedding {
            Embedding::Head => self.head.read_row(token as usize, out),
            Embedding::Rows(rows, ElementType::F32) => {
                out.copy_from_slice(&bytemuck::cast_slice::<u32, f32>(rows)[first..][..out.len()]);
            }
            Embedding::Rows(rows, ElementType::F16) => {
                bytemuck::cast_slice::<u32, f16>(rows)[first..][..out.len()]
                    .convert_to_f32_slice(out);
            }
            Embedding::Rows(rows, ElementType::Bf16) => {
                widen_bf16(
                    &bytemuck::cast_slice::<u32, u16>(rows)[first..][..out.len()],
                    out,
                );
            }
        }
    }
}

impl LayerWeights {
    fn load(
        source: &dyn WeightSource,
        arena: &mut Arena<'_>,
        kind: WeightType,
        layer: usize,
    ) -> Result<Self, ModuleError> {
        let spec = source.spec();
        let tensor = |which| source.tensor(TensorId::Dense(layer, which));
        let vector = |which| Ok::<_, ModuleError>(tensor(which)?.to_f32());
        let optional = |wanted: bool, which| wanted.then(|| vector(which)).transpose();
        let qkv = [
            tensor(DenseTensor::Query)?,
            tensor(DenseTensor::Key)?,
            tensor(DenseTensor::Value)?,
        ];
        let qkv_bias = if spec.attention_bias {
            let mut bias = vector(DenseTensor::QueryBias)?;
            bias.extend(vector(DenseTensor::KeyBias)?);
            bias.extend(vector(DenseTensor::ValueBias)?);
            Some(bias)
        } else {
            None
        };
        Ok(LayerWeights {
            attention_norm: vector(DenseTensor::AttentionNorm)?,
            qkv: PackedMatrix::pack(arena, kind, &qkv),
            qkv_bias,
            query_norm: optional(spec.qk_norm, DenseTensor::QueryNorm)?,
            key_norm: optional(spec.qk_norm, DenseTensor::KeyNorm)?,
            output: PackedMatrix::pack(arena, kind, &[tensor(DenseTensor::Output)?]),
            output_bias: optional(spec.attention_bias, DenseTensor::OutputBias)?,
            ffn_norm: vector(DenseTensor::FfnNorm)?,
            ffn: match spec.layers[layer].ffn {
                FfnKind::Experts => LayerFfn::Experts {
                    router: PackedMatrix::pack(
                        arena,
                        WeightType::F32,
                        &[tensor(DenseTensor::Router)?],
                    ),
                },
                FfnKind::Dense { .. } => LayerFfn::Dense(GatedFfn::pack(
                    arena,
                    kind,
                    tensor(DenseTensor::Ffn(ExpertTensor::Gate))?,
                    tensor(DenseTensor::Ffn(ExpertTensor::Up))?,
                    tensor(DenseTensor::Ffn(ExpertTensor::Down))?,
                )),
            },
        })
    }
}

impl Embedding {
    fn fill(mut rows: ArenaBlock, element: ElementType, view: &MatrixView<'_>) -> Self {
        let mut wide = vec![0.0; view.cols];
        let bytes = bytemuck::cast_slice_mut::<u32, u8>(&mut rows);
        let places = bytes.chunks_exact_mut(view.cols * element.bytes());
        for (row, place) in places.take(view.rows).enumerate() {
            view.read_row(row, &mut wide);
            match element {
                ElementType::F32 => place.copy_from_slice(bytemuck::cast_slice(&wide)),
                ElementType::F16 => {
                    bytemuck::cast_slice_mut::<u8, f16>(place).convert_from_f32_slice(&wide);
                }
                ElementType::Bf16 => {
                    round_to_bf16(Isa::detect(), &wide, bytemuck::cast_slice_mut(place));
                }
            }
        }
        Embedding::Rows(rows, element)
    }
}

/// Widths of the query and of the key (or value) projection.
pub(super) fn projections(spec: &ModelSpec) -> Option<(usize, usize)> {
    Some((
        spec.heads.checked_mul(spec.head_dim)?,
        spec.kv_heads.checked_mul(spec.head_dim)?,
    ))
}

fn embedding_words(spec: &ModelSpec, element: ElementType) -> Option<usize> {
    Some(
        spec.vocab
            .checked_mul(spec.hidden)?
            .checked_mul(element.bytes())?
            .div_ceil(4),
    )
}
