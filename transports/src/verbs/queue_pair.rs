//! Queue pairs: made, connected, moved from state to state; and the addresses that datagrams go to.

use std::ffi::c_int;
use std::{fmt, ptr};

use super::ffi::{self, qp_attr};
use super::{Access, CompletionQueue, Gid, Mtu, ProtectionDomain, VerbsError};

/// What a queue pair promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QueuePairKind {
    /// Reliable connection: in order, once, acknowledged. Everything works on it.
    Reliable = 2,
    /// Unreliable connection: SEND and WRITE, lost if lost.
    Unreliable = 3,
    /// Datagrams: SEND of one packet, to anybody.
    Datagram = 4,
}

/// State of a queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueuePairState {
    /// Nothing may be posted.
    Reset,
    /// Receives may be posted.
    Init,
    /// It takes messages.
    ReadyToReceive,
    /// It sends too.
    ReadyToSend,
    /// Broken: everything that is posted comes back flushed.
    Error,
    /// Draining, or broken on the sending side only.
    Other,
}

/// Sizes of a queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueuePairOptions {
    /// What it promises.
    pub kind: QueuePairKind,
    /// Sends that may wait.
    pub send_depth: u32,
    /// Receives that may wait.
    pub receive_depth: u32,
    /// Pieces of memory of a send.
    pub send_pieces: u32,
    /// Pieces of memory of a receive.
    pub receive_pieces: u32,
    /// Bytes that a send may carry in itself. The device may offer more, or refuse.
    pub inline_bytes: u32,
}

impl Default for QueuePairOptions {
    fn default() -> Self {
        Self {
            kind: QueuePairKind::Reliable,
            send_depth: 64,
            receive_depth: 64,
            send_pieces: 1,
            receive_pieces: 1,
            inline_bytes: 0,
        }
    }
}

/// The part of an address that is needed on Ethernet, and across InfiniBand subnets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GlobalRoute {
    /// The peer's GID.
    pub destination: Gid,
    /// Place of our own GID in the port's table; its kind chooses the protocol.
    pub source_index: u8,
    /// Traffic class: DSCP and ECN bits of RoCEv2's IP header.
    pub traffic_class: u8,
    /// Flow label, 20 bits: what switches spread flows by.
    pub flow_label: u32,
    /// Routers on the way.
    pub hop_limit: u8,
}

/// How a peer's port is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    /// Our port.
    pub port: u8,
    /// The peer's LID; 0 on Ethernet.
    pub lid: u16,
    /// Service level: which lane of the link.
    pub service_level: u8,
    /// Needed on Ethernet.
    pub route: Option<GlobalRoute>,
}

/// How hard a reliable connection tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reliability {
    /// An acknowledgement is waited for 4.096 us times 2 to this power; 0 waits for ever.
    pub timeout: u8,
    /// How often a packet that was not acknowledged is sent again, at most 7.
    pub retries: u8,
    /// How often a peer that has no receive waiting is asked again; 7 is for ever.
    pub not_ready_retries: u8,
    /// How long it asks to be left alone, as a code of the InfiniBand specification (12 is 0.64 ms).
    pub not_ready_timer: u8,
    /// READs under way, on both sides.
    pub reads: u8,
}

impl Default for Reliability {
    fn default() -> Self {
        Self {
            timeout: 14,
            retries: 7,
            not_ready_retries: 7,
            not_ready_timer: 12,
            reads: 1,
        }
    }
}

/// What a connected queue pair is connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// Number of the peer's queue pair, 24 bits.
    pub queue_pair: u32,
    /// The way to it.
    pub path: Path,
    /// Largest packets on that way; both sides must have the same.
    pub mtu: Mtu,
    /// Number of the first packet that comes, 24 bits.
    pub receive_psn: u32,
    /// Number of the first packet that goes, 24 bits.
    pub send_psn: u32,
    /// Of a reliable connection.
    pub reliability: Reliability,
}

/// A queue pair. Destroyed when dropped; what was posted then never completes.
pub struct QueuePair {
    qp: *mut ffi::Qp,
    kind: QueuePairKind,
    inline_bytes: u32,
    domain: ProtectionDomain,
    _completions: [CompletionQueue; 2],
}

