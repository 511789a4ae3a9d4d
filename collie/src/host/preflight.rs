//! Configuration that spoils RDMA before any workload does, as far as sysfs and procfs say it without root.

use std::fmt::Display;
use std::fs;
use std::path::Path;

use serde::Serialize;

use super::pci::Config;
use super::{device_folder, interface, names, text};

/// What a check came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Finding {
    /// As it should be.
    Good,
    /// Works, but costs performance in some workloads.
    Warning,
    /// Does not work.
    Bad,
    /// Cannot be seen from here.
    Unknown,
}

/// One check of one device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at.
    pub what: &'static str,
    /// What it came to.
    pub finding: Finding,
    /// What was found.
    pub found: String,
    /// What to do, where something is to be done.
    pub remedy: Option<&'static str>,
}

fn check(what: &'static str, finding: Finding, found: impl Display, remedy: &'static str) -> Check {
    Check {
        what,
        finding,
        found: found.to_string(),
        remedy: (finding != Finding::Good).then_some(remedy),
    }
}

/// Looks at a port of a device below a folder that stands for `/`.
pub fn preflight(root: &Path, device: &str, port: u8) -> Vec<Check> {
    let folder = device_folder(root, device);
    let of_port = folder.join("ports").join(port.to_string());
    let mut checks = vec![state(&of_port)];
    checks.push(gids(&of_port));
    checks.push(mtu(root, device));
    checks.extend(pcie_link(&folder));
    checks.push(numa(root, &folder));
    checks.push(ordering(&folder));
    checks.push(access_control(&folder));
    checks.push(flow_control(root, device));
    checks.push(locked_memory(root));
    checks
}

fn state(port: &Path) -> Check {
    let remedy = "bring the link up: cable, switch port, `ip link set IF up`, and a subnet manager on InfiniBand";
    match text(&port.join("state")) {
        None => check(
            "port state",
            Finding::Bad,
            "there is no such port",
            "give one of those in /sys/class/infiniband/DEVICE/ports",
        ),
        Some(state) => {
            let rate = text(&port.join("rate")).unwrap_or_default();
            let finding = if state.contains("ACTIVE") {
                Finding::Good
            } else {
                Finding::Bad
            };
            check("port state", finding, format!("{state}, {rate}"), remedy)
        }
    }
}

fn gids(port: &Path) -> Check {
    let types = port.join("gid_attrs/types");
    let of_v2 = names(&types)
        .into_iter()
        .filter(|index| text(&types.join(index)).is_some_and(|kind| kind == "RoCE v2"))
        .filter(|index| {
            text(&port.join("gids").join(index))
                .is_some_and(|gid| gid.chars().any(|c| !matches!(c, '0' | ':')))
        })
        .count();
    let layer = text(&port.join("link_layer")).unwrap_or_default();
    match (layer.as_str(), of_v2) {
        ("InfiniBand", _) => check("GIDs", Finding::Good, "InfiniBand needs none of RoCE", ""),
        (_, 0) => check(
            "GIDs",
            Finding::Bad,
            "no GID of RoCE v2",
            "give the interface an IP address: each becomes a GID",
        ),
        (_, count) => check("GIDs", Finding::Good, format!("{count} of RoCE v2"), ""),
    }
}

fn mtu(root: &Path, device: &str) -> Check {
    let remedy = "set the interface's MTU to 4200 or more (9000 is usual) on hosts and switches: RoCE takes the largest of 256 to 4096 bytes that fits with its headers";
    let Some(name) = interface(root, device) else {
        return check(
            "MTU",
            Finding::Unknown,
            "the device has no interface",
            remedy,
        );
    };
    let of_interface: Option<u32> =
        text(&root.join("sys/class/net").join(&name).join("mtu")).and_then(|mtu| mtu.parse().ok());
    let Some(bytes) = of_interface else {
        return check(
            "MTU",
            Finding::Unknown,
            format!("{name} does not say"),
            remedy,
        );
    };
    // Headers of RoCE v2 over IPv6 with the longest extension take less than 104 bytes.
    let path = [4096, 2048, 1024, 512, 256]
        .into_iter()
        .find(|mtu| mtu + 104 <= bytes)
        .unwrap_or(0);
    let finding = match path {
        4096 => Finding::Good,
        0 => Finding::Bad,
        _ => Finding::Warning,
    };
    check(
        "MTU",
        finding,
        format!("{bytes} on {name}, so {path} for RDMA"),
        remedy,
    )
}

