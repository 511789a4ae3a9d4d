//! Requests: what is sent and where it goes. Built on the stack, chained, and handed to the device with one doorbell for each batch; nothing is allocated. Whoever
//! cares how many requests a doorbell hands over brings room for them ([`Doorbell`]).

use std::ptr;

use super::ffi::{self, opcode, send_flag};
use super::{AddressHandle, Piece, QueuePair};

/// Requests that one doorbell hands over.
const BATCH: usize = 16;

/// Memory of a peer, as the peer named it. The device checks it at the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteMemory {
    /// Address of the first byte.
    pub address: u64,
    /// The region's key.
    pub key: u32,
}

/// What a request does.
#[derive(Clone, Copy)]
pub enum Operation<'a> {
    /// Into a receive of the peer.
    Send {
        /// What comes with it.
        immediate: Option<u32>,
    },
    /// Into memory of the peer. With an immediate it takes one of the peer's receives, which completes when everything is there.
    Write {
        /// Where to.
        to: RemoteMemory,
        /// What comes with it.
        immediate: Option<u32>,
    },
    /// From memory of the peer.
    Read {
        /// Where from.
        from: RemoteMemory,
    },
    /// A datagram.
    Datagram {
        /// Which port.
        to: &'a AddressHandle,
        /// Which queue pair there.
        queue_pair: u32,
        /// Its key.
        key: u32,
        /// What comes with it.
        immediate: Option<u32>,
    },
}

/// A request of the sending side.
#[derive(Clone, Copy)]
pub struct SendRequest<'a> {
    /// Comes back with the completion.
    pub id: u64,
    /// What it does.
    pub operation: Operation<'a>,
    /// The memory here that is read (or, by a READ, written), in this order.
    pub pieces: &'a [Piece<'a>],
    /// Whether success is told. Failure always is. A request's place in the queue is free only after it, or a later one, was told.
    pub signalled: bool,
    /// Whether the bytes travel in the request: read by the processor now, so the memory is free at once. Not longer than [`QueuePair::inline_bytes`].
    pub inline: bool,
    /// Whether it waits for READs before it.
    pub fence: bool,
    /// Whether it wakes a peer that waits for such only.
    pub solicited: bool,
}

/// A receive: takes one message, or one immediate.
#[derive(Clone, Copy)]
pub struct Receive<'a> {
    /// Comes back with the completion.
    pub id: u64,
    /// The memory that is written, in this order; none for immediates of WRITEs.
    pub pieces: &'a [Piece<'a>],
}

/// Room in which [`QueuePair::ring`] chains requests. It grows to the longest batch and is used again.
#[derive(Default)]
pub struct Doorbell(Vec<ffi::SendWr>);

/// A batch was not taken whole.
#[derive(Debug, thiserror::Error)]
#[error("{queue_pair} took {taken} of {asked} requests: {error}")]
pub struct PostError {
    /// The queue pair.
    pub queue_pair: String,
    /// How many were taken; these go their way.
    pub taken: usize,
    /// How many were given.
    pub asked: usize,
    /// What the device says; `ENOMEM` is a full queue.
    pub error: std::io::Error,
}

impl PostError {
    /// Whether the queue is full: later it may go.
    pub fn is_full(&self) -> bool {
        self.error.raw_os_error() == Some(libc::ENOMEM)
    }
}

impl QueuePair {
    /// Hands requests over, in order, with one doorbell for every 16.
    ///
    /// # Errors
    /// Not all were taken; those that were go their way.
    pub fn post(&self, requests: &[SendRequest<'_>]) -> Result<(), PostError> {
        let mut taken = 0;
        for batch in requests.chunks(BATCH) {
            let mut list = [ffi::SendWr::EMPTY; BATCH];
            for (slot, request) in list.iter_mut().zip(batch) {
                *slot = send(request);
            }
            let base = list.as_mut_ptr();
            for at in 1..batch.len() {
                // SAFETY: both lie in the list.
                unsafe { (*base.add(at - 1)).next = base.add(at) };
            }
            let mut bad = ptr::null_mut();
            // SAFETY: the queue pair is alive; the list and its pieces live through the call, which copies what it keeps. The memory behind pieces is registered: see
            // `Piece` for the call, and `MemoryRegion` for the time after.
            let rc = unsafe {
                let post = (*(*self.raw()).context).ops.post_send;
                post(self.raw(), base, &mut bad)
            };
            if rc != 0 {
                let before = (0..batch.len())
                    // SAFETY: within the list.
                    .find(|&at| ptr::eq(unsafe { base.add(at) }, bad))
                    .unwrap_or(0);
                return Err(self.refused(taken + before, requests.len(), rc));
            }
            taken += batch.len();
        }
        Ok(())
    }

    /// Hands requests over, in order, with one doorbell for all.
    ///
    /// # Errors
    /// Not all were taken; those that were go their way.
    pub fn ring<'a>(
        &self,
        bell: &mut Doorbell,
        requests: impl IntoIterator<Item = SendRequest<'a>>,
    ) -> Result<(), PostError> {
        bell.0.clear();
        bell.0
            .extend(requests.into_iter().map(|request| send(&request)));
        let count = bell.0.len();
        let base = bell.0.as_mut_ptr();
        for at in 1..count {
            // SAFETY: both lie in the list, which grows no more.
            unsafe { (*base.add(at - 1)).next = base.add(at) };
        }
        if count == 0 {
            return Ok(());
        }
        let mut bad = ptr::null_mut();
        // SAFETY: as in `post`; pieces outlive the requests, which were borrowed for longer than this call.
        let rc = unsafe {
            let post = (*(*self.raw()).context).ops.post_send;
            post(self.raw(), base, &mut bad)
        };
        if rc == 0 {
            return Ok(());
        }
        let taken = (0..count)
            // SAFETY: within the list.
            .find(|&at| ptr::eq(unsafe { base.add(at) }, bad))
            .unwrap_or(0);
        Err(self.refused(taken, count, rc))
    }