// SAFETY: libibverbs locks each queue in every call.
unsafe impl Send for QueuePair {}
// SAFETY: as above.
unsafe impl Sync for QueuePair {}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // A failure is told by `destroy`, to those who ask.
        let _told = self.release();
    }
}

impl QueuePair {
    /// A queue pair in the state [`Reset`](QueuePairState::Reset). Sends are completed only if they ask for it.
    ///
    /// # Errors
    /// The device does not offer these sizes, or has no more queue pairs.
    pub fn new(
        domain: &ProtectionDomain,
        sends: &CompletionQueue,
        receives: &CompletionQueue,
        options: &QueuePairOptions,
    ) -> Result<Self, VerbsError> {
        let mut init = ffi::QpInitAttr {
            qp_context: ptr::null_mut(),
            send_cq: sends.raw(),
            recv_cq: receives.raw(),
            srq: ptr::null_mut(),
            cap: ffi::QpCap {
                max_send_wr: options.send_depth,
                max_recv_wr: options.receive_depth,
                max_send_sge: options.send_pieces,
                max_recv_sge: options.receive_pieces,
                max_inline_data: options.inline_bytes,
            },
            qp_type: options.kind as u32,
            sq_sig_all: 0,
        };
        let context = domain.context();
        // SAFETY: domain and completion queues are alive; `init` has the header's layout.
        let qp = unsafe { (context.library().create_qp)(domain.raw(), &mut init) };
        if qp.is_null() {
            let on = format!("{} with {options:?}", context.name());
            return Err(VerbsError::last("ibv_create_qp", on));
        }
        Ok(Self {
            qp,
            kind: options.kind,
            inline_bytes: init.cap.max_inline_data,
            domain: domain.clone(),
            _completions: [sends.clone(), receives.clone()],
        })
    }

    /// Destroys it, and says whether the device did: for those who must know that nothing is left.
    ///
    /// # Errors
    /// The device keeps it.
    pub fn destroy(mut self) -> Result<(), VerbsError> {
        let on = format!("{self:?}");
        match self.release() {
            0 => Ok(()),
            rc => Err(VerbsError::numbered("ibv_destroy_qp", on, rc)),
        }
    }

    fn release(&mut self) -> c_int {
        let qp = std::mem::replace(&mut self.qp, ptr::null_mut());
        if qp.is_null() {
            return 0;
        }
        // SAFETY: made once, destroyed once, as the handle is gone now; domain and completion queues are dropped after this. Events are acknowledged when they are taken,
        // so this does not wait.
        unsafe { (self.domain.context().library().destroy_qp)(qp) }
    }

    /// Its number, 24 bits: what peers name it by.
    pub fn number(&self) -> u32 {
        // SAFETY: the queue pair is alive.
        unsafe { (*self.qp).qp_num }
    }

    /// What it promises.
    pub fn kind(&self) -> QueuePairKind {
        self.kind
    }

    /// Bytes that a send may carry in itself.
    pub fn inline_bytes(&self) -> u32 {
        self.inline_bytes
    }

    pub(super) fn raw(&self) -> *mut ffi::Qp {
        self.qp
    }

    /// From reset to a state in which receives may be posted. `access` is what peers may do through it; `key` is the datagram key (others ignore it).
    ///
    /// # Errors
    /// The device refuses.
    pub fn initialize(&self, port: u8, access: Access, key: u32) -> Result<(), VerbsError> {
        let mut attr = attributes(ffi_state::INIT);
        attr.port_num = port;
        attr.qp_access_flags = access.bits() as u32;
        attr.qkey = key;
        let mut mask = qp_attr::STATE | qp_attr::PKEY_INDEX | qp_attr::PORT;
        mask |= match self.kind {
            QueuePairKind::Datagram => qp_attr::QKEY,
            _ => qp_attr::ACCESS_FLAGS,
        };
        self.modify(&mut attr, mask)
    }

