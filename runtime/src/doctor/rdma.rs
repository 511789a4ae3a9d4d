//! What libibverbs, the driver and the PCI bus say of this host's RDMA devices.

use std::fs;
use std::path::Path;

use volley_collie::host::{self, preflight};
use volley_transports::verbs::{Context, DeviceList, GidKind, LinkLayer, PortState};

use super::{Finding, Verdict, finding, names};

/// What libibverbs and the files of the system under `root` tell of RDMA; nothing where there is no device.
pub(super) fn devices(root: &Path) -> Vec<Finding> {
    const LIBRARY: &str =
        "apt-get install libibverbs1 ibverbs-providers, or keep cluster.transport = \"quic\"";
    let devices = names(&root.join("sys/class/infiniband"));
    if devices.is_empty() {
        return Vec::new();
    }
    let list = match DeviceList::open() {
        Ok(list) => list,
        Err(error) => {
            let found = error.to_string();
            return vec![finding(false, Verdict::Slow, "libibverbs", found, LIBRARY)];
        }
    };
    let mut findings = Vec::new();
    for device in list.iter() {
        match device.open() {
            Ok(context) => findings.extend(ports(root, &context)),
            Err(error) => findings.push(finding(
                false,
                Verdict::Slow,
                "RDMA device",
                error.to_string(),
                "a container needs /dev/infiniband/uverbs* (docker: --device=/dev/infiniband --cap-add=IPC_LOCK)",
            )),
        }
    }
    findings
}

/// The ports of a device, their addresses and what guards them against loss.
fn ports(root: &Path, context: &Context) -> Vec<Finding> {
    let name = context.name();
    let read = |path: String| {
        let text = fs::read_to_string(root.join(path)).unwrap_or_default();
        text.trim().to_owned()
    };
    let mut findings = Vec::new();
    findings.push(finding(
        !context.is_iwarp(),
        Verdict::Slow,
        "RDMA device",
        match context.is_iwarp() {
            true => format!("{name} speaks iWARP"),
            false => format!("{name} can be used"),
        },
        "iWARP has no WRITE WITH IMMEDIATE; use RoCE or InfiniBand, or cluster.transport = \"quic\"",
    ));
    let (Ok(limits), Ok(gids)) = (context.limits(), context.gids()) else {
        return findings;
    };
    for number in 1..=limits.ports {
        let Ok(port) = context.port(number) else {
            continue;
        };
        findings.push(finding(
            port.state == PortState::Active,
            Verdict::Slow,
            "RDMA port",
            format!(
                "{name}:{number} is {}, packets of {} bytes",
                if port.state == PortState::Active {
                    "up"
                } else {
                    "down"
                },
                port.mtu.bytes()
            ),
            "ip link set DEV up, and its cable; on InfiniBand a subnet manager must run",
        ));
        if port.link != LinkLayer::Ethernet {
            continue;
        }
        let addresses = || gids.iter().filter(|row| row.port == number);
        let routed =
            addresses().find(|row| row.kind == GidKind::RoceV2 && !row.gid.is_link_local());
        findings.push(finding(
            routed.is_some(),
            Verdict::Slow,
            "RoCEv2 address",
            match routed {
                Some(row) => format!("{name}:{number} has {} at index {}", row.gid, row.index),
                None => format!("{name}:{number} has none that is routed"),
            },
            "give the port's network interface an IP address: hosts beyond the link cannot be reached",
        ));
        findings.push(finding(
            port.mtu.bytes() >= 4096,
            Verdict::Slow,
            "RoCE MTU",
            format!(
                "{name}:{number} sends packets of {} bytes",
                port.mtu.bytes()
            ),
            "ip link set DEV mtu 9000, and the same at every switch: four times fewer packets",
        ));
        findings.extend(congestion(root, name, number));
        findings.extend(settings(root, name, number));
    }
    let node = read(format!("sys/class/infiniband/{name}/device/numa_node"));
    if let Ok(node) = node.parse::<i32>() {
        findings.push(finding(
            true,
            Verdict::Slow,
            "NUMA node",
            format!("{name} is on {node}: run workers there (numactl --cpunodebind={node} --membind={node})"),
            "",
        ));
    }
    findings
}

