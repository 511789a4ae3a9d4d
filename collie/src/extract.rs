//! Learning what an anomaly needs.
//!
//! An anomalous workload and a clean one are brought together, half of their differences at a time, until one setting separates them: that setting is a
//! condition. Its bound is bisected between the two on a log scale; the other values of a category are tried one by one. Then the next
//! clean workload that the conditions so far admit is taken, from what was measured already or drawn at random, until
//! random workloads within the conditions are anomalous one after another. Bounds of two numbers that can make up for each other are one bound on
//! their product or ratio.

use crate::mfs::{Edge, Factor, Mfs};
use crate::region::Region;
use crate::search::Search;
use crate::session::{OutOfTime, Purpose, Record};
use crate::space::{Axis, Choice, Feature, Point, Quantity, Setting};

/// Conditions of one anomaly, at most: one with more is several at once, or none.
const FACTORS_MAX: usize = 8;
/// Clean workloads told apart from one anomaly, at most.
const STEPS_MAX: usize = 16;
/// Random workloads of the conditions that must be anomalous, one after another, before they are believed.
const CONFIRMATIONS: usize = 3;
/// Random workloads drawn for that, at most: some show yet other anomalies, and say nothing.
const DRAWS_MAX: usize = 16;
/// Steps of bisection when an anomaly is first met.
const COARSE_STEPS: usize = 2;
/// A bound is fine enough once it is known to this factor.
const FINE: f64 = 1.02;
/// Workloads of one anomaly agree in how bad it is to this factor.
const SAME: f64 = 0.8;

impl Search<'_, '_> {
    /// Learns what the anomaly of a record needs.
    pub(crate) fn learn(&mut self, index: usize) -> Result<(), OutOfTime> {
        let first = self.session.records().len();
        let record = &self.session.records()[index];
        let mut mfs = Mfs {
            factors: Vec::new(),
            anchor: record.point.clone(),
            symptom: *record.verdict.symptom().expect("an anomalous record"),
            signature: self.signals(record),
            probes: 0,
        };
        // Once more, for a disturbed measurement is soon dearer than this.
        let anchor = mfs.anchor.clone();
        if self.try_point(&mfs, &anchor)? != Some(true) {
            return Ok(());
        }
        // At few queue pairs and regions, if it shows there, all that follows takes less time.
        for axis in [Axis::Regions, Axis::Qps] {
            let cheap = self.session.space().with(
                &mfs.anchor,
                Setting::Axis(axis, self.session.space().range(axis).0),
            );
            if axis.of(&mfs.anchor) > 64 && self.try_point(&mfs, &cheap)? == Some(true) {
                mfs.anchor = cheap;
            }
        }
        let mut inseparable = Vec::new();
        let mut believed = false;
        for _ in 0..STEPS_MAX {
            if mfs.factors.len() > FACTORS_MAX {
                break;
            }
            let Some(clean) = self.counterexample(&mfs, &inseparable)? else {
                believed = true;
                break;
            };
            if !self.separate(&mut mfs, &clean)? {
                inseparable.push(clean);
            }
        }
        mfs.probes = self.session.records().len() - first;
        // What still admits clean workloads is not believed; nor what speaks of every workload: then it was a passing disturbance.
        if believed && !mfs.factors.is_empty() {
            let space = self.session.space().clone();
            let region = mfs.region_at_most(&space);
            // What was learnt too narrowly before, and lies within this one.
            let rng = &mut self.rng;
            self.known.retain(|old| {
                let narrow = old.region(&space);
                !(0..20).all(|_| {
                    narrow
                        .sample(&space, rng)
                        .is_none_or(|point| region.contains(&point))
                })
            });
            self.known.push(mfs);
            self.disentangle();
        }
        Ok(())
    }

