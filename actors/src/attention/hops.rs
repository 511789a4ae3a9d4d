//! How long rows are on their way between this attention worker and each expert worker: the monitor of single hops.
//!
//! Clocks of two hosts agree on nothing, so a hop is half of what is left of a round trip when the time that the peer says it took, queue and computing, is taken
//! off. The ping-pong hides communication as long as one hop takes less than a side's computing, `T_c < T_f` with `T_f = max(T_a, T_e)` (MegaScale-Infer, section 4.1,
//! conditions 1 to 3); a hop whose slowest hundredth breaks that costs every micro-batch behind it, and is named. The paper found such tails on links that looked
//! healthy on average (section 6): the median says what the link can do, the 99th percentile what it does.
//!
//! Pure: times in, a [`Window`] out every ten seconds.

use std::time::Duration;

use metrics::{Gauge, gauge};
use volley_transports::{Role, WorkerId};

use crate::metric_names as names;
use crate::protocol::{Now, StepTiming};

/// Time over which percentiles are taken.
const WINDOW: Duration = Duration::from_secs(10);
/// Fewer samples say nothing about a hundredth.
const ENOUGH: u32 = 200;
/// Buckets for each doubling: a percentile is up to a twelfth too high.
const PER_OCTAVE: u64 = 8;
/// From 64 ns to four minutes.
const BUCKETS: usize = 256;

/// See the module.
pub(crate) struct Hops {
    peers: Vec<Histogram>,
    began: Now,
    /// Longer side's computing of a layer and micro-batch, summed, and of how many.
    computing: Duration,
    layers: u32,
}

/// What ten seconds have shown of one peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hop {
    pub(crate) peer: u16,
    pub(crate) median: Duration,
    pub(crate) p99: Duration,
    /// It takes longer than the computing that is to hide it.
    pub(crate) exposed: bool,
}

/// What ten seconds have shown.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Window {
    /// Mean computing of the busier side for one micro-batch in one layer, `T_f`.
    pub(crate) computing: Duration,
    /// Peers that were heard often enough.
    pub(crate) hops: Vec<Hop>,
}

impl Hops {
    pub(crate) fn new(peers: u16) -> Self {
        Hops {
            peers: vec![Histogram::default(); peers.into()],
            began: Duration::ZERO,
            computing: Duration::ZERO,
            layers: 0,
        }
    }

    /// A peer's answer was back after this long, of which it had rows for `elsewhere`.
    pub(crate) fn answered(&mut self, peer: u16, round_trip: Duration, elsewhere: Duration) {
        if let Some(histogram) = self.peers.get_mut(usize::from(peer)) {
            histogram.add(round_trip.saturating_sub(elsewhere) / 2);
        }
    }

    /// A step of a micro-batch has ended, over so many layers with experts.
    pub(crate) fn finished(&mut self, timing: &StepTiming, layers: u32) {
        self.computing += timing.attention.max(timing.expert);
        self.layers += layers;
    }

    /// Every ten seconds, what they have shown. Only with two micro-batches in flight is there something to hide a hop behind.
    pub(crate) fn window(&mut self, now: Now, micro_batches: usize) -> Option<Window> {
        if now.saturating_sub(self.began) < WINDOW {
            return None;
        }
        self.began = now;
        let computing = self.computing.checked_div(self.layers).unwrap_or_default();
        (self.computing, self.layers) = (Duration::ZERO, 0);
        let mut hops = Vec::new();
        for (histogram, peer) in self.peers.iter_mut().zip(0..) {
            if histogram.count >= ENOUGH {
                let p99 = histogram.percentile(99);
                hops.push(Hop {
                    peer,
                    median: histogram.percentile(50),
                    p99,
                    exposed: micro_batches > 1 && p99 >= computing && !computing.is_zero(),
                });
            }
            *histogram = Histogram::default();
        }
        Some(Window { computing, hops })
    }
}

/// Where a worker's hops are shown.
pub(crate) struct HopGauges(Vec<[Gauge; 2]>);

impl HopGauges {
    pub(crate) fn new(worker: WorkerId, peers: u16) -> Self {
        let peer = |index| {
            let peer = Role::Expert.worker(index).to_string();
            [names::HOP_MEDIAN, names::HOP_P99]
                .map(|name| gauge!(name, "worker" => worker.to_string(), "peer" => peer.clone()))
        };
        HopGauges((0..peers).map(peer).collect())
    }

    pub(crate) fn set(&self, hop: &Hop) {
        let [median, p99] = &self.0[usize::from(hop.peer)];
        median.set(hop.median.as_secs_f64());
        p99.set(hop.p99.as_secs_f64());
    }
}

