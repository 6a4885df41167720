//! Pages about the server itself: what it serves, whether it lives, what it counts.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::App;
use super::error::ApiError;
use super::generator::Serving;

/// `/v1/models`.
pub(crate) async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    let models: Vec<Value> = app.config.model_names.iter().map(|name| model_card(&app, name)).collect();
    Json(json!({"object": "list", "data": models}))
}

/// `/v1/models/{name}`.
pub(crate) async fn model(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    app.check_model(Some(&name))?;
    Ok(Json(model_card(&app, &name)))
}

fn model_card(app: &App, name: &str) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": app.started_s,
        "owned_by": "tidemill",
        "root": app.config.model_names.first(),
        "parent": null,
        "max_model_len": app.max_model_len().ok(),
    })
}

/// `/health`: whether every worker lives. A server that lost one may still answer, but wants looking after.
pub(crate) async fn health(State(app): State<Arc<App>>) -> Response {
    let health = app.generator.health();
    let all_alive = health.workers.iter().all(|worker| worker.alive);
    let workers: Vec<Value> = health
        .workers
        .iter()
        .map(|worker| json!({"name": worker.name, "role": worker.role, "alive": worker.alive}))
        .collect();
    let (status, word) = if all_alive {
        (StatusCode::OK, "ok")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "a worker is dead")
    };
    (status, Json(json!({"status": word, "workers": workers}))).into_response()
}

/// `/ready`: whether a request sent now would be served.
pub(crate) async fn ready(State(app): State<Arc<App>>) -> Response {
    match app.generator.health().serving {
        Serving::Yes { .. } => (StatusCode::OK, Json(json!({"status": "ready"}))).into_response(),
        Serving::No { reason } => {
            (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"status": "not ready", "reason": reason})))
                .into_response()
        }
    }
}

/// `/ping`: whether this process answers at all.
pub(crate) async fn ping() -> StatusCode {
    StatusCode::OK
}

/// `/version`.
pub(crate) async fn version(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({"version": app.config.version}))
}

/// `/metrics`.
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], app.metrics.render())
}
