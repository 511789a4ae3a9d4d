//! An open device: its limits, ports, addresses and events, and the domain that its resources belong to.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use super::event::{self, AsyncEvent};
use super::library::Library;
use super::{VerbsError, ffi};

/// An open device. Clones are the same.
#[derive(Clone)]
pub struct Context(pub(super) Arc<Open>);

pub(super) struct Open {
    pub(super) library: &'static Library,
    pub(super) context: *mut ffi::Context,
    name: String,
}

// SAFETY: libibverbs locks what it shares between calls on one context.
unsafe impl Send for Open {}
// SAFETY: as above.
unsafe impl Sync for Open {}

impl Drop for Open {
    fn drop(&mut self) {
        // SAFETY: everything made from the context held a reference to this, so it is gone.
        unsafe { (self.library.close_device)(self.context) };
    }
}

/// What a device can do at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceLimits {
    /// Queue pairs.
    pub queue_pairs: u32,
    /// Requests that wait in one queue of a pair.
    pub queue_depth: u32,
    /// Pieces of memory of one request.
    pub pieces: u32,
    /// Completion queues.
    pub completion_queues: u32,
    /// Entries of one completion queue.
    pub completions: u32,
    /// Memory regions.
    pub regions: u32,
    /// Bytes of one region.
    pub region_bytes: u64,
    /// READs under way on one queue pair, as their target.
    pub reads_served: u8,
    /// READs under way on one queue pair, as their origin.
    pub reads_made: u8,
    /// Ports, numbered from 1.
    pub ports: u8,
}

/// Bytes of payload in one packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mtu {
    /// 256 bytes.
    B256 = 1,
    /// 512 bytes.
    B512,
    /// 1024 bytes.
    B1024,
    /// 2048 bytes.
    B2048,
    /// 4096 bytes.
    B4096,
}

impl Mtu {
    /// In bytes.
    pub const fn bytes(self) -> u32 {
        128 << self as u32
    }

    /// The one of so many bytes.
    pub fn from_bytes(bytes: u32) -> Option<Self> {
        let all = [
            Self::B256,
            Self::B512,
            Self::B1024,
            Self::B2048,
            Self::B4096,
        ];
        all.into_iter().find(|mtu| mtu.bytes() == bytes)
    }

    pub(super) fn from_raw(raw: u32) -> Option<Self> {
        raw.checked_sub(1)
            .and_then(|n| Self::from_bytes(256_u32.checked_shl(n)?))
    }
}

/// What a port's link is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkLayer {
    /// InfiniBand: peers are reached by LID.
    Infiniband,
    /// Ethernet (RoCE, iWARP): peers are reached by GID.
    Ethernet,
}

/// Whether a port carries traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortState {
    /// It does.
    Active,
    /// Its link is down, or not yet up.
    Down,
}

/// A port of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port {
    /// Whether it carries traffic.
    pub state: PortState,
    /// The largest packets it sends now.
    pub mtu: Mtu,
    /// What its link is.
    pub link: LinkLayer,
    /// Its address in an InfiniBand subnet; 0 on Ethernet.
    pub lid: u16,
    /// Bytes of the longest message.
    pub message_bytes: u32,
}

/// A global address of a port, in network order.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Gid(pub [u8; 16]);

impl Gid {
    /// The IPv4 address in it, if it is one.
    pub fn ipv4(&self) -> Option<Ipv4Addr> {
        Ipv6Addr::from(self.0).to_ipv4_mapped()
    }

    /// Whether it reaches no farther than the link.
    pub fn is_link_local(&self) -> bool {
        self.0[0] == 0xfe && self.0[1] & 0xc0 == 0x80
    }
}

impl fmt::Display for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ipv4() {
            Some(ipv4) => write!(f, "{ipv4}"),
            None => write!(f, "{}", Ipv6Addr::from(self.0)),
        }
    }
}

impl fmt::Debug for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// By which protocol a GID is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GidKind {
    /// InfiniBand.
    Infiniband,
    /// RoCE version 1: Ethernet frames, not routed.
    RoceV1,
    /// RoCE version 2: UDP.
    RoceV2,
}

/// One row of a device's address table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GidEntry {
    /// The address.
    pub gid: Gid,
    /// Its place in the port's table.
    pub index: u8,
    /// The port.
    pub port: u8,
    /// How it is reached.
    pub kind: GidKind,
}

