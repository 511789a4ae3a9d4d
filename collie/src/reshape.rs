//! Keeping a workload clear of known anomalies: refuse it with the reasons, or change what it allows to be changed.

use crate::known::{KnownAnomalies, Met};
use crate::mfs::Factor;
use crate::space::{Axis, Choice, Feature, Point, Quantity, Setting};

/// Changes of one workload, at most: more, and it is another workload.
const CHANGES_MAX: usize = 6;

/// A changed setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// As it was.
    pub from: Setting,
    /// As it is now.
    pub to: Setting,
    /// The anomaly that this avoids: its place in the file, from 1.
    pub avoids: usize,
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let value = |setting: &Setting| match setting {
            Setting::Axis(_, value) => value.to_string(),
            Setting::Choice(_, choice) => choice.to_string(),
        };
        write!(
            f,
            "{} from {} to {}, to avoid anomaly {}",
            self.to.feature().name(),
            value(&self.from),
            value(&self.to),
            self.avoids
        )
    }
}

/// A workload that meets known anomalies, and no allowed change helps.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("the workload meets known anomalies: {}", words(.met))]
pub struct Refused {
    /// Which.
    pub met: Vec<Met>,
}

fn words(met: &[Met]) -> String {
    let each = met.iter().map(|met| {
        format!(
            "number {} ({}), since {}; to avoid it, {}",
            met.anomaly,
            met.symptom,
            met.conditions,
            met.ways_out.join(", or ")
        )
    });
    each.collect::<Vec<_>>().join("; ")
}

impl KnownAnomalies {
    /// The workload changed, in the settings that may be, so that it meets no known anomaly; as it was if it meets none. The
    /// smallest change first, on a log scale.
    ///
    /// # Errors
    /// [`Refused`] names each anomaly that is left, with its conditions and ways out. With nothing allowed to change, every workload that meets one is refused.
    pub fn clear(
        &self,
        point: &Point,
        may_change: &[Feature],
    ) -> Result<(Point, Vec<Change>), Refused> {
        let (mut here, mut changes) = (point.clone(), Vec::new());
        for _ in 0..=CHANGES_MAX {
            let met = self.met_by(&here);
            let Some(first) = met.first() else {
                return Ok((here, changes));
            };
            let ways = self.anomalies[first.anomaly - 1]
                .factors
                .iter()
                .flat_map(|factor| self.ways(factor, &here, may_change));
            // A way out of one that leads into more is none.
            let best = ways
                .map(|(cost, setting)| (cost, setting, self.space.with(&here, setting)))
                .filter(|(.., there)| self.met_by(there).len() < met.len())
                .min_by(|a, b| a.0.total_cmp(&b.0));
            let Some((_, to, there)) = best else {
                return Err(Refused { met });
            };
            changes.push(Change {
                from: Setting::of(to.feature(), &here),
                to,
                avoids: first.anomaly,
            });
            here = there;
        }
        Err(Refused {
            met: self.met_by(&here),
        })
    }

    /// The settings that break a condition, each with what it costs.
    fn ways(&self, factor: &Factor, here: &Point, may_change: &[Feature]) -> Vec<(f64, Setting)> {
        let mut ways = Vec::new();
        match factor {
            Factor::Among {
                category, clean, ..
            } => {
                if may_change.contains(&Feature::Category(*category)) {
                    let settings = clean
                        .iter()
                        .map(|choice| Setting::Choice(*category, *choice));
                    // A larger MTU costs less than another transport.
                    ways.extend(settings.map(|setting| {
                        let cost = match setting {
                            Setting::Choice(_, Choice::Mtu(_)) => 1.0,
                            _ => 10.0,
                        };
                        (cost, setting)
                    }));
                }
            }
            Factor::Within {
                quantity,
                lower,
                upper,
            } => {
                let outsides = [lower, upper]
                    .into_iter()
                    .flatten()
                    .map(|edge| (edge.outside, edge.outside < edge.inside));
                for (outside, below) in outsides {
                    for (axis, value) in values_at(*quantity, outside, here) {
                        let value = if below == grows_with(*quantity, axis) {
                            value.floor()
                        } else {
                            value.ceil()
                        };
                        let (low, high) = self.space.range_at(axis, here);
                        if may_change.contains(&Feature::Axis(axis))
                            && value >= f64::from(low)
                            && value <= f64::from(high)
                        {
                            let cost = (value / f64::from(axis.of(here)).max(1.0)).ln().abs();
                            ways.push((cost, Setting::Axis(axis, value as u32)));
                        }
                    }
                }
            }
        }
        ways
    }
}

/// What each axis of a quantity would have to be for the quantity to have a value, the other as it is.
fn values_at(quantity: Quantity, value: f64, here: &Point) -> Vec<(Axis, f64)> {
    let of = |axis: Axis| f64::from(axis.of(here)).max(1.0);
    match quantity {
        Quantity::Axis(axis) => vec![(axis, value)],
        Quantity::Product(a, b) => vec![(a, value / of(b)), (b, value / of(a))],
        Quantity::Ratio(a, b) => vec![(a, value * of(b)), (b, of(a) / value)],
    }
}

fn grows_with(quantity: Quantity, axis: Axis) -> bool {
    !matches!(quantity, Quantity::Ratio(_, below) if below == axis)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mfs::{Edge, Mfs};
    use crate::monitor::Symptom;
    use crate::space::{Category, Operation, Space};
    use rand::SeedableRng;
    use rand_pcg::Pcg64;

    fn known() -> (KnownAnomalies, Point) {
        let space = Space::default();
        let point = space.sample(&mut Pcg64::seed_from_u64(2));
        let write = Choice::Operation(Operation::RcWrite);
        let point = space.with(&point, Setting::Choice(Category::Operation, write));
        let point = space.with(&point, Setting::Axis(Axis::Qps, 100));
        let point = space.with(&point, Setting::Axis(Axis::Regions, 200));
        let edge = |inside, outside| {
            Some(Edge {
                inside,
                outside,
                likely: None,
            })
        };
        let factors = vec![
            Factor::Among {
                category: Category::Operation,
                anomalous: vec![write],
                clean: vec![Choice::Operation(Operation::UcWrite)],
            },
            Factor::Within {
                quantity: Quantity::Product(Axis::Qps, Axis::Regions),
                lower: edge(12_000.0, 11_000.0),
                upper: None,
            },
        ];
        let symptom = Symptom {
            pause: None,
            throughput: Some(0.6),
            loss: None,
        };
        let anchor = point.clone();
        let mfs = Mfs {
            factors,
            anchor,
            symptom,
            signature: vec![1.0],
            probes: 9,
        };
        (
            KnownAnomalies::new("test".into(), space, vec!["c".into()], vec![mfs]),
            point,
        )
    }

    #[test]
    fn the_smallest_allowed_change_clears_it() {
        let (known, point) = known();
        let (there, changes) = known
            .clear(&point, &[Feature::Axis(Axis::Regions)])
            .unwrap();
        assert_eq!((there.qps, there.regions), (100, 110));
        assert_eq!(changes.len(), 1);
        assert!(known.met_by(&there).is_empty());
        assert_eq!(known.clear(&there, &[]), Ok((there.clone(), vec![])));
    }

    #[test]
    fn with_nothing_to_change_it_is_refused_with_the_reason() {
        let (known, point) = known();
        let message = known.clear(&point, &[]).unwrap_err().to_string();
        for part in [
            "number 1",
            "throughput 60 %",
            "queue pairs x regions",
            "operation to uc-write",
        ] {
            assert!(message.contains(part), "{part}: {message}");
        }
    }
}
