//! What a workload is on the wire, as pure arithmetic: which host asks whom for what, the repeated sequence of messages, how a message is cut into pieces, and
//! which requests are signalled.

use serde::{Deserialize, Serialize};

use crate::space::{Direction, Operation, Point};

/// Bytes that are told of together: samples of slow adapters are no finer than this.
const TOLD_BYTES: f64 = (1 << 20) as f64;

/// One of the two hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Side {
    /// The one that receives in unidirectional traffic.
    A,
    /// The other.
    B,
}

/// Queue pairs by which data flows one way, `qps` of the workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Flow {
    pub(super) from: Side,
    pub(super) to: Side,
}

/// One end of a flow at one host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Half {
    /// Which of the workload's flows.
    pub(super) flow: usize,
    /// Whether requests are posted here; the other half answers them.
    pub(super) requests: bool,
}

impl Flow {
    /// The flows of a workload.
    pub(super) fn of(point: &Point) -> Vec<Flow> {
        let flow = |from, to| Flow { from, to };
        let mut flows = vec![flow(Side::B, Side::A)];
        match point.direction {
            Direction::Unidirectional => {}
            Direction::Bidirectional => flows.push(flow(Side::A, Side::B)),
            Direction::Loopback => flows.push(flow(Side::A, Side::A)),
        }
        flows
    }

    /// Who posts requests: who has the data, or for a READ who wants it.
    pub(super) fn requester(self, operation: Operation) -> Side {
        match operation {
            Operation::RcRead => self.to,
            _ => self.from,
        }
    }

    /// The other one.
    pub(super) fn responder(self, operation: Operation) -> Side {
        match operation {
            Operation::RcRead => self.from,
            _ => self.to,
        }
    }
}

/// The halves at one host, in the order in which both hosts speak of them.
pub(super) fn halves(point: &Point, side: Side) -> Vec<Half> {
    let flows = Flow::of(point).into_iter().enumerate();
    flows
        .flat_map(|(flow, ends)| {
            let at = |requests, end| (end == side).then_some(Half { flow, requests });
            [
                at(true, ends.requester(point.operation)),
                at(false, ends.responder(point.operation)),
            ]
        })
        .flatten()
        .collect()
}

/// How much was carried.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Volume {
    pub(super) messages: u64,
    pub(super) bytes: u64,
    pub(super) packets: u64,
}

impl Volume {
    pub(super) fn add(&mut self, more: Volume) {
        self.messages += more.messages;
        self.bytes += more.bytes;
        self.packets += more.packets;
    }

    /// What was carried since an earlier moment.
    pub(super) fn since(self, earlier: Volume) -> Volume {
        Volume {
            messages: self.messages.saturating_sub(earlier.messages),
            bytes: self.bytes.saturating_sub(earlier.bytes),
            packets: self.packets.saturating_sub(earlier.packets),
        }
    }
}

/// Packets that a message takes; an empty one takes one.
pub(super) fn packets(bytes: u32, mtu: u32) -> u64 {
    u64::from(bytes.div_ceil(mtu).max(1))
}

/// The messages of a queue pair: a short sequence, repeated for ever.
#[derive(Debug, Clone)]
pub(super) struct Sequence {
    sizes: Vec<u32>,
    /// What the first so many messages of a round carry; one more entry than there are sizes.
    sums: Vec<Volume>,
}

impl Sequence {
    /// # Panics
    /// There is no message: the caller has checked the workload.
    pub(super) fn new(messages: &[u32], mtu: u32) -> Self {
        assert!(!messages.is_empty(), "a workload has messages");
        let mut sums = vec![Volume::default()];
        for &size in messages {
            let last = sums[sums.len() - 1];
            sums.push(Volume {
                messages: last.messages + 1,
                bytes: last.bytes + u64::from(size),
                packets: last.packets + packets(size, mtu),
            });
        }
        Sequence {
            sizes: messages.to_vec(),
            sums,
        }
    }

    /// The size of a message, counted from 0.
    pub(super) fn size(&self, index: u64) -> u32 {
        self.sizes[(index % self.sizes.len() as u64) as usize]
    }

