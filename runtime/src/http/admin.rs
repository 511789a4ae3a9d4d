//! What an operator looks at: the cluster's state, the load of every expert, versions.

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use serde_json::{Value, json};
use volley_actors::{Status, WorkerState, WorkerWait};
use volley_transports::Role;

use super::error::ApiError;
use super::fields::{self, Fields};
use super::state::App;
use crate::build;

/// The frontend's books, and every worker with what it waits for.
#[derive(Serialize)]
pub(super) struct ClusterState {
    #[serde(flatten)]
    status: Status,
    model: Value,
    /// Micro-batches that may be in flight.
    micro_batches: u8,
    workers: Vec<Value>,
    /// Where members find each other, and what is known there; none in one process.
    #[serde(skip_serializing_if = "Option::is_none")]
    membership: Option<Value>,
}

pub(super) async fn state(State(app): State<App>) -> Result<Json<ClusterState>, ApiError> {
    let (status, workers) = tokio::join!(app.engine.client.status(), app.engine.cluster.workers());
    let status =
        status.ok_or_else(|| ApiError::unavailable("the cluster's frontend does not answer"))?;
    Ok(Json(ClusterState {
        status,
        model: json!({
            "id": app.engine.model,
            "layers": app.engine.spec.layers.len(),
            "experts": app.engine.spec.experts,
            "top_k": app.engine.spec.top_k,
            "context": app.engine.context,
            "chat": app.engine.chat.is_some(),
        }),
        micro_batches: app.engine.cluster.micro_batches(),
        workers: workers.iter().map(worker).collect(),
        membership: app.engine.office.as_ref().map(|office| {
            json!({"backend": office.membership.backend(), "view": office.membership.view()})
        }),
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
    let marks = state.startup.marks().into_iter();
    let startup: serde_json::Map<String, Value> = marks
        .map(|(name, at)| (name.to_owned(), json!(at.map(|at| at.as_secs_f64()))))
        .collect();
    json!({
        "worker": state.worker.to_string(),
        "present": state.present,
        "leaving": state.leaving,
        "startup_s": startup,
        "safe_to_stop": !state.present || (state.leaving && state.since.is_none()),
        "address": state.address,
        "since_epoch": state.since.map(|epoch| epoch.0),
        "waits": state.waits.as_ref().map(|waits| waits.iter().map(wait).collect::<Vec<_>>()),
    })
}

/// Takes a worker's work away, or has it used again. The answer is how its seat stands now; it may be stopped when it says `safe_to_stop`.
pub(super) async fn drain(
    State(app): State<App>,
    mut fields: Fields,
) -> Result<Json<Value>, ApiError> {
    let missing = |name: &str, what: &str| {
        ApiError::invalid(name, format!("`{name}` is missing; it must be {what}"))
    };
    let role = "`attention` or `expert`";
    let role = match fields.text("role")?.as_deref() {
        Some("attention") => Role::Attention,
        Some("expert") => Role::Expert,
        Some(other) => return Err(fields::wrong("role", &other.into(), role)),
        None => return Err(missing("role", role)),
    };
    let number = "the worker's number, from 0";
    let index = fields.integer("index", 0..=i128::from(u16::MAX))?;
    let index = index.ok_or_else(|| missing("index", number))? as u16;
    let drained = !fields.flag("undo")?.unwrap_or(false);
    let id = role.worker(index);
    let cluster = &app.engine.cluster;
    let refused = |reason| ApiError::invalid("index", reason);
    cluster.drain_worker(id, drained).await.map_err(refused)?;
    let workers = cluster.workers().await;
    let state = workers.iter().find(|state| state.worker == id);
    let state = state.ok_or_else(|| ApiError::unavailable("the cluster does not answer"))?;
    Ok(Json(worker(state)))
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
    Json(build::facts())
}

/// Rows computed since the start.
#[derive(Serialize)]
pub(super) struct ExpertLoad {
    layers: usize,
    experts: usize,
    /// By layer, then by expert.
    rows: Vec<Vec<u64>>,
}