fn pcie_link(folder: &Path) -> Option<Check> {
    let of = |name: &str| text(&folder.join("device").join(name));
    let (speed, speed_max) = (of("current_link_speed")?, of("max_link_speed")?);
    let (width, width_max) = (of("current_link_width")?, of("max_link_width")?);
    let finding = if speed == speed_max && width == width_max {
        Finding::Good
    } else {
        Finding::Warning
    };
    Some(check(
        "PCIe link",
        finding,
        format!("{speed} x{width} of {speed_max} x{width_max}"),
        "put the adapter into a slot of its generation and width, and look for link training errors (`lspci -vv`, dmesg)",
    ))
}

fn numa(root: &Path, folder: &Path) -> Check {
    let node: Option<i32> =
        text(&folder.join("device/numa_node")).and_then(|node| node.parse().ok());
    let online = text(&root.join("sys/devices/system/node/online")).unwrap_or_default();
    match node {
        Some(node) if node >= 0 => check(
            "NUMA node",
            Finding::Good,
            format!("{node} (online: {online})"),
            "",
        ),
        Some(_) if online == "0" => check("NUMA node", Finding::Good, "the host has one", ""),
        _ => check(
            "NUMA node",
            Finding::Unknown,
            "the firmware does not say where the adapter is",
            "measure with buffers on each node, and bind workers to the better one",
        ),
    }
}

fn ordering(folder: &Path) -> Check {
    let config = fs::read(folder.join("device/config")).map(Config).ok();
    let remedy = "let the adapter relax the order of its writes: firmware setting (mlxconfig PCI_WR_ORDERING=1) or BIOS; registrations must ask for it too";
    match config.and_then(|config| config.relaxed_ordering()) {
        Some(true) => check("relaxed ordering", Finding::Good, "enabled", ""),
        Some(false) => check("relaxed ordering", Finding::Warning, "disabled", remedy),
        None => check(
            "relaxed ordering",
            Finding::Unknown,
            "the kernel shows it to root only",
            "run this as root, or `lspci -vv` and look for RlxdOrd+",
        ),
    }
}

/// Every bridge above the adapter.
fn access_control(folder: &Path) -> Check {
    let what = "access control (ACS)";
    let Ok(device) = folder.join("device").canonicalize() else {
        return check(
            what,
            Finding::Unknown,
            "the adapter is no PCI device",
            "nothing is to be done for a device of software",
        );
    };
    let above: Vec<Option<bool>> = device
        .ancestors()
        .skip(1)
        .map_while(|bridge| fs::read(bridge.join("config")).ok())
        .map(|bytes| Config(bytes).redirects_peers())
        .collect();
    if above.contains(&Some(true)) {
        return check(
            what,
            Finding::Warning,
            "a bridge sends traffic between peers through the root complex",
            "where GPUs and adapters talk to each other, turn ACS off on the switch between them (setpci ECAP_ACS+0x6.w=0), unless virtual machines need it",
        );
    }
    if above.iter().any(Option::is_none) {
        return check(
            what,
            Finding::Unknown,
            "the kernel shows it to root only",
            "run this as root, or `lspci -vvv` and look for ReqRedir+ in ACSCtl",
        );
    }
    check(
        what,
        Finding::Good,
        "no bridge redirects traffic between peers",
        "",
    )
}

fn flow_control(root: &Path, device: &str) -> Check {
    let remedy = "look at `dcb pfc show dev IF` and the switch: one priority, the same everywhere; without it watch losses (`volley vet watch`)";
    let enabled = interface(root, device).and_then(|name| {
        let folder = root.join("sys/class/net").join(name).join("qos/pfc");
        text(&folder)
    });
    match enabled {
        Some(mask) if mask.split_whitespace().any(|bit| bit == "1") => {
            check("flow control (PFC)", Finding::Good, mask, "")
        }
        Some(mask) => check("flow control (PFC)", Finding::Warning, mask, remedy),
        None => check(
            "flow control (PFC)",
            Finding::Unknown,
            "sysfs does not say",
            remedy,
        ),
    }
}

