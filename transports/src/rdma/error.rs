//! Why the fabric could not be had.

use super::rail::RdmaOptionsError;
use crate::quic::QuicError;
use crate::verbs::VerbsError;

/// Why RDMA could not be opened, or an epoch not be joined.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RdmaError {
    /// A call of libibverbs failed, or there is no libibverbs.
    #[error(transparent)]
    Verbs(#[from] VerbsError),
    /// A setting is out of range.
    #[error(transparent)]
    Options(#[from] RdmaOptionsError),
    /// The topology cannot be carried.
    #[error(transparent)]
    Topology(#[from] QuicError),
    /// No device can be used.
    #[error("no RDMA device can be used: {0}; see `volley doctor`")]
    NoRail(String),
    /// A device cannot be used.
    #[error("RDMA device {rail}: {reason}")]
    Rail {
        /// Device and port.
        rail: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A descriptor could not be had.
    #[error("a descriptor for waking up cannot be had: {0}; raise the limit on open files")]
    Bell(std::io::Error),
}
