//! Which setting a round of the search changes next.

use std::collections::BTreeMap;

use rand::RngExt;
use rand_pcg::Pcg64;

use crate::space::{Axis, Category, Feature, Point, Setting, Space};

/// The mutations of a round that are still worth trying.
pub(crate) struct Ideas {
    pub(crate) untried: Vec<Setting>,
    /// Those that led into what is known already.
    pub(crate) postponed: Vec<Setting>,
    /// For each axis: its range, the values tried, and those of them that hurt.
    axes: BTreeMap<Axis, Line>,
}

/// The most of an axis that costs little time to set up.
pub(crate) fn knee(axis: Axis) -> u32 {
    match axis {
        Axis::Qps => 256,
        Axis::Regions => 16,
        _ => u32::MAX,
    }
}

struct Line {
    range: (f64, f64),
    tried: Vec<f64>,
    hurting: Vec<f64>,
    indifferent: bool,
}

impl Ideas {
    pub(crate) fn new(space: &Space) -> Self {
        let names = Category::ALL.into_iter().flat_map(|category| {
            space
                .choices(category)
                .into_iter()
                .map(move |choice| Setting::Choice(category, choice))
        });
        let ends = Axis::ALL.into_iter().flat_map(|axis| {
            let (low, high) = space.range(axis);
            [low, knee(axis).clamp(low, high), high].map(|value| Setting::Axis(axis, value))
        });
        let line = |axis| {
            let (low, high) = space.range(axis);
            Line {
                range: (f64::from(low), f64::from(high)),
                tried: Vec::new(),
                hurting: Vec::new(),
                indifferent: false,
            }
        };
        Ideas {
            untried: names.chain(ends).collect(),
            postponed: Vec::new(),
            axes: Axis::ALL
                .into_iter()
                .map(|axis| (axis, line(axis)))
                .collect(),
        }
    }

    /// A random change that was not tried, the likelier the oftener changes of its dimension helped in this search.
    pub(crate) fn next(
        &mut self,
        here: &Point,
        relevance: &BTreeMap<Feature, (u32, u32)>,
        rng: &mut Pcg64,
    ) -> Option<Setting> {
        let weight = |setting: &Setting| {
            let applies = !matches!(setting, Setting::Axis(axis, _) if !axis.applies(here));
            if !applies || Setting::of(setting.feature(), here) == *setting {
                return 0.0;
            }
            let (helped, tried) = relevance
                .get(&setting.feature())
                .copied()
                .unwrap_or_default();
            let rate = (f64::from(helped) + 1.0) / (f64::from(tried) + 4.0);
            // Most conditions are bounds, and a number has many values where a name has few.
            if let Setting::Axis(axis, _) = setting {
                if self.axes[axis].indifferent {
                    0.1 * rate
                } else {
                    2.0 * rate
                }
            } else {
                rate
            }
        };
        let dear = |setting: &Setting| matches!(setting, Setting::Axis(axis, v) if *v > knee(*axis) && *v > axis.of(here));
        let mut weights: Vec<f64> = self.untried.iter().map(weight).collect();
        // What makes all that follows take long comes last.
        if self
            .untried
            .iter()
            .zip(&weights)
            .any(|(setting, weight)| *weight > 0.0 && !dear(setting))
        {
            for (setting, weight) in self.untried.iter().zip(&mut weights) {
                if dear(setting) {
                    *weight = 0.0;
                }
            }
        }
        let mut left = rng.random::<f64>() * weights.iter().sum::<f64>();
        let place = weights.iter().position(|weight| {
            left -= weight;
            *weight > 0.0 && left <= 0.0
        })?;
        Some(self.untried.swap_remove(place))
    }

    /// What a change did to the energy. An end that helped leaves its axis done, for beyond it there is nothing. Where values on both sides of the
    /// present one hurt, the middle between them is tried, and the middles towards each: a plateau between two bounds is found so, though nothing on it
    /// tells its middle from its rim.
    pub(crate) fn learn(&mut self, setting: Setting, here: &Point, energy: f64, significant: f64) {
        let Setting::Axis(axis, value) = setting else {
            return;
        };
        let value = f64::from(value);
        let line = self.axes.get_mut(&axis).expect("every axis has a line");
        line.tried.push(value);
        let helped = energy < -significant;
        let is_end = value == line.range.0 || value == line.range.1;
        line.indifferent |= energy.abs() <= significant;
        if helped && is_end {
            self.untried
                .retain(|other| other.feature() != setting.feature());
        }
        if energy > significant {
            line.hurting.push(value);
            // The other end is worth a second look: it leads away from here.
            let end = if value < f64::from(axis.of(here)) {
                line.range.1
            } else {
                line.range.0
            };
            let idea = Setting::Axis(axis, end as u32);
            if !line.hurting.contains(&end) && !self.untried.contains(&idea) {
                self.untried.push(idea);
            }
        }
        let at = if helped {
            value
        } else {
            f64::from(axis.of(here))
        };
        let below = line
            .hurting
            .iter()
            .copied()
            .filter(|v| *v < at)
            .fold(0.0, f64::max);
        let above = line
            .hurting
            .iter()
            .copied()
            .filter(|v| *v > at)
            .fold(f64::INFINITY, f64::min);
        if below == 0.0 || above.is_infinite() {
            return;
        }
        for middle in [below * above, below * at, at * above].map(|product| product.sqrt().round())
        {
            let news = (line.range.0..=line.range.1).contains(&middle)
                && line.tried.iter().all(|v| (v / middle).ln().abs() > 0.2);
            let idea = Setting::Axis(axis, middle as u32);
            if news && !self.untried.contains(&idea) {
                self.untried.push(idea);
            }
        }
    }

    /// Whether a number is farther than the present one from all values that hurt. Between bounds nothing tells how near they are; there
    /// this does, and a workload far from every bound of an anomaly shows it.
    pub(crate) fn is_deeper(&self, setting: Setting, here: &Point) -> bool {
        let Setting::Axis(axis, value) = setting else {
            return false;
        };
        let distance = |value: u32| {
            let far = |hurting: &f64| (f64::from(value) / hurting).ln().abs();
            self.axes[&axis]
                .hurting
                .iter()
                .map(far)
                .fold(f64::INFINITY, f64::min)
        };
        distance(axis.of(here)).is_finite() && distance(value) > distance(axis.of(here))
    }
}