    /// Lays receives out, in order, with one doorbell for every 16.
    ///
    /// # Errors
    /// Not all were taken; those that were wait for messages.
    pub fn post_receives<'a>(
        &self,
        receives: impl IntoIterator<Item = Receive<'a>>,
    ) -> Result<(), PostError> {
        const EMPTY: ffi::RecvWr = ffi::RecvWr {
            wr_id: 0,
            next: ptr::null_mut(),
            sg_list: ptr::null_mut(),
            num_sge: 0,
        };
        let mut receives = receives.into_iter();
        let mut taken = 0;
        loop {
            let mut list = [EMPTY; BATCH];
            let base = list.as_mut_ptr();
            let mut count = 0;
            for receive in receives.by_ref().take(BATCH) {
                // SAFETY: `count` is below BATCH, and so are both places.
                unsafe {
                    *base.add(count) = ffi::RecvWr {
                        wr_id: receive.id,
                        next: ptr::null_mut(),
                        sg_list: receive.pieces.as_ptr().cast::<ffi::Sge>().cast_mut(),
                        num_sge: receive.pieces.len() as i32,
                    };
                    if count > 0 {
                        (*base.add(count - 1)).next = base.add(count);
                    }
                }
                count += 1;
            }
            if count == 0 {
                return Ok(());
            }
            let mut bad = ptr::null_mut();
            // SAFETY: as for sends.
            let rc = unsafe {
                let post = (*(*self.raw()).context).ops.post_recv;
                post(self.raw(), base, &mut bad)
            };
            if rc != 0 {
                let before = (0..count)
                    // SAFETY: within the list.
                    .find(|&at| ptr::eq(unsafe { base.add(at) }, bad))
                    .unwrap_or(0);
                return Err(self.refused(taken + before, taken + count, rc));
            }
            taken += count;
        }
    }

    #[cold]
    fn refused(&self, taken: usize, asked: usize, rc: i32) -> PostError {
        PostError {
            queue_pair: format!("{self:?}"),
            taken,
            asked,
            error: std::io::Error::from_raw_os_error(rc.abs()),
        }
    }
}

/// The device's form of a request. Its pieces are pointed to, not copied.
fn send(request: &SendRequest<'_>) -> ffi::SendWr {
    let mut wr = ffi::SendWr::EMPTY;
    wr.wr_id = request.id;
    // `Piece` is a scatter-gather entry and nothing else; the library only reads it.
    wr.sg_list = request.pieces.as_ptr().cast::<ffi::Sge>().cast_mut();
    wr.num_sge = request.pieces.len() as i32;
    for (wanted, flag) in [
        (request.signalled, send_flag::SIGNALED),
        (request.inline, send_flag::INLINE),
        (request.fence, send_flag::FENCE),
        (request.solicited, send_flag::SOLICITED),
    ] {
        if wanted {
            wr.send_flags |= flag;
        }
    }
    let immediate = match request.operation {
        Operation::Send { immediate } => {
            wr.opcode = opcode::SEND;
            immediate
        }
        Operation::Write { to, immediate } => {
            wr.opcode = opcode::RDMA_WRITE;
            wr.wr.rdma = ffi::RdmaTarget {
                remote_addr: to.address,
                rkey: to.key,
            };
            immediate
        }
        Operation::Read { from } => {
            wr.opcode = opcode::RDMA_READ;
            wr.wr.rdma = ffi::RdmaTarget {
                remote_addr: from.address,
                rkey: from.key,
            };
            None
        }
        Operation::Datagram {
            to,
            queue_pair,
            key,
            immediate,
        } => {
            wr.opcode = opcode::SEND;
            wr.wr.ud = ffi::UdTarget {
                ah: to.ah,
                remote_qpn: queue_pair,
                remote_qkey: key,
            };
            immediate
        }
    };
    if let Some(immediate) = immediate {
        // Each operation's form with an immediate is the next one.
        wr.opcode += 1;
        wr.imm_data = immediate.to_be();
    }
    wr
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_becomes_what_the_device_reads() {
        let to = RemoteMemory {
            address: 0x1000,
            key: 7,
        };
        let mut request = SendRequest {
            id: 5,
            operation: Operation::Write {
                to,
                immediate: Some(0x0102_0304),
            },
            pieces: &[],
            signalled: true,
            inline: true,
            fence: false,
            solicited: false,
        };
        let wr = send(&request);
        assert_eq!(wr.opcode, opcode::RDMA_WRITE_WITH_IMM);
        assert_eq!(wr.imm_data.to_ne_bytes(), [1, 2, 3, 4]);
        assert_eq!(wr.send_flags, send_flag::SIGNALED | send_flag::INLINE);
        // SAFETY: what was just written.
        let target = unsafe { wr.wr.rdma };
        assert_eq!((target.remote_addr, target.rkey), (0x1000, 7));
        request.operation = Operation::Send { immediate: Some(1) };
        assert_eq!(send(&request).opcode, opcode::SEND_WITH_IMM);
        request.operation = Operation::Send { immediate: None };
        assert_eq!(send(&request).opcode, opcode::SEND);
        request.operation = Operation::Read { from: to };
        assert_eq!(send(&request).opcode, opcode::RDMA_READ);
    }
}
