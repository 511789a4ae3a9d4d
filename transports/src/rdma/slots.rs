//! Where slots lie in an endpoint's memory: by peer, then by micro-batch, each on a boundary of [`SLOT_ALIGN`].

use std::ops::Range;
use std::sync::Arc;

use super::rail::Rail;
use crate::verbs::{Access, Buffer, MemoryRegion, Pages, VerbsError};
use crate::{Role, SLOT_ALIGN, Topology};

/// Slots of one direction at one endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Bytes of a frame at most.
    pub(super) capacity: usize,
    micro_batches: usize,
    lanes: usize,
}

impl Layout {
    /// What workers of `role` send from.
    pub(super) fn outgoing(topology: &Topology, role: Role) -> Self {
        Self::new(topology, role, topology.outgoing_bytes(role))
    }

    /// What comes to workers of `role`.
    pub(super) fn incoming(topology: &Topology, role: Role) -> Self {
        Self::new(topology, role, topology.outgoing_bytes(role.opposite()))
    }

    fn new(topology: &Topology, role: Role, capacity: usize) -> Self {
        let micro_batches = usize::from(topology.micro_batches);
        Self {
            capacity,
            micro_batches,
            lanes: usize::from(topology.workers(role.opposite())) * micro_batches,
        }
    }

    /// Bytes of all slots. Never none: a region needs a byte.
    pub(super) fn bytes(&self) -> usize {
        (self.lanes * self.stride()).max(1)
    }

    /// First byte of the slot of a lane.
    pub(super) fn start(&self, peer: u16, micro_batch: u8) -> usize {
        (usize::from(peer) * self.micro_batches + usize::from(micro_batch)) * self.stride()
    }

    /// The first `len` bytes of a lane's slot, by the lane's index (peer-major).
    pub(super) fn range(&self, lane: usize, len: usize) -> Range<usize> {
        debug_assert!(lane < self.lanes && len <= self.capacity);
        let start = lane * self.stride();
        start..start + len
    }

    fn stride(&self) -> usize {
        self.capacity.next_multiple_of(SLOT_ALIGN)
    }
}

/// An endpoint's slots, registered with every rail. Peers may write the incoming ones; nobody but this worker's card reads the outgoing ones.
pub(super) struct Slots {
    pub(super) incoming: Layout,
    pub(super) outgoing: Layout,
    /// By rail: the same memory, with each card's own keys.
    pub(super) regions: Box<[(MemoryRegion, MemoryRegion)]>,
}

impl Slots {
    pub(super) fn new(
        topology: &Topology,
        role: Role,
        rails: &[Rail],
        pages: Pages,
    ) -> Result<Self, VerbsError> {
        let (incoming, outgoing) = (
            Layout::incoming(topology, role),
            Layout::outgoing(topology, role),
        );
        let [theirs, ours] = [incoming, outgoing].map(|layout| Buffer::new(layout.bytes(), pages));
        let (theirs, ours) = (Arc::new(theirs?), Arc::new(ours?));
        let regions = rails.iter().map(|rail| {
            let theirs = MemoryRegion::new(&rail.domain, &theirs, Access::REMOTE_WRITE)?;
            let ours = MemoryRegion::new(&rail.domain, &ours, Access::LOCAL_READ)?;
            Ok((theirs, ours))
        });
        Ok(Self {
            incoming,
            outgoing,
            regions: regions.collect::<Result<_, VerbsError>>()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_of_both_ends_are_the_same_and_do_not_overlap() {
        let topology = Topology {
            attention: 3,
            experts: 2,
            micro_batches: 4,
            dispatch_bytes: 65,
            combine_bytes: 64,
        };
        let there = Layout::incoming(&topology, Role::Expert);
        assert_eq!(there.capacity, 65);
        assert_eq!(there.bytes(), 3 * 4 * 128);
        let mut next = 0;
        for peer in 0..3 {
            for micro_batch in 0..4 {
                assert_eq!(there.start(peer, micro_batch), next);
                let lane = usize::from(peer) * 4 + usize::from(micro_batch);
                assert_eq!(there.range(lane, 65), next..next + 65);
                next += 128;
            }
        }
        let empty = Topology {
            dispatch_bytes: 0,
            ..topology
        };
        assert_eq!(Layout::incoming(&empty, Role::Expert).bytes(), 1);
    }
}
