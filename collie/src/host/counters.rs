//! Counters of a port from sysfs, and of its interface as `ethtool -S` prints them.
//!
//! Names are those of the drivers: mlx5 and the InfiniBand core count data in words of four bytes and pauses in microseconds, bnxt_re counts bytes, rxe
//! counts packets only.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::{device_folder, names, text};
use crate::subsystem::Sample;

/// Packets that were lost, or sent again because one was.
const LOSSES: [&str; 19] = [
    // mlx5
    "out_of_buffer",
    "out_of_sequence",
    "packet_seq_err",
    "local_ack_timeout_err",
    "rnr_nak_retry_err",
    "implied_nak_seq_err",
    "roce_adp_retrans",
    "rx_discards_phy",
    "tx_discards_phy",
    // bnxt_re
    "to_retransmits",
    "seq_err_naks_rcvd",
    "rnr_naks_rcvd",
    "rx_roce_discards",
    "rx_roce_drops",
    "oos_drop_count",
    // rxe
    "out_of_seq_request",
    "rcvd_seq_err",
    "rcvd_rnr_err",
    "completer_retry_err",
];

/// What names of diagnostic counters have in them: events inside an adapter that a search drives high.
const DIAGNOSTIC: [&str; 22] = [
    "buffer",
    "cnp",
    "deferred",
    "discard",
    "drop",
    "duplicate",
    "ecn",
    "err",
    "full",
    "hit",
    "icm",
    "miss",
    "nak",
    "oos",
    "out_of",
    "overflow",
    "pause",
    "retrans",
    "retry",
    "stall",
    "timeout",
    "wait",
];

/// Why counters cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CountersError {
    /// There is no such port.
    #[error("{} is not there: the host's RDMA devices are {}", .path.display(), .devices)]
    NoPort {
        /// Where it would be.
        path: PathBuf,
        /// What there is.
        devices: String,
    },
}

/// The values of one moment, by name.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Counters(pub BTreeMap<String, u64>);

/// The counters of one port.
#[derive(Debug, Clone)]
pub struct PortCounters {
    port: PathBuf,
}

impl PortCounters {
    /// The counters of a port below a folder that stands for `/`.
    ///
    /// # Errors
    /// [`CountersError::NoPort`] if there is no such port.
    pub fn open(root: &Path, device: &str, port: u8) -> Result<Self, CountersError> {
        let path = device_folder(root, device)
            .join("ports")
            .join(port.to_string());
        if path.is_dir() {
            return Ok(PortCounters { port: path });
        }
        let devices = super::devices(root);
        Err(CountersError::NoPort {
            path,
            devices: if devices.is_empty() {
                "none".to_owned()
            } else {
                devices.join(", ")
            },
        })
    }

    /// Reads them all.
    pub fn read(&self) -> Counters {
        let mut values = BTreeMap::new();
        for folder in ["counters", "hw_counters"] {
            let folder = self.port.join(folder);
            for name in names(&folder) {
                // `lifespan` is how long the driver caches the others, milliseconds.
                let value = text(&folder.join(&name)).and_then(|value| value.parse().ok());
                if let (Some(value), true) = (value, name != "lifespan") {
                    values.insert(name, value);
                }
            }
        }
        Counters(values)
    }
}

/// The statistics of an interface, from what `ethtool -S` prints: a line each, `name: value`. Other lines are passed over.
pub fn parse_ethtool(printed: &str) -> Counters {
    let pairs = printed.lines().filter_map(|line| {
        let (name, value) = line.trim().rsplit_once(':')?;
        Some((name.trim().to_owned(), value.trim().parse().ok()?))
    });
    Counters(pairs.collect())
}

impl Counters {
    /// These and others; of the same name, those given.
    pub fn and(mut self, others: Counters) -> Counters {
        self.0.extend(others.0);
        self
    }

    /// How much each grew since an earlier moment. One that shrank was set back, and says nothing.
    pub fn since(&self, earlier: &Counters) -> Counters {
        let grown = self.0.iter().filter_map(|(name, now)| {
            let before = earlier.0.get(name)?;
            Some((name.clone(), now.checked_sub(*before)?))
        });
        Counters(grown.collect())
    }

    /// The names of those that tell of events inside the adapter. Volumes of traffic do not, nor do the parts of single rings and lanes, whose sums are there too.
    pub fn diagnostic(&self) -> Vec<String> {
        let of_a_part = |name: &str| {
            let rest = name.trim_start_matches(|c: char| c.is_ascii_alphabetic() || c == '_');
            let before = &name[..name.len() - rest.len()];
            !rest.is_empty() && !before.contains("prio")
        };
        let names = self
            .0
            .keys()
            .filter(|name| DIAGNOSTIC.iter().any(|part| name.contains(part)) && !of_a_part(name));
        names.cloned().collect()
    }

    /// Packets received and packets sent.
    pub fn packets(&self) -> (u64, u64) {
        (
            self.first(&[("rx_pkts", 1), ("port_rcv_packets", 1), ("rcvd_pkts", 1)]),
            self.first(&[("tx_pkts", 1), ("port_xmit_packets", 1), ("sent_pkts", 1)]),
        )
    }

    fn sum(&self, wanted: impl Fn(&str) -> bool) -> u64 {
        let values = self.0.iter().filter(|(name, _)| wanted(name));
        values.fold(0, |sum, (_, value)| sum.saturating_add(*value))
    }

