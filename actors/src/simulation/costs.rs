//! How long computing takes in virtual time.

use std::time::Duration;

/// What a worker computes in one go. Implemented by whoever knows the hardware; the planner does from first principles or from a profile.
pub trait Costs: Send {
    /// Time of one layer's attention and gate for one micro-batch, or of the head.
    fn attention(&mut self, load: &AttentionLoad) -> Duration;

    /// Time of one layer's experts on one worker for one micro-batch.
    fn experts(&mut self, round: &ExpertRound<'_>) -> Duration;
}

/// One attention worker's part of one layer of one micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionLoad {
    /// Index of the worker.
    pub worker: u16,
    /// Tokens computed.
    pub rows: u32,
    /// Cached tokens that they attend to, summed over the sequences.
    pub cached: u64,
    /// It is the head and the sampling behind the last layer, not a layer.
    pub head: bool,
}

/// One expert worker's part of one layer of one micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertRound<'a> {
    /// Index of the worker.
    pub worker: u16,
    /// Where the rows of each of its experts start, and after the last, their number.
    pub offsets: &'a [u32],
}

/// A time for each piece of work and one for each row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlatCosts {
    /// Time of a layer's attention without rows.
    pub attention: Duration,
    /// Time of a layer's experts without rows.
    pub experts: Duration,
    /// Time of each row on either side.
    pub row: Duration,
}

impl Costs for FlatCosts {
    fn attention(&mut self, load: &AttentionLoad) -> Duration {
        self.attention + self.row * load.rows
    }

    fn experts(&mut self, round: &ExpertRound<'_>) -> Duration {
        self.experts + self.row * round.offsets.last().copied().unwrap_or(0)
    }
}
