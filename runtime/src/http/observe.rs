//! Around every request: its id, the access log, the metrics.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use hyper::body::{Frame, SizeHint};
use metrics::{Gauge, counter, gauge};

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
    response.map(|body| {
        Body::new(Observed {
            body,
            _in_flight: in_flight,
        })
    })
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

/// A body that keeps its request counted.
struct Observed {
    body: Body,
    _in_flight: InFlight,
}

impl HttpBody for Observed {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    // Answers that are complete keep their content-length.
    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
