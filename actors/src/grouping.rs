//! What all workers of an epoch agree on.

use std::sync::Arc;

use volley_transports::{Epoch, Participants, Placement, Role, WorkerId};

/// An epoch: who takes part, and where the experts are.
#[derive(Debug, Clone)]
pub(crate) struct Grouping {
    pub(crate) epoch: Epoch,
    pub(crate) placement: Arc<Placement>,
    /// Attention workers that take part.
    pub(crate) attention: Arc<Participants>,
    /// Of these, the ones that begin in this epoch: they know no sequence.
    pub(crate) fresh: Arc<Participants>,
}

impl Grouping {
    /// What a worker has before its first epoch: nobody takes part.
    pub(crate) fn none(attention_workers: u16, placement: Placement) -> Self {
        let nobody = Arc::new(Participants::none(attention_workers));
        Grouping {
            epoch: placement.epoch(),
            placement: Arc::new(placement),
            attention: Arc::clone(&nobody),
            fresh: nobody,
        }
    }

    /// Whether a worker takes part. The loss of one that does not is nobody's business.
    pub(crate) fn includes(&self, worker: WorkerId) -> bool {
        match worker.role {
            Role::Attention => self.attention.contains(worker.index),
            Role::Expert => self.placement.max_local_experts(worker.index) > 0,
        }
    }
}
