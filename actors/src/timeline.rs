//! Who computed what when: spans of every worker, kept in rings of bounded size, written as a Chrome trace.
//!
//! The file opens in `chrome://tracing` or Perfetto: one row per worker, so that the rally between the two sides can be seen.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use volley_transports::{Layer, MicroBatch, Role, Step, WorkerId};

use crate::protocol::Now;

/// Spans of all workers. Copies share them.
#[derive(Debug, Clone)]
pub struct Timeline {
    spans_per_worker: usize,
    /// When somebody last looked.
    looked: Arc<Mutex<Option<Instant>>>,
    workers: Vec<(WorkerId, Arc<Mutex<VecDeque<Span>>>)>,
}

/// What a worker did in a span.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activity {
    /// Combined a layer's outputs and computed attention, gate and dispatch of the next.
    Attention,
    /// Computed the head and chose tokens.
    Sample,
    /// Computed experts.
    Experts,
}

/// One piece of computing.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Span {
    /// What was done.
    pub activity: Activity,
    /// For which micro-batch.
    pub micro_batch: MicroBatch,
    /// In which step.
    pub step: Step,
    /// In which layer.
    pub layer: Layer,
    /// On how many rows.
    pub rows: u32,
    /// From when.
    pub start: Now,
    /// Until when.
    pub end: Now,
}

/// A worker's own end of the timeline: collects without a lock and hands over now and then.
#[derive(Debug)]
pub struct Recorder {
    spans_max: usize,
    fresh: Vec<Span>,
    ring: Arc<Mutex<VecDeque<Span>>>,
}

/// Spans collected before they are handed over.
const FRESH_SPANS: usize = 256;

impl Timeline {
    /// For these workers, keeping the last `spans_per_worker` spans of each; 0 records nothing.
    pub fn new(workers: impl Iterator<Item = WorkerId>, spans_per_worker: usize) -> Self {
        let ring = |worker| {
            (
                worker,
                Arc::new(Mutex::new(VecDeque::with_capacity(spans_per_worker))),
            )
        };
        Timeline {
            spans_per_worker,
            looked: Arc::default(),
            workers: workers.map(ring).collect(),
        }
    }

    /// Whether anything is recorded.
    pub fn keeps(&self) -> bool {
        self.spans_per_worker > 0
    }

    /// Spans kept of each worker; one that has so many may have had more.
    pub fn spans_per_worker(&self) -> usize {
        self.spans_per_worker
    }

    /// Whether somebody has looked within `time`.
    pub(crate) fn is_watched(&self, time: Duration) -> bool {
        let looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        looked.is_some_and(|looked| looked.elapsed() < time)
    }

    /// Takes in what a worker elsewhere has recorded; one that is not known is ignored.
    pub(crate) fn append(&self, worker: WorkerId, spans: impl ExactSizeIterator<Item = Span>) {
        if let Some((_, ring)) = self.workers.iter().find(|(id, _)| *id == worker) {
            append(ring, self.spans_per_worker, spans);
        }
    }

    /// The end that `worker` records with.
    pub fn recorder(&self, worker: WorkerId) -> Recorder {
        let ring = self
            .workers
            .iter()
            .find(|(id, _)| *id == worker)
            .map(|(_, ring)| Arc::clone(ring));
        Recorder {
            spans_max: if ring.is_some() {
                self.spans_per_worker
            } else {
                0
            },
            fresh: Vec::with_capacity(if self.spans_per_worker > 0 {
                FRESH_SPANS
            } else {
                0
            }),
            ring: ring.unwrap_or_default(),
        }
    }

    /// What was recorded, by worker, in order of time.
    pub fn spans(&self) -> Vec<(WorkerId, Vec<Span>)> {
        *self.looked.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        let copy = |ring: &Mutex<VecDeque<Span>>| {
            ring.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .iter()
                .copied()
                .collect()
        };
        self.workers
            .iter()
            .map(|(worker, ring)| (*worker, copy(ring)))
            .collect()
    }

    /// Writes all spans in Chrome's trace format (JSON array of complete events, microseconds).
    ///
    /// # Errors
    /// Those of the writer.
    pub fn write_chrome_trace(&self, out: &mut impl Write) -> io::Result<()> {
        write_chrome_trace(&self.spans(), out)
    }
}

