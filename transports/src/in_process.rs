//! The fabric inside one process: lanes move by pointer, nothing is copied, and all of it is safe Rust.
//!
//! A lane is a [`Ball`]: a box with both slots. Posting moves the box through the peer's preallocated queue, so that
//! ownership itself says who may touch the bytes. The queue has room for every lane that leads to its owner and
//! for one farewell from every peer; since a lane is in one place only, it is never full.
//!
//! # Why no wake-up is lost
//!
//! A sender first pushes, then calls `unpark`, which leaves a token. A waiter first looks into its queue, then calls
//! `park`, which returns at once if a token is there and consumes it. Take any push. Either the waiter's look comes
//! after it, and sees it; or the look comes before it, and then the token, which is left after the push, is left
//! after the look too. So the `park` that follows the look finds the token, or is woken by it, and the waiter looks
//! again. A token consumed by an earlier `park` was read with acquire ordering from the sender's release, so the
//! look that follows that `park` sees the push. A left-over token costs one more turn of the loop, nothing else.
//! [`Waker::wake`] follows the same order with the flag `woken` in place of the queue.

use std::num::NonZero;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_queue::ArrayQueue;
use crossbeam_utils::sync::{Parker, Unparker};

use crate::endpoint::{FIRST_HOLDER, lane_index};
use crate::slot::Slot;
use crate::{
    Endpoint, Event, Lane, LaneError, LostReason, MicroBatch, Role, Topology, TopologyError, Wake,
    Waker, WorkerId,
};

/// How many times a wait looks into the queue before it parks its thread.
///
/// Parking and waking cost microseconds, so a worker with a core of its own spins first. Workers that outnumber the
/// cores must not: a spinning worker would keep its peer from the core on which the frame is being made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spin(pub u32);

impl Spin {
    /// Park at once.
    pub const NONE: Self = Self(0);

    /// Some tens of microseconds if each of `workers` has a core of its own on this machine, else none.
    pub fn for_workers(workers: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        if workers <= cores {
            Self(1_000)
        } else {
            Self::NONE
        }
    }
}

/// Builds the endpoints of one process.
pub struct InProcessFabric;

impl InProcessFabric {
    /// All endpoints of `topology`, in the order of [`Topology::ids`], spinning as [`Spin::for_workers`] says.
    ///
    /// # Errors
    /// The topology is empty or does not fit the address space.
    pub fn build(topology: Topology) -> Result<Vec<InProcess>, TopologyError> {
        let workers = usize::from(topology.attention) + usize::from(topology.experts);
        Self::build_with(topology, Spin::for_workers(workers))
    }

    /// All endpoints of `topology`, in the order of [`Topology::ids`].
    ///
    /// # Errors
    /// The topology is empty or does not fit the address space.
    pub fn build_with(topology: Topology, spin: Spin) -> Result<Vec<InProcess>, TopologyError> {
        topology.bytes()?;
        let seats = topology
            .ids()
            .map(|id| Seat::new(id, &topology))
            .collect::<Vec<_>>();
        let inboxes = seats
            .iter()
            .map(|seat| (seat.id, Arc::clone(&seat.inbox)))
            .collect::<Vec<_>>();
        let links_of = |id: WorkerId| {
            let peers = inboxes.iter().filter(|(peer, _)| peer.role != id.role);
            peers
                .map(|(_, inbox)| Link {
                    inbox: Arc::clone(inbox),
                    lost: false,
                })
                .collect()
        };
        Ok(seats
            .into_iter()
            .map(|seat| InProcess::new(&topology, spin, links_of(seat.id), seat))
            .collect())
    }
}

/// One worker's end of an in-process fabric. May move to the thread of its worker after it was built.
///
/// When it is dropped, every peer sees [`Event::Lost`] once, and posts to it fail. The lanes that it held are gone;
/// a replacement brings an inbox and lanes of its own under a new epoch.
pub struct InProcess {
    id: WorkerId,
    micro_batches: u8,
    spin: Spin,
    inbox: Arc<Inbox>,
    parker: Parker,
    links: Box<[Link]>,
    balls: Box<[Option<Box<Ball>>]>,
}

impl InProcess {
    fn new(topology: &Topology, spin: Spin, links: Box<[Link]>, seat: Seat) -> Self {
        let lanes = links.len() * usize::from(topology.micro_batches);
        let ball = || (seat.id.role == FIRST_HOLDER).then(|| Box::new(Ball::new(topology)));
        Self {
            id: seat.id,
            micro_batches: topology.micro_batches,
            spin,
            inbox: seat.inbox,
            parker: seat.parker,
            links,
            balls: (0..lanes).map(|_| ball()).collect(),
        }
    }

    fn peer(&self, lane: Lane) -> WorkerId {
        self.id.role.opposite().worker(lane.peer)
    }

    fn index(&self, lane: Lane) -> Result<usize, LaneError> {
        lane_index(self.id, self.peers(), self.micro_batches, lane)
    }

