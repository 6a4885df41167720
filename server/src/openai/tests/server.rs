//! What surrounds the answers: probes, keys, places, disconnects, headers, metrics.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::memory_generator::MemoryGenerator;
use super::support::{Front, config, front, model_text, question};
use crate::http::AccessError;
use crate::openai::{App, Serving, app};

const CHAT: &str = "/v1/chat/completions";

#[tokio::test]
async fn probes_tell_a_dead_worker_from_a_server_that_cannot_serve() {
    let front = front(&["fine"]);
    let statuses = async || {
        let mut statuses = Vec::new();
        for path in ["/health", "/ready", "/ping", "/version", "/v1/models"] {
            statuses.push(front.get(path).await.status.as_u16());
        }
        statuses
    };
    assert_eq!(statuses().await, [200, 200, 200, 200, 200]);
    front.generator.health.lock().unwrap().workers[1].alive = false;
    assert_eq!(statuses().await, [503, 200, 200, 200, 200]);
    let health = front.get("/health").await.json();
    assert_eq!(health["workers"][1], json!({"name": "decode-0", "role": "decode", "alive": false}));
    front.generator.health.lock().unwrap().serving = Serving::No { reason: "draining".to_owned() };
    assert_eq!(statuses().await, [503, 503, 200, 200, 200]);
    let refused = front.post(CHAT, &question(json!({}))).await;
    assert_eq!(refused.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(refused.headers[header::RETRY_AFTER], "1");
}

#[tokio::test]
async fn models_are_listed_by_all_their_names() {
    let front = front(&["fine"]);
    let list = front.get("/v1/models").await.json();
    assert_eq!((&list["data"][0]["id"], &list["data"][1]["id"]), (&json!("tiny"), &json!("org/alias")));
    assert_eq!(list["data"][0]["max_model_len"], 128);
    assert_eq!(front.get("/v1/models/org/alias").await.json()["root"], "tiny");
    assert_eq!(front.get("/v1/models/gpt").await.status, StatusCode::NOT_FOUND);
    let answer = front.ask(CHAT, &question(json!({"model": "org/alias"}))).await;
    assert_eq!(answer["model"], "org/alias");
    assert_eq!(front.get("/version").await.json(), json!({"version": "1.2.3"}));
}

#[tokio::test]
async fn keys_guard_everything_but_probes() {
    let mut config = config();
    config.access.api_keys = vec!["first".to_owned(), "second".to_owned()];
    let front = Front::new(config, model_text(&[]), |generator| generator, &["fine"]);
    for path in ["/health", "/ready", "/ping", "/version", "/metrics"] {
        assert_eq!(front.get(path).await.status, StatusCode::OK, "{path}");
    }
    for path in ["/v1/models", "/v1/models/tiny"] {
        assert_eq!(front.get(path).await.status, StatusCode::UNAUTHORIZED, "{path}");
    }
    for path in [CHAT, "/v1/completions", "/tokenize", "/detokenize"] {
        let answer = front.post(path, &json!({})).await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{path}");
        assert_eq!(answer.json()["error"]["code"], "invalid_api_key", "{path}");
    }
    let rows = [
        ("Bearer first", StatusCode::OK),
        ("bearer second", StatusCode::OK),
        ("Bearer firs", StatusCode::UNAUTHORIZED),
        ("Bearer firstt", StatusCode::UNAUTHORIZED),
        ("Bearer ", StatusCode::UNAUTHORIZED),
        ("Basic first", StatusCode::UNAUTHORIZED),
    ];
    for (value, status) in rows {
        let request =
            Request::get("/v1/models").header(header::AUTHORIZATION, value).body(Body::empty()).unwrap();
        assert_eq!(front.send(request).await.status, status, "{value}");
    }
}

#[tokio::test]
async fn requests_beyond_the_places_are_refused_until_one_is_free() {
    let mut config = config();
    config.max_requests = 3;
    let front = Front::new(config, model_text(&[]), MemoryGenerator::held_back, &["fine"]);
    let front = Arc::new(front);
    let waiting = {
        let front = Arc::clone(&front);
        tokio::spawn(async move { front.post(CHAT, &question(json!({"n": 3}))).await.status })
    };
    front.generator.tally.until_open(3).await;
    let refused = front.post(CHAT, &question(json!({}))).await;
    assert_eq!(refused.status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(refused.headers[header::RETRY_AFTER], "1");
    assert_eq!(refused.json()["error"]["type"], "rate_limit_error");
    front.generator.pace.add_permits(1000);
    assert_eq!(waiting.await.unwrap(), StatusCode::OK);
    assert_eq!(front.post(CHAT, &question(json!({}))).await.status, StatusCode::OK);
}

/// Serves `front` on a port of its own, sends `body`, and returns the open connection.
async fn connected(front: &Front, body: &str) -> (TcpStream, tokio::task::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = front.router.clone();
    let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    let mut client = TcpStream::connect(address).await.unwrap();
    let length = body.len();
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}"
    );
    client.write_all(format!("{head}\r\n\r\n{body}").as_bytes()).await.unwrap();
    (client, server)
}