impl GidEntry {
    /// The row of a port's table that reaches farthest: RoCEv2 with an address that is routed, else RoCEv2, else RoCEv1; on InfiniBand the first.
    pub fn best(rows: &[GidEntry], port: u8) -> Option<GidEntry> {
        let rows = rows.iter().filter(|row| row.port == port);
        rows.min_by_key(|row| {
            let kind = match row.kind {
                GidKind::Infiniband => 0,
                GidKind::RoceV2 => 1,
                GidKind::RoceV1 => 2,
            };
            // Of two that serve alike, what people gave the host: IPv4 first.
            (
                kind,
                row.gid.is_link_local(),
                row.gid.ipv4().is_none(),
                row.index,
            )
        })
        .copied()
    }
}

impl Context {
    /// Takes over an open device.
    ///
    /// # Safety
    /// `context` came from `library.open_device` and nobody else closes it.
    pub(super) unsafe fn from_raw(
        library: &'static Library,
        context: *mut ffi::Context,
        name: &str,
    ) -> Result<Self, VerbsError> {
        let open = Self(Arc::new(Open {
            library,
            context,
            name: name.to_owned(),
        }));
        // SAFETY: the context is open, and its descriptor is its own.
        let events = unsafe { BorrowedFd::borrow_raw((*context).async_fd) };
        set_nonblocking(events).map_err(|error| VerbsError::Call {
            call: "fcntl",
            on: format!("events of {name}"),
            error,
        })?;
        Ok(open)
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    pub(super) fn raw(&self) -> *mut ffi::Context {
        self.0.context
    }

    pub(super) fn library(&self) -> &'static Library {
        self.0.library
    }

    /// Whether it is an iWARP device: those connect through rdmacm only and know no WRITE WITH IMMEDIATE.
    pub fn is_iwarp(&self) -> bool {
        // SAFETY: an open context has a device.
        unsafe { (*(*self.0.context).device).transport_type == ffi::TRANSPORT_IWARP }
    }

    /// How many completion vectors (interrupts) it has.
    pub fn completion_vectors(&self) -> u32 {
        // SAFETY: the context is open; the field is set when it is opened.
        let vectors = unsafe { (*self.0.context).num_comp_vectors };
        u32::try_from(vectors).unwrap_or(1).max(1)
    }

    /// What it can do at most.
    ///
    /// # Errors
    /// The device does not answer.
    pub fn limits(&self) -> Result<DeviceLimits, VerbsError> {
        // SAFETY: plain numbers, for which zeroes are values.
        let mut attr: ffi::DeviceAttr = unsafe { std::mem::zeroed() };
        // SAFETY: the context is open and `attr` has the header's layout.
        let rc = unsafe { (self.library().query_device)(self.raw(), &mut attr) };
        if rc != 0 {
            return Err(VerbsError::numbered("ibv_query_device", self.name(), rc));
        }
        let count = |number: i32| u32::try_from(number).unwrap_or(0);
        let byte = |number: i32| u8::try_from(number.clamp(0, 255)).unwrap_or(0);
        Ok(DeviceLimits {
            queue_pairs: count(attr.max_qp),
            queue_depth: count(attr.max_qp_wr),
            pieces: count(attr.max_sge),
            completion_queues: count(attr.max_cq),
            completions: count(attr.max_cqe),
            regions: count(attr.max_mr),
            region_bytes: attr.max_mr_size,
            reads_served: byte(attr.max_qp_rd_atom),
            reads_made: byte(attr.max_qp_init_rd_atom),
            ports: attr.phys_port_cnt,
        })
    }

    /// A port, numbered from 1.
    ///
    /// # Errors
    /// There is no such port, or the device does not answer.
    pub fn port(&self, number: u8) -> Result<Port, VerbsError> {
        let ports = self.limits()?.ports;
        if number == 0 || number > ports {
            return Err(VerbsError::NoPort {
                device: self.name().to_owned(),
                port: number,
                ports,
            });
        }
        // SAFETY: plain numbers, for which zeroes are values.
        let mut attr: ffi::PortAttr = unsafe { std::mem::zeroed() };
        // SAFETY: the context is open; the call fills no more than the header's structure of its version.
        let rc = unsafe { (self.library().query_port)(self.raw(), number, &mut attr) };
        if rc != 0 {
            let on = format!("{} port {number}", self.name());
            return Err(VerbsError::numbered("ibv_query_port", on, rc));
        }
        /// `IBV_PORT_ACTIVE` and `IBV_PORT_ACTIVE_DEFER`.
        const ACTIVE: [u32; 2] = [4, 5];
        /// `IBV_LINK_LAYER_ETHERNET`; 0 and 1 are InfiniBand.
        const ETHERNET: u8 = 2;
        Ok(Port {
            state: if ACTIVE.contains(&attr.state) {
                PortState::Active
            } else {
                PortState::Down
            },
            mtu: Mtu::from_raw(attr.active_mtu).unwrap_or(Mtu::B1024),
            link: if attr.link_layer == ETHERNET {
                LinkLayer::Ethernet
            } else {
                LinkLayer::Infiniband
            },
            lid: attr.lid,
            message_bytes: attr.max_msg_sz,
        })
    }

