//! Requests that are refused: the status, and which field is named.

use serde_json::{Value, json};
use volley::http::HttpOptions;

use crate::server::{MODEL, Response, Server, shared_engine};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// Checks the shape of an error and returns what is under `error`.
fn error(response: &Response, status: u16) -> Value {
    assert_eq!(response.status, status, "{}", response.text());
    let error = response.json()["error"].clone();
    assert!(!error["message"].as_str().unwrap().is_empty());
    assert!(error["type"].is_string());
    assert!(error.get("param").is_some() && error.get("code").is_some());
    error
}

#[test]
fn a_text_far_over_the_context_is_refused_by_its_length() {
    let server = Server::start();
    let text = "to be or not to be, that is the question. ".repeat(50_000);
    let chat = json!({"messages": [{"role": "user", "content": text}]});
    for (path, body, param) in [
        (COMPLETIONS, json!({"prompt": text}), "prompt"),
        (CHAT, chat, "messages"),
        ("/tokenize", json!({"prompt": text}), "prompt"),
    ] {
        let error = error(&server.post(path, &body), 400);
        assert_eq!(error["code"], "context_length_exceeded", "{path}");
        assert_eq!(error["param"], param, "{path}");
        assert!(
            error["message"].as_str().unwrap().contains("at least"),
            "{error}"
        );
    }
}

#[test]
fn wrong_fields_are_named() {
    let server = Server::start();
    let cases = [
        ("max_tokens", json!("5")),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(-1)),
        ("max_tokens", json!(1.5)),
        ("temperature", json!(-0.1)),
        ("temperature", json!("hot")),
        ("temperature", json!(1e300)),
        ("top_p", json!(0)),
        ("top_p", json!(1.1)),
        ("top_k", json!(-2)),
        ("min_p", json!(2)),
        ("n", json!(0)),
        ("n", json!(1e9)),
        ("stop", json!(5)),
        ("stop", json!([""])),
        ("seed", json!("x")),
        ("presence_penalty", json!(3)),
        ("frequency_penalty", json!(-3)),
        ("repetition_penalty", json!(0)),
        ("logit_bias", json!([1])),
        ("logit_bias", json!({"1": 101})),
        ("stream", json!("yes")),
        ("stream_options", json!({})),
        ("user", json!(5)),
        ("tools", json!([{"type": "function"}])),
        ("response_format", json!({"type": "json_object"})),
    ];
    for (path, base) in [
        (
            CHAT,
            json!({"messages": [{"role": "user", "content": "a"}]}),
        ),
        (COMPLETIONS, json!({"prompt": "a"})),
    ] {
        for (name, value) in &cases {
            let mut body = base.clone();
            body[name] = value.clone();
            let error = error(&server.post(path, &body), 400);
            assert_eq!(error["param"], *name, "{body}");
            assert!(error["message"].as_str().unwrap().contains(name), "{error}");
        }
    }
    let completions = [
        ("logprobs", json!(21)),
        ("logprobs", json!(true)),
        ("best_of", json!(2)),
        ("suffix", json!("x")),
        ("echo", json!(1)),
        ("prompt", json!({})),
    ];
    for (name, value) in completions {
        let mut body = json!({"prompt": "a"});
        body[name] = value;
        assert_eq!(error(&server.post(COMPLETIONS, &body), 400)["param"], name);
    }
    for body in [
        json!({}),
        json!({"prompt": []}),
        json!({"prompt": ""}),
        json!({"prompt": [[]]}),
        json!({"prompt": [512]}),
    ] {
        assert_eq!(
            error(&server.post(COMPLETIONS, &body), 400)["param"],
            "prompt"
        );
    }
    assert_eq!(
        error(&server.post(CHAT, &json!({})), 400)["param"],
        "messages"
    );
    assert_eq!(
        error(&server.post("/detokenize", &json!({"tokens": [512]})), 400)["param"],
        "tokens"
    );
}

#[test]
fn unknown_fields_and_nulls_are_ignored() {
    let server = Server::start();
    let body = json!({"prompt": "a", "max_tokens": 1, "foo": {"bar": 1}, "stop": null, "seed": null, "logprobs": null, "logit_bias": null, "user": null});
    server.ask(COMPLETIONS, body);
}

