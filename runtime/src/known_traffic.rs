//! The RDMA transport's traffic held against the anomalies that `volley vet` has found on the fabric, before a row travels: settings that meet one are refused with
//! the reason, or changed if that is allowed.
//!
//! What a card carries for one worker: WRITE WITH IMMEDIATE both ways, one queue pair for each peer, a region that peers write and one that is read, frames of any length up to a slot's. MTU and
//! depth of the send queue can be changed without changing what the cluster is; the rest follows from it.

use std::path::Path;

use volley_collie::{
    Axis, Category, Direction, Feature, KnownAnomalies, Memory, Operation, Point, Setting,
};
use volley_transports::rdma::RdmaOptions;
use volley_transports::verbs::Mtu;
use volley_transports::{Role, Topology};

use crate::failure::Failure;

/// Bytes of a frame without rows.
const EMPTY_FRAME: u32 = 64;

/// What a worker of `role` does to its card with these options.
fn traffic(topology: &Topology, role: Role, options: &RdmaOptions, mtu: Mtu) -> Point {
    let peers = topology.workers(role.opposite());
    let bytes = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
    let slots = usize::from(peers) * usize::from(topology.micro_batches);
    let region = slots * topology.dispatch_bytes.max(topology.combine_bytes);
    let micro_batches = u32::from(topology.micro_batches);
    Point {
        operation: Operation::RcWriteImm,
        direction: Direction::Bidirectional,
        mtu: mtu.bytes(),
        memory_a: Memory::Dram(0),
        memory_b: Memory::Dram(0),
        qps: u32::from(peers).max(1),
        regions: 2,
        region_bytes: bytes(region),
        // Frames that wait for one peer go with one doorbell.
        batch: micro_batches,
        send_depth: options.depth.max(2 * micro_batches),
        receive_depth: micro_batches,
        sges: 1,
        messages: vec![
            EMPTY_FRAME,
            bytes(topology.dispatch_bytes),
            bytes(topology.combine_bytes),
        ],
    }
}

/// The options with which a worker of `role` meets no known anomaly, and what was changed in words.
///
/// # Errors
/// The traffic meets one, and it may not be changed or no change helps; each is named with its conditions and ways out.
pub(crate) fn clear(
    known: &KnownAnomalies,
    topology: &Topology,
    role: Role,
    options: &RdmaOptions,
    mtu: Mtu,
    may_change: bool,
) -> Result<(RdmaOptions, Vec<String>), Failure> {
    let point = traffic(topology, role, options, mtu);
    let allowed = [
        Feature::Category(Category::Mtu),
        Feature::Axis(Axis::SendDepth),
    ];
    let allowed = if may_change { &allowed[..] } else { &[] };
    let (clean, changes) = known.clear(&point, allowed).map_err(|refused| {
        let remedy = if may_change {
            "change the number of workers or micro-batches, or `limits.max_batch_tokens`"
        } else {
            "`rdma.anomalies = \"avoid\"` lets MTU and depth be changed"
        };
        Failure::new(format!(
            "the rows of this {role} worker would meet what is known of {}: {refused}; {remedy}",
            known.subsystem
        ))
    })?;
    let mut options = options.clone();
    for change in &changes {
        match change.to {
            Setting::Axis(Axis::SendDepth, depth) => options.depth = depth,
            // The smallest that packets can have beside it was offered by the search's own space.
            _ => options.mtu = Mtu::from_bytes(clean.mtu).or(options.mtu),
        }
    }
    Ok((options, changes.iter().map(ToString::to_string).collect()))
}

/// What is known of the fabric.
///
/// # Errors
/// The file cannot be read.
pub(crate) fn load(path: &Path) -> Result<KnownAnomalies, Failure> {
    KnownAnomalies::load(path)
        .map_err(|error| Failure::new(format!("rdma.known_anomalies: {error}")))
}

#[cfg(test)]
mod tests {
    use volley_collie::{Edge, Factor, Mfs, Quantity, Space, Symptom};

    use super::*;

    const TOPOLOGY: Topology = Topology {
        attention: 2,
        experts: 40,
        micro_batches: 2,
        dispatch_bytes: 100_000,
        combine_bytes: 50_000,
    };

    /// Many queue pairs, each with a deep send queue.
    fn known(qps: f64, depth: f64) -> KnownAnomalies {
        let at_least = |axis, bound: f64| Factor::Within {
            quantity: Quantity::Axis(axis),
            lower: Some(Edge {
                inside: bound,
                outside: bound * 0.9,
                likely: None,
            }),
            upper: None,
        };
        let options = RdmaOptions::default();
        let anomaly = Mfs {
            factors: vec![at_least(Axis::Qps, qps), at_least(Axis::SendDepth, depth)],
            anchor: traffic(&TOPOLOGY, Role::Attention, &options, Mtu::B4096),
            symptom: Symptom {
                pause: Some(0.2),
                throughput: None,
                loss: None,
            },
            signature: vec![],
            probes: 1,
        };
        KnownAnomalies::new("a card".into(), Space::default(), vec![], vec![anomaly])
    }

    #[test]
    fn who_meets_one_is_refused_with_the_way_out_or_changed() {
        let options = RdmaOptions::default();
        let clear = |known: &KnownAnomalies, role, may| {
            clear(known, &TOPOLOGY, role, &options, Mtu::B4096, may)
        };
        let known = known(32.0, 64.0);
        let message = clear(&known, Role::Attention, false)
            .unwrap_err()
            .to_string();
        for part in ["attention worker", "a card", "number 1", "rdma.anomalies"] {
            assert!(message.contains(part), "{part}: {message}");
        }
        let (changed, words) = clear(&known, Role::Attention, true).unwrap();
        assert!(
            changed.depth < 64 && words.len() == 1,
            "{changed:?} {words:?}"
        );
        // An expert worker has two peers: it is clear as it is.
        let (same, words) = clear(&known, Role::Expert, false).unwrap();
        assert_eq!((same, words.len()), (options.clone(), 0));
    }

    #[test]
    fn what_no_change_helps_is_refused_also_when_changes_are_allowed() {
        // The least depth that two micro-batches take meets it too.
        let options = RdmaOptions {
            depth: 2,
            ..RdmaOptions::default()
        };
        let found = clear(
            &known(1.0, 0.5),
            &TOPOLOGY,
            Role::Attention,
            &options,
            Mtu::B4096,
            true,
        );
        let message = found.unwrap_err().to_string();
        assert!(message.contains("limits.max_batch_tokens"), "{message}");
    }
}
