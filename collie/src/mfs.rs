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
    /// Where between the two it seems to be, by how far counters fall beyond it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub likely: Option<f64>,
}

impl Edge {
    /// The best guess of the bound.
    pub(crate) fn threshold(&self) -> f64 {
        self.likely
            .unwrap_or_else(|| (self.inside * self.outside).sqrt())
    }

    /// Whether a place is nearer to what is anomalous than half way.
    pub(crate) fn is_inner(&self, place: f64) -> bool {
        let half = (self.inside * self.outside).sqrt();
        (place >= half) == (self.inside >= half)
    }

    /// Where to measure next: half way, or a little to the wider side of where the bound seems to be.
    pub(crate) fn target(&self) -> f64 {
        let (a, b) = (self.outside.ln(), self.inside.ln());
        let along = (self.threshold().ln() - a) / (b - a);
        let narrow = along.min(1.0 - along).max(0.1);
        let along = if along < 0.5 {
            along + 0.3 * narrow
        } else {
            along - 0.3 * narrow
        };
        if self.likely.is_none() {
            return self.threshold();
        }
        (a + along * (b - a)).exp()
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

    /// The workloads it speaks of and those that fail only one bound.
    pub(crate) fn region_without(&self, space: &Space, quantity: Quantity, below: bool) -> Region {
        let mut region = self.region(space);
        for condition in &mut region.conditions {
            if let Condition::Within {
                quantity: of,
                at_least,
                at_most,
            } = condition
                && *of == quantity
            {
                *(if below { at_least } else { at_most }) = None;
            }
        }
        region
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
