//! Lanes whose two slots are one box: whoever has the box holds the lane.
//!
//! A [`Ball`] moves between the worker and whatever carries it on: a peer's inbox in the same process, or a task that writes it to a network. So ownership itself
//! says who may touch the bytes, and there is no `unsafe`. Balls come to a worker through its [`Inbox`], which has room for every lane that leads to it and for one
//! farewell from every peer; since a lane is in one place only, it is never full.
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
    Endpoint, Event, Lane, LaneError, LostReason, MicroBatch, Role, Topology, Wake, Waker, WorkerId,
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

/// Both slots of a lane. Whoever has the box holds the lane.
pub(crate) struct Ball {
    by_attention: Slot,
    by_expert: Slot,
}

impl Ball {
    pub(crate) fn new(topology: &Topology) -> Self {
        Self {
            by_attention: Slot::new(topology.dispatch_bytes),
            by_expert: Slot::new(topology.combine_bytes),
        }
    }

    pub(crate) fn sent_by(&self, role: Role) -> &Slot {
        match role {
            Role::Attention => &self.by_attention,
            Role::Expert => &self.by_expert,
        }
    }

    /// The slot that workers of `role` send from.
    pub(crate) fn slot_mut(&mut self, role: Role) -> &mut Slot {
        match role {
            Role::Attention => &mut self.by_attention,
            Role::Expert => &mut self.by_expert,
        }
    }

    /// What the other side of a worker of `role` sends from, and what it sends from itself.
    pub(crate) fn sides(&mut self, role: Role) -> (&Slot, &mut Slot) {
        match role {
            Role::Attention => (&self.by_expert, &mut self.by_attention),
            Role::Expert => (&self.by_attention, &mut self.by_expert),
        }
    }
}

/// What comes to a worker.
pub(crate) enum Parcel {
    /// A lane, with a frame of the peer.
    Frame {
        from: u16,
        micro_batch: MicroBatch,
        ball: Box<Ball>,
    },
    /// Nothing more comes from this peer.
    Lost { from: u16, reason: LostReason },
}

/// Where a worker's parcels are put, by its peers or by whoever reads the network for it.
pub(crate) struct Inbox {
    parcels: ArrayQueue<Parcel>,
    unparker: Unparker,
    woken: AtomicBool,
    closed: AtomicBool,
}

impl Inbox {
    pub(crate) fn deliver(&self, parcel: Parcel) {
        // There is room for every lane and every farewell, and each is in one place only. A parcel that did not fit
        // would be dropped here, which the stress tests would see as a lost lane.
        let delivered = self.parcels.push(parcel);
        debug_assert!(delivered.is_ok(), "an inbox has room for all its lanes");
        self.unparker.unpark();
    }