    /// Takes from each anomaly the values of categories that the newest one accounts for.
    fn disentangle(&mut self) {
        let space = self.session.space().clone();
        let Some((newest, others)) = self.known.split_last_mut() else {
            return;
        };
        let region = newest.region(&space);
        for mfs in others {
            for factor in &mut mfs.factors {
                if let Factor::Among {
                    category,
                    anomalous,
                    clean,
                } = factor
                {
                    let taken = |choice: &Choice| {
                        *choice != category.of(&mfs.anchor)
                            && region.contains(
                                &space.with(&mfs.anchor, Setting::Choice(*category, *choice)),
                            )
                    };
                    clean.extend(anomalous.iter().copied().filter(|choice| taken(choice)));
                    let clean = &*clean;
                    anomalous.retain(|choice| !clean.contains(choice));
                }
            }
        }
    }

    /// Whether a record shows this anomaly, and not another one.
    fn same(&self, mfs: &Mfs, record: &Record) -> bool {
        let Some(symptom) = record.verdict.symptom() else {
            return false;
        };
        let alike = |a: f64, b: f64| a.min(b) >= SAME * a.max(b);
        // Pause and lost throughput, as far as they are symptoms.
        let as_bad = |a: Option<f64>, b: Option<f64>| match (a, b) {
            (Some(a), Some(b)) => alike(a, b),
            _ => true,
        };
        let lost = |throughput: Option<f64>| throughput.map(|share| 1.0 - share);
        symptom.resembles(&mfs.symptom)
            && as_bad(symptom.pause, mfs.symptom.pause)
            && as_bad(lost(symptom.throughput), lost(mfs.symptom.throughput))
    }

    /// Whether another anomaly that is known accounts for what a workload shows.
    fn elsewhere(&self, point: &Point) -> bool {
        self.known_regions()
            .iter()
            .any(|region| region.contains(point))
    }

    /// Whether a workload shows this anomaly; None if it cannot be measured. Where another known one would show, this one cannot be seen.
    fn try_point(&mut self, mfs: &Mfs, point: &Point) -> Result<Option<bool>, OutOfTime> {
        if self.elsewhere(point) {
            return Ok(None);
        }
        for _ in 0..2 {
            let index = self.session.probe(point, Purpose::Extract)?;
            let record = &self.session.records()[index];
            if record.verdict.confidence() > 0.0 {
                let same = self.same(mfs, record);
                if same {
                    self.settled.insert(index);
                }
                return Ok(Some(same));
            }
        }
        Ok(None)
    }

    /// A workload that meets the conditions so far and is clean: the one measured that differs least, or a random one. None once they are believed.
    fn counterexample(
        &mut self,
        mfs: &Mfs,
        inseparable: &[Point],
    ) -> Result<Option<Point>, OutOfTime> {
        let region = mfs.region(self.session.space());
        let differences = |point: &Point| {
            Feature::all()
                .filter(|feature| !feature.agrees(point, &mfs.anchor))
                .count()
        };
        let clean = self
            .session
            .clean_in(&region)
            .filter(|record| !inseparable.contains(&record.point));
        let nearest = clean.min_by_key(|record| differences(&record.point));
        if let Some(record) = nearest {
            return Ok(Some(record.point.clone()));
        }
        let drawn = |record: &&Record| {
            record.purpose == Purpose::Search
                && region.contains(&record.point)
                && self.same(mfs, record)
        };
        let mut confirmed = self
            .session
            .records()
            .iter()
            .filter(drawn)
            .count()
            .saturating_sub(1);
        // Numbers left open are tried at their ends first: what a bound was missed for shows there soonest.
        let mut corners = vec![true, false];
        for _ in 0..DRAWS_MAX {
            if confirmed >= CONFIRMATIONS && corners.is_empty() {
                break;
            }
            let Some(mut point) = self.draw(&region) else {
                break;
            };
            if let Some(&high) = corners.last() {
                let corner = self.corner(&region, &point, high);
                if self.elsewhere(&corner) {
                    continue;
                }
                point = corner;
            }
            let index = self.session.probe(&point, Purpose::Extract)?;
            let record = &self.session.records()[index];
            if record.verdict.is_clean() {
                return Ok(Some(point));
            }
            if self.same(mfs, record) {
                self.settled.insert(index);
                confirmed += usize::from(corners.pop().is_none());
            }
        }
        Ok(None)
    }

