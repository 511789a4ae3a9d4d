//! Virtual time to the nanosecond, and what faults do to lanes.

use std::time::Duration;

use super::*;
use crate::{LostReason, Role};

const TOPOLOGY: Topology = Topology {
    attention: 3,
    experts: 2,
    micro_batches: 2,
    dispatch_bytes: 4096,
    combine_bytes: 4096,
};
/// 1,000 bytes a microsecond.
const QUIET: Conditions = Conditions {
    latency: Duration::from_micros(10),
    jitter: Duration::ZERO,
    bytes_per_s: 1e9,
    loss: 0.0,
    packet_bytes: 1000,
    retransmit: Duration::from_millis(1),
    idle_timeout: Duration::from_secs(1),
};

fn network(conditions: Conditions, seed: u64) -> (SimulatedNetwork, Vec<Simulated>) {
    let network = SimulatedNetwork::new(conditions, seed, Pace::Driven).unwrap();
    let ends = network.lanes(TOPOLOGY).unwrap();
    (network, ends)
}

fn us(us: u64) -> Duration {
    Duration::from_micros(us)
}

/// Everything that comes to anybody, with its time, until nothing is under way.
fn play(network: &SimulatedNetwork, ends: &mut [Simulated]) -> Vec<(Duration, WorkerId, Event)> {
    let mut seen = Vec::new();
    let mut woken = Vec::new();
    while network.step(&mut woken) {
        for worker in woken.drain(..) {
            let end = ends.iter_mut().find(|end| end.id() == worker);
            let Some(end) = end else { continue };
            while let Some(event) = end.poll() {
                seen.push((network.now(), worker, event));
            }
        }
    }
    seen
}

fn arrivals(seen: &[(Duration, WorkerId, Event)], worker: WorkerId) -> Vec<Duration> {
    let to = seen
        .iter()
        .filter(|(_, to, event)| *to == worker && matches!(event, Event::Arrived { .. }));
    to.map(|(at, ..)| *at).collect()
}

const E0: WorkerId = Role::Expert.worker(0);
const E1: WorkerId = Role::Expert.worker(1);
const A0: WorkerId = Role::Attention.worker(0);

fn lane(peer: u16, micro_batch: u8) -> Lane {
    Lane::new(peer, MicroBatch(micro_batch))
}

#[test]
fn a_frame_takes_latency_and_its_bytes() {
    let (network, mut ends) = network(QUIET, 0);
    ends[0].post(lane(0, 0), 2000).unwrap();
    assert_eq!(network.next_at(), Some(us(10)));
    assert_eq!(arrivals(&play(&network, &mut ends), E0), [us(12)]);
    assert_eq!(network.now(), us(12));
}

#[test]
fn frames_share_the_senders_line_and_the_receivers() {
    let (network, mut ends) = network(QUIET, 0);
    // One sender, two receivers: the second leaves when the first has.
    ends[0].post(lane(0, 0), 2000).unwrap();
    ends[0].post(lane(1, 0), 2000).unwrap();
    let seen = play(&network, &mut ends);
    assert_eq!(
        (arrivals(&seen, E0), arrivals(&seen, E1)),
        (vec![us(12)], vec![us(14)])
    );
    assert_eq!(network.line(E1).incast, Duration::ZERO);

    // Three senders, one receiver: incast.
    let start = network.now();
    for end in &mut ends[..3] {
        end.post(lane(1, 1), 4000).unwrap();
    }
    let seen = play(&network, &mut ends);
    let expected = [14, 18, 22].map(|after| start + us(after));
    assert_eq!(arrivals(&seen, E1), expected);
    assert_eq!(network.line(E1).incast, us(4 + 8));
    assert_eq!(
        (network.line(E1).frames, network.line(E1).bytes),
        (4, 14_000)
    );
}

#[test]
fn a_seed_determines_everything() {
    let rough = Conditions {
        jitter: us(50),
        loss: 0.2,
        ..QUIET
    };
    let run = |seed| {
        let (network, mut ends) = network(rough, seed);
        for end in &mut ends[..3] {
            for (expert, micro_batch) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                end.post(lane(expert, micro_batch), 3000).unwrap();
            }
        }
        play(&network, &mut ends)
    };
    assert_eq!(run(7), run(7));
    assert_ne!(run(7), run(8));
    assert_eq!(run(7).len(), 12, "what is lost is sent again");
}

#[test]
fn a_short_partition_delays_and_a_long_one_loses() {
    let (network, mut ends) = network(QUIET, 0);
    network.cut(A0, E0);
    ends[0].post(lane(0, 0), 1000).unwrap();
    ends[0].post(lane(1, 0), 1000).unwrap();
    let mut woken = Vec::new();
    while network
        .next_at()
        .is_some_and(|at| at < Duration::from_millis(500))
    {
        network.step(&mut woken);
    }
    assert_eq!(woken, [E1], "others are not concerned");
    network.pass_until(Duration::from_millis(500));
    network.heal(A0, E0);
    let seen = play(&network, &mut ends);
    assert_eq!(arrivals(&seen, E0), [Duration::from_millis(501) + us(11)]);

    let start = network.now();
    network.cut(E0, A0);
    ends[0].post(lane(0, 1), 1000).unwrap();
    let seen = play(&network, &mut ends);
    let lost = |peer| Event::Lost {
        peer,
        reason: LostReason::TimedOut,
    };
    let at = start + QUIET.idle_timeout;
    assert_eq!(seen, [(at, E0, lost(A0)), (at, A0, lost(E0))]);
    network.heal(A0, E0);
    assert!(
        play(&network, &mut ends).is_empty(),
        "what was given up does not come later"
    );
    // New lanes work.
    let mut ends = network.lanes(TOPOLOGY).unwrap();
    ends[0].post(lane(0, 0), 1000).unwrap();
    assert_eq!(arrivals(&play(&network, &mut ends), E0).len(), 1);
}

#[test]
fn a_silent_worker_is_lost_by_all_and_lanes_made_meanwhile_are_too() {
    let (network, mut ends) = network(QUIET, 0);
    network.silence(E0);
    let seen = play(&network, &mut ends);
    let losers = seen
        .iter()
        .filter(|(_, _, event)| matches!(event, Event::Lost { peer, .. } if *peer == E0));
    assert_eq!(losers.count(), 3);
    let mut again = network.lanes(TOPOLOGY).unwrap();
    let seen = play(&network, &mut again);
    assert_eq!(seen.len(), 6, "three lose it and it loses three");
    network.unsilence(E0);
    let mut third = network.lanes(TOPOLOGY).unwrap();
    assert!(play(&network, &mut third).is_empty());
}

#[test]
fn a_farewell_comes_behind_the_last_frame() {
    let (network, mut ends) = network(QUIET, 0);
    ends[0].post(lane(0, 0), 4000).unwrap();
    let gone = ends.remove(0);
    drop(gone);
    let seen = play(&network, &mut ends);
    let at_e0: Vec<Event> = seen
        .iter()
        .filter(|(_, to, _)| *to == E0)
        .map(|(.., event)| *event)
        .collect();
    let lost = Event::Lost {
        peer: A0,
        reason: LostReason::Closed,
    };
    assert_eq!(
        at_e0,
        [
            Event::Arrived {
                lane: lane(0, 0),
                len: 4000
            },
            lost
        ]
    );
}
