//! What a worker process shows over HTTP: metrics and whether it is up.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use volley_actors::LoadProgress;

use crate::http::{self, Limits};
use crate::rdma_counters;

/// Whether the worker has its weights.
#[derive(Clone, Default)]
pub struct Ready(Arc<AtomicBool>);

impl Ready {
    /// Takes news of loading in.
    pub fn progress(&self, progress: &LoadProgress) {
        if progress.done_bytes >= progress.total_bytes {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

/// What scrapers and probes may hold: few of them call.
const LIMITS: Limits = Limits {
    connections: 256,
    head_bytes: 8 << 10,
    head_timeout: Duration::from_secs(10),
    stall_timeout: Duration::from_secs(60),
};

/// Serves until the runtime ends.
pub async fn serve(listener: TcpListener, metrics: PrometheusHandle, ready: Ready) {
    let router = Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route(
            "/readyz",
            get(move || async move {
                match ready.0.load(Ordering::Relaxed) {
                    true => (StatusCode::OK, "ok\n"),
                    false => (StatusCode::SERVICE_UNAVAILABLE, "loading\n"),
                }
            }),
        )
        .route(
            "/metrics",
            get(move || async move {
                rdma_counters::publish();
                metrics.render()
            }),
        );
    let listener = listener
        .set_nonblocking(true)
        .and_then(|()| tokio::net::TcpListener::from_std(listener));
    match listener {
        Ok(listener) => http::server::run(listener, router, LIMITS, std::future::pending()).await,
        Err(error) => tracing::error!("the status server failed: {error}"),
    }
}
