//! The suite of tests that every fabric passes, whatever it is made of.
//!
//! A fabric implements [`FabricFactory`] and writes `conformance_tests!(ItsFactory)` in a test module: every case
//! below becomes a `#[test]` there. A case panics when the fabric breaks a guarantee of [`Endpoint`]. No case asserts a
//! duration; a limit of 60 s turns a hang into a failure.

mod exchange;

use std::time::{Duration, Instant};

use crate::{Endpoint, Event, Lane, LaneError, LostReason, MicroBatch, Role, SLOT_ALIGN, Topology};

pub use exchange::{
    exchange_equals_a_direct_computation_bf16, exchange_equals_a_direct_computation_many_to_many,
    exchange_equals_a_direct_computation_one_to_one, exchange_with_more_workers_than_experts,
    exchange_with_replicas_and_a_placement_per_layer,
};

/// Makes fabrics for the suite.
pub trait FabricFactory {
    /// All endpoints of a fresh fabric, in the order of [`Topology::ids`].
    fn build(&self, topology: Topology) -> Vec<Box<dyn Endpoint>>;

    /// Why this machine cannot have such a fabric; its tests then say so and pass.
    fn missing(&self) -> Option<String> {
        None
    }
}

/// Runs a case, if the machine can have the fabric.
pub fn run(factory: &dyn FabricFactory, case: fn(&dyn FabricFactory)) {
    match factory.missing() {
        None => case(factory),
        Some(missing) => eprintln!("left out: {missing}"),
    }
}

