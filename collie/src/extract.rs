//! Learning what an anomaly needs, roughly, when it is first met.
//!
//! A workload that shows it and one that does not are brought together, half of their differences at a time, until one setting tells them apart: that setting is a condition. The
//! conditions are those that fit everything measured so far ([`crate::fit`]); where they rest on a guess, the next pair settles it. Then random workloads
//! within them are measured, and one without the anomaly starts it over. What is met later and looks the same only widens the fit. Bounds are made
//! fine when there is time for it ([`crate::refine`]).

use crate::case::{Case, Sight};
use crate::region::Region;
use crate::search::Search;
use crate::session::OutOfTime;
use crate::space::{Axis, Feature, Point, Setting};

/// Pairs brought together when an anomaly is first met, those among them that settle a guess, and probes after which no further pair is: the rest is
/// left to refinement.
const STEPS_MAX: usize = 12;
const SETTLED_AT_ONCE: usize = 4;
const PROBES_MAX: usize = 15;
/// Random workloads of the conditions that must show the anomaly before they are believed, and draws for that, at most: some show yet others.
const CONFIRMATIONS: usize = 2;
const DRAWS_MAX: usize = 12;
/// Random workloads by which a wider fit is tried.
const WIDER_TRIALS: usize = 2;

impl Search<'_, '_> {
    /// Learns what the anomaly of a record needs.
    pub(crate) fn learn(&mut self, index: usize) -> Result<(), OutOfTime> {
        let first = self.session.records().len();
        let record = &self.session.records()[index];
        let symptom = *record.verdict.symptom().expect("an anomalous record");
        let mut case = Case::new(index, record, symptom, self.signals(record));
        // Once more, for a disturbed measurement is soon dearer than this.
        let anchor = case.mfs.anchor.clone();
        if self.try_point(&mut case, &anchor)? != Some(Sight::Shows) {
            return Ok(());
        }
        let outcome = self.learn_roughly(&mut case, first);
        // What was learnt until the time was over is better than nothing.
        self.refit(&mut case);
        case.mfs.probes = self.session.records().len() - first;
        // What speaks of every workload was a passing disturbance.
        if !case.mfs.factors.is_empty() {
            self.known.push(case);
        }
        outcome
    }

    /// Until no random workload of the conditions contradicts them, or the probes since a first record are spent.
    fn learn_roughly(&mut self, case: &mut Case, first: usize) -> Result<(), OutOfTime> {
        // At few queue pairs and regions, if it shows there, all that follows takes less time.
        for axis in [Axis::Regions, Axis::Qps] {
            let space = self.session.space();
            let cheap = space.with(&case.mfs.anchor, Setting::Axis(axis, space.range(axis).0));
            if axis.of(&case.mfs.anchor) > 64 && self.try_point(case, &cheap)? == Some(Sight::Shows)
            {
                case.mfs.anchor = cheap;
            }
        }

        for step in 0..STEPS_MAX {
            if self.session.records().len() - first > PROBES_MAX {
                break;
            }
            self.refit(case);
            let pair = match self.nearest(case, &case.guessed) {
                Some(pair) if step < SETTLED_AT_ONCE => pair,
                _ => match self.counterexample(case)? {
                    Some(clean) => (self.nearest_shown(case, &clean), clean),
                    None => break,
                },
            };
            self.separate(case, pair.0, pair.1)?;
        }
        Ok(())
    }

