//! What was computed when, as a timeline: a lane for each worker.

use std::time::Duration;

use volley_actors::{Activity, Recorder, Span, Timeline};
use volley_transports::{Layer, MicroBatch, Role, Step};

use super::lockstep::Watch;

/// The lanes of all workers.
pub(super) struct Lanes {
    keep: bool,
    attention: Vec<Recorder>,
    experts: Vec<Recorder>,
}

impl Lanes {
    pub(super) fn new(timeline: &Timeline, attention: usize, experts: usize) -> Self {
        let recorders = |role: Role, count: usize| {
            (0..count)
                .map(|index| timeline.recorder(role.worker(index as u16)))
                .collect()
        };
        Lanes {
            keep: timeline.keeps(),
            attention: recorders(Role::Attention, attention),
            experts: recorders(Role::Expert, experts),
        }
    }

    /// Hands over what is still held back.
    pub(super) fn flush(&mut self) {
        for recorder in self.attention.iter_mut().chain(&mut self.experts) {
            recorder.flush();
        }
    }
}

/// Writes a round into the timeline.
pub(super) struct Recording<'a> {
    pub(super) lanes: &'a mut Lanes,
    pub(super) micro_batch: MicroBatch,
    pub(super) step: Step,
    pub(super) layer: Layer,
    pub(super) activity: Activity,
}

impl Recording<'_> {
    fn span(&self, activity: Activity, rows: f64, start_s: f64, end_s: f64) -> Span {
        Span {
            activity,
            micro_batch: self.micro_batch,
            step: self.step,
            layer: self.layer,
            rows: rows as u32,
            start: at(start_s),
            end: at(end_s),
        }
    }
}

impl Watch for Recording<'_> {
    fn attention(&mut self, worker: usize, rows: f64, start_s: f64, end_s: f64) {
        if self.lanes.keep {
            let span = self.span(self.activity, rows, start_s, end_s);
            self.lanes.attention[worker].record(span);
        }
    }

    fn experts(&mut self, worker: usize, rows: f64, start_s: f64, end_s: f64) {
        if self.lanes.keep {
            let span = self.span(Activity::Experts, rows, start_s, end_s);
            self.lanes.experts[worker].record(span);
        }
    }
}

fn at(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds.max(0.0))
}
