//! What operators and tools look at.

use serde_json::{Value, json};

use volley::http::HttpOptions;

use crate::server::{MODEL, Server, engine, wait_until};

#[test]
fn models_are_listed_with_their_context() {
    let server = Server::start();
    let list = server.get("/v1/models").json();
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"][0]["id"], MODEL);
    assert_eq!(list["data"][0]["max_model_len"], 4096);
}

#[test]
fn text_to_tokens_and_back() {
    let server = Server::start();
    let text = "First Citizen: caf\u{e9} \u{4f60}\u{597d}";
    let tokens = server.ask("/tokenize", json!({"prompt": text}));
    assert_eq!(tokens["count"], tokens["tokens"].as_array().unwrap().len());
    assert_eq!(tokens["max_model_len"], 4096);
    assert_eq!(
        server.ask("/detokenize", json!({"tokens": tokens["tokens"]}))["prompt"],
        text
    );
}

#[test]
fn health_and_progress() {
    let server = Server::start();
    assert_eq!(server.get("/livez").status, 200);
    wait_until("the server is ready", || {
        server.get("/readyz").status == 200
    });
    let before = server.get("/progressz").json()["steps"].as_u64().unwrap();
    server.ask("/v1/completions", json!({"prompt": "a", "max_tokens": 3}));
    wait_until("the steps are counted", || {
        let progress = server.get("/progressz");
        assert_eq!(progress.status, 200);
        assert!(["ok", "idle"].contains(&progress.json()["state"].as_str().unwrap()));
        progress.json()["steps"].as_u64().unwrap() > before
    });
}

