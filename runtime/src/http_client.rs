//! The few requests a load generator makes, over plain HTTP/1.1 with kept connections.

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use hyper::{Request, Response, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

use crate::failure::Failure;

/// Longest answer that is not a stream.
const BODY_BYTES_MAX: usize = 16 << 20;

/// A server by its base URL.
#[derive(Debug, Clone)]
pub(crate) struct HttpClient {
    client: Client<HttpConnector, Full<Bytes>>,
    base: String,
    authorization: Option<HeaderValue>,
}

impl HttpClient {
    /// For `url`, with or without `/v1` at its end.
    pub(crate) fn new(url: &str, api_key: Option<&str>) -> Result<Self, Failure> {
        let base = url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        let uri: Uri = base
            .parse()
            .map_err(|error| Failure::new(format!("--url `{url}` is no URL: {error}")))?;
        if uri.scheme_str() != Some("http") || uri.host().is_none() {
            return Err(Failure::new(format!(
                "--url `{url}` must begin with http:// and name a host; TLS is not spoken here"
            )));
        }
        let authorization = api_key
            .map(|key| HeaderValue::try_from(format!("Bearer {key}")))
            .transpose()
            .map_err(|_| Failure::new("--api-key has characters that do not fit a header"))?;
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let client = Client::builder(TokioExecutor::new()).build(connector);
        Ok(HttpClient {
            client,
            base,
            authorization,
        })
    }

    /// Sends a GET request and reads the whole answer, which is JSON.
    pub(crate) async fn get(&self, path: &str) -> Result<serde_json::Value, String> {
        let text = self.text(path).await?;
        serde_json::from_str(&text)
            .map_err(|error| format!("the answer to GET {path} is not JSON: {error}"))
    }

    /// Sends a GET request and reads the whole answer.
    pub(crate) async fn text(&self, path: &str) -> Result<String, String> {
        let request = self.request("GET", path, Bytes::new())?;
        let response = self
            .client
            .request(request)
            .await
            .map_err(|error| deepest(&error))?;
        let body = whole(response).await?;
        String::from_utf8(body.into()).map_err(|_| format!("the answer to GET {path} is no text"))
    }

    /// Sends a POST request; the answer's body is still to come. A status other than 200 is an error with the body's text.
    pub(crate) async fn post(&self, path: &str, body: Bytes) -> Result<Incoming, String> {
        let request = self.request("POST", path, body)?;
        let response = self
            .client
            .request(request)
            .await
            .map_err(|error| deepest(&error))?;
        if response.status() == hyper::StatusCode::OK {
            return Ok(response.into_body());
        }
        Err(whole(response)
            .await
            .err()
            .unwrap_or_else(|| "an answer with neither status 200 nor an error".to_owned()))
    }

    fn request(
        &self,
        method: &str,
        path: &str,
        body: Bytes,
    ) -> Result<Request<Full<Bytes>>, String> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header(CONTENT_TYPE, "application/json");
        if let Some(authorization) = &self.authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        request
            .body(Full::new(body))
            .map_err(|error| error.to_string())
    }
}

/// The body of an answer with status 200; else an error with the status and the beginning of the body.
async fn whole(response: Response<Incoming>) -> Result<Bytes, String> {
    let status = response.status();
    let body = Limited::new(response.into_body(), BODY_BYTES_MAX)
        .collect()
        .await
        .map_err(|error| error.to_string())?;
    let body = body.to_bytes();
    if status.is_success() {
        return Ok(body);
    }
    let text: String = String::from_utf8_lossy(&body).chars().take(200).collect();
    Err(format!("status {status}: {text}"))
}

/// The cause at the bottom of an error: "Connection refused" rather than "client error".
pub(crate) fn deepest(error: &(dyn std::error::Error + 'static)) -> String {
    let mut deepest = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    deepest.to_string()
}
