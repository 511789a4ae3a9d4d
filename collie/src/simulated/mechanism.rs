//! One cause of an anomaly: what it needs, how it builds up, and what it does when it fires.

use crate::region::{Condition, Region};
use crate::space::{Point, Quantity, Space};

/// What is left of a mechanism's pressure when exactly one of its categories is wrong: hardware paths are shared, so a neighbour of the
/// faulty one still loads what the fault overloads.
const HALF_OPEN: f64 = 0.05;

/// What firing does to the traffic.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Effect {
    /// Share of the time in pause.
    pub pause: f64,
    /// Throughput left, as a share of what is owed.
    pub throughput: f64,
}

impl Effect {
    /// How conspicuous it is: where several fire at once, the worst is what is seen.
    pub fn severity(&self) -> f64 {
        self.pause + (1.0 - self.throughput)
    }
}

/// One cause of an anomaly.
#[derive(Debug, Clone, PartialEq)]
pub struct Mechanism {
    /// What reports call it.
    pub name: String,
    /// The workloads that trigger it.
    pub region: Region,
    /// What they suffer.
    pub effect: Effect,
    /// Whether throughput sags as pressure builds, or only falls off the cliff.
    pub sags: bool,
    /// The counters it drives, and how many times their idle value at full pressure.
    pub drives: Vec<(usize, f64)>,
}

impl Mechanism {
    /// From 0 to 1: the share of the way to firing. The product of a gate, which the categories open, and of one margin per bound.
    pub fn pressure(&self, point: &Point, space: &Space) -> f64 {
        let mut wrong_categories = 0;
        let mut pressure = 1.0;
        for condition in &self.region.conditions {
            match condition {
                Condition::Among { .. } => wrong_categories += i32::from(!condition.holds(point)),
                Condition::Within {
                    quantity,
                    at_least,
                    at_most,
                } => {
                    if !quantity.applies(point) {
                        return 0.0;
                    }
                    let (low, high) = extent(*quantity, space);
                    let value = quantity.of(point);
                    if let Some(tau) = at_least {
                        pressure *= margin(value / low, tau / low);
                    }
                    if let Some(tau) = at_most {
                        pressure *= margin(high / value, high / tau);
                    }
                }
            }
        }
        match wrong_categories {
            0 => pressure,
            1 => HALF_OPEN * pressure,
            _ => 0.0,
        }
    }

    /// Whether every condition holds.
    pub fn fires(&self, point: &Point) -> bool {
        self.region.contains(point)
    }
}

/// The share of the way, on a log scale, that a ratio has come to another.
fn margin(ratio: f64, full: f64) -> f64 {
    if ratio >= full {
        1.0
    } else {
        (ratio.ln() / full.ln()).clamp(0.0, 1.0)
    }
}

/// The least and the greatest value a quantity can have in a space.
pub(super) fn extent(quantity: Quantity, space: &Space) -> (f64, f64) {
    let range = |axis| {
        let (low, high) = space.range(axis);
        (f64::from(low), f64::from(high))
    };
    match quantity {
        Quantity::Axis(axis) => range(axis),
        Quantity::Product(a, b) => (range(a).0 * range(b).0, range(a).1 * range(b).1),
        Quantity::Ratio(a, b) => (range(a).0 / range(b).1, range(a).1 / range(b).0),
    }
}