/// Durations in buckets of equal ratio.
#[derive(Clone)]
struct Histogram {
    counts: [u32; BUCKETS],
    count: u32,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram {
            counts: [0; BUCKETS],
            count: 0,
        }
    }
}

impl Histogram {
    fn add(&mut self, time: Duration) {
        self.counts[bucket(time)] += 1;
        self.count += 1;
    }

    /// The upper bound of the bucket that holds it.
    fn percentile(&self, percent: u32) -> Duration {
        let wanted = u64::from(self.count) * u64::from(percent);
        let mut seen = 0;
        let passing = self.counts.iter().position(|&count| {
            seen += u64::from(count);
            seen * 100 >= wanted
        });
        upper_bound(passing.unwrap_or(BUCKETS - 1))
    }
}

/// Bucket 0 ends at 64 ns; behind it each doubling is cut into [`PER_OCTAVE`] equal parts.
fn bucket(time: Duration) -> usize {
    let units = (time.as_nanos() as u64).saturating_sub(1) / (64 / PER_OCTAVE);
    if units < PER_OCTAVE {
        return 0;
    }
    let octave = u64::from(units.ilog2() - PER_OCTAVE.ilog2());
    let part = (units >> octave) - PER_OCTAVE;
    ((octave * PER_OCTAVE + part + 1) as usize).min(BUCKETS - 1)
}

fn upper_bound(bucket: usize) -> Duration {
    let Some(behind) = (bucket as u64).checked_sub(1) else {
        return Duration::from_nanos(64);
    };
    let (octave, part) = (behind / PER_OCTAVE, behind % PER_OCTAVE);
    Duration::from_nanos(((PER_OCTAVE + part + 1) << octave) * (64 / PER_OCTAVE))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn us(us: u64) -> Duration {
        Duration::from_micros(us)
    }

    fn step(attention: Duration, expert: Duration) -> StepTiming {
        StepTiming {
            attention,
            expert,
            ..StepTiming::default()
        }
    }

    #[test]
    fn a_hop_is_half_of_what_the_peer_did_not_need_and_a_long_tail_is_named() {
        let mut hops = Hops::new(2);
        for i in 0..1000 {
            hops.answered(0, us(700), us(500));
            // One in fifty takes a millisecond each way.
            let away = if i % 50 == 0 { us(2000) } else { us(200) };
            hops.answered(1, us(500) + away, us(500));
            // Ten layers of 400 us here and 500 us there.
            hops.finished(&step(us(4000), us(5000)), 10);
        }
        assert_eq!(hops.window(us(9_999_999), 2), None, "not yet");
        let window = hops.window(us(10_000_000), 2).unwrap();
        assert_eq!(window.computing, us(500));
        let [first, second] = window.hops[..] else {
            panic!("two peers, not {:?}", window.hops)
        };
        let near = |found: Duration, expected: Duration| {
            assert!(found >= expected && found <= expected * 9 / 8, "{found:?}");
        };
        near(first.median, us(100));
        near(first.p99, us(100));
        near(second.median, us(100));
        near(second.p99, us(1000));
        assert_eq!((first.exposed, second.exposed), (false, true));
        // The next window begins empty.
        let window = hops.window(us(20_000_000), 2).unwrap();
        assert_eq!((window.hops.len(), window.computing), (0, Duration::ZERO));
    }

    #[test]
    fn one_micro_batch_has_nothing_to_hide_behind_and_few_samples_say_nothing() {
        let mut hops = Hops::new(1);
        hops.finished(&step(us(10), us(10)), 1);
        for i in 0..ENOUGH {
            assert!(hops.peers[0].count == i);
            hops.answered(0, us(700), us(0));
        }
        let window = hops.window(WINDOW, 1).unwrap();
        assert!(!window.hops[0].exposed);
        hops.answered(0, us(700), us(0));
        assert!(hops.window(WINDOW * 2, 2).unwrap().hops.is_empty());
    }

    proptest! {
        #[test]
        fn a_bucket_holds_its_times(nanos in 1u64..200_000_000_000) {
            let time = Duration::from_nanos(nanos);
            let bucket = bucket(time);
            prop_assert!(time <= upper_bound(bucket));
            prop_assert!(bucket == 0 || time > upper_bound(bucket - 1));
            prop_assert!(bucket == 0 || upper_bound(bucket).as_nanos() * 8 <= u128::from(nanos) * 9 + 72);
        }
    }
}
