//! The table of routes: the router, the OpenAPI document's test and the metrics are made of it.

use axum::Router;
use axum::extract::{MatchedPath, State};
use axum::http::{HeaderMap, Method, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};

use super::error::ApiError;
use super::state::App;
use super::{
    admin, chat, completions, health, metrics, models, observe, openapi, page, timeline, tokenize,
};

/// A route of the API.
#[derive(Debug)]
pub(super) struct Route {
    pub(super) method: &'static str,
    /// As axum spells it.
    pub(super) path: &'static str,
    pub(super) access: Access,
    handler: fn() -> MethodRouter<App>,
}

/// Who may use a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// Everybody: probes and scrapers have no key, and the page at `/` asks for it.
    Open,
    /// Who has the key, if there is one.
    Key,
}

const fn route(
    method: &'static str,
    path: &'static str,
    access: Access,
    handler: fn() -> MethodRouter<App>,
) -> Route {
    Route {
        method,
        path,
        access,
        handler,
    }
}

/// Every route.
pub(super) const ROUTES: &[Route] = &[
    route("post", "/v1/chat/completions", Access::Key, || {
        post(chat::chat)
    }),
    route("post", "/v1/completions", Access::Key, || {
        post(completions::completions)
    }),
    route("get", "/v1/models", Access::Key, || get(models::list)),
    // Names of models may have slashes.
    route("get", "/v1/models/{*id}", Access::Key, || get(models::one)),
    route("post", "/tokenize", Access::Key, || {
        post(tokenize::tokenize)
    }),
    route("post", "/detokenize", Access::Key, || {
        post(tokenize::detokenize)
    }),
    route("get", "/admin/state", Access::Key, || get(admin::state)),
    route("post", "/admin/drain", Access::Key, || post(admin::drain)),
    route("get", "/admin/experts", Access::Key, || get(admin::experts)),
    route("get", "/admin/timeline", Access::Key, || {
        get(timeline::timeline)
    }),
    route("get", "/metrics", Access::Open, || get(metrics::metrics)),
    route("get", "/livez", Access::Open, || get(health::live)),
    route("get", "/readyz", Access::Open, || get(health::ready)),
    route("get", "/progressz", Access::Open, || get(health::progress)),
    route("get", "/version", Access::Open, || get(admin::version)),
    route("get", "/openapi.json", Access::Open, || {
        get(openapi::openapi)
    }),
    route("get", "/", Access::Open, || get(page::page)),
];

/// The whole API.
pub(super) fn router(app: App) -> Router {
    let mut router = Router::new();
    for route in ROUTES {
        let mut handler = (route.handler)();
        if route.access == Access::Key {
            handler = handler.route_layer(middleware::from_fn_with_state(app.clone(), with_key));
        }
        router = router.route(route.path, handler);
    }
    router
        .fallback(async |uri: Uri| ApiError::no_such_route(uri.path()))
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn(observe::observe))
        .with_state(app)
}

async fn method_not_allowed(path: MatchedPath, method: Method) -> ApiError {
    let allowed = ROUTES
        .iter()
        .find(|route| route.path == path.as_str())
        .map_or("", |route| route.method);
    ApiError::method_not_allowed(method.as_str(), path.as_str(), &allowed.to_uppercase())
}

async fn with_key(State(app): State<App>, request: axum::extract::Request, next: Next) -> Response {
    match &app.options.api_key {
        Some(key) if !has_key(request.headers(), key) => ApiError::unauthorized().into_response(),
        _ => next.run(request).await,
    }
}

fn has_key(headers: &HeaderMap, key: &str) -> bool {
    let given = headers
        .get(header::AUTHORIZATION)
        .map(|value| value.as_bytes());
    let Some((scheme, given)) = given.and_then(|given| given.split_at_checked("Bearer ".len()))
    else {
        return false;
    };
    scheme.eq_ignore_ascii_case(b"Bearer ") && same(given, key.as_bytes())
}

/// Compares in a time that tells nothing but the lengths.
fn same(given: &[u8], key: &[u8]) -> bool {
    let difference = given
        .iter()
        .zip(key)
        .fold(0, |sum, (a, b)| std::hint::black_box(sum | (a ^ b)));
    given.len() == key.len() && difference == 0
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn only_the_right_key_opens() {
        let opens = |value: &str| {
            let headers = HeaderMap::from_iter([(
                header::AUTHORIZATION,
                HeaderValue::from_str(value).unwrap(),
            )]);
            has_key(&headers, "secret")
        };
        assert!(opens("Bearer secret") && opens("bearer secret"));
        for wrong in [
            "Bearer secreT",
            "Bearer secret2",
            "Bearer secre",
            "Bearer ",
            "secret",
            "Basic secret",
            "",
        ] {
            assert!(!opens(wrong), "{wrong}");
        }
        assert!(!has_key(&HeaderMap::new(), "secret"));
    }
}
