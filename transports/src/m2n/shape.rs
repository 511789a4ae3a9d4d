//! The sizes both sides of the exchange agree on at start-up, and the slots they call for.

use crate::{
    CombineLayout, CombineLimits, DispatchLayout, DispatchLimits, Element, LayoutError, Topology,
};

/// Maxima of an exchange. Every worker of a deployment has the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExchangeShape {
    /// Number of attention workers (M).
    pub attention_workers: u16,
    /// Number of expert workers (N).
    pub expert_workers: u16,
    /// Most rows of one attention worker in one micro-batch.
    pub max_rows: u32,
    /// Length of a row in elements.
    pub hidden: u32,
    /// Experts of each row.
    pub top_k: u16,
    /// Element type of rows on their way, both ways.
    pub element: Element,
}

impl ExchangeShape {
    /// The fabric this exchange needs, with `micro_batches` lanes per pair of workers.
    ///
    /// # Errors
    /// A count is zero, or the frames cannot be addressed.
    pub fn topology(&self, micro_batches: u8) -> Result<Topology, ShapeError> {
        self.check()?;
        let dispatch = DispatchLayout::for_maxima(
            self.max_rows,
            self.hidden,
            self.top_k,
            self.element,
            self.attention_workers,
        )?;
        let combine =
            CombineLayout::for_maxima(self.max_rows, self.hidden, self.top_k, self.element)?;
        Ok(Topology {
            attention: self.attention_workers,
            experts: self.expert_workers,
            micro_batches,
            dispatch_bytes: dispatch.bytes(),
            combine_bytes: combine.bytes(),
        })
    }

    /// Most (row, expert) pairs of one attention worker in one micro-batch: `max_rows * top_k`.
    ///
    /// # Errors
    /// A count is zero, or the product does not fit 32 bits.
    pub fn max_assignments(&self) -> Result<u32, ShapeError> {
        self.check()
    }

    /// Most (row, expert) pairs at one expert worker in one micro-batch: `max_assignments` of every attention worker.
    /// Its `x` and `y` have that many rows.
    ///
    /// # Errors
    /// A count is zero, or the product does not fit 32 bits.
    pub fn max_merged(&self) -> Result<u32, ShapeError> {
        self.check()?
            .checked_mul(self.attention_workers.into())
            .ok_or(ShapeError::TooMany(*self))
    }

    pub(crate) fn dispatch_limits(&self, local_experts: u16) -> DispatchLimits {
        DispatchLimits {
            attention_workers: self.attention_workers,
            max_rows: self.max_rows,
            hidden: self.hidden,
            top_k: self.top_k,
            local_experts,
        }
    }

    pub(crate) fn combine_limits(&self) -> CombineLimits {
        CombineLimits {
            expert_workers: self.expert_workers,
            max_rows: self.max_rows,
            hidden: self.hidden,
            top_k: self.top_k,
        }
    }

    fn check(&self) -> Result<u32, ShapeError> {
        let counts = [
            self.attention_workers.into(),
            self.expert_workers.into(),
            self.top_k.into(),
            self.hidden,
        ];
        if counts.contains(&0) || self.max_rows == 0 {
            return Err(ShapeError::Empty(*self));
        }
        self.max_rows
            .checked_mul(self.top_k.into())
            .ok_or(ShapeError::TooMany(*self))
    }
}

/// Why an exchange of that shape cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShapeError {
    /// A count is zero.
    #[error("every count of an exchange must be at least 1: {0:?}")]
    Empty(ExchangeShape),
    /// (row, expert) pairs do not fit 32 bits.
    #[error(
        "rows x top-k x attention workers do not fit 32 bits: lower the rows per micro-batch: {0:?}"
    )]
    TooMany(ExchangeShape),
    /// A frame cannot be addressed.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}
