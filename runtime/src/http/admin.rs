//! What an operator looks at: the cluster's state, the load of every expert, versions.

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use serde_json::{Value, json};
use volley_actors::{Status, WorkerState, WorkerWait};

use super::error::ApiError;
use super::state::App;

/// The frontend's books, and every worker with what it waits for.
#[derive(Serialize)]
pub(super) struct ClusterState {
    #[serde(flatten)]
    status: Status,
    workers: Vec<Value>,
}

pub(super) async fn state(State(app): State<App>) -> Result<Json<ClusterState>, ApiError> {
    let (status, workers) = tokio::join!(app.engine.client.status(), app.engine.cluster.workers());
    let status =
        status.ok_or_else(|| ApiError::unavailable("the cluster's frontend does not answer"))?;
    Ok(Json(ClusterState {
        status,
        workers: workers.iter().map(worker).collect(),
    }))
}

fn worker(state: &WorkerState) -> Value {
    let wait = |wait: &WorkerWait| {
        let peers: Vec<String> = wait.peers.iter().map(ToString::to_string).collect();
        json!({
            "for": peers,
            "step": wait.step.0,
            "layer": wait.layer.0,
            "micro_batch": wait.micro_batch.0,
            "seconds": wait.age.as_secs_f64(),
        })
    };
    json!({
        "worker": state.worker.to_string(),
        "present": state.present,
        "address": state.address,
        "since_epoch": state.since.map(|epoch| epoch.0),
        "waits": state.waits.as_ref().map(|waits| waits.iter().map(wait).collect::<Vec<_>>()),
    })
}

pub(super) async fn experts(State(app): State<App>) -> Json<ExpertLoad> {
    let rows = app.engine.cluster.expert_load();
    Json(ExpertLoad {
        layers: rows.len(),
        experts: rows.first().map_or(0, Vec::len),
        rows,
    })
}

pub(super) async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

pub(super) async fn index() -> &'static str {
    "Volley: an OpenAI-compatible API is under /v1, its description at /openapi.json, metrics at /metrics.\n"
}

/// Rows computed since the start.
#[derive(Serialize)]
pub(super) struct ExpertLoad {
    layers: usize,
    experts: usize,
    /// By layer, then by expert.
    rows: Vec<Vec<u64>>,
}
