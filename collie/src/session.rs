//! The probes of one search, its clock, and what they said so far.
//!
//! Every probe is a line of the journal. A search that was cut off is run again from its seed with the journal read back: what was measured is not measured again, and
//! the search comes to the same point by itself. So nothing but measurements needs saving, and a journal is a complete account.

use std::collections::VecDeque;
use std::io::Write;

use serde::{Deserialize, Serialize};

use crate::monitor::{Monitor, Verdict};
use crate::space::{Point, Space};
use crate::subsystem::Subsystem;

/// Votes on a workload whose verdict is not clear, at most.
const VOTES_MAX: usize = 3;
/// A verdict that this share of the samples supports needs no second vote.
const CLEAR: f64 = 0.75;

/// Why a workload was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Purpose {
    /// To look for anomalies.
    Search,
    /// To learn roughly what a new one needs.
    Extract,
    /// To learn finely what a known one needs.
    Refine,
}

/// One measured workload.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The workload.
    pub point: Point,
    /// What it was measured for.
    pub purpose: Purpose,
    /// What was found.
    pub verdict: Verdict,
    /// The diagnostic counters, a second. Empty if invalid.
    pub counters: Vec<f64>,
    /// Throughput as a share of what is owed. 0 if invalid.
    pub throughput: f64,
    /// Relative standard error of the counters: what of a change may be noise.
    pub noise: f64,
    /// What it took, seconds.
    pub seconds: f64,
    /// The search's clock when it ended, seconds.
    pub at_s: f64,
}

/// The search's time is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the search's time is over")]
pub struct OutOfTime;

/// Why a journal cannot be continued.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// It is not the journal of this search.
    #[error(
        "record {0} of the journal is of another search: resume with the same seed, subsystem, space and strategy, or start a new journal"
    )]
    OtherSearch(usize),
    /// It cannot be written.
    #[error("the journal cannot be written: {0}")]
    Write(#[from] std::io::Error),
}

/// A search's dealings with its subsystem.
pub struct Session<'a> {
    subsystem: &'a mut dyn Subsystem,
    monitor: Monitor,
    space: Space,
    budget_s: f64,
    elapsed_s: f64,
    records: Vec<Record>,
    replay: VecDeque<Record>,
    journal: Option<Box<dyn Write + 'a>>,
    broken: Option<JournalError>,
}

impl<'a> Session<'a> {
    /// A search of this many seconds of the subsystem's clock, within a space that may be narrower than the subsystem's own.
    pub fn new(
        subsystem: &'a mut dyn Subsystem,
        space: Space,
        monitor: Monitor,
        budget_s: f64,
    ) -> Self {
        Session {
            subsystem,
            monitor,
            space,
            budget_s,
            elapsed_s: 0.0,
            records: Vec::new(),
            replay: VecDeque::new(),
            journal: None,
            broken: None,
        }
    }

    /// Takes the measurements of a journal instead of measuring, while they last, and appends further ones to it.
    pub fn with_journal(mut self, done: Vec<Record>, journal: impl Write + 'a) -> Self {
        self.replay = done.into();
        self.journal = Some(Box::new(journal));
        self
    }

    /// The workloads searched.
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// All that was measured, in order.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// The search's clock, seconds.
    pub fn elapsed_s(&self) -> f64 {
        self.elapsed_s
    }

    /// The fault of the journal that ended the search, if one did.
    pub fn broken(&mut self) -> Option<JournalError> {
        self.broken.take()
    }

    /// Measures a workload until its verdict is clear, and returns the last record's place.
    ///
    /// # Errors
    /// [`OutOfTime`] once the budget is spent, or the journal failed.
    pub fn probe(&mut self, point: &Point, purpose: Purpose) -> Result<usize, OutOfTime> {
        let (mut clean, mut anomalous) = ((0.0, None), (0.0, None));
        for _ in 0..VOTES_MAX {
            let index = self.probe_once(point, purpose)?;
            let record = &self.records[index];
            let confidence = record.verdict.confidence();
            if confidence >= CLEAR {
                return Ok(index);
            }
            let side = if record.verdict.symptom().is_some() {
                &mut anomalous
            } else {
                &mut clean
            };
            *side = (side.0 + confidence, Some(index));
        }
        let (winner, other) = if anomalous.0 > clean.0 {
            (anomalous, clean)
        } else {
            (clean, anomalous)
        };
        Ok(winner.1.or(other.1).expect("at least one vote was taken"))
    }

    fn probe_once(&mut self, point: &Point, purpose: Purpose) -> Result<usize, OutOfTime> {
        if self.elapsed_s >= self.budget_s || self.broken.is_some() {
            return Err(OutOfTime);
        }
        let record = match self.replay.pop_front() {
            Some(record) if record.point == *point => record,
            Some(_) => {
                self.broken = Some(JournalError::OtherSearch(self.records.len() + 1));
                return Err(OutOfTime);
            }
            None => {
                let record = self.measure(point, purpose);
                if let Err(error) = self.write(&record) {
                    self.broken = Some(error.into());
                    return Err(OutOfTime);
                }
                record
            }
        };
        self.elapsed_s = record.at_s;
        self.records.push(record);
        Ok(self.records.len() - 1)
    }

    fn measure(&mut self, point: &Point, purpose: Purpose) -> Record {
        let (probe, bound) = (self.subsystem.probe(point), self.subsystem.bound(point));
        let verdict = self.monitor.judge(&probe, &bound);
        let (mut counters, mut throughput, mut noise) = (Vec::new(), 0.0, 0.0);
        if let (Ok(measurement), false) =
            (&probe.outcome, matches!(verdict, Verdict::Invalid { .. }))
        {
            counters = measurement.counters();
            let share = |s: &crate::subsystem::Sample| {
                (s.bits_per_s / bound.bits_per_s).max(s.packets_per_s / bound.packets_per_s)
            };
            let receiving = measurement
                .ends
                .iter()
                .filter(|end| end.iter().any(|s| s.packets_per_s > 0.0));
            throughput = receiving
                .map(|end| end.iter().map(share).sum::<f64>() / end.len() as f64)
                .fold(f64::INFINITY, f64::min);
            noise = relative_error(&measurement.ends[0]);
        }
        let at_s = self.elapsed_s + probe.seconds;
        Record {
            point: point.clone(),
            purpose,
            verdict,
            counters,
            throughput,
            noise,
            seconds: probe.seconds,
            at_s,
        }
    }

    fn write(&mut self, record: &Record) -> std::io::Result<()> {
        let Some(journal) = &mut self.journal else {
            return Ok(());
        };
        serde_json::to_writer(&mut *journal, record)?;
        journal.write_all(b"\n")?;
        journal.flush()
    }
}

/// The mean over the counters of the standard error of their mean, relative to it.
fn relative_error(samples: &[crate::subsystem::Sample]) -> f64 {
    let count = samples.len() as f64;
    let counters = samples.first().map_or(0, |sample| sample.counters.len());
    if samples.len() < 2 || counters == 0 {
        return 0.0;
    }
    let errors = (0..counters).map(|i| {
        let mean = samples.iter().map(|s| s.counters[i]).sum::<f64>() / count;
        let variance = samples
            .iter()
            .map(|s| (s.counters[i] - mean).powi(2))
            .sum::<f64>()
            / (count - 1.0);
        if mean > 0.0 {
            (variance / count).sqrt() / mean
        } else {
            0.0
        }
    });
    errors.sum::<f64>() / counters as f64
}
