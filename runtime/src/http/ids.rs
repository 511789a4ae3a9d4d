//! Names and seeds that nobody can guess or has seen before.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// Different for each call: SipHash of a counter under keys that the system's random source gave. Good for seeds and names, not for secrets.
pub(super) fn random() -> u64 {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    RandomState::new().hash_one(CALLS.fetch_add(1, Ordering::Relaxed))
}

/// A name such as `chatcmpl-5f0c...`, with 32 hexadecimal digits.
pub(super) fn name(prefix: &str) -> String {
    format!("{prefix}{:016x}{:016x}", random(), random())
}

/// Seconds since the Unix epoch.
pub(super) fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_secs())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn numbers_do_not_come_twice() {
        let numbers: HashSet<u64> = (0..1000).map(|_| random()).collect();
        assert_eq!(numbers.len(), 1000);
        assert_eq!(name("x-").len(), 34);
    }
}