    /// Widens a known anomaly to a record that looks like it, if all that was measured allows. True if one was.
    pub(crate) fn adopt(&mut self, index: usize) -> Result<bool, OutOfTime> {
        for place in 0..self.known.len() {
            let (record, signals) = (&self.session.records()[index], &self.all_signals()[index]);
            match self.known[place].sight(record, signals) {
                Some(Sight::Shows) => {}
                // Where one is known already, it is the other that is news.
                Some(Sight::Partly) if !self.is_known(&record.point) => {}
                _ => continue,
            }
            let before = self.session.records().len();
            let mut case = self.known.remove(place);
            let widened = self.widen(&mut case, &[index]);
            case.mfs.probes += self.session.records().len() - before;
            self.known.insert(place, case);
            if widened? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Adds records to a case and tries workloads that only the wider fit admits. False, with the case as it was, if they speak against it.
    pub(crate) fn widen(&mut self, case: &mut Case, more: &[usize]) -> Result<bool, OutOfTime> {
        let old = case.clone();
        let narrow = case.mfs.region(self.session.space());
        case.shown.extend(more);
        if !self.refits(case) {
            *case = old;
            return Ok(false);
        }
        for _ in 0..WIDER_TRIALS {
            let wide = case.mfs.region(self.session.space());
            let Some(point) = (0..20).find_map(|_| {
                self.draw(case, &wide)
                    .filter(|point| !narrow.contains(point))
            }) else {
                break;
            };
            self.try_point(case, &point)?;
            if !self.refits(case) {
                *case = old;
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Fits a case to all that was measured. False, with nothing changed, if no conjunction does.
    fn refits(&mut self, case: &mut Case) -> bool {
        let space = self.session.space().clone();
        self.update_signals();
        case.refit(self.session.records(), self.all_signals(), &space)
    }

    /// Fits a case to all that was measured, leaving out what does not go together.
    pub(crate) fn refit(&mut self, case: &mut Case) {
        let space = self.session.space().clone();
        self.update_signals();
        case.refit_consistent(self.session.records(), self.all_signals(), &space);
    }

    /// Measures a workload for a case. What shows it is noted there. None if it cannot be measured.
    pub(crate) fn try_point(
        &mut self,
        case: &mut Case,
        point: &Point,
    ) -> Result<Option<Sight>, OutOfTime> {
        for _ in 0..2 {
            let index = self.session.probe(point, self.purpose)?;
            let record = &self.session.records()[index];
            let mut sight = case.sight(record, &self.signals(record));
            if sight == Some(Sight::Partly) && !self.is_known(point) {
                sight = Some(Sight::Shows);
            }
            if sight == Some(Sight::Shows) {
                self.settled.insert(index);
                case.shown.push(index);
            }
            if sight.is_some() {
                return Ok(sight);
            }
        }
        Ok(None)
    }

    /// Of some records without the anomaly the one that differs least from one with it, and that one.
    pub(crate) fn nearest(&self, case: &Case, without: &[usize]) -> Option<(Point, Point)> {
        let records = self.session.records();
        let pairs = without.iter().flat_map(|&n| {
            case.shown
                .iter()
                .map(move |&s| (&records[s].point, &records[n].point))
        });
        let nearest = pairs.min_by_key(|(shown, without)| differences(shown, without))?;
        Some((nearest.0.clone(), nearest.1.clone()))
    }

    pub(crate) fn nearest_shown(&self, case: &Case, without: &Point) -> Point {
        let records = self.session.records();
        let shown = case.shown.iter().map(|&s| &records[s].point);
        shown
            .min_by_key(|shown| differences(shown, without))
            .unwrap_or(&case.mfs.anchor)
            .clone()
    }

    /// A random workload that meets the conditions so far and does not show the anomaly. None once they are believed.
    fn counterexample(&mut self, case: &mut Case) -> Result<Option<Point>, OutOfTime> {
        let region = case.mfs.region(self.session.space());
        let mut confirmed = 0;
        // Numbers left open are tried at their ends first: what a bound was missed for shows there soonest.
        let mut corners = vec![true, false];
        for _ in 0..DRAWS_MAX {
            if confirmed >= CONFIRMATIONS && corners.is_empty() {
                break;
            }
            let Some(mut point) = self.draw(case, &region) else {
                break;
            };
            if let Some(&high) = corners.last() {
                let corner = self.corner(&region, &point, high);
                if self.elsewhere(case, &corner) {
                    corners.pop();
                    continue;
                }
                point = corner;
            }
            match self.try_point(case, &point)? {
                Some(Sight::Absent) => return Ok(Some(point)),
                Some(Sight::Shows) => confirmed += usize::from(corners.pop().is_none()),
                _ => {}
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

    fn is_known(&self, point: &Point) -> bool {
        self.known_regions()
            .iter()
            .any(|region| region.contains(point))
    }

    /// Whether a known anomaly would hide another one at a workload.
    pub(crate) fn elsewhere(&self, case: &Case, point: &Point) -> bool {
        self.hiding(case)
            .iter()
            .any(|region| region.contains(point))
    }

    /// The conditions of the known anomalies beside which another one would not be seen.
    fn hiding(&self, case: &Case) -> Vec<Region> {
        self.known
            .iter()
            .filter(|other| !case.severity.exceeds(&other.severity))
            .map(|other| other.mfs.region(self.session.space()))
            .collect()
    }

    /// A random workload of a region where nothing else that is known hides an anomaly.
    pub(crate) fn draw(&mut self, case: &Case, region: &Region) -> Option<Point> {
        let hiding = self.hiding(case);
        (0..50).find_map(|_| {
            let point = region.sample(self.session.space(), &mut self.rng)?;
            (!hiding.iter().any(|other| other.contains(&point))).then_some(point)
        })
    }

    /// Brings a workload with the anomaly and one without together until one setting tells them apart, as far as measurements allow.
    pub(crate) fn separate(
        &mut self,
        case: &mut Case,
        mut sick: Point,
        mut well: Point,
    ) -> Result<(), OutOfTime> {
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
                if mid == sick || mid == well || self.elsewhere(case, &mid) {
                    continue;
                }
                match self.try_point(case, &mid)? {
                    Some(Sight::Shows) => sick = mid,
                    Some(Sight::Absent) => well = mid,
                    _ => continue,
                }
                moved = true;
                break;
            }
            if !moved {
                break;
            }
        }
        Ok(())
    }
}

/// In how many settings two workloads differ.
fn differences(a: &Point, b: &Point) -> usize {
    Feature::all()
        .filter(|feature| !feature.agrees(a, b))
        .count()
}
