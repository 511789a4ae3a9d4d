//! What two adapters owe a workload: measured on themselves, by plain traffic of one size.
//!
//! For each operation and direction two things are known of the plainest workloads: the time of a message of each of a few sizes, at the largest MTU, and the
//! greatest rate of packets at any MTU. A workload is owed the bytes of its messages in their times, unless that takes more packets than the adapter was ever
//! seen to carry. Between two measured sizes the time of a message is interpolated, which owes a little less than the hardware may give and so accuses nobody
//! falsely. Small MTUs are owed the same bytes: an adapter that is slow there has an anomaly, not an excuse.

use serde::{Deserialize, Serialize};

use super::flow::packets;
use crate::space::{Axis, Direction, Operation, Point, Space};
use crate::subsystem::Bound;

/// Measured sizes are this factor apart.
const STEP: u32 = 4;
/// The plain workloads: queue pairs, and work requests of a doorbell. The better one counts.
const PLAIN: [(u32, u32); 2] = [(1, 16), (8, 16)];
const PLAIN_DEPTH: u32 = 128;
const PLAIN_RECEIVES: u32 = 512;

/// What plain traffic reached.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Owed {
    /// Transport and verb.
    pub operation: Operation,
    /// Direction.
    pub direction: Direction,
    /// Path MTU, bytes.
    pub mtu: u32,
    /// Size of its messages, bytes.
    pub bytes: u32,
    /// Messages a second that arrived at the end where fewer did.
    pub messages_per_s: f64,
    /// Share of packets lost or sent again.
    pub loss: f64,
}

/// What a pair of adapters reached by plain traffic.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Calibration {
    /// The adapters, as reports call them.
    pub subsystem: String,
    /// The measurements.
    pub owed: Vec<Owed>,
}

/// A size, direction and operation to be measured, by each of these workloads.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Plain {
    pub(super) operation: Operation,
    pub(super) direction: Direction,
    pub(super) mtu: u32,
    pub(super) bytes: u32,
    pub(super) points: Vec<Point>,
}

/// What must be measured so that every workload of a space is owed something.
pub(super) fn plan(space: &Space) -> Vec<Plain> {
    let largest = space.mtu.iter().copied().max().unwrap_or(1024);
    let smallest = space.mtu.iter().copied().min().unwrap_or(1024);
    let mut plan: Vec<Plain> = Vec::new();
    for &operation in &space.operation {
        for &direction in &space.direction {
            let (first, mut last) = space.range(Axis::LargestBytes);
            if operation.is_datagram() {
                last = last.min(largest);
            }
            let mut add = |mtu, bytes| {
                let plain = plain(space, operation, direction, mtu, bytes);
                if !plan.contains(&plain) {
                    plan.push(plain);
                }
            };
            sizes(first, last.max(first)).for_each(|bytes| add(largest, bytes));
            // The rate of packets: messages of one packet of the smallest size.
            add(smallest, smallest);
        }
    }
    plan
}

/// Sizes a step apart from the first to the last, with both.
fn sizes(first: u32, last: u32) -> impl Iterator<Item = u32> {
    let steps = std::iter::successors(Some(first), |size| size.checked_mul(STEP));
    steps
        .take_while(move |size| *size < last)
        .chain(std::iter::once(last))
}

fn plain(space: &Space, operation: Operation, direction: Direction, mtu: u32, bytes: u32) -> Plain {
    let point = |(qps, batch): (u32, u32)| Point {
        operation,
        direction,
        mtu,
        memory_a: space.memory_a[0],
        memory_b: space.memory_b[0],
        qps,
        regions: 1,
        region_bytes: bytes.max(4096),
        batch,
        send_depth: PLAIN_DEPTH,
        receive_depth: PLAIN_RECEIVES,
        sges: 1,
        messages: vec![bytes],
    };
    Plain {
        operation,
        direction,
        mtu,
        bytes,
        points: PLAIN.map(point).to_vec(),
    }
}

impl Calibration {
    /// What a workload is owed; none where nothing like it was measured.
    pub fn bound(&self, point: &Point) -> Option<Bound> {
        let alike: Vec<&Owed> = self
            .owed
            .iter()
            .filter(|owed| {
                owed.operation == point.operation
                    && owed.direction == point.direction
                    && owed.messages_per_s > 0.0
            })
            .collect();
        let largest = alike.iter().map(|owed| owed.mtu).max()?;
        let mut times: Vec<(f64, f64)> = alike
            .iter()
            .filter(|owed| owed.mtu == largest)
            .map(|owed| (f64::from(owed.bytes), 1.0 / owed.messages_per_s))
            .collect();
        times.sort_by(|a, b| a.0.total_cmp(&b.0));
        let packet_rate = alike
            .iter()
            .map(|owed| owed.messages_per_s * packets(owed.bytes, owed.mtu) as f64)
            .fold(0.0, f64::max);
        let count = point.messages.len() as f64;
        let sizes = point.messages.iter();
        let seconds = sizes
            .map(|&bytes| time_of(f64::from(bytes), &times))
            .sum::<f64>()
            / count;
        let sizes = point.messages.iter();
        let packets = sizes
            .map(|&bytes| packets(bytes, point.mtu) as f64)
            .sum::<f64>()
            / count;
        let messages = (1.0 / seconds).min(packet_rate / packets);
        Some(Bound {
            bits_per_s: messages * 8.0 * point.mean_bytes(),
            packets_per_s: messages * packets,
        })
    }

