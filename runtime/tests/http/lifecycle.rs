//! Clients that leave, servers that are full, slow or stop.

use std::io::{BufRead, BufReader, Read};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::{Value, json};
use volley::http::HttpOptions;

use crate::server::{Server, engine, read_response, request, shared_engine, wait_until};

const PATH: &str = "/v1/completions";

/// A request that would go on for long.
fn long(stream: bool) -> Vec<u8> {
    let body = json!({"prompt": "a", "max_tokens": 4000, "ignore_eos": true, "stream": stream})
        .to_string();
    request(
        "POST",
        PATH,
        &[("content-type", "application/json")],
        body.as_bytes(),
    )
}

/// Reads up to the first chunk of a stream.
fn read_first_chunk(stream: TcpStream) -> BufReader<TcpStream> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while !line.starts_with("data: ") {
        line.clear();
        assert_ne!(
            reader.read_line(&mut line).unwrap(),
            0,
            "the stream ended before its first chunk"
        );
    }
    reader
}

fn generated(server: &Server) -> u64 {
    server.get("/admin/state").json()["generated_tokens"]
        .as_u64()
        .unwrap()
}

#[test]
fn a_client_that_leaves_is_not_computed_for() {
    let server = Server::with(engine(|_| {}), HttpOptions::default());
    drop(read_first_chunk(server.send(&long(true))));
    wait_until("the streaming request is cancelled", || server.live() == 0);

    let waiting = server.send(&long(false));
    wait_until("the request runs", || server.live() == 1);
    drop(waiting);
    wait_until("the request is cancelled", || server.live() == 0);
    assert!(generated(&server) < 4000, "{}", generated(&server));
}

#[test]
fn a_full_queue_turns_requests_away_and_says_when_to_come_back() {
    let engine = engine(|config| {
        config.max_waiting = 1;
        (config.max_rows, config.prefill_tokens, config.micro_batches) = (2, 1, 1);
    });
    let server = Server::with(engine, HttpOptions::default());
    // Two run, as the step has two rows, and one waits. One that comes before the last has found its place is turned away too.
    let mut held = Vec::new();
    wait_until("three requests are taken", || {
        let mut stream = server.send(&long(true));
        let mut status = [0; "HTTP/1.1 200".len()];
        stream.read_exact(&mut status).unwrap();
        if status.ends_with(b"200") {
            held.push(stream);
        }
        held.len() == 3
    });
    wait_until("one of them waits", || {
        server.get("/admin/state").json()["waiting"] == json!(1)
    });
    let refused = server.post(PATH, &json!({"prompt": "a"}));
    assert_eq!(refused.status, 503, "{}", refused.text());
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert_eq!(refused.json()["error"]["code"], "overloaded");
    drop(held);
    wait_until("the queue is empty", || server.live() == 0);
    server.ask(PATH, json!({"prompt": "a", "max_tokens": 1}));
}

#[test]
fn a_request_that_takes_too_long_is_ended() {
    let options = HttpOptions {
        request_timeout: Duration::from_millis(50),
        ..HttpOptions::default()
    };
    let server = Server::with(shared_engine(), options);
    let response = read_response(server.send(&long(false)));
    assert_eq!(response.status, 504, "{}", response.text());

    // A stream says so in its last event.
    let response = read_response(server.send(&long(true)));
    assert_eq!(response.status, 200);
    let text = response.text();
    let data: Vec<&str> = text
        .split("\n\n")
        .filter_map(|event| event.strip_prefix("data: "))
        .collect();
    let [.., error, "[DONE]"] = data.as_slice() else {
        panic!("{text}")
    };
    let error: Value = serde_json::from_str(error).unwrap();
    assert_eq!(error["error"]["code"], "request_timeout");
}

#[test]
fn a_draining_server_finishes_what_it_began() {
    let mut server = Server::with(engine(|_| {}), HttpOptions::default());
    let body =
        json!({"prompt": "a", "max_tokens": 300, "ignore_eos": true, "stream": true}).to_string();
    let stream = server.send(&request(
        "POST",
        PATH,
        &[("content-type", "application/json")],
        body.as_bytes(),
    ));
    let mut stream = read_first_chunk(stream);

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(server.engine.client.drain());
    let refused = server.post(PATH, &json!({"prompt": "a"}));
    assert_eq!(refused.status, 503);
    assert!(
        refused.json()["error"]["message"]
            .as_str()
            .unwrap()
            .contains("draining")
    );
    wait_until("the server is not ready", || {
        server.get("/readyz").status == 503
    });
    assert_eq!(server.get("/livez").status, 200);

    server.stop();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(
        rest.contains("\"finish_reason\":\"length\"") && rest.contains("data: [DONE]"),
        "{rest}"
    );
    drop(stream);
    server.join();
    assert!(
        TcpStream::connect(server.address).is_err(),
        "a server that has stopped takes no connections"
    );
}

#[test]
fn a_cluster_that_stops_ends_its_streams_with_an_error() {
    let server = Server::with(engine(|_| {}), HttpOptions::default());
    let mut stream = read_first_chunk(server.send(&long(true)));
    server.engine.cluster.shutdown(Duration::ZERO);
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(
        rest.contains("\"type\":\"server_error\"") && rest.contains("data: [DONE]"),
        "{rest}"
    );
    assert_eq!(server.post(PATH, &json!({"prompt": "a"})).status, 503);
    // The process lives all the same.
    assert_eq!(server.get("/livez").status, 200);
}
