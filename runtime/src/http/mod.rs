//! The HTTP API: OpenAI's chat and completions, what operators need beside it, and nothing that waits for ever.
//!
//! A request goes [`routes`] -> [`body`] -> [`fields`] -> [`generation`] with [`chat`] or [`completions`] -> [`choices`] -> an answer at once or a
//! [`stream`]. Whatever goes wrong on the way becomes an [`error`].
//!
//! The API runs on threads of its own, so a flood of requests costs the workers nothing but the processor.

mod admin;
mod answer;
mod body;
mod chat;
mod choices;
mod completions;
mod error;
mod fields;
mod generation;
mod health;
mod ids;
mod logprobs;
pub mod metrics;
mod models;
mod observe;
mod openapi;
mod pulse;
mod routes;
mod server;
mod state;
mod stream;
mod tokenize;

use std::future::Future;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;
use std::io;

use metrics_exporter_prometheus::PrometheusHandle;

use self::pulse::Pulse;
use self::state::App;
pub use self::state::HttpOptions;
use crate::engine::Engine;

/// Threads that answer requests.
const THREADS: usize = 2;
/// Threads that render templates and tokenise, beside these.
const BLOCKING_THREADS_MAX: usize = 2;
/// How often histograms are emptied into their buckets, lest they grow while nobody reads them.
const METRICS_UPKEEP: Duration = Duration::from_secs(5);

/// Serves the API until `shutdown`, then takes no new requests, lets those under way finish within the time that the options give, and returns.
/// Blocks the calling thread; the requests run on a tokio runtime of their own, on which `shutdown` is polled too.
///
/// # Errors
/// When the listener or the threads cannot be used.
pub fn serve(
    engine: Arc<Engine>,
    listener: TcpListener,
    options: HttpOptions,
    metrics: PrometheusHandle,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .thread_name("http")
        .enable_all()
        .build()?;
    listener.set_nonblocking(true)?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        self::metrics::register();
        let pulse = Pulse::new();
        tokio::spawn(pulse.clone().watch(engine.client.clone()));
        tokio::spawn(upkeep(metrics.clone()));
        let client = engine.client.clone();
        let app = App { engine, options: Arc::new(options), metrics, pulse: pulse.clone() };
        let drain_timeout = app.options.drain_timeout;
        let stop = async {
            shutdown.await;
            pulse.stop();
            client.drain().await;
        };
        server::run(listener, routes::router(app), drain_timeout, stop).await;
        Ok(())
    })
}

async fn upkeep(metrics: PrometheusHandle) {
    loop {
        tokio::time::sleep(METRICS_UPKEEP).await;
        metrics.run_upkeep();
    }
}
