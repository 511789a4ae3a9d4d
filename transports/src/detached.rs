//! The end of a worker that has no lanes yet.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam_utils::sync::{Parker, Unparker};

use crate::{Endpoint, Event, Lane, LaneError, Wake, Waker, WorkerId};

/// An endpoint without peers: nothing arrives, nothing can be posted, but it can wait and be woken. What a worker has between its start and its first epoch.
#[derive(Debug)]
pub struct Detached {
    id: WorkerId,
    parker: Parker,
    alarm: Arc<Alarm>,
}

#[derive(Debug)]
struct Alarm {
    woken: AtomicBool,
    unparker: Unparker,
}

impl Wake for Alarm {
    fn wake(&self) {
        self.woken.store(true, Ordering::Release);
        self.unparker.unpark();
    }
}

impl Detached {
    /// The end of worker `id`.
    pub fn new(id: WorkerId) -> Self {
        let parker = Parker::new();
        let alarm = Alarm {
            woken: AtomicBool::new(false),
            unparker: parker.unparker().clone(),
        };
        Self {
            id,
            parker,
            alarm: Arc::new(alarm),
        }
    }

    fn unknown(&self, lane: Lane) -> LaneError {
        LaneError::UnknownPeer {
            at: self.id,
            peer: lane.peer,
            peers: 0,
        }
    }
}

impl Endpoint for Detached {
    fn id(&self) -> WorkerId {
        self.id
    }

    fn peers(&self) -> u16 {
        0
    }

    fn micro_batches(&self) -> u8 {
        0
    }

    fn holds(&self, _: Lane) -> bool {
        false
    }

    fn received(&self, lane: Lane) -> Result<&[u8], LaneError> {
        Err(self.unknown(lane))
    }

    fn slot(&mut self, lane: Lane) -> Result<&mut [u8], LaneError> {
        Err(self.unknown(lane))
    }

    fn both(&mut self, lane: Lane) -> Result<(&[u8], &mut [u8]), LaneError> {
        Err(self.unknown(lane))
    }

    fn post(&mut self, lane: Lane, _: usize) -> Result<(), LaneError> {
        Err(self.unknown(lane))
    }

    fn poll(&mut self) -> Option<Event> {
        None
    }

    fn ready(&mut self) -> bool {
        self.alarm.woken.swap(false, Ordering::Acquire)
    }

    fn wait(&mut self, timeout: Duration) {
        if !self.ready() {
            self.parker.park_timeout(timeout);
            self.ready();
        }
    }

    fn waker(&self) -> Waker {
        Waker::new(self.alarm.clone())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::{MicroBatch, Role};

    #[test]
    fn it_has_no_lanes_but_wakes() {
        let mut end = Detached::new(Role::Expert.worker(3));
        let lane = Lane::new(0, MicroBatch(0));
        assert!(!end.holds(lane) && end.slot(lane).is_err() && end.post(lane, 1).is_err());
        assert_eq!(end.poll(), None);
        end.waker().wake();
        assert!(end.ready() && !end.ready());
        let waker = end.waker();
        let long = Duration::from_secs(30);
        let start = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(move || waker.wake());
            end.wait(long);
        });
        assert!(start.elapsed() < long);
    }
}