/// Makes a `#[test]` of every case of the suite, for the fabric of a [`FabricFactory`] expression.
#[macro_export]
macro_rules! conformance_tests {
    ($factory:expr) => {
        $crate::conformance_tests!(@cases $factory;
            at_the_start_attention_holds_every_lane
            frames_of_every_length_arrive_whole_and_once
            both_slots_are_at_hand_for_the_holder
            a_lane_rallies_in_order
            lanes_do_not_mix
            misuse_is_an_error_and_changes_nothing
            a_wait_ends_when_a_frame_arrives
            a_wait_ends_when_it_is_woken
            an_endpoint_is_ready_for_a_frame_and_for_a_wake
            a_wait_ends_after_its_timeout
            a_lost_peer_is_seen_by_all_and_once
            many_to_many_across_threads
            exchange_equals_a_direct_computation_one_to_one
            exchange_equals_a_direct_computation_many_to_many
            exchange_equals_a_direct_computation_bf16
            exchange_with_more_workers_than_experts
            exchange_with_replicas_and_a_placement_per_layer
        );
    };
    (@cases $factory:expr; $($case:ident)*) => {
        $(#[test] fn $case() { $crate::conformance::run(&$factory, $crate::conformance::$case); })*
    };
}

const SMALL: Topology = Topology {
    attention: 2,
    experts: 3,
    micro_batches: 2,
    dispatch_bytes: 200,
    combine_bytes: 100,
};
const HANG: Duration = Duration::from_secs(60);

/// Identity, counts, capacities, alignment, and who holds what at the start.
pub fn at_the_start_attention_holds_every_lane(factory: &dyn FabricFactory) {
    let mut ends = factory.build(SMALL);
    assert!(
        ends.iter().map(|end| end.id()).eq(SMALL.ids()),
        "endpoints come in the order of the topology"
    );
    for end in &mut ends {
        let role = end.id().role;
        assert_eq!(end.peers(), SMALL.workers(role.opposite()));
        assert_eq!(end.micro_batches(), SMALL.micro_batches);
        for lane in lanes(end.as_ref()) {
            assert_eq!(end.holds(lane), role == Role::Attention);
            if role == Role::Attention {
                assert_eq!(end.received(lane), Ok(&[][..]));
                let slot = end.slot(lane).expect("a lane that is held");
                assert_eq!(slot.len(), SMALL.dispatch_bytes);
                assert!(slot.as_ptr().addr().is_multiple_of(SLOT_ALIGN));
            }
        }
        assert_eq!(end.poll(), None);
    }
}

/// Empty frames, one byte, full slots; in both directions.
pub fn frames_of_every_length_arrive_whole_and_once(factory: &dyn FabricFactory) {
    let mut ends = factory.build(SMALL);
    let (attention, experts) = ends.split_at_mut(SMALL.attention.into());
    let (attention, expert) = (&mut attention[1], &mut experts[2]);
    let (there, back) = (Lane::new(2, MicroBatch(1)), Lane::new(1, MicroBatch(1)));
    for (seed, len) in [0, 1, 2, 63, 64, 65, 100, 99, 0, 200]
        .into_iter()
        .enumerate()
    {
        let answer = len.min(SMALL.combine_bytes);
        send(attention, there, seed as u64, len);
        assert!(!attention.holds(there), "posting hands the lane over");
        assert_eq!(next(expert), Event::Arrived { lane: back, len });
        assert!(expert.holds(back));
        check(expert.as_ref(), back, seed as u64, len);
        assert_eq!(expert.poll(), None, "a frame arrives once");
        send(expert, back, !(seed as u64), answer);
        assert_eq!(
            next(attention),
            Event::Arrived {
                lane: there,
                len: answer
            }
        );
        check(attention.as_ref(), there, !(seed as u64), answer);
    }
}

/// The holder reads what came while it writes what goes, through [`Endpoint::both`].
pub fn both_slots_are_at_hand_for_the_holder(factory: &dyn FabricFactory) {
    let mut ends = factory.build(Topology {
        attention: 1,
        experts: 1,
        ..SMALL
    });
    let mut expert = ends.pop().expect("an expert worker");
    let mut attention = ends.pop().expect("an attention worker");
    let lane = Lane::new(0, MicroBatch(0));
    send(&mut attention, lane, 7, 90);
    assert_eq!(next(&mut expert), Event::Arrived { lane, len: 90 });
    let (received, slot) = expert.both(lane).expect("a lane that is held");
    assert_eq!(slot.len(), SMALL.combine_bytes);
    assert!(received.as_ptr().addr().is_multiple_of(SLOT_ALIGN));
    assert!(slot.as_ptr().addr().is_multiple_of(SLOT_ALIGN));
    slot[..90]
        .iter_mut()
        .zip(received)
        .for_each(|(to, from)| *to = !from);
    check(expert.as_ref(), lane, 7, 90);
    expert.post(lane, 90).expect("a lane that is held");
    assert_eq!(next(&mut attention), Event::Arrived { lane, len: 90 });
    let received = attention.received(lane).expect("a lane that is held");
    assert!(
        received
            .iter()
            .map(|byte| !byte)
            .eq((0..90).map(|at| byte(7, at)))
    );
}

/// Many rounds on one lane: each answer belongs to its call.
pub fn a_lane_rallies_in_order(factory: &dyn FabricFactory) {
    let mut ends = factory.build(Topology {
        attention: 1,
        experts: 1,
        ..SMALL
    });
    let mut expert = ends.pop().expect("an expert worker");
    let mut attention = ends.pop().expect("an attention worker");
    let lane = Lane::new(0, MicroBatch(1));
    for round in 0..300 {
        let len = round as usize % 101;
        send(&mut attention, lane, round, len);
        assert_eq!(next(&mut expert), Event::Arrived { lane, len });
        check(expert.as_ref(), lane, round, len);
        send(&mut expert, lane, round + 1_000, 8);
        assert_eq!(next(&mut attention), Event::Arrived { lane, len: 8 });
        check(attention.as_ref(), lane, round + 1_000, 8);
    }
}

/// All lanes at once, each with content of its own.
pub fn lanes_do_not_mix(factory: &dyn FabricFactory) {
    let mut ends = factory.build(SMALL);
    let name = |attention: u16, expert: u16, micro_batch: MicroBatch| {
        u64::from(attention) << 32 | u64::from(expert) << 16 | u64::from(micro_batch.0)
    };
    let all = SMALL.experts as usize * SMALL.micro_batches as usize;
    let (attention, experts) = ends.split_at_mut(SMALL.attention.into());
    for end in attention.iter_mut() {
        for lane in lanes(end.as_ref()) {
            let from = end.id().index;
            send(end, lane, name(from, lane.peer, lane.micro_batch), 150);
        }
    }
    for end in experts.iter_mut() {
        for _ in 0..SMALL.attention as usize * SMALL.micro_batches as usize {
            let lane = arrival(end);
            let name = name(lane.peer, end.id().index, lane.micro_batch);
            check(end.as_ref(), lane, name, 150);
            send(end, lane, !name, 100);
        }
        assert_eq!(end.poll(), None);
    }
    for end in attention {
        for _ in 0..all {
            let lane = arrival(end);
            check(
                end.as_ref(),
                lane,
                !name(end.id().index, lane.peer, lane.micro_batch),
                100,
            );
        }
        assert_eq!(end.poll(), None);
    }
}

/// Unknown lanes, lanes not held, frames too long: typed errors, and the lane works as before.
pub fn misuse_is_an_error_and_changes_nothing(factory: &dyn FabricFactory) {
    let mut ends = factory.build(SMALL);
    let (attention, experts) = ends.split_at_mut(SMALL.attention.into());
    let (attention, expert) = (&mut attention[0], &mut experts[0]);
    let at = attention.id();
    let no_peer = Lane::new(SMALL.experts, MicroBatch(0));
    let no_batch = Lane::new(0, MicroBatch(SMALL.micro_batches));
    let unknown_peer = LaneError::UnknownPeer {
        at,
        peer: no_peer.peer,
        peers: SMALL.experts,
    };
    let unknown_batch = LaneError::UnknownMicroBatch {
        at,
        micro_batch: no_batch.micro_batch,
        micro_batches: SMALL.micro_batches,
    };
    for (lane, error) in [(no_peer, unknown_peer), (no_batch, unknown_batch)] {
        assert!(!attention.holds(lane));
        assert_eq!(attention.received(lane), Err(error));
        assert_eq!(attention.slot(lane), Err(error));
        assert_eq!(attention.both(lane), Err(error));
        assert_eq!(attention.post(lane, 0), Err(error));
    }
    let lane = Lane::new(0, MicroBatch(0));
    let (peer, micro_batch) = (Role::Expert.worker(0), MicroBatch(0));
    for len in [SMALL.dispatch_bytes + 1, usize::MAX] {
        let capacity = SMALL.dispatch_bytes;
        let too_long = LaneError::TooLong {
            at,
            peer,
            micro_batch,
            len,
            capacity,
        };
        assert_eq!(attention.post(lane, len), Err(too_long));
    }
    assert!(
        attention.holds(lane),
        "a post that failed leaves the lane where it was"
    );
    send(attention, lane, 5, 3);
    let not_held = LaneError::NotHeld {
        at,
        peer,
        micro_batch,
    };
    assert_eq!(attention.received(lane), Err(not_held));
    assert_eq!(attention.slot(lane), Err(not_held));
    assert_eq!(attention.both(lane), Err(not_held));
    assert_eq!(attention.post(lane, 0), Err(not_held));
    assert_eq!(next(expert), Event::Arrived { lane, len: 3 });
    check(expert.as_ref(), lane, 5, 3);
    assert_eq!(expert.poll(), None);
}

/// A parked endpoint sees a frame that another thread posts, also when the endpoint moved to a new thread first.
pub fn a_wait_ends_when_a_frame_arrives(factory: &dyn FabricFactory) {
    let mut ends = factory.build(Topology {
        attention: 1,
        experts: 1,
        ..SMALL
    });
    let mut expert = ends.pop().expect("an expert worker");
    let mut attention = ends.pop().expect("an attention worker");
    let lane = Lane::new(0, MicroBatch(0));
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for _ in 0..100 {
                assert_eq!(next(&mut expert), Event::Arrived { lane, len: 1 });
                send(&mut expert, lane, 0, 1);
            }
            expert
        });
        for _ in 0..100 {
            send(&mut attention, lane, 0, 1);
            assert_eq!(next(&mut attention), Event::Arrived { lane, len: 1 });
        }
    });
}

