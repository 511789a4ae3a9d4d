//! How many workers meet, over how many lanes, and how many bytes their slots take.

use crate::slot::SLOT_ALIGN;
use crate::{Role, WorkerId};

/// The shape of a fabric, fixed at start-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Number of attention workers (M).
    pub attention: u16,
    /// Number of expert workers (N).
    pub experts: u16,
    /// Number of micro-batches (m): lanes between each pair.
    pub micro_batches: u8,
    /// Capacity of each slot from attention to expert, in bytes.
    pub dispatch_bytes: usize,
    /// Capacity of each slot from expert to attention, in bytes.
    pub combine_bytes: usize,
}

impl Topology {
    /// Number of workers of `role`.
    pub const fn workers(&self, role: Role) -> u16 {
        match role {
            Role::Attention => self.attention,
            Role::Expert => self.experts,
        }
    }

    /// Capacity of the slots that workers of `role` send from, in bytes.
    pub const fn outgoing_bytes(&self, role: Role) -> usize {
        match role {
            Role::Attention => self.dispatch_bytes,
            Role::Expert => self.combine_bytes,
        }
    }

    /// All workers: attention first, then experts, each in order of their index.
    pub fn ids(&self) -> impl Iterator<Item = WorkerId> + use<> {
        let attention = (0..self.attention).map(|i| Role::Attention.worker(i));
        attention.chain((0..self.experts).map(|i| Role::Expert.worker(i)))
    }

    /// Number of lanes: `attention * experts * micro_batches`. It fits: 16 + 16 + 8 bits.
    pub const fn lanes(&self) -> u64 {
        self.attention as u64 * self.experts as u64 * self.micro_batches as u64
    }

    /// Memory of all slots in bytes: lanes times both capacities, each rounded up to [`SLOT_ALIGN`].
    ///
    /// # Errors
    /// A side has no workers, there are no micro-batches, or the product does not fit the address space.
    pub fn bytes(&self) -> Result<usize, TopologyError> {
        if self.attention == 0 || self.experts == 0 || self.micro_batches == 0 {
            return Err(TopologyError::Empty(*self));
        }
        let dispatch = self.dispatch_bytes.checked_next_multiple_of(SLOT_ALIGN);
        let combine = self.combine_bytes.checked_next_multiple_of(SLOT_ALIGN);
        let lane = dispatch.zip(combine).and_then(|(d, c)| d.checked_add(c));
        let lanes = usize::try_from(self.lanes()).ok();
        lane.zip(lanes)
            .and_then(|(lane, lanes)| lane.checked_mul(lanes))
            .filter(|&bytes| isize::try_from(bytes).is_ok())
            .ok_or(TopologyError::TooLarge(*self))
    }
}

/// Why a fabric of that shape cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TopologyError {
    /// One of the three counts is zero.
    #[error("{} attention workers, {} expert workers and {} micro-batches: each must be at least 1", .0.attention, .0.experts, .0.micro_batches)]
    Empty(Topology),
    /// The slots do not fit the address space.
    #[error(
        "slots of {} x {} x {} lanes x ({} + {}) bytes do not fit the address space: lower the rows per micro-batch",
        .0.attention, .0.experts, .0.micro_batches, .0.dispatch_bytes, .0.combine_bytes
    )]
    TooLarge(Topology),
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: Topology = Topology {
        attention: 2,
        experts: 3,
        micro_batches: 4,
        dispatch_bytes: 65,
        combine_bytes: 64,
    };

    #[test]
    fn bytes_are_lanes_times_rounded_capacities() {
        assert_eq!(SMALL.lanes(), 24);
        assert_eq!(SMALL.bytes(), Ok(24 * (128 + 64)));
    }

    #[test]
    fn overflow_and_emptiness_are_errors_that_show_the_numbers() {
        let huge = Topology {
            dispatch_bytes: usize::MAX - 3,
            ..SMALL
        };
        assert_eq!(huge.bytes(), Err(TopologyError::TooLarge(huge)));
        let large = Topology {
            dispatch_bytes: usize::MAX / 48,
            ..SMALL
        };
        assert_eq!(
            large.bytes().is_err(),
            usize::MAX / 48 * 24 > isize::MAX as usize - 24 * 128
        );
        let none = Topology {
            experts: 0,
            ..SMALL
        };
        assert_eq!(
            none.bytes().unwrap_err().to_string(),
            "2 attention workers, 0 expert workers and 4 micro-batches: each must be at least 1"
        );
    }
}
