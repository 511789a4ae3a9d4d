//! Configuration to look at before an adapter is blamed, by what an anomaly depends on.
//!
//! The causes behind each line are those that Collie (section 7) and its operators name: caches of the adapter that overflow, the way to memory, and flow control.

use crate::mfs::{Factor, Mfs};
use crate::space::{Axis, Category, Choice, Direction, Memory};

/// What to check, most specific first. Never empty.
pub(super) fn checks(mfs: &Mfs) -> Vec<&'static str> {
    let mut list = Vec::new();
    let speaks_of = |axis: Axis| {
        mfs.factors.iter().any(
            |factor| matches!(factor, Factor::Within { quantity, .. } if quantity.involves(axis)),
        )
    };
    let needs = |wanted: &dyn Fn(&Choice) -> bool| {
        mfs.factors.iter().any(|factor| {
            matches!(factor, Factor::Among { anomalous, .. } if anomalous.iter().any(wanted))
        })
    };
    if needs(&|choice| matches!(choice, Choice::Memory(Memory::Gpu(_)))) {
        list.push("PCIe ACS on the switch between GPU and adapter: redirected peer-to-peer traffic goes through the root complex");
        list.push("whether GPU and adapter hang below the same PCIe switch");
    }
    if needs(&|choice| matches!(choice, Choice::Memory(Memory::Dram(node)) if *node > 0)) {
        list.push(
            "NUMA placement: bind buffers and threads to the adapter's own node (numa_node in sysfs)",
        );
    }
    if needs(&|choice| *choice == Choice::Direction(Direction::Loopback)) {
        list.push(
            "keep traffic of a host with itself off the adapter: shared memory carries it without",
        );
    }
    if needs(&|choice| *choice == Choice::Direction(Direction::Bidirectional)) {
        list.push("relaxed ordering (PCI_WR_ORDERING in the firmware, IBV_ACCESS_RELAXED_ORDERING): strict order lets reads wait behind writes");
    }
    if speaks_of(Axis::ReceiveDepth) {
        list.push("receive queues: fewer or a shared one (SRQ), for work requests that fall out of the adapter's cache are fetched again");
    }
    if speaks_of(Axis::Qps) || speaks_of(Axis::Regions) {
        list.push("contexts and translations: share queue pairs, register fewer and larger regions, use huge pages");
    }
    if mfs.factors.iter().any(|factor| {
        matches!(
            factor,
            Factor::Among {
                category: Category::Mtu,
                ..
            }
        )
    }) {
        list.push("the path MTU: 4096 wherever the switches carry it");
    }
    if mfs.symptom.pause.is_some() {
        list.push("flow control: PFC on one priority only, the same on hosts and switches, with headroom for the cable's length");
    }
    if mfs.symptom.loss.is_some() {
        list.push("ECN marking and the congestion control of both adapters, or PFC for the traffic's priority");
    }
    list.push("firmware and driver against the vendor's latest; compare two searches with `volley vet diff`");
    list
}