/// A waker ends a wait from another thread, and one that came before the wait ends it too.
pub fn a_wait_ends_when_it_is_woken(factory: &dyn FabricFactory) {
    let mut end = factory.build(SMALL).swap_remove(0);
    let waker = end.waker();
    let started = Instant::now();
    waker.wake();
    end.wait(HANG);
    std::thread::scope(|scope| {
        let waker = waker.clone();
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            waker.wake();
        });
        end.wait(HANG);
    });
    assert!(started.elapsed() < HANG, "a wake did not end a wait");
    drop(end);
    waker.wake(); // must do nothing
}

/// An endpoint is ready while there is something to poll, and once for the wakes that came before.
pub fn an_endpoint_is_ready_for_a_frame_and_for_a_wake(factory: &dyn FabricFactory) {
    let mut ends = factory.build(SMALL);
    let mut experts = ends.split_off(SMALL.attention.into());
    assert!(!experts[0].ready());
    experts[0].waker().wake();
    experts[0].waker().wake();
    assert!(experts[0].ready(), "a wake makes it ready");
    assert!(!experts[0].ready(), "and is used up");
    let lane = Lane::new(0, MicroBatch(0));
    send(&mut ends[0], lane, 1, 10);
    let started = Instant::now();
    while !experts[0].ready() {
        assert!(started.elapsed() < HANG, "a frame does not make it ready");
        std::hint::spin_loop();
    }
    assert!(experts[0].ready(), "as long as it was not polled");
    assert_eq!(next(&mut experts[0]), Event::Arrived { lane, len: 10 });
    assert!(!experts[0].ready());
}

