//! A part of the space given by conditions that all hold: what a mechanism needs, and what a minimal feature set says.

use std::fmt;

use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};

use crate::space::{Axis, Category, Choice, Feature, Point, Quantity, Setting, Space};

/// One condition on a point.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Condition {
    /// The category has one of these values.
    Among {
        /// Which.
        category: Category,
        /// Any of them.
        values: Vec<Choice>,
    },
    /// The quantity lies within bounds, both included.
    Within {
        /// Which.
        quantity: Quantity,
        /// The least, if there is one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        at_least: Option<f64>,
        /// The most, if there is one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        at_most: Option<f64>,
    },
}

impl Condition {
    /// Whether a point meets it. A number that the point's traffic cannot depend on meets nothing.
    pub fn holds(&self, point: &Point) -> bool {
        match self {
            Condition::Among { category, values } => values.contains(&category.of(point)),
            Condition::Within {
                quantity,
                at_least,
                at_most,
            } => {
                let value = quantity.of(point);
                quantity.applies(point)
                    && at_least.is_none_or(|low| value >= low)
                    && at_most.is_none_or(|high| value <= high)
            }
        }
    }

    /// The features it speaks of.
    pub fn features(&self) -> Vec<Feature> {
        match *self {
            Condition::Among { category, .. } => vec![Feature::Category(category)],
            Condition::Within {
                quantity: Quantity::Axis(axis),
                ..
            } => vec![Feature::Axis(axis)],
            Condition::Within {
                quantity: Quantity::Product(a, b) | Quantity::Ratio(a, b),
                ..
            } => {
                vec![Feature::Axis(a), Feature::Axis(b)]
            }
        }
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Condition::Among { category, values } => {
                let values: Vec<String> = values.iter().map(Choice::to_string).collect();
                write!(f, "{category} is {}", values.join(" or "))
            }
            Condition::Within {
                quantity,
                at_least,
                at_most,
            } => {
                let bytes = matches!(quantity, Quantity::Axis(axis) if axis.is_bytes());
                let number = |value: f64| {
                    if bytes {
                        in_bytes(value)
                    } else {
                        in_digits(value)
                    }
                };
                match (at_least, at_most) {
                    (Some(low), Some(high)) => {
                        write!(f, "{quantity} from {} to {}", number(*low), number(*high))
                    }
                    (Some(low), None) => write!(f, "{quantity} at least {}", number(*low)),
                    (None, Some(high)) => write!(f, "{quantity} at most {}", number(*high)),
                    (None, None) => write!(f, "any {quantity}"),
                }
            }
        }
    }
}

fn in_digits(value: f64) -> String {
    if value >= 10.0 || value.fract() == 0.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.3}")
    }
}

fn in_bytes(value: f64) -> String {
    match value {
        v if v >= 1_048_576.0 => {
            format!("{} MiB", in_digits((v / 1_048_576.0 * 10.0).round() / 10.0))
        }
        v if v >= 1024.0 => format!("{} KiB", in_digits((v / 1024.0 * 10.0).round() / 10.0)),
        v => format!("{v:.0} B"),
    }
}

/// What is left of the nearness when exactly one category is wrong: hardware paths are shared, so a neighbour of the faulty one still
/// loads what the fault overloads.
const HALF_OPEN: f64 = 0.05;

/// The share of the way, on a log scale, that a ratio has come to another.
fn margin(ratio: f64, full: f64) -> f64 {
    if ratio >= full {
        1.0
    } else {
        (ratio.ln() / full.ln()).clamp(0.0, 1.0)
    }
}

/// The points that meet every condition. Without conditions: all of them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Region {
    /// The conditions.
    pub conditions: Vec<Condition>,
}

impl Region {
    /// Whether a point lies in it.
    pub fn contains(&self, point: &Point) -> bool {
        self.conditions
            .iter()
            .all(|condition| condition.holds(point))
    }

