//! The fabric inside one process: lanes move by pointer, nothing is copied. Posting puts the lane's ball into the peer's inbox.

use std::sync::Arc;
use std::time::Duration;

use crate::ball::{Ball, BallEnd, Inbox, Link, Parcel, Seat, Spin};
use crate::{
    Endpoint, Event, Lane, LaneError, LostReason, MicroBatch, Topology, TopologyError, Waker,
    WorkerId,
};

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
                .map(|(_, inbox)| ToInbox {
                    from: id.index,
                    inbox: Arc::clone(inbox),
                })
                .collect()
        };
        Ok(seats
            .into_iter()
            .map(|seat| InProcess(BallEnd::new(&topology, spin, links_of(seat.id), seat)))
            .collect())
    }
}

/// One worker's end of an in-process fabric. May move to the thread of its worker after it was built.
pub struct InProcess(BallEnd<ToInbox>);

crate::ball::delegate_endpoint!(InProcess, 0);

/// The way to a peer of the same process.
struct ToInbox {
    from: u16,
    inbox: Arc<Inbox>,
}

impl Link for ToInbox {
    fn is_open(&self) -> bool {
        !self.inbox.is_closed()
    }

    fn carry(&mut self, micro_batch: MicroBatch, ball: Box<Ball>) {
        self.inbox.deliver(Parcel::Frame {
            from: self.from,
            micro_batch,
            ball,
        });
    }

    fn close(&mut self) {
        self.inbox.deliver(Parcel::Lost {
            from: self.from,
            reason: LostReason::Closed,
        });
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::Role;

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
