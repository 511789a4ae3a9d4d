//! Why QUIC could not be used.

use std::net::SocketAddr;

use super::{IdentityError, NodeRole};
use crate::TopologyError;

/// Why a node, a link or an endpoint could not be had or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QuicError {
    /// The socket could not be had.
    #[error(
        "cannot listen on UDP {address}: {error}; is the address one of this host's, and the port free?"
    )]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        error: std::io::Error,
    },
    /// The threads of the node could not be started.
    #[error("the network threads could not be started: {0}")]
    Threads(std::io::Error),
    /// A certificate or key is of no use.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// An option is out of range.
    #[error("{0}")]
    Option(String),
    /// The peer was not reached, or did not prove who it is.
    #[error("cannot reach {address} as a {expected}: {reason}")]
    Connect {
        /// Where.
        address: SocketAddr,
        /// What it was to be.
        expected: NodeRole,
        /// What went wrong.
        reason: String,
    },
    /// The peer did not take the hello.
    #[error("{address} refused: {reason}")]
    Refused {
        /// Who.
        address: SocketAddr,
        /// Why.
        reason: String,
    },
    /// The worker has left the epoch.
    #[error("the worker at {address} has left the epoch")]
    Left {
        /// Where.
        address: SocketAddr,
    },
    /// The link is gone.
    #[error("the link to {address} is gone: {reason}")]
    Lost {
        /// Who.
        address: SocketAddr,
        /// Why.
        reason: String,
    },
    /// A message is longer than a link takes.
    #[error("a control message of {len} bytes, but a link takes {max} at most")]
    TooLong {
        /// Its length.
        len: u64,
        /// The limit.
        max: usize,
    },
    /// The fabric cannot have this shape.
    #[error(transparent)]
    Topology(#[from] TopologyError),
}