    /// Connects an initialised reliable or unreliable queue pair: it takes messages and sends.
    ///
    /// # Errors
    /// A value is out of range, the peer's address does not resolve, or the device refuses.
    pub fn connect(&self, to: &Connection) -> Result<(), VerbsError> {
        for (what, value, max) in [
            (
                "the number of a queue pair",
                to.queue_pair.into(),
                0xff_ffff,
            ),
            (
                "the number of a packet",
                u64::from(to.receive_psn.max(to.send_psn)),
                0xff_ffff,
            ),
            ("the timeout", u64::from(to.reliability.timeout), 31),
            ("retries", u64::from(to.reliability.retries), 7),
            (
                "not-ready retries",
                u64::from(to.reliability.not_ready_retries),
                7,
            ),
            (
                "the not-ready timer",
                u64::from(to.reliability.not_ready_timer),
                31,
            ),
        ] {
            if value > max {
                return Err(VerbsError::Range { what, value, max });
            }
        }
        let reliable = self.kind == QueuePairKind::Reliable;
        let mut attr = attributes(ffi_state::READY_TO_RECEIVE);
        attr.ah_attr = address(&to.path)?;
        attr.path_mtu = to.mtu as u32;
        attr.dest_qp_num = to.queue_pair;
        attr.rq_psn = to.receive_psn;
        attr.max_dest_rd_atomic = to.reliability.reads;
        attr.min_rnr_timer = to.reliability.not_ready_timer;
        let mut mask =
            qp_attr::STATE | qp_attr::AV | qp_attr::PATH_MTU | qp_attr::DEST_QPN | qp_attr::RQ_PSN;
        if reliable {
            mask |= qp_attr::MAX_DEST_RD_ATOMIC | qp_attr::MIN_RNR_TIMER;
        }
        self.modify(&mut attr, mask)?;
        let mut attr = attributes(ffi_state::READY_TO_SEND);
        attr.sq_psn = to.send_psn;
        attr.timeout = to.reliability.timeout;
        attr.retry_cnt = to.reliability.retries;
        attr.rnr_retry = to.reliability.not_ready_retries;
        attr.max_rd_atomic = to.reliability.reads;
        let mut mask = qp_attr::STATE | qp_attr::SQ_PSN;
        if reliable {
            mask |= qp_attr::TIMEOUT
                | qp_attr::RETRY_CNT
                | qp_attr::RNR_RETRY
                | qp_attr::MAX_QP_RD_ATOMIC;
        }
        self.modify(&mut attr, mask)
    }

    /// Makes an initialised datagram queue pair take messages and send. `psn` numbers its first packet.
    ///
    /// # Errors
    /// The device refuses.
    pub fn open_datagrams(&self, psn: u32) -> Result<(), VerbsError> {
        self.modify(&mut attributes(ffi_state::READY_TO_RECEIVE), qp_attr::STATE)?;
        let mut attr = attributes(ffi_state::READY_TO_SEND);
        attr.sq_psn = psn & 0xff_ffff;
        self.modify(&mut attr, qp_attr::STATE | qp_attr::SQ_PSN)
    }

    /// Breaks it: everything that is posted comes back flushed.
    ///
    /// # Errors
    /// The device refuses.
    pub fn break_off(&self) -> Result<(), VerbsError> {
        self.modify(&mut attributes(ffi_state::ERROR), qp_attr::STATE)
    }

    /// Back to the beginning; what was posted is forgotten.
    ///
    /// # Errors
    /// The device refuses.
    pub fn reset(&self) -> Result<(), VerbsError> {
        self.modify(&mut attributes(ffi_state::RESET), qp_attr::STATE)
    }

    /// The state that the device has it in.
    ///
    /// # Errors
    /// The device does not answer.
    pub fn state(&self) -> Result<QueuePairState, VerbsError> {
        let mut attr = attributes(ffi_state::RESET);
        // SAFETY: plain numbers and pointers that are only written.
        let mut init: ffi::QpInitAttr = unsafe { std::mem::zeroed() };
        let context = self.domain.context();
        // SAFETY: the queue pair is alive; both structures have the header's layout.
        let rc =
            unsafe { (context.library().query_qp)(self.qp, &mut attr, qp_attr::STATE, &mut init) };
        if rc != 0 {
            let on = format!("{} queue pair {}", context.name(), self.number());
            return Err(VerbsError::numbered("ibv_query_qp", on, rc));
        }
        Ok(match attr.qp_state {
            ffi_state::RESET => QueuePairState::Reset,
            ffi_state::INIT => QueuePairState::Init,
            ffi_state::READY_TO_RECEIVE => QueuePairState::ReadyToReceive,
            ffi_state::READY_TO_SEND => QueuePairState::ReadyToSend,
            ffi_state::ERROR => QueuePairState::Error,
            _ => QueuePairState::Other,
        })
    }

