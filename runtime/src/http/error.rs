//! What a client is told when its request fails, in the shape of OpenAI's API.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use volley_actors::SubmitError;
use volley_models::{ChatError, TokenizerError};

/// Clients that were turned away for overload come back after this many seconds.
const RETRY_AFTER_S: u32 = 1;

/// An error response: `{"error": {"message", "type", "param", "code"}}` with its status.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ApiError {
    pub(super) status: StatusCode,
    pub(super) body: ErrorBody,
}

/// The object under `error`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct ErrorBody {
    pub(super) message: String,
    /// The class that OpenAI's clients know.
    #[serde(rename = "type")]
    pub(super) kind: &'static str,
    /// The field at fault.
    pub(super) param: Option<String>,
    pub(super) code: Option<&'static str>,
}

/// `{"error": ...}`, as it is sent.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Envelope {
    error: ErrorBody,
}

impl ApiError {
    fn new(
        status: StatusCode,
        kind: &'static str,
        code: Option<&'static str>,
        message: String,
    ) -> Self {
        ApiError {
            status,
            body: ErrorBody {
                message,
                kind,
                param: None,
                code,
            },
        }
    }

    fn bad_request(code: Option<&'static str>, message: String) -> Self {
        ApiError::new(
            StatusCode::BAD_REQUEST,
            "invalid_request_error",
            code,
            message,
        )
    }

    /// 400: the body is not what it should be.
    pub(super) fn malformed(message: impl Into<String>) -> Self {
        ApiError::bad_request(None, message.into())
    }

    /// 400: a field is at fault. The message names it, what was given and what is allowed.
    pub(super) fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        ApiError::bad_request(None, message.into()).about(param)
    }

    /// 400: a field asks for something that this server does not do.
    pub(super) fn unsupported(param: &str, message: impl Into<String>) -> Self {
        ApiError::bad_request(Some("unsupported_parameter"), message.into()).about(param)
    }

    /// 400: prompt and output together are longer than the context. The wording is that which clients look for.
    pub(super) fn too_long(param: &str, prompt: usize, max_tokens: u64, context: u32) -> Self {
        let total = prompt as u64 + max_tokens;
        let message = format!(
            "This model's maximum context length is {context} tokens. However, you requested {total} tokens ({prompt} in the prompt, \
             {max_tokens} in the completion). Please shorten the prompt or lower max_tokens."
        );
        ApiError::bad_request(Some("context_length_exceeded"), message).about(param)
    }

    /// 400: a text is longer than anything this server takes, by its length alone.
    pub(super) fn text_too_long(least: usize, most: usize) -> Self {
        let message = format!(
            "This model's maximum context length is {most} tokens. However, your text has at least {least}. Please shorten it."
        );
        ApiError::bad_request(Some("context_length_exceeded"), message)
    }

    /// 401: there is a key, and it was not sent.
    pub(super) fn unauthorized() -> Self {
        let message =
            "this server wants an API key: send the header `Authorization: Bearer KEY`".to_owned();
        ApiError::new(
            StatusCode::UNAUTHORIZED,
            "invalid_request_error",
            Some("invalid_api_key"),
            message,
        )
    }

    /// 404: another model is served.
    pub(super) fn no_such_model(given: &str, served: &str) -> Self {
        let message = format!(
            "the model `{}` is not served here; `{served}` is",
            shortened(given)
        );
        let error = ApiError::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            Some("model_not_found"),
            message,
        );
        error.about("model")
    }

    /// 404: no such route.
    pub(super) fn no_such_route(path: &str) -> Self {
        let message = format!(
            "there is no route `{}`; GET /openapi.json lists them",
            shortened(path)
        );
        ApiError::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            Some("not_found"),
            message,
        )
    }

    /// 405: the route exists with another method.
    pub(super) fn method_not_allowed(method: &str, path: &str, allowed: &str) -> Self {
        let message = format!("`{path}` is not for {}; use {allowed}", shortened(method));
        ApiError::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "invalid_request_error",
            Some("method_not_allowed"),
            message,
        )
    }

    /// 408: the body did not come.
    pub(super) fn body_too_slow(seconds: f64) -> Self {
        let message =
            format!("the request body did not arrive within {seconds} s (`server.body_timeout_s`)");
        ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            "invalid_request_error",
            Some("request_timeout"),
            message,
        )
    }

    /// 413: the body is larger than is allowed.
    pub(super) fn body_too_large(limit: usize) -> Self {
        let message = format!(
            "the request body is larger than {limit} bytes, the limit of this server (`server.max_body`)"
        );
        ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "invalid_request_error",
            Some("request_too_large"),
            message,
        )
    }

    /// 415: the body is declared to be something else than JSON.
    pub(super) fn not_json(given: &str) -> Self {
        let message = format!(
            "the content type is `{}`; send `Content-Type: application/json`",
            shortened(given)
        );
        ApiError::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "invalid_request_error",
            Some("unsupported_media_type"),
            message,
        )
    }

    /// 503: later or elsewhere it may work.
    pub(super) fn unavailable(message: impl Into<String>) -> Self {
        ApiError::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "server_error",
            Some("overloaded"),
            message.into(),
        )
    }

    /// 504: the request took longer than is allowed.
    pub(super) fn timed_out(seconds: f64) -> Self {
        let message = format!(
            "the request was not finished within {seconds} s, the limit of this server (`server.request_timeout_s`)"
        );
        ApiError::new(
            StatusCode::GATEWAY_TIMEOUT,
            "server_error",
            Some("request_timeout"),
            message,
        )
    }

    /// 500: it is the server's fault.
    pub(super) fn internal(message: impl Into<String>) -> Self {
        ApiError::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "server_error",
            None,
            message.into(),
        )
    }

    /// Names the field at fault.
    pub(super) fn about(mut self, param: impl Into<String>) -> Self {
        self.body.param = Some(param.into());
        self
    }

    /// The body, for an answer that has begun already.
    pub(super) fn envelope(&self) -> Envelope {
        Envelope {
            error: self.body.clone(),
        }
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        match &error {
            overload if overload.is_overload() => ApiError::unavailable(error.to_string()),
            SubmitError::TooLong {
                prompt,
                max_tokens,
                context,
            } => ApiError::too_long("max_tokens", *prompt, u64::from(*max_tokens), *context),
            SubmitError::Sampling(sampling) => ApiError::invalid(sampling.field, error.to_string()),
            _ => ApiError::invalid("prompt", error.to_string()),
        }
    }
}

