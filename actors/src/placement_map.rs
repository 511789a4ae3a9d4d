//! What all workers of an epoch agree on.

use std::sync::Arc;

use volley_transports::{Epoch, Placement};

/// An epoch and where its experts are.
#[derive(Clone)]
pub(crate) struct Grouping {
    pub(crate) epoch: Epoch,
    pub(crate) placement: Arc<Placement>,
}