/// Without a frame and without a wake a wait still ends.
pub fn a_wait_ends_after_its_timeout(factory: &dyn FabricFactory) {
    // All ends stay open, so that no loss is there to be polled.
    let mut ends = factory.build(SMALL);
    ends[0].wait(Duration::ZERO);
    ends[0].wait(Duration::from_millis(10));
    assert_eq!(ends[0].poll(), None);
}

/// A frame posted before the end arrives before the loss; the loss comes once, to every peer; posts then fail.
pub fn a_lost_peer_is_seen_by_all_and_once(factory: &dyn FabricFactory) {
    let mut ends = factory.build(SMALL);
    let mut experts = ends.split_off(SMALL.attention.into());
    let lane = Lane::new(1, MicroBatch(0));
    send(&mut ends[0], lane, 1, 10);
    assert_eq!(
        next(&mut experts[1]),
        Event::Arrived {
            lane: Lane::new(0, MicroBatch(0)),
            len: 10
        }
    );
    send(&mut experts[1], Lane::new(0, MicroBatch(0)), 2, 20);
    drop(experts.remove(1));

    assert_eq!(next(&mut ends[0]), Event::Arrived { lane, len: 20 });
    check(ends[0].as_ref(), lane, 2, 20);
    for end in &mut ends {
        let peer = Role::Expert.worker(1);
        assert_eq!(
            next(end),
            Event::Lost {
                peer,
                reason: LostReason::Closed
            }
        );
        assert_eq!(end.poll(), None, "a loss is reported once");
        for micro_batch in [MicroBatch(0), MicroBatch(1)] {
            let lost = LaneError::PeerLost {
                at: end.id(),
                peer,
                micro_batch,
            };
            assert_eq!(end.post(Lane::new(1, micro_batch), 1), Err(lost));
        }
        // Other lanes live on.
        send(end, Lane::new(2, MicroBatch(0)), 3, 30);
    }
    for _ in 0..SMALL.attention {
        let lane = arrival(&mut experts[1]);
        check(experts[1].as_ref(), lane, 3, 30);
    }
}

