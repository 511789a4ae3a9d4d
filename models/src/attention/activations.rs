//! What one micro-batch carries through the layers.

use std::ops::Range;

use crate::ModelSpec;
use crate::memory::ModuleError;

/// The next tokens of one sequence: a chunk of its prompt, or the one token to go on from.
#[derive(Debug, Clone, Copy)]
pub struct SequenceSlice<'a> {
    /// Token ids.
    pub tokens: &'a [u32],
    /// Position of the first. Keys and values of all positions before it are in the cache.
    pub start: u32,
    /// Blocks of the cache that hold the sequence's positions, from position 0 on.
    pub blocks: &'a [u32],
}

/// One micro-batch between [`begin`](super::AttentionModule::begin) and its logits: tokens, residual, what experts are to be sent.
///
/// Separate from the module, so that one micro-batch can wait for its experts while another is computed. Sized when made;
/// nothing is allocated after.
#[derive(Debug)]
pub struct Activations {
    pub(super) limits: Limits,
    pub(super) tokens: Vec<u32>,
    pub(super) positions: Vec<u32>,
    /// Block that each row's keys and values go to.
    pub(super) row_blocks: Vec<u32>,
    pub(super) spans: Vec<SpanRecord>,
    /// Row that each span begins with; after the last, the end.
    pub(super) bounds: Vec<usize>,
    pub(super) tables: Vec<u32>,
    pub(super) residual: Vec<f32>,
    pub(super) ffn_input: Vec<f32>,
    /// Empty unless the module computes in bf16.
    pub(super) ffn_input_bf16: Vec<u16>,
    pub(super) expert_ids: Vec<u16>,
    pub(super) expert_weights: Vec<f32>,
}

/// Rows of a sequence that attention takes at once: enough to share what they read of the cache, few enough for several threads to get some.
pub(super) const SPAN_ROWS: usize = 32;

/// At most [`SPAN_ROWS`] rows of one sequence, and its block table within `tables`.
#[derive(Debug, Clone)]
pub(super) struct SpanRecord {
    pub(super) first_row: usize,
    pub(super) rows: usize,
    pub(super) start: usize,
    pub(super) table: Range<usize>,
}

/// What a micro-batch must keep within.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) max_rows: usize,
    pub(super) max_positions: usize,
    pub(super) block_tokens: usize,
    pub(super) kv_blocks: usize,
    pub(super) vocab: usize,
    pub(super) hidden: usize,
    pub(super) top_k: usize,
    pub(super) bf16: bool,
}

impl Limits {
    fn blocks_of_a_sequence(&self) -> usize {
        self.max_positions.div_ceil(self.block_tokens)
    }

    /// Bytes of one [`Activations`]; nothing if that overflows.
    pub(super) fn bytes(&self) -> Option<usize> {
        let hidden = self
            .hidden
            .checked_mul(if self.bf16 { 4 + 4 + 2 } else { 4 + 4 })?;
        let tables = self.blocks_of_a_sequence().checked_mul(4)?;
        let experts = self.top_k.checked_mul(2 + 4)?;
        let ids = 3 * 4 + size_of::<SpanRecord>() + size_of::<usize>();
        hidden
            .checked_add(tables)?
            .checked_add(experts)?
            .checked_add(ids)?
            .checked_mul(self.max_rows)
    }

    pub(super) fn new(spec: &ModelSpec, options: &super::AttentionOptions) -> Option<Self> {
        Some(Limits {
            max_rows: options.max_rows,
            max_positions: spec
                .max_positions
                .min(options.kv_blocks.checked_mul(options.block_tokens)?),
            block_tokens: options.block_tokens,
            kv_blocks: options.kv_blocks,
            vocab: spec.vocab,
            hidden: spec.hidden,
            top_k: spec.top_k,
            bf16: options.dtype == crate::ComputeType::Bf16,
        })
    }
}

impl Activations {
    pub(super) fn new(limits: Limits) -> Self {
        let rows = limits.max_rows;
        Activations {
            limits,
            tokens: Vec::with_capacity(rows),
            positions: Vec::with_capacity(rows),
            row_blocks: Vec::with_capacity(rows),
            spans: Vec::with_capacity(rows),
            bounds: Vec::with_capacity(rows + 1),
            tables: Vec::with_capacity(rows * limits.blocks_of_a_sequence()),
            residual: vec![0.0; rows * limits.hidden],
            ffn_input: vec![0.0; rows * limits.hidden],
            ffn_input_bf16: vec![0; if limits.bf16 { rows * limits.hidden } else { 0 }],
            expert_ids: vec![0; rows * limits.top_k],
            expert_weights: vec![0.0; rows * limits.top_k],
        }
    }

