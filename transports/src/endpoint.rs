//! The one interface of every fabric: an endpoint owns one worker's lanes to all workers of the opposite role.
//!
//! It is object-safe and has no generics, so that workers, actors and the simulator are compiled once and take any
//! fabric at start-up.

use std::time::Duration;

use crate::{Lane, MicroBatch, Role, Waker, WorkerId};

/// One worker's end of all its lanes.
///
/// # Guarantees
///
/// * Exactly one side of a lane holds it. At the start that is the attention side.
/// * The holder may read what the other side sent last and write what it will send next; nobody else touches the
///   two slots until the holder posts.
/// * Everything written before [`post`](Self::post) is visible to the peer when it polls the arrival.
/// * Lanes are independent: nothing is said about the order of arrivals on different lanes.
/// * An owner that goes on polling or waiting moves its frames: a fabric may need that to send what could not leave at once.
/// * Frames that a peer posted before it closed arrive before its [`Event::Lost`], which comes exactly once.
/// * No method but the constructor of the fabric allocates, and only [`wait`](Self::wait) blocks.
/// * Misuse (a lane not held, a length over the capacity, an unknown lane) is a [`LaneError`] and changes nothing.
///
/// # Example
///
/// ```
/// use volley_transports::{Endpoint, Event, InProcessFabric, Lane, MicroBatch, Topology};
///
/// let topology = Topology { attention: 1, experts: 1, micro_batches: 1, dispatch_bytes: 64, combine_bytes: 64 };
/// let mut ends = InProcessFabric::build(topology)?;
/// let mut expert = ends.pop().unwrap();
/// let mut attention = ends.pop().unwrap();
/// let lane = Lane::new(0, MicroBatch(0));
///
/// attention.slot(lane)?[..4].copy_from_slice(b"ball");
/// attention.post(lane, 4)?;
/// assert_eq!(expert.poll(), Some(Event::Arrived { lane, len: 4 }));
/// assert_eq!(expert.received(lane)?, b"ball");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait Endpoint: Send {
    /// The worker whose endpoint this is.
    fn id(&self) -> WorkerId;

    /// Number of workers of the opposite role: lanes go to peers `0..peers()`.
    fn peers(&self) -> u16;

    /// Number of micro-batches: there is a lane for each of `0..micro_batches()` to every peer.
    fn micro_batches(&self) -> u8;

    /// Whether this side holds the lane. False also for a lane that does not exist.
    fn holds(&self, lane: Lane) -> bool;

    /// The frame that arrived last, as long as it was posted; empty before the first. Starts on a 64-byte boundary.
    ///
    /// # Errors
    /// The lane does not exist or is not held.
    fn received(&self, lane: Lane) -> Result<&[u8], LaneError>;

    /// The outgoing slot at its whole capacity, on a 64-byte boundary. Its content is whatever was written last.
    ///
    /// # Errors
    /// The lane does not exist or is not held.
    fn slot(&mut self, lane: Lane) -> Result<&mut [u8], LaneError>;

    /// Both slots at once: what arrived last, and where the answer is built.
    ///
    /// # Errors
    /// The lane does not exist or is not held.
    fn both(&mut self, lane: Lane) -> Result<(&[u8], &mut [u8]), LaneError>;

    /// Hands the lane over; the peer sees the first `len` bytes of the slot.
    ///
    /// # Errors
    /// The lane does not exist or is not held, `len` is over the capacity, or the peer is lost. The lane then stays
    /// where it was.
    fn post(&mut self, lane: Lane, len: usize) -> Result<(), LaneError>;

    /// The next event, if there is one. Never blocks, never allocates.
    fn poll(&mut self) -> Option<Event>;

    /// Whether there is something to poll, or a [`Waker`] was used since the last wait; such a wake is used up by this. Never blocks: for a
    /// thread that does something useful while it waits.
    fn ready(&mut self) -> bool;

    /// Returns when there is something to poll, when a [`Waker`] was used, or after `timeout`; it may also return
    /// for no reason. Spins briefly, then parks the calling thread, whichever thread that is.
    fn wait(&mut self, timeout: Duration);

    /// A handle with which other threads end a wait.
    fn waker(&self) -> Waker;
}

/// What [`Endpoint::poll`] reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The peer handed the lane over with a frame of `len` bytes.
    Arrived {
        /// The lane, now held by this side.
        lane: Lane,
        /// Length of the frame in bytes.
        len: usize,
    },
    /// A peer is gone. Lanes that it held, or that were on their way to it, are gone with it.
    Lost {
        /// The worker that is gone.
        peer: WorkerId,
        /// What is known about the cause.
        reason: LostReason,
    },
}

