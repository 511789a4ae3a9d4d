//! Where a device says which requests are done.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::{fmt, ptr};

use super::context::set_nonblocking;
use super::{Context, VerbsError, ffi};

/// A descriptor that becomes readable when an armed completion queue has something. Clones are the same.
#[derive(Clone)]
pub struct CompletionChannel(Arc<Channel>);

struct Channel {
    channel: *mut ffi::CompChannel,
    context: Context,
}

// SAFETY: a descriptor and a count that libibverbs guards.
unsafe impl Send for Channel {}
// SAFETY: as above.
unsafe impl Sync for Channel {}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: queues that use the channel held a reference to this, so they are gone.
        unsafe { (self.context.library().destroy_comp_channel)(self.channel) };
    }
}

impl CompletionChannel {
    /// A channel that never blocks.
    ///
    /// # Errors
    /// The device refuses.
    pub fn new(context: &Context) -> Result<Self, VerbsError> {
        // SAFETY: the context is open.
        let channel = unsafe { (context.library().create_comp_channel)(context.raw()) };
        if channel.is_null() {
            return Err(VerbsError::last("ibv_create_comp_channel", context.name()));
        }
        let context = context.clone();
        let this = Self(Arc::new(Channel { channel, context }));
        // SAFETY: the channel's own descriptor, open as long as it is.
        let fd = unsafe { BorrowedFd::borrow_raw(this.as_raw_fd()) };
        set_nonblocking(fd).map_err(|error| VerbsError::Call {
            call: "fcntl",
            on: format!("completion channel of {}", this.0.context.name()),
            error,
        })?;
        Ok(this)
    }

    /// Takes all events that are there, so that the descriptor is not readable any more; returns how many. Queues must be armed again.
    pub fn drain(&self) -> usize {
        let library = self.0.context.library();
        let mut taken = 0;
        loop {
            let (mut cq, mut user) = (ptr::null_mut(), ptr::null_mut());
            // SAFETY: the channel is alive and does not block; a queue is not destroyed before its events are acknowledged.
            unsafe {
                if (library.get_cq_event)(self.0.channel, &mut cq, &mut user) != 0 {
                    return taken;
                }
                (library.ack_cq_events)(cq, 1);
            }
            taken += 1;
        }
    }
}

impl AsRawFd for CompletionChannel {
    fn as_raw_fd(&self) -> RawFd {
        // SAFETY: the channel is alive.
        unsafe { (*self.0.channel).fd }
    }
}

/// A queue of completions. Clones are the same.
#[derive(Clone)]
pub struct CompletionQueue(Arc<Queue>);

struct Queue {
    cq: *mut ffi::Cq,
    context: Context,
    _channel: Option<CompletionChannel>,
}

// SAFETY: libibverbs locks a queue in every call.
unsafe impl Send for Queue {}
// SAFETY: as above.
unsafe impl Sync for Queue {}

impl Drop for Queue {
    fn drop(&mut self) {
        // A failure is told by `destroy`, to those who ask.
        let _told = self.release();
    }
}

impl Queue {
    fn release(&mut self) -> i32 {
        let cq = std::mem::replace(&mut self.cq, ptr::null_mut());
        if cq.is_null() {
            return 0;
        }
        // SAFETY: the handle is gone now, so it is destroyed once; queue pairs that use it held a reference to this, so they are gone; events were acknowledged when they
        // were taken.
        unsafe { (self.context.library().destroy_cq)(cq) }
    }
}

impl CompletionQueue {
    /// A queue of at least `depth` entries. More completions than that at once break it: size it for all requests of all queue pairs that use it.
    ///
    /// # Errors
    /// The device refuses.
    pub fn new(
        context: &Context,
        depth: u32,
        channel: Option<&CompletionChannel>,
    ) -> Result<Self, VerbsError> {
        let depth = i32::try_from(depth).map_err(|_| VerbsError::Range {
            what: "the depth of a completion queue",
            value: depth.into(),
            max: i32::MAX as u64,
        })?;
        let raw_channel = channel.map_or(ptr::null_mut(), |channel| channel.0.channel);
        // SAFETY: the context is open, the channel is alive or null.
        let cq = unsafe {
            (context.library().create_cq)(context.raw(), depth, ptr::null_mut(), raw_channel, 0)
        };
        if cq.is_null() {
            let on = format!("{} for {depth} entries", context.name());
            return Err(VerbsError::last("ibv_create_cq", on));
        }
        Ok(Self(Arc::new(Queue {
            cq,
            context: context.clone(),
            _channel: channel.cloned(),
        })))
    }

    /// Destroys it, if this is the last of its clones and no queue pair uses it, and says whether the device did: for those who must know that nothing is left.
    ///
    /// # Errors
    /// The device keeps it, or somebody uses it still; then it goes with its last user.
    pub fn destroy(self) -> Result<(), VerbsError> {
        let name = self.0.context.name().to_owned();
        let rc = Arc::into_inner(self.0).map_or(libc::EBUSY, |mut queue| queue.release());
        match rc {
            0 => Ok(()),
            rc => Err(VerbsError::numbered("ibv_destroy_cq", name, rc)),
        }
    }

    pub(super) fn raw(&self) -> *mut ffi::Cq {
        self.0.cq
    }

