//! How another thread ends an endpoint's wait: a cancelled request or a new placement must not wait for a frame.

use std::fmt;
use std::sync::Arc;

/// What a fabric does to end a wait. Called from any thread, any number of times.
pub trait Wake: Send + Sync {
    /// Ends the current wait, or the next one if there is none now.
    fn wake(&self);
}

/// A handle that ends the [`wait`](crate::Endpoint::wait) of one endpoint, from any thread.
///
/// A wake is remembered: if the endpoint is not waiting, its next wait returns at once. Wakes that come before
/// that wait count as one. Waking an endpoint that is gone does nothing.
#[derive(Clone)]
pub struct Waker(Arc<dyn Wake>);

impl Waker {
    /// A waker that calls `wake`.
    pub fn new(wake: Arc<dyn Wake>) -> Self {
        Self(wake)
    }

    /// Ends the current wait, or the next one if there is none now.
    pub fn wake(&self) {
        self.0.wake();
    }
}

impl fmt::Debug for Waker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Waker")
    }
}
