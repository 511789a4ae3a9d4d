//! What a search needs of an RDMA subsystem: run a workload, and say what both ends saw.

use serde::{Deserialize, Serialize};

use crate::space::{Point, Space};

/// One second at one end of the traffic.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Payload received, bits a second.
    pub bits_per_s: f64,
    /// Packets received, a second.
    pub packets_per_s: f64,
    /// Share of the second in which this end told its peer to pause.
    pub pause_ratio: f64,
    /// Share of packets lost or sent again.
    pub loss_ratio: f64,
    /// The diagnostic counters, in the order of [`Subsystem::counters`], a second.
    pub counters: Vec<f64>,
}

/// What the two ends saw: host A first. Samples are consecutive seconds of settled traffic.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// The samples of hosts A and B; the second is empty where one host does it all.
    pub ends: [Vec<Sample>; 2],
}

impl Measurement {
    /// Each counter's mean over the samples, at the end where it is higher.
    pub fn counters(&self) -> Vec<f64> {
        let count = self.ends[0]
            .first()
            .map_or(0, |sample| sample.counters.len());
        (0..count)
            .map(|i| {
                let mean = |end: &Vec<Sample>| {
                    end.iter().map(|s| s.counters[i]).sum::<f64>() / end.len().max(1) as f64
                };
                self.ends.iter().map(mean).fold(0.0, f64::max)
            })
            .collect()
    }
}

/// The throughput that the hardware owes a workload of this transport, verb and size. A workload that reaches either is healthy.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Bound {
    /// Payload, bits a second.
    pub bits_per_s: f64,
    /// Packets a second.
    pub packets_per_s: f64,
}

/// The outcome of running one workload.
#[derive(Debug, Clone, PartialEq)]
pub struct Probe {
    /// What it took, with set-up and teardown, seconds of the subsystem's clock.
    pub seconds: f64,
    /// What was seen, or why the traffic could not be set up.
    pub outcome: Result<Measurement, SetupFailed>,
}

/// The workload did not run: this says nothing of the hardware's behaviour under it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the workload did not run: {0}")]
pub struct SetupFailed(pub String);

/// A pair of hosts with their adapters, or a model of them.
pub trait Subsystem {
    /// What reports call it.
    fn name(&self) -> String;

    /// The workloads it can run.
    fn space(&self) -> &Space;

    /// The names of its diagnostic counters.
    fn counters(&self) -> &[String];

    /// The throughput owed to a workload.
    fn bound(&self, point: &Point) -> Bound;

    /// Runs a workload until its traffic has settled, and samples it.
    fn probe(&mut self, point: &Point) -> Probe;
}
