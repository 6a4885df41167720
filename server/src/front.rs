//! The HTTP front end as a running thing: bound early, so that probes are answered while workers load.

use std::future::IntoFuture;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::serve::{Listener, ListenerExt};
use tidemill_engine::models::ModelSpec;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::chat_template::system_clock;
use crate::flags::{FrontFlags, ModelFlags};
use crate::http::Access;
use crate::metrics::Metrics;
use crate::model_source::ResolvedModel;
use crate::openai::{self, App, AppConfig, BodyLimits, ModelText};
use crate::router::{Cluster, Router, SharedRouter};
use crate::shutdown::Signals;

/// A front end that listens.
#[derive(Debug)]
pub(crate) struct Front {
    /// Where.
    pub(crate) address: SocketAddr,
    names: Vec<String>,
    closed: CancellationToken,
    server: JoinHandle<std::io::Result<()>>,
}

impl Front {
    /// Listens and serves. `names` are what the model is called in the API.
    pub(crate) async fn start(
        flags: &FrontFlags,
        names: Vec<String>,
        text: ModelText,
        cluster: &Arc<Cluster>,
        metrics: Arc<Metrics>,
    ) -> anyhow::Result<Self> {
        let api_keys = api_keys(flags)?;
        let listener = TcpListener::bind((flags.host.as_str(), flags.port)).await.with_context(|| {
            format!("cannot listen on {}:{} (--port 0 picks a free port)", flags.host, flags.port)
        })?;
        let address = listener.local_addr()?;
        if flags.is_open() && api_keys.is_empty() {
            tracing::warn!(%address, "anybody who reaches this address can use it: set --api-key");
        }
        let config = AppConfig {
            model_names: names.clone(),
            version: crate::VERSION,
            max_requests: flags.max_requests,
            body: BodyLimits {
                bytes: usize::try_from(flags.max_body_size.0).context("--max-body-size")?,
                time: BODY_TIME,
            },
            access: Access {
                api_keys,
                origins: flags.cors_allowed_origins.clone(),
                methods: flags.cors_allowed_methods.clone(),
                headers: flags.cors_allowed_headers.clone(),
            },
        };
        let router = Arc::new(Router::new(Arc::clone(cluster), Arc::clone(&metrics)));
        let app = openai::app(App::new(config, text, Arc::new(SharedRouter(router)), metrics))?;
        let closed = CancellationToken::new();
        let server = axum::serve(prompt_listener(listener), app)
            .with_graceful_shutdown(closed.clone().cancelled_owned());
        let server = tokio::spawn(server.into_future());
        Ok(Self { address, names, closed, server })
    }

    /// Tells a person that it serves, and how to use it.
    #[expect(clippy::print_stdout, reason = "the banner is the program's output")]
    pub(crate) fn print_banner(&self, workers: &str) {
        let (url, name) = (format!("http://{}", self.address), &self.names[0]);
        println!(
            "\nTidemill {version} serves {name} with {workers}\n\n\
             \x20 OpenAI API  {url}/v1\n\
             \x20 API docs    {url}/docs\n\
             \x20 metrics     {url}/metrics\n\
             \x20 health      {url}/health\n\n\
             \x20 curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n\
             \x20   -d '{{\"messages\": [{{\"role\": \"user\", \"content\": \"What is 7 + 5?\"}}]}}'\n\n\
             \x20 tidemill chat --url {url}\n",
            version = crate::VERSION,
        );
    }

    /// Waits for a signal; then refuses what is new and lets what runs finish, within `limit` or until a second signal.
    /// Returns the program's exit code.
    pub(crate) async fn until_told(
        &self,
        signals: &mut Signals,
        cluster: &Cluster,
        limit: Duration,
    ) -> ExitCode {
        let signal = signals.next().await.name();
        let limit_s = limit.as_secs();
        tracing::info!(signal, limit_s, "finishing what runs; a second signal ends at once");
        signals.grace(limit, cluster.drain()).await
    }

    /// Stops listening and closes connections; those with a last word to send get a moment.
    pub(crate) async fn close(self) {
        self.closed.cancel();
        let _ = tokio::time::timeout(LAST_WORDS, self.server).await;
    }
}

/// Names in the API: what flags say, or the model's own.
pub(crate) fn served_names(flags: &ModelFlags, model: &ResolvedModel) -> Vec<String> {
    if flags.served_model_name.is_empty() {
        vec![model.name.clone()]
    } else {
        flags.served_model_name.clone()
    }
}

/// Reads tokenizer and chat template of a model that can be served: one that cannot is refused before anything starts.
pub(crate) fn load_text(model: &ResolvedModel) -> anyhow::Result<ModelText> {
    ModelSpec::read(&model.source)?;
    Ok(ModelText::load(&model.source, system_clock())?)
}

/// Connections whose small messages leave at once: a token of a stream does not wait for the acknowledgement of the one
/// before it.
fn prompt_listener(listener: TcpListener) -> impl Listener<Io = TcpStream, Addr = SocketAddr> {
    listener.tap_io(|connection| {
        if let Err(error) = connection.set_nodelay(true) {
            tracing::debug!(%error, "a connection stays slow for small messages");
        }
    })
}

fn api_keys(flags: &FrontFlags) -> anyhow::Result<Vec<String>> {
    let mut keys = flags.api_key.clone();
    if let Some(path) = &flags.api_key_file {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        keys.extend(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned));
        anyhow::ensure!(!keys.is_empty(), "{} has no key in it", path.display());
    }
    Ok(keys)
}

/// How long a client may take to send a request's body.
const BODY_TIME: Duration = Duration::from_secs(30);
const LAST_WORDS: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn tokens_do_not_wait_for_acknowledgements() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (accepted, _) = prompt_listener(listener).accept().await;
        assert!(accepted.nodelay().unwrap());
    }
}