#[test]
fn metrics_count_what_happened() {
    let server = Server::start();
    let value = |name: &str| -> f64 {
        let text = server.get("/metrics").text();
        let line = text
            .lines()
            .find(|line| line.starts_with(name))
            .unwrap_or_else(|| panic!("no {name} in\n{text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    let tokens = value("volley_generation_tokens_total");
    let requests = value("volley_http_requests_total{route=\"/v1/completions\",status=\"200\"}");
    let refused = "volley_http_requests_total{route=\"/v1/completions\",status=\"400\"}";
    server.ask(
        "/v1/completions",
        json!({"prompt": "a", "max_tokens": 5, "ignore_eos": true}),
    );
    server.post("/v1/completions", &json!({}));
    // An answer is counted when it is out, which the client may see first.
    wait_until("both are counted", || {
        let done = "volley_http_requests_total{route=\"/v1/completions\",status=\"200\"}";
        value(done) >= requests + 1.0
            && value(refused) >= 1.0
            // Servers of other tests count in the same series, so the request seen above may be another's.
            && value("volley_generation_tokens_total") >= tokens + 5.0
    });
    // Every server of this process shares the gauge and sets it to zero when it starts, so only that it is there can be held.
    assert!(value("volley_http_requests_in_flight").is_finite());
    assert!(value("volley_time_to_first_token_seconds_count") >= 1.0);
}

#[test]
fn the_load_of_every_expert() {
    let server = Server::start();
    let total = |load: &Value| -> u64 {
        load["rows"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|layer| layer.as_array().unwrap())
            .map(|n| n.as_u64().unwrap())
            .sum()
    };
    let before = total(&server.get("/admin/experts").json());
    server.ask(
        "/v1/completions",
        json!({"prompt": [1, 2, 3, 4], "max_tokens": 1}),
    );
    let load = server.get("/admin/experts").json();
    assert_eq!((&load["layers"], &load["experts"]), (&json!(2), &json!(4)));
    // Four tokens, two layers, two experts a token.
    assert!(total(&load) >= before + 16, "{load}");
}

#[test]
fn the_last_steps_span_by_span() {
    let engine = engine(|config| config.timeline_spans = 1000);
    let server = Server::with(engine, HttpOptions::default());
    assert_eq!(server.get("/admin/timeline").json()["recorded"], false);
    server.ask(
        "/v1/completions",
        json!({"prompt": [1, 2, 3, 4], "max_tokens": 6, "ignore_eos": true}),
    );
    let mut answer = Value::Null;
    // Workers hand their spans over when they rest.
    wait_until("the steps are there", || {
        answer = server.get("/admin/timeline?steps=3").json();
        answer["steps"]
            .as_array()
            .unwrap()
            .last()
            .is_some_and(|step| step["step"] == 5)
    });
    let steps = answer["steps"].as_array().unwrap();
    let numbers: Vec<_> = steps
        .iter()
        .map(|step| step["step"].as_u64().unwrap())
        .collect();
    assert_eq!(
        numbers,
        [3, 4, 5],
        "the prompt's step is 0, each further token has one"
    );
    for step in steps {
        let parts = [
            "attention_us",
            "expert_us",
            "network_us",
            "waiting_us",
            "skew_us",
        ];
        let parts: f64 = parts.iter().map(|part| step[part].as_f64().unwrap()).sum();
        assert!(
            (parts - step["total_us"].as_f64().unwrap()).abs() < 0.01,
            "{step}"
        );
        assert!(
            step["bound"].is_string() && step.get("straggler").is_none(),
            "{step}"
        );
    }
    let workers = answer["workers"].as_array().unwrap();
    let spans = |worker: usize| workers[worker]["spans"].as_array().unwrap();
    assert_eq!(
        (&workers[0]["worker"], &workers[1]["worker"]),
        (&json!("attention-0"), &json!("expert-0"))
    );
    // Two layers and the sampling; two layers. A step planned ahead may be there, with no rows.
    let ours = |worker| {
        let with_rows = |span: &&Value| span[4] != 0;
        spans(worker).iter().filter(with_rows).count()
    };
    assert_eq!((ours(0), ours(1)), (9, 6));
    assert_eq!(
        spans(0)[0].as_array().unwrap()[..6],
        *json!(["attention", 0, 3, 0, 1, 0.0]).as_array().unwrap()
    );

    let trace = server.get("/admin/timeline?steps=3&format=chrome");
    assert!(
        trace
            .header("content-disposition")
            .unwrap()
            .contains("volley-trace.json")
    );
    assert!(trace.json().as_array().unwrap().len() >= 4 + 9 + 6);

    for wrong in [
        "steps=0",
        "steps=100000",
        "steps=x",
        "format=svg",
        "stepz=3",
    ] {
        assert_eq!(
            server.get(&format!("/admin/timeline?{wrong}")).status,
            400,
            "{wrong}"
        );
    }
}

#[test]
fn an_answer_says_how_long_it_is() {
    let server = Server::start();
    let answer = server.get("/v1/models");
    let length = answer.header("content-length").unwrap().parse::<usize>();
    assert_eq!(length, Ok(answer.body.len()));
}

#[test]
fn a_request_keeps_its_id() {
    let server = Server::start();
    let given = server.request("GET", "/livez", &[("x-request-id", "my-id")], b"");
    assert_eq!(given.header("x-request-id"), Some("my-id"));
    let too_long = "a".repeat(1000);
    for headers in [&[][..], &[("x-request-id", too_long.as_str())]] {
        let made = server.request("GET", "/nothing", headers, b"");
        assert!(made.header("x-request-id").unwrap().starts_with("req-"));
    }
}

#[test]
fn the_rest_answers() {
    let server = Server::start();
    assert_eq!(server.get("/openapi.json").json()["openapi"], "3.1.0");
    assert_eq!(
        server.get("/version").json()["version"],
        env!("CARGO_PKG_VERSION")
    );
    let page = server.get("/");
    assert_eq!(
        page.header("content-type"),
        Some("text/html; charset=utf-8")
    );
    let policy = page.header("content-security-policy").unwrap();
    assert!(
        policy.starts_with("default-src 'none'; script-src 'sha256-"),
        "{policy}"
    );
    let state = server.get("/admin/state").json();
    assert_eq!(state["draining"], false);
    assert_eq!(
        (&state["model"]["layers"], &state["micro_batches"]),
        (&json!(2), &json!(2))
    );
    assert_eq!(state["attention"][0]["alive"], true);
    let workers = state["workers"].as_array().unwrap();
    assert_eq!(workers[0]["worker"], "attention-0");
    assert_eq!(workers[0]["since_epoch"], 1);
    let expert = workers.last().unwrap();
    assert!(expert["worker"].as_str().unwrap().starts_with("expert-"));
    assert!(expert["waits"].is_array(), "it answers: {expert}");
}

#[test]
fn top_shows_a_running_server() {
    let server = Server::start();
    let url = format!("http://{}", server.address);
    let top = |more: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_volley"));
        let args = ["top", "--url", &url, "--interval", "0.2"];
        let output = command.args(args).args(more).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        (
            output.status.success(),
            String::from_utf8(output.stdout).unwrap(),
            error,
        )
    };
    let (good, text, error) = top(&["--once"]);
    assert!(good, "{error}");
    assert!(
        text.contains("attention-0") && text.contains("tokens/s") && text.contains("layer   0"),
        "{text}"
    );
    let (good, json, error) = top(&["--json"]);
    assert!(good, "{error}");
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["workers"][0]["worker"], "attention-0");
    // It is no terminal, and says what to do.
    let (good, _, error) = top(&[]);
    assert!(!good && error.contains("--once"), "{error}");
}