/// Why a peer is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LostReason {
    /// It closed its endpoint, or its thread ended.
    Closed,
    /// It could not be reached when the lanes were made.
    Unreachable,
    /// Nothing came from it any more.
    TimedOut,
    /// It, or something on the way, broke the protocol of the fabric.
    Broken,
}

impl std::fmt::Display for LostReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Closed => f.write_str("it closed its endpoint"),
            Self::Unreachable => f.write_str("it could not be reached"),
            Self::TimedOut => f.write_str("no sign of life came from it any more"),
            Self::Broken => {
                f.write_str("its connection broke; the log of the network names the reason")
            }
        }
    }
}

/// Why a lane could not be used. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LaneError {
    /// The lane names a worker that is not in the topology.
    #[error("{at} has no peer {peer}: there are {peers} {} workers, numbered from 0", at.role.opposite())]
    UnknownPeer {
        /// The endpoint that was asked.
        at: WorkerId,
        /// The index in the lane.
        peer: u16,
        /// How many peers there are.
        peers: u16,
    },
    /// The lane names a micro-batch that is not in the topology.
    #[error("{at} has no {micro_batch}: there are {micro_batches}, numbered from 0")]
    UnknownMicroBatch {
        /// The endpoint that was asked.
        at: WorkerId,
        /// The micro-batch in the lane.
        micro_batch: MicroBatch,
        /// How many micro-batches there are.
        micro_batches: u8,
    },
    /// The other side holds the lane.
    #[error(
        "{at} does not hold the lane to {peer} for {micro_batch}: wait for the peer's frame first"
    )]
    NotHeld {
        /// The endpoint that was asked.
        at: WorkerId,
        /// The worker that holds the lane.
        peer: WorkerId,
        /// The lane's micro-batch.
        micro_batch: MicroBatch,
    },
    /// The frame is longer than the slot.
    #[error(
        "{at} cannot post {len} bytes to {peer} for {micro_batch}: the slot holds {capacity}; size it for the largest micro-batch"
    )]
    TooLong {
        /// The endpoint that was asked.
        at: WorkerId,
        /// The worker at the other end.
        peer: WorkerId,
        /// The lane's micro-batch.
        micro_batch: MicroBatch,
        /// The length that was to be posted, in bytes.
        len: usize,
        /// The capacity of the slot, in bytes.
        capacity: usize,
    },
    /// The worker at the other end is gone.
    #[error(
        "{at} cannot use the lane for {micro_batch}: {peer} is lost; route around it under a new epoch"
    )]
    PeerLost {
        /// The endpoint that was asked.
        at: WorkerId,
        /// The worker that is gone.
        peer: WorkerId,
        /// The lane's micro-batch.
        micro_batch: MicroBatch,
    },
}

/// The position of `lane` among the `peers * micro_batches` lanes of endpoint `at`, peer-major: what every fabric
/// needs first.
///
/// # Errors
/// The lane does not exist.
pub fn lane_index(
    at: WorkerId,
    peers: u16,
    micro_batches: u8,
    lane: Lane,
) -> Result<usize, LaneError> {
    if lane.peer >= peers {
        return Err(LaneError::UnknownPeer {
            at,
            peer: lane.peer,
            peers,
        });
    }
    if lane.micro_batch.0 >= micro_batches {
        return Err(LaneError::UnknownMicroBatch {
            at,
            micro_batch: lane.micro_batch,
            micro_batches,
        });
    }
    Ok(usize::from(lane.peer) * usize::from(micro_batches) + usize::from(lane.micro_batch.0))
}

impl<E: Endpoint + ?Sized> Endpoint for Box<E> {
    fn id(&self) -> WorkerId {
        (**self).id()
    }
    fn peers(&self) -> u16 {
        (**self).peers()
    }
    fn micro_batches(&self) -> u8 {
        (**self).micro_batches()
    }
    fn holds(&self, lane: Lane) -> bool {
        (**self).holds(lane)
    }
    fn received(&self, lane: Lane) -> Result<&[u8], LaneError> {
        (**self).received(lane)
    }
    fn slot(&mut self, lane: Lane) -> Result<&mut [u8], LaneError> {
        (**self).slot(lane)
    }
    fn both(&mut self, lane: Lane) -> Result<(&[u8], &mut [u8]), LaneError> {
        (**self).both(lane)
    }
    fn post(&mut self, lane: Lane, len: usize) -> Result<(), LaneError> {
        (**self).post(lane, len)
    }
    fn poll(&mut self) -> Option<Event> {
        (**self).poll()
    }
    fn ready(&mut self) -> bool {
        (**self).ready()
    }

    fn wait(&mut self, timeout: Duration) {
        (**self).wait(timeout);
    }
    fn waker(&self) -> Waker {
        (**self).waker()
    }
}

/// The role that holds every lane at the start.
pub const FIRST_HOLDER: Role = Role::Attention;
