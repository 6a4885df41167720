//! What surrounds every handler: who may call, request ids, the access log, browsers.
//!
//! The order, from outside: request id, access log, CORS, key. CORS comes before the key because browsers ask for
//! permission without one.

use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use subtle::{Choice, ConstantTimeEq};
use tower_http::cors::{AllowHeaders, AllowMethods, AllowOrigin, Any, CorsLayer};
use tower_http::request_id::{MakeRequestId, PropagateRequestIdLayer, RequestId, SetRequestIdLayer};

use crate::openai::ApiError;

/// Who may use the server. The default lets every program in, and no page of another origin.
#[derive(Clone, Default)]
pub(crate) struct Access {
    /// Keys, one of which a client must send; empty lets everybody in.
    pub(crate) api_keys: Vec<String>,
    /// Origins whose pages may call; `*` for all.
    pub(crate) origins: Vec<String>,
    /// Methods that they may use; `*` for all.
    pub(crate) methods: Vec<String>,
    /// Headers that they may send; `*` for all.
    pub(crate) headers: Vec<String>,
}

/// A setting of [`Access`] that means nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AccessError {
    /// Not an origin.
    #[error("'{0}' is not an origin such as https://example.org")]
    Origin(String),
    /// Not a method.
    #[error("'{0}' is not an HTTP method")]
    Method(String),
    /// Not a header's name.
    #[error("'{0}' is not the name of an HTTP header")]
    Header(String),
}

/// Lets only clients with a key reach `routes`.
pub(crate) fn guard<S: Clone + Send + Sync + 'static>(routes: Router<S>, access: Access) -> Router<S> {
    if access.api_keys.is_empty() {
        return routes;
    }
    routes.route_layer(middleware::from_fn_with_state(Arc::new(access.api_keys), check_key))
}

/// Adds what all routes have.
pub(crate) fn wrap(routes: Router, access: &Access) -> Result<Router, AccessError> {
    let routes = match access.cors()? {
        Some(cors) => routes.layer(cors),
        None => routes,
    };
    Ok(routes
        .layer(middleware::from_fn(log))
        .layer(PropagateRequestIdLayer::x_request_id())
        .layer(SetRequestIdLayer::x_request_id(RandomId)))
}

impl Access {
    fn cors(&self) -> Result<Option<CorsLayer>, AccessError> {
        if self.origins.is_empty() {
            return Ok(None);
        }
        let any = |list: &[String]| list.iter().any(|item| item == "*");
        let origins = parsed(&self.origins, AccessError::Origin, |origin| {
            origin.contains("://").then(|| HeaderValue::from_str(origin).ok())?
        });
        let methods =
            parsed(&self.methods, AccessError::Method, |method| Method::from_bytes(method.as_bytes()).ok());
        let headers = parsed(&self.headers, AccessError::Header, |name| HeaderName::try_from(name).ok());
        let cors = CorsLayer::new()
            .allow_origin(if any(&self.origins) {
                AllowOrigin::from(Any)
            } else {
                AllowOrigin::list(origins?)
            })
            .allow_methods(if any(&self.methods) {
                AllowMethods::from(Any)
            } else {
                AllowMethods::list(methods?)
            })
            .allow_headers(if any(&self.headers) {
                AllowHeaders::from(Any)
            } else {
                AllowHeaders::list(headers?)
            });
        Ok(Some(cors))
    }
}

impl std::fmt::Debug for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let keys = self.api_keys.len();
        f.debug_struct("Access")
            .field("api_keys", &keys)
            .field("origins", &self.origins)
            .finish_non_exhaustive()
    }
}

fn parsed<T>(
    texts: &[String],
    error: impl Fn(String) -> AccessError,
    parse: impl Fn(&str) -> Option<T>,
) -> Result<Vec<T>, AccessError> {
    texts.iter().map(|text| parse(text).ok_or_else(|| error(text.clone()))).collect()
}

async fn check_key(State(keys): State<Arc<Vec<String>>>, request: Request, next: Next) -> Response {
    match bearer(request.headers()) {
        None => ApiError::Unauthorized("An API key is needed: send the header 'Authorization: Bearer KEY'.")
            .into_response(),
        Some(key) if is_known(&keys, key) => next.run(request).await,
        Some(_) => ApiError::Unauthorized("The API key is wrong.").into_response(),
    }
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, key) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
}

/// Compares with each key to its last byte, so that the time tells nothing but lengths.
fn is_known(keys: &[String], key: &str) -> bool {
    let known = keys.iter().map(|known| known.as_bytes().ct_eq(key.as_bytes()));
    known.fold(Choice::from(0), |any, this| any | this).into()
}

/// One line for each request, but not for the ones that probes repeat for ever.
async fn log(request: Request, next: Next) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let id = request.extensions().get::<RequestId>().cloned();
    let begun = Instant::now();
    let response = next.run(request).await;
    if !QUIET.contains(&path.as_str()) {
        let id = id.as_ref().and_then(|id| id.header_value().to_str().ok()).unwrap_or_default();
        let (status, elapsed_ms) = (response.status().as_u16(), begun.elapsed().as_millis());
        // For a stream, the time until it began.
        tracing::info!(target: "tidemill::access", %method, path, status, elapsed_ms, request_id = id);
    }
    response
}

/// Names requests that come without a name.
#[derive(Clone, Copy, Debug)]
struct RandomId;

impl MakeRequestId for RandomId {
    fn make_request_id<B>(&mut self, _: &axum::http::Request<B>) -> Option<RequestId> {
        let id = format!("{:032x}", rand::random::<u128>());
        Some(RequestId::new(HeaderValue::try_from(id).expect("hexadecimal digits are a header value")))
    }
}

const QUIET: &[&str] = &["/health", "/ready", "/ping", "/metrics"];
