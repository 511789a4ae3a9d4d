//! The sequences an attention worker knows: their tokens, their KV blocks, and when they end.

use std::collections::HashMap;
use std::sync::Arc;

use crate::protocol::{SequenceId, StepWork};
use crate::request::{FinishReason, Request};

/// A sequence on its attention worker.
#[derive(Debug)]
pub struct Sequence {
    request: Arc<Request>,
    /// Prompt and output.
    tokens: Vec<u32>,
    prompt: usize,
    limit: usize,
    /// KV blocks, in order of position.
    blocks: Vec<u32>,
    ended: bool,
}

impl Sequence {
    /// What was asked for.
    pub fn request(&self) -> &Request {
        &self.request
    }

    /// Prompt and output.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The prompt.
    pub fn prompt(&self) -> &[u32] {
        &self.tokens[..self.prompt]
    }

    /// What was generated.
    pub fn generated(&self) -> &[u32] {
        &self.tokens[self.prompt..]
    }

    /// KV blocks, in order of position.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Appends a generated token and says whether the sequence ends with it.
    pub fn push(&mut self, token: u32) -> Option<FinishReason> {
        self.tokens.push(token);
        let reason = if self.request.stop_tokens.contains(&token) {
            FinishReason::Stop
        } else if self.tokens.len() >= self.limit {
            FinishReason::Length
        } else {
            return None;
        };
        self.ended = true;
        Some(reason)
    }

    /// Ends a sequence that cannot go on.
    pub fn fail(&mut self, reason: String) -> FinishReason {
        self.ended = true;
        FinishReason::Error(reason)
    }

    /// Ends a sequence that generates nothing, when `computed` of its tokens are in the cache.
    pub fn end_without_output(&mut self, computed: usize) -> Option<FinishReason> {
        let end = computed >= self.tokens.len() && self.tokens.len() >= self.limit;
        self.ended |= end;
        end.then_some(FinishReason::Length)
    }
}

/// Why a step could not use a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SequenceError {
    /// It was never admitted, or was released.
    #[error("{0} is not on this worker")]
    Unknown(SequenceId),
    /// The step names positions that are not known.
    #[error("{0} has {1} tokens, but the step computes up to position {2}")]
    Positions(SequenceId, usize, usize),
    /// The worker has no free KV block.
    #[error("{0} needs a KV block and none is free; the scheduler's books are wrong")]
    NoBlock(SequenceId),
}

/// All sequences of a worker and its free KV blocks.
#[derive(Debug)]
pub struct Sequences {
    known: HashMap<SequenceId, Sequence>,
    free: Vec<u32>,
    blocks: u32,
    block_tokens: usize,
}

impl Sequences {
    /// None, and all of `blocks` KV blocks of `block_tokens` positions free.
    pub fn new(blocks: u32, block_tokens: usize) -> Self {
        Sequences {
            known: HashMap::new(),
            free: (0..blocks).rev().collect(),
            blocks,
            block_tokens,
        }
    }

    /// Makes a sequence known.
    pub fn admit(&mut self, id: SequenceId, request: Arc<Request>, generated: &[u32], limit: u32) {
        let mut tokens = Vec::with_capacity(limit as usize);
        tokens.extend_from_slice(&request.prompt);
        tokens.extend_from_slice(generated);
        let limit = limit as usize;
        let prompt = request.prompt.len();
        let blocks = Vec::with_capacity(limit.div_ceil(self.block_tokens));
        self.known.insert(
            id,
            Sequence {
                request,
                tokens,
                prompt,
                limit,
                blocks,
                ended: false,
            },
        );
    }

    /// Forgets a sequence and frees its blocks. An unknown one is ignored.
    pub fn release(&mut self, id: SequenceId) {
        if let Some(sequence) = self.known.remove(&id) {
            self.free.extend(sequence.blocks);
        }
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.known.clear();
        self.free.clear();
        self.free.extend((0..self.blocks).rev());
    }

    /// Makes sure that a piece of work can be done: its tokens known, its blocks taken. `Ok(false)`: the sequence has ended, skip it.
    ///
    /// # Errors
    /// When the work contradicts what is known here.
    pub fn prepare(&mut self, work: &StepWork) -> Result<bool, SequenceError> {
        let id = work.sequence;
        let sequence = self.known.get_mut(&id).ok_or(SequenceError::Unknown(id))?;
        if sequence.ended {
            return Ok(false);
        }
        let end = work.start as usize + work.tokens as usize;
        if end > sequence.tokens.len() {
            return Err(SequenceError::Positions(id, sequence.tokens.len(), end));
        }
        while sequence.blocks.len() * self.block_tokens < end {
            sequence
                .blocks
                .push(self.free.pop().ok_or(SequenceError::NoBlock(id))?);
        }
        Ok(true)
    }

    /// A known sequence.
    pub fn get(&self, id: SequenceId) -> Option<&Sequence> {
        self.known.get(&id)
    }

    /// A known sequence, to append to.
    pub fn get_mut(&mut self, id: SequenceId) -> Option<&mut Sequence> {
        self.known.get_mut(&id)
    }

    /// KV blocks that no sequence holds.
    pub fn free_blocks(&self) -> usize {
        self.free.len()
    }
}
