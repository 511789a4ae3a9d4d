//! One anomaly under study: the measurements that show it, and what they say together.

use std::collections::BTreeMap;

use crate::fit::fit;
use crate::mfs::{Factor, Mfs};
use crate::monitor::Symptom;
use crate::session::Record;
use crate::space::{Category, Choice, Point, Quantity, Space};

/// Two pauses are alike to this factor, and two throughputs to this share of what is owed: several times what noise does to a median.
const PAUSE_ALIKE: f64 = 0.88;
const THROUGHPUT_ALIKE: f64 = 0.035;
/// A counter still speaks for an anomaly at this share of what it is there, and against it at that.
const COUNTER_FOR: f64 = 0.8;
const COUNTER_AGAINST: f64 = 0.4;
/// Counters that matter: those driven at least this share of what the most driven one is, and to twice their idle value.
const COUNTER_SHARE: f64 = 0.25;

/// Throughput that is not owed: a loss up to this is no symptom.
const NOT_OWED: f64 = 0.2;

/// How bad traffic is, in each respect.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Severity {
    /// Share of the time in pause.
    pub pause: f64,
    /// Share of the throughput that is gone.
    pub gone: f64,
}

impl Severity {
    pub(crate) fn of(symptom: &Symptom) -> Self {
        Severity {
            pause: symptom.pause.unwrap_or(0.0),
            gone: symptom
                .throughput
                .map_or(NOT_OWED, |share| (1.0 - share).max(NOT_OWED)),
        }
    }

    /// In each respect the worse of two.
    pub(crate) fn worst(&self, other: Severity) -> Self {
        Severity {
            pause: self.pause.max(other.pause),
            gone: self.gone.max(other.gone),
        }
    }

    /// Whether one respect in which another is bad is as bad here.
    fn shares(&self, other: &Severity) -> bool {
        let left = self.without(other);
        (other.pause > 0.0 && left.pause < self.pause)
            || (other.gone > NOT_OWED + THROUGHPUT_ALIKE && left.gone < self.gone)
    }

    /// What is left where another one that is as bad accounts for it.
    pub(crate) fn without(&self, other: &Severity) -> Self {
        let pause =
            self.pause >= PAUSE_ALIKE * other.pause && other.pause >= PAUSE_ALIKE * self.pause;
        let gone = (self.gone - other.gone).abs() <= THROUGHPUT_ALIKE;
        Severity {
            pause: if pause { 0.0 } else { self.pause },
            gone: if gone { NOT_OWED } else { self.gone },
        }
    }

    /// Whether it is worse in some respect, by more than noise does.
    pub(crate) fn exceeds(&self, other: &Severity) -> bool {
        self.pause * PAUSE_ALIKE > other.pause || self.gone > other.gone + THROUGHPUT_ALIKE
    }

    fn exceeds_clearly(&self, other: &Severity) -> bool {
        self.pause * PAUSE_ALIKE * PAUSE_ALIKE > other.pause
            || self.gone > other.gone + 2.0 * THROUGHPUT_ALIKE
    }
}

/// Shares of a counter that tell how far a bound is.
/// Workloads that place a bound: those that show the most of what is driven.
const NEAREST: usize = 3;
const SHARE_TELLS: std::ops::Range<f64> = 0.1..0.97;

/// What one measurement says of one anomaly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sight {
    /// It is there.
    Shows,
    /// It is there with another one that is worse in one respect.
    Partly,
    /// It is not.
    Absent,
    /// Another, worse one is seen; whether this one is there too only its counters can say.
    Hidden {
        /// They say so.
        likely: bool,
    },
}

/// What a refinement has tried of a condition, in vain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Tried {
    /// To find the anomaly beyond a bound (below it: true).
    Beyond(Quantity, bool),
    /// To halve the doubt of a bound.
    Halving(Quantity, bool),
    /// To see a value of a category.
    Value(Category, Choice),
    /// To find a workload of the conditions without the anomaly.
    Check,
}