/// As [`Timeline::write_chrome_trace`], of these spans.
///
/// # Errors
/// Those of the writer.
pub fn write_chrome_trace(
    timeline: &[(WorkerId, Vec<Span>)],
    out: &mut impl Write,
) -> io::Result<()> {
    write!(out, "[")?;
    let mut separator = "";
    for (worker, spans) in timeline {
        // Attention workers above expert workers, each in a row of its own.
        let thread = u32::from(worker.index)
            + if worker.role == Role::Attention {
                1
            } else {
                100_001
            };
        write!(
            out,
            "{separator}\n{{\"ph\":\"M\",\"pid\":1,\"tid\":{thread},\"name\":\"thread_name\",\"args\":{{\"name\":\"{worker}\"}}}}"
        )?;
        write!(
            out,
            ",\n{{\"ph\":\"M\",\"pid\":1,\"tid\":{thread},\"name\":\"thread_sort_index\",\"args\":{{\"sort_index\":{thread}}}}}"
        )?;
        separator = ",";
        for span in spans {
            let (start, duration) = (
                span.start.as_nanos(),
                (span.end.saturating_sub(span.start)).as_nanos(),
            );
            let name = span.activity.name();
            write!(
                out,
                ",\n{{\"ph\":\"X\",\"pid\":1,\"tid\":{thread},\"ts\":{}.{:03},\"dur\":{}.{:03},\"name\":\"{name} mb{} L{}\",\"cat\":\"{name}\",\"args\":{{\"micro_batch\":{},\"step\":{},\"layer\":{},\"rows\":{}}}}}",
                start / 1000,
                start % 1000,
                duration / 1000,
                duration % 1000,
                span.micro_batch.0,
                span.layer.0,
                span.micro_batch.0,
                span.step.0,
                span.layer.0,
                span.rows
            )?;
        }
    }
    writeln!(out, "\n]")
}

impl Span {
    /// As a clock has it that shows `ahead` nanoseconds more. What would be before its beginning is at its beginning.
    pub(crate) fn shifted(self, ahead: i128) -> Self {
        let shift = |time: Now| {
            let nanos = time.as_nanos() as i128 + ahead;
            Now::from_nanos(u64::try_from(nanos).unwrap_or(0))
        };
        Span {
            start: shift(self.start),
            end: shift(self.end),
            ..self
        }
    }
}

impl Activity {
    /// In one word, as traces have it.
    pub fn name(self) -> &'static str {
        match self {
            Activity::Attention => "attention",
            Activity::Sample => "sample",
            Activity::Experts => "experts",
        }
    }
}

impl Recorder {
    /// Records a span.
    pub fn record(&mut self, span: Span) {
        if self.spans_max == 0 {
            return;
        }
        self.fresh.push(span);
        if self.fresh.len() == FRESH_SPANS {
            self.flush();
        }
    }

    /// Hands over what was collected. Called when there is nothing else to do, and by itself when much has come together.
    pub fn flush(&mut self) {
        if self.fresh.is_empty() {
            return;
        }
        append(&self.ring, self.spans_max, self.fresh.drain(..));
    }
}

/// Adds spans to a ring that keeps the last `most`.
fn append(ring: &Mutex<VecDeque<Span>>, most: usize, spans: impl ExactSizeIterator<Item = Span>) {
    let mut ring = ring.lock().unwrap_or_else(PoisonError::into_inner);
    let surplus = (ring.len() + spans.len())
        .saturating_sub(most)
        .min(ring.len());
    ring.drain(..surplus);
    ring.extend(spans);
    let surplus = ring.len().saturating_sub(most);
    ring.drain(..surplus);
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_keeps_the_last_spans_and_the_trace_is_json() {
        let worker = Role::Expert.worker(0);
        let timeline = Timeline::new([worker].into_iter(), 300);
        let mut recorder = timeline.recorder(worker);
        for step in 0..1000 {
            let start = Now::from_micros(step * 10);
            recorder.record(Span {
                activity: Activity::Experts,
                micro_batch: MicroBatch(1),
                step: Step(step),
                layer: Layer(3),
                rows: 8,
                start,
                end: start + Now::from_nanos(1500),
            });
        }
        drop(recorder);
        let spans = timeline.spans().remove(0).1;
        assert_eq!(spans.len(), 300);
        assert_eq!((spans[0].step, spans[299].step), (Step(700), Step(999)));
        let mut json = Vec::new();
        timeline.write_chrome_trace(&mut json).unwrap();
        let events: Vec<serde_json::Value> = serde_json::from_slice(&json).unwrap();
        assert_eq!(events.len(), 302);
        assert_eq!(
            (events[2]["ts"].as_f64(), events[2]["dur"].as_f64()),
            (Some(7000.0), Some(1.5))
        );
    }
}
