//! `GET /admin/timeline`: who computed what in the last steps, and what each of them was bound by.
//!
//! Workers note every piece of computing in rings of bounded size (`trace.spans`), looked at or not; an answer copies them. Workers of other processes are asked for theirs once a
//! second while somebody looks, so a first answer may have none; their clocks agree with this process's to within a message's way.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::QueryRejection;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use volley_actors::{Span, write_chrome_trace};
use volley_transports::WorkerId;

use super::error::ApiError;
use super::state::App;
use crate::rally::{self, Rally};

/// Steps in an answer if the client does not say.
const STEPS_DEFAULT: usize = 16;
/// Most steps in an answer. The rings bound it too.
const STEPS_MAX: usize = 1024;

type Query = axum::extract::Query<Asked>;

/// What the client wants.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Asked {
    steps: Option<usize>,
    #[serde(default)]
    format: Format,
}

#[derive(Deserialize, Default, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Format {
    #[default]
    Json,
    /// Chrome's trace format, which Perfetto opens.
    Chrome,
}

pub(super) async fn timeline(
    State(app): State<App>,
    asked: Result<Query, QueryRejection>,
) -> Result<Response, ApiError> {
    let axum::extract::Query(asked) =
        asked.map_err(|error| ApiError::malformed(error.body_text()))?;
    let steps = asked.steps.unwrap_or(STEPS_DEFAULT);
    if !(1..=STEPS_MAX).contains(&steps) {
        let message = format!("`steps` is {steps}; it must be from 1 to {STEPS_MAX}");
        return Err(ApiError::invalid("steps", message));
    }
    let engine = app.engine.clone();
    // Copying and sorting some thousand spans is no work for a thread that streams tokens.
    let answer = tokio::task::spawn_blocking(move || {
        let timeline = engine.cluster.timeline();
        let last = Last::of(timeline.spans(), timeline.spans_per_worker(), steps);
        match asked.format {
            Format::Json => Ok(Json(Answer::new(&last, timeline.keeps())).into_response()),
            Format::Chrome => {
                let mut file = Vec::new();
                write_chrome_trace(&last.spans, &mut file)?;
                let headers = [
                    (header::CONTENT_TYPE, "application/json"),
                    (
                        header::CONTENT_DISPOSITION,
                        "attachment; filename=\"volley-trace.json\"",
                    ),
                ];
                Ok::<_, std::io::Error>((headers, file).into_response())
            }
        }
    });
    let failed =
        |error: String| ApiError::internal(format!("the timeline cannot be read: {error}"));
    answer
        .await
        .map_err(|error| failed(error.to_string()))?
        .map_err(|error| failed(error.to_string()))
}

/// The last steps that came to their end, and what was computed since the first of them began.
struct Last {
    steps: Vec<Rally>,
    spans: Vec<(WorkerId, Vec<Span>)>,
}

impl Last {
    fn of(mut spans: Vec<(WorkerId, Vec<Span>)>, kept: usize, count: usize) -> Self {
        // A ring that is full has lost what was before; a step from then lacks that worker's part.
        let full = spans.iter().filter(|(_, spans)| spans.len() >= kept);
        let since = full.filter_map(|(_, spans)| spans.first());
        let since = since.map(|span| span.start).max().unwrap_or_default();
        let mut steps = rally::steps(&spans);
        // A step that was planned ahead for sequences that then ended has no rows, and says nothing.
        steps.retain(|step| step.rows > 0 && step.start >= since);
        steps.drain(..steps.len().saturating_sub(count));
        let began = steps.iter().map(|step| step.start).min();
        let began = began.unwrap_or(Duration::MAX);
        for (_, spans) in &mut spans {
            spans.retain(|span| span.start >= began);
        }
        Last { steps, spans }
    }
}

/// Times are microseconds: spans' since the first span shown, steps' as long as they took.
#[derive(Serialize)]
struct Answer {
    /// Whether there are spans: not before the first step, nor with `trace.spans` 0.
    recorded: bool,
    workers: Vec<Worker>,
    steps: Vec<Step>,
}

#[derive(Serialize)]
struct Worker {
    worker: String,
    /// Activity, micro-batch, step, layer, rows, start, duration.
    spans: Vec<(&'static str, u8, u64, u16, u32, f64, f64)>,
}

/// One step of one micro-batch: attention, expert, network, waiting and skew add up to its total; straggling is part of the first two.
#[derive(Serialize)]
struct Step {
    step: u64,
    micro_batch: u8,
    rows: u32,
    attention_us: f64,
    expert_us: f64,
    network_us: f64,
    waiting_us: f64,
    skew_us: f64,
    straggling_us: f64,
    total_us: f64,
    /// The largest part: attention, experts, network, waiting, skew or straggler.
    bound: &'static str,
    /// The worker that most was waited for beyond the mean of its side.
    #[serde(skip_serializing_if = "Option::is_none")]
    straggler: Option<String>,
}

impl Answer {
    fn new(last: &Last, keeps: bool) -> Self {
        let zero = last.spans.iter().flat_map(|(_, spans)| spans);
        let zero = zero.map(|span| span.start).min().unwrap_or_default();
        let row = |span: &Span| {
            (
                span.activity.name(),
                span.micro_batch.0,
                span.step.0,
                span.layer.0,
                span.rows,
                us(span.start - zero),
                us(span.end.saturating_sub(span.start)),
            )
        };
        let workers = last.spans.iter().map(|(worker, spans)| Worker {
            worker: worker.to_string(),
            spans: spans.iter().map(row).collect(),
        });
        Answer {
            recorded: keeps && last.spans.iter().any(|(_, spans)| !spans.is_empty()),
            workers: workers.collect(),
            steps: last.steps.iter().map(Step::new).collect(),
        }
    }
}

impl Step {
    fn new(step: &Rally) -> Self {
        Step {
            step: step.step,
            micro_batch: step.micro_batch,
            rows: step.rows,
            attention_us: us(step.attention),
            expert_us: us(step.expert),
            network_us: us(step.network),
            waiting_us: us(step.waiting),
            skew_us: us(step.skew),
            straggling_us: us(step.straggling()),
            total_us: us(step.total),
            bound: step.bound().name(),
            straggler: step.straggler.map(|worker| worker.to_string()),
        }
    }
}

/// Microseconds, to the nanosecond.
fn us(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1e3
}
