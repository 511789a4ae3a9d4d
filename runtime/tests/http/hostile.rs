//! Clients that mean ill or are broken: dribblers, resters, garbage behind a request, halves of connections.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use serde_json::json;
use volley::http::{HttpOptions, Limits};

use crate::server::{DEADLINE, Server, engine, read_response, request, shared_engine, wait_until};

const PATH: &str = "/v1/completions";

/// A server that is in a hurry.
fn hasty() -> Server {
    let hurry = Duration::from_millis(300);
    let options = HttpOptions {
        body_timeout: hurry,
        limits: Limits {
            head_timeout: hurry,
            ..Limits::default()
        },
        ..HttpOptions::default()
    };
    Server::with(shared_engine(), options)
}

/// Sends bytes one at a time until the server has had enough; what it said until then.
fn dribble(stream: &mut TcpStream, bytes: impl IntoIterator<Item = u8>) -> String {
    let until = Instant::now() + DEADLINE;
    stream
        .set_read_timeout(Some(Duration::from_millis(20)))
        .unwrap();
    let mut answer = Vec::new();
    for byte in bytes {
        assert!(Instant::now() < until, "the server has patience for ever");
        let sent = stream.write_all(&[byte]);
        let mut buffer = [0; 4096];
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => answer.extend_from_slice(&buffer[..n]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => break,
        }
        if sent.is_err() {
            break;
        }
    }
    String::from_utf8(answer).unwrap()
}

#[test]
fn a_head_that_dribbles_in_is_not_waited_for() {
    let server = hasty();
    let mut stream = server.send(b"GET /livez HTTP/1.1\r\n");
    let answer = dribble(&mut stream, b"x-a: b\r\n".iter().copied().cycle());
    assert_eq!(answer, "", "there was nothing to answer");
    assert_eq!(server.get("/livez").status, 200);
}

#[test]
fn a_body_that_dribbles_in_gets_a_408() {
    let server = hasty();
    let head = format!(
        "POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000000\r\n\r\n"
    );
    let mut stream = server.send(head.as_bytes());
    let answer = dribble(&mut stream, std::iter::repeat(b' '));
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    assert!(answer.contains("server.body_timeout_s"), "{answer}");
    assert_eq!(server.get("/livez").status, 200);
}

#[test]
fn a_connection_may_not_rest_for_ever() {
    let server = hasty();
    let mut stream = server.send(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n");
    // The answer, and then the end: the client asked for more to come.
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    // Nor before its first request.
    let mut silent = server.send(b"");
    assert_eq!(silent.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn heads_too_large_and_of_too_many_lines_are_refused() {
    let server = Server::start();
    let many = |count: usize| -> String {
        let lines = (0..count).map(|i| format!("x-{i}: a\r\n"));
        format!(
            "GET /livez HTTP/1.1\r\nconnection: close\r\n{}\r\n",
            lines.collect::<String>()
        )
    };
    let status = |head: &str| read_response(server.send(head.as_bytes())).status;
    assert_eq!((status(&many(99)), status(&many(100))), (200, 431));
    let long = |bytes: usize| {
        format!(
            "GET /livez HTTP/1.1\r\nconnection: close\r\nx: {}\r\n\r\n",
            "a".repeat(bytes)
        )
    };
    assert_eq!(
        (status(&long(16 << 10)), status(&long(64 << 10))),
        (200, 431)
    );
    // One that never ends is not kept in memory until it does.
    let mut stream = server.send(b"GET /livez HTTP/1.1\r\nx: ");
    let mut sent = 0;
    while stream.write_all(&[b'a'; 4096]).is_ok() {
        sent += 4096;
        assert!(sent < 64 << 20, "64 MiB of a header were taken");
    }
}

#[test]
fn requests_in_a_row_are_answered_in_order_and_garbage_ends_the_row() {
    let server = Server::start();
    let good = "GET /livez HTTP/1.1\r\nhost: x\r\n\r\n";
    let missing = "GET /nowhere HTTP/1.1\r\nhost: x\r\n\r\n";
    let mut stream =
        server.send(format!("{good}{missing}\x00\x16garbage\r\n\r\n{good}").as_bytes());
    let mut answers = Vec::new();
    // The end may be a reset, as the last request is not read.
    let _ = stream.read_to_end(&mut answers);
    let answers = String::from_utf8(answers).unwrap();
    let statuses: Vec<&str> = answers
        .match_indices("HTTP/1.1 ")
        .map(|(at, start)| &answers[at + start.len()..][..3])
        .collect();
    assert_eq!(statuses, ["200", "404", "400"], "{answers}");
}

#[test]
fn a_client_that_closes_its_half_has_left() {
    let server = Server::with(engine(|_| {}), HttpOptions::default());
    let body = json!({"prompt": "a", "max_tokens": 4000, "ignore_eos": true}).to_string();
    let stream = server.send(&request(
        "POST",
        PATH,
        &[("content-type", "application/json")],
        body.as_bytes(),
    ));
    wait_until("the request runs", || server.live() == 1);
    stream.shutdown(Shutdown::Write).unwrap();
    wait_until("the request is cancelled", || server.live() == 0);
    let tokens = server.get("/admin/state").json()["generated_tokens"].clone();
    assert!(tokens.as_u64().unwrap() < 4000, "{tokens}");
}

#[test]
fn bodies_that_arrive_together_share_their_memory() {
    let options = HttpOptions {
        bodies_bytes: 1 << 20,
        ..HttpOptions::default()
    };
    let server = Server::with(shared_engine(), options);
    let head = |bytes: usize| {
        format!(
            "POST {PATH} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {bytes}\r\n\r\n"
        )
    };
    let most = 900 << 10;
    let begin = || {
        let mut first = server.send(head(1 << 20).as_bytes());
        first.write_all(&vec![b' '; most]).unwrap();
        first
    };
    let mut first = begin();
    let body = json!({"prompt": "a", "max_tokens": 1}).to_string();
    let padded = format!("{}{body}", " ".repeat(most));
    let second = [head(padded.len()).as_bytes(), padded.as_bytes()].concat();
    // Which of the two is read first is not known; where it was the second, the first found no room and is begun again.
    wait_until("the second finds no room", || {
        let answer = read_response(server.send(&second));
        let refused = answer.status == 503 && answer.text().contains("server.bodies_memory");
        if !refused {
            first = begin();
        }
        refused
    });
    // A small one does.
    server.ask(PATH, json!({"prompt": "a", "max_tokens": 1}));
    drop(first);
    wait_until("the room is free again", || {
        read_response(server.send(&second)).status == 200
    });
}
