//! From the bytes of a request to typed fields, with the path of a wrong field in the error.
//!
//! A body is parsed once into JSON, and each group of fields is read from that by itself. `#[serde(flatten)]` would
//! be shorter, but it loses the path, and the path is what a client needs to find its mistake.

use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::header;
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::error::ApiError;

/// A parsed body.
#[derive(Clone, Debug)]
pub(crate) struct Fields(Value);

/// How much a body may be, and how long it may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BodyLimits {
    /// Bytes at most.
    pub(crate) bytes: usize,
    /// From the first to the last byte.
    pub(crate) time: Duration,
}

impl Fields {
    /// Reads and parses the body of `request`.
    pub(crate) async fn read(request: Request, limits: BodyLimits) -> Result<Self, ApiError> {
        let (parts, body) = request.into_parts();
        let media_type = parts.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        // Browsers send text and forms to any address without asking; JSON they ask for first.
        if !media_type.is_some_and(is_json) {
            return Err(ApiError::MediaType);
        }
        let announced =
            parts.headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        if announced.is_some_and(|length: usize| limits.bytes < length) {
            return Err(ApiError::BodyTooLarge(limits.bytes));
        }
        let bytes = tokio::time::timeout(limits.time, collect(body, limits.bytes))
            .await
            .map_err(|_| ApiError::BodyTimeout(limits.time.as_secs()))??;
        Self::parse(&bytes)
    }

    /// Parses a body.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(bytes) {
            Ok(value @ Value::Object(_)) => Ok(Self(value)),
            Ok(_) => Err(malformed("The request's body must be a JSON object.".to_owned())),
            Err(error) => Err(malformed(format!("The request's body is not valid JSON: {error}."))),
        }
    }

    /// Reads one group of fields; those it does not know are ignored.
    pub(crate) fn get<'de, T: Deserialize<'de>>(&'de self) -> Result<T, ApiError> {
        serde_path_to_error::deserialize(&self.0).map_err(|error| {
            let path = error.path().to_string();
            let reason = error.into_inner().to_string();
            let param = match (path.as_str(), missing_field(&reason)) {
                (".", Some(missing)) => missing.to_owned(),
                (path, Some(missing)) => format!("{path}.{missing}"),
                (path, None) => path.to_owned(),
            };
            if missing_field(&reason).is_some() {
                ApiError::Invalid {
                    message: format!("Missing required parameter: '{param}'."),
                    param: Some(param),
                    code: Some("missing_required_parameter"),
                }
            } else {
                ApiError::Invalid {
                    message: format!("Invalid value for '{param}': {reason}."),
                    param: Some(param),
                    code: Some("invalid_type"),
                }
            }
        })
    }

    /// The fields as they came.
    pub(crate) fn as_map(&self) -> &Map<String, Value> {
        self.0.as_object().expect("parse lets nothing but objects through")
    }
}

/// The type and its suffixed relatives, whatever parameters follow.
fn is_json(media_type: &str) -> bool {
    let essence = media_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence == "application/json" || essence.starts_with("application/") && essence.ends_with("+json")
}

async fn collect(body: Body, limit: usize) -> Result<Bytes, ApiError> {
    let mut stream = body.into_data_stream();
    let mut bytes = BytesMut::new();
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.map_err(|error| malformed(format!("The request's body broke off: {error}.")))?;
        if limit < bytes.len() + chunk.len() {
            return Err(ApiError::BodyTooLarge(limit));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes.freeze())
}

fn malformed(message: String) -> ApiError {
    ApiError::Invalid { message, param: None, code: Some("invalid_json") }
}

/// The name in serde's "missing field `…`".
fn missing_field(reason: &str) -> Option<&str> {
    reason.strip_prefix("missing field `")?.split('`').next()
}
