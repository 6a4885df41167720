//! `/docs`, a page to read about the API and to try it, and `/openapi.json`, the description that it is made from.
//!
//! Both are open: they say what a server can do, not what it serves. The page loads nothing from elsewhere.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{Html, IntoResponse};
use serde_json::Value;

use super::App;

/// `/docs`.
pub(crate) async fn page() -> impl IntoResponse {
    ([(header::CONTENT_SECURITY_POLICY, POLICY)], Html(PAGE))
}

/// `/openapi.json` (OpenAPI 3.1).
pub(crate) async fn description(State(app): State<Arc<App>>) -> Json<Value> {
    Json(describe(app.config.version))
}

/// The description, as that of `version`.
pub(super) fn describe(version: &str) -> Value {
    let mut description: Value = serde_json::from_str(DESCRIPTION).expect("tests read it");
    description["info"]["version"] = version.into();
    description
}

const PAGE: &str = include_str!("docs/docs.html");
const DESCRIPTION: &str = include_str!("docs/openapi.json");
/// Nothing but the page's own script and style, and nobody to talk to but this server.
const POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; \
                      connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
