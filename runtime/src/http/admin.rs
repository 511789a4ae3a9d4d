//! What an operator looks at: the cluster's state, the load of every expert, versions.

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use serde_json::{Value, json};
use volley_actors::Status;

use super::error::ApiError;
use super::state::App;

pub(super) async fn state(State(app): State<App>) -> Result<Json<Status>, ApiError> {
    let status = app.engine.client.status().await;
    status
        .map(Json)
        .ok_or_else(|| ApiError::unavailable("the cluster's frontend does not answer"))
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
