//! One cause of an anomaly: what it needs, how it builds up, and what it does when it fires.

use crate::region::Region;
use crate::space::{Point, Space};

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
    /// From 0 to 1: the share of the way to firing.
    pub fn pressure(&self, point: &Point, space: &Space) -> f64 {
        self.region.nearness(point, space)
    }

    /// Whether every condition holds.
    pub fn fires(&self, point: &Point) -> bool {
        self.region.contains(point)
    }
}
