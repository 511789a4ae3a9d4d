//! Requests to the backend's HTTP API: JSON over HTTP/1, with TLS where the URL says `https`. Each has a deadline; answers are bounded.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::failure::Failure;

/// Longest time of a request, but for what is streamed.
const REQUEST_DEADLINE: Duration = Duration::from_secs(3);
/// Largest answer, and largest object of a stream.
const ANSWER_MAX: usize = 8 << 20;
/// A name is not looked up more often than this, however often calls fail.
const LOOKUP_EVERY: Duration = Duration::from_secs(15);

/// One server of the backend.
pub(super) struct Server {
    host: String,
    port: u16,
    tls: Option<TlsConnector>,
    token: Option<Token>,
    /// Where the name led to, and when that was found.
    found: Mutex<Option<(Instant, Vec<SocketAddr>)>>,
}

/// A bearer token: read again before each request, since it is renewed on disk.
pub(super) struct Token(pub(super) std::path::PathBuf);

impl std::fmt::Display for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        write!(f, "{scheme}://{}:{}", self.host, self.port)
    }
}

impl Server {
    /// The server at a URL such as `http://10.0.0.5:2379`. `ca` is the authority of an `https` one.
    pub(super) fn parse(
        url: &str,
        ca: Option<&Path>,
        token: Option<Token>,
    ) -> Result<Self, Failure> {
        let refuse = |why: &str| {
            Failure::new(format!(
                "membership.endpoints has `{url}`, {why}; it must be like http://10.0.0.5:2379 or https://HOST:PORT"
            ))
        };
        let uri: hyper::Uri = url.trim().parse().map_err(|_| refuse("which is no URL"))?;
        let tls = match (uri.scheme_str(), ca) {
            (Some("http"), _) => None,
            (Some("https"), Some(ca)) => Some(connector(ca)?),
            (Some("https"), None) => {
                return Err(refuse(
                    "and membership.ca does not say whose certificates to trust",
                ));
            }
            _ => return Err(refuse("which is neither http nor https")),
        };
        let host = uri.host().ok_or_else(|| refuse("which names no host"))?;
        let port = uri
            .port_u16()
            .unwrap_or(if tls.is_some() { 443 } else { 2379 });
        Ok(Server {
            host: host.trim_matches(['[', ']']).to_owned(),
            port,
            tls,
            token,
            found: Mutex::new(None),
        })
    }

    /// Sends a request and reads the whole answer.
    pub(super) async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<(StatusCode, Value), String> {
        let whole = async {
            let response = self.send(method, path, body).await?;
            let status = response.status();
            let limited = http_body_util::Limited::new(response.into_body(), ANSWER_MAX);
            let bytes = limited
                .collect()
                .await
                .map_err(|e| e.to_string())?
                .to_bytes();
            // Some answers are streams of one object.
            let mut objects = serde_json::Deserializer::from_slice(&bytes).into_iter::<Value>();
            let value = objects.next().transpose();
            let value = value.map_err(|error| format!("its answer is no JSON: {error}"))?;
            Ok((status, value.unwrap_or(Value::Null)))
        };
        let late = |_| format!("no answer within {REQUEST_DEADLINE:?}");
        let result = timeout(REQUEST_DEADLINE, whole).await.map_err(late);
        result
            .and_then(|result| result)
            .map_err(|error: String| format!("{self}: {error}"))
    }

    /// Begins a request whose answer is a stream of objects without an end.
    pub(super) async fn stream(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Objects, String> {
        let begun = timeout(REQUEST_DEADLINE, self.send(method, path, body)).await;
        let late = |_| format!("{self}: no answer within {REQUEST_DEADLINE:?}");
        let response = begun
            .map_err(late)?
            .map_err(|error| format!("{self}: {error}"))?;
        match response.status() {
            StatusCode::OK => Ok(Objects {
                body: response.into_body(),
                buffer: Vec::new(),
            }),
            status => Err(format!("{self}: {status}")),
        }
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Response<Incoming>, String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let addresses = self.resolve()?;
        let stream = TcpStream::connect(addresses.as_slice()).await;
        let stream = stream.map_err(|e| text(&e))?;
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", format!("{}:{}", self.host, self.port))
            .header("content-type", "application/json");
        if let Some(Token(path)) = &self.token {
            let token = std::fs::read_to_string(path);
            let token = token.map_err(|error| format!("{}: {error}", path.display()))?;
            request = request.header("authorization", format!("Bearer {}", token.trim()));
        }
        let body = body.map_or_else(Bytes::new, |value| value.to_string().into());
        let request = request.body(Full::new(body)).map_err(|e| text(&e))?;
        match &self.tls {
            None => exchange(stream, request).await,
            Some(tls) => {
                let name = ServerName::try_from(self.host.clone()).map_err(|e| text(&e))?;
                let stream = tls.connect(name, stream).await.map_err(|e| text(&e))?;
                exchange(stream, request).await
            }
        }
    }

    /// Where the name leads to. An outage makes many calls but few look-ups, and an old answer is better than none.
    fn resolve(&self) -> Result<Vec<SocketAddr>, String> {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((when, addresses)) = &*found
            && when.elapsed() < LOOKUP_EVERY
        {
            return Ok(addresses.clone());
        }
        let looked = (self.host.as_str(), self.port).to_socket_addrs();
        let addresses = match (looked, &*found) {
            (Ok(addresses), _) => addresses.collect(),
            (Err(_), Some((_, before))) => before.clone(),
            (Err(error), None) => return Err(format!("the name does not resolve: {error}")),
        };
        *found = Some((Instant::now(), addresses.clone()));
        Ok(addresses)
    }
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Full<Bytes>>,
) -> Result<Response<Incoming>, String> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| error.to_string())?;
    // Ends with the answer's body.
    tokio::spawn(connection);
    sender
        .send_request(request)
        .await
        .map_err(|error| error.to_string())
}

/// Trusts the certificates in one file, and no others.
fn connector(ca: &Path) -> Result<TlsConnector, Failure> {
    let bad = |why: &dyn std::fmt::Display| {
        Failure::new(format!("membership.ca: {}: {why}", ca.display()))
    };
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(ca).map_err(|e| bad(&e))? {
        roots
            .add(certificate.map_err(|e| bad(&e))?)
            .map_err(|e| bad(&e))?;
    }
    if roots.is_empty() {
        return Err(bad(&"it holds no certificate"));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| bad(&e))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

/// Objects of a streamed answer.
pub(super) struct Objects {
    body: Incoming,
    buffer: Vec<u8>,
}

impl Objects {
    /// The next one; `None` when the stream has ended.
    pub(super) async fn next(&mut self) -> Result<Option<Value>, String> {
        loop {
            if let Some(end) = self.buffer.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                if line.trim_ascii().is_empty() {
                    continue;
                }
                let value = serde_json::from_slice(&line);
                return value.map(Some).map_err(|e| format!("no JSON came: {e}"));
            }
            if self.buffer.len() > ANSWER_MAX {
                return Err(format!("an object is longer than {ANSWER_MAX} bytes"));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(error)) => return Err(error.to_string()),
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.buffer.extend_from_slice(data);
                    }
                }
            }
        }
    }
}
