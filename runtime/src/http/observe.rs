//! Around every request: its id, the access log, the metrics.

use std::time::Instant;

use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use metrics::{Gauge, counter, gauge};

use super::holding::Holding;
use super::ids;
use super::metrics::{IN_FLIGHT, REQUESTS};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest id of a client's that is sent back.
const ID_BYTES_MAX: usize = 128;

pub(super) async fn observe(request: Request, next: Next) -> Response {
    let arrived = Instant::now();
    let in_flight = InFlight::new();
    let id = request_id(request.headers().get(REQUEST_ID));
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or_else(|| "other".to_owned(), |path| path.as_str().to_owned());
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());

    let mut response = next.run(request).await;

    let status = response.status();
    counter!(REQUESTS, "route" => route, "status" => status.as_str().to_owned()).increment(1);
    tracing::debug!(
        request_id = id.to_str().unwrap_or_default(),
        status = status.as_u16(),
        seconds = arrived.elapsed().as_secs_f64(),
        "{method} {path}"
    );
    response.headers_mut().insert(REQUEST_ID, id);
    response.map(|body| Holding::wrap(body, in_flight))
}

/// The client's own id if it is of a decent size, else a new one.
fn request_id(given: Option<&HeaderValue>) -> HeaderValue {
    let given = given.filter(|id| (1..=ID_BYTES_MAX).contains(&id.len()) && id.to_str().is_ok());
    // Hexadecimal digits are a valid header.
    given.cloned().unwrap_or_else(|| {
        HeaderValue::from_str(&ids::name("req-")).unwrap_or(HeaderValue::from_static("req"))
    })
}

/// Counts a request until its answer is complete or given up.
struct InFlight(Gauge);

impl InFlight {
    fn new() -> Self {
        let gauge = gauge!(IN_FLIGHT);
        gauge.increment(1.0);
        InFlight(gauge)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}
