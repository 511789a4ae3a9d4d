//! The real program as a server for tests, and a plain HTTP client: every wait has a deadline, and the process is killed on drop.
//!
//! The client is a socket and a few lines on purpose: it can send what no HTTP library lets out.

// Every test program includes this module and uses its own part of it.
#![allow(dead_code)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use serde_json::Value;

/// What takes longer than this is a failure of the test.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A running `volley serve` on a port of its own.
pub(crate) struct Server {
    child: Child,
    /// `127.0.0.1:PORT`.
    pub(crate) address: String,
}

impl Server {
    /// Starts `volley serve --model MODEL` and waits for the line that says it is ready.
    pub(crate) fn start(model: &Path, args: &[&str]) -> Server {
        Server::start_with(model, args, |_| {})
    }

    /// The same, with a last word on its command: variables, where its log goes.
    pub(crate) fn start_with(
        model: &Path,
        args: &[&str],
        configure: impl FnOnce(&mut Command),
    ) -> Server {
        let mut command = Command::new(env!("CARGO_BIN_EXE_volley"));
        command
            .args(["serve", "--port", "0", "--log-level", "warn", "--model"])
            .arg(model)
            .args(args);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit());
        configure(&mut command);
        let mut child = command.spawn().unwrap();
        let stdout = child.stdout.take().unwrap();
        // From here on the process is killed whatever happens.
        let mut server = Server {
            child,
            address: String::new(),
        };
        let (send, receive) = mpsc::channel();
        std::thread::spawn(move || {
            let mut line = String::new();
            let read = BufReader::new(stdout).read_line(&mut line);
            let _ = send.send(read.map(|_| line));
        });
        let ready = receive
            .recv_timeout(PATIENCE)
            .expect("the server is not ready in time")
            .unwrap();
        let address = ready
            .split("http://")
            .nth(1)
            .and_then(|rest| rest.split(' ').next());
        server.address = address
            .unwrap_or_else(|| panic!("{}: not ready: {ready}", model.display()))
            .to_owned();
        server
    }

    /// Memory of the process, in bytes.
    pub(crate) fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().nth(1));
        1024 * kib.unwrap().parse::<u64>().unwrap()
    }

    /// The sum over the labels of a metric.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let (status, text) = self.get("/metrics");
        assert_eq!(status, 200);
        let values = text
            .lines()
            .filter(|line| line.split([' ', '{']).next() == Some(name))
            .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap());
        let values: Vec<f64> = values.collect();
        assert!(!values.is_empty(), "no {name} in\n{text}");
        values.iter().sum()
    }

    /// Sends `body` with POST; the status and the whole answer as JSON.
    pub(crate) fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let (status, body) = self.post_bytes(path, body.to_string().as_bytes());
        let text = String::from_utf8_lossy(&body);
        (
            status,
            serde_json::from_str(&text)
                .unwrap_or_else(|error| panic!("{error} in the answer: {text}")),
        )
    }

    /// Sends any bytes with POST; the status and the whole answer.
    pub(crate) fn post_bytes(&self, path: &str, body: &[u8]) -> (u16, Vec<u8>) {
        let (status, chunked, mut reader) = self.send("POST", path, body);
        let mut body = Vec::new();
        if chunked {
            while let Some(chunk) = read_chunk(&mut reader) {
                body.extend(chunk);
            }
        } else {
            reader.read_to_end(&mut body).unwrap();
        }
        (status, body)
    }

    /// Sends a POST request whose answer is a stream; ready to be read from its first event on.
    pub(crate) fn stream(&self, path: &str, body: &Value) -> Stream {
        let (status, chunked, reader) = self.send("POST", path, body.to_string().as_bytes());
        assert!(status == 200 && chunked, "status {status}");
        Stream {
            reader,
            text: String::new(),
        }
    }

    /// The status of a GET request and its answer.
    pub(crate) fn get(&self, path: &str) -> (u16, String) {
        let (status, _, mut reader) = self.send("GET", path, b"");
        let mut body = String::new();
        reader.read_to_string(&mut body).unwrap();
        (status, body)
    }

    /// Status, whether the body is chunked, and the body.
    fn send(&self, method: &str, path: &str, body: &[u8]) -> (u16, bool, BufReader<TcpStream>) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).unwrap();
        // A server may refuse a body before it has read it all.
        let _ = stream.write_all(body);
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let status = line
            .split(' ')
            .nth(1)
            .unwrap_or_else(|| panic!("no status: {line}"))
            .parse()
            .unwrap();
        let mut chunked = false;
        while line != "\r\n" {
            line.clear();
            assert!(
                reader.read_line(&mut line).unwrap() > 0,
                "the head of the answer is cut off"
            );
            chunked |= line
                .to_ascii_lowercase()
                .starts_with("transfer-encoding: chunked");
        }
        (status, chunked, reader)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Server-sent events on their way. Dropped, the connection is closed and the request cancelled.
pub(crate) struct Stream {
    reader: BufReader<TcpStream>,
    text: String,
}

impl Stream {
    /// The data of the next event; `None` at the end of the answer.
    pub(crate) fn event(&mut self) -> Option<String> {
        loop {
            if let Some((event, rest)) = self.text.split_once("\n\n") {
                let event = event.strip_prefix("data: ").map(str::to_owned);
                self.text = rest.to_owned();
                match event {
                    Some(data) => return Some(data),
                    // A comment that keeps the connection alive.
                    None => continue,
                }
            }
            self.text += &String::from_utf8(read_chunk(&mut self.reader)?).unwrap();
        }
    }
}

/// The next chunk of a chunked body.
fn read_chunk(reader: &mut BufReader<TcpStream>) -> Option<Vec<u8>> {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let size =
        usize::from_str_radix(line.trim(), 16).unwrap_or_else(|_| panic!("no chunk: {line:?}"));
    let mut chunk = vec![0; size + 2];
    reader.read_exact(&mut chunk).unwrap();
    chunk.truncate(size);
    (size > 0).then_some(chunk)
}
