//! Whether the cluster answers and gets on: a background task asks it for its status, health checks read what it was told last.
//!
//! So a probe never waits for a busy cluster, and progress is judged by the step counter, not by whether somebody answers.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use volley_actors::{Client, Status};

/// How often the cluster is asked.
const INTERVAL: Duration = Duration::from_millis(100);
/// A cluster that has not answered for this long is not ready.
const SILENCE_MAX: Duration = Duration::from_secs(10);

/// What was heard of the cluster. Cheap to clone; clones are the same.
#[derive(Clone)]
pub(super) struct Pulse {
    shared: Arc<Mutex<Shared>>,
}

struct Shared {
    started: Instant,
    /// When the cluster last answered, after `started`.
    heard: Duration,
    progress: Progress,
    /// The process is on its way out, whatever the cluster says.
    stopping: bool,
    draining: bool,
}

/// What health checks are made of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reading {
    /// Time since the cluster answered last.
    pub(super) silence: Duration,
    /// Whether that is too long.
    pub(super) silent: bool,
    pub(super) draining: bool,
    pub(super) progress: Progress,
    /// Time without progress.
    pub(super) still: Duration,
}

/// Whether steps come to their end while there are requests. Pure; times count from any fixed moment.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Progress {
    pub(super) live: usize,
    pub(super) waiting: usize,
    pub(super) steps: u64,
    /// When a step was last seen to end, or there was nothing to do.
    moved: Duration,
}

/// The verdict on progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum State {
    /// There are requests, and steps end.
    Ok,
    /// There are no requests.
    Idle,
    /// There are requests, and no step has ended for too long.
    Stalled,
}

impl Progress {
    /// Enters what the cluster said at `now`.
    fn observe(&mut self, now: Duration, status: &Status) {
        if status.live == 0 || status.totals.steps != self.steps {
            self.moved = now;
        }
        self.moved = self.moved.max(now.saturating_sub(status.since_last_step));
        (self.live, self.waiting, self.steps) = (status.live, status.waiting, status.totals.steps);
    }

    pub(super) fn state(&self, still: Duration, stalled_after: Duration) -> State {
        match self.live {
            0 => State::Idle,
            _ if still > stalled_after => State::Stalled,
            _ => State::Ok,
        }
    }
}

impl Pulse {
    pub(super) fn new() -> Self {
        let shared = Shared {
            started: Instant::now(),
            heard: Duration::ZERO,
            progress: Progress::default(),
            stopping: false,
            draining: false,
        };
        Pulse {
            shared: Arc::new(Mutex::new(shared)),
        }
    }

    /// Asks the cluster again and again, for ever.
    pub(super) async fn watch(self, client: Client) {
        loop {
            if let Some(status) = client.status().await {
                self.heard(&status);
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }

    /// From now on the answer is: draining.
    pub(super) fn stop(&self) {
        self.lock().stopping = true;
    }

    pub(super) fn read(&self) -> Reading {
        let shared = self.lock();
        let now = shared.started.elapsed();
        let silence = now.saturating_sub(shared.heard);
        Reading {
            silence,
            silent: silence > SILENCE_MAX,
            draining: shared.stopping || shared.draining,
            progress: shared.progress,
            still: now.saturating_sub(shared.progress.moved),
        }
    }

    fn heard(&self, status: &Status) {
        let mut shared = self.lock();
        let now = shared.started.elapsed();
        shared.heard = now;
        shared.draining = status.draining;
        shared.progress.observe(now, status);
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    fn seconds(s: u64) -> Duration {
        Duration::from_secs(s)
    }

    fn status(live: usize, steps: u64, since_last_step: Duration) -> Status {
        Status {
            scheduler: None,
            standby: Vec::new(),
            epoch: 1,
            live,
            waiting: 0,
            steps_in_flight: 0,
            since_last_step,
            draining: false,
            failed: None,
            totals: volley_actors::Totals {
                steps,
                ..Default::default()
            },
            attention: Vec::new(),
        }
    }

    fn state(progress: &Progress, now: Duration) -> State {
        progress.state(now.saturating_sub(progress.moved), LIMIT)
    }

    #[test]
    fn requests_without_steps_are_a_stall() {
        let mut progress = Progress::default();
        progress.observe(seconds(100), &status(1, 5, seconds(1)));
        assert_eq!(state(&progress, seconds(110)), State::Ok);
        progress.observe(seconds(140), &status(1, 5, seconds(41)));
        assert_eq!(state(&progress, seconds(140)), State::Stalled);
        progress.observe(seconds(141), &status(1, 6, seconds(0)));
        assert_eq!(state(&progress, seconds(141)), State::Ok);
    }

    #[test]
    fn a_request_after_a_long_rest_is_no_stall() {
        let mut progress = Progress::default();
        progress.observe(seconds(1000), &status(0, 5, seconds(900)));
        assert_eq!(state(&progress, seconds(1000)), State::Idle);
        progress.observe(seconds(1001), &status(1, 5, seconds(901)));
        assert_eq!(state(&progress, seconds(1001)), State::Ok);
        assert_eq!(state(&progress, seconds(1031)), State::Stalled);
    }
}