#[tokio::test]
async fn a_client_that_goes_away_cancels_its_answers() {
    for stream in [false, true] {
        let front = Front::new(config(), model_text(&[]), MemoryGenerator::held_back, &["abcdefgh"]);
        let (mut client, server) =
            connected(&front, &question(json!({"stream": stream, "n": 2})).to_string()).await;
        front.generator.tally.until_open(2).await;
        if stream {
            front.generator.pace.add_permits(3);
            let mut received = [0; 64];
            client.read_exact(&mut received).await.unwrap();
        }
        drop(client);
        front.generator.tally.until_open(0).await;
        assert_eq!(front.generator.tally.cancelled.load(Ordering::SeqCst), 2, "stream: {stream}");
        let text = front.get("/metrics").await.text;
        let aborted = r#"vllm:request_success_total{model_name="tiny",engine="0",finished_reason="abort"} 2"#;
        assert!(text.contains(aborted), "{text}");
        server.abort();
    }
}

#[tokio::test]
async fn a_stream_is_sent_token_by_token() {
    let front = Front::new(config(), model_text(&[]), MemoryGenerator::held_back, &["abc"]);
    let (mut client, server) = connected(&front, &question(json!({"stream": true})).to_string()).await;
    let mut received = String::new();
    for expected in [r#""content":"a""#, r#""content":"b""#, r#""content":"c""#] {
        assert!(!received.contains(expected));
        front.generator.pace.add_permits(1);
        while !received.contains(expected) {
            let mut buffer = [0; 4096];
            let length = client.read(&mut buffer).await.unwrap();
            assert_ne!(length, 0, "{received}");
            received.push_str(std::str::from_utf8(&buffer[..length]).unwrap());
        }
    }
    server.abort();
}

#[tokio::test]
async fn requests_keep_their_name_or_get_one() {
    let front = front(&["fine"]);
    let named = Request::get("/v1/models").header("x-request-id", "mine").body(Body::empty()).unwrap();
    assert_eq!(front.send(named).await.headers["x-request-id"], "mine");
    let nameless = front.get("/v1/models").await;
    assert_eq!(nameless.headers["x-request-id"].len(), 32);
}

#[tokio::test]
async fn pages_of_other_origins_may_call_only_where_allowed() {
    let preflight = || {
        let request = Request::options(CHAT).header(header::ORIGIN, "https://a.example");
        let request = request.header(header::ACCESS_CONTROL_REQUEST_METHOD, "POST");
        request.header(header::ACCESS_CONTROL_REQUEST_HEADERS, "authorization").body(Body::empty()).unwrap()
    };
    let closed = front(&["fine"]).send(preflight()).await;
    assert!(!closed.headers.contains_key(header::ACCESS_CONTROL_ALLOW_ORIGIN));
    let mut open = config();
    open.access.api_keys = vec!["key".to_owned()];
    open.access.origins = vec!["https://a.example".to_owned()];
    open.access.methods = vec!["POST".to_owned()];
    open.access.headers = vec!["authorization".to_owned()];
    let answer = Front::new(open, model_text(&[]), |generator| generator, &["fine"]).send(preflight()).await;
    assert_eq!(answer.status, StatusCode::OK, "browsers ask without a key");
    assert_eq!(answer.headers[header::ACCESS_CONTROL_ALLOW_ORIGIN], "https://a.example");
    let mut wrong = config();
    wrong.access.origins = vec!["a.example".to_owned()];
    let generator = front(&[]).generator;
    let metrics = Arc::new(crate::metrics::Metrics::new("tiny"));
    let outcome = app(App::new(wrong, model_text(&[]), generator, metrics));
    assert_eq!(outcome.unwrap_err(), AccessError::Origin("a.example".to_owned()));
}

#[tokio::test]
async fn metrics_count_what_was_answered() {
    let front = front(&["abc"]);
    front.ask(CHAT, &question(json!({"n": 2}))).await;
    front.post(CHAT, &question(json!({"temperature": 9}))).await;
    let answer = front.get("/metrics").await;
    assert!(answer.headers[header::CONTENT_TYPE].to_str().unwrap().starts_with("text/plain"));
    for line in [
        r#"vllm:generation_tokens_total{model_name="tiny",engine="0"} 8"#,
        r#"vllm:request_success_total{model_name="tiny",engine="0",finished_reason="stop"} 2"#,
        r#"vllm:e2e_request_latency_seconds_count{model_name="tiny",engine="0"} 2"#,
        r#"vllm:time_to_first_token_seconds_count{model_name="tiny",engine="0"} 2"#,
        r#"vllm:inter_token_latency_seconds_count{model_name="tiny",engine="0"} 6"#,
        r#"vllm:request_params_n_count{model_name="tiny",engine="0"} 1"#,
    ] {
        assert!(answer.text.contains(line), "{line}\n{}", answer.text);
    }
}

#[tokio::test]
async fn a_long_text_has_the_tokens_that_it_would_have_if_it_were_short() {
    let front = front(&["fine"]);
    let long = "the ".repeat(2000);
    let answer = front.ask("/tokenize", &json!({"prompt": long})).await;
    let expected = crate::tokenizer::tests::byte_level().encode(&long, true).unwrap();
    assert_eq!(answer["tokens"], json!(expected));
}
