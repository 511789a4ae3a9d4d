//! What a module will take, before it takes it; and why a module refuses.

use std::ops::Range;

use crate::weights::WeightError;

/// Bytes a module allocates when it is loaded; it allocates none after.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct MemoryEstimate {
    /// Packed weights and tables.
    pub weights: usize,
    /// Key/value cache.
    pub kv: usize,
    /// Activations and scratch.
    pub scratch: usize,
}

impl MemoryEstimate {
    /// All of it; nothing if that overflows.
    pub fn total(&self) -> Option<usize> {
        self.weights.checked_add(self.kv)?.checked_add(self.scratch)
    }
}

/// How far loading has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of weights packed so far.
    pub packed_bytes: usize,
    /// Bytes of weights in all.
    pub total_bytes: usize,
}

/// Why a module was not loaded or a batch not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModuleError {
    /// A weight could not be had.
    #[error(transparent)]
    Weight(#[from] WeightError),
    /// Sizes multiply beyond the address space.
    #[error(
        "{what} would take more bytes than can be addressed; lower the numbers of blocks and rows"
    )]
    TooLarge {
        /// What is too large.
        what: &'static str,
    },
    /// An option has a value that the kernels do not take.
    #[error("{option} is {found}, but must be {needed}")]
    Option {
        /// Its name.
        option: &'static str,
        /// Its value.
        found: usize,
        /// What it must be.
        needed: &'static str,
    },
    /// An expert was assigned that the model does not have, or twice.
    #[error(
        "expert {expert} cannot be owned: the model has {experts} experts, and each may be named once"
    )]
    Expert {
        /// The one named.
        expert: u16,
        /// Experts of the model.
        experts: usize,
    },
    /// Rows came for an expert that is elsewhere.
    #[error(
        "rows for expert {expert} came to a worker that does not hold it; the placement is wrong"
    )]
    NotHeld {
        /// The expert.
        expert: u16,
    },
    /// A batch has more rows than activations were sized for.
    #[error(
        "a micro-batch of {rows} rows exceeds max_rows = {max_rows}; send fewer tokens a step or raise it"
    )]
    TooManyRows {
        /// Rows of the batch.
        rows: usize,
        /// Rows there is room for.
        max_rows: usize,
    },
    /// A sequence of a batch is empty.
    #[error("sequence {sequence} of the micro-batch has no tokens; leave it out")]
    EmptySequence {
        /// Its index in the batch.
        sequence: usize,
    },
    /// A token id is not in the vocabulary.
    #[error(
        "token {token} of sequence {sequence} is outside the vocabulary of {vocab}; is the tokenizer the model's own?"
    )]
    Token {
        /// Index of the sequence in the batch.
        sequence: usize,
        /// The id.
        token: u32,
        /// Entries of the vocabulary.
        vocab: usize,
    },
    /// A sequence goes beyond the longest there is room for.
    #[error(
        "sequence {sequence} would fill positions {positions:?}, but the longest sequence here has {max_positions}"
    )]
    Position {
        /// Index of the sequence in the batch.
        sequence: usize,
        /// Positions its tokens would take.
        positions: Range<usize>,
        /// Positions there are.
        max_positions: usize,
    },
    /// A block table does not reach to the last token.
    #[error(
        "sequence {sequence} needs {needed} blocks for its last token, but its table has {found}"
    )]
    BlockTable {
        /// Index of the sequence in the batch.
        sequence: usize,
        /// Blocks needed.
        needed: usize,
        /// Blocks given.
        found: usize,
    },
    /// A block id is not in the cache.
    #[error("block {block} of sequence {sequence} does not exist: the cache has {blocks} blocks")]
    Block {
        /// Index of the sequence in the batch.
        sequence: usize,
        /// The id.
        block: u32,
        /// Blocks of the cache.
        blocks: usize,
    },
    /// The offsets of the experts' groups are not those of the rows.
    #[error(
        "group offsets must be {groups} values rising from 0 to at most the {rows} rows that came, all of which have {hidden} elements in and out"
    )]
    Groups {
        /// Offsets expected.
        groups: usize,
        /// Rows that came.
        rows: usize,
        /// Width of a row.
        hidden: usize,
    },
    /// A layer without experts was asked to compute them.
    #[error("layer {layer} has no experts here")]
    Layer {
        /// The layer.
        layer: usize,
    },
    /// A row was named that the micro-batch does not have, or the result has no place for it.
    #[error(
        "logits of {wanted} rows (the last is {last}) of a micro-batch of {rows} do not fit a result of {places} rows"
    )]
    Logits {
        /// Rows wanted.
        wanted: usize,
        /// The largest index among them.
        last: u32,
        /// Rows of the micro-batch.
        rows: usize,
        /// Rows the result has place for.
        places: usize,
    },
}
