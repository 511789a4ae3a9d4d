//! The fabric in virtual time: latency, jitter, bandwidth, incast, loss, partitions, and peers that fall silent or close.
//!
//! Lanes are the balls of the other fabrics (`ball`), so what a worker sees is what it sees in production; only the way between two
//! inboxes is played, by `world`. The network is reliable as RDMA and QUIC are: what is lost on the way is sent again and comes late, and two
//! workers that cannot reach each other for [`Conditions::idle_timeout`] lose each other.
//!
//! Who lets time pass is a [`Pace`]. A simulation of a cluster drives the network event by event ([`SimulatedNetwork::step`]) and is
//! deterministic: the same seed and the same calls give the same arrivals to the nanosecond. For threads, time passes whenever an endpoint looks
//! for something and finds nothing; that is how the conformance suite runs. Every epoch of a cluster has lanes of its own over one
//! network ([`SimulatedNetwork::lanes`]), as in production.

mod conditions;
mod world;

pub use conditions::{Conditions, ConditionsError};
pub use world::Line;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::ball::{Ball, BallEnd, Link, Seat, Spin};
use crate::{
    Endpoint, Event, Lane, LaneError, MicroBatch, Topology, TopologyError, Waker, WorkerId,
};
use world::{LinkId, World};

/// Who lets virtual time pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// Whoever calls [`SimulatedNetwork::step`]. An endpoint's wait returns at once.
    Driven,
    /// An endpoint that looks for something and finds nothing.
    Looked,
}

/// A network in virtual time. Copies are the same network.
#[derive(Clone)]
pub struct SimulatedNetwork {
    world: Arc<Mutex<World>>,
    pace: Pace,
    size: FrameSize,
}

/// How many bytes a frame counts for.
pub type FrameSize = Arc<dyn Fn(&[u8]) -> usize + Send + Sync>;

impl SimulatedNetwork {
    /// A network on which nothing is under way, at time zero.
    ///
    /// # Errors
    /// The conditions let nothing through.
    pub fn new(conditions: Conditions, seed: u64, pace: Pace) -> Result<Self, ConditionsError> {
        conditions.check()?;
        let world = Arc::new(Mutex::new(World::new(conditions, seed)));
        Ok(SimulatedNetwork {
            world,
            pace,
            size: Arc::new(<[u8]>::len),
        })
    }

    /// The same network, on which a frame counts for as many bytes as `size` says: for rows that stand for longer ones.
    pub fn with_size(self, size: FrameSize) -> Self {
        SimulatedNetwork { size, ..self }
    }

    /// All endpoints of new lanes, in the order of [`Topology::ids`].
    ///
    /// # Errors
    /// The topology is empty or does not fit the address space.
    pub fn lanes(&self, topology: Topology) -> Result<Vec<Simulated>, TopologyError> {
        topology.bytes()?;
        let seats: Vec<Seat> = topology.ids().map(|id| Seat::new(id, &topology)).collect();
        let mut world = self.world();
        world.reserve(topology.lanes() as usize);
        let inboxes: Vec<_> = seats
            .iter()
            .map(|seat| (seat.id, Arc::clone(&seat.inbox)))
            .collect();
        let links = seats.iter().map(|seat| {
            let peers = inboxes.iter().filter(|(peer, _)| peer.role != seat.id.role);
            let link = |&(peer, ref inbox): &(WorkerId, _)| OverNetwork {
                id: world.link(seat.id, peer, Arc::clone(inbox)),
                from: seat.id,
                network: self.clone(),
            };
            peers.map(link).collect::<Box<[OverNetwork]>>()
        });
        let links: Vec<_> = links.collect();
        drop(world);
        let end = |(seat, links)| Simulated {
            inner: BallEnd::new(&topology, Spin::NONE, links, seat),
            network: self.clone(),
        };
        Ok(seats.into_iter().zip(links).map(end).collect())
    }

    /// Virtual time since the start.
    pub fn now(&self) -> Duration {
        self.world().now
    }

    /// When something happens next, if anything is under way.
    pub fn next_at(&self) -> Option<Duration> {
        self.world().next_at()
    }

