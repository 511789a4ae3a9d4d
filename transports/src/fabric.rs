//! What makes a worker's lanes of an epoch, whatever carries them between processes.

use std::net::SocketAddr;

use crate::quic::{QuicError, QuicNode};
use crate::rdma::{RdmaError, RdmaFabric};
use crate::{Endpoint, Epoch, Topology, WorkerId};

/// A way for frames between processes. One is chosen at start-up.
pub trait Fabric: Send + Sync {
    /// This worker's end of the lanes of one epoch. Returns at once: peers are met meanwhile, frames that are posted wait for that, and a peer that cannot be met is reported lost.
    ///
    /// Attention workers call: `experts` has the address of each expert worker's node by index, none for those that take no part. Expert workers are called, and need none.
    ///
    /// # Errors
    /// The topology cannot be carried, or something is exhausted.
    fn join(
        &self,
        epoch: Epoch,
        me: WorkerId,
        topology: &Topology,
        experts: &[Option<SocketAddr>],
    ) -> Result<Box<dyn Endpoint>, FabricError>;
}

/// Why a worker has no lanes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FabricError {
    /// Over QUIC.
    #[error(transparent)]
    Quic(#[from] QuicError),
    /// Over RDMA.
    #[error(transparent)]
    Rdma(#[from] RdmaError),
}

impl Fabric for QuicNode {
    fn join(
        &self,
        epoch: Epoch,
        me: WorkerId,
        topology: &Topology,
        experts: &[Option<SocketAddr>],
    ) -> Result<Box<dyn Endpoint>, FabricError> {
        let endpoint = self.join(epoch, me, topology, experts)?;
        Ok(Box::new(endpoint))
    }
}

impl Fabric for RdmaFabric {
    fn join(
        &self,
        epoch: Epoch,
        me: WorkerId,
        topology: &Topology,
        experts: &[Option<SocketAddr>],
    ) -> Result<Box<dyn Endpoint>, FabricError> {
        let endpoint = self.join(epoch, me, topology, experts)?;
        Ok(Box::new(endpoint))
    }
}