    fn first(&self, names: &[(&str, u64)]) -> u64 {
        names
            .iter()
            .find_map(|(name, unit)| Some(self.0.get(*name)?.saturating_mul(*unit)))
            .unwrap_or(0)
    }

    /// What growth in so many seconds says of the end that it was read at. `counters` holds every value a second, in the order of the names.
    pub fn sample(&self, seconds: f64) -> Sample {
        let bytes = self.first(&[("rx_bytes", 1), ("port_rcv_data", 4)]);
        let (packets, sent) = self.packets();
        let lost = self.sum(|name| LOSSES.contains(&name));
        // The time that this end asked its peer to be silent; priorities pause on their own, so the longest counts.
        let paused_us = self
            .0
            .iter()
            .filter(|(name, _)| name.starts_with("tx_") && name.ends_with("pause_duration"))
            .map(|(_, value)| *value)
            .max()
            .unwrap_or(0);
        Sample {
            bits_per_s: bytes as f64 * 8.0 / seconds,
            packets_per_s: packets as f64 / seconds,
            pause_ratio: (paused_us as f64 / 1e6 / seconds).min(1.0),
            loss_ratio: lost as f64 / ((packets + sent).max(1)) as f64,
            counters: self
                .0
                .values()
                .map(|value| *value as f64 / seconds)
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn tree(device: &str, files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let port = device_folder(root.path(), device).join("ports/1");
        for (name, value) in files {
            let path = port.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{value}\n")).unwrap();
        }
        root
    }

    #[test]
    fn mlx5_counts_words_and_microseconds() {
        let before = tree(
            "mlx5_0",
            &[
                ("counters/port_rcv_data", "1000"),
                ("counters/port_rcv_packets", "50"),
                ("counters/port_xmit_packets", "0"),
                ("hw_counters/out_of_buffer", "7"),
                ("hw_counters/lifespan", "10"),
            ],
        );
        let port = PortCounters::open(before.path(), "mlx5_0", 1).unwrap();
        let first = port.read().and(parse_ethtool(
            "NIC statistics:\n     tx_prio3_pause_duration: 100\n     tx_prio0_pause_duration: 0\n     rx_prio3_pause: 3\n",
        ));
        let folder = device_folder(before.path(), "mlx5_0").join("ports/1");
        fs::write(folder.join("counters/port_rcv_data"), "1000001000\n").unwrap();
        fs::write(folder.join("counters/port_rcv_packets"), "1000050\n").unwrap();
        fs::write(folder.join("hw_counters/out_of_buffer"), "1007\n").unwrap();
        let second = port.read().and(parse_ethtool(
            "tx_prio3_pause_duration: 20100\ntx_prio0_pause_duration: 0",
        ));
        let sample = second.since(&first).sample(2.0);
        assert_eq!(sample.bits_per_s, 16e9);
        assert_eq!(sample.packets_per_s, 5e5);
        assert_eq!(sample.pause_ratio, 0.01);
        assert_eq!(sample.loss_ratio, 0.001);
        assert!(!second.0.contains_key("lifespan"));
    }

    #[test]
    fn bnxt_re_counts_bytes_and_rxe_packets_only() {
        let counted = |pairs: &[(&str, u64)]| {
            Counters(
                pairs
                    .iter()
                    .map(|(name, value)| ((*name).to_owned(), *value))
                    .collect(),
            )
        };
        let bnxt = counted(&[
            ("rx_bytes", 125),
            ("rx_pkts", 99),
            ("tx_pkts", 0),
            ("to_retransmits", 1),
        ])
        .sample(1.0);
        assert_eq!(
            (bnxt.bits_per_s, bnxt.packets_per_s, bnxt.loss_ratio),
            (1000.0, 99.0, 1.0 / 99.0)
        );
        let rxe = counted(&[
            ("rcvd_pkts", 10),
            ("sent_pkts", 10),
            ("completer_retry_err", 2),
        ])
        .sample(1.0);
        assert_eq!(
            (rxe.bits_per_s, rxe.packets_per_s, rxe.loss_ratio),
            (0.0, 10.0, 0.1)
        );
    }

    #[test]
    fn diagnostic_counters_are_told_from_volumes_and_parts() {
        let all = parse_ethtool(
            "rx_bytes: 1\nrx_packets: 1\nrcvd_pkts: 1\nrx_out_of_buffer: 1\ntx_prio3_pause_duration: 1\nrx0_xdp_drop: 1\nout_of_seq_request: 1\nport_xmit_wait: 1\nrx_discards_phy: 1",
        );
        let expected = [
            "out_of_seq_request",
            "port_xmit_wait",
            "rx_discards_phy",
            "rx_out_of_buffer",
            "tx_prio3_pause_duration",
        ];
        assert_eq!(all.diagnostic(), expected);
    }

    #[test]
    fn a_counter_that_was_set_back_and_garbage_say_nothing() {
        let earlier = parse_ethtool("a: 10\nb: 3\nc: many\n: \nd");
        assert_eq!(earlier.0.len(), 2);
        assert_eq!(
            parse_ethtool("a: 4\nb: 5").since(&earlier),
            parse_ethtool("b: 2")
        );
    }

    #[test]
    fn a_port_that_is_not_there_is_named_with_what_there_is() {
        let root = tree("rxe0", &[("counters/port_rcv_data", "1")]);
        let error = PortCounters::open(root.path(), "mlx5_0", 1)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("mlx5_0/ports/1") && error.ends_with("rxe0"),
            "{error}"
        );
    }
}
