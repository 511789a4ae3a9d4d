//! Memory that a device may read and write.
//!
//! A region's bytes change under the feet of the program: by requests of its own, and by peers that have its key. So its content is never lent out by safe calls; they
//! copy. Whoever knows, by a protocol of its own, that nobody writes a part meanwhile may borrow it ([`MemoryRegion::bytes`], [`MemoryRegion::bytes_mut`]).

use std::ffi::c_int;
use std::marker::PhantomData;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

use super::{ProtectionDomain, VerbsError, ffi};

/// Huge pages are of this size on the machines that have RDMA.
const HUGE_PAGE: usize = 2 << 20;

/// Which pages a buffer is made of. Fewer pages are fewer translations for the device to keep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pages {
    /// Small ones, or huge ones where the system gives them by itself.
    #[default]
    Transparent,
    /// Reserved huge pages of 2 MiB; an error if there are not enough.
    Huge,
}

/// Memory from the system, zeroed, resident, on a page boundary, not inherited by children.
pub struct Buffer {
    start: NonNull<u8>,
    len: usize,
    mapped: usize,
}

// SAFETY: plain memory, owned.
unsafe impl Send for Buffer {}
// SAFETY: shared references give out nothing but the address.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// `len` bytes; at least one page is taken.
    ///
    /// # Errors
    /// The system has not enough, or not enough huge pages.
    pub fn new(len: usize, pages: Pages) -> Result<Self, VerbsError> {
        Self::placed(len, pages, None)
    }

    /// `len` bytes of the memory of one NUMA node, numbered from 0; at least one page is taken.
    ///
    /// # Errors
    /// There is no such node, or it has not enough.
    pub fn on_node(len: usize, pages: Pages, node: u8) -> Result<Self, VerbsError> {
        Self::placed(len, pages, Some(node))
    }

    fn placed(len: usize, pages: Pages, node: Option<u8>) -> Result<Self, VerbsError> {
        let huge_pages = pages == Pages::Huge;
        let failed = |error| VerbsError::Memory {
            bytes: len,
            huge_pages,
            error,
        };
        let unit = if huge_pages || len >= HUGE_PAGE {
            HUGE_PAGE
        } else {
            4096
        };
        let mapped = len
            .max(1)
            .checked_next_multiple_of(unit)
            .ok_or_else(|| failed(std::io::Error::from_raw_os_error(libc::ENOMEM)))?;
        let mut flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        if huge_pages {
            flags |= libc::MAP_HUGETLB;
        }
        // SAFETY: a new mapping, which touches nothing that exists.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(failed(std::io::Error::last_os_error()));
        }
        let start = NonNull::new(start.cast::<u8>())
            .ok_or_else(|| failed(std::io::Error::from_raw_os_error(libc::ENOMEM)))?;
        let buffer = Self { start, len, mapped };
        if let Some(node) = node {
            buffer.bind(node).map_err(failed)?;
        }
        // SAFETY: the mapping is ours and of that length. Advice may be refused without harm; every page is touched once, so that the first frame does not wait for it.
        unsafe {
            if !huge_pages {
                libc::madvise(start.as_ptr().cast(), mapped, libc::MADV_HUGEPAGE);
            }
            // A child would share the pages until either side writes them, and the device would then look at the wrong ones.
            libc::madvise(start.as_ptr().cast(), mapped, libc::MADV_DONTFORK);
            for at in (0..mapped).step_by(4096) {
                start.as_ptr().add(at).write_volatile(0);
            }
        }
        Ok(buffer)
    }

    /// Pages that are touched from now on come from this node.
    fn bind(&self, node: u8) -> std::io::Result<()> {
        /// `MPOL_BIND`: from these nodes or not at all.
        const BIND: c_int = 2;
        let mut nodes = [0u64; 4];
        nodes[usize::from(node) / 64] |= 1 << (node % 64);
        // SAFETY: the mapping is ours; the mask has 256 bits, of which the kernel reads one less than it is told.
        let rc = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                self.start.as_ptr(),
                self.mapped,
                BIND,
                nodes.as_ptr(),
                257usize,
                0usize,
            )
        };
        let error = std::io::Error::last_os_error();
        match rc {
            0 => Ok(()),
            // A kernel without NUMA has one node.
            _ if node == 0 && error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
            _ => Err(error),
        }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`; whoever registered it has deregistered it, see `MemoryRegion`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.mapped) };
    }
}

/// What may be done with a region beside reading it here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// The device may write it for requests made here (receives, reads).
    pub local_write: bool,
    /// Peers that have the key may write it. Needs `local_write`.
    pub remote_write: bool,
    /// Peers that have the key may read it.
    pub remote_read: bool,
}

impl Access {
    /// Peers may write.
    pub const REMOTE_WRITE: Self = Self {
        local_write: true,
        remote_write: true,
        remote_read: false,
    };
    /// Requests of this side only read it.
    pub const LOCAL_READ: Self = Self {
        local_write: false,
        remote_write: false,
        remote_read: false,
    };
    /// Everything.
    pub const ALL: Self = Self {
        local_write: true,
        remote_write: true,
        remote_read: true,
    };

    pub(super) fn bits(self) -> i32 {
        i32::from(self.local_write)
            | i32::from(self.remote_write) << 1
            | i32::from(self.remote_read) << 2
    }
}

/// Registered memory: pinned, and known to one device.
///
/// When it is dropped it is deregistered; requests that still name it then fail at the device.
pub struct MemoryRegion {
    mr: *mut ffi::Mr,
    start: NonNull<u8>,
    len: usize,
    domain: ProtectionDomain,
    /// Freed after the region is deregistered: fields are dropped after `drop`.
    _memory: Memory,
}

/// Whose memory a region is.
enum Memory {
    /// Ours; several regions, one for each device, may stand on one buffer.
    Buffer { _buffer: std::sync::Arc<Buffer> },
    /// Somebody else's.
    External,
}

// SAFETY: a handle and memory that only `unsafe` calls lend out.
unsafe impl Send for MemoryRegion {}
// SAFETY: as above.
unsafe impl Sync for MemoryRegion {}

impl MemoryRegion {
    /// Registers a buffer of ours. More than one region may be made of the same buffer, for several devices.
    ///
    /// # Errors
    /// The device or the limit on locked memory does not allow it.
    pub fn new(
        domain: &ProtectionDomain,
        buffer: &std::sync::Arc<Buffer>,
        access: Access,
    ) -> Result<Self, VerbsError> {
        let memory = Memory::Buffer {
            _buffer: std::sync::Arc::clone(buffer),
        };
        // SAFETY: the region keeps the buffer alive.
        unsafe { Self::register(domain, buffer.start, buffer.len, access, memory) }
    }

    /// Registers memory of somebody else: a mapping, or a GPU's where its driver offers peer memory.
    ///
    /// # Errors
    /// The device or the limit on locked memory does not allow it.
    ///
    /// # Safety
    /// `start` is the beginning of `len` bytes that stay mapped, and are used by nobody in a way that remote writes would break, until the region is dropped.
    pub unsafe fn external(
        domain: &ProtectionDomain,
        start: NonNull<u8>,
        len: usize,
        access: Access,
    ) -> Result<Self, VerbsError> {
        // SAFETY: the caller's promise.
        unsafe { Self::register(domain, start, len, access, Memory::External) }
    }

    /// Registers memory of another device by its DMA-BUF descriptor, from byte `offset` of it. `start` is the address that requests and peers name it by; the
    /// processor need not be able to read it there.
    ///
    /// # Errors
    /// libibverbs, the kernel or the device does not know DMA-BUF, or refuses.
    ///
    /// # Safety
    /// The memory behind the descriptor stays until the region is dropped. [`bytes`](Self::bytes) and its like, and inline requests, must not be used on it unless
    /// `start` is mapped.
    pub unsafe fn dmabuf(
        domain: &ProtectionDomain,
        fd: BorrowedFd<'_>,
        offset: u64,
        start: NonNull<u8>,
        len: usize,
        access: Access,
    ) -> Result<Self, VerbsError> {
        const CALL: &str = "ibv_reg_dmabuf_mr";
        let context = domain.context();
        let Some(register) = context.library().reg_dmabuf_mr else {
            return Err(VerbsError::numbered(CALL, context.name(), libc::ENOSYS));
        };
        let address = start.as_ptr().addr() as u64;
        // SAFETY: the domain is alive, the descriptor is borrowed, and the caller keeps the memory.
        let mr = unsafe {
            register(
                domain.raw(),
                offset,
                len,
                address,
                fd.as_raw_fd(),
                access.bits(),
            )
        };
        if mr.is_null() {
            return Err(VerbsError::last(CALL, context.name()));
        }
        Ok(Self {
            mr,
            start,
            len,
            domain: domain.clone(),
            _memory: Memory::External,
        })
    }

    /// # Safety
    /// The memory is there until the region is dropped, or `memory` keeps it.
    unsafe fn register(
        domain: &ProtectionDomain,
        start: NonNull<u8>,
        len: usize,
        access: Access,
        memory: Memory,
    ) -> Result<Self, VerbsError> {
        let library = domain.context().library();
        // SAFETY: the domain is alive, the memory is there.
        let mr =
            unsafe { (library.reg_mr)(domain.raw(), start.as_ptr().cast(), len, access.bits()) };
        if mr.is_null() {
            return Err(VerbsError::last("ibv_reg_mr", domain.context().name()));
        }
        Ok(Self {
            mr,
            start,
            len,
            domain: domain.clone(),
            _memory: memory,
        })
    }

    /// Deregisters it, and says whether the device did: for those who must know that nothing is left.
    ///
    /// # Errors
    /// The device keeps it.
    pub fn deregister(mut self) -> Result<(), VerbsError> {
        match self.release() {
            0 => Ok(()),
            rc => {
                let on = self.domain.context().name();
                Err(VerbsError::numbered("ibv_dereg_mr", on, rc))
            }
        }
    }

    fn release(&mut self) -> c_int {
        let mr = std::mem::replace(&mut self.mr, std::ptr::null_mut());
        if mr.is_null() {
            return 0;
        }
        // SAFETY: registered once, deregistered once, as the handle is gone now; the domain is dropped after this.
        unsafe { (self.domain.context().library().dereg_mr)(mr) }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address of its first byte, as peers name it.
    pub fn address(&self) -> u64 {
        self.start.as_ptr().addr() as u64
    }

    /// The key with which peers name it, as far as its access allows.
    pub fn remote_key(&self) -> u32 {
        // SAFETY: the region is registered.
        unsafe { (*self.mr).rkey }
    }

    /// A part of it, for a request.
    ///
    /// # Errors
    /// The part lies outside, or is longer than one request can name (4 GiB less one byte).
    pub fn piece(&self, part: Range<usize>) -> Result<Piece<'_>, VerbsError> {
        let start = self.check(&part)?;
        let len = part.len();
        let length = u32::try_from(len).map_err(|_| VerbsError::Range {
            what: "the length of a piece",
            value: len as u64,
            max: u32::MAX.into(),
        })?;
        Ok(Piece {
            sge: ffi::Sge {
                addr: start.addr() as u64,
                length,
                // SAFETY: the region is registered.
                lkey: unsafe { (*self.mr).lkey },
            },
            _region: PhantomData,
        })
    }

    /// Copies `from` to byte `at`.
    ///
    /// # Errors
    /// It does not fit.
    pub fn copy_in(&self, at: usize, from: &[u8]) -> Result<(), VerbsError> {
        let to = self.check(&(at..at.saturating_add(from.len())))?;
        // SAFETY: the part lies inside; the region's bytes are borrowed by nobody, see the module.
        unsafe { std::ptr::copy(from.as_ptr(), to, from.len()) };
        Ok(())
    }

    /// Copies what begins at byte `at` to `to`.
    ///
    /// # Errors
    /// There are not so many bytes.
    pub fn copy_out(&self, at: usize, to: &mut [u8]) -> Result<(), VerbsError> {
        let from = self.check(&(at..at.saturating_add(to.len())))?;
        // SAFETY: as above.
        unsafe { std::ptr::copy(from, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    /// A part of it, in place.
    ///
    /// # Panics
    /// The part lies outside.
    ///
    /// # Safety
    /// Nobody writes the part while it is borrowed: no request made here, no copy, no peer.
    pub unsafe fn bytes(&self, part: Range<usize>) -> &[u8] {
        let start = self.check(&part).expect("a part inside the region");
        // SAFETY: the part lies inside memory that lives as long as the region; the caller promises the rest.
        unsafe { std::slice::from_raw_parts(start, part.len()) }
    }

    /// A part of it, in place, to be written.
    ///
    /// # Panics
    /// The part lies outside.
    ///
    /// # Safety
    /// Nobody else reads or writes the part while it is borrowed: no request made here, no copy, no peer, no second borrow.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn bytes_mut(&self, part: Range<usize>) -> &mut [u8] {
        let start = self.check(&part).expect("a part inside the region");
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(start, part.len()) }
    }

    fn check(&self, part: &Range<usize>) -> Result<*mut u8, VerbsError> {
        if part.start > part.end || part.end > self.len {
            return Err(VerbsError::OutOfRegion {
                start: part.start,
                end: part.end,
                len: self.len,
            });
        }
        // SAFETY: `start` lies inside or at the end.
        Ok(unsafe { self.start.as_ptr().add(part.start) })
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        // A failure is told by `deregister`, to those who ask.
        let _told = self.release();
    }
}

/// A part of a region, as requests name it.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Piece<'region> {
    pub(super) sge: ffi::Sge,
    _region: PhantomData<&'region MemoryRegion>,
}

impl Piece<'_> {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.sge.length as usize
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.sge.length == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_there_and_huge_pages_are_refused_where_there_are_none() {
        for len in [0, 1, 4096, 5 << 20] {
            let buffer = Buffer::new(len, Pages::Transparent).unwrap();
            assert_eq!(
                (buffer.len(), buffer.start.as_ptr().addr() % 4096),
                (len, 0)
            );
            // SAFETY: at least one page is mapped.
            assert_eq!(unsafe { buffer.start.as_ptr().read() }, 0);
        }
        if let Err(error) = Buffer::new(1 << 45, Pages::Huge) {
            assert!(error.to_string().contains("vm.nr_hugepages"), "{error}");
        }
        assert!(Buffer::new(usize::MAX, Pages::Transparent).is_err());
        let near = Buffer::on_node(8192, Pages::Transparent, 0);
        // Where a container forbids `mbind` there is nothing to see.
        assert!(near.is_ok() || near.is_err_and(|e| e.to_string().contains("not permitted")));
        assert!(Buffer::on_node(8192, Pages::Transparent, 255).is_err());
    }

    #[test]
    fn access_is_the_headers_bits() {
        assert_eq!(Access::LOCAL_READ.bits(), 0);
        assert_eq!(Access::REMOTE_WRITE.bits(), 3);
        assert_eq!(Access::ALL.bits(), 7);
    }
}
