//! Places for connections: as many as the server may hold. When all are taken, a newcomer gets that of the connection that has rested longest.
//!
//! A connection *rests* while no request of it is being answered: between two requests, before its first, and while the head of one dribbles in. So connections
//! that only wait, in whatever number, keep nobody out; only when every place has a request at work is there none left.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// All places of a server; cheap to clone.
#[derive(Clone)]
pub(super) struct Places(Arc<Mutex<Table>>);

struct Table {
    free: usize,
    /// Connections that rest, the longest first: by the number of the rest they are at.
    resting: BTreeMap<u64, Arc<Notify>>,
    rests: u64,
}

/// A connection's place, given back when dropped.
pub(super) struct Place {
    places: Places,
    wanted: Arc<Notify>,
    state: Mutex<State>,
    /// Requests that came so far.
    requests: AtomicU64,
    /// Whether one is being answered.
    answering: AtomicBool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// The number of the rest.
    Resting(u64),
    /// A request is being answered.
    Busy,
    /// Another connection has the place; this one is to end.
    GivenUp,
}

/// Makes a place busy until dropped.
pub(super) struct Busy(Arc<Place>);

impl Places {
    pub(super) fn new(count: usize) -> Self {
        Places(Arc::new(Mutex::new(Table {
            free: count,
            resting: BTreeMap::new(),
            rests: 0,
        })))
    }

    /// A place, and whether a resting connection had to give it up. `None` when every place is busy.
    pub(super) fn enter(&self) -> Option<(Arc<Place>, bool)> {
        let mut table = self.table();
        let gave_up = if table.free > 0 {
            table.free -= 1;
            false
        } else {
            let (_, wanted) = table.resting.pop_first()?;
            wanted.notify_one();
            true
        };
        let wanted = Arc::new(Notify::new());
        let rest = table.rest(&wanted);
        drop(table);
        let place = Place {
            places: self.clone(),
            wanted,
            state: Mutex::new(State::Resting(rest)),
            requests: AtomicU64::new(0),
            answering: AtomicBool::new(false),
        };
        Some((Arc::new(place), gave_up))
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn rest(&mut self, wanted: &Arc<Notify>) -> u64 {
        self.rests += 1;
        self.resting.insert(self.rests, Arc::clone(wanted));
        self.rests
    }
}

impl Place {
    /// Waits until somebody else needs the place.
    pub(super) async fn wanted(&self) {
        self.wanted.notified().await;
    }

    /// A request has come. A connection has one at a time.
    pub(super) fn busy(self: &Arc<Self>) -> Busy {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.answering.store(true, Ordering::Relaxed);
        let mut table = self.places.table();
        let mut state = self.state();
        if let State::Resting(rest) = *state {
            *state = match table.resting.remove(&rest) {
                Some(_) => State::Busy,
                // The place was given away a moment ago; this request is still answered.
                None => State::GivenUp,
            };
        }
        Busy(Arc::clone(self))
    }

    /// Whether no request has come yet: nothing that was written to the connection can be cut off.
    pub(super) fn is_fresh(&self) -> bool {
        self.requests.load(Ordering::Relaxed) == 0
    }

    /// Whether a request is being answered.
    pub(super) fn is_busy(&self) -> bool {
        self.answering.load(Ordering::Relaxed)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.answering.store(false, Ordering::Relaxed);
        let mut table = self.0.places.table();
        let mut state = self.0.state();
        if *state == State::Busy {
            *state = State::Resting(table.rest(&self.0.wanted));
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut table = self.places.table();
        let held = match *self.state() {
            State::Resting(rest) => table.resting.remove(&rest).is_some(),
            State::Busy => true,
            State::GivenUp => false,
        };
        table.free += usize::from(held);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use proptest::prelude::*;

    use super::*;

    fn is_wanted(place: &Place) -> bool {
        place.wanted().now_or_never().is_some()
    }

    #[test]
    fn the_longest_rest_ends_first_and_a_request_is_never_turned_out() {
        let places = Places::new(2);
        let (first, _) = places.enter().unwrap();
        let (second, _) = places.enter().unwrap();
        // The first rests anew, so the second has rested longer.
        drop(first.busy());
        let (third, gave_up) = places.enter().unwrap();
        assert!(gave_up && is_wanted(&second) && !is_wanted(&first));
        let (a, b) = (first.busy(), third.busy());
        assert!(places.enter().is_none(), "both answer");
        drop(a);
        drop(second);
        assert!(places.enter().is_some_and(|(_, gave_up)| gave_up));
        drop(b);
    }

    #[test]
    fn a_request_that_comes_with_the_notice_is_still_answered() {
        let places = Places::new(1);
        let (first, _) = places.enter().unwrap();
        let (second, _) = places.enter().unwrap();
        let busy = first.busy();
        assert!(is_wanted(&first) && first.is_busy());
        drop(busy);
        drop(first);
        // Its place was the second's all along.
        let _busy = second.busy();
        assert!(places.enter().is_none());
    }

    proptest! {
        /// Whatever happens in whatever order, as many connections have a place as there are places at most, and none gets lost.
        #[test]
        fn places_are_neither_lost_nor_made(count in 1..5usize, events in prop::collection::vec((0..4u8, any::<prop::sample::Index>()), 0..200)) {
            let places = Places::new(count);
            let mut here: Vec<(Arc<Place>, Option<Busy>)> = Vec::new();
            for (event, which) in events {
                let at = which.index(here.len().max(1));
                match event {
                    0 => here.extend(places.enter().map(|(place, _)| (place, None))),
                    _ if here.is_empty() => {}
                    1 => {
                        let (place, busy) = &mut here[at];
                        if busy.is_none() {
                            *busy = Some(place.busy());
                        }
                    }
                    2 => here[at].1 = None,
                    _ => drop(here.swap_remove(at)),
                }
                let holding = here.iter().filter(|(place, _)| match *place.state() {
                    State::Resting(rest) => places.table().resting.contains_key(&rest),
                    State::Busy => true,
                    State::GivenUp => false,
                });
                let holding = holding.count();
                prop_assert_eq!(holding + places.table().free, count);
            }
            drop(here);
            prop_assert_eq!(places.table().free, count);
            prop_assert!(places.table().resting.is_empty());
        }
    }
}
