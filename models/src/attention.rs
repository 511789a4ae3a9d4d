//! What an attention worker computes: embedding, norms, attention over its paged cache, the gate, and the head.
//!
//! A step of a micro-batch is
//! [`begin`](AttentionModule::begin), [`embed`](AttentionModule::embed), then for every layer
//! [`attention`](AttentionModule::attention) and, where the layer has experts, [`add_ffn`](AttentionModule::add_ffn) with what they returned, and at the
//! end [`logits`](AttentionModule::logits) for the rows that want them. Each [`Activations`] is a micro-batch of its own: while one waits for
//! its experts, another is computed.

mod activations;
mod weights;

pub use activations::{Activations, SequenceSlice};

use activations::{Limits, SpanRecord};
use weights::{DenseWeights, LayerFfn, projections};

use crate::ModelSpec;
use crate::dtype::{ComputeType, Quantization, WeightTypes};
use crate::ffn::FfnScratch;
use crate::kernels::{
    AttentionScratch, Isa, MatrixMut, PackedMatrix, PackedRows, PagedAttention, RopeTable, Rows,
    Span, Start, TILE_POSITIONS, TopK, add_assign, clamp, gemm, layer_norm, rms_norm,
    round_to_bf16, softmax, top_k,
};
use crate::kv_cache::KvCache;
use crate::memory::{MemoryEstimate, ModuleError, Progress};
use crate::spec::{FfnKind, Norm};
use crate::weights::WeightSource;

/// How an [`AttentionModule`] computes, and what it has room for.
#[derive(Debug, Clone, Copy)]
pub struct AttentionOptions {
    /// Type of the cache, and of the weights unless they are quantised.
    pub dtype: ComputeType,
    /// What weights are quantised to, if at all.
    pub quantize: Option<Quantization>,
    /// Instruction set of the kernels.
    pub isa: Isa,
    /// Blocks of the key/value cache.
    pub kv_blocks: usize,
    /// Positions of a block: a multiple of sixteen.
    pub block_tokens: usize,
    /// Most rows (tokens) of a micro-batch.
    pub max_rows: usize,
    /// Micro-batches that will be in flight: only the memory estimate asks.
    pub micro_batches: usize,
}

/// The dense weights of all layers, the cache of keys and values, and scratch for one micro-batch at a time.
#[derive(Debug)]
pub struct AttentionModule {
    spec: ModelSpec,
    options: AttentionOptions,
    limits: Limits,
    weights: DenseWeights,
    rope: RopeTable,
    cache: KvCache,
    scratch: Scratch,
}

/// Values that live within one call.
#[derive(Debug)]
struct Scratch {
    packed: PackedRows,
    normed: Vec<f32>,
    qkv: Vec<f32>,
    context: Vec<f32>,
    projected: Vec<f32>,
    probabilities: Vec<f32>,
    attention: AttentionScratch,
    ffn: FfnScratch,
}

impl AttentionModule {
    /// Bytes that a module and its micro-batches will take.
    ///
    /// # Errors
    /// When they cannot be counted, or an option is one that the kernels do not take.
    pub fn memory(
        spec: &ModelSpec,
        options: AttentionOptions,
    ) -> Result<MemoryEstimate, ModuleError> {
        check_options(spec, &options)?;
        let weights = || {
            let types = WeightTypes::new(spec, options.dtype, options.quantize);
            let (arena, vectors) = DenseWeights::bytes(spec, types)?;
            let limits = Limits::new(spec, &options)?;
            arena
                .checked_add(vectors)?
                .checked_add(RopeTable::bytes(spec.head_dim, limits.max_positions)?)
        };
        let scratch = || {
            Limits::new(spec, &options)?
                .bytes()?
                .checked_mul(options.micro_batches)?
                .checked_add(Scratch::bytes(spec, options.max_rows)?)
        };
        let kv = KvCache::bytes(spec, options.dtype, options.kv_blocks, options.block_tokens);
        let or = |bytes: Option<usize>, what| bytes.ok_or(ModuleError::TooLarge { what });
        Ok(MemoryEstimate {
            weights: or(weights(), "the dense weights")?,
            kv: or(kv, "the key/value cache")?,
            scratch: or(scratch(), "the activations")?,
        })
    }

