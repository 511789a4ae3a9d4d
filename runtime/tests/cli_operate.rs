//! What an operator does with a cluster of processes: tries all its ways before it serves, and takes work off a worker that is to be stopped.

use std::io::{BufRead, BufReader};
use std::net::UdpSocket;
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

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

#[test]
fn the_doctor_has_every_way_tried_before_anything_is_served() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let seats = [
        "--seat",
        "attention-0",
        "--seat",
        "attention-1",
        "--seat",
        "expert-0",
    ];
    let made = volley(&[
        "certs",
        "--out",
        &path("certs"),
        "--controller",
        "controller",
    ])
    .args(seats)
    .output();
    assert!(made.unwrap().status.success());
    // Made by another authority.
    assert!(run(&["certs", "--out", &path("other")]).status.success());
    let controller = UdpSocket::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .to_string();
    let config = path("volley.toml");
    let text = format!(
        "[cluster]\nattention_workers = 2\nexpert_workers = 2\n[network]\ncontroller = \"{controller}\"\n"
    );
    std::fs::write(&config, text).unwrap();
    let worker = |role: &str, index: &str, certificates: &str| {
        let args = [
            "worker",
            role,
            "--index",
            index,
            "--config",
            &config,
            "--certificates",
            &path(certificates),
        ];
        Process(volley(&args).stderr(Stdio::null()).spawn().unwrap())
    };
    let mut workers = [
        worker("attention", "0", "certs/attention-0"),
        worker("attention", "1", "certs/attention-1"),
        worker("expert", "0", "certs/expert-0"),
        worker("expert", "1", "other/worker"),
    ];
    let doctor = |wait: &str| {
        let certificates = path("certs/controller");
        let args = [
            "doctor",
            "--cluster",
            &config,
            "--certificates",
            &certificates,
            "--json",
            "--wait",
            wait,
        ];
        let output = run(&args);
        let value: Value =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
        (output.status.code(), value["cluster"].clone())
    };
    // One has a stranger's certificate: it cannot call, and is missed.
    let (code, found) = doctor("20");
    assert_eq!(
        (code, &found["missing"]),
        (Some(1), &serde_json::json!(["expert-1"])),
        "{found}"
    );
    let edges = found["edges"].as_array().unwrap();
    assert_eq!(edges.len(), 2, "{found}");
    assert!(
        edges
            .iter()
            .all(|edge| edge["open"] == true && edge["to"] == "expert-0"),
        "{found}"
    );
    assert!(
        found["workers"][0]["clock_ahead_s"].as_f64().unwrap().abs() < 5.0,
        "{found}"
    );

    // The right one: all four ways are open, and nobody is missed.
    assert!(
        run(&["certs", "--out", &path("certs"), "--seat", "expert-1"])
            .status
            .success()
    );
    workers[3] = worker("expert", "1", "certs/expert-1");
    let (code, found) = doctor("60");
    assert_eq!(code, Some(0), "{found}");
    assert_eq!(
        (found["edges"].as_array().unwrap().len(), &found["missing"]),
        (4, &serde_json::json!([]))
    );
}

#[test]
fn a_worker_is_drained_and_used_again_while_others_go_on() {
    let args = [
        "serve",
        "--port",
        "0",
        "--isolate",
        "process",
        "--attention-workers",
        "2",
        "--expert-workers",
        "2",
        "--expert-replicas",
        "2",
    ];
    let mut server = Process(volley(&args).stdout(Stdio::piped()).spawn().unwrap());
    let mut ready = String::new();
    BufReader::new(server.0.stdout.take().unwrap())
        .read_line(&mut ready)
        .unwrap();
    let url = ready
        .split_whitespace()
        .find(|word| word.starts_with("http://"))
        .unwrap()
        .to_owned();
    let drain = |more: &[&str]| {
        let output = volley(&["drain", "--url", &url, "--json"])
            .args(more)
            .output()
            .unwrap();
        let seat: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        (
            output.status.code(),
            seat,
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    for role in ["attention", "expert"] {
        let (code, seat, text) = drain(&["--role", role, "--index", "1"]);
        assert_eq!(code, Some(0), "{text}");
        assert_eq!(
            (&seat["safe_to_stop"], &seat["since_epoch"]),
            (&true.into(), &Value::Null)
        );
        assert!(seat["startup_s"]["loaded"].as_f64().is_some(), "{seat}");
        // The last one cannot go; it does not, and says why.
        let (code, seat, text) = drain(&["--role", role, "--index", "0", "--timeout", "0.3"]);
        assert_eq!(
            (code, &seat["safe_to_stop"]),
            (Some(1), &false.into()),
            "{text}"
        );
        assert!(text.contains("do not suffice"), "{text}");
        assert_eq!(
            drain(&["--role", role, "--index", "0", "--undo"]).0,
            Some(0)
        );
    }
    let (code, _, text) = drain(&["--role", "expert", "--index", "7"]);
    assert!(
        code == Some(1) && text.contains("there is no expert-7"),
        "{text}"
    );
    let (code, ..) = drain(&["--role", "expert", "--index", "1", "--undo"]);
    assert_eq!(code, Some(0));
    // It takes part again, so the other may go now.
    let (code, _, text) = drain(&["--role", "expert", "--index", "0"]);
    assert_eq!(code, Some(0), "{text}");
}