/// An anomaly and what is known of it.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    /// What is learnt so far.
    pub mfs: Mfs,
    /// How bad it is.
    pub severity: Severity,
    /// The records that show it.
    pub shown: Vec<usize>,
    /// Records without it that only a guessed condition shuts out.
    pub guessed: Vec<usize>,
    /// Attempts in vain.
    pub tried: BTreeMap<Tried, u32>,
    /// Probes spent on refining it.
    pub refined: usize,
}

impl Case {
    /// From the first record that shows it; nothing is a condition yet.
    pub(crate) fn new(
        index: usize,
        record: &Record,
        symptom: Symptom,
        signature: Vec<f64>,
    ) -> Self {
        Case {
            severity: Severity::of(&symptom),
            mfs: Mfs {
                factors: Vec::new(),
                anchor: record.point.clone(),
                symptom,
                signature,
                probes: 0,
            },
            shown: vec![index],
            guessed: Vec::new(),
            tried: BTreeMap::new(),
            refined: 0,
        }
    }

    /// What a record, whose signals are given, says of this anomaly. None if it says nothing at all.
    pub(crate) fn sight(&self, record: &Record, signals: &[f64]) -> Option<Sight> {
        if record.verdict.is_clean() {
            return Some(Sight::Absent);
        }
        let symptom = record.verdict.symptom()?;
        let (for_it, against_it) = self.counters(signals);
        if against_it {
            return Some(Sight::Absent);
        }
        let (seen, own) = (Severity::of(symptom), self.severity);
        let (milder, worse) = (own.exceeds(&seen), seen.exceeds(&own));
        Some(match (milder, worse) {
            (false, false) if for_it => Sight::Shows,
            // One thing is as bad as here, and another anomaly may make the other thing worse.
            (false, true) if for_it && seen.shares(&own) => Sight::Partly,
            // What is milder in one respect cannot be this one, nor hide it.
            (true, _) if !for_it || own.exceeds_clearly(&seen) => Sight::Absent,
            _ => Sight::Hidden { likely: for_it },
        })
    }

    /// Whether counters speak for it.
    pub(crate) fn speaks_for(&self, signals: &[f64]) -> bool {
        self.counters(signals).0
    }

    /// Whether the counters speak for it, and whether they speak against it.
    fn counters(&self, signals: &[f64]) -> (bool, bool) {
        let own = &self.mfs.signature;
        let most = own.iter().copied().fold(0.0, f64::max);
        let ratios = own
            .iter()
            .zip(signals)
            .filter(|(own, _)| **own >= 1.0 && **own >= COUNTER_SHARE * most)
            .map(|(own, now)| now / own);
        match ratios.reduce(f64::max) {
            None => (true, false),
            Some(best) => (best >= COUNTER_FOR, best < COUNTER_AGAINST),
        }
    }

    /// Fits the conditions to all that was measured. False, with nothing changed, if no conjunction does.
    pub(crate) fn refit(
        &mut self,
        records: &[Record],
        signals: &[Vec<f64>],
        space: &Space,
    ) -> bool {
        self.refit_with(&self.shown.clone(), records, signals, space)
    }

    /// As [`Case::refit`], with these records as the ones that show it.
    pub(crate) fn refit_with(
        &mut self,
        shown: &[usize],
        records: &[Record],
        signals: &[Vec<f64>],
        space: &Space,
    ) -> bool {
        let without: Vec<usize> = (0..records.len())
            .filter(|i| {
                !shown.contains(i) && self.sight(&records[*i], &signals[*i]) == Some(Sight::Absent)
            })
            .collect();
        let points = |places: &[usize]| -> Vec<&Point> {
            places.iter().map(|&i| &records[i].point).collect()
        };
        let Some(fitted) = fit(&points(shown), &points(&without), space) else {
            return false;
        };
        self.mfs.factors = fitted.factors;
        self.guessed = fitted.guessed.into_iter().map(|n| without[n]).collect();
        self.shown = shown.to_vec();
        let median = |of: &dyn Fn(&Severity) -> f64| {
            let mut values: Vec<f64> = shown
                .iter()
                .filter_map(|&i| records[i].verdict.symptom())
                .map(|symptom| of(&Severity::of(symptom)))
                .collect();
            values.sort_by(f64::total_cmp);
            // What others add makes it worse, never milder.
            values[(values.len() - 1) / 3]
        };
        self.severity = Severity {
            pause: median(&|severity| severity.pause),
            gone: median(&|severity| severity.gone),
        };
        // What other causes add to a counter differs from workload to workload: the lower quartile is mostly this one's own.
        self.mfs.signature = (0..self.mfs.signature.len())
            .map(|c| {
                let mut values: Vec<f64> = shown.iter().map(|&i| signals[i][c]).collect();
                values.sort_by(f64::total_cmp);
                values[values.len() / 4]
            })
            .collect();
        self.place_bounds(&without, records, signals, space);
        true
    }

