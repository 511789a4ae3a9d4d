//! What a host says of its RDMA adapters without root and without a vendor's tools: counters of ports, and configuration that commonly spoils them.
//!
//! Everything is read below a folder that stands for `/`, so that recorded trees of other hosts can be read too. Files are small and the kernel's own, yet what
//! they hold is checked: a number that does not parse is left out.

mod counters;
mod ethtool;
mod pci;
mod preflight;

use std::fs;
use std::path::{Path, PathBuf};

pub use counters::{Counters, CountersError, PortCounters, parse_ethtool};
pub use ethtool::read_ethtool;
pub use preflight::{Check, Finding, preflight};

/// The text of a small file, without the white space at its ends. None if it cannot be read.
fn text(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

/// The names in a folder, sorted. Empty if there is none.
fn names(path: &Path) -> Vec<String> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

/// The folder of an RDMA device.
fn device_folder(root: &Path, device: &str) -> PathBuf {
    root.join("sys/class/infiniband").join(device)
}

/// The RDMA devices of a host.
pub fn devices(root: &Path) -> Vec<String> {
    names(&root.join("sys/class/infiniband"))
}

/// The network interface of an RDMA device, where it has one.
pub fn interface(root: &Path, device: &str) -> Option<String> {
    let beside = names(&device_folder(root, device).join("device/net"));
    // Devices of software name their interface in `parent`.
    beside
        .into_iter()
        .next()
        .or_else(|| text(&device_folder(root, device).join("parent")))
}

/// The NUMA nodes of a host; node 0 where it says nothing of them.
pub fn numa_nodes(root: &Path) -> Vec<u8> {
    let mut nodes: Vec<u8> = names(&root.join("sys/devices/system/node"))
        .iter()
        .filter_map(|name| name.strip_prefix("node")?.parse().ok())
        .collect();
    nodes.sort_unstable();
    if nodes.is_empty() {
        nodes.push(0);
    }
    nodes
}
