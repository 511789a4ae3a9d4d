//! Serving over RDMA: bit for bit what one process says, also when a worker is killed. Needs a RoCE device, as in `integration/rdma-guest`; elsewhere each test says
//! that it was left out.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

/// Generous: in the guest everything is emulated.
const PATIENCE: Duration = Duration::from_secs(240);
const SHAPE: [&str; 10] = [
    "--isolate",
    "process",
    "--transport",
    "rdma",
    "--attention-workers",
    "2",
    "--expert-workers",
    "3",
    "--expert-replicas",
    "2",
];

fn volley(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_volley"));
    // An emulated processor that is busy elsewhere is no sign of death.
    command.args(args).env("VOLLEY_NETWORK_IDLE_S", "5");
    command
}

/// Whether rows can travel by RDMA here.
fn can() -> bool {
    let devices = std::fs::read_dir("/sys/class/infiniband");
    let there = devices.is_ok_and(|mut devices| devices.next().is_some());
    if !there {
        eprintln!("left out: no RDMA device");
    }
    there
}

fn generate(more: &[&str]) -> Output {
    let prompt = [
        "generate",
        "--prompt",
        "ROMEO:",
        "--max-tokens",
        "20",
        "--temperature",
        "0",
    ];
    volley(&[&prompt[..], more].concat()).output().unwrap()
}

#[test]
fn a_cluster_over_rdma_says_what_one_process_says() {
    if !can() {
        return;
    }
    let (one, many) = (generate(&[]), generate(&SHAPE));
    for output in [&one, &many] {
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{error}");
    }
    assert_eq!(
        String::from_utf8_lossy(&many.stdout),
        String::from_utf8_lossy(&one.stdout)
    );
}

/// A process that is killed when dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn complete(address: &str, tokens: u32) -> String {
    let body = format!(
        "{{\"model\":\"volley-demo\",\"prompt\":\"To be\",\"max_tokens\":{tokens},\"temperature\":0,\"ignore_eos\":true}}"
    );
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json";
    write!(
        stream,
        "{head}\r\nContent-Length: {}\r\n\r\n{body}",
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
fn a_killed_expert_worker_is_routed_around_and_no_stream_notices() {
    if !can() {
        return;
    }
    let mut child = volley(&[&["serve", "--port", "0"], &SHAPE[..]].concat())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = String::new();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let server = Process(child);
    out.read_line(&mut ready).unwrap();
    let address = ready
        .split("http://")
        .nth(1)
        .and_then(|rest| rest.split(' ').next());
    let address = address.unwrap_or_else(|| panic!("not ready: {ready:?}"));
    let calm = complete(address, 60);
    let is_victim = |pid: &u32| {
        let command = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        command.contains("expert\0--index\x001\0")
    };
    let threads = std::fs::read_dir(format!("/proc/{}/task", server.0.id())).unwrap();
    let children = threads.flat_map(|thread| {
        let list = std::fs::read_to_string(thread.unwrap().path().join("children"));
        let list = list.unwrap_or_default();
        let pids: Vec<u32> = list
            .split_whitespace()
            .map(|pid| pid.parse().unwrap())
            .collect();
        pids
    });
    let victim = children
        .into_iter()
        .find(is_victim)
        .expect("an expert worker");
    let stormy = std::thread::scope(|scope| {
        let asked = scope.spawn(|| complete(address, 60));
        std::thread::sleep(Duration::from_millis(200));
        let killed = Command::new("kill")
            .args(["-KILL", &victim.to_string()])
            .status();
        assert!(killed.unwrap().success());
        asked.join().unwrap()
    });
    assert_eq!(stormy, calm);
}

#[test]
fn traffic_that_meets_a_known_anomaly_is_refused_or_changed() {
    if !can() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    // As `volley vet search` writes it: whoever has two queue pairs or more, each with room for 64 frames or more, is paused.
    let space = volley_collie::Space::default();
    let at_least = |axis, bound: f64| volley_collie::Factor::Within {
        quantity: volley_collie::Quantity::Axis(axis),
        lower: Some(volley_collie::Edge {
            inside: bound,
            outside: bound - 0.5,
            likely: None,
        }),
        upper: None,
    };
    let point: volley_collie::Point = serde_json::from_value(serde_json::json!({
        "operation": "rc-write-imm", "direction": "bidirectional", "mtu": 1024, "memory_a": "dram0", "memory_b": "dram0",
        "qps": 3, "regions": 2, "region_bytes": 65536, "batch": 1, "send_depth": 64, "receive_depth": 2, "sges": 1, "messages": [64],
    }))
    .unwrap();
    let anomaly = volley_collie::Mfs {
        factors: vec![
            at_least(volley_collie::Axis::Qps, 2.0),
            at_least(volley_collie::Axis::SendDepth, 64.0),
        ],
        anchor: point,
        symptom: volley_collie::Symptom {
            pause: Some(0.2),
            throughput: None,
            loss: None,
        },
        signature: vec![],
        probes: 1,
    };
    let known = volley_collie::KnownAnomalies::new("rxe".into(), space, vec![], vec![anomaly]);
    known.save(path("known.json").as_ref()).unwrap();
    let config = |anomalies: &str| {
        let text = format!(
            "[rdma]\nknown_anomalies = \"{}\"\nanomalies = \"{anomalies}\"\n",
            path("known.json")
        );
        std::fs::write(path("volley.toml"), text).unwrap();
        let more = ["--config", &path("volley.toml")];
        generate(&[&SHAPE[..], &more].concat())
    };
    let avoided = config("avoid");
    let log = String::from_utf8_lossy(&avoided.stderr).into_owned();
    assert!(avoided.status.success(), "{log}");
    assert!(log.contains("keep clear of a known anomaly"), "{log}");
    assert_eq!(avoided.stdout, generate(&[]).stdout);
    let refused = config("refuse");
    let log = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success());
    assert!(
        log.contains("what is known of rxe") && log.contains("rdma.anomalies"),
        "{log}"
    );
}