    /// Places each bound where the counters say it is. From a bound to the far end of its quantity what an anomaly drives falls to nothing: so a workload that
    /// fails this bound only tells, by how much is left of that, how far away it is.
    fn place_bounds(
        &mut self,
        without: &[usize],
        records: &[Record],
        signals: &[Vec<f64>],
        space: &Space,
    ) {
        let mut places = Vec::new();
        for (nth, factor) in self.mfs.factors.iter().enumerate() {
            let Factor::Within {
                quantity,
                lower,
                upper,
            } = factor
            else {
                continue;
            };
            let (low, high) = space.extent(*quantity);
            for (below, edge, end) in [(true, lower, low), (false, upper, high)] {
                let Some(edge) = edge else { continue };
                let open = self.mfs.region_without(space, *quantity, below);
                let mut left: Vec<(f64, f64)> = without
                    .iter()
                    .filter(|&&n| open.contains(&records[n].point))
                    .filter_map(|&n| {
                        let share = self.share(&signals[n])?;
                        let way = (quantity.of(&records[n].point) / end).ln();
                        (SHARE_TELLS.contains(&share)).then(|| (share, way / share))
                    })
                    .collect();
                left.sort_by(|a, b| b.0.total_cmp(&a.0));
                left.truncate(NEAREST);
                let (a, b) = (edge.outside.ln(), edge.inside.ln());
                // What other causes add makes a bound seem farther out than it is: the innermost place is the best.
                let along = left
                    .iter()
                    .map(|(_, way)| (end.ln() + way - a) / (b - a))
                    .reduce(f64::max);
                if let Some(along) = along {
                    let along = along.clamp(0.1, 1.0);
                    places.push((nth, below, (a + along * (b - a)).exp()));
                }
            }
        }
        for &(nth, below, place) in &places {
            if let Factor::Within { lower, upper, .. } = &mut self.mfs.factors[nth]
                && let Some(edge) = if below { lower } else { upper }
            {
                edge.likely = Some(place);
            }
        }
        // A workload without it that two bounds shut out at half way must stay out.
        let region = self.mfs.region(space);
        if without.iter().any(|&n| region.contains(&records[n].point)) {
            for factor in &mut self.mfs.factors {
                if let Factor::Within { lower, upper, .. } = factor {
                    for edge in [lower, upper].into_iter().flatten() {
                        edge.likely = edge.likely.filter(|&place| edge.is_inner(place));
                    }
                }
            }
        }
    }

    /// What is left of what the anomaly drives.
    fn share(&self, signals: &[f64]) -> Option<f64> {
        let own = &self.mfs.signature;
        let most = own.iter().copied().fold(0.0, f64::max);
        own.iter()
            .zip(signals)
            .filter(|(own, _)| **own >= 1.0 && **own >= COUNTER_SHARE * most)
            .map(|(own, now)| now / own)
            .reduce(f64::min)
    }

    /// Leaves out records that no conjunction with the first ones admits.
    pub(crate) fn refit_consistent(
        &mut self,
        records: &[Record],
        signals: &[Vec<f64>],
        space: &Space,
    ) {
        if self.refit(records, signals, space) {
            return;
        }
        let all = self.shown.clone();
        let mut kept = vec![all[0]];
        for &index in &all[1..] {
            kept.push(index);
            if !self.refit_with(&kept, records, signals, space) {
                kept.pop();
            }
        }
        self.refit_with(&kept, records, signals, space);
    }
}