/// Every worker on a thread of its own, all lanes busy, every byte checked.
pub fn many_to_many_across_threads(factory: &dyn FabricFactory) {
    const ROUNDS: u64 = 300;
    let topology = Topology {
        attention: 3,
        experts: 2,
        micro_batches: 2,
        dispatch_bytes: 3_000,
        combine_bytes: 5_000,
    };
    let seed = |attention: u16, lane_peer: u16, lane: Lane, round: u64| {
        round << 40
            | u64::from(attention) << 24
            | u64::from(lane_peer) << 8
            | u64::from(lane.micro_batch.0)
    };
    std::thread::scope(|scope| {
        for mut end in factory.build(topology) {
            scope.spawn(move || {
                let me = end.id();
                let mut rounds =
                    vec![0; usize::from(end.peers()) * usize::from(end.micro_batches())];
                let index =
                    |lane: Lane| usize::from(lane.peer) * 2 + usize::from(lane.micro_batch.0);
                if me.role == Role::Attention {
                    for lane in lanes(end.as_ref()) {
                        send(&mut end, lane, seed(me.index, lane.peer, lane, 0), 0);
                    }
                }
                let mut open = rounds.len();
                let mut peers = end.peers();
                while if me.role == Role::Attention {
                    open > 0
                } else {
                    peers > 0
                } {
                    let lane = match next(&mut end) {
                        Event::Arrived { lane, .. } => lane,
                        Event::Lost { .. } if me.role == Role::Expert => {
                            peers -= 1;
                            continue;
                        }
                        Event::Lost { peer, .. } => panic!("{me} lost {peer}"),
                    };
                    let round = &mut rounds[index(lane)];
                    if me.role == Role::Expert {
                        let seed = seed(lane.peer, me.index, lane, *round);
                        check(
                            end.as_ref(),
                            lane,
                            seed,
                            length(seed, topology.dispatch_bytes, *round),
                        );
                        send(
                            &mut end,
                            lane,
                            !seed,
                            length(!seed, topology.combine_bytes, 1),
                        );
                        *round += 1;
                    } else {
                        let asked = seed(me.index, lane.peer, lane, *round);
                        check(
                            end.as_ref(),
                            lane,
                            !asked,
                            length(!asked, topology.combine_bytes, 1),
                        );
                        *round += 1;
                        if *round == ROUNDS {
                            open -= 1;
                        } else {
                            let seed = seed(me.index, lane.peer, lane, *round);
                            send(
                                &mut end,
                                lane,
                                seed,
                                length(seed, topology.dispatch_bytes, *round),
                            );
                        }
                    }
                }
            });
        }
    });
}

/// A length that depends on the seed; the first round is empty.
fn length(seed: u64, capacity: usize, round: u64) -> usize {
    if round == 0 {
        0
    } else {
        mix(seed) as usize % (capacity + 1)
    }
}

fn lanes(end: &dyn Endpoint) -> impl Iterator<Item = Lane> + use<> {
    let (peers, micro_batches) = (end.peers(), end.micro_batches());
    (0..peers).flat_map(move |peer| {
        (0..micro_batches).map(move |batch| Lane::new(peer, MicroBatch(batch)))
    })
}

/// Byte `at` of the frame called `seed`.
fn byte(seed: u64, at: usize) -> u8 {
    mix(seed ^ (at as u64 / 8) << 48).to_le_bytes()[at % 8]
}

/// A well-mixed 64-bit number (the finaliser of SplitMix64).
fn mix(seed: u64) -> u64 {
    let seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let seed = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let seed = (seed ^ (seed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    seed ^ (seed >> 31)
}

fn send(end: &mut Box<dyn Endpoint>, lane: Lane, seed: u64, len: usize) {
    let slot = end.slot(lane).expect("a lane that is held");
    slot[..len]
        .iter_mut()
        .enumerate()
        .for_each(|(at, to)| *to = byte(seed, at));
    end.post(lane, len).expect("a lane that is held");
}

#[track_caller]
fn check(end: &dyn Endpoint, lane: Lane, seed: u64, len: usize) {
    let received = end.received(lane).expect("a lane that is held");
    assert_eq!(received.len(), len, "{}: {lane}", end.id());
    for (at, &found) in received.iter().enumerate() {
        assert_eq!(
            found,
            byte(seed, at),
            "{}: {lane}: byte {at} of frame {seed:x}",
            end.id()
        );
    }
}

/// The next event; a hang is a failure.
#[track_caller]
fn next(end: &mut Box<dyn Endpoint>) -> Event {
    let started = Instant::now();
    loop {
        if let Some(event) = end.poll() {
            return event;
        }
        end.wait(HANG);
        assert!(started.elapsed() < HANG, "{}: nothing arrived", end.id());
    }
}

#[track_caller]
fn arrival(end: &mut Box<dyn Endpoint>) -> Lane {
    match next(end) {
        Event::Arrived { lane, .. } => lane,
        Event::Lost { peer, reason } => panic!("{} lost {peer}: {reason}", end.id()),
    }
}
