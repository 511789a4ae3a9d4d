//! One aligned region for all weights of a module (or for a KV cache), in huge pages where the system gives them.
//!
//! Streaming weights from 4 KiB pages costs a third of the memory bandwidth or more, and an expert's matrix is too small for a
//! mapping of its own; so a module sums the sizes of what it will pack, makes one [`Arena`] and cuts blocks from it.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

/// Size of a huge page on the machines we know.
const HUGE_PAGE_BYTES: usize = 2 << 20;
/// Blocks begin at multiples of this: a cache line.
const BLOCK_ALIGN_BYTES: usize = 64;

/// A region that blocks are cut from, front to back; nothing goes back into it.
#[derive(Debug)]
pub struct Arena {
    region: Arc<Region>,
    used: usize,
}

/// A block of zero-initialised u32 that keeps its arena's region alive.
#[derive(Debug)]
pub struct ArenaBlock {
    _region: Arc<Region>,
    first: NonNull<u32>,
    len: usize,
}

impl Arena {
    /// A region of `bytes` bytes, zeroed: all of it is resident when this returns.
    ///
    /// Sizes come from a module's checked estimate; like every allocation, it aborts where memory is out.
    pub fn new(bytes: usize) -> Self {
        Arena {
            region: Arc::new(Region::new(bytes)),
            used: 0,
        }
    }

    /// Bytes that a block of `len` u32 takes in an arena.
    pub fn block_bytes(len: usize) -> Option<usize> {
        len.checked_mul(4)?
            .checked_next_multiple_of(BLOCK_ALIGN_BYTES)
    }

    /// Cuts the next block, of `len` u32.
    ///
    /// # Panics
    /// When the arena was made too small for it.
    pub fn block(&mut self, len: usize) -> ArenaBlock {
        let bytes = Self::block_bytes(len).expect("a block's size fits the address space");
        assert!(
            bytes <= self.region.layout.size() - self.used,
            "arena of {} bytes has {} left, and a block of {bytes} was asked for",
            self.region.layout.size(),
            self.region.layout.size() - self.used,
        );
        // SAFETY: `used` is within the region, by the assertion of this and earlier calls.
        let first = unsafe { self.region.first.add(self.used) };
        self.used += bytes;
        ArenaBlock {
            _region: Arc::clone(&self.region),
            first: first.cast(),
            len,
        }
    }

    /// Bytes cut so far.
    pub fn used_bytes(&self) -> usize {
        self.used
    }
}

impl Deref for ArenaBlock {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        // SAFETY: the block is this value's alone, aligned, initialised, and alive with the region.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.len) }
    }
}

impl DerefMut for ArenaBlock {
    fn deref_mut(&mut self) -> &mut [u32] {
        // SAFETY: as in `deref`, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.first.as_ptr(), self.len) }
    }
}

// SAFETY: a block is owned memory that no other value points into.
unsafe impl Send for ArenaBlock {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for ArenaBlock {}

#[derive(Debug)]
struct Region {
    first: NonNull<u8>,
    layout: Layout,
}

impl Region {
    fn new(bytes: usize) -> Self {
        let align = if bytes >= HUGE_PAGE_BYTES {
            HUGE_PAGE_BYTES
        } else {
            BLOCK_ALIGN_BYTES
        };
        let layout = Layout::from_size_align(bytes.max(BLOCK_ALIGN_BYTES), align)
            .expect("a region's size fits the address space");
        // Not `alloc_zeroed`: that would touch the pages before huge ones could be asked for.
        // SAFETY: the size is not zero.
        let Some(first) = NonNull::new(unsafe { alloc(layout) }) else {
            handle_alloc_error(layout);
        };
        ask_for_huge_pages(first, layout.size());
        // SAFETY: freshly allocated, of this size.
        unsafe { first.as_ptr().write_bytes(0, layout.size()) };
        Region { first, layout }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout; every block holds an `Arc` of the region.
        unsafe { dealloc(self.first.as_ptr(), self.layout) };
    }
}

// SAFETY: a region is only an address; access goes through blocks, which are disjoint.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

#[cfg(target_os = "linux")]
fn ask_for_huge_pages(first: NonNull<u8>, bytes: usize) {
    if bytes < HUGE_PAGE_BYTES {
        return;
    }
    // A refusal costs speed and nothing else.
    // SAFETY: the range is ours, and the advice changes no content.
    unsafe { libc::madvise(first.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn ask_for_huge_pages(_: NonNull<u8>, _: usize) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_aligned_zeroed_disjoint_and_outlive_the_arena() {
        let mut arena = Arena::new(3 * HUGE_PAGE_BYTES);
        let mut a = arena.block(5);
        let b = arena.block(1000);
        assert_eq!(arena.used_bytes(), 64 + 4032);
        drop(arena);
        a.fill(7);
        assert!(b.iter().all(|x| *x == 0));
        assert_eq!(b.as_ptr() as usize % 64, 0);
        assert_eq!(a.as_ptr() as usize % HUGE_PAGE_BYTES, 0);
    }

    #[test]
    #[should_panic(expected = "has 64 left")]
    fn a_block_too_many_is_refused() {
        let mut arena = Arena::new(128);
        let _first = arena.block(16);
        let _second = arena.block(17);
    }
}