    /// Whether its owner is gone.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Ends its owner's sleep without anything having come.
    pub(crate) fn unpark(&self) {
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
pub(crate) struct Seat {
    pub(crate) id: WorkerId,
    pub(crate) inbox: Arc<Inbox>,
    parker: Parker,
}

impl Seat {
    pub(crate) fn new(id: WorkerId, topology: &Topology) -> Self {
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

/// The way to one peer.
pub(crate) trait Link: Send {
    /// Whether the peer can still be reached, as far as is known.
    fn is_open(&self) -> bool;

    /// Carries a lane to the peer.
    fn carry(&mut self, micro_batch: MicroBatch, ball: Box<Ball>);

    /// Tells the peer that this side is gone. What was carried before arrives before.
    fn close(&mut self);
}

/// One worker's end of lanes that are balls. May move to the thread of its worker after it was built.
///
/// When it is dropped, every peer sees [`Event::Lost`] once, and posts to it fail. The lanes that it held are gone;
/// a replacement brings an inbox and lanes of its own under a new epoch.
pub(crate) struct BallEnd<L: Link> {
    id: WorkerId,
    micro_batches: u8,
    spin: Spin,
    inbox: Arc<Inbox>,
    parker: Parker,
    links: Box<[L]>,
    /// Peers whose loss was polled.
    lost: Box<[bool]>,
    balls: Box<[Option<Box<Ball>>]>,
}

impl<L: Link> BallEnd<L> {
    /// The end of the worker in `seat`, with a link to each of its peers. If it is of the role that begins, it has the balls.
    pub(crate) fn new(topology: &Topology, spin: Spin, links: Box<[L]>, seat: Seat) -> Self {
        let lanes = links.len() * usize::from(topology.micro_batches);
        let ball = || (seat.id.role == FIRST_HOLDER).then(|| Box::new(Ball::new(topology)));
        Self {
            id: seat.id,
            micro_batches: topology.micro_batches,
            spin,
            inbox: seat.inbox,
            parker: seat.parker,
            lost: vec![false; links.len()].into(),
            links,
            balls: (0..lanes).map(|_| ball()).collect(),
        }
    }

    /// Sleeps until unparked or until the deadline.
    pub(crate) fn park(&self, deadline: Option<Instant>) {
        match deadline {
            Some(deadline) => self.parker.park_deadline(deadline),
            None => self.parker.park(),
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
        if self.lost[usize::from(lane.peer)] {
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

impl<L: Link> Endpoint for BallEnd<L> {
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
        let peer_index = usize::from(lane.peer);
        if self.lost[peer_index] || !self.links[peer_index].is_open() {
            return Err(LaneError::PeerLost {
                at,
                peer,
                micro_batch,
            });
        }
        ours.fill(len);
        if let Some(ball) = self.balls[index].take() {
            self.links[peer_index].carry(micro_batch, ball);
        }
        Ok(())
    }

    fn poll(&mut self) -> Option<Event> {
        let parcel = loop {
            match self.inbox.parcels.pop()? {
                // Left behind by a task that was stopped while it delivered: nothing comes from a peer that is lost.
                Parcel::Frame { from, .. } if self.lost[usize::from(from)] => {}
                parcel => break parcel,
            }
        };
        match parcel {
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
            Parcel::Lost { from, reason } => {
                self.lost[usize::from(from)] = true;
                Some(Event::Lost {
                    peer: self.id.role.opposite().worker(from),
                    reason,
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
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return;
            }
            self.park(deadline);
        }
    }

    fn waker(&self) -> Waker {
        Waker::new(Arc::clone(&self.inbox) as Arc<dyn Wake>)
    }
}

impl<L: Link> Drop for BallEnd<L> {
    fn drop(&mut self) {
        self.inbox.closed.store(true, Ordering::Release);
        self.links.iter_mut().for_each(Link::close);
        // Peers keep the inbox alive through their links; the lanes in it need not stay.
        while self.inbox.parcels.pop().is_some() {}
    }
}

/// Makes a public endpoint of a wrapper around a [`BallEnd`].
macro_rules! delegate_endpoint {
    ($end:ident, $inner:tt) => {
        impl Endpoint for $end {
            fn id(&self) -> WorkerId {
                self.$inner.id()
            }
            fn peers(&self) -> u16 {
                self.$inner.peers()
            }
            fn micro_batches(&self) -> u8 {
                self.$inner.micro_batches()
            }
            fn holds(&self, lane: Lane) -> bool {
                self.$inner.holds(lane)
            }
            fn received(&self, lane: Lane) -> Result<&[u8], LaneError> {
                self.$inner.received(lane)
            }
            fn slot(&mut self, lane: Lane) -> Result<&mut [u8], LaneError> {
                self.$inner.slot(lane)
            }
            fn both(&mut self, lane: Lane) -> Result<(&[u8], &mut [u8]), LaneError> {
                self.$inner.both(lane)
            }
            fn post(&mut self, lane: Lane, len: usize) -> Result<(), LaneError> {
                self.$inner.post(lane, len)
            }
            fn poll(&mut self) -> Option<Event> {
                self.$inner.poll()
            }
            fn ready(&mut self) -> bool {
                self.$inner.ready()
            }
            fn wait(&mut self, timeout: Duration) {
                self.$inner.wait(timeout);
            }
            fn waker(&self) -> Waker {
                self.$inner.waker()
            }
        }
    };
}
pub(crate) use delegate_endpoint;
