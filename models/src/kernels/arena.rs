//! One aligned region for all weights of a module (or for a KV cache), in huge pages where the system gives them.
//!
//! Streaming weights from 4 KiB pages costs a third of the memory bandwidth or more, and an expert's matrix is too small for a
//! mapping of its own; so a module sums the sizes of what it will pack, makes one [`Arena`] and cuts blocks from it.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use memmap2::MmapMut;

use crate::crew::{Chunks, Member};

/// Size of a huge page on the machines we know.
const HUGE_PAGE_BYTES: usize = 2 << 20;
/// Size of the smallest page on any machine.
const PAGE_BYTES: usize = 4 << 10;
/// Blocks begin at multiples of this: a cache line.
const BLOCK_ALIGN_BYTES: usize = 64;

/// A region that blocks are cut from, front to back, and the crew that fills them; nothing goes back into it.
#[derive(Debug)]
pub struct Arena<'c> {
    region: Arc<Region>,
    used: usize,
    crew: &'c mut Member,
}

/// A block of zero-initialised u32 that keeps its arena's region alive.
#[derive(Debug)]
pub struct ArenaBlock {
    _region: Arc<Region>,
    first: NonNull<u32>,
    len: usize,
}

impl<'c> Arena<'c> {
    /// A region of `bytes` bytes, zeroed: all of it is resident when this returns.
    ///
    /// Sizes come from a module's checked estimate.
    ///
    /// # Panics
    /// When the system has no such memory.
    pub fn new(bytes: usize, crew: &'c mut Member) -> Self {
        Arena {
            region: Arc::new(Region::new(bytes, crew)),
            used: 0,
            crew,
        }
    }

    /// Who fills it.
    pub fn crew(&mut self) -> &mut Member {
        self.crew
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
            bytes <= self.region.bytes - self.used,
            "arena of {} bytes has {} left, and a block of {bytes} was asked for",
            self.region.bytes,
            self.region.bytes - self.used,
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
    bytes: usize,
    /// Keeps the memory; its content is only touched through `first`.
    _map: MmapMut,
}

impl Region {
    fn new(bytes: usize, crew: &mut Member) -> Self {
        let bytes = bytes
            .next_multiple_of(BLOCK_ALIGN_BYTES)
            .max(BLOCK_ALIGN_BYTES);
        let huge = bytes >= HUGE_PAGE_BYTES;
        #[cfg(all(test, unix))]
        if !huge {
            return Self::before_a_guard_page(bytes);
        }
        // A mapping of our own rather than the allocator's memory: the system zeroes it, and nobody has touched it before huge pages are asked for.
        let slack = if huge { HUGE_PAGE_BYTES } else { 0 };
        let mut map = MmapMut::map_anon(bytes + slack)
            .unwrap_or_else(|error| panic!("memory for {bytes} bytes of weights: {error}"));
        if huge {
            ask_for_huge_pages(&map);
        }
        let start = map.as_ptr().align_offset(if huge {
            HUGE_PAGE_BYTES
        } else {
            BLOCK_ALIGN_BYTES
        });
        let place = &mut map[start..start + bytes];
        crew.each(Chunks::new(place, HUGE_PAGE_BYTES), |_, chunk, _| {
            for page in chunk.chunks_mut(PAGE_BYTES) {
                page[0] = 0;
            }
        });
        let first = NonNull::from(place).cast();
        Region {
            first,
            bytes,
            _map: map,
        }
    }
}

#[cfg(all(test, unix))]
impl Region {
    /// A region that ends where a page begins that may not be touched: what reads beyond weights ends the test.
    fn before_a_guard_page(bytes: usize) -> Self {
        // SAFETY: a question.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        let end = bytes.next_multiple_of(page);
        let mut map = MmapMut::map_anon(end + page).expect("memory for a test");
        // SAFETY: the page is the mapping's last, and nothing points into it.
        unsafe {
            let guard = map.as_mut_ptr().add(end).cast();
            assert_eq!(libc::mprotect(guard, page, libc::PROT_NONE), 0);
        }
        let first = NonNull::from(&mut map[end - bytes..end]).cast();
        Region {
            first,
            bytes,
            _map: map,
        }
    }
}

// SAFETY: a region is only an address; access goes through blocks, which are disjoint.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

#[cfg(target_os = "linux")]
fn ask_for_huge_pages(map: &MmapMut) {
    // A refusal costs speed and nothing else.
    let _ = map.advise(memmap2::Advice::HugePage);
}

#[cfg(not(target_os = "linux"))]
fn ask_for_huge_pages(_: &MmapMut) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_aligned_zeroed_disjoint_and_outlive_the_arena() {
        let mut crew = Member::alone();
        let mut arena = Arena::new(3 * HUGE_PAGE_BYTES, &mut crew);
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
        let mut crew = Member::alone();
        let mut arena = Arena::new(128, &mut crew);
        let _first = arena.block(16);
        let _second = arena.block(17);
    }
}
