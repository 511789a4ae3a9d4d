//! Who comes first: the one question in which the shipped policies differ.

mod arrival;
mod deadline;
mod fair_share;

pub use arrival::Arrival;
pub use deadline::{EarliestDeadline, SloClass};
pub use fair_share::{FairShare, TenantWeights, WeightError};

use std::time::Duration;

use super::{SequenceView, View};
use crate::protocol::{Now, SequenceId};

/// A place in a line. Smaller comes first; between equal keys, who arrived first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Standing {
    /// What the policy goes by.
    pub key: Duration,
    /// The sequence.
    pub sequence: SequenceId,
}

/// Decides who comes first; [`super::Batching`] does the rest.
pub trait Order: Send {
    /// Who keeps its KV blocks when they run short. Never changes while the sequence is in the books, or two would preempt each other in turns; and a sequence
    /// that arrives late enough stands behind any other, or one could starve.
    fn standing(&self, id: SequenceId, sequence: &SequenceView) -> Standing;

    /// Puts sequences that wait into the order in which they are to start. They come in order of arrival.
    fn line_up(&mut self, view: &View, waiting: &mut [SequenceId], _now: Now) {
        waiting.sort_by_cached_key(|&id| view.sequence(id).map(|s| self.standing(id, s)));
    }

    /// `tokens` of a sequence are in the plan.
    fn planned(&mut self, _sequence: &SequenceView, _tokens: u32) {}
}
