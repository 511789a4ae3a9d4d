//! The metrics recorder behind `/metrics`.

use metrics::{describe_counter, describe_gauge, gauge};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use volley_actors::metric_names::{self, Kind};

use crate::certificate;
use crate::failure::Failure;
use crate::rdma_counters;

/// Bounds of buckets for times, in seconds: 100 us to 60 s, three to a decade.
const SECONDS: &[f64] = &[
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0,
    10.0, 30.0, 60.0,
];
/// Bounds of buckets for counts.
const COUNTS: &[f64] = &[
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0,
    16384.0,
];

/// Installs the recorder of this process, with every metric of the cluster registered, so that all of them are there from the first scrape on.
///
/// # Errors
/// When this process has a recorder already.
pub fn install() -> Result<PrometheusHandle, Failure> {
    let refused =
        |error| Failure::new(format!("the metrics recorder cannot be installed: {error}"));
    let mut builder = PrometheusBuilder::new();
    for &(name, kind, _) in metric_names::ALL {
        let bounds = match kind {
            Kind::Seconds => SECONDS,
            Kind::Counts => COUNTS,
            Kind::Counter | Kind::Gauge => continue,
        };
        builder = builder
            .set_buckets_for_metric(Matcher::Full(name.to_owned()), bounds)
            .map_err(refused)?;
    }
    let handle = builder.install_recorder().map_err(refused)?;
    metric_names::describe();
    describe_gauge!(certificate::EXPIRY, certificate::EXPIRY_HELP);
    gauge!(certificate::EXPIRY).set(0.0);
    describe_counter!(rdma_counters::NAME, rdma_counters::HELP);
    Ok(handle)
}
