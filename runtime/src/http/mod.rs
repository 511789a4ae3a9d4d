//! The HTTP API: OpenAI's chat and completions, what operators need beside it, and nothing that waits for ever.
//!
//! A request goes `routes` -> `body` -> `fields` -> `generation` with `chat` or `completions` -> `choices` -> an answer at once or a `stream`.
//! Whatever goes wrong on the way becomes an `error`.
//!
//! The API runs on threads of its own, so a flood of requests costs the workers nothing but the processor.

mod admin;
mod answer;
mod body;
mod chat;
mod choices;
mod completions;
mod encode;
mod error;
mod fields;
mod generation;
mod health;
mod holding;
mod ids;
mod logprobs;
pub mod metrics;
mod models;
mod observe;
mod openapi;
mod page;
mod places;
mod pulse;
mod routes;
pub mod server;
mod state;
mod stream;
mod timeline;
mod tokenize;

use std::future::Future;
use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use metrics_exporter_prometheus::PrometheusHandle;
use tokio::task::JoinSet;

pub use self::server::Limits;
use self::state::App;
pub use self::state::HttpOptions;
use crate::engine::Engine;

/// How often histograms are emptied into their buckets, lest they grow while nobody reads them.
const METRICS_UPKEEP: Duration = Duration::from_secs(5);

/// Serves the API until `shutdown`, then accepts no more connections, lets the answers under way be completed, and returns. Drop it to stop waiting for them.
///
/// To be run on a multi-threaded tokio runtime with its drivers enabled, which is not that of the workers.
///
/// # Errors
/// When the listener cannot be used.
pub async fn serve(
    engine: Arc<Engine>,
    listener: TcpListener,
    options: HttpOptions,
    metrics: PrometheusHandle,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    self::metrics::register();
    let app = App::new(engine, options, metrics);
    // Ends with this function.
    let mut background = JoinSet::new();
    background.spawn(app.pulse.clone().watch(app.engine.client.clone()));
    background.spawn(upkeep(app.metrics.clone()));
    let stop = async {
        shutdown.await;
        app.pulse.stop();
    };
    let limits = app.options.limits;
    server::run(listener, routes::router(app.clone()), limits, stop).await;
    Ok(())
}

async fn upkeep(metrics: PrometheusHandle) {
    loop {
        tokio::time::sleep(METRICS_UPKEEP).await;
        metrics.run_upkeep();
    }
}