    /// Packs the weights and makes room for everything else.
    ///
    /// # Errors
    /// When a weight is missing, sizes overflow or an option is one that the kernels do not take.
    pub fn load(
        source: &dyn WeightSource,
        options: AttentionOptions,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self, ModuleError> {
        let spec = source.spec();
        Self::memory(spec, options)?;
        let limits = Limits::new(spec, &options).expect("counted by `memory`");
        let types = WeightTypes::new(spec, options.dtype, options.quantize);
        Ok(AttentionModule {
            weights: DenseWeights::load(source, types, progress)?,
            rope: RopeTable::new(&spec.rope, spec.head_dim, limits.max_positions),
            cache: KvCache::new(
                options.isa,
                spec,
                options.dtype,
                options.kv_blocks,
                options.block_tokens,
            ),
            scratch: Scratch::new(options.isa, spec, options.max_rows),
            spec: spec.clone(),
            options,
            limits,
        })
    }

    /// The model.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Longest sequence there is room for: the model's, or the cache's if that is less.
    pub fn max_positions(&self) -> usize {
        self.limits.max_positions
    }

    /// Room for one more micro-batch.
    pub fn activations(&self) -> Activations {
        Activations::new(self.limits)
    }

    /// Takes the tokens of a step into `acts`, in place of whatever it held.
    ///
    /// The caller sees to it that no two sequences write into one block, and that all positions before a sequence's `start` are in the cache.
    ///
    /// # Errors
    /// When the batch has too many rows, or a token, position or block is out of range. `acts` is then empty.
    pub fn begin(
        &self,
        acts: &mut Activations,
        batch: &[SequenceSlice<'_>],
    ) -> Result<(), ModuleError> {
        acts.begin(batch)
    }

    /// Looks up the embeddings: the residual stream begins.
    pub fn embed(&self, acts: &mut Activations) {
        let rows = acts.residual.chunks_exact_mut(self.spec.hidden);
        for (token, row) in acts.tokens.iter().zip(rows) {
            self.weights.embed(*token, row);
        }
    }

    /// Computes layer `layer` up to its experts: attention and its residual, the norm before the FFN, and the gate, after which `acts` holds what
    /// experts are to be sent. A dense layer's FFN is computed here too, and nothing is left to add.
    ///
    /// # Panics
    /// When the model has no such layer.
    pub fn attention(&mut self, layer: usize, acts: &mut Activations) {
        let rows = acts.rows();
        if rows == 0 {
            return;
        }
        let hidden = self.spec.hidden;
        self.attend(layer, acts);
        let (weights, scratch) = (&self.weights.layers[layer], &mut self.scratch);
        let isa = self.options.isa;
        let residual = &mut acts.residual[..rows * hidden];
        let input = &mut acts.ffn_input[..rows * hidden];
        normalize(isa, self.spec.norm, residual, &weights.ffn_norm, input);
        match &weights.ffn {
            LayerFfn::Dense(ffn) => {
                let projected = &mut scratch.projected[..rows * hidden];
                ffn.forward(isa, &mut scratch.ffn, Rows::F32(input), projected);
                add_assign(residual, projected);
            }
            LayerFfn::Experts { router } => {
                if acts.limits.bf16 {
                    round_to_bf16(isa, input, &mut acts.ffn_input_bf16[..rows * hidden]);
                }
                let experts = self.spec.experts;
                let probabilities = &mut scratch.probabilities[..rows * experts];
                multiply(&mut scratch.packed, router, input, None, probabilities);
                softmax(isa, probabilities, experts);
                let choice = TopK {
                    experts,
                    k: self.spec.top_k,
                    normalize: self.spec.normalize_top_k,
                };
                let chosen = rows * self.spec.top_k;
                let ids = &mut acts.expert_ids[..chosen];
                top_k(
                    choice,
                    probabilities,
                    ids,
                    &mut acts.expert_weights[..chosen],
                );
            }
        }
    }

    /// Adds what the layer's experts returned, weighted and summed: `[rows, hidden]`.
    ///
    /// # Panics
    /// When `ffn_out` has another shape.
    pub fn add_ffn(&self, acts: &mut Activations, ffn_out: &[f32]) {
        let len = acts.rows() * self.spec.hidden;
        add_assign(&mut acts.residual[..len], ffn_out);
    }

    /// Final norm and head of rows `rows`, in that order: `out` is `[rows.len(), vocab]`.
    ///
    /// # Errors
    /// When a row does not exist, there are more than `max_rows`, or `out` has another shape.
    pub fn logits(
        &mut self,
        acts: &Activations,
        rows: &[u32],
        out: &mut [f32],
    ) -> Result<(), ModuleError> {
        let (hidden, vocab) = (self.spec.hidden, self.spec.vocab);
        let last = rows.iter().copied().max().unwrap_or(0);
        let fits = rows.len() <= self.options.max_rows && out.len() == rows.len() * vocab;
        if !fits || (last as usize >= acts.rows() && !rows.is_empty()) {
            return Err(ModuleError::Logits {
                wanted: rows.len(),
                last,
                rows: acts.rows(),
                places: (out.len() / vocab).min(self.options.max_rows),
            });
        }
        let Scratch { normed, packed, .. } = &mut self.scratch;
        let normed = &mut normed[..rows.len() * hidden];
        for (row, place) in rows.iter().zip(normed.chunks_exact_mut(hidden)) {
            let residual = &acts.residual[*row as usize * hidden..][..hidden];
            normalize(
                self.options.isa,
                self.spec.norm,
                residual,
                &self.weights.final_norm,
                place,
            );
        }
        multiply(packed, &self.weights.head, normed, None, out);
        Ok(())
    }

    /// Norm, projections, rotary embedding, cache, attention, output projection and residual.
    fn attend(&mut self, layer: usize, acts: &mut Activations) {
        let spec = &self.spec;
        let isa = self.options.isa;
        let weights = &self.weights.layers[layer];
        let rows = acts.rows();
        let (q, kv) = projections(spec).expect("sizes were checked");
        let width = q + 2 * kv;
        let Scratch {
            packed,
            normed,
            qkv,
            context,
            projected,
            attention,
            ..
        } = &mut self.scratch;
        let residual = &mut acts.residual[..rows * spec.hidden];
        let normed = &mut normed[..rows * spec.hidden];
        let qkv = &mut qkv[..rows * width];
        let context = &mut context[..rows * q];
        let projected = &mut projected[..rows * spec.hidden];

        normalize(isa, spec.norm, residual, &weights.attention_norm, normed);
        multiply(
            packed,
            &weights.qkv,
            normed,
            weights.qkv_bias.as_deref(),
            qkv,
        );
        if let Some(limit) = spec.clip_qkv {
            clamp(qkv, limit);
        }
        let (Norm::Rms { eps } | Norm::Layer { eps }) = spec.norm;
        let query_norm = weights.query_norm.as_deref().map(|weight| (weight, eps));
        let key_norm = weights.key_norm.as_deref().map(|weight| (weight, eps));
        self.rope
            .turn_heads(isa, qkv, width, 0..q, &acts.positions, query_norm);
        self.rope
            .turn_heads(isa, qkv, width, q..q + kv, &acts.positions, key_norm);
        for (row, qkv) in qkv.chunks_exact(width).enumerate() {
            let slot = acts.positions[row] as usize % self.cache.block_tokens();
            let (key, value) = qkv[q..].split_at(kv);
            self.cache
                .write(layer, acts.row_blocks[row], slot, key, value);
        }
        let paged = PagedAttention {
            queries: qkv,
            query_stride: width,
            keys: self.cache.keys(layer),
            values: self.cache.values(layer),
            block_tokens: self.cache.block_tokens(),
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            window: spec.sliding_window,
            scale: 1.0 / (spec.head_dim as f32).sqrt(),
        };
        for SpanRecord {
            first_row,
            rows,
            start,
            table,
        } in &acts.spans
        {
            let span = Span {
                first_row: *first_row,
                rows: *rows,
                start: *start,
                blocks: &acts.tables[table.clone()],
            };
            let place = MatrixMut::new(&mut context[first_row * q..], *rows, q, q);
            paged.run(isa, span, 0..spec.kv_heads, attention, place);
        }
        multiply(
            packed,
            &weights.output,
            context,
            weights.output_bias.as_deref(),
            projected,
        );
        add_assign(residual, projected);
    }
}

impl Scratch {
    fn new(isa: Isa, spec: &ModelSpec, rows: usize) -> Self {
        let (q, kv) = projections(spec).expect("sizes were checked");
        Scratch {
            packed: PackedRows::new(isa, rows, spec.hidden.max(q)),
            normed: vec![0.0; rows * spec.hidden],
            qkv: vec![0.0; rows * (q + 2 * kv)],
            context: vec![0.0; rows * q],
            projected: vec![0.0; rows * spec.hidden],
            probabilities: vec![0.0; rows * spec.experts],
            attention: AttentionScratch::new(rows, spec.heads_per_kv_head(), spec.head_dim),
            ffn: FfnScratch::new(isa, rows, spec.hidden, dense_width(spec)),
        }
    }

    fn bytes(spec: &ModelSpec, rows: usize) -> Option<usize> {
        let (q, kv) = projections(spec)?;
        let row = spec
            .hidden
            .checked_mul(2)?
            .checked_add(q.checked_add(kv)?.checked_mul(2)?)?;
        row.checked_add(spec.experts)?
            .checked_mul(rows)?
            .checked_mul(4)?
            .checked_add(PackedRows::bytes(rows, spec.hidden.max(q))?)?
            .checked_add(AttentionScratch::bytes(
                rows,
                spec.heads_per_kv_head(),
                spec.head_dim,
            )?)?
            .checked_add(FfnScratch::bytes(rows, spec.hidden, dense_width(spec))?)
    }
}

/// Width of the widest dense FFN; 0 if every layer has experts.
fn dense_width(spec: &ModelSpec) -> usize {
    let widths = spec.layers.iter().map(|layer| match layer.ffn {
        FfnKind::Dense { hidden } => hidden,
        FfnKind::Experts => 0,
    });
    widths.max().unwrap_or(0)
}

fn check_options(spec: &ModelSpec, options: &AttentionOptions) -> Result<(), ModuleError> {
    let check = |option, found: usize, fits: bool, needed| {
        if fits {
            Ok(())
        } else {
            Err(ModuleError::Option {
                option,
                found,
                needed,
            })
        }
    };
    let AttentionOptions {
        kv_blocks,
        block_tokens,
        max_rows,
        ..
    } = *options;
    let tiles = block_tokens > 0 && block_tokens.is_multiple_of(TILE_POSITIONS);
    check(
        "block_tokens",
        block_tokens,
        tiles,
        "a multiple of 16, above 0",
    )?;
    check("kv_blocks", kv_blocks, kv_blocks > 0, "at least 1")?;
    check("max_rows", max_rows, max_rows > 0, "at least 1")?;
    let even = spec.head_dim.is_multiple_of(2);
    check(
        "head_dim",
        spec.head_dim,
        even,
        "even, for the rotary embedding",
    )
}

fn normalize(isa: Isa, norm: Norm, x: &[f32], weight: &[f32], out: &mut [f32]) {
    match norm {
        Norm::Rms { eps } => rms_norm(isa, x, weight, eps, out),
        Norm::Layer { eps } => layer_norm(isa, x, weight, eps, out),
    }
}

/// `out = x w^T + bias`.
fn multiply(
    packed: &mut PackedRows,
    w: &PackedMatrix,
    x: &[f32],
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    let rows = x.len() / w.k();
    packed.pack(w.kind(), Rows::F32(x), rows, w.k());
    let start = bias.map_or(Start::Zero, Start::Bias);
    gemm(
        packed,
        w,
        0..w.panels(),
        MatrixMut::new(out, rows, w.n(), w.n()),
        start,
    );
}

#[cfg(test)]
mod tests;