    /// Why a lane that exists cannot be used here now.
    fn absent(&self, lane: Lane) -> LaneError {
        let (at, peer, micro_batch) = (self.id, self.peer(lane), lane.micro_batch);
        if self.links[usize::from(lane.peer)].lost {
            LaneError::PeerLost {
                at,
                peer,
                micro_batch,
            }
        } else {
            LaneError::NotHeld {
                at,
                peer,
                micro_batch,
            }
        }
    }
}

impl Endpoint for InProcess {
    fn id(&self) -> WorkerId {
        self.id
    }

    fn peers(&self) -> u16 {
        // As many as the topology counts in a u16.
        self.links.len() as u16
    }

    fn micro_batches(&self) -> u8 {
        self.micro_batches
    }

    fn holds(&self, lane: Lane) -> bool {
        self.index(lane)
            .is_ok_and(|index| self.balls[index].is_some())
    }

    fn received(&self, lane: Lane) -> Result<&[u8], LaneError> {
        let ball = self.balls[self.index(lane)?].as_deref();
        ball.map(|ball| ball.sent_by(self.id.role.opposite()).frame())
            .ok_or_else(|| self.absent(lane))
    }

    fn slot(&mut self, lane: Lane) -> Result<&mut [u8], LaneError> {
        self.both(lane).map(|(_, slot)| slot)
    }

    fn both(&mut self, lane: Lane) -> Result<(&[u8], &mut [u8]), LaneError> {
        let index = self.index(lane)?;
        // Made first: the error reads what the slots borrow.
        let absent = self.absent(lane);
        let ball = self.balls[index].as_deref_mut().ok_or(absent)?;
        let (theirs, ours) = ball.sides(self.id.role);
        Ok((theirs.frame(), ours.buffer()))
    }

    fn post(&mut self, lane: Lane, len: usize) -> Result<(), LaneError> {
        let index = self.index(lane)?;
        let (at, peer, micro_batch) = (self.id, self.peer(lane), lane.micro_batch);
        let Some(ball) = &mut self.balls[index] else {
            return Err(self.absent(lane));
        };
        let (_, ours) = ball.sides(at.role);
        if len > ours.capacity() {
            return Err(LaneError::TooLong {
                at,
                peer,
                micro_batch,
                len,
                capacity: ours.capacity(),
            });
        }
        let link = &self.links[usize::from(lane.peer)];
        if link.lost || link.inbox.closed.load(Ordering::Acquire) {
            return Err(LaneError::PeerLost {
                at,
                peer,
                micro_batch,
            });
        }
        ours.fill(len);
        if let Some(ball) = self.balls[index].take() {
            link.inbox.deliver(Parcel::Frame {
                from: at.index,
                micro_batch,
                ball,
            });
        }
        Ok(())
    }

    fn poll(&mut self) -> Option<Event> {
        match self.inbox.parcels.pop()? {
            Parcel::Frame {
                from,
                micro_batch,
                ball,
            } => {
                let len = ball.sent_by(self.id.role.opposite()).len();
                let index = usize::from(from) * usize::from(self.micro_batches)
                    + usize::from(micro_batch.0);
                self.balls[index] = Some(ball);
                Some(Event::Arrived {
                    lane: Lane::new(from, micro_batch),
                    len,
                })
            }
            Parcel::Closed { from } => {
                self.links[usize::from(from)].lost = true;
                Some(Event::Lost {
                    peer: self.id.role.opposite().worker(from),
                    reason: LostReason::Closed,
                })
            }
        }
    }

    fn ready(&mut self) -> bool {
        self.inbox.ready()
    }

    fn wait(&mut self, timeout: Duration) {
        if self.inbox.ready() {
            return;
        }
        let deadline = Instant::now().checked_add(timeout);
        let mut spins = self.spin.0;
        while !self.inbox.ready() {
            if spins > 0 {
                spins -= 1;
                std::hint::spin_loop();
                continue;
            }
            match deadline {
                Some(deadline) if Instant::now() >= deadline => return,
                Some(deadline) => self.parker.park_deadline(deadline),
                None => self.parker.park(),
            }
        }
    }

    fn waker(&self) -> Waker {
        Waker::new(Arc::clone(&self.inbox) as Arc<dyn Wake>)
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        self.inbox.closed.store(true, Ordering::Release);
        for link in &self.links {
            link.inbox.deliver(Parcel::Closed {
                from: self.id.index,
            });
        }
        // Peers keep the inbox alive through their links; the lanes in it need not stay.
        while self.inbox.parcels.pop().is_some() {}
    }
}

/// Both slots of a lane. Whoever has the box holds the lane.
struct Ball {
    by_attention: Slot,
    by_expert: Slot,
}

impl Ball {
    fn new(topology: &Topology) -> Self {
        Self {
            by_attention: Slot::new(topology.dispatch_bytes),
            by_expert: Slot::new(topology.combine_bytes),
        }
    }

    fn sent_by(&self, role: Role) -> &Slot {
        match role {
            Role::Attention => &self.by_attention,
            Role::Expert => &self.by_expert,
        }
    }

