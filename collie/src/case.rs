//! One anomaly under study: the measurements that show it, and what they say together.

use std::collections::BTreeMap;

use crate::fit::fit;
use crate::mfs::Mfs;
use crate::monitor::Symptom;
use crate::session::Record;
use crate::space::{Category, Choice, Point, Quantity, Space};

/// Two pauses are alike to this factor, and two throughputs to this share of what is owed: several times what noise does to a median.
const PAUSE_ALIKE: f64 = 0.85;
const THROUGHPUT_ALIKE: f64 = 0.035;
/// A counter still speaks for an anomaly at this share of what it is there, and against it at that.
const COUNTER_FOR: f64 = 0.8;
const COUNTER_AGAINST: f64 = 0.4;
/// Counters that matter: those driven at least this share of what the most driven one is, and to twice their idle value.
const COUNTER_SHARE: f64 = 0.25;

/// What one measurement says of one anomaly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sight {
    /// It is there.
    Shows,
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
}

/// An anomaly and what is known of it.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    /// What is learnt so far.
    pub mfs: Mfs,
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
        let lost = |share: Option<f64>| share.map_or(0.0, |share| 1.0 - share);
        let (pause, own_pause) = (
            symptom.pause.unwrap_or(0.0),
            self.mfs.symptom.pause.unwrap_or(0.0),
        );
        let (gone, own_gone) = (lost(symptom.throughput), lost(self.mfs.symptom.throughput));
        let milder = pause < PAUSE_ALIKE * own_pause || gone < own_gone - THROUGHPUT_ALIKE;
        let worse = pause * PAUSE_ALIKE > own_pause || gone > own_gone + THROUGHPUT_ALIKE;
        Some(match (milder, worse) {
            (false, false) if for_it => Sight::Shows,
            // What is milder in one respect cannot be this one, nor hide it.
            (true, _) if !for_it => Sight::Absent,
            _ => Sight::Hidden { likely: for_it },
        })
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
        // What other causes add to a counter differs from workload to workload: the lower quartile is mostly this one's own.
        self.mfs.signature = (0..self.mfs.signature.len())
            .map(|c| {
                let mut values: Vec<f64> = shown.iter().map(|&i| signals[i][c]).collect();
                values.sort_by(f64::total_cmp);
                values[values.len() / 4]
            })
            .collect();
        true
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
