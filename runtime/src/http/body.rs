//! Reading a request's body: JSON, not too large, not too slow.

use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, header};
use http_body_util::BodyExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::ApiError;
use super::fields::Fields;
use super::state::App;

/// Of a body that is not kept, this many times the limit is read and thrown away: most clients read no answer before they have sent everything.
const DISCARD_LIMITS: usize = 8;

/// What is counted at once of the memory for bodies.
const GRAIN: usize = 1 << 10;

/// Memory for the bodies of all requests that are being read; cheap to clone.
#[derive(Clone)]
pub(super) struct BodyBudget(Arc<Semaphore>);

impl BodyBudget {
    pub(super) fn new(bytes: usize) -> Self {
        BodyBudget(Arc::new(Semaphore::new(
            (bytes / GRAIN).clamp(1, u32::MAX as usize),
        )))
    }

    /// Room for a body of `bytes`, of which `share` is had already.
    fn grow(&self, share: &mut Option<OwnedSemaphorePermit>, bytes: usize) -> Result<(), ApiError> {
        let had = share.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let more = bytes.div_ceil(GRAIN).saturating_sub(had);
        if more == 0 {
            return Ok(());
        }
        let more = u32::try_from(more)
            .ok()
            .and_then(|more| Arc::clone(&self.0).try_acquire_many_owned(more).ok());
        let more = more.ok_or_else(|| {
            ApiError::unavailable("too many large requests are arriving at once (`server.bodies_memory`); come back later")
        })?;
        match share {
            Some(share) => share.merge(more),
            None => *share = Some(more),
        }
        Ok(())
    }
}

/// The fields of the JSON object in a request's body.
impl FromRequest<App> for Fields {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Self, ApiError> {
        let (parts, body) = request.into_parts();
        check_content_type(&parts.headers)?;
        let limit = app.options.max_body_bytes;
        let read = read(body, &parts.headers, limit, &app.bodies);
        let deadline = app.options.body_timeout;
        let slow = |_| ApiError::body_too_slow(deadline.as_secs_f64());
        let (body, _share) = tokio::time::timeout(deadline, read).await.map_err(slow)??;
        Fields::parse(&body)
    }
}

fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let given = headers
        .get(header::CONTENT_TYPE)
        .map(|value| String::from_utf8_lossy(value.as_bytes()));
    let given = given.as_deref().unwrap_or("not given");
    let kind = given
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase();
    let is_json =
        kind == "application/json" || (kind.starts_with("application/") && kind.ends_with("+json"));
    if is_json {
        Ok(())
    } else {
        Err(ApiError::not_json(given))
    }
}

/// The body, and its share of the memory for bodies.
async fn read(
    mut body: Body,
    headers: &HeaderMap,
    limit: usize,
    budget: &BodyBudget,
) -> Result<(Vec<u8>, Option<OwnedSemaphorePermit>), ApiError> {
    let declared = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    let declared = declared.unwrap_or(0);
    // Who waits for our word before it sends the body gets it at once.
    if declared > limit && headers.contains_key(header::EXPECT) {
        return Err(ApiError::body_too_large(limit));
    }
    let discard_max = limit.saturating_mul(DISCARD_LIMITS);
    // What a client declares is not memory yet: that grows with what arrives.
    let mut bytes = Vec::new();
    let (mut share, mut room) = (None, Ok(()));
    let mut length = 0;
    while let Some(data) = next(&mut body).await? {
        length += data.len();
        if length > discard_max || (length > limit && declared > discard_max) {
            break;
        }
        if room.is_ok() && length <= limit {
            room = budget.grow(&mut share, length);
        }
        if room.is_ok() && length <= limit {
            bytes.extend_from_slice(&data);
        } else {
            (bytes, share) = (Vec::new(), None);
        }
    }
    if length > limit {
        return Err(ApiError::body_too_large(limit));
    }
    room.map(|()| (bytes, share))
}

async fn next(body: &mut Body) -> Result<Option<Bytes>, ApiError> {
    while let Some(frame) = body.frame().await {
        let frame = frame
            .map_err(|error| ApiError::malformed(format!("the request body broke off: {error}")))?;
        // Trailers are of no interest.
        if let Ok(data) = frame.into_data() {
            return Ok(Some(data));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderValue, StatusCode};

    use super::*;

    fn content_type(value: &str) -> Result<(), ApiError> {
        let headers =
            HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_str(value).unwrap())]);
        check_content_type(&headers)
    }

    #[test]
    fn only_json_is_read() {
        assert!(content_type("application/json").is_ok());
        assert!(content_type("Application/JSON; charset=utf-8").is_ok());
        assert!(content_type("application/problem+json").is_ok());
        assert_eq!(
            content_type("text/plain").unwrap_err().status,
            StatusCode::UNSUPPORTED_MEDIA_TYPE
        );
        assert!(check_content_type(&HeaderMap::new()).is_err());
    }

    #[tokio::test]
    async fn a_body_over_the_limit_is_refused_and_one_at_the_limit_is_not() {
        let headers = HeaderMap::new();
        let budget = BodyBudget::new(1 << 20);
        let (bytes, _) = read(Body::from(vec![1; 10]), &headers, 10, &budget)
            .await
            .unwrap();
        assert_eq!(bytes, [1; 10]);
        for size in [11, 50, 1000] {
            let error = read(Body::from(vec![1; size]), &headers, 10, &budget)
                .await
                .unwrap_err();
            assert_eq!(error.status, StatusCode::PAYLOAD_TOO_LARGE);
        }
    }

    #[tokio::test]
    async fn bodies_share_their_memory_and_give_it_back() {
        let headers = HeaderMap::new();
        let budget = BodyBudget::new(4 * GRAIN);
        let body = |grains: usize| Body::from(vec![1; grains * GRAIN]);
        let first = read(body(3), &headers, usize::MAX, &budget).await.unwrap();
        let error = read(body(2), &headers, usize::MAX, &budget).await;
        assert_eq!(error.unwrap_err().status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(read(body(1), &headers, usize::MAX, &budget).await.is_ok());
        drop(first);
        assert!(read(body(4), &headers, usize::MAX, &budget).await.is_ok());
    }
}