/// What guards an Ethernet port against loss: congestion control, and counters that tell whether it had to.
fn congestion(root: &Path, device: &str, port: u8) -> Vec<Finding> {
    let folder = format!("sys/class/infiniband/{device}/ports/{port}");
    let read = |path: String| fs::read_to_string(root.join(path)).ok();
    let netdev = read(format!("{folder}/gid_attrs/ndevs/0")).unwrap_or_default();
    let netdev = netdev.trim();
    let mut findings = Vec::new();
    // The switches of mlx5, one for each priority.
    for side in ["roce_np", "roce_rp"] {
        let on = |priority: u8| {
            let path = format!("sys/class/net/{netdev}/ecn/{side}/enable/{priority}");
            read(path).map(|text| text.trim() == "1")
        };
        let known: Vec<bool> = (0..8).filter_map(on).collect();
        if !known.is_empty() {
            let enabled = known.iter().filter(|&&on| on).count();
            findings.push(finding(
                enabled > 0,
                Verdict::Slow,
                "ECN (DCQCN)",
                format!("{device}: {side} is on for {enabled} of {} priorities", known.len()),
                "echo 1 > /sys/class/net/DEV/ecn/roce_np/enable/PRIORITY (and roce_rp): without it a queue that fills is emptied by loss or by pauses",
            ));
        }
    }
    let counter = |name: &str| {
        read(format!("{folder}/hw_counters/{name}"))
            .and_then(|text| text.trim().parse::<u64>().ok())
    };
    const LOSS: [&str; 4] = [
        "packet_seq_err",
        "out_of_sequence",
        "local_ack_timeout_err",
        "retry_exceeded_err",
    ];
    let counted: Vec<(&str, u64)> = LOSS
        .into_iter()
        .filter_map(|name| Some((name, counter(name)?)))
        .collect();
    if !counted.is_empty() {
        let lost: Vec<String> = counted
            .iter()
            .map(|(name, n)| format!("{name} {n}"))
            .collect();
        findings.push(finding(
            counted.iter().all(|&(_, n)| n == 0),
            Verdict::Slow,
            "RDMA loss",
            format!("{device}:{port}: {}", lost.join(", ")),
            "packets were lost on the way: give rdma.traffic_class a lossless priority (PFC) with ECN on every switch",
        ));
    }
    findings
}

/// How adapter, PCI and priorities are set, by the checks of `volley vet preflight` that verbs cannot make better.
fn settings(root: &Path, device: &str, port: u8) -> impl Iterator<Item = Finding> {
    const WANTED: [&str; 4] = [
        "PCIe link",
        "relaxed ordering",
        "access control (ACS)",
        "flow control (PFC)",
    ];
    let checks = preflight(root, device, port).into_iter();
    let wanted = checks.filter(|check| WANTED.contains(&check.what));
    let device = device.to_owned();
    wanted.map(move |check| Finding {
        verdict: match check.finding {
            host::Finding::Good => Verdict::Good,
            host::Finding::Warning => Verdict::Slow,
            host::Finding::Bad => Verdict::Bad,
            host::Finding::Unknown => Verdict::Unknown,
        },
        what: check.what.to_owned(),
        found: format!("{device}:{port}: {}", check.found),
        remedy: check.remedy.unwrap_or_default().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_nothing_guards_is_told_so() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let port = "sys/class/infiniband/mlx5_0/ports/2";
        write(&format!("{port}/gid_attrs/ndevs/0"), "eth0\n");
        write(&format!("{port}/hw_counters/packet_seq_err"), "17\n");
        write("sys/class/net/eth0/ecn/roce_np/enable/3", "0\n");
        let guards = congestion(root.path(), "mlx5_0", 2);
        let what: Vec<_> = guards.iter().map(|f| (&*f.what, f.verdict)).collect();
        assert_eq!(
            what,
            [("ECN (DCQCN)", Verdict::Slow), ("RDMA loss", Verdict::Slow)]
        );
        assert!(guards[1].found.contains("mlx5_0:2: packet_seq_err 17"));

        // No PCI registers and no priorities are to be seen below this folder; each check has its name, and says what to do.
        let settings: Vec<Finding> = settings(root.path(), "mlx5_0", 2).collect();
        let what: Vec<&str> = settings.iter().map(|f| &*f.what).collect();
        assert_eq!(
            what,
            [
                "relaxed ordering",
                "access control (ACS)",
                "flow control (PFC)"
            ]
        );
        assert!(settings.iter().all(|f| f.verdict == Verdict::Unknown));
        assert!(settings.iter().all(|f| !f.remedy.is_empty()));
    }
}
