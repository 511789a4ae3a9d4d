//! The traffic of a plan held against the known anomalies of the fabric it will run on.
//!
//! Between the sides runs one kind of traffic: RDMA writes with immediate, both ways at once, from and into GPU memory, one queue pair for each peer
//! and adapter, a message for each micro-batch. Four settings of it are free and change nothing of the plan: MTU, queue pairs for
//! each peer (a message is then divided over them), work requests of a doorbell, and depth of the send queue.

use std::fmt;
use std::path::Path;

use serde::Serialize;
use volley_collie::{Direction, KnownAnomalies, Memory, Met, Operation, Point};
use volley_planner::{Candidate, Setting};

use super::rows_to_each;
use crate::failure::Failure;

/// What an adapter of each side does, and what was changed to keep clear of anomalies.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Traffic {
    subsystem: String,
    /// Of an attention worker's adapter and of an expert worker's.
    sides: [(&'static str, Point); 2],
    /// What keeps it clear.
    shape: Shape,
    /// In words; empty if the traffic was clean as it is.
    changes: Vec<String>,
    /// Settings that the search did not try: of these nothing is known.
    unknown: Vec<String>,
}

/// The free settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Shape {
    mtu: u32,
    queue_pairs_per_peer: u32,
    batch: u32,
    send_depth: u32,
}

/// What the RDMA transport does if nothing forbids it.
const USUAL: Shape = Shape {
    mtu: 4096,
    queue_pairs_per_peer: 1,
    batch: 1,
    send_depth: 128,
};

impl Shape {
    /// Every shape, the least changed ones first.
    fn all() -> Vec<Shape> {
        let mut all = Vec::new();
        for mtu in [4096, 2048, 1024] {
            for queue_pairs_per_peer in [1, 2, 4, 8] {
                for batch in [1, 2, 4, 8, 16, 32] {
                    for send_depth in [128, 64, 32, 16, 256, 512, 1024] {
                        all.push(Shape {
                            mtu,
                            queue_pairs_per_peer,
                            batch,
                            send_depth,
                        });
                    }
                }
            }
        }
        all.sort_by_key(|shape| shape.changes().len());
        all
    }

    fn changes(&self) -> Vec<String> {
        let settings = [
            ("MTU", USUAL.mtu, self.mtu),
            (
                "queue pairs for each peer",
                USUAL.queue_pairs_per_peer,
                self.queue_pairs_per_peer,
            ),
            ("work requests of a doorbell", USUAL.batch, self.batch),
            ("send queue depth", USUAL.send_depth, self.send_depth),
        ];
        let changed = settings.into_iter().filter(|(_, usual, now)| usual != now);
        changed
            .map(|(name, usual, now)| format!("{name} {now} instead of {usual}"))
            .collect()
    }

    /// What an adapter with `peers` peers does, whose messages have `bytes`.
    fn point(&self, peers: usize, bytes: f64) -> Point {
        let each = (bytes / f64::from(self.queue_pairs_per_peer)).clamp(32.0, f64::from(4 << 20));
        let each = each.round() as u32;
        Point {
            operation: Operation::RcWriteImm,
            direction: Direction::Bidirectional,
            mtu: self.mtu,
            memory_a: Memory::Gpu(0),
            memory_b: Memory::Gpu(0),
            qps: (peers as u32 * self.queue_pairs_per_peer).max(1),
            regions: 1,
            region_bytes: each.max(4096),
            batch: self.batch,
            send_depth: self.send_depth,
            receive_depth: self.send_depth,
            sges: 1,
            messages: vec![each],
        }
    }
}

/// Refuses a plan whose traffic meets a known anomaly, or changes the traffic's shape until it meets none.
pub(super) fn vet(
    path: &Path,
    setting: Setting<'_>,
    best: &Candidate,
    reshape: bool,
) -> Result<Traffic, Failure> {
    let known = KnownAnomalies::load(path).map_err(|error| Failure::new(error.to_string()))?;
    let deployment = &best.deployment;
    let rows = rows_to_each(best, setting.model);
    let bytes = rows * setting.model.hidden as f64 * setting.precision.dispatch.bytes();
    let sides = |shape: &Shape| {
        [
            (
                "an attention worker's adapter",
                shape.point(
                    deployment.expert_workers,
                    bytes / deployment.attention.tp as f64,
                ),
            ),
            (
                "an expert worker's adapter",
                shape.point(
                    deployment.attention_workers,
                    bytes / deployment.experts.tp as f64,
                ),
            ),
        ]
    };
    let met = |shape: &Shape| -> Vec<(&'static str, Met)> {
        let all = sides(shape).into_iter();
        all.flat_map(|(side, point)| known.met_by(&point).into_iter().map(move |met| (side, met)))
            .collect()
    };
    let traffic = |shape: &Shape| Traffic {
        subsystem: known.subsystem.clone(),
        sides: sides(shape),
        shape: *shape,
        changes: shape.changes(),
        unknown: sides(shape)
            .iter()
            .filter_map(|(_, point)| known.space.admits(point).err())
            .map(|outside| outside.to_string())
            .collect(),
    };
    let found = met(&USUAL);
    if found.is_empty() {
        return Ok(traffic(&USUAL));
    }
    if reshape && let Some(shape) = Shape::all().iter().find(|shape| met(shape).is_empty()) {
        return Ok(traffic(shape));
    }
    let mut reason = format!(
        "the plan's traffic meets known anomalies of {} ({}):",
        known.subsystem,
        path.display()
    );
    for (side, met) in &found {
        reason += &format!(
            "\n  {side}: anomaly {}: {}\n    since {}",
            met.anomaly, met.symptom, met.conditions
        );
        for way in &met.ways_out {
            reason += &format!("\n    to avoid it, {way}");
        }
    }
    reason += if reshape {
        "\nno MTU, number of queue pairs, doorbell batch and depth avoids all of them; plan with other --gpus, or mend the fabric"
    } else {
        "\n--reshape looks for settings of the transport that avoid them"
    };
    Err(Failure::new(reason))
}

impl Traffic {
    /// Section `[rdma]` of the configuration: settings that were changed and have a key. For the others there is none: the transport has one queue pair for
    /// each peer and rail, and rings one doorbell for all frames that wait.
    pub(super) fn section(&self) -> String {
        let mut section = "\n[rdma]\n".to_owned();
        for (key, usual, now) in [
            ("mtu", USUAL.mtu, self.shape.mtu),
            ("depth", USUAL.send_depth, self.shape.send_depth),
        ] {
            if usual != now {
                section += &format!("{key} = {now}\n");
            }
        }
        section += "# known_anomalies = \"/etc/volley/anomalies.json\"   the file of `volley vet search`, on every host: workers hold their traffic against it\n";
        section
    }
}

impl fmt::Display for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (side, point) in &self.sides {
            writeln!(
                f,
                "traffic          {side}: {} queue pairs, messages of {} bytes, MTU {}, doorbell batch {}, depth {}",
                point.qps, point.messages[0], point.mtu, point.batch, point.send_depth
            )?;
        }
        for unknown in &self.unknown {
            writeln!(f, "not searched     {unknown}")?;
        }
        match self.changes.as_slice() {
            [] => writeln!(f, "anomalies        of {}: none met", self.subsystem),
            changes => writeln!(
                f,
                "anomalies        of {}: none met with {}",
                self.subsystem,
                changes.join(", ")
            ),
        }
    }
}
