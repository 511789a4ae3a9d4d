//! Crowds at the door of the real program: thousands that only stand there, more than there are places, and some that ask and do not listen.

mod server;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};

use self::server::{PATIENCE, Server};

const PATH: &str = "/v1/completions";

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration/fixtures/models/tiny-mixtral")
}

/// A server with variables of its section, and where its log is.
fn start(settings: &[(&str, &str)]) -> (Server, tempfile::NamedTempFile) {
    let log = tempfile::NamedTempFile::new().unwrap();
    let server = Server::start_with(&model(), &[], |command| {
        for (key, value) in settings {
            command.env(format!("VOLLEY_SERVER_{}", key.to_uppercase()), value);
        }
        command.stderr(File::create(log.path()).unwrap());
    });
    (server, log)
}

fn short() -> Value {
    json!({"prompt": "a", "max_tokens": 2})
}

/// An answer that no system's buffers hold: who does not read it is at work.
fn endless(address: &str) -> TcpStream {
    let body = json!({"prompt": "a", "max_tokens": 4000, "ignore_eos": true, "stream": true, "n": 8, "logprobs": 5}).to_string();
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let head = format!(
        "POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    // It has begun.
    let mut status = [0; "HTTP/1.1 200".len()];
    stream.read_exact(&mut status).unwrap();
    assert!(status.ends_with(b"200"));
    stream
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < until, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn ten_thousand_that_only_stand_there_cost_little_and_keep_nobody_out() {
    let most = getrlimit(Resource::Nofile).maximum;
    let all = Rlimit {
        current: most,
        maximum: most,
    };
    setrlimit(Resource::Nofile, all).unwrap();
    let count = most.map_or(10_000, |most| most.saturating_sub(500).min(10_000));
    let (server, _log) = start(&[("max_connections", "20000"), ("head_timeout_s", "600")]);
    assert_eq!(server.post(PATH, &short()).0, 200);
    let before = server.resident_bytes();
    let mut crowd: Vec<TcpStream> = (0..count)
        .map(|_| TcpStream::connect(&server.address).unwrap())
        .collect();
    wait_until("all are in", || {
        server.metric("volley_http_connections") > count as f64
    });
    // Half of them begin to say something.
    for stream in crowd.iter_mut().step_by(2) {
        stream.write_all(b"POST /v1/completions HT").unwrap();
    }
    for _ in 0..3 {
        assert_eq!(server.post(PATH, &short()).0, 200);
    }
    let each = server.resident_bytes().saturating_sub(before) / count;
    assert!(each < 40 << 10, "{each} bytes for each connection");
    assert_eq!(server.metric("volley_http_connections_shed_total"), 0.0);
    println!("{count} connections, {each} bytes each");
}

#[test]
fn whoever_rests_longest_makes_room_and_the_log_says_so() {
    let (server, log) = start(&[("max_connections", "50"), ("head_timeout_s", "600")]);
    let mut crowd: Vec<TcpStream> = Vec::new();
    for _ in 0..200 {
        crowd.push(TcpStream::connect(&server.address).unwrap());
    }
    assert_eq!(server.post(PATH, &short()).0, 200);
    assert!(server.metric("volley_http_connections_shed_total") >= 150.0);
    // The first of them have been told to go.
    let first = &mut crowd[0];
    first.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(first.read(&mut [0; 1]).unwrap(), 0);
    assert!(server.metric("volley_http_connections") <= 50.0);
    let said = fs::read_to_string(log.path()).unwrap();
    assert!(
        said.contains("all 50 places for connections are taken (server.max_connections)"),
        "{said}"
    );
}

#[test]
fn when_every_place_is_at_work_a_newcomer_is_told_so() {
    let (server, log) = start(&[("max_connections", "3")]);
    let busy: Vec<TcpStream> = (0..3).map(|_| endless(&server.address)).collect();
    let (status, answer) = server.post(PATH, &short());
    assert_eq!(
        (status, &answer["error"]["code"]),
        (503, &json!("overloaded"))
    );
    assert!(
        answer["error"]["message"]
            .as_str()
            .unwrap()
            .contains("server.max_connections")
    );
    drop(busy);
    wait_until("there is room again", || {
        server.post_bytes(PATH, short().to_string().as_bytes()).0 == 200
    });
    let said = fs::read_to_string(log.path()).unwrap();
    assert!(said.contains("new ones were refused with 503"), "{said}");
}

#[test]
fn a_client_that_does_not_listen_is_gone_in_the_end() {
    let (server, _log) = start(&[("stall_timeout_s", "1")]);
    let _deaf = endless(&server.address);
    // The scraper's own connection is left.
    wait_until("the deaf one is gone", || {
        server.metric("volley_http_connections") <= 1.0
    });
    assert_eq!(server.post(PATH, &short()).0, 200);
}
