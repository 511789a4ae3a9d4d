//! Earliest deadline first, with classes of service.

use std::time::Duration;

use super::{Order, Standing};
use crate::SequenceView;
use crate::protocol::SequenceId;

/// Requests of at least this priority want their first token within a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SloClass {
    /// The least priority of the class.
    pub priority: i32,
    /// From arrival to the first token.
    pub target: Duration,
}

/// A sequence's deadline is its arrival and the target of its class: the class of the greatest priority that its own reaches. The earliest deadline starts first, and
/// keeps its KV blocks when they run short. An urgent request passes those that arrived shortly before it; one that has waited long is passed by none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EarliestDeadline {
    /// By priority, the greatest first.
    classes: Vec<SloClass>,
    default: Duration,
}

impl EarliestDeadline {
    /// With these classes; sequences below all of them have the target `default`.
    pub fn new(mut classes: Vec<SloClass>, default: Duration) -> Self {
        classes.sort_by_key(|class| std::cmp::Reverse(class.priority));
        EarliestDeadline { classes, default }
    }

    /// The time within which a sequence of this priority wants its first token.
    pub fn target(&self, priority: i32) -> Duration {
        let class = self.classes.iter().find(|class| priority >= class.priority);
        class.map_or(self.default, |class| class.target)
    }
}

impl Order for EarliestDeadline {
    fn standing(&self, sequence: SequenceId, view: &SequenceView) -> Standing {
        let key = view.arrived.saturating_add(self.target(view.priority));
        Standing { key, sequence }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_class_is_the_highest_that_a_priority_reaches() {
        let class = |priority, seconds| SloClass {
            priority,
            target: Duration::from_secs(seconds),
        };
        let order = EarliestDeadline::new(vec![class(0, 5), class(10, 1)], Duration::from_secs(60));
        let target = |priority| order.target(priority).as_secs();
        assert_eq!([-1, 0, 9, 10, i32::MAX].map(target), [60, 5, 5, 1, 1]);
    }
}