    /// The operation and direction of a space that was not measured, if there is one.
    pub fn missing(&self, space: &Space) -> Option<(Operation, Direction)> {
        let all = space.operation.iter();
        let all = all.flat_map(|o| space.direction.iter().map(move |d| (*o, *d)));
        all.into_iter().find(|(operation, direction)| {
            !self.owed.iter().any(|owed| {
                owed.operation == *operation
                    && owed.direction == *direction
                    && owed.messages_per_s > 0.0
            })
        })
    }

    /// The share of packets that plain traffic of a space loses, where it loses most.
    pub fn clean_loss(&self, space: &Space) -> f64 {
        let of = |owed: &&Owed| {
            space.operation.contains(&owed.operation) && space.direction.contains(&owed.direction)
        };
        self.owed
            .iter()
            .filter(of)
            .map(|owed| owed.loss)
            .fold(0.0, f64::max)
    }
}

/// The time of a message of a size, from those of measured sizes in rising order: a line between neighbours, the last rate of bytes beyond the last, and the first
/// time before the first.
fn time_of(bytes: f64, times: &[(f64, f64)]) -> f64 {
    let after = times.partition_point(|(measured, _)| *measured < bytes);
    match (
        after.checked_sub(1).map(|before| times[before]),
        times.get(after),
    ) {
        (Some((a, time_a)), Some((b, time_b))) => {
            time_a + (time_b - time_a) * (bytes - a) / (b - a)
        }
        (Some((a, time_a)), None) => time_a * bytes / a,
        (None, Some((_, time_b))) => *time_b,
        (None, None) => f64::INFINITY,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An adapter with a packet rate, a rate of bits and nothing wrong.
    fn calibrated(space: &Space, packets_per_s: f64, bytes_per_s: f64) -> Calibration {
        let owed = plan(space).into_iter().map(|plain| Owed {
            operation: plain.operation,
            direction: plain.direction,
            mtu: plain.mtu,
            bytes: plain.bytes,
            messages_per_s: (packets_per_s / packets(plain.bytes, plain.mtu) as f64)
                .min(bytes_per_s / f64::from(plain.bytes)),
            loss: 0.0,
        });
        Calibration {
            subsystem: "test".into(),
            owed: owed.collect(),
        }
    }

    #[test]
    fn an_adapter_owes_no_more_than_it_has_and_hardly_less() {
        use rand::SeedableRng;
        let space = Space::default();
        let (packet_rate, byte_rate) = (50e6, 12.5e9);
        let calibration = calibrated(&space, packet_rate, byte_rate);
        assert_eq!(calibration.missing(&space), None);
        let mut rng = rand_pcg::Pcg64::seed_from_u64(4);
        for _ in 0..2000 {
            let point = space.sample(&mut rng);
            let count = point.messages.len() as f64;
            let sizes = point.messages.iter();
            // What an adapter takes that is held up by packets or by bytes, message by message.
            let seconds: f64 = sizes
                .map(|&bytes| {
                    (packets(bytes, point.mtu) as f64 / packet_rate)
                        .max(f64::from(bytes) / byte_rate)
                })
                .sum::<f64>()
                / count;
            let has = 8.0 * point.mean_bytes() / seconds;
            let owed = calibration.bound(&point).unwrap();
            assert!(owed.bits_per_s <= has * 1.000_001, "{point:?}");
            assert!(
                owed.bits_per_s >= has * 0.74,
                "{point:?}: {} of {has}",
                owed.bits_per_s
            );
        }
    }

    #[test]
    fn a_small_mtu_is_owed_the_same_bytes_while_packets_suffice() {
        let space = Space::default();
        let calibration = calibrated(&space, 50e6, 12.5e9);
        let mut point = plan(&space)[3].points[0].clone();
        point.messages = vec![1 << 20];
        let large = calibration.bound(&point).unwrap();
        point.mtu = 1024;
        let small = calibration.bound(&point).unwrap();
        assert!((small.bits_per_s / large.bits_per_s - 1.0).abs() < 1e-9);
        // Of an adapter that is slow with packets, fewer bytes are owed.
        let slow = calibrated(&space, 5e6, 12.5e9);
        let small = slow.bound(&point).unwrap();
        assert!((small.packets_per_s / 5e6 - 1.0).abs() < 1e-9);
    }

    #[test]
    fn what_was_not_measured_is_owed_nothing_and_named() {
        let mut space = Space {
            operation: vec![Operation::RcWrite],
            ..Space::default()
        };
        let calibration = calibrated(&space, 50e6, 12.5e9);
        let mut point = plan(&space)[0].points[0].clone();
        point.operation = Operation::RcRead;
        assert_eq!(calibration.bound(&point), None);
        space.operation.push(Operation::RcRead);
        let missing = calibration.missing(&space).unwrap();
        assert_eq!(missing.0, Operation::RcRead);
    }

    #[test]
    fn every_planned_workload_is_one_of_the_space_but_for_its_ranges() {
        for plain in plan(&Space::default()) {
            for point in &plain.points {
                assert!(point.batch <= point.send_depth);
                assert!(point.region_bytes >= plain.bytes);
                assert!(!point.operation.is_datagram() || plain.bytes <= plain.mtu);
            }
        }
    }
}
