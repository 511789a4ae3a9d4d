//! What an end can run: the workloads that its port allows, what of them would harm the host, and the queues that each half needs.

use std::collections::BTreeMap;

use volley_transports::verbs::{QueuePairKind, QueuePairOptions};

use super::EngineError;
use super::flow::Half;
use super::message::Facts;
use crate::space::{Axis, Memory, Operation, Point, Space};

/// Halves of a workload's flows at one end, at most: of a loop both are here.
const HALVES_MAX: u32 = 3;
/// Bytes of a queue pair beside its requests, and of a request beside its pieces: more than adapters take.
const PAIR_BYTES: u64 = 16 << 10;
const REQUEST_BYTES: u64 = 128;
/// Requests that a queue which is not used holds.
const UNUSED_DEPTH: u32 = 1;

/// The workloads that an end can run, by what it is made of.
pub(super) fn space(facts: &Facts) -> Space {
    let nodes: Vec<Memory> = facts.nodes.iter().copied().map(Memory::Dram).collect();
    let mut space = Space {
        mtu: [256, 512, 1024, 2048, 4096]
            .into_iter()
            .filter(|mtu| *mtu <= facts.mtu)
            .collect(),
        memory_a: nodes.clone(),
        memory_b: nodes,
        ..Space::default()
    };
    let most = [
        (Axis::Qps, facts.queue_pairs / HALVES_MAX),
        (Axis::Sges, facts.sges),
        (Axis::SendDepth, facts.queue_depth),
        (Axis::ReceiveDepth, facts.queue_depth),
        (Axis::Batch, facts.queue_depth),
        (Axis::Regions, facts.regions / HALVES_MAX),
    ];
    for (axis, most) in most {
        let range = space.axes.get_mut(&axis).expect("every axis has a range");
        range.1 = range.1.min(most).max(1);
    }
    space.regions_total_max = space
        .regions_total_max
        .min(facts.regions / HALVES_MAX)
        .max(1);
    space
}

/// Whether a host with so many free bytes can run a workload without harm: nothing that comes from a peer is believed.
///
/// # Errors
/// What of it is too much, and how much there is.
pub(super) fn check(facts: &Facts, point: &Point, free: Option<u64>) -> Result<(), EngineError> {
    space(facts)
        .admits(point)
        .map_err(|error| EngineError::Unfit(error.to_string()))?;
    let requests = u64::from(point.send_depth) + u64::from(point.receive_depth);
    let pair = PAIR_BYTES + requests * (REQUEST_BYTES + 16 * u64::from(point.sges));
    let bytes = u64::from(HALVES_MAX) * u64::from(point.qps) * pair;
    match free {
        Some(free) if bytes > free / 2 => Err(EngineError::Unfit(format!(
            "queues of some {} MiB; half of this host's free memory is {} MiB",
            bytes >> 20,
            free >> 21
        ))),
        _ => Ok(()),
    }
}

/// Whether the requester names the responder's memory.
pub(super) fn one_sided(operation: Operation) -> bool {
    !matches!(
        operation,
        Operation::RcSend | Operation::UcSend | Operation::UdSend
    )
}

/// Whether a half has a loop to run.
pub(super) fn is_busy(half: &Half, point: &Point) -> bool {
    half.requests || point.operation.consumes_receives()
}

/// The queue pairs of a half: how many completions each may cause at once, and its sizes.
pub(super) fn queues(half: Half, point: &Point) -> (u32, QueuePairOptions) {
    let (send_depth, receive_depth) = match half.requests {
        true => (point.send_depth, UNUSED_DEPTH),
        false if point.operation.consumes_receives() => (UNUSED_DEPTH, point.receive_depth),
        false => (UNUSED_DEPTH, UNUSED_DEPTH),
    };
    let kind = match point.operation {
        Operation::UcSend | Operation::UcWrite | Operation::UcWriteImm => QueuePairKind::Unreliable,
        Operation::UdSend => QueuePairKind::Datagram,
        _ => QueuePairKind::Reliable,
    };
    let options = QueuePairOptions {
        kind,
        send_depth,
        receive_depth,
        send_pieces: point.sges,
        receive_pieces: point.sges,
        inline_bytes: 0,
    };
    (send_depth.max(receive_depth), options)
}

/// Memory that the system has left, bytes; none where it does not say.
pub(super) fn memory_left() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let lines: BTreeMap<&str, &str> = text.lines().filter_map(|l| l.split_once(':')).collect();
    let kib = lines.get("MemAvailable")?.trim().strip_suffix(" kB")?;
    kib.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::space::Direction;

    #[test]
    fn what_a_peer_asks_for_is_held_against_what_there_is() {
        let facts = Facts {
            device: "rxe0".into(),
            queue_pairs: 1 << 20,
            queue_depth: 1 << 15,
            sges: 32,
            regions: 1 << 20,
            mtu: 1024,
            nodes: vec![0],
            counters: Vec::new(),
        };
        let modest = Point {
            operation: Operation::RcSend,
            direction: Direction::Loopback,
            mtu: 1024,
            memory_a: Memory::Dram(0),
            memory_b: Memory::Dram(0),
            qps: 8,
            regions: 1,
            region_bytes: 4096,
            batch: 1,
            send_depth: 128,
            receive_depth: 128,
            sges: 1,
            messages: vec![4096],
        };
        let free = Some(1 << 30);
        check(&facts, &modest, free).unwrap();
        let refused = |point: Point, why: &str| {
            let error = check(&facts, &point, free).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        };
        let with = |change: &dyn Fn(&mut Point)| {
            let mut point = modest.clone();
            change(&mut point);
            point
        };
        refused(with(&|p| p.qps = 20_000), "half of this host's free memory");
        refused(with(&|p| p.mtu = 4096), "MTU is 4096");
        refused(
            with(&|p| (p.batch, p.send_depth) = (65, 64)),
            "must hold its batch",
        );
        refused(with(&|p| p.messages.clear()), "0");
        refused(with(&|p| p.messages[0] = u32::MAX), "region length");
    }
}
