//! When to call again somebody who could not be reached.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

/// First pause; doubles with each failure up to [`PAUSE_MAX`].
const PAUSE: Duration = Duration::from_millis(50);
/// See [`PAUSE`].
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// How often it is said that somebody cannot be reached.
const COMPLAIN_EVERY: Duration = Duration::from_secs(10);

/// Pauses between calls, and whether to complain.
pub(super) struct Redial {
    pause: Duration,
    complained: Option<Instant>,
}

impl Redial {
    pub(super) fn new() -> Self {
        Redial {
            pause: PAUSE,
            complained: None,
        }
    }

    /// A call has succeeded: begin again.
    pub(super) fn reached(&mut self) {
        *self = Redial::new();
    }

    /// Whether it is time to say that calls fail.
    pub(super) fn complains(&mut self) -> bool {
        let due = self
            .complained
            .is_none_or(|when| when.elapsed() > COMPLAIN_EVERY);
        if due {
            self.complained = Some(Instant::now());
        }
        due
    }

    /// How long to wait now, longer each time. With jitter, so that a hundred workers do not call in step; the time of day is random enough.
    pub(super) fn next_pause(&mut self) -> Duration {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let nanos = now.map_or(0, |now| now.subsec_nanos());
        let jitter = self.pause.mul_f64(f64::from(nanos % 1000) / 2000.0);
        let pause = self.pause + jitter;
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        pause
    }
}
