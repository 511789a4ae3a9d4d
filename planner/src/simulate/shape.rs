//! What is simulated: the cluster, and how things vary in it.

use volley_transports::{Role, WorkerId};

use crate::PlanError;

/// What is simulated.
#[derive(Debug, Clone, PartialEq)]
pub struct ClusterShape {
    /// Attention workers (M).
    pub attention_workers: u16,
    /// Micro-batches in flight (m).
    pub micro_batches: u8,
    /// Layers with experts (L).
    pub layers: usize,
    /// KV blocks of each attention worker.
    pub kv_blocks: u32,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Tokens that one attention worker computes at most in one step.
    pub max_rows: u32,
    /// Longest sequence.
    pub context: u32,
    /// Requests that may wait for a place.
    pub max_waiting: usize,
    /// Whether another expert worker has the experts of one that is lost.
    pub replicas: bool,
}

/// A worker that is gone for a while.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outage {
    /// The worker.
    pub worker: WorkerId,
    /// When it goes, in seconds.
    pub at_s: f64,
    /// For how long.
    pub lasts_s: f64,
}

/// How things vary.
#[derive(Debug, Clone, PartialEq)]
pub struct Variation {
    /// Each hop takes longer by a share drawn evenly up to this.
    pub jitter: f64,
    /// Whether the rows of each expert are drawn; else each gets its mean.
    pub draws: bool,
    /// Prompts come computed, from a prefill cluster, as in the paper: one costs a row, and its KV blocks.
    pub prefilled: bool,
    /// Workers that are gone for a while.
    pub outages: Vec<Outage>,
    /// Time until the loss of a worker is noticed, in seconds.
    pub notice_s: f64,
    /// Of everything that is drawn.
    pub seed: u64,
}

impl Default for Variation {
    fn default() -> Self {
        Variation {
            jitter: 0.0,
            draws: true,
            prefilled: false,
            outages: Vec::new(),
            notice_s: 1.0,
            seed: 0,
        }
    }
}

impl ClusterShape {
    /// Refuses a cluster that is none.
    pub(super) fn check(&self) -> Result<(), PlanError> {
        for (name, value) in [
            ("attention workers", u64::from(self.attention_workers)),
            ("micro-batches", self.micro_batches.into()),
            ("layers", self.layers as u64),
            ("KV blocks", self.kv_blocks.into()),
            ("tokens of a block", self.block_tokens.into()),
            ("rows of a step", self.max_rows.into()),
            ("the context", self.context.into()),
        ] {
            if value == 0 {
                return Err(PlanError::invalid(
                    "the cluster",
                    format!("{name}: 0"),
                    "give at least 1",
                ));
            }
        }
        let room = u64::from(self.kv_blocks) * u64::from(self.block_tokens);
        if room < u64::from(self.context) {
            return Err(PlanError::invalid(
                "the cluster",
                format!(
                    "an attention worker's KV cache holds {room} tokens, a sequence may have {}",
                    self.context
                ),
                "give it more KV blocks, or lower the context",
            ));
        }
        Ok(())
    }
}

impl Outage {
    /// Refuses workers that are not, and times that make no sense.
    pub(super) fn check(&self, attention: usize, experts: usize) -> Result<(), PlanError> {
        let &Outage {
            worker,
            at_s,
            lasts_s,
        } = self;
        let count = match worker.role {
            Role::Attention => attention,
            Role::Expert => experts,
        };
        if usize::from(worker.index) >= count {
            return Err(PlanError::invalid(
                "the failures",
                format!("there is no {worker}"),
                format!("there are {count} {} workers, numbered from 0", worker.role),
            ));
        }
        if at_s >= 0.0 && lasts_s > 0.0 && (at_s + lasts_s).is_finite() {
            return Ok(());
        }
        Err(PlanError::invalid(
            "the failures",
            format!("{worker} is gone at {at_s} s for {lasts_s} s"),
            "give times that are not negative",
        ))
    }
}