    /// The point with every number that the conditions leave open at one end of its range.
    fn corner(&self, region: &Region, point: &Point, high: bool) -> Point {
        let space = self.session.space();
        let bounded = |axis: Axis| {
            region
                .conditions
                .iter()
                .any(|condition| condition.features().contains(&Feature::Axis(axis)))
        };
        let is_size = |axis: Axis| {
            matches!(
                axis,
                Axis::SmallestBytes | Axis::LargestBytes | Axis::Messages
            )
        };
        // Sizes depend on each other: they move only where none is bounded.
        let sizes_open = !Axis::ALL
            .into_iter()
            .any(|axis| is_size(axis) && bounded(axis));
        let open = Axis::ALL
            .into_iter()
            .filter(|&axis| !bounded(axis) && (sizes_open || !is_size(axis)));
        let moved = open.fold(point.clone(), |point, axis| {
            let (low, end) = space.range_at(axis, &point);
            space.with(&point, Setting::Axis(axis, if high { end } else { low }))
        });
        if region.contains(&moved) {
            moved
        } else {
            point.clone()
        }
    }

    /// A random workload of a region where nothing else that is known shows.
    fn draw(&mut self, region: &Region) -> Option<Point> {
        (0..50).find_map(|_| {
            let point = region.sample(self.session.space(), &mut self.rng)?;
            (!self.elsewhere(&point)).then_some(point)
        })
    }

    /// Finds one setting that separates the anchor from a clean workload, and notes the condition. False if none was found.
    fn separate(&mut self, mfs: &mut Mfs, clean: &Point) -> Result<bool, OutOfTime> {
        let (mut sick, mut well) = (mfs.anchor.clone(), clean.clone());
        for _ in 0..24 {
            let differing: Vec<Feature> = Feature::all()
                .filter(|feature| !feature.agrees(&sick, &well))
                .collect();
            if differing.len() <= 1 {
                break;
            }
            // The later half first: numbers are changed before names, and a changed name would drag numbers along.
            let (front, back) = differing.split_at(differing.len() / 2);
            let singles = differing.chunks(1);
            let mut moved = false;
            for half in [back, front].into_iter().chain(singles) {
                let mid = half.iter().fold(sick.clone(), |point, &f| {
                    self.session.space().with(&point, Setting::of(f, &well))
                });
                if mid == sick || mid == well {
                    continue;
                }
                match self.try_point(mfs, &mid)? {
                    Some(true) => sick = mid,
                    Some(false) => well = mid,
                    None => continue,
                }
                moved = true;
                break;
            }
            if !moved {
                break;
            }
        }
        mfs.anchor = sick.clone();
        let Some(feature) = Feature::all().find(|feature| !feature.agrees(&sick, &well)) else {
            return Ok(false);
        };
        match feature {
            Feature::Category(category) => {
                mfs.set_choice(category, category.of(&sick), true);
                mfs.set_choice(category, category.of(&well), false);
                for choice in self.session.space().choices(category) {
                    if choice != category.of(&sick) && choice != category.of(&well) {
                        let point = self
                            .session
                            .space()
                            .with(&sick, Setting::Choice(category, choice));
                        // A value under which only another anomaly can be seen is left to that one.
                        let keeps = self.try_point(mfs, &point)?.unwrap_or(false);
                        mfs.set_choice(category, choice, keeps);
                    }
                }
                Ok(true)
            }
            Feature::Axis(axis) => {
                let (inside, outside) = (f64::from(axis.of(&sick)), f64::from(axis.of(&well)));
                let below = outside < inside;
                // Clean where it was anomalous before, when other settings were different: the bound is not one on this axis alone.
                let was_inside = mfs.edge_mut(axis, below).map(|edge| edge.inside);
                let contradicted = was_inside.is_some_and(|was| {
                    if below {
                        outside >= was
                    } else {
                        outside <= was
                    }
                });
                mfs.set_edge(Quantity::Axis(axis), Edge { inside, outside });
                for _ in 0..COARSE_STEPS {
                    if !self.bisect(mfs, Quantity::Axis(axis), below, f64::ln(1.5))? {
                        break;
                    }
                }
                if contradicted {
                    self.couple(mfs, axis, below)?;
                }
                Ok(true)
            }
        }
    }