    /// Rows of the micro-batch: one a token, sequence after sequence.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Input of the layer's experts, `[rows, hidden]`.
    pub fn ffn_input(&self) -> &[f32] {
        &self.ffn_input[..self.rows() * self.limits.hidden]
    }

    /// The same as bits of bf16, for the wire, if the module computes in bf16.
    pub fn ffn_input_bf16(&self) -> Option<&[u16]> {
        self.limits
            .bf16
            .then(|| &self.ffn_input_bf16[..self.rows() * self.limits.hidden])
    }

    /// Experts each row visits, `[rows, top_k]`, the most probable first.
    pub fn expert_ids(&self) -> &[u16] {
        &self.expert_ids[..self.rows() * self.limits.top_k]
    }

    /// Their weights, `[rows, top_k]`.
    pub fn expert_weights(&self) -> &[f32] {
        &self.expert_weights[..self.rows() * self.limits.top_k]
    }

    /// Takes in a batch; on an error the activations hold no rows.
    pub(super) fn begin<'s>(
        &mut self,
        batch: impl Iterator<Item = SequenceSlice<'s>> + Clone,
    ) -> Result<(), ModuleError> {
        self.tokens.clear();
        self.positions.clear();
        self.row_blocks.clear();
        self.spans.clear();
        self.bounds.clear();
        self.tables.clear();
        let rows = batch.clone().map(|sequence| sequence.tokens.len()).sum();
        if rows > self.limits.max_rows {
            return Err(ModuleError::TooManyRows {
                rows,
                max_rows: self.limits.max_rows,
            });
        }
        for (index, sequence) in batch.clone().enumerate() {
            self.limits.check(index, &sequence)?;
        }
        for sequence in batch {
            let (start, rows) = (sequence.start as usize, sequence.tokens.len());
            let used = (start + rows).div_ceil(self.limits.block_tokens);
            for first in (0..rows).step_by(SPAN_ROWS) {
                let first_row = self.tokens.len() + first;
                self.bounds.push(first_row);
                self.spans.push(SpanRecord {
                    first_row,
                    rows: SPAN_ROWS.min(rows - first),
                    start: start + first,
                    table: self.tables.len()..self.tables.len() + used,
                });
            }
            self.tables.extend_from_slice(&sequence.blocks[..used]);
            self.tokens.extend_from_slice(sequence.tokens);
            for position in start..start + rows {
                self.positions.push(position as u32);
                self.row_blocks
                    .push(sequence.blocks[position / self.limits.block_tokens]);
            }
        }
        self.bounds.push(rows);
        Ok(())
    }
}

impl Limits {
    fn check(&self, sequence: usize, slice: &SequenceSlice<'_>) -> Result<(), ModuleError> {
        let start = slice.start as usize;
        if slice.tokens.is_empty() {
            return Err(ModuleError::EmptySequence { sequence });
        }
        // No overflow: there are no more tokens than max_rows.
        let positions = start..start.saturating_add(slice.tokens.len());
        if positions.end > self.max_positions {
            return Err(ModuleError::Position {
                sequence,
                positions,
                max_positions: self.max_positions,
            });
        }
        if let Some(token) = slice
            .tokens
            .iter()
            .find(|token| **token as usize >= self.vocab)
        {
            return Err(ModuleError::Token {
                sequence,
                token: *token,
                vocab: self.vocab,
            });
        }
        let needed = positions.end.div_ceil(self.block_tokens);
        if slice.blocks.len() < needed {
            return Err(ModuleError::BlockTable {
                sequence,
                needed,
                found: slice.blocks.len(),
            });
        }
        match slice.blocks[..needed]
            .iter()
            .find(|block| **block as usize >= self.kv_blocks)
        {
            Some(block) => Err(ModuleError::Block {
                sequence,
                block: *block,
                blocks: self.kv_blocks,
            }),
            None => Ok(()),
        }
    }
}