    /// The valid rows of the address table, of all ports.
    ///
    /// # Errors
    /// The device does not answer.
    pub fn gids(&self) -> Result<Vec<GidEntry>, VerbsError> {
        /// 256 a port are usual. The kernel takes less than 64 KiB for the table, which are 2047 rows of 32 bytes.
        const ROWS: usize = 1024;
        let empty = ffi::GidEntry {
            gid: ffi::RawGidAligned([0; 16]),
            gid_index: 0,
            port_num: 0,
            gid_type: 0,
            ndev_ifindex: 0,
        };
        let mut rows = vec![empty; ROWS];
        // SAFETY: `rows` has ROWS entries of the given size.
        let found = unsafe {
            (self.library().query_gid_table)(
                self.raw(),
                rows.as_mut_ptr(),
                ROWS,
                0,
                size_of::<ffi::GidEntry>(),
            )
        };
        let found = usize::try_from(found).map_err(|_| {
            VerbsError::numbered("ibv_query_gid_table", self.name(), found.abs() as i32)
        })?;
        rows.truncate(found);
        Ok(rows
            .into_iter()
            .filter_map(|row| {
                Some(GidEntry {
                    gid: Gid(row.gid.0),
                    index: u8::try_from(row.gid_index).ok()?,
                    port: u8::try_from(row.port_num).ok()?,
                    kind: match row.gid_type {
                        0 => GidKind::Infiniband,
                        1 => GidKind::RoceV1,
                        2 => GidKind::RoceV2,
                        _ => return None,
                    },
                })
            })
            .collect())
    }

    /// The next event of the device, if there is one. Never blocks.
    pub fn next_event(&self) -> Option<AsyncEvent> {
        event::next(self)
    }

    /// The descriptor that is readable when there is an event.
    pub fn event_fd(&self) -> RawFd {
        // SAFETY: the context is open.
        unsafe { (*self.0.context).async_fd }
    }

    /// A protection domain: what is made in it may be used together.
    ///
    /// # Errors
    /// The device refuses.
    pub fn protection_domain(&self) -> Result<ProtectionDomain, VerbsError> {
        // SAFETY: the context is open.
        let pd = unsafe { (self.library().alloc_pd)(self.raw()) };
        if pd.is_null() {
            return Err(VerbsError::last("ibv_alloc_pd", self.name()));
        }
        let context = self.clone();
        Ok(ProtectionDomain(Arc::new(Domain { pd, context })))
    }
}

impl AsRawFd for Context {
    fn as_raw_fd(&self) -> RawFd {
        self.event_fd()
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Context({})", self.name())
    }
}

/// See [`Context::protection_domain`]. Clones are the same.
#[derive(Clone)]
pub struct ProtectionDomain(Arc<Domain>);

struct Domain {
    pd: *mut ffi::Pd,
    context: Context,
}

// SAFETY: a handle, used by calls that lock.
unsafe impl Send for Domain {}
// SAFETY: as above.
unsafe impl Sync for Domain {}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: everything made in the domain held a reference to this, so it is gone.
        unsafe { (self.context.library().dealloc_pd)(self.pd) };
    }
}

impl ProtectionDomain {
    /// The device.
    pub fn context(&self) -> &Context {
        &self.0.context
    }

    pub(super) fn raw(&self) -> *mut ffi::Pd {
        self.0.pd
    }
}

pub(super) fn set_nonblocking(fd: BorrowedFd<'_>) -> std::io::Result<()> {
    // SAFETY: the descriptor is open as long as it is borrowed.
    unsafe {
        let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
        if flags < 0 || libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) < 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_packets_and_addresses_read_as_people_write_them() {
        for bytes in [256, 512, 1024, 2048, 4096] {
            assert_eq!(Mtu::from_bytes(bytes).unwrap().bytes(), bytes);
        }
        assert_eq!(
            (Mtu::from_raw(5), Mtu::from_raw(0), Mtu::from_raw(6)),
            (Some(Mtu::B4096), None, None)
        );
        assert_eq!(Mtu::from_raw(u32::MAX), None);
        let gid = Gid([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 77, 0, 1]);
        assert_eq!(gid.to_string(), "10.77.0.1");
        let local = Gid([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(local.to_string(), "fe80::1");
        assert!(local.is_link_local() && !gid.is_link_local());
    }
}
