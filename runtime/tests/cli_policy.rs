//! The policies of `[scheduler]` through the real server: who is served first when there is room for one.

mod server;

use std::path::Path;

use serde_json::{Value, json};
use server::{Server, Stream};

/// One row in a step: sequences are computed one after the other, in the policy's order.
const ONE_AT_A_TIME: [&str; 4] = ["--max-batch-tokens", "1", "--micro-batches", "1"];

fn serve(policy: &[&str]) -> Server {
    let model =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration/fixtures/models/tiny-mixtral");
    Server::start(&model, &[&ONE_AT_A_TIME, policy].concat())
}

/// A request under way, with its first token here.
fn open(server: &Server, tokens: u32, more: Value) -> Stream {
    let mut body = json!({
        "model": "tiny-mixtral", "prompt": [1, 2, 3], "max_tokens": tokens, "temperature": 0, "ignore_eos": true, "stream": true,
    });
    let fields = body.as_object_mut().unwrap();
    fields.extend(more.as_object().unwrap().clone());
    server.stream("/v1/completions", &body)
}

/// How many requests had ended when the last of four long ones and one short one, which came last, had.
fn ended_with_the_short_one(server: &Server, long: Value, short: Value) -> f64 {
    let mut first = open(server, LONG, long.clone());
    first.event().expect("it runs");
    let _others = [0; 3].map(|_| open(server, LONG, long.clone()));
    let mut last = open(server, 2, short);
    while last.event().is_some() {}
    server.metric("volley_requests_total")
}

const LONG: u32 = 400;

#[test]
fn first_come_is_first_served() {
    let server = serve(&[]);
    let ended = ended_with_the_short_one(&server, json!({}), json!({}));
    assert_eq!(ended, 5.0);
}

#[test]
fn the_earliest_deadline_comes_first() {
    let server = serve(&["--policy", "earliest-deadline", "--slo-classes", "10=0.001"]);
    let ended = ended_with_the_short_one(&server, json!({}), json!({"priority": 10}));
    assert!(ended < 5.0, "it waited for everybody");
}

#[test]
fn a_tenant_that_floods_does_not_keep_another_waiting() {
    let server = serve(&["--policy", "fair-share", "--tenant-weights", "*=1,calm=2"]);
    let ended =
        ended_with_the_short_one(&server, json!({"user": "flood"}), json!({"user": "calm"}));
    assert!(ended < 5.0, "it waited for everybody");
}