#[test]
fn what_does_not_fit_the_context_is_refused_as_clients_know_it() {
    let server = Server::start();
    let long = "speak ".repeat(5000);
    let bodies = [
        (COMPLETIONS, json!({"prompt": long})),
        (COMPLETIONS, json!({"prompt": "a", "max_tokens": 4096})),
        (COMPLETIONS, json!({"prompt": "a", "max_tokens": 1e18})),
        (
            CHAT,
            json!({"messages": [{"role": "user", "content": long}]}),
        ),
        (
            CHAT,
            json!({"messages": [{"role": "user", "content": "a"}], "max_tokens": 4096}),
        ),
    ];
    for (path, body) in bodies {
        let error = error(&server.post(path, &body), 400);
        assert_eq!(error["code"], "context_length_exceeded");
        assert!(
            error["message"]
                .as_str()
                .unwrap()
                .contains("maximum context length is 4096 tokens")
        );
    }
}

#[test]
fn another_model_is_not_found() {
    let server = Server::start();
    for path in [CHAT, COMPLETIONS] {
        let body = json!({"model": "gpt-4", "prompt": "a", "messages": [{"role": "user", "content": "a"}]});
        assert_eq!(
            error(&server.post(path, &body), 404)["code"],
            "model_not_found"
        );
    }
    error(&server.get("/v1/models/gpt-4"), 404);
    assert_eq!(
        server.get(&format!("/v1/models/{MODEL}")).json()["id"],
        MODEL
    );
}

#[test]
fn routes_and_methods_that_do_not_exist() {
    let server = Server::start();
    error(&server.get("/v1/nothing"), 404);
    error(&server.get("/%ff"), 404);
    let response = server.get(CHAT);
    assert!(
        error(&response, 405)["message"]
            .as_str()
            .unwrap()
            .contains("POST")
    );
    error(&server.post("/livez", &json!({})), 405);
}

#[test]
fn bodies_that_are_no_json() {
    let server = Server::start();
    let json = [("content-type", "application/json")];
    for body in [
        &b""[..],
        b"{",
        b"[1]",
        b"{\"prompt\": \"\xff\"}",
        b"{\"prompt\": \"a\", \"temperature\": NaN}",
        b"\x00\x01",
    ] {
        error(&server.request("POST", COMPLETIONS, &json, body), 400);
    }
    error(
        &server.request(
            "POST",
            COMPLETIONS,
            &[("content-type", "text/plain")],
            b"{}",
        ),
        415,
    );
    error(&server.request("POST", COMPLETIONS, &[], b"{}"), 415);
    let deep = "[".repeat(1 << 20);
    error(
        &server.request("POST", COMPLETIONS, &json, deep.as_bytes()),
        400,
    );
}

#[test]
fn a_body_over_the_limit_is_refused_and_the_client_hears_it() {
    let server = Server::start();
    let body = json!({"prompt": "a".repeat(10 << 20)});
    error(&server.post(COMPLETIONS, &body), 413);
    // One below it is read, and found too long for the context.
    let body = json!({"prompt": "a ".repeat(1 << 20)});
    assert_eq!(
        error(&server.post(COMPLETIONS, &body), 400)["code"],
        "context_length_exceeded"
    );
}

#[test]
fn bytes_that_are_no_http() {
    let server = Server::start();
    for bytes in [
        &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n"[..],
        b"GET\r\n\r\n",
        b"POST / HTTP/9.9\r\n\r\n",
    ] {
        assert_eq!(crate::server::read_response(server.send(bytes)).status, 400);
    }
    let header = format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "a".repeat(1 << 17));
    assert_eq!(
        crate::server::read_response(server.send(header.as_bytes())).status,
        431
    );
    assert_eq!(server.get("/livez").status, 200);
}

#[test]
fn with_a_key_the_api_wants_it_and_probes_do_not() {
    let options = HttpOptions {
        api_key: Some("secret".into()),
        ..HttpOptions::default()
    };
    let server = Server::with(shared_engine(), options);
    for path in [
        "/v1/models",
        "/admin/state",
        "/admin/experts",
        "/admin/timeline",
    ] {
        let response = server.get(path);
        assert_eq!(error(&response, 401)["code"], "invalid_api_key");
        assert_eq!(response.header("www-authenticate"), Some("Bearer"));
        error(
            &server.request("GET", path, &[("authorization", "Bearer wrong")], b""),
            401,
        );
        assert_eq!(
            server
                .request("GET", path, &[("authorization", "Bearer secret")], b"")
                .status,
            200
        );
    }
    error(&server.post(CHAT, &json!({})), 401);
    for path in [
        "/livez",
        "/readyz",
        "/progressz",
        "/metrics",
        "/version",
        "/openapi.json",
        "/",
    ] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
}
