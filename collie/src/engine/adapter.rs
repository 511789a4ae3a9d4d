//! A port of a device, opened: what it can do, the memory that requests name, and the way to a peer.

use std::collections::BTreeMap;
use std::path::Path as FilePath;
use std::sync::Arc;

use volley_transports::verbs::{
    Access, Buffer, Context, DeviceList, Gid, GidEntry, GlobalRoute, LinkLayer, MemoryRegion, Mtu,
    Pages, Path, Port, PortState, ProtectionDomain,
};

use super::EngineError;
use super::message::{Facts, HalfOffer};
use crate::host::{Counters, PortCounters, interface, numa_nodes, read_ethtool};
use crate::space::Memory;

/// READs under way on a queue pair, at most: what perftest asks for where the device has as many.
const READS_MAX: u8 = 128;
/// Bytes of one end's buffers, at most. More regions than fit share them: each has a key and translations of its own, which is what an adapter notices.
const BUFFERS_MAX: usize = 256 << 20;

pub(super) struct Adapter {
    pub(super) context: Context,
    pub(super) domain: ProtectionDomain,
    pub(super) port: Port,
    pub(super) number: u8,
    pub(super) facts: Facts,
    gid: GidEntry,
    reads: u8,
    completions: u32,
    counters: PortCounters,
    interface: Option<String>,
}

impl Adapter {
    /// Opens a port and asks it what it can do.
    ///
    /// # Errors
    /// It is not there, is down or has no address; or it is an iWARP device, which the engine cannot connect.
    pub(super) fn open(device: &str, number: u8) -> Result<Self, EngineError> {
        let root = FilePath::new("/");
        let context = DeviceList::open()?.context(device)?;
        let unfit = |reason: &str| {
            Err(EngineError::Device {
                device: device.to_owned(),
                port: number,
                reason: reason.to_owned(),
            })
        };
        if context.is_iwarp() {
            return unfit(
                "it is an iWARP device, which connects through rdmacm only; give a RoCE or InfiniBand device",
            );
        }
        let (port, limits) = (context.port(number)?, context.limits()?);
        if port.state == PortState::Down {
            return unfit("its link is down; `volley vet preflight` says what is in the way");
        }
        let Some(gid) = GidEntry::best(&context.gids()?, number) else {
            return unfit("it has no address (GID); give its network interface an IP address");
        };
        let counters = PortCounters::open(root, device, number)?;
        let interface = interface(root, device);
        let mut facts = Facts {
            device: device.to_owned(),
            queue_pairs: limits.queue_pairs,
            queue_depth: limits.queue_depth,
            sges: limits.pieces,
            regions: limits.regions,
            mtu: port.mtu.bytes(),
            nodes: numa_nodes(root),
            counters: Vec::new(),
        };
        let domain = context.protection_domain()?;
        let mut adapter = Adapter {
            domain,
            port,
            number,
            gid,
            reads: limits.reads_made.min(limits.reads_served).min(READS_MAX),
            completions: limits.completions,
            counters,
            interface,
            facts: facts.clone(),
            context,
        };
        facts.counters = adapter.counters().diagnostic();
        adapter.facts = facts;
        Ok(adapter)
    }

    /// The counters of port and interface, now.
    pub(super) fn counters(&self) -> Counters {
        let of_interface = self.interface.as_deref().map(read_ethtool);
        self.counters.read().and(of_interface.unwrap_or_default())
    }

    /// Entries of one completion queue, at most.
    pub(super) fn completions(&self) -> u32 {
        self.completions.max(1)
    }

    /// The part of an offer that is the port's.
    pub(super) fn offer(&self, psn: u32) -> HalfOffer {
        HalfOffer {
            gid: self.gid.gid.0,
            lid: self.port.lid,
            psn,
            reads: self.reads,
            queue_pairs: Vec::new(),
            regions: Vec::new(),
        }
    }

    /// The way to a peer's port.
    pub(super) fn path(&self, peer: &HalfOffer) -> Path {
        let route = GlobalRoute {
            destination: Gid(peer.gid),
            source_index: self.gid.index,
            traffic_class: 0,
            flow_label: 0,
            hop_limit: 64,
        };
        Path {
            port: self.number,
            lid: peer.lid,
            service_level: 0,
            route: (self.port.link == LinkLayer::Ethernet).then_some(route),
        }
    }

    /// An MTU that the port can send now.
    pub(super) fn mtu(&self, bytes: u32) -> Result<Mtu, EngineError> {
        Mtu::from_bytes(bytes)
            .filter(|mtu| *mtu <= self.port.mtu)
            .ok_or_else(|| {
                let most = self.port.mtu.bytes();
                EngineError::Unfit(format!(
                    "an MTU of {bytes} bytes on {}, whose port sends {most} at most",
                    self.facts.device
                ))
            })
    }

    /// Buffers for so many regions of a length: fewer than regions where they would take too much memory.
    pub(super) fn buffers(
        &self,
        memory: Memory,
        regions: usize,
        bytes: usize,
    ) -> Result<Vec<Arc<Buffer>>, EngineError> {
        let Memory::Dram(node) = memory else {
            return Err(EngineError::Unfit(format!(
                "memory of a GPU ({memory}): this build drives host memory only"
            )));
        };
        let count = (BUFFERS_MAX / bytes.max(4096)).clamp(1, regions.max(1));
        (0..count)
            .map(|_| Ok(Arc::new(Buffer::on_node(bytes, Pages::Transparent, node)?)))
            .collect()
    }

    /// A region on a buffer.
    pub(super) fn region(&self, buffer: &Arc<Buffer>) -> Result<MemoryRegion, EngineError> {
        Ok(MemoryRegion::new(&self.domain, buffer, Access::ALL)?)
    }
}

/// Memory that the system has left, bytes; none where it does not say.
pub(super) fn memory_left() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let lines: BTreeMap<&str, &str> = text.lines().filter_map(|l| l.split_once(':')).collect();
    let kib = lines.get("MemAvailable")?.trim().strip_suffix(" kB")?;
    kib.parse::<u64>().ok()?.checked_mul(1024)
}
