//! From the readings of both ends to what a measurement holds: pure arithmetic.
//!
//! What arrives at an end is counted where it can be known: by receives that completed, by READs that came back, and for a reliable WRITE by the acknowledgements at
//! its sender. An unreliable WRITE tells nobody whether it arrived; of it the adapters' packet counters say what share was lost.

use std::collections::BTreeMap;

use super::flow::{Flow, Half, Side, Volume, halves};
use super::message::Reading;
use crate::host::Counters;
use crate::space::{Operation, Point};
use crate::subsystem::{Measurement, Sample};

/// A diagnostic counter that stands still is given this rate, an event a second: energies are relative, and nothing is a multiple of 0.
const STANDSTILL: f64 = 1.0;

/// What both ends saw between one reading and the next.
struct Second<'r> {
    point: &'r Point,
    /// Of each end: both readings, and the time between them in seconds.
    ends: [(&'r Reading, &'r Reading, f64); 2],
    halves: [Vec<Half>; 2],
}

/// The samples of a workload, from readings of hosts A and B; `names` are the diagnostic counters.
///
/// # Errors
/// The readings do not fit the workload, or the clock of an end stood still.
pub(super) fn measurement(
    point: &Point,
    readings: [&[Reading]; 2],
    names: &[String],
) -> Result<Measurement, String> {
    let halves = [halves(point, Side::A), halves(point, Side::B)];
    let count = readings[0].len();
    let fit = readings.iter().zip(&halves).all(|(readings, halves)| {
        readings.len() == count
            && readings
                .iter()
                .all(|reading| reading.volumes.len() == halves.len())
    });
    if !fit || count < 2 {
        return Err("the readings do not fit the workload".to_owned());
    }
    let mut ends = [Vec::new(), Vec::new()];
    for at in 1..count {
        let pair = |side: usize| {
            let (before, after) = (&readings[side][at - 1], &readings[side][at]);
            let seconds = after.at_us.saturating_sub(before.at_us) as f64 / 1e6;
            match seconds > 0.0 {
                true => Ok((before, after, seconds)),
                false => Err("an end's clock stood still".to_owned()),
            }
        };
        let second = Second {
            point,
            ends: [pair(0)?, pair(1)?],
            halves: halves.clone(),
        };
        for side in [Side::A, Side::B] {
            ends[side as usize].push(second.sample(side, names));
        }
    }
    Ok(Measurement { ends })
}