    /// Lets the next thing happen, and adds the workers to `woken` that something came to. False: nothing is under way.
    pub fn step(&self, woken: &mut Vec<WorkerId>) -> bool {
        self.world().step(woken)
    }

    /// Lets time pass in which nothing happens on the network. Time does not run backwards.
    pub fn pass_until(&self, now: Duration) {
        let mut world = self.world();
        world.now = world.now.max(now);
    }

    /// From now on the two do not reach each other, neither way.
    pub fn cut(&self, a: WorkerId, b: WorkerId) {
        self.world().cut(a, b);
    }

    /// The two reach each other again.
    pub fn heal(&self, a: WorkerId, b: WorkerId) {
        self.world().heal(a, b);
    }

    /// From now on nothing that a worker sends or is sent gets through: its host is off, or its process is stopped.
    pub fn silence(&self, worker: WorkerId) {
        self.world().silence(worker);
    }

    /// A worker is heard again.
    pub fn unsilence(&self, worker: WorkerId) {
        self.world().unsilence(worker);
    }

    /// What a worker's line carried.
    pub fn line(&self, worker: WorkerId) -> Line {
        self.world().line(worker)
    }

    fn world(&self) -> MutexGuard<'_, World> {
        // A thread that panicked in between leaves a world that is whole: every method ends what it begins.
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One worker's end of lanes over a [`SimulatedNetwork`].
pub struct Simulated {
    inner: BallEnd<OverNetwork>,
    network: SimulatedNetwork,
}

impl Simulated {
    /// Lets one thing happen, if it is the endpoints' business to.
    fn time_passes(&self) -> bool {
        self.network.pace == Pace::Looked && self.network.step(&mut Vec::new())
    }
}

impl Endpoint for Simulated {
    fn id(&self) -> WorkerId {
        self.inner.id()
    }

    fn peers(&self) -> u16 {
        self.inner.peers()
    }

    fn micro_batches(&self) -> u8 {
        self.inner.micro_batches()
    }

    fn holds(&self, lane: Lane) -> bool {
        self.inner.holds(lane)
    }

    fn received(&self, lane: Lane) -> Result<&[u8], LaneError> {
        self.inner.received(lane)
    }

    fn slot(&mut self, lane: Lane) -> Result<&mut [u8], LaneError> {
        self.inner.slot(lane)
    }

    fn both(&mut self, lane: Lane) -> Result<(&[u8], &mut [u8]), LaneError> {
        self.inner.both(lane)
    }

    fn post(&mut self, lane: Lane, len: usize) -> Result<(), LaneError> {
        self.inner.post(lane, len)
    }

    fn poll(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.inner.poll() {
                return Some(event);
            }
            if !self.time_passes() {
                return None;
            }
        }
    }

    fn ready(&mut self) -> bool {
        loop {
            if self.inner.ready() {
                return true;
            }
            if !self.time_passes() {
                return false;
            }
        }
    }

    fn wait(&mut self, timeout: Duration) {
        if self.network.pace == Pace::Driven {
            return;
        }
        let deadline = Instant::now().checked_add(timeout);
        while !self.ready() && deadline.is_none_or(|deadline| Instant::now() < deadline) {
            self.inner.park(deadline);
        }
    }

    fn waker(&self) -> Waker {
        self.inner.waker()
    }
}

/// The way to a peer.
struct OverNetwork {
    id: LinkId,
    from: WorkerId,
    network: SimulatedNetwork,
}

impl Link for OverNetwork {
    fn is_open(&self) -> bool {
        self.network.world().is_open(self.id)
    }

    fn carry(&mut self, micro_batch: MicroBatch, ball: Box<Ball>) {
        let bytes = (self.network.size)(ball.sent_by(self.from.role).frame());
        let mut world = self.network.world();
        world.send(self.id, micro_batch, ball, bytes);
        world.unpark(self.id);
    }

    fn close(&mut self) {
        let mut world = self.network.world();
        world.close(self.id);
        world.unpark(self.id);
    }
}

#[cfg(test)]
mod tests;
