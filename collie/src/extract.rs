//! Learning what an anomaly needs.
//!
//! An anomalous workload and a clean one are brought together, half of their differences at a time, until one setting separates them: that setting is a
//! condition. Its bound is bisected between the two on a log scale; the other values of a category are tried one by one. Then the next
//! clean workload that the conditions so far admit is taken, from what was measured already or drawn at random, until
//! random workloads within the conditions are anomalous one after another. Bounds of two numbers that can make up for each other are one bound on
//! their product or ratio.

use crate::mfs::{Edge, Factor, Mfs};
use crate::search::Search;
use crate::session::{OutOfTime, Purpose, Record};
use crate::space::{Axis, Feature, Point, Quantity, Setting};

/// Conditions of one anomaly, at most.
const FACTORS_MAX: usize = 14;
/// Random workloads of the conditions that must be anomalous, one after another, before they are believed.
const CONFIRMATIONS: usize = 4;
/// Steps of bisection when an anomaly is first met.
const COARSE_STEPS: usize = 2;
/// A bound is fine enough once it is known to this factor.
const FINE: f64 = 1.02;
/// Of an anomaly's strongest counter, the share that a workload must show to be the same anomaly.
const SAME: f64 = 0.6;

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
        for _ in 0..FACTORS_MAX {
            let Some(clean) = self.counterexample(&mfs)? else { break };
            if !self.separate(&mut mfs, clean)? {
                break;
            }
        }
        mfs.probes = self.session.records().len() - first;
        // Without a condition it would speak of every workload: then the anomaly was a passing disturbance, or everything is anomalous.
        if !mfs.factors.is_empty() {
            self.known.push(mfs);
        }
        Ok(())
    }

    /// Whether a record shows this anomaly, and not another one.
    fn same(&self, mfs: &Mfs, record: &Record) -> bool {
        let Some(symptom) = record.verdict.symptom() else { return false };
        let counter = mfs.dominant();
        symptom.resembles(&mfs.symptom) && self.signals(record)[counter] >= SAME * mfs.signature[counter]
    }

    fn try_point(&mut self, mfs: &Mfs, point: &Point) -> Result<Option<bool>, OutOfTime> {
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
    fn counterexample(&mut self, mfs: &Mfs) -> Result<Option<Point>, OutOfTime> {
        let region = mfs.region(self.session.space());
        let differences = |point: &Point| Feature::all().filter(|feature| !feature.agrees(point, &mfs.anchor)).count();
        let nearest = self.session.clean_in(&region).min_by_key(|record| differences(&record.point));
        if let Some(record) = nearest {
            return Ok(Some(record.point.clone()));
        }
        let seen = self.session.records().iter().filter(|r| region.contains(&r.point) && self.same(mfs, r)).count();
        for _ in seen.saturating_sub(1).min(CONFIRMATIONS)..CONFIRMATIONS {
            let Some(point) = region.sample(self.session.space(), &mut self.rng) else { break };
            let index = self.session.probe(&point, Purpose::Extract)?;
            let record = &self.session.records()[index];
            if record.verdict.is_clean() {
                return Ok(Some(point));
            }
            if self.same(mfs, record) {
                self.settled.insert(index);
            }
        }
        Ok(None)
    }

    /// Finds one setting that separates the anchor from a clean workload, and notes the condition. False if none was found.
    fn separate(&mut self, mfs: &mut Mfs, clean: Point) -> Result<bool, OutOfTime> {
        let (mut sick, mut well) = (mfs.anchor.clone(), clean);
        for _ in 0..24 {
            let differing: Vec<Feature> = Feature::all().filter(|feature| !feature.agrees(&sick, &well)).collect();
            if differing.len() <= 1 {
                break;
            }
            // The later half first: numbers are changed before names, and a changed name would drag numbers along.
            let (front, back) = differing.split_at(differing.len() / 2);
            let singles = differing.chunks(1);
            let mut moved = false;
            for half in [back, front].into_iter().chain(singles) {
                let mid = half.iter().fold(sick.clone(), |point, &f| self.session.space().with(&point, Setting::of(f, &well)));
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
        let Some(feature) = Feature::all().find(|feature| !feature.agrees(&sick, &well)) else { return Ok(false) };
        match feature {
            Feature::Category(category) => {
                mfs.set_choice(category, category.of(&sick), true);
                mfs.set_choice(category, category.of(&well), false);
                for choice in self.session.space().choices(category) {
                    if choice != category.of(&sick) && choice != category.of(&well) {
                        let point = self.session.space().with(&sick, Setting::Choice(category, choice));
                        if let Some(keeps) = self.try_point(mfs, &point)? {
                            mfs.set_choice(category, choice, keeps);
                        }
                    }
                }
                Ok(true)
            }
            Feature::Axis(axis) => {
                let (inside, outside) = (f64::from(axis.of(&sick)), f64::from(axis.of(&well)));
                let below = outside < inside;
                let known = mfs.edge_mut(axis, below).map(|edge| *edge);
                mfs.set_edge(Quantity::Axis(axis), Edge { inside, outside });
                for _ in 0..COARSE_STEPS {
                    if !self.bisect(mfs, Quantity::Axis(axis), below, f64::ln(1.5))? {
                        break;
                    }
                }
                // A bound that moved when other settings did is not one on this axis alone.
                self.couple(mfs, axis, below, known.is_some())?;
                Ok(true)
            }
        }
    }

    /// Halves the doubt of one bound. False if it is fine enough, or cannot be halved.
    fn bisect(&mut self, mfs: &mut Mfs, quantity: Quantity, below: bool, fine: f64) -> Result<bool, OutOfTime> {
        let edge = mfs.factors.iter().find_map(|factor| match factor {
            Factor::Within { quantity: of, lower, upper } if *of == quantity => if below { *lower } else { *upper },
            _ => None,
        });
        let Some(edge) = edge.filter(|edge| edge.doubt() > fine) else { return Ok(false) };
        let target = (edge.inside * edge.outside).sqrt();
        let Some(point) = self.place(&mfs.anchor, quantity, target) else { return Ok(false) };
        let value = quantity.of(&point);
        if (value - edge.inside).abs() < 1e-9 || (value - edge.outside).abs() < 1e-9 {
            return Ok(false);
        }
        let between = (edge.inside.min(edge.outside)..=edge.inside.max(edge.outside)).contains(&value);
        if !between {
            return Ok(false);
        }
        match self.try_point(mfs, &point)? {
            Some(true) => {
                mfs.set_edge(quantity, Edge { inside: value, ..edge });
                mfs.anchor = point;
            }
            Some(false) => mfs.set_edge(quantity, Edge { outside: value, ..edge }),
            None => {}
        }
        Ok(true)
    }

    /// The point with a quantity brought near a value. Of two axes the second is changed, and the first if that has no room.
    fn place(&self, point: &Point, quantity: Quantity, value: f64) -> Option<Point> {
        let space = self.session.space();
        let set = |axis: Axis, value: f64| space.with(point, Setting::Axis(axis, value.round().clamp(1.0, f64::from(u32::MAX)) as u32));
        let closest = |candidates: Vec<Point>| {
            let off = |p: &Point| (quantity.of(p) / value).ln().abs();
            candidates.into_iter().min_by(|a, b| off(a).total_cmp(&off(b)))
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
    fn couple(&mut self, mfs: &mut Mfs, axis: Axis, below: bool, contradicted: bool) -> Result<(), OutOfTime> {
        let partners: Vec<(Axis, bool)> = mfs
            .factors
            .iter()
            .flat_map(|factor| match factor {
                Factor::Within { quantity: Quantity::Axis(other), lower, upper } if *other != axis => {
                    [lower.map(|_| (*other, true)), upper.map(|_| (*other, false))].into_iter().flatten().collect()
                }
                _ => Vec::new(),
            })
            .collect();
        let _ = contradicted;
        for (other, other_below) in partners {
            let Some(edge) = mfs.edge_mut(axis, below).map(|edge| *edge) else { return Ok(()) };
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
            let moved = space.with(&mfs.anchor, Setting::Axis(axis, beyond.round().max(1.0) as u32));
            let shift = f64::from(axis.of(&mfs.anchor)) / f64::from(axis.of(&moved));
            let growth = if below { 2.0 * shift } else { 2.0 / shift };
            let of_other = f64::from(other.of(&moved));
            let wanted = if other_below { of_other * growth } else { of_other / growth };
            let point = space.with(&moved, Setting::Axis(other, wanted.round().max(1.0) as u32));
            let made_up = {
                let (before, after) = (quantity.of(&mfs.anchor), quantity.of(&point));
                let coupled_low = below || matches!(quantity, Quantity::Ratio(..));
                (if coupled_low { after >= before } else { after <= before }) && axis.of(&point) == axis.of(&moved)
            };
            if !made_up {
                continue;
            }
            if self.try_point(mfs, &point)? == Some(true) {
                let anchor = mfs.anchor.clone();
                let (Some(near), Some(far)) = (self.place_axis(&anchor, axis, edge.inside), self.place_axis(&anchor, axis, edge.outside)) else {
                    continue;
                };
                let bound = Edge { inside: quantity.of(&near), outside: quantity.of(&far) };
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
        Some(self.session.space().with(point, Setting::Axis(axis, value as u32)))
    }

    /// One step towards knowing the known ones finely: the bound in most doubt, or a random workload within the conditions. False once nothing is left.
    pub(crate) fn refine(&mut self) -> Result<bool, OutOfTime> {
        let doubt = |mfs: &Mfs| -> Vec<(f64, Quantity, bool)> {
            mfs.factors
                .iter()
                .flat_map(|factor| match factor {
                    Factor::Within { quantity, lower, upper } => [
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
            all.extend(doubt(mfs).into_iter().map(|(doubt, quantity, below)| (doubt, place, quantity, below)));
        }
        all.sort_by(|a, b| b.0.total_cmp(&a.0));
        for (_, place, quantity, below) in all {
            let mut mfs = self.known[place].clone();
            let before = self.session.records().len();
            let halved = self.bisect(&mut mfs, quantity, below, FINE.ln())?;
            mfs.probes += self.session.records().len() - before;
            self.known[place] = mfs;
            if halved {
                return Ok(true);
            }
        }
        self.check_one()
    }

    /// Draws a random workload of a known anomaly's conditions; a clean one is a condition that was missed.
    fn check_one(&mut self) -> Result<bool, OutOfTime> {
        let Some(place) = (0..self.known.len()).min_by_key(|&i| self.known[i].probes) else { return Ok(false) };
        let mut mfs = self.known[place].clone();
        let before = self.session.records().len();
        let region = mfs.region(self.session.space());
        if let Some(point) = region.sample(self.session.space(), &mut self.rng)
            && self.try_point(&mfs, &point)? == Some(false)
            && self.session.records().last().is_some_and(|record| record.verdict.is_clean())
        {
            self.separate(&mut mfs, point)?;
        }
        mfs.probes += (self.session.records().len() - before).max(1);
        self.known[place] = mfs;
        Ok(true)
    }
}
