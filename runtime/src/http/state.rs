//! What every handler can reach.

use std::sync::Arc;
use std::time::Duration;

use metrics_exporter_prometheus::PrometheusHandle;
use tokio::sync::Semaphore;

use super::body::BodyBudget;
use super::error::ApiError;
use super::pulse::Pulse;
use super::server::Limits;
use crate::engine::Engine;

/// Requests whose text is prepared at once; others wait their turn. Workers need the processor more.
const PREPARING_MAX: usize = 2;

/// How the API is served.
#[derive(Clone)]
pub struct HttpOptions {
    /// Key that clients must send as `Authorization: Bearer KEY`; `None` asks for none.
    pub api_key: Option<String>,
    /// Largest request body in bytes.
    pub max_body_bytes: usize,
    /// Bytes of request bodies in memory at once, over all requests.
    pub bodies_bytes: usize,
    /// Longest time for a request's body to arrive.
    pub body_timeout: Duration,
    /// Longest time from a request's arrival to its last token.
    pub request_timeout: Duration,
    /// What connections may hold.
    pub limits: Limits,
}

impl Default for HttpOptions {
    fn default() -> Self {
        HttpOptions {
            api_key: None,
            max_body_bytes: 4 << 20,
            bodies_bytes: 256 << 20,
            body_timeout: Duration::from_secs(60),
            request_timeout: Duration::from_secs(600),
            limits: Limits::default(),
        }
    }
}

impl std::fmt::Debug for HttpOptions {
    /// Without the key: options end up in logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HttpOptions")
            .field("api_key", &self.api_key.as_ref().map(|_| "..."))
            .field("max_body_bytes", &self.max_body_bytes)
            .field("bodies_bytes", &self.bodies_bytes)
            .field("body_timeout", &self.body_timeout)
            .field("request_timeout", &self.request_timeout)
            .field("limits", &self.limits)
            .finish()
    }
}

/// Shared by all handlers; cheap to clone.
#[derive(Clone)]
pub(super) struct App {
    pub(super) engine: Arc<Engine>,
    pub(super) options: Arc<HttpOptions>,
    pub(super) metrics: PrometheusHandle,
    pub(super) pulse: Pulse,
    /// What is left for the bodies of requests.
    pub(super) bodies: BodyBudget,
    preparing: Arc<Semaphore>,
}

impl App {
    pub(super) fn new(
        engine: Arc<Engine>,
        options: HttpOptions,
        metrics: PrometheusHandle,
    ) -> Self {
        let preparing = Arc::new(Semaphore::new(PREPARING_MAX));
        App {
            engine,
            bodies: BodyBudget::new(options.bodies_bytes),
            options: Arc::new(options),
            metrics,
            pulse: Pulse::new(),
            preparing,
        }
    }

    /// Runs what takes the processor for long (templates, tokenising) where it holds nobody up.
    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Engine) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let engine = Arc::clone(&self.engine);
        // Fails only when the semaphore is closed, which it never is.
        let permit = Arc::clone(&self.preparing).acquire_owned().await;
        let done = tokio::task::spawn_blocking(move || {
            // Kept to the end of the work, even if the client leaves before.
            let _permit = permit;
            work(&engine)
        })
        .await;
        done.unwrap_or_else(|error| {
            Err(ApiError::internal(format!(
                "the request's text could not be prepared: {error}"
            )))
        })
    }
}