impl Second<'_> {
    fn sample(&self, side: Side, names: &[String]) -> Sample {
        let (_, _, seconds) = self.ends[side as usize];
        let grown = self.grown(side);
        let base = grown.sample(seconds);
        let (mut bits, mut packets, mut lost) = (0.0, 0.0, base.loss_ratio);
        for (number, flow) in Flow::of(self.point).into_iter().enumerate() {
            if flow.to != side {
                continue;
            }
            let (arrived, loss) = self.arrived(number, flow);
            bits += 8.0 * arrived.0;
            packets += arrived.1;
            lost = lost.max(loss);
        }
        let rate = |name: &String| {
            let events = grown.0.get(name).copied().unwrap_or(0) as f64;
            (events / seconds).max(STANDSTILL)
        };
        Sample {
            bits_per_s: bits,
            packets_per_s: packets,
            pause_ratio: base.pause_ratio,
            loss_ratio: lost,
            counters: names.iter().map(rate).collect(),
        }
    }

    /// Bytes and packets a second that a flow brought, and the share of it that was lost where no counter of the receiver says so.
    fn arrived(&self, number: usize, flow: Flow) -> ((f64, f64), f64) {
        let operation = self.point.operation;
        let asked = self.rate(flow.requester(operation), number, true);
        if operation.consumes_receives() {
            let came = self.rate(flow.responder(operation), number, false);
            let unreliable = matches!(
                operation,
                Operation::UcSend | Operation::UcWriteImm | Operation::UdSend
            );
            let share = match unreliable && asked.2 > 0.0 {
                true => (1.0 - came.2 / asked.2).max(0.0),
                false => 0.0,
            };
            return ((came.0, came.1), share);
        }
        if operation == Operation::UcWrite {
            let lost = self.lost_packets();
            return ((asked.0 * (1.0 - lost), asked.1 * (1.0 - lost)), lost);
        }
        ((asked.0, asked.1), 0.0)
    }

    /// Bytes, packets and messages a second of one half of a flow.
    fn rate(&self, side: Side, flow: usize, requests: bool) -> (f64, f64, f64) {
        let (before, after, seconds) = self.ends[side as usize];
        let halves = self.halves[side as usize].iter();
        let at = halves
            .clone()
            .position(|half| *half == Half { flow, requests });
        let volume = at.map_or(Volume::default(), |at| {
            after.volumes[at].since(before.volumes[at])
        });
        (
            volume.bytes as f64 / seconds,
            volume.packets as f64 / seconds,
            volume.messages as f64 / seconds,
        )
    }

    /// The share of packets that either adapter sent and neither received; 0 where they do not count packets.
    fn lost_packets(&self) -> f64 {
        let rates = [Side::A, Side::B].map(|side| {
            let (received, sent) = self.grown(side).packets();
            let seconds = self.ends[side as usize].2;
            (received as f64 / seconds, sent as f64 / seconds)
        });
        let (received, sent) = (rates[0].0 + rates[1].0, rates[0].1 + rates[1].1);
        match sent > 0.0 && received > 0.0 {
            true => (1.0 - received / sent).clamp(0.0, 1.0),
            false => 0.0,
        }
    }

    fn grown(&self, side: Side) -> Counters {
        let (before, after, _) = self.ends[side as usize];
        let counters = |values: &BTreeMap<String, u64>| Counters(values.clone());
        counters(&after.counters).since(&counters(&before.counters))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::space::{Direction, Memory};

    fn point(operation: Operation, direction: Direction) -> Point {
        Point {
            operation,
            direction,
            mtu: 1024,
            memory_a: Memory::Dram(0),
            memory_b: Memory::Dram(0),
            qps: 2,
            regions: 1,
            region_bytes: 4096,
            batch: 1,
            send_depth: 16,
            receive_depth: 16,
            sges: 1,
            messages: vec![4096],
        }
    }

    fn reading(at_s: u64, messages: &[u64], counters: &[(&str, u64)]) -> Reading {
        let volume = |&messages: &u64| Volume {
            messages,
            bytes: messages * 4096,
            packets: messages * 4,
        };
        Reading {
            at_us: at_s * 1_000_000,
            volumes: messages.iter().map(volume).collect(),
            counters: counters
                .iter()
                .map(|(name, value)| ((*name).to_owned(), *value))
                .collect(),
        }
    }

    #[test]
    fn a_reliable_write_arrives_where_its_sender_was_told_so() {
        let a = [reading(5, &[0], &[]), reading(6, &[0], &[])];
        let b = [
            reading(100, &[1000], &[("rcvd_seq_err", 1)]),
            reading(102, &[3000], &[("rcvd_seq_err", 7)]),
        ];
        let names = vec!["rcvd_seq_err".to_owned()];
        let point = point(Operation::RcWrite, Direction::Unidirectional);
        let measured = measurement(&point, [&a, &b], &names).unwrap();
        assert_eq!(measured.ends[0][0].bits_per_s, 8.0 * 4096.0 * 1000.0);
        assert_eq!(measured.ends[0][0].packets_per_s, 4000.0);
        assert_eq!(measured.ends[1][0].packets_per_s, 0.0);
        assert_eq!(measured.ends[1][0].counters, [3.0]);
        assert_eq!(measured.ends[0][0].counters, [STANDSTILL]);
    }

    #[test]
    fn what_datagrams_do_not_arrive_is_lost_and_only_what_arrives_counts() {
        let a = [reading(0, &[0], &[]), reading(1, &[750], &[])];
        let b = [reading(0, &[0], &[]), reading(1, &[1000], &[])];
        let point = point(Operation::UcSend, Direction::Unidirectional);
        let measured = measurement(&point, [&a, &b], &[]).unwrap();
        assert_eq!(measured.ends[0][0].loss_ratio, 0.25);
        assert_eq!(measured.ends[0][0].packets_per_s, 3000.0);
    }

    #[test]
    fn of_unreliable_writes_the_packet_counters_say_what_was_lost() {
        let a = [
            reading(0, &[0], &[("rcvd_pkts", 0), ("sent_pkts", 0)]),
            reading(1, &[0], &[("rcvd_pkts", 300), ("sent_pkts", 0)]),
        ];
        let b = [
            reading(0, &[0], &[("rcvd_pkts", 0), ("sent_pkts", 0)]),
            reading(1, &[100], &[("rcvd_pkts", 0), ("sent_pkts", 400)]),
        ];
        let point = point(Operation::UcWrite, Direction::Unidirectional);
        let measured = measurement(&point, [&a, &b], &[]).unwrap();
        assert_eq!(measured.ends[0][0].loss_ratio, 0.25);
        assert_eq!(measured.ends[0][0].packets_per_s, 300.0);
    }

    #[test]
    fn loopback_adds_to_what_host_a_receives() {
        // A: the flow from B answered, the loop requested and answered.
        let a = [reading(0, &[0, 0, 0], &[]), reading(1, &[0, 50, 0], &[])];
        let b = [reading(0, &[0], &[]), reading(1, &[100], &[])];
        let point = point(Operation::RcWrite, Direction::Loopback);
        let measured = measurement(&point, [&a, &b], &[]).unwrap();
        assert_eq!(measured.ends[0][0].packets_per_s, 600.0);
    }

    #[test]
    fn readings_of_something_else_are_refused() {
        let one = [reading(0, &[0], &[]), reading(1, &[1], &[])];
        let two = [reading(0, &[0, 0], &[]), reading(1, &[1, 1], &[])];
        let point = point(Operation::RcWrite, Direction::Unidirectional);
        assert!(measurement(&point, [&one, &two], &[]).is_err());
        assert!(measurement(&point, [&one[..1], &one[..1]], &[]).is_err());
        let still = [reading(1, &[0], &[]), reading(1, &[1], &[])];
        assert!(measurement(&point, [&one, &still], &[]).is_err());
    }
}
