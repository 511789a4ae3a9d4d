//! The one clock of a cluster: time since its start.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Copies of a clock agree with each other.
#[derive(Debug, Clone)]
pub struct Clock(Source);

#[derive(Debug, Clone)]
enum Source {
    /// The machine's clock.
    Real(Instant),
    /// A hand that somebody moves: nanoseconds.
    Hand(Arc<AtomicU64>),
}

impl Clock {
    /// A clock that starts now.
    pub fn start() -> Self {
        Clock(Source::Real(Instant::now()))
    }

    /// A clock that stands at zero until it is [`set`](Self::set): virtual time.
    pub(crate) fn by_hand() -> Self {
        Clock(Source::Hand(Arc::default()))
    }

    /// Sets a clock that goes by hand; any other goes on by itself.
    pub(crate) fn set(&self, now: Duration) {
        if let Source::Hand(hand) = &self.0 {
            hand.store(now.as_nanos() as u64, Ordering::Relaxed);
        }
    }

    /// Time since the start.
    pub fn now(&self) -> Duration {
        match &self.0 {
            Source::Real(start) => start.elapsed(),
            Source::Hand(hand) => Duration::from_nanos(hand.load(Ordering::Relaxed)),
        }
    }
}
