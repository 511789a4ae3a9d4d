//! `GET /`: a page that shows the rally live, and a place to talk to the model.
//!
//! One document of HTML with its style and script inside, built into the program: no build step, nothing loaded from elsewhere. It has no rights that its reader has not: it asks the
//! routes beside it, with the key that the reader types in. Its policy lets in no other script than its own, and no connection but to this server.

use std::sync::LazyLock;

use axum::http::{HeaderName, HeaderValue, header};
use axum::response::IntoResponse;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::digest::{SHA256, digest};

macro_rules! style {
    () => {
        include_str!("page/style.css")
    };
}

/// Each file is a part of one idea; together they are one strict function.
macro_rules! script {
    () => {
        concat!(
            "(() => {\n'use strict';\n",
            include_str!("page/dom.js"),
            include_str!("page/metrics.js"),
            include_str!("page/chat.js"),
            include_str!("page/topology.js"),
            include_str!("page/timeline.js"),
            include_str!("page/experts.js"),
            include_str!("page/rally.js"),
            include_str!("page/poll.js"),
            "})();\n"
        )
    };
}

const STYLE: &str = style!();
const SCRIPT: &str = script!();
const DOCUMENT: &str = concat!(
    include_str!("page/head.html"),
    "<style>",
    style!(),
    "</style>\n",
    include_str!("page/body.html"),
    "<script>",
    script!(),
    "</script>\n"
);

static POLICY: LazyLock<HeaderValue> = LazyLock::new(|| {
    let policy = format!(
        "default-src 'none'; script-src {}; style-src {}; img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        source(SCRIPT),
        source(STYLE)
    );
    // Digests in base64 are visible ASCII.
    HeaderValue::from_str(&policy).unwrap_or(HeaderValue::from_static("default-src 'none'"))
});

/// A source as Content Security Policy names it: by its digest.
fn source(text: &str) -> String {
    format!(
        "'sha256-{}'",
        BASE64.encode(digest(&SHA256, text.as_bytes()))
    )
}

pub(super) async fn page() -> impl IntoResponse {
    const POLICY_NAME: HeaderName = header::CONTENT_SECURITY_POLICY;
    let fixed = |value| HeaderValue::from_static(value);
    let headers = [
        (POLICY_NAME, POLICY.clone()),
        (header::CONTENT_TYPE, fixed("text/html; charset=utf-8")),
        (header::CACHE_CONTROL, fixed("no-cache")),
        (header::X_CONTENT_TYPE_OPTIONS, fixed("nosniff")),
        (header::REFERRER_POLICY, fixed("no-referrer")),
    ];
    (headers, DOCUMENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_policy_names_what_is_in_the_document() {
        // What a browser hashes is the text between the tags.
        for (tag, text) in [("style", STYLE), ("script", SCRIPT)] {
            let inside = DOCUMENT.split_once(&format!("<{tag}>")).unwrap().1;
            let inside = inside.split_once(&format!("</{tag}>")).unwrap().0;
            assert_eq!(inside, text);
            assert!(POLICY.to_str().unwrap().contains(&source(inside)));
        }
    }

    #[test]
    fn text_of_others_is_never_taken_for_html() {
        for way in [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
        ] {
            assert!(!DOCUMENT.contains(way), "{way}");
        }
    }

    #[test]
    fn nothing_is_loaded_from_elsewhere() {
        for (at, _) in DOCUMENT.match_indices("http") {
            let text: String = DOCUMENT[at..].chars().take(40).collect();
            // A name space of SVG is no address that anybody calls; links are for people.
            let allowed = ["http://www.w3.org/2000/svg", "https://ui.perfetto.dev"];
            assert!(
                allowed.iter().any(|start| text.starts_with(start)),
                "{text}"
            );
        }
    }
}
