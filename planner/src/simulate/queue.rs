//! What happens next in virtual time.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Something that happens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Happening {
    /// The next requests of the trace.
    Arrive,
    /// A micro-batch's next layer, unless its generation is void.
    Round(usize, u64),
    /// A micro-batch's step is at its end, unless its generation is void.
    Ended(usize, u64),
    /// An outage begins.
    Break(usize),
    /// An outage is noticed.
    Noticed(usize),
    /// An outage is over.
    Mend(usize),
}

/// Events in order of time; of the same time, in the order in which they were pushed.
#[derive(Debug, Default)]
pub(super) struct Queue {
    heap: BinaryHeap<Reverse<Due>>,
    serial: u64,
}

#[derive(Debug)]
struct Due {
    at_s: f64,
    serial: u64,
    what: Happening,
}

impl Queue {
    pub(super) fn push(&mut self, at_s: f64, what: Happening) {
        self.serial += 1;
        let serial = self.serial;
        self.heap.push(Reverse(Due { at_s, serial, what }));
    }

    pub(super) fn pop(&mut self) -> Option<(f64, Happening)> {
        let Reverse(due) = self.heap.pop()?;
        Some((due.at_s, due.what))
    }
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        let times = self.at_s.total_cmp(&other.at_s);
        times.then(self.serial.cmp(&other.serial))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_earliest_is_first_and_of_the_same_time_the_one_that_came_first() {
        let mut queue = Queue::default();
        for (at_s, index) in [(2.0, 0), (1.0, 1), (2.0, 2), (1.0, 3)] {
            queue.push(at_s, Happening::Break(index));
        }
        let order: Vec<_> = std::iter::from_fn(|| queue.pop()).collect();
        let expected = [(1.0, 1), (1.0, 3), (2.0, 0), (2.0, 2)];
        assert_eq!(
            order,
            expected.map(|(at_s, index)| (at_s, Happening::Break(index)))
        );
    }
}