    /// Takes completions that are there, as many as `into` has room for; returns them. Never blocks, never allocates.
    ///
    /// # Errors
    /// The queue has overflowed or the device is gone.
    pub fn poll<'into>(
        &self,
        into: &'into mut [Completion],
    ) -> Result<&'into [Completion], VerbsError> {
        let room = i32::try_from(into.len()).unwrap_or(i32::MAX);
        // SAFETY: the queue is alive; `Completion` is a work completion and nothing else, and `into` has `room` of them.
        let found = unsafe {
            let poll = (*(*self.0.cq).context).ops.poll_cq;
            poll(self.0.cq, room, into.as_mut_ptr().cast::<ffi::Wc>())
        };
        match usize::try_from(found) {
            Ok(found) => Ok(&into[..found]),
            Err(_) => Err(VerbsError::numbered(
                "ibv_poll_cq",
                self.0.context.name(),
                found,
            )),
        }
    }

    /// Asks for one event on the channel with the next completion. Completions that are there already may not count: poll once more after this.
    ///
    /// # Errors
    /// The device refuses.
    pub fn arm(&self) -> Result<(), VerbsError> {
        // SAFETY: the queue is alive.
        let rc = unsafe {
            let arm = (*(*self.0.cq).context).ops.req_notify_cq;
            arm(self.0.cq, 0)
        };
        if rc != 0 {
            let name = self.0.context.name();
            return Err(VerbsError::numbered("ibv_req_notify_cq", name, rc));
        }
        Ok(())
    }
}

/// What a request did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompletionKind {
    /// A SEND is with the peer.
    Send,
    /// A WRITE is with the peer.
    Write,
    /// A READ has come.
    Read,
    /// A receive took a SEND.
    Receive,
    /// A receive took the immediate of a WRITE.
    ReceiveWrite,
    /// Anything else.
    Other,
}

/// How a request ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct CompletionStatus(u32);

impl CompletionStatus {
    /// It did what was asked.
    pub const SUCCESS: Self = Self(0);
    /// The queue pair broke before its turn came.
    pub const FLUSHED: Self = Self(5);
    /// The peer does not allow it: a wrong key, or outside of its region.
    pub const REMOTE_ACCESS: Self = Self(10);
    /// The peer did not acknowledge, however often it was sent.
    pub const RETRIES_EXCEEDED: Self = Self(12);
    /// The peer had no receive waiting, however often it was sent.
    pub const NOT_READY_EXCEEDED: Self = Self(13);
}

impl fmt::Display for CompletionStatus {
    /// As libibverbs calls it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match super::library::Library::get() {
            Ok(library) => {
                // SAFETY: the call returns a string of the library for every number.
                let text = unsafe { CStr::from_ptr((library.wc_status_str)(self.0)) };
                f.write_str(&text.to_string_lossy())
            }
            Err(_) => write!(f, "status {}", self.0),
        }
    }
}

impl fmt::Debug for CompletionStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One entry of a completion queue.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Completion(ffi::Wc);

impl Completion {
    /// What [`CompletionQueue::poll`] is given room with.
    pub const EMPTY: Self = Self(ffi::Wc {
        wr_id: 0,
        status: 0,
        opcode: 0,
        vendor_err: 0,
        byte_len: 0,
        imm_data: 0,
        qp_num: 0,
        src_qp: 0,
        wc_flags: 0,
        pkey_index: 0,
        slid: 0,
        sl: 0,
        dlid_path_bits: 0,
    });

    /// The number that the request was given.
    pub fn id(&self) -> u64 {
        self.0.wr_id
    }

    /// How it ended.
    pub fn status(&self) -> CompletionStatus {
        CompletionStatus(self.0.status)
    }

    /// What it did. Defined only for success.
    pub fn kind(&self) -> CompletionKind {
        match self.0.opcode {
            0 => CompletionKind::Send,
            1 => CompletionKind::Write,
            2 => CompletionKind::Read,
            128 => CompletionKind::Receive,
            129 => CompletionKind::ReceiveWrite,
            _ => CompletionKind::Other,
        }
    }

    /// Bytes that came. On datagrams, with the 40 bytes of the header before them.
    pub fn len(&self) -> usize {
        self.0.byte_len as usize
    }

    /// Whether nothing came but the completion.
    pub fn is_empty(&self) -> bool {
        self.0.byte_len == 0
    }

    /// The immediate that came with it.
    pub fn immediate(&self) -> Option<u32> {
        (self.0.wc_flags & ffi::WC_WITH_IMM != 0).then(|| u32::from_be(self.0.imm_data))
    }

    /// Number of the local queue pair.
    pub fn queue_pair(&self) -> u32 {
        self.0.qp_num
    }

    /// Number of the remote queue pair, on datagrams.
    pub fn source(&self) -> u32 {
        self.0.src_qp
    }

    /// The vendor's own code of an error.
    pub fn vendor_error(&self) -> u32 {
        self.0.vendor_err
    }
}

impl fmt::Debug for Completion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Completion")
            .field("id", &self.id())
            .field("status", &self.status())
            .field("kind", &self.kind())
            .field("queue_pair", &self.queue_pair())
            .finish_non_exhaustive()
    }
}
