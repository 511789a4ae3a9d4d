//! What a worker process shows over HTTP: metrics and whether it is up.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use volley_actors::LoadProgress;

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
        .route("/metrics", get(move || async move { metrics.render() }));
    let listener = listener
        .set_nonblocking(true)
        .and_then(|()| tokio::net::TcpListener::from_std(listener));
    let served = match listener {
        Ok(listener) => axum::serve(listener, router).await,
        Err(error) => Err(error),
    };
    if let Err(error) = served {
        tracing::error!("the status server failed: {error}");
    }
}
