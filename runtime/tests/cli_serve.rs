//! `volley serve` as a process: it comes up, answers, drains at a signal, and is measured by `volley bench`.
#![allow(unsafe_code)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A process that does not end by itself within this time is a failure of the test.
const PATIENCE: Duration = Duration::from_secs(30);

/// A server on a port of its own; killed when dropped.
struct Server {
    child: Child,
    address: String,
    ready: String,
}

impl Server {
    /// Starts one in `dir` and waits for the line that says it is ready.
    fn start(dir: &Path, args: &[&str]) -> Server {
        let mut command = Command::new(env!("CARGO_BIN_EXE_volley"));
        command
            .current_dir(dir)
            .args(["serve", "--port", "0"])
            .args(args);
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut ready)
            .unwrap();
        let address = ready
            .split("http://")
            .nth(1)
            .and_then(|rest| rest.split(' ').next());
        let address = address
            .unwrap_or_else(|| panic!("not ready: {ready}"))
            .to_owned();
        Server {
            child,
            address,
            ready,
        }
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Sends a request; the answer's head has been read when this returns.
    fn ask(
        &self,
        method: &str,
        path: &str,
        headers: &str,
        body: &str,
    ) -> (u16, BufReader<TcpStream>) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n{headers}\r\n{body}"
        )
        .unwrap();
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let status = line
            .split(' ')
            .nth(1)
            .unwrap_or_else(|| panic!("no status: {line}"))
            .parse()
            .unwrap();
        while line != "\r\n" {
            line.clear();
            reader.read_line(&mut line).unwrap();
        }
        (status, reader)
    }

    fn get(&self, path: &str) -> (u16, String) {
        let (status, mut reader) = self.ask("GET", path, "", "");
        let mut body = String::new();
        reader.read_to_string(&mut body).unwrap();
        (status, body)
    }

    fn complete(&self, headers: &str, body: &str) -> (u16, String) {
        let (status, mut reader) = self.ask("POST", "/v1/completions", headers, body);
        let mut body = String::new();
        reader.read_to_string(&mut body).unwrap();
        (status, body)
    }

    fn signal(&self, signal: i32) {
        let id = i32::try_from(self.child.id()).unwrap();
        // SAFETY: kill reads two integers; the process is our child and has not been waited for.
        assert_eq!(unsafe { libc::kill(id, signal) }, 0);
    }

    /// Waits for the process's end; its exit status and standard error.
    fn end(mut self) -> (ExitStatus, String) {
        let until = Instant::now() + PATIENCE;
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None => assert!(Instant::now() < until, "the server does not end"),
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let mut log = String::new();
        self.child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut log)
            .unwrap();
        (status, log)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A stream that is far from its end when the next request is sent.
const LONG: &str = r#"{"model":"volley-demo","prompt":"A","max_tokens":1000,"temperature":0,"stream":true,"ignore_eos":true}"#;
const SHORT: &str = r#"{"model":"volley-demo","prompt":"A","max_tokens":4,"temperature":0}"#;

/// Reads a stream's first event, so that the request is known to be running.
fn first_event(stream: &mut BufReader<TcpStream>) -> String {
    let mut line = String::new();
    while !line.starts_with("data: ") {
        line.clear();
        assert!(
            stream.read_line(&mut line).unwrap() > 0,
            "the stream ended before its first event"
        );
    }
    line
}

#[test]
fn a_signal_drains_running_streams_end_new_requests_are_refused_and_the_exit_is_clean() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(
        dir.path(),
        &["--trace", "trace.json", "--expert-workers", "2"],
    );
    assert!(
        server
            .ready
            .contains("volley-demo: 1 attention x 2 expert workers"),
        "{}",
        server.ready
    );
    assert_eq!(server.get("/readyz").0, 200);
    let (status, mut stream) = server.ask("POST", "/v1/completions", "", LONG);
    assert_eq!(status, 200);
    first_event(&mut stream);
    server.signal(libc::SIGTERM);
    // The signal is handled on another thread; the stream of a thousand tokens outlives that by far.
    let until = Instant::now() + PATIENCE;
    while server.get("/readyz").0 != 503 {
        assert!(Instant::now() < until, "the server does not drain");
    }
    assert_eq!(server.complete("", SHORT).0, 503);
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(
        rest.contains("\"finish_reason\":\"length\"") && rest.contains("data: [DONE]"),
        "{rest}"
    );
    let (status, log) = server.end();
    assert_eq!(status.code(), Some(0), "{log}");
    let trace = std::fs::read(dir.path().join("trace.json")).unwrap();
    assert!(serde_json::from_slice::<Vec<Value>>(&trace).unwrap().len() > 100);
}

