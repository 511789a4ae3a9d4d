//! An endpoint that counts what it posts.

use std::time::Duration;

use metrics::{Counter, counter};
use volley_transports::{Endpoint, Event, Lane, LaneError, Role, Waker, WorkerId};

use crate::metric_names as names;

/// Any endpoint, with its posts counted in the metrics: one addition for each of two counters.
pub(crate) struct Metered {
    inner: Box<dyn Endpoint>,
    /// Bytes and frames, by peer.
    posted: Vec<[Counter; 2]>,
}

impl Metered {
    pub(crate) fn new(inner: Box<dyn Endpoint>) -> Self {
        let direction = match inner.id().role {
            Role::Attention => "dispatch",
            Role::Expert => "combine",
        };
        let opposite = inner.id().role.opposite();
        let counters = |peer| {
            let peer = opposite.worker(peer).to_string();
            [names::M2N_BYTES, names::M2N_FRAMES]
                .map(|name| counter!(name, "direction" => direction, "peer" => peer.clone()))
        };
        Metered {
            posted: (0..inner.peers()).map(counters).collect(),
            inner,
        }
    }
}

impl Endpoint for Metered {
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
        self.inner.post(lane, len)?;
        // What could be posted has a peer.
        if let Some([bytes, frames]) = self.posted.get(usize::from(lane.peer)) {
            bytes.increment(len as u64);
            frames.increment(1);
        }
        Ok(())
    }

    fn poll(&mut self) -> Option<Event> {
        self.inner.poll()
    }

    fn ready(&mut self) -> bool {
        self.inner.ready()
    }

    fn wait(&mut self, timeout: Duration) {
        self.inner.wait(timeout);
    }

    fn waker(&self) -> Waker {
        self.inner.waker()
    }
}