    /// Halves the doubt of one bound. False if it is fine enough, or cannot be halved.
    fn bisect(
        &mut self,
        mfs: &mut Mfs,
        quantity: Quantity,
        below: bool,
        fine: f64,
    ) -> Result<bool, OutOfTime> {
        let edge = mfs.factors.iter().find_map(|factor| match factor {
            Factor::Within {
                quantity: of,
                lower,
                upper,
            } if *of == quantity => {
                if below {
                    *lower
                } else {
                    *upper
                }
            }
            _ => None,
        });
        let Some(edge) = edge.filter(|edge| edge.doubt() > fine) else {
            return Ok(false);
        };
        let target = (edge.inside * edge.outside).sqrt();
        let Some(point) = self.place(&mfs.anchor, quantity, target) else {
            return Ok(false);
        };
        let value = quantity.of(&point);
        if (value - edge.inside).abs() < 1e-9 || (value - edge.outside).abs() < 1e-9 {
            return Ok(false);
        }
        let between =
            (edge.inside.min(edge.outside)..=edge.inside.max(edge.outside)).contains(&value);
        if !between {
            return Ok(false);
        }
        match self.try_point(mfs, &point)? {
            Some(true) => {
                mfs.set_edge(
                    quantity,
                    Edge {
                        inside: value,
                        ..edge
                    },
                );
                mfs.anchor = point;
            }
            Some(false) => mfs.set_edge(
                quantity,
                Edge {
                    outside: value,
                    ..edge
                },
            ),
            None => {}
        }
        Ok(true)
    }

    /// The point with a quantity brought near a value. Of two axes the second is changed, and the first if that has no room.
    fn place(&self, point: &Point, quantity: Quantity, value: f64) -> Option<Point> {
        let space = self.session.space();
        let set = |axis: Axis, value: f64| {
            space.with(
                point,
                Setting::Axis(axis, value.round().clamp(1.0, f64::from(u32::MAX)) as u32),
            )
        };
        let closest = |candidates: Vec<Point>| {
            let off = |p: &Point| (quantity.of(p) / value).ln().abs();
            candidates
                .into_iter()
                .min_by(|a, b| off(a).total_cmp(&off(b)))
        };
        match quantity {
            Quantity::Axis(axis) => Some(set(axis, value)),
            Quantity::Product(a, b) => {
                let (of_a, of_b) = (f64::from(a.of(point)), f64::from(b.of(point)));
                closest(vec![set(b, value / of_a), set(a, value / of_b)])
            }
            Quantity::Ratio(a, b) => {
                let (of_a, of_b) = (f64::from(a.of(point)), f64::from(b.of(point)));
                closest(vec![set(b, of_a / value), set(a, value * of_b)])
            }
        }
    }

    /// Tries whether another bounded axis can make up for this one beyond its bound; if so the two bounds are one on their product or ratio.
    fn couple(&mut self, mfs: &mut Mfs, axis: Axis, below: bool) -> Result<(), OutOfTime> {
        let partners: Vec<(Axis, bool)> = mfs
            .factors
            .iter()
            .flat_map(|factor| match factor {
                Factor::Within {
                    quantity: Quantity::Axis(other),
                    lower,
                    upper,
                } if *other != axis => [
                    lower.map(|_| (*other, true)),
                    upper.map(|_| (*other, false)),
                ]
                .into_iter()
                .flatten()
                .collect(),
                _ => Vec::new(),
            })
            .collect();
        for (other, other_below) in partners {
            let Some(edge) = mfs.edge_mut(axis, below).map(|edge| *edge) else {
                return Ok(());
            };
            let quantity = if below == other_below {
                Quantity::Product(axis.min(other), axis.max(other))
            } else if below {
                Quantity::Ratio(axis, other)
            } else {
                Quantity::Ratio(other, axis)
            };
            // This axis well beyond its bound, and the other as far within as makes up for it twice over.
            let space = self.session.space();
            let beyond = edge.outside * (edge.outside / edge.inside);
            let moved = space.with(
                &mfs.anchor,
                Setting::Axis(axis, beyond.round().max(1.0) as u32),
            );
            let shift = f64::from(axis.of(&mfs.anchor)) / f64::from(axis.of(&moved));
            let growth = if below { 2.0 * shift } else { 2.0 / shift };
            let of_other = f64::from(other.of(&moved));
            let wanted = if other_below {
                of_other * growth
            } else {
                of_other / growth
            };
            let point = space.with(&moved, Setting::Axis(other, wanted.round().max(1.0) as u32));
            let made_up = {
                let (before, after) = (quantity.of(&mfs.anchor), quantity.of(&point));
                let coupled_low = below || matches!(quantity, Quantity::Ratio(..));
                (if coupled_low {
                    after >= before
                } else {
                    after <= before
                }) && axis.of(&point) == axis.of(&moved)
            };
            if !made_up {
                continue;
            }
            if self.try_point(mfs, &point)? == Some(true) {
                let anchor = mfs.anchor.clone();
                let (Some(near), Some(far)) = (
                    self.place_axis(&anchor, axis, edge.inside),
                    self.place_axis(&anchor, axis, edge.outside),
                ) else {
                    continue;
                };
                let bound = Edge {
                    inside: quantity.of(&near),
                    outside: quantity.of(&far),
                };
                mfs.factors.retain(|factor| {
                    !matches!(factor, Factor::Within { quantity: Quantity::Axis(of), .. } if *of == axis || *of == other)
                });
                mfs.set_edge(quantity, bound);
                return Ok(());
            }
        }
        Ok(())
    }

