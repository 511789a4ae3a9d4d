//! Metrics of the API itself, and `GET /metrics` for all there are.

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use metrics::{counter, describe_counter, describe_gauge};

use super::routes::ROUTES;
use super::state::App;

/// Requests answered, by route (`other` where there is none) and by status.
pub const REQUESTS: &str = "volley_http_requests_total";
/// Requests whose answer is not complete.
pub const IN_FLIGHT: &str = "volley_http_requests_in_flight";
/// Connections open.
pub const CONNECTIONS: &str = "volley_http_connections";

/// Connections that had to go because all places were taken, by kind: resting (closed for a new one) or refused (a new one).
pub const SHED: &str = "volley_http_connections_shed_total";

/// Every metric of the API: name and help.
pub const ALL: &[(&str, &str)] = &[
    (REQUESTS, "HTTP requests answered, by route and status."),
    (IN_FLIGHT, "HTTP requests whose answer is not complete."),
    (CONNECTIONS, "HTTP connections open."),
    (
        SHED,
        "HTTP connections that had to go because all places were taken, by kind: resting (closed for a new one) or refused (a new one, with 503).",
    ),
];

/// Describes the metrics to the installed recorder and registers them at zero.
pub(super) fn register() {
    for &(name, help) in ALL {
        if name.ends_with("_total") {
            describe_counter!(name, help)
        } else {
            describe_gauge!(name, help)
        }
    }
    for route in ROUTES {
        let _ = counter!(REQUESTS, "route" => route.path, "status" => "200");
    }
    for kind in ["resting", "refused"] {
        let _ = counter!(SHED, "kind" => kind);
    }
    metrics::gauge!(IN_FLIGHT).set(0.0);
    metrics::gauge!(CONNECTIONS).set(0.0);
}

/// In the text format of Prometheus.
pub(super) async fn metrics(State(app): State<App>) -> Response {
    app.engine.cluster.publish_metrics();
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], app.metrics.render()).into_response()
}
