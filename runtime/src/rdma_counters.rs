//! The counters of the RDMA ports that this process's rows travel by, in `/metrics`: what `perfquery`, `rdma statistic` and the driver count, under the driver's names.
//!
//! Packets sent again, out of sequence or dropped, congestion notifications and pauses are how a fabric says that it suffers; which of them a card counts is the card's
//! matter, so none is renamed or left out. They are read when somebody scrapes.

use std::path::Path;
use std::sync::OnceLock;

use metrics::counter;
use volley_collie::host::PortCounters;
use volley_transports::rdma::RailName;

/// Name of the metric; its labels are device, port and counter.
pub(crate) const NAME: &str = "volley_rdma_port_counter_total";
/// What it means.
pub(crate) const HELP: &str = "Counters of the RDMA ports in use as the driver keeps them, by device, port and counter; only of processes whose rows travel by RDMA.";

static PORTS: OnceLock<Vec<(RailName, PortCounters)>> = OnceLock::new();

/// Shows the counters of these ports from now on. The first call counts: a process has one set of rails.
pub(crate) fn watch<'a>(rails: impl Iterator<Item = &'a RailName>) {
    let _ = PORTS.set(open(Path::new("/"), rails));
}

fn open<'a>(
    root: &Path,
    rails: impl Iterator<Item = &'a RailName>,
) -> Vec<(RailName, PortCounters)> {
    let port = |rail: &RailName| match PortCounters::open(root, &rail.device, rail.port) {
        Ok(counters) => Some((rail.clone(), counters)),
        Err(error) => {
            tracing::warn!("counters of {rail} are not shown: {error}");
            None
        }
    };
    rails.filter_map(port).collect()
}

/// Reads the counters, if there are any to show.
pub(crate) fn publish() {
    publish_from(PORTS.get().map_or(&[][..], Vec::as_slice));
}

fn publish_from(ports: &[(RailName, PortCounters)]) {
    for (rail, counters) in ports {
        for (name, value) in counters.read().0 {
            let (device, port) = (rail.device.clone(), rail.port.to_string());
            counter!(NAME, "device" => device, "port" => port, "counter" => name).absolute(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use metrics_exporter_prometheus::PrometheusBuilder;

    use super::*;

    #[test]
    fn what_the_driver_counts_is_shown_under_its_name() {
        let root = tempfile::tempdir().unwrap();
        let folder = root
            .path()
            .join("sys/class/infiniband/mlx5_0/ports/1/hw_counters");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("out_of_sequence"), "17\n").unwrap();
        let rails: Vec<RailName> = ["mlx5_0", "mlx5_9"].map(|n| n.parse().unwrap()).into();
        let ports = open(root.path(), rails.iter());
        let recorder = PrometheusBuilder::new().build_recorder();
        let handle = recorder.handle();
        metrics::with_local_recorder(&recorder, || publish_from(&ports));
        let text = handle.render();
        let line = format!("{NAME}{{device=\"mlx5_0\",port=\"1\",counter=\"out_of_sequence\"}} 17");
        assert!(text.contains(&line), "{text}");
        assert!(!text.contains("mlx5_9"));
    }
}