#[test]
fn a_second_signal_stops_at_once() {
    let server = Server::start(Path::new("."), &[]);
    let streams: Vec<_> = (0..16)
        .map(|_| {
            let (_, mut stream) = server.ask("POST", "/v1/completions", "", LONG);
            first_event(&mut stream);
            stream
        })
        .collect();
    server.signal(libc::SIGINT);
    let until = Instant::now() + PATIENCE;
    while server.get("/readyz").0 != 503 {
        assert!(Instant::now() < until, "the server does not drain");
    }
    server.signal(libc::SIGINT);
    let (status, log) = server.end();
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(
        log.contains("SIGINT again: 16 requests are cut off"),
        "{log}"
    );
    drop(streams);
}

#[test]
fn requests_that_outlast_the_drain_timeout_are_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(
        dir.path().join("volley.toml"),
        "[server]\ndrain_timeout_s = 0\n",
    )
    .unwrap();
    let server = Server::start(dir.path(), &["--config", "volley.toml"]);
    let (_, mut stream) = server.ask("POST", "/v1/completions", "", LONG);
    first_event(&mut stream);
    server.signal(libc::SIGTERM);
    let (status, log) = server.end();
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(log.contains("1 requests have not finished"), "{log}");
}

#[test]
fn the_key_in_the_file_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("key"), "s3cret\n").unwrap();
    let server = Server::start(
        dir.path(),
        &["--api-key-file", "key", "--served-model-name", "will"],
    );
    let body = SHORT.replace("volley-demo", "will");
    assert_eq!(server.complete("", &body).0, 401);
    let (status, answer) = server.complete("Authorization: Bearer s3cret\r\n", &body);
    assert_eq!(status, 200, "{answer}");
    assert!(answer.contains("\"model\":\"will\""), "{answer}");
}

#[test]
fn the_first_scrape_has_every_metric() {
    let server = Server::start(Path::new("."), &[]);
    let (status, metrics) = server.get("/metrics");
    assert_eq!(status, 200);
    let missing: Vec<_> = volley_actors::metric_names::ALL
        .iter()
        .map(|(name, _, _)| name)
        .filter(|name| !metrics.lines().any(|line| line.starts_with(**name)))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");

    let manual = include_str!("../../docs/metrics.md");
    let families = metrics
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    let undocumented: Vec<_> = families
        .filter(|name| !manual.contains(&format!("`{name}`")))
        .collect();
    assert!(
        undocumented.is_empty(),
        "not in docs/metrics.md: {undocumented:?}"
    );
}

#[test]
fn bench_measures_a_server_and_its_counts_agree() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(Path::new("."), &[]);
    for load in [["--rate", "200"], ["--concurrency", "4"]] {
        let args = [
            "--requests",
            "20",
            "--input-len",
            "16",
            "--output-len",
            "8",
            "--slo-ttft",
            "60000",
            "--json",
            "b.json",
        ];
        let mut command = Command::new(env!("CARGO_BIN_EXE_volley"));
        command
            .current_dir(dir.path())
            .args(["bench", "--url", &server.url()])
            .args(load)
            .args(args);
        let output = command.output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(String::from_utf8_lossy(&output.stdout).contains("TTFT"));
        let report: Value =
            serde_json::from_slice(&std::fs::read(dir.path().join("b.json")).unwrap()).unwrap();
        assert_eq!(
            (&report["succeeded"], &report["good_requests"]),
            (&Value::from(20), &Value::from(20))
        );
        assert_eq!(
            (&report["output_tokens"], &report["input_tokens"]),
            (&Value::from(160), &Value::from(320))
        );
        assert_eq!(report["token_count_mismatches"], 0);
        assert_eq!(report["ttft_ms"]["count"], 20);
    }
}

#[test]
fn bench_says_so_when_requests_fail() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("key"), "s3cret").unwrap();
    let server = Server::start(dir.path(), &["--api-key-file", "key"]);
    let mut command = Command::new(env!("CARGO_BIN_EXE_volley"));
    command.args([
        "bench",
        "--url",
        &server.url(),
        "--requests",
        "3",
        "--request-model",
        "volley-demo",
        "--api-key",
        "wrong",
    ]);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&output.stdout).contains("3 x status 401"),
        "{output:?}"
    );
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("3 of 3 requests failed"),
        "{output:?}"
    );
}
