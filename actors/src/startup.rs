//! How long a worker took to be of use, mark by mark.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// When a worker reached each point of its start, since its process began (since the cluster's start for a thread of the controller). Loading and joining go on side by
/// side, so marks are times and not differences.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Startup {
    /// Model and configuration were opened and checked, and the socket was there.
    pub opened: Option<Duration>,
    /// The controller took it.
    pub joined: Option<Duration>,
    /// Its weights were read and packed, which is one pass.
    pub loaded: Option<Duration>,
    /// Its first epoch began: all others had loaded too.
    pub first_epoch: Option<Duration>,
    /// An attention worker was in it; an expert worker is at once.
    pub ready: Option<Duration>,
}

impl Startup {
    /// Names and times, in the order in which they are usually reached.
    pub fn marks(&self) -> [(&'static str, Option<Duration>); 5] {
        [
            ("opened", self.opened),
            ("joined", self.joined),
            ("loaded", self.loaded),
            ("first_epoch", self.first_epoch),
            ("ready", self.ready),
        ]
    }
}

impl std::fmt::Display for Startup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let reached = self
            .marks()
            .into_iter()
            .filter_map(|(name, at)| Some((name, at?)));
        let texts = reached
            .map(|(name, at)| format!("{} {:.2} s", name.replace('_', " "), at.as_secs_f64()));
        f.write_str(&texts.collect::<Vec<_>>().join(", "))
    }
}

/// Notes a time at the first call only.
pub(crate) fn mark(at: &mut Option<Duration>, now: Duration) {
    at.get_or_insert(now);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_set_once_and_read_in_order() {
        let mut startup = Startup::default();
        mark(&mut startup.loaded, Duration::from_millis(1500));
        mark(&mut startup.loaded, Duration::from_millis(9000));
        mark(&mut startup.first_epoch, Duration::from_secs(2));
        assert_eq!(startup.to_string(), "loaded 1.50 s, first epoch 2.00 s");
    }
}