impl From<TokenizerError> for ApiError {
    fn from(error: TokenizerError) -> Self {
        ApiError::invalid("prompt", error.to_string())
    }
}

impl From<ChatError> for ApiError {
    /// Templates are programs that fail on conversations they were not written for: it is the conversation that must change.
    fn from(error: ChatError) -> Self {
        ApiError::invalid("messages", error.to_string())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.envelope())).into_response();
        let headers = response.headers_mut();
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(header::RETRY_AFTER, RETRY_AFTER_S.into());
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// What a client sent, short enough for a message.
pub(super) fn shortened(text: &str) -> String {
    const CHARS_MAX: usize = 80;
    match text.char_indices().nth(CHARS_MAX) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_work_later_is_503_and_says_when() {
        for error in [
            SubmitError::QueueFull { waiting: 7 },
            SubmitError::Draining,
            SubmitError::Stopped,
        ] {
            let response = ApiError::from(error).into_response();
            assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
            assert_eq!(response.headers()[header::RETRY_AFTER], "1");
        }
    }

    #[test]
    fn what_can_never_work_is_400_and_names_the_field() {
        let cases = [
            (SubmitError::EmptyPrompt, "prompt", None),
            (
                SubmitError::UnknownToken {
                    token: 9,
                    position: 0,
                    vocab: 5,
                },
                "prompt",
                None,
            ),
            (
                SubmitError::TooLong {
                    prompt: 5,
                    max_tokens: 6,
                    context: 10,
                },
                "max_tokens",
                Some("context_length_exceeded"),
            ),
        ];
        for (error, param, code) in cases {
            let error = ApiError::from(error);
            assert_eq!(error.status, StatusCode::BAD_REQUEST);
            assert_eq!(
                (error.body.param.as_deref(), error.body.code),
                (Some(param), code)
            );
        }
    }

    #[test]
    fn the_body_has_the_four_keys_even_if_null() {
        let body = serde_json::to_value(ApiError::malformed("no").envelope()).unwrap();
        let expected = serde_json::json!({"error": {"message": "no", "type": "invalid_request_error", "param": null, "code": null}});
        assert_eq!(body, expected);
    }

    #[test]
    fn long_input_is_not_sent_back_whole() {
        assert_eq!(shortened(&"ä".repeat(100)).chars().count(), 83);
        assert_eq!(shortened("short"), "short");
    }
}