    /// What the first so many messages carry.
    pub(super) fn first(&self, count: u64) -> Volume {
        let length = self.sizes.len() as u64;
        let (rounds, rest) = (count / length, self.sums[(count % length) as usize]);
        let round = self.sums[self.sizes.len()];
        Volume {
            messages: count,
            bytes: rounds * round.bytes + rest.bytes,
            packets: rounds * round.packets + rest.packets,
        }
    }
}

/// Cuts a message evenly: offset and length of each piece. Fewer pieces than asked for where there are not so many bytes, for an adapter may take a piece of
/// length 0 for one of 2 GiB.
pub(super) fn cut(bytes: u32, pieces: u32) -> impl Iterator<Item = (u32, u32)> {
    let pieces = pieces.min(bytes);
    (0..pieces).map(move |piece| {
        let at = |n: u32| (u64::from(bytes) * u64::from(n) / u64::from(pieces)) as u32;
        (at(piece), at(piece + 1) - at(piece))
    })
}

/// After how many batches one asks to be told: a quarter of the queue, at most 64 requests and about [`TOLD_BYTES`], and never more than what the queue holds at once.
pub(super) fn batches_told_together(point: &Point) -> u32 {
    let mean = point.mean_bytes().max(1.0);
    let requests = (point.send_depth / 4)
        .min(64)
        .min((TOLD_BYTES / mean) as u32);
    (requests / point.batch).max(1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::space::Memory;

    fn point(operation: Operation, direction: Direction) -> Point {
        Point {
            operation,
            direction,
            mtu: 1024,
            memory_a: Memory::Dram(0),
            memory_b: Memory::Dram(0),
            qps: 1,
            regions: 1,
            region_bytes: 4096,
            batch: 1,
            send_depth: 16,
            receive_depth: 16,
            sges: 1,
            messages: vec![4096],
        }
    }

    #[test]
    fn data_flows_from_b_to_a_and_a_read_is_asked_for_by_who_wants_it() {
        let half = |flow, requests| Half { flow, requests };
        let write = point(Operation::RcWrite, Direction::Unidirectional);
        assert_eq!(halves(&write, Side::A), [half(0, false)]);
        assert_eq!(halves(&write, Side::B), [half(0, true)]);
        let read = point(Operation::RcRead, Direction::Unidirectional);
        assert_eq!(halves(&read, Side::A), [half(0, true)]);
        let both = point(Operation::UdSend, Direction::Bidirectional);
        assert_eq!(halves(&both, Side::A), [half(0, false), half(1, true)]);
        assert_eq!(halves(&both, Side::B), [half(0, true), half(1, false)]);
        let looped = point(Operation::RcSend, Direction::Loopback);
        assert_eq!(
            halves(&looped, Side::A),
            [half(0, false), half(1, true), half(1, false)]
        );
        assert_eq!(halves(&looped, Side::B), [half(0, true)]);
    }

    proptest! {
        #[test]
        fn a_sequence_carries_what_its_messages_carry(
            sizes in prop::collection::vec(32u32..100_000, 1..9), count in 0u64..100, mtu in prop::sample::select(vec![256u32, 1024, 4096]),
        ) {
            let sequence = Sequence::new(&sizes, mtu);
            let mut volume = Volume::default();
            for index in 0..count {
                let size = sequence.size(index);
                volume.messages += 1;
                volume.bytes += u64::from(size);
                volume.packets += packets(size, mtu);
            }
            prop_assert_eq!(sequence.first(count), volume);
        }

        #[test]
        fn pieces_cover_a_message_without_a_gap_and_none_is_empty(bytes in 1u32..(1 << 30), pieces in 1u32..31) {
            let mut end = 0;
            for (at, len) in cut(bytes, pieces) {
                prop_assert!(at == end && len > 0);
                end = at + len;
            }
            prop_assert_eq!(end, bytes);
        }

        #[test]
        fn a_queue_never_waits_for_what_nobody_is_told_of(send_depth in 1u32..5000, batch in 1u32..5000, size in 32u32..(4 << 20)) {
            prop_assume!(batch <= send_depth);
            let point = Point { send_depth, batch, messages: vec![size], ..point(Operation::RcWrite, Direction::Unidirectional) };
            // Untold requests are fewer than one signalled group; with them in the queue another batch must fit until the group is whole.
            prop_assert!(batches_told_together(&point) * batch <= send_depth);
        }
    }
}
