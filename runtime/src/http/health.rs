//! Liveness, readiness and progress, which are three questions.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::json;

use super::pulse;
use super::state::App;

/// Requests that see no step end for this long are stalled. A step takes milliseconds, a large prefill seconds.
const STALLED_AFTER: Duration = Duration::from_secs(30);

/// The process lives, or this would not be answered.
pub(super) async fn live() -> &'static str {
    "ok\n"
}

/// Whether a new request would be taken.
pub(super) async fn ready(State(app): State<App>) -> Response {
    let pulse = app.pulse.read();
    let reason = if pulse.draining {
        Some("the server is draining and takes no new requests".to_owned())
    } else if pulse.silent {
        Some(format!(
            "the cluster's frontend has not answered for {:.1} s",
            pulse.silence.as_secs_f64()
        ))
    } else {
        None
    };
    match reason {
        None => Json(json!({"ready": true})).into_response(),
        Some(reason) => (
            StatusCode::SERVICE_UNAVAILABLE,
            Json(json!({"ready": false, "reason": reason})),
        )
            .into_response(),
    }
}

/// Whether steps come to their end while there are requests.
pub(super) async fn progress(State(app): State<App>) -> Response {
    let pulse = app.pulse.read();
    let mut state = pulse.progress.state(pulse.still, STALLED_AFTER);
    if pulse.silent {
        state = pulse::State::Stalled;
    }
    let status = if state == pulse::State::Stalled {
        StatusCode::SERVICE_UNAVAILABLE
    } else {
        StatusCode::OK
    };
    let body = ProgressBody {
        state,
        live: pulse.progress.live,
        waiting: pulse.progress.waiting,
        steps: pulse.progress.steps,
        seconds_without_step: if pulse.progress.live == 0 {
            0.0
        } else {
            pulse.still.as_secs_f64()
        },
        stalled_after_seconds: STALLED_AFTER.as_secs_f64(),
        seconds_since_answer: pulse.silence.as_secs_f64(),
    };
    (status, Json(body)).into_response()
}

#[derive(Serialize)]
struct ProgressBody {
    state: pulse::State,
    /// Requests that have not ended, and those of them without a place on a worker.
    live: usize,
    waiting: usize,
    /// Steps that have ended since the start.
    steps: u64,
    /// How long requests have been waiting for a step to end.
    seconds_without_step: f64,
    /// From here on that is a stall.
    stalled_after_seconds: f64,
    /// How long ago the cluster's frontend said all this.
    seconds_since_answer: f64,
}
