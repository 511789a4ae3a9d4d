//! Clusters of processes: `volley serve --isolate process`, and `volley worker` with certificates.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A process that does not do what is awaited within this time is a failure of the test.
const PATIENCE: Duration = Duration::from_secs(60);

fn volley(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_volley"));
    command.args(args);
    command
}

fn run(args: &[&str]) -> Output {
    volley(args).output().unwrap()
}

/// A process that is killed when dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a server and returns the address in its ready line.
fn serve(args: &[&str]) -> (Process, String) {
    let mut child = volley(&["serve", "--port", "0"])
        .args(args)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = String::new();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let process = Process(child);
    out.read_line(&mut ready).unwrap();
    let address = ready
        .split("http://")
        .nth(1)
        .and_then(|rest| rest.split(' ').next());
    let address = address.unwrap_or_else(|| panic!("not ready: {ready:?}"));
    (process, address.to_owned())
}

fn complete(address: &str, prompt: &str, tokens: u32) -> String {
    let body = format!(
        "{{\"model\":\"volley-demo\",\"prompt\":\"{prompt}\",\"max_tokens\":{tokens},\"temperature\":0,\"ignore_eos\":true}}"
    );
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(
        stream,
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200"), "{answer}");
    let body: serde_json::Value = serde_json::from_str(body).unwrap();
    body["choices"][0]["text"].as_str().unwrap().to_owned()
}

#[test]
fn a_cluster_of_processes_says_what_one_process_says() {
    let prompt = [
        "generate",
        "--prompt",
        "ROMEO:",
        "--max-tokens",
        "30",
        "--temperature",
        "0",
    ];
    let one = run(&prompt);
    assert!(
        one.status.success(),
        "{}",
        String::from_utf8_lossy(&one.stderr)
    );
    let shape = [
        "--isolate",
        "process",
        "--attention-workers",
        "2",
        "--expert-workers",
        "3",
    ];
    let many = run(&[&prompt[..], &shape].concat());
    assert!(
        many.status.success(),
        "{}",
        String::from_utf8_lossy(&many.stderr)
    );
    assert_eq!(
        String::from_utf8_lossy(&many.stdout),
        String::from_utf8_lossy(&one.stdout)
    );
}

/// Processes whose parent is `parent`.
fn children(parent: u32) -> Vec<u32> {
    let path = format!("/proc/{parent}/task");
    let threads = std::fs::read_dir(path).unwrap();
    let of = |thread: std::io::Result<std::fs::DirEntry>| {
        std::fs::read_to_string(thread.unwrap().path().join("children")).unwrap_or_default()
    };
    let lists: Vec<String> = threads.map(of).collect();
    lists
        .iter()
        .flat_map(|list| list.split_whitespace())
        .map(|pid| pid.parse().unwrap())
        .collect()
}

#[test]
fn killed_worker_processes_are_started_again_and_no_stream_notices() {
    let shape = [
        "--isolate",
        "process",
        "--attention-workers",
        "2",
        "--expert-workers",
        "2",
    ];
    let (server, address) = serve(&[&shape[..], &["--expert-replicas", "2"]].concat());
    let prompts: Vec<String> = (0..8).map(|i| format!("{i}: To be or not")).collect();
    let calm: Vec<String> = prompts
        .iter()
        .map(|prompt| complete(&address, prompt, 200))
        .collect();
    let mut pids = children(server.0.id());
    assert_eq!(pids.len(), 4, "four workers");
    pids.sort_unstable();
    frozen_workers_are_named(&server, &address);
    for victim in pids {
        let stormy: Vec<String> = std::thread::scope(|scope| {
            let ask = |prompt: &String| {
                let prompt = prompt.clone();
                let address = &address;
                scope.spawn(move || complete(address, &prompt, 200))
            };
            let asked: Vec<_> = prompts.iter().map(ask).collect();
            std::thread::sleep(Duration::from_millis(50));
            let killed = Command::new("kill")
                .args(["-KILL", &victim.to_string()])
                .status();
            assert!(killed.unwrap().success());
            asked
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        assert_eq!(stormy, calm);
        let start = Instant::now();
        while children(server.0.id()).len() < 4 {
            assert!(
                start.elapsed() < PATIENCE,
                "the worker is not started again"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    let mut left = children(server.0.id());
    drop(server);
    let start = Instant::now();
    while !left.is_empty() {
        left.retain(|pid| Path::new(&format!("/proc/{pid}/exe")).exists());
        assert!(
            start.elapsed() < PATIENCE,
            "workers outlive a server that was killed: {left:?}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// `/admin/state` of a cluster in which a worker hangs says who waits for it.
fn frozen_workers_are_named(server: &Process, address: &str) {
    let state = |address: &str| {
        let mut stream = TcpStream::connect(address).unwrap();
        write!(
            stream,
            "GET /admin/state HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        serde_json::from_str::<serde_json::Value>(body).unwrap()
    };
    let command = |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    let is_victim = |pid: &u32| command(*pid).contains("expert\0--index\x001\0");
    let victim = children(server.0.id()).into_iter().find(is_victim).unwrap();
    let signal = |name: &str| {
        let sent = Command::new("kill")
            .args([name, &victim.to_string()])
            .status();
        assert!(sent.unwrap().success());
    };
    let calm = complete(address, "Hark", 300);
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| complete(address, "Hark", 300));
        signal("-STOP");
        let start = Instant::now();
        loop {
            let workers = state(address)["workers"].clone();
            let waits = |worker: &serde_json::Value| {
                let waits = worker["waits"].as_array();
                waits.is_some_and(|waits| waits.iter().any(|wait| wait["for"][0] == "expert-1"))
            };
            let workers = workers.as_array().unwrap();
            let silent = workers
                .iter()
                .any(|w| w["worker"] == "expert-1" && w["waits"].is_null());
            if silent && (workers.iter().any(waits) || asked.is_finished()) {
                break;
            }
            assert!(start.elapsed() < PATIENCE, "nobody is named: {workers:?}");
        }
        signal("-CONT");
        assert_eq!(asked.join().unwrap(), calm);
    });
}

/// A UDP port that was free a moment ago.
fn free_port() -> u16 {
    UdpSocket::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

#[test]
fn workers_join_with_certificates_and_others_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("certs");
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let certs = folder.to_str().unwrap();
    let made = run(&["certs", "--out", certs]);
    assert!(
        made.status.success(),
        "{}",
        String::from_utf8_lossy(&made.stderr)
    );
    let again = run(&["certs", "--out", certs]);
    assert!(String::from_utf8_lossy(&again.stderr).contains("is there already"));
    let more = run(&["certs", "--out", certs, "--worker", "gpu-7"]);
    assert!(
        more.status.success(),
        "{}",
        String::from_utf8_lossy(&more.stderr)
    );

    let controller = format!("127.0.0.1:{}", free_port());
    let (worker_certs, controller_certs) = (path("worker"), path("controller"));
    let worker = |role: &str, certificates: &str, more: &[&str]| {
        volley(&[
            "worker",
            role,
            "--index",
            "0",
            "--controller",
            &controller,
            "--certificates",
            certificates,
        ])
        .args(more)
        .stderr(Stdio::piped())
        .spawn()
        .map(Process)
        .unwrap()
    };
    let refusal = |mut process: Process| {
        let mut text = String::new();
        process
            .0
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(process.0.wait().unwrap().code(), Some(1), "{text}");
        text
    };
    // The wrong certificate, and none.
    let text = refusal(worker("expert", &controller_certs, &[]));
    assert!(text.contains("is a controller's"), "{text}");
    let text = refusal(worker("expert", &path("nobody"), &[]));
    assert!(text.contains("nobody/ca.pem"), "{text}");
    let text = run(&[
        "worker",
        "expert",
        "--index",
        "1",
        "--certificates",
        &worker_certs,
    ]);
    assert!(String::from_utf8_lossy(&text.stderr).contains("--index is 1"));

    // Nobody is there yet, and the doctor says so.
    let doctor = || {
        let call = [
            "doctor",
            "--call",
            "--controller",
            &controller,
            "--certificates",
            &worker_certs,
        ];
        let output = run(&call);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let line = text.lines().find(|line| line.contains("controller: "));
        (
            output.status.success(),
            line.unwrap_or_else(|| panic!("{text}")).to_owned(),
        )
    };
    let (good, line) = doctor();
    assert!(
        !good && line.starts_with("BAD") && line.contains("cannot reach"),
        "{line}"
    );

    // Workers may be there first.
    let _expert = worker("expert", &path("gpu-7"), &[]);
    let _attention = worker("attention", &worker_certs, &[]);
    let (_server, address) = serve(&[
        "--isolate",
        "host",
        "--controller",
        &controller,
        "--certificates",
        &controller_certs,
    ]);
    assert!(!complete(&address, "ROMEO:", 5).is_empty());
    let (_, line) = doctor();
    assert!(
        line.starts_with("ok") && line.contains("answered in"),
        "{line}"
    );
    let text = refusal(worker(
        "expert",
        &worker_certs,
        &["--max-batch-tokens", "64"],
    ));
    assert!(
        text.contains("limits.max_batch_tokens is 512 here and 64 there"),
        "{text}"
    );
}
