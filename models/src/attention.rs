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

use activations::{Limits, SPAN_ROWS};
use weights::{DenseWeights, LayerFfn, projections};

use crate::ModelSpec;
use crate::crew::{Chunks, Grid, Member, PerSeat};
use crate::dtype::{ComputeType, Quantization, WeightTypes};
use crate::ffn::FfnScratch;
use crate::kernels::{
    AttentionScratch, Isa, MatrixMut, PANEL_COLUMNS, PackedGroup, PackedMatrix, PackedRows,
    PagedAttention, RopeTable, Rows, Span, Start, TILE_POSITIONS, TopK, add_assign, clamp,
    columns_per_piece, gemm, layer_norm, rms_norm, round_to_bf16, softmax, top_k,
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
    /// Seats of the crew it will compute with ([`Crew::seats`](crate::Crew::seats)): likewise.
    pub seats: usize,
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
    crew: Member,
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
    attention: PerSeat<AttentionScratch>,
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
                .checked_add(Scratch::bytes(spec, options)?)
        };
        let kv = KvCache::bytes(spec, options.dtype, options.kv_blocks, options.block_tokens);
        let or = |bytes: Option<usize>, what| bytes.ok_or(ModuleError::TooLarge { what });
        Ok(MemoryEstimate {
            weights: or(weights(), "the dense weights")?,
            kv: or(kv, "the key/value cache")?,
            scratch: or(scratch(), "the activations")?,
        })
    }

    /// Packs the weights and makes room for everything else. The module computes with `crew`.
    ///
    /// # Errors
    /// When a weight is missing, sizes overflow or an option is one that the kernels do not take.
    pub fn load(
        source: &dyn WeightSource,
        options: AttentionOptions,
        mut crew: Member,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self, ModuleError> {
        let spec = source.spec();
        Self::memory(spec, options)?;
        let limits = Limits::new(spec, &options).expect("counted by `memory`");
        let types = WeightTypes::new(spec, options.dtype, options.quantize);
        Ok(AttentionModule {
            weights: DenseWeights::load(source, types, &mut crew, progress)?,
            rope: RopeTable::new(&spec.rope, spec.head_dim, limits.max_positions),
            cache: KvCache::new(
                options.isa,
                spec,
                options.dtype,
                options.kv_blocks,
                options.block_tokens,
                &mut crew,
            ),
            scratch: Scratch::new(options.isa, spec, options.max_rows, &crew),
            crew,
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

    /// The module's place in its crew.
    pub fn crew(&mut self) -> &mut Member {
        &mut self.crew
    }

    /// Room for one more micro-batch.
    pub fn activations(&self) -> Activations {
        Activations::new(self.limits)
    }

    /// Takes the tokens of a step into `acts`, in place of whatever it held.
    ///
    /// The batch is gone through more than once, so that nothing has to be collected for it. The caller sees to it that no two sequences write into one block, and that all positions before a sequence's `start` are in the cache.
    ///
    /// # Errors
    /// When the batch has too many rows, or a token, position or block is out of range. `acts` is then empty.
    pub fn begin<'s>(
        &self,
        acts: &mut Activations,
        batch: impl Iterator<Item = SequenceSlice<'s>> + Clone,
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
        self.attend(layer, acts);
        let AttentionModule {
            spec,
            options,
            weights,
            crew,
            scratch,
            ..
        } = self;
        let (isa, hidden, bounds) = (options.isa, spec.hidden, [0, rows]);
        let weights = &weights.layers[layer];
        let residual = &mut acts.residual[..rows * hidden];
        let input = &mut acts.ffn_input[..rows * hidden];
        let Scratch {
            packed,
            projected,
            probabilities,
            ffn,
            ..
        } = scratch;
        match &weights.ffn {
            LayerFfn::Dense(dense) => {
                normalize(isa, spec.norm, residual, &weights.ffn_norm, input);
                let projected = &mut projected[..rows * hidden];
                ffn.forward(isa, crew, |_| dense, &bounds, Rows::F32(input), projected);
                add(crew, residual, projected);
            }
            LayerFfn::Experts { router } => {
                packed.lay_out(router.kind(), &bounds, hidden);
                let tiles = packed.parts();
                // In a module that computes in f32 there are no bits.
                let bits_width = if acts.limits.bf16 { hidden } else { 0 };
                let inputs = tiles.beside(input, hidden);
                let bits = tiles.beside(&mut acts.ffn_input_bf16, bits_width);
                crew.each(
                    (tiles, (inputs, bits)),
                    |_, (mut tiles, (input, bits)), _| {
                        let rows = tiles.rows();
                        let residual = &residual[rows.start * hidden..rows.end * hidden];
                        normalize(isa, spec.norm, residual, &weights.ffn_norm, input);
                        if bits_width > 0 {
                            round_to_bf16(isa, input, bits);
                        }
                        tiles.pack(Rows::F32(input));
                    },
                );
                let (experts, k) = (spec.experts, spec.top_k);
                let probabilities = &mut probabilities[..rows * experts];
                multiply(crew, packed, router, None, probabilities, |_| ());
                let choice = TopK {
                    experts,
                    k,
                    normalize: spec.normalize_top_k,
                };
                let ids = Chunks::new(&mut acts.expert_ids[..rows * k], GATE_ROWS * k);
                let chosen = Chunks::new(&mut acts.expert_weights[..rows * k], GATE_ROWS * k);
                let probabilities = Chunks::new(probabilities, GATE_ROWS * experts);
                crew.each(
                    (probabilities, (ids, chosen)),
                    |_, (p, (ids, weights)), _| {
                        softmax(isa, p, experts);
                        top_k(choice, p, ids, weights);
                    },
                );
            }
        }
    }

    /// Adds what the layer's experts returned, weighted and summed: `[rows, hidden]`.
    ///
    /// # Panics
    /// When `ffn_out` has another shape.
    pub fn add_ffn(&mut self, acts: &mut Activations, ffn_out: &[f32]) {
        let len = acts.rows() * self.spec.hidden;
        add(&mut self.crew, &mut acts.residual[..len], ffn_out);
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
        let AttentionModule {
            spec,
            options,
            weights,
            crew,
            scratch: Scratch { normed, packed, .. },
            ..
        } = self;
        let (isa, norm) = (options.isa, spec.norm);
        packed.lay_out(weights.head.kind(), &[0, rows.len()], hidden);
        let tiles = packed.parts();
        let normed = tiles.beside(normed, hidden);
        crew.each((tiles, normed), |_, (mut tiles, normed), _| {
            let places = normed.chunks_exact_mut(hidden);
            for (row, place) in rows[tiles.rows()].iter().zip(places) {
                let residual = &acts.residual[*row as usize * hidden..][..hidden];
                normalize(isa, norm, residual, &weights.final_norm, place);
            }
            tiles.pack(Rows::F32(normed));
        });
        multiply(crew, packed, &weights.head, None, out, |_| ());
        Ok(())
    }

    /// Norm, projections, rotary embedding, cache, attention, output projection and residual.
    fn attend(&mut self, layer: usize, acts: &mut Activations) {
        let AttentionModule {
            spec,
            options,
            weights,
            rope,
            cache,
            crew,
            scratch,
            ..
        } = self;
        let (isa, hidden, head_dim) = (options.isa, spec.hidden, spec.head_dim);
        let weights = &weights.layers[layer];
        let rows = acts.rows();
        let bounds = [0, rows];
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
        } = scratch;
        let residual = &mut acts.residual[..rows * hidden];
        let qkv = &mut qkv[..rows * width];
        let context = &mut context[..rows * q];

        packed.lay_out(weights.qkv.kind(), &bounds, hidden);
        let tiles = packed.parts();
        let normed = tiles.beside(normed, hidden);
        crew.each((tiles, normed), |_, (mut tiles, normed), _| {
            let rows = tiles.rows();
            let residual = &residual[rows.start * hidden..rows.end * hidden];
            normalize(isa, spec.norm, residual, &weights.attention_norm, normed);
            tiles.pack(Rows::F32(normed));
        });
        let bias = weights.qkv_bias.as_deref();
        multiply(crew, packed, &weights.qkv, bias, qkv, |mut part| {
            if let Some(limit) = spec.clip_qkv {
                for row in 0..part.rows() {
                    clamp(part.row(row), limit);
                }
            }
        });

        let (Norm::Rms { eps } | Norm::Layer { eps }) = spec.norm;
        let query_norm = weights.query_norm.as_deref().map(|weight| (weight, eps));
        let key_norm = weights.key_norm.as_deref().map(|weight| (weight, eps));
        let group = spec.heads_per_kv_head() * head_dim;
        let block_tokens = cache.block_tokens();
        let (queries, others) = MatrixMut::new(qkv, rows, width, width).split_columns(q);
        let (keys, values) = others.split_columns(kv);
        let heads = (
            Grid::new(queries, &bounds, group),
            (
                Grid::new(keys, &bounds, head_dim),
                Grid::new(values, &bounds, head_dim),
            ),
        );
        let (positions, row_blocks) = (&acts.positions, &acts.row_blocks);
        crew.each((heads, cache.heads(layer)), |_, (heads, mut cache), _| {
            let (queries, (mut keys, mut values)) = heads;
            rope.turn_heads(isa, queries, positions, query_norm);
            rope.turn_heads(isa, keys.reborrow(), positions, key_norm);
            for row in 0..rows {
                let slot = positions[row] as usize % block_tokens;
                cache.write(row_blocks[row], slot, keys.row(row), values.row(row));
            }
        });

        let paged = PagedAttention {
            queries: qkv,
            query_stride: width,
            keys: cache.keys(layer),
            values: cache.values(layer),
            block_tokens,
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim,
            window: spec.sliding_window,
            scale: 1.0 / (head_dim as f32).sqrt(),
        };
        let places = Grid::new(MatrixMut::new(context, rows, q, q), &acts.bounds, group);
        crew.each(places, |index, place, seat| {
            let (span, head) = (&acts.spans[index / spec.kv_heads], index % spec.kv_heads);
            let span = Span {
                first_row: span.first_row,
                rows: span.rows,
                start: span.start,
                blocks: &acts.tables[span.table.clone()],
            };
            paged.run(isa, span, head..head + 1, attention.of(seat), place);
        });

        packed.pack_groups(crew, weights.output.kind(), Rows::F32(context), &bounds, q);
        let bias = weights.output_bias.as_deref();
        let projected = &mut projected[..rows * hidden];
        multiply(crew, packed, &weights.output, bias, projected, |_| ());
        add(crew, residual, projected);
    }
}

/// Rows of the gate that a thread takes at a time.
const GATE_ROWS: usize = 16;

impl Scratch {
    fn new(isa: Isa, spec: &ModelSpec, rows: usize, crew: &Member) -> Self {
        let (q, kv) = projections(spec).expect("sizes were checked");
        Scratch {
            packed: PackedRows::new(isa, rows, spec.hidden.max(q)),
            normed: vec![0.0; rows * spec.hidden],
            qkv: vec![0.0; rows * (q + 2 * kv)],
            context: vec![0.0; rows * q],
            projected: vec![0.0; rows * spec.hidden],
            probabilities: vec![0.0; rows * spec.experts],
            attention: PerSeat::new(crew, || {
                AttentionScratch::new(SPAN_ROWS, spec.heads_per_kv_head(), spec.head_dim)
            }),
            ffn: FfnScratch::new(isa, rows, spec.hidden, dense_width(spec)),
        }
    }

    fn bytes(spec: &ModelSpec, options: AttentionOptions) -> Option<usize> {
        let rows = options.max_rows;
        let (q, kv) = projections(spec)?;
        let row = spec
            .hidden
            .checked_mul(2)?
            .checked_add(q.checked_add(kv)?.checked_mul(2)?)?;
        row.checked_add(spec.experts)?
            .checked_mul(rows)?
            .checked_mul(4)?
            .checked_add(PackedRows::bytes(rows, spec.hidden.max(q))?)?
            .checked_add(
                AttentionScratch::bytes(SPAN_ROWS, spec.heads_per_kv_head(), spec.head_dim)?
                    .checked_mul(options.seats)?,
            )?
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

/// Elements that a thread adds at a time.
const ADD_ELEMENTS: usize = 16 << 10;

/// `x += y`.
fn add(crew: &mut Member, x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len());
    crew.each(Chunks::new(x, ADD_ELEMENTS), |index, x, _| {
        add_assign(x, &y[index * ADD_ELEMENTS..][..x.len()]);
    });
}

/// `out = x w^T + bias` for the packed rows, a piece of the columns at a time, with each of which `then` is called.
fn multiply(
    crew: &mut Member,
    x: &PackedRows,
    w: &PackedMatrix,
    bias: Option<&[f32]>,
    out: &mut [f32],
    then: impl Fn(MatrixMut<'_>) + Sync,
) {
    let x = PackedGroup::from(x);
    let bounds = [0, x.rows()];
    let columns = columns_per_piece(crew, 1, 1, w);
    let out = MatrixMut::new(out, x.rows(), w.n(), w.n());
    crew.each(Grid::new(out, &bounds, columns), |index, mut part, _| {
        let first = index * columns;
        let end = first + part.cols();
        let start = bias.map_or(Start::Zero, |bias| Start::Bias(&bias[first..end]));
        let panels = first / PANEL_COLUMNS..end.div_ceil(PANEL_COLUMNS);
        gemm(x, w, panels, part.reborrow(), start);
        then(part);
    });
}

#[cfg(test)]
mod tests;