    /// What the other side of a worker of `role` sends from, and what it sends from itself.
    fn sides(&mut self, role: Role) -> (&Slot, &mut Slot) {
        match role {
            Role::Attention => (&self.by_expert, &mut self.by_attention),
            Role::Expert => (&self.by_attention, &mut self.by_expert),
        }
    }
}

enum Parcel {
    Frame {
        from: u16,
        micro_batch: MicroBatch,
        ball: Box<Ball>,
    },
    Closed {
        from: u16,
    },
}

/// The way to one peer.
struct Link {
    inbox: Arc<Inbox>,
    lost: bool,
}

/// What a worker's peers share with it.
struct Inbox {
    parcels: ArrayQueue<Parcel>,
    unparker: Unparker,
    woken: AtomicBool,
    closed: AtomicBool,
}

impl Inbox {
    fn deliver(&self, parcel: Parcel) {
        // There is room for every lane and every farewell, and each is in one place only. A parcel that did not fit
        // would be dropped here, which the stress tests would see as a lost lane.
        let delivered = self.parcels.push(parcel);
        debug_assert!(delivered.is_ok(), "an inbox has room for all its lanes");
        self.unparker.unpark();
    }

    fn ready(&self) -> bool {
        // The load first, because a swap would take the cache line from the waking side at every turn.
        !self.parcels.is_empty()
            || (self.woken.load(Ordering::Relaxed) && self.woken.swap(false, Ordering::Acquire))
    }
}

impl Wake for Inbox {
    fn wake(&self) {
        self.woken.store(true, Ordering::Release);
        self.unparker.unpark();
    }
}

/// A worker's place before it is linked to its peers.
struct Seat {
    id: WorkerId,
    inbox: Arc<Inbox>,
    parker: Parker,
}

impl Seat {
    fn new(id: WorkerId, topology: &Topology) -> Self {
        let peers = usize::from(topology.workers(id.role.opposite()));
        let parker = Parker::new();
        let inbox = Inbox {
            parcels: ArrayQueue::new(peers * usize::from(topology.micro_batches) + peers),
            unparker: parker.unparker().clone(),
            woken: AtomicBool::new(false),
            closed: AtomicBool::new(false),
        };
        Self {
            id,
            inbox: Arc::new(inbox),
            parker,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOPOLOGY: Topology = Topology {
        attention: 1,
        experts: 2,
        micro_batches: 2,
        dispatch_bytes: 128,
        combine_bytes: 64,
    };

    #[test]
    fn a_post_to_a_closed_peer_fails_even_before_its_loss_was_polled() {
        let mut ends = InProcessFabric::build(TOPOLOGY).unwrap();
        drop(ends.pop());
        let lane = Lane::new(1, MicroBatch(1));
        let lost = LaneError::PeerLost {
            at: ends[0].id(),
            peer: Role::Expert.worker(1),
            micro_batch: MicroBatch(1),
        };
        assert_eq!(ends[0].post(lane, 1), Err(lost));
        assert!(
            ends[0].holds(lane),
            "a failed post leaves the lane where it was"
        );
    }

    #[test]
    fn frames_pass_by_pointer() {
        let mut ends = InProcessFabric::build(TOPOLOGY).unwrap();
        let lane = Lane::new(0, MicroBatch(0));
        let address = ends[0].slot(lane).unwrap().as_ptr();
        ends[0].post(lane, 128).unwrap();
        ends[1].poll().unwrap();
        assert_eq!(ends[1].received(lane).unwrap().as_ptr(), address);
    }

    /// Every round trip of two parked threads is a chance to lose a wake-up; one lost would show as a wait that
    /// runs into its (very long) time limit.
    #[test]
    fn no_wake_up_is_lost_between_parking_threads() {
        const LIMIT: Duration = Duration::from_secs(30);
        for spin in [Spin::NONE, Spin(7), Spin(1_000)] {
            let topology = Topology {
                experts: 1,
                ..TOPOLOGY
            };
            let mut ends = InProcessFabric::build_with(topology, spin).unwrap();
            let mut expert = ends.pop().unwrap();
            let mut attention = ends.pop().unwrap();
            let rally = |end: &mut InProcess, rounds: u32| {
                for _ in 0..rounds {
                    let lane = loop {
                        match end.poll() {
                            Some(Event::Arrived { lane, .. }) => break lane,
                            Some(Event::Lost { .. }) => panic!("the peer gave up"),
                            None => {
                                let before = Instant::now();
                                end.wait(LIMIT);
                                assert!(before.elapsed() < LIMIT, "a wake-up was lost");
                            }
                        }
                    };
                    end.post(lane, 1).unwrap();
                }
            };
            let rounds = 20_000;
            std::thread::scope(|scope| {
                for micro_batch in [0, 1] {
                    attention
                        .post(Lane::new(0, MicroBatch(micro_batch)), 1)
                        .unwrap();
                }
                scope.spawn(move || {
                    rally(&mut expert, rounds);
                    // Keeps the endpoint open until the last answers are in.
                    expert
                });
                rally(&mut attention, rounds - 2);
            });
        }
    }
}
