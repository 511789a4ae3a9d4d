//! When to renew a lease and when to try again. Pure: times go in, times come out.

use std::time::Duration;

/// First pause after a failure; doubles up to [`PAUSE_MAX`].
const PAUSE: Duration = Duration::from_millis(100);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// A lease is renewed when this part of its time is left.
const LEFT: f64 = 2.0 / 3.0;

/// A lease as its holder counts: from before it was asked for, so never longer than the server does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LeaseTime {
    ttl: Duration,
    expires: Duration,
}

impl LeaseTime {
    /// A lease of `ttl` that was asked for, or renewed, at `asked`.
    pub(super) fn new(asked: Duration, ttl: Duration) -> Self {
        LeaseTime {
            ttl,
            expires: asked + ttl,
        }
    }

    /// When to renew. Reckoned from the absolute end, so late answers do not add up.
    pub(super) fn renew_at(&self) -> Duration {
        self.expires.saturating_sub(self.ttl.mul_f64(LEFT))
    }

    /// Until when the server has it for certain, unless it was revoked.
    pub(super) fn expires(&self) -> Duration {
        self.expires
    }
}

/// Pauses between attempts, with jitter: a hundred members that lose a server together do not come back together.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// It went well.
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }

    /// The pause before the next attempt; `random` is from 0 to 1.
    pub(super) fn pause(&mut self, random: f64) -> Duration {
        let whole = (PAUSE * 2u32.pow(self.failures.min(8))).min(PAUSE_MAX);
        self.failures += 1;
        whole.mul_f64(0.5 + random.clamp(0.0, 1.0) / 2.0)
    }
}

/// A number from 0 to 1; the time of day is random enough for pauses.
pub(super) fn random() -> f64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    f64::from(now.map_or(0, |now| now.subsec_nanos()) % 1000) / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewal_is_reckoned_from_the_end_and_not_from_the_answer() {
        let second = Duration::from_secs;
        let lease = LeaseTime::new(second(100), second(9));
        assert_eq!(
            (lease.renew_at(), lease.expires()),
            (second(103), second(109))
        );
        // The answer came four seconds late: the lease is as long as if it had come at once.
        let renewed = LeaseTime::new(second(103), second(9));
        assert_eq!(renewed.renew_at(), second(106));
    }

    #[test]
    fn pauses_grow_to_a_bound_and_never_vanish() {
        let mut backoff = Backoff::default();
        let pauses: Vec<Duration> = (0..20).map(|i| backoff.pause(f64::from(i % 2))).collect();
        assert!(
            pauses.iter().all(|&p| (PAUSE / 2..=PAUSE_MAX).contains(&p)),
            "{pauses:?}"
        );
        assert_eq!(pauses[1], PAUSE * 2);
        assert_eq!(pauses[19], PAUSE_MAX);
        backoff.reset();
        assert_eq!(backoff.pause(1.0), PAUSE);
    }
}