    fn place_axis(&self, point: &Point, axis: Axis, value: f64) -> Option<Point> {
        Some(
            self.session
                .space()
                .with(point, Setting::Axis(axis, value as u32)),
        )
    }

    /// One step towards knowing the known ones finely: the bound in most doubt, or a random workload within the conditions. False once nothing is left.
    pub(crate) fn refine(&mut self) -> Result<bool, OutOfTime> {
        let doubt = |mfs: &Mfs| -> Vec<(f64, Quantity, bool)> {
            mfs.factors
                .iter()
                .flat_map(|factor| match factor {
                    Factor::Within {
                        quantity,
                        lower,
                        upper,
                    } => [
                        lower.map(|edge| (edge.doubt(), *quantity, true)),
                        upper.map(|edge| (edge.doubt(), *quantity, false)),
                    ]
                    .into_iter()
                    .flatten()
                    .collect(),
                    Factor::Among { .. } => Vec::new(),
                })
                .collect()
        };
        let mut all: Vec<(f64, usize, Quantity, bool)> = Vec::new();
        for (place, mfs) in self.known.iter().enumerate() {
            all.extend(
                doubt(mfs)
                    .into_iter()
                    .map(|(doubt, quantity, below)| (doubt, place, quantity, below)),
            );
        }
        all.sort_by(|a, b| b.0.total_cmp(&a.0));
        for (_, place, quantity, below) in all {
            if self.rework(place, |search, mfs| {
                search.bisect(mfs, quantity, below, FINE.ln())
            })? {
                return Ok(true);
            }
        }
        let Some(place) = (0..self.known.len()).min_by_key(|&i| self.known[i].probes) else {
            return Ok(false);
        };
        self.rework(place, Self::check)
    }

    /// Works on a known anomaly, out of the way of the others. True if that took probes.
    fn rework<T>(
        &mut self,
        place: usize,
        work: impl FnOnce(&mut Self, &mut Mfs) -> Result<T, OutOfTime>,
    ) -> Result<bool, OutOfTime> {
        let mut mfs = self.known.remove(place);
        let before = self.session.records().len();
        let result = work(self, &mut mfs);
        let probes = self.session.records().len() - before;
        mfs.probes += probes;
        self.known.insert(place, mfs);
        result.map(|_| probes > 0)
    }

    /// Draws a random workload of a known anomaly's conditions; a clean one shows a condition that was missed.
    fn check(&mut self, mfs: &mut Mfs) -> Result<(), OutOfTime> {
        let region = mfs.region(self.session.space());
        let Some(point) = self.draw(&region) else {
            return Ok(());
        };
        let index = self.session.probe(&point, Purpose::Extract)?;
        if self.session.records()[index].verdict.is_clean() {
            self.separate(mfs, &point)?;
        }
        Ok(())
    }
}
