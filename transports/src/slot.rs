//! Memory of a slot: bytes on a 64-byte boundary, sized once.
//!
//! 64 bytes are a cache line and the widest vector register, so that rows inside a frame can be used where they lie.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Alignment of every slot, and of the row section inside every frame, in bytes.
pub const SLOT_ALIGN: usize = 64;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(64))]
struct Line([u8; SLOT_ALIGN]);

/// One direction of a lane: a buffer of fixed capacity and the length of the frame in it.
pub(crate) struct Slot {
    lines: Box<[Line]>,
    capacity: usize,
    len: usize,
}

impl Slot {
    /// A zeroed slot of `capacity` bytes.
    pub(crate) fn new(capacity: usize) -> Self {
        let lines = vec![Line([0; SLOT_ALIGN]); capacity.div_ceil(SLOT_ALIGN)];
        Self {
            lines: lines.into_boxed_slice(),
            capacity,
            len: 0,
        }
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Sets the length of the frame; the caller has checked it against the capacity.
    pub(crate) fn fill(&mut self, len: usize) {
        debug_assert!(len <= self.capacity);
        self.len = len;
    }

    /// The frame.
    pub(crate) fn frame(&self) -> &[u8] {
        &self.lines.as_bytes()[..self.len]
    }

    /// The whole buffer, to build the next frame in.
    pub(crate) fn buffer(&mut self) -> &mut [u8] {
        &mut self.lines.as_mut_bytes()[..self.capacity]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_aligned_and_has_exactly_its_capacity() {
        for capacity in [0, 1, 63, 64, 65, 1000] {
            let mut slot = Slot::new(capacity);
            assert_eq!(slot.buffer().len(), capacity);
            assert_eq!(slot.buffer().as_ptr() as usize % SLOT_ALIGN, 0);
            assert!(slot.frame().is_empty());
            slot.fill(capacity);
            assert_eq!(slot.frame().len(), capacity);
        }
    }
}
