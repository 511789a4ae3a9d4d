//! The minimal feature set of an anomaly, as far as it is known: conditions, each with the nearest values on both of its sides.

use serde::{Deserialize, Serialize};

use crate::monitor::Symptom;
use crate::region::{Condition, Region};
use crate::space::{Category, Choice, Point, Quantity, Space};

/// A bound that lies between a value that was anomalous and one that was clean, all else equal.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Edge {
    /// The outermost value known to be anomalous.
    pub inside: f64,
    /// The innermost value known to be clean.
    pub outside: f64,
}

impl Edge {
    /// The best guess of the bound.
    fn threshold(&self) -> f64 {
        (self.inside * self.outside).sqrt()
    }

    /// How far the bound may be off, as the logarithm of a ratio.
    pub fn doubt(&self) -> f64 {
        (self.inside / self.outside).ln().abs()
    }
}

/// One condition and what it rests on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Factor {
    /// A category: values that kept the anomaly, and values that made it vanish.
    Among {
        /// Which.
        category: Category,
        /// Known to be anomalous.
        anomalous: Vec<Choice>,
        /// Known to be clean.
        clean: Vec<Choice>,
    },
    /// A number with a bound below, above, or both.
    Within {
        /// Which.
        quantity: Quantity,
        /// The bound below.
        lower: Option<Edge>,
        /// The bound above.
        upper: Option<Edge>,
    },
}

/// What an anomaly needs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Mfs {
    /// The conditions, all necessary.
    pub factors: Vec<Factor>,
    /// A workload that shows it.
    pub anchor: Point,
    /// What that suffers.
    pub symptom: Symptom,
    /// The diagnostic counters there, as multiples of their idle values.
    pub signature: Vec<f64>,
    /// Probes it took to learn this.
    pub probes: usize,
}

impl Mfs {
    /// The workloads it speaks of, with bounds at the best guesses and the values that were seen.
    pub fn region(&self, space: &Space) -> Region {
        self.region_with(space, Edge::threshold, |anomalous, _, value| {
            anomalous.contains(value)
        })
    }

    /// Every workload that may still belong to it: all that is not known to be clean.
    pub fn region_at_most(&self, space: &Space) -> Region {
        self.region_with(
            space,
            |edge| edge.outside,
            |_, clean, value| !clean.contains(value),
        )
    }

    fn region_with(
        &self,
        space: &Space,
        bound: impl Fn(&Edge) -> f64,
        among: impl Fn(&[Choice], &[Choice], &Choice) -> bool,
    ) -> Region {
        let conditions = self.factors.iter().map(|factor| match factor {
            Factor::Among {
                category,
                anomalous,
                clean,
            } => Condition::Among {
                category: *category,
                values: space
                    .choices(*category)
                    .into_iter()
                    .filter(|choice| among(anomalous, clean, choice))
                    .collect(),
            },
            Factor::Within {
                quantity,
                lower,
                upper,
            } => {
                // Of an axis the bound is the first whole number on its inner side.
                let whole = matches!(quantity, Quantity::Axis(_));
                let low = lower.as_ref().map(|edge| {
                    if whole {
                        bound(edge).ceil().min(edge.inside)
                    } else {
                        bound(edge)
                    }
                });
                let high = upper.as_ref().map(|edge| {
                    if whole {
                        bound(edge).floor().max(edge.inside)
                    } else {
                        bound(edge)
                    }
                });
                Condition::Within {
                    quantity: *quantity,
                    at_least: low,
                    at_most: high,
                }
            }
        });
        Region {
            conditions: conditions.collect(),
        }
    }
}

/// The place of the greatest value.
pub(crate) fn dominant(signature: &[f64]) -> usize {
    (0..signature.len())
        .max_by(|&a, &b| signature[a].total_cmp(&signature[b]))
        .unwrap_or(0)
}
