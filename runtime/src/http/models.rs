//! `GET /v1/models` and `GET /v1/models/{id}`.

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;

use super::error::ApiError;
use super::state::App;

pub(super) async fn list(State(app): State<App>) -> Json<ModelList> {
    Json(ModelList {
        object: "list",
        data: vec![Model::served(&app)],
    })
}

pub(super) async fn one(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Result<Json<Model>, ApiError> {
    if id == app.engine.model {
        Ok(Json(Model::served(&app)))
    } else {
        Err(ApiError::no_such_model(&id, &app.engine.model))
    }
}

#[derive(Serialize)]
pub(super) struct ModelList {
    object: &'static str,
    data: Vec<Model>,
}

#[derive(Serialize)]
pub(super) struct Model {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    /// Longest sequence, prompt and output together, in tokens.
    max_model_len: u32,
}

impl Model {
    fn served(app: &App) -> Self {
        let engine = &app.engine;
        Model {
            id: engine.model.clone(),
            object: "model",
            created: engine.created,
            owned_by: "volley",
            max_model_len: engine.context,
        }
    }
}