fn locked_memory(root: &Path) -> Check {
    let what = "locked memory";
    let limits = text(&root.join("proc/self/limits")).unwrap_or_default();
    let soft = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max locked memory"))
        .and_then(|rest| rest.split_whitespace().next().map(str::to_owned));
    let remedy =
        "raise it (LimitMEMLOCK=infinity, `ulimit -l unlimited`): registered memory is locked";
    match soft {
        Some(limit) if limit == "unlimited" => check(what, Finding::Good, limit, ""),
        Some(limit) => {
            // A gibibyte holds the slots of a small cluster.
            let enough = limit.parse::<u64>().is_ok_and(|bytes| bytes >= 1 << 30);
            let finding = if enough { Finding::Good } else { Finding::Bad };
            check(what, finding, format!("{limit} bytes"), remedy)
        }
        None => check(
            what,
            Finding::Unknown,
            "/proc/self/limits does not say",
            remedy,
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host as mlx5 shows it, with one thing after another wrong.
    fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let mut all = vec![
            ("sys/class/infiniband/mlx5_0/ports/1/state", "4: ACTIVE"),
            (
                "sys/class/infiniband/mlx5_0/ports/1/rate",
                "200 Gb/sec (4X HDR)",
            ),
            ("sys/class/infiniband/mlx5_0/ports/1/link_layer", "Ethernet"),
            (
                "sys/class/infiniband/mlx5_0/ports/1/gid_attrs/types/3",
                "RoCE v2",
            ),
            (
                "sys/class/infiniband/mlx5_0/ports/1/gids/3",
                "0000:0000:0000:0000:0000:ffff:0a00:0001",
            ),
            ("sys/class/infiniband/mlx5_0/device/net/eth2/mtu", "9000"),
            ("sys/class/net/eth2/mtu", "9000"),
            (
                "sys/class/infiniband/mlx5_0/device/current_link_speed",
                "16.0 GT/s PCIe",
            ),
            (
                "sys/class/infiniband/mlx5_0/device/max_link_speed",
                "16.0 GT/s PCIe",
            ),
            (
                "sys/class/infiniband/mlx5_0/device/current_link_width",
                "16",
            ),
            ("sys/class/infiniband/mlx5_0/device/max_link_width", "16"),
            ("sys/class/infiniband/mlx5_0/device/numa_node", "1"),
            ("sys/devices/system/node/online", "0-1"),
            (
                "proc/self/limits",
                "Limit  Soft Limit  Hard Limit  Units\nMax locked memory         unlimited            unlimited            bytes",
            ),
        ];
        all.extend(files);
        for (name, value) in all {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{value}\n")).unwrap();
        }
        root
    }

    fn finding(files: &[(&str, &str)], what: &str) -> Finding {
        let root = host(files);
        let checks = preflight(root.path(), "mlx5_0", 1);
        checks
            .iter()
            .find(|check| check.what == what)
            .expect("the check is made")
            .finding
    }

    #[test]
    fn a_good_host_is_good_and_each_fault_is_found() {
        let device = "sys/class/infiniband/mlx5_0/";
        let at = |name: &str| format!("{device}{name}");
        for (what, name, bad, expected) in [
            ("port state", at("ports/1/state"), "1: DOWN", Finding::Bad),
            (
                "GIDs",
                at("ports/1/gid_attrs/types/3"),
                "IB/RoCE v1",
                Finding::Bad,
            ),
            (
                "MTU",
                "sys/class/net/eth2/mtu".to_owned(),
                "1500",
                Finding::Warning,
            ),
            (
                "PCIe link",
                at("device/current_link_width"),
                "8",
                Finding::Warning,
            ),
            ("NUMA node", at("device/numa_node"), "-1", Finding::Unknown),
            (
                "locked memory",
                "proc/self/limits".to_owned(),
                "Max locked memory  65536  65536  bytes",
                Finding::Bad,
            ),
        ] {
            assert_eq!(finding(&[], what), Finding::Good, "{what}");
            assert_eq!(finding(&[(&name, bad)], what), expected, "{what}");
        }
    }

    #[test]
    fn what_is_not_good_has_a_remedy() {
        let root = host(&[("sys/class/net/eth2/mtu", "1500")]);
        for check in preflight(root.path(), "mlx5_0", 1) {
            assert_eq!(
                check.remedy.is_none(),
                check.finding == Finding::Good,
                "{check:?}"
            );
        }
        assert_eq!(preflight(root.path(), "mlx5_7", 1)[0].finding, Finding::Bad);
    }
}