    /// From 0 to 1: how near a point is. The product of one margin per bound, the share of the way on a log scale from the far end of the
    /// quantity to the bound; with one wrong category only a twentieth of it is left, and with two nothing.
    pub fn nearness(&self, point: &Point, space: &Space) -> f64 {
        let mut wrong_categories = 0;
        let mut nearness = 1.0;
        for condition in &self.conditions {
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
                    let (low, high) = space.extent(*quantity);
                    let value = quantity.of(point);
                    if let Some(bound) = at_least {
                        nearness *= margin(value / low, bound / low);
                    }
                    if let Some(bound) = at_most {
                        nearness *= margin(high / value, high / bound);
                    }
                }
            }
        }
        match wrong_categories {
            0 => nearness,
            1 => HALF_OPEN * nearness,
            _ => 0.0,
        }
    }

    /// A point of it drawn at random: what it leaves open as [`Space::sample`] draws it, what it bounds log-uniformly within the bounds.
    /// None if a number of attempts found none.
    pub fn sample(&self, space: &Space, rng: &mut impl Rng) -> Option<Point> {
        (0..64).find_map(|_| {
            let mut point = space.sample(rng);
            // Twice, since meeting one condition may undo another: the smallest message of two bounds, a batch and its depth.
            for _ in 0..2 {
                for condition in &self.conditions {
                    if !condition.holds(&point) {
                        point = self.draw(condition, &point, space, rng);
                    }
                }
            }
            self.contains(&point).then_some(point)
        })
    }

    fn draw(
        &self,
        condition: &Condition,
        point: &Point,
        space: &Space,
        rng: &mut impl Rng,
    ) -> Point {
        match condition {
            Condition::Among { category, values } => {
                let allowed: Vec<Choice> = space
                    .choices(*category)
                    .into_iter()
                    .filter(|c| values.contains(c))
                    .collect();
                match allowed.len() {
                    0 => point.clone(),
                    n => space.with(
                        point,
                        Setting::Choice(*category, allowed[rng.random_range(0..n)]),
                    ),
                }
            }
            Condition::Within {
                quantity,
                at_least,
                at_most,
            } => {
                let (low, high) = (at_least.unwrap_or(0.0), at_most.unwrap_or(f64::INFINITY));
                match *quantity {
                    Quantity::Axis(axis) => within(point, axis, low, high, space, rng),
                    Quantity::Product(a, b) => {
                        // The first within what the second can complete, then the second to complete it.
                        let (b_low, b_high) = space.range(b);
                        let point = within(
                            point,
                            a,
                            low / f64::from(b_high),
                            high / f64::from(b_low),
                            space,
                            rng,
                        );
                        let of_a = f64::from(a.of(&point));
                        within(&point, b, low / of_a, high / of_a, space, rng)
                    }
                    Quantity::Ratio(a, b) => {
                        let (b_low, b_high) = space.range(b);
                        let point = within(
                            point,
                            a,
                            low * f64::from(b_low),
                            high * f64::from(b_high),
                            space,
                            rng,
                        );
                        let of_a = f64::from(a.of(&point));
                        within(
                            &point,
                            b,
                            of_a / high,
                            of_a / low.max(f64::MIN_POSITIVE),
                            space,
                            rng,
                        )
                    }
                }
            }
        }
    }
}

/// The point with an axis drawn log-uniformly between two bounds, as far as the space reaches.
fn within(
    point: &Point,
    axis: Axis,
    low: f64,
    high: f64,
    space: &Space,
    rng: &mut impl Rng,
) -> Point {
    let (first, last) = space.range_at(axis, point);
    let (low, high) = (
        low.ceil().max(f64::from(first)),
        high.floor().min(f64::from(last)),
    );
    if low > high {
        return point.clone();
    }
    let value = low * ((high + 1.0) / low).powf(rng.random::<f64>());
    space.with(point, Setting::Axis(axis, value.min(high) as u32))
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.conditions.is_empty() {
            return f.write_str("every workload");
        }
        for (i, condition) in self.conditions.iter().enumerate() {
            if i > 0 {
                f.write_str("; ")?;
            }
            condition.fmt(f)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_pcg::Pcg64;

    use super::*;
    use crate::space::{Direction, Operation};

    #[test]
    fn a_region_is_drawn_from_within_and_says_what_it_is() {
        let region = Region {
            conditions: vec![
                Condition::Among {
                    category: Category::Operation,
                    values: vec![Choice::Operation(Operation::UdSend)],
                },
                Condition::Among {
                    category: Category::Direction,
                    values: vec![Choice::Direction(Direction::Loopback)],
                },
                Condition::Within {
                    quantity: Quantity::Axis(Axis::Batch),
                    at_least: Some(64.0),
                    at_most: None,
                },
                Condition::Within {
                    quantity: Quantity::Product(Axis::Qps, Axis::Regions),
                    at_least: Some(12_000.0),
                    at_most: Some(20_000.0),
                },
                Condition::Within {
                    quantity: Quantity::Ratio(Axis::Batch, Axis::SendDepth),
                    at_least: Some(0.5),
                    at_most: None,
                },
            ],
        };
        let space = Space::default();
        let mut rng = Pcg64::seed_from_u64(3);
        for _ in 0..200 {
            let point = region
                .sample(&space, &mut rng)
                .expect("the region holds points");
            assert!(region.contains(&point));
            assert_eq!(space.admits(&point), Ok(()));
        }
        assert_eq!(
            region.to_string(),
            "operation is ud-send; direction is loopback; doorbell batch at least 64; \
             queue pairs x regions per queue pair from 12000 to 20000; doorbell batch / send queue depth at least 0.500"
        );
    }

    #[test]
    fn a_region_that_holds_nothing_yields_nothing() {
        let region = Region {
            conditions: vec![Condition::Within {
                quantity: Quantity::Axis(Axis::Qps),
                at_least: Some(1e9),
                at_most: None,
            }],
        };
        assert_eq!(
            region.sample(&Space::default(), &mut Pcg64::seed_from_u64(1)),
            None
        );
    }
}
