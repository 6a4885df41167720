//! What the API says when it cannot do what it was asked: one variant for each thing a client does next.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::generation::GenerationError;

/// A request that failed. `param` is the path of the field to blame, as in `messages[0].content`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ApiError {
    /// The request is wrong and will stay so.
    #[error("{message}")]
    Invalid {
        /// What is wrong with it.
        message: String,
        /// The field.
        param: Option<String>,
        /// A word for programs.
        code: Option<&'static str>,
    },
    /// The key is missing or wrong.
    #[error("{0}")]
    Unauthorized(&'static str),
    /// No such model here.
    #[error("The model `{0}` does not exist or is not served here.")]
    ModelNotFound(String),
    /// No such page here.
    #[error("There is nothing at {0}.")]
    NotFound(String),
    /// The page is there, but not for this method.
    #[error("{0} does not take this method.")]
    MethodNotAllowed(String),
    /// The body did not arrive in time.
    #[error("The request's body did not arrive within {0} s.")]
    BodyTimeout(u64),
    /// The body is too long.
    #[error("The request's body is longer than the limit of {0} bytes.")]
    BodyTooLarge(usize),
    /// The body is not JSON by its own word.
    #[error("The request's body must be JSON, with the header 'Content-Type: application/json'.")]
    MediaType,
    /// Too much to do; later there may be room.
    #[error("{message}")]
    Busy {
        /// What is full.
        message: String,
        /// Seconds until it is worth trying again.
        retry_after_s: u32,
    },
    /// Nobody can serve now.
    #[error("{0}")]
    Unavailable(String),
    /// Our fault.
    #[error("{0}")]
    Internal(String),
}

/// The body of every error.
#[derive(Debug, Serialize)]
pub(crate) struct ErrorBody<'a> {
    error: ErrorFields<'a>,
}

#[derive(Debug, Serialize)]
struct ErrorFields<'a> {
    message: String,
    r#type: &'static str,
    param: Option<&'a str>,
    code: Option<&'static str>,
}

impl ApiError {
    /// A request whose `param` is wrong.
    pub(crate) fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid { message: message.into(), param: Some(param.into()), code: None }
    }

    /// A request that asks in `param` for what cannot be done here.
    pub(crate) fn unsupported(param: &str, message: impl Into<String>) -> Self {
        Self::Invalid {
            message: message.into(),
            param: Some(param.to_owned()),
            code: Some("unsupported_value"),
        }
    }

    /// The HTTP status.
    pub(crate) const fn status(&self) -> StatusCode {
        match self {
            Self::Invalid { .. } => StatusCode::BAD_REQUEST,
            Self::Unauthorized(_) => StatusCode::UNAUTHORIZED,
            Self::ModelNotFound(_) | Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed(_) => StatusCode::METHOD_NOT_ALLOWED,
            Self::BodyTimeout(_) => StatusCode::REQUEST_TIMEOUT,
            Self::BodyTooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::MediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Busy { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The body, which is also what a stream says when it breaks.
    pub(crate) fn body(&self) -> ErrorBody<'_> {
        let r#type = match self {
            Self::Busy { .. } => "rate_limit_error",
            Self::Unavailable(_) | Self::Internal(_) => "server_error",
            _ => "invalid_request_error",
        };
        let (param, code) = match self {
            Self::Invalid { param, code, .. } => (param.as_deref(), *code),
            Self::Unauthorized(_) => (None, Some("invalid_api_key")),
            Self::ModelNotFound(_) => (Some("model"), Some("model_not_found")),
            Self::NotFound(_) => (None, Some("not_found")),
            Self::MethodNotAllowed(_) => (None, Some("method_not_allowed")),
            Self::BodyTimeout(_) => (None, Some("body_timeout")),
            Self::BodyTooLarge(_) => (None, Some("body_too_large")),
            Self::MediaType => (None, Some("unsupported_media_type")),
            Self::Busy { .. } => (None, Some("rate_limit_exceeded")),
            Self::Unavailable(_) => (None, Some("service_unavailable")),
            Self::Internal(_) => (None, Some("internal_error")),
        };
        ErrorBody { error: ErrorFields { message: self.to_string(), r#type, param, code } }
    }

    const fn retry_after_s(&self) -> Option<u32> {
        match self {
            Self::Busy { retry_after_s, .. } => Some(*retry_after_s),
            Self::Unavailable(_) => Some(1),
            _ => None,
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status(), Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after_s() {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if matches!(self, Self::Unauthorized(_)) {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<GenerationError> for ApiError {
    fn from(error: GenerationError) -> Self {
        let message = error.to_string();
        match error {
            GenerationError::Busy { retry_after_s } => Self::Busy { message, retry_after_s },
            GenerationError::Unavailable(_) => Self::Unavailable(message),
            GenerationError::Internal(_) => Self::Internal(message),
        }
    }
}