    fn modify(&self, attr: &mut ffi::QpAttr, mask: c_int) -> Result<(), VerbsError> {
        let context = self.domain.context();
        // SAFETY: the queue pair is alive; `attr` has the header's layout.
        let rc = unsafe { (context.library().modify_qp)(self.qp, attr, mask) };
        if rc != 0 {
            let state = attr.qp_state;
            let on = format!(
                "{} queue pair {} to state {state}",
                context.name(),
                self.number()
            );
            return Err(VerbsError::numbered("ibv_modify_qp", on, rc));
        }
        Ok(())
    }
}

impl fmt::Debug for QueuePair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let context = self.domain.context();
        write!(f, "QueuePair({} {})", context.name(), self.number())
    }
}

/// `enum ibv_qp_state`.
mod ffi_state {
    pub(super) const RESET: u32 = 0;
    pub(super) const INIT: u32 = 1;
    pub(super) const READY_TO_RECEIVE: u32 = 2;
    pub(super) const READY_TO_SEND: u32 = 3;
    pub(super) const ERROR: u32 = 6;
}

fn attributes(state: u32) -> ffi::QpAttr {
    // SAFETY: plain numbers, for which zeroes are values.
    let mut attr: ffi::QpAttr = unsafe { std::mem::zeroed() };
    attr.qp_state = state;
    attr
}

fn address(path: &Path) -> Result<ffi::AhAttr, VerbsError> {
    let range = |what, value: u64, max| {
        if value > max {
            Err(VerbsError::Range { what, value, max })
        } else {
            Ok(())
        }
    };
    range("the service level", path.service_level.into(), 15)?;
    let mut grh = ffi::GlobalRoute {
        dgid: ffi::RawGidAligned([0; 16]),
        flow_label: 0,
        sgid_index: 0,
        hop_limit: 0,
        traffic_class: 0,
    };
    if let Some(route) = &path.route {
        range("the flow label", route.flow_label.into(), 0xf_ffff)?;
        grh.dgid.0 = route.destination.0;
        grh.flow_label = route.flow_label;
        grh.sgid_index = route.source_index;
        grh.hop_limit = route.hop_limit;
        grh.traffic_class = route.traffic_class;
    }
    Ok(ffi::AhAttr {
        grh,
        dlid: path.lid,
        sl: path.service_level,
        src_path_bits: 0,
        static_rate: 0,
        is_global: u8::from(path.route.is_some()),
        port_num: path.port,
    })
}

/// Where a datagram goes.
pub struct AddressHandle {
    pub(super) ah: *mut ffi::Ah,
    domain: ProtectionDomain,
}

// SAFETY: a handle that is only read after it was made.
unsafe impl Send for AddressHandle {}
// SAFETY: as above.
unsafe impl Sync for AddressHandle {}

impl AddressHandle {
    /// The end of `path`.
    ///
    /// # Errors
    /// A value is out of range, the address does not resolve, or the device refuses.
    pub fn new(domain: &ProtectionDomain, path: &Path) -> Result<Self, VerbsError> {
        let mut attr = address(path)?;
        let context = domain.context();
        // SAFETY: the domain is alive; `attr` has the header's layout.
        let ah = unsafe { (context.library().create_ah)(domain.raw(), &mut attr) };
        if ah.is_null() {
            return Err(VerbsError::last("ibv_create_ah", context.name()));
        }
        let domain = domain.clone();
        Ok(Self { ah, domain })
    }
}

impl Drop for AddressHandle {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once; the domain is dropped after this.
        unsafe { (self.domain.context().library().destroy_ah)(self.ah) };
    }
}
