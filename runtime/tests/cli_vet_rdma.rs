//! `volley vet` on real devices: two that reach each other, as in `integration/rdma-guest`. Elsewhere each test says that it was left out.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// In the guest everything is emulated.
const PATIENCE: Duration = Duration::from_secs(60);
/// Short samples: what is tested is what happens, not how fast.
const SHORT: [&str; 8] = [
    "--settle",
    "0.1",
    "--sample",
    "0.1",
    "--samples",
    "4",
    "--limit",
    "30",
];

fn volley(args: &[&[&str]]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_volley"));
    command.arg("vet").args(args.concat());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The first two devices, as `--devices` takes them.
fn devices() -> Option<String> {
    let mut names: Vec<String> = fs::read_dir("/sys/class/infiniband")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    if names.len() < 2 {
        assert!(std::env::var_os("RDMA_GUEST").is_none(), "no two devices");
        eprintln!("left out: no two RDMA devices");
        return None;
    }
    Some(names[..2].join(","))
}

#[track_caller]
fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// What an end received in the median second.
#[track_caller]
fn packets(probe: &Value, end: usize) -> f64 {
    let samples = probe["measurement"]["ends"][end].as_array();
    let samples = samples.unwrap_or_else(|| panic!("nothing was measured: {probe}"));
    let mut rates: Vec<f64> = samples
        .iter()
        .map(|sample| sample["packets_per_s"].as_f64().unwrap())
        .collect();
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

/// Queue pairs and regions that the system holds for programs: all but one queue pair of each device, which is the kernel's own.
fn held() -> u64 {
    let shown = Command::new("rdma")
        .args(["-j", "resource", "show"])
        .output()
        .unwrap();
    let shown: Value = serde_json::from_slice(&shown.stdout).unwrap();
    let of = |device: &Value| device["qp"].as_u64().unwrap() - 1 + device["mr"].as_u64().unwrap();
    shown.as_array().unwrap().iter().map(of).sum()
}

#[test]
fn every_transport_and_verb_runs_both_ways_and_in_a_loop() {
    let Some(devices) = devices() else { return };
    for operation in [
        "rc-send",
        "rc-write",
        "rc-write-imm",
        "rc-read",
        "uc-send",
        "uc-write",
        "uc-write-imm",
        "ud-send",
    ] {
        for direction in ["unidirectional", "bidirectional", "loopback"] {
            let workload = [
                "--operation",
                operation,
                "--direction",
                direction,
                "--mtu",
                "1024",
                "--qps",
                "3",
                "--regions",
                "4",
                "--batch",
                "5",
                "--send-depth",
                "12",
                "--receive-depth",
                "64",
                "--sges",
                "3",
                "--messages",
                if operation == "ud-send" {
                    "32,1024,500"
                } else {
                    "32,9000,500,4096"
                },
            ];
            let probe = volley(&[
                &["probe", "--devices", &devices, "--json"],
                &["--settle", "0.1", "--sample", "0.1", "--samples", "3"],
                &workload,
            ]);
            let probe = json(&{ probe }.output().unwrap());
            let what = format!("{operation} {direction}: {probe}");
            assert!(probe["verdict"].get("clean").is_some(), "{what}");
            assert!(packets(&probe, 0) > 0.0, "{what}");
            assert_eq!(
                packets(&probe, 1) > 0.0,
                direction == "bidirectional",
                "{what}"
            );
        }
    }
}

/// An agent that ends with the test.
struct Agent {
    child: Child,
    address: String,
}

impl Agent {
    fn start() -> Self {
        let mut child = volley(&[&["agent", "--listen", "127.0.0.1:0"]])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let address = line
            .trim()
            .strip_prefix("listening on ")
            .unwrap()
            .to_owned();
        Agent { child, address }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _gone = self.child.kill().and_then(|()| self.child.wait());
    }
}

#[test]
fn an_agent_serves_one_coordinator_after_the_other_and_nothing_is_left_of_any() {
    let Some(devices) = devices() else { return };
    let agent = Agent::start();
    let probe = |more: &[&str]| {
        let target = [
            "probe",
            "--devices",
            &devices,
            "--agent",
            &agent.address,
            "--json",
        ];
        volley(&[&target, &["--operation", "rc-send", "--qps", "4"], more])
    };
    let measured = json(
        &probe(&[
            "--direction",
            "bidirectional",
            "--settle",
            "0.2",
            "--samples",
            "1",
        ])
        .output()
        .unwrap(),
    );
    assert!(packets(&measured, 0) > 0.0 && packets(&measured, 1) > 0.0);
    assert_eq!(held(), 0);
    // A coordinator that dies in the middle of its workload.
    let mut doomed = probe(&["--settle", "20"]);
    let mut doomed = doomed.stdout(Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    let wait = |what: &str, until: &dyn Fn() -> bool| {
        while !until() {
            assert!(start.elapsed() < PATIENCE, "{what}");
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    wait("queue pairs of both ends", &|| held() >= 8 + 8);
    doomed.kill().unwrap();
    doomed.wait().unwrap();
    wait("nothing left of the dead one", &|| held() == 0);
    let measured = json(
        &probe(&["--settle", "0.2", "--samples", "1"])
            .output()
            .unwrap(),
    );
    assert!(packets(&measured, 0) > 0.0);
}

#[test]
fn what_cannot_be_set_up_is_invalid_and_says_why() {
    let Some(devices) = devices() else { return };
    let probe = |more: &[&str]| {
        let target = ["probe", "--devices", &devices, "--operation", "rc-write"];
        let output = volley(&[&target, more]).output().unwrap();
        text(&output.stdout) + &text(&output.stderr)
    };
    let late = probe(&["--limit", "0.02", "--qps", "2000"]);
    assert!(
        late.starts_with("invalid") && late.contains("time is over"),
        "{late}"
    );
    assert_eq!(held(), 0);
    let elsewhere = probe(&["--memory-a", "dram7"]);
    assert!(
        elsewhere.contains("memory of host A is dram7"),
        "{elsewhere}"
    );
    let nobody = probe(&["--agent", "127.0.0.1:9"]);
    assert!(nobody.contains("volley vet agent --listen"), "{nobody}");
    let strange = volley(&[&[
        "probe",
        "--devices",
        "rxe0,mlx5_9",
        "--operation",
        "rc-write",
    ]]);
    let strange = text(&{ strange }.output().unwrap().stderr);
    assert!(strange.contains("no RDMA device `mlx5_9`"), "{strange}");
}

/// Links that are spoilt until this is dropped.
struct Spoilt;

impl Drop for Spoilt {
    fn drop(&mut self) {
        for link in ["veth0", "veth1"] {
            let _mended = Command::new("tc")
                .args(["qdisc", "del", "dev", link, "root"])
                .status();
        }
    }
}

/// Packets over 2 KiB are lost now and then on both links: an anomaly of large MTUs with messages that fill them.
fn lose_large_packets() -> Spoilt {
    let spoilt = Spoilt;
    for link in ["veth0", "veth1"] {
        let tc = |args: &str| {
            let status = Command::new("tc")
                .args(args.replace("LINK", link).split(' '))
                .status();
            assert!(status.unwrap().success(), "tc {args}");
        };
        tc("qdisc add dev LINK root handle 1: prio");
        tc("qdisc add dev LINK parent 1:3 netem loss 10% limit 10000");
        // By the bits of the length in the IP header.
        for (order, bit) in [(1, "0x0800"), (2, "0x1000")] {
            tc(&format!(
                "filter add dev LINK parent 1: protocol ip prio {order} u32 match u16 {bit} {bit} at 2 flowid 1:3"
            ));
        }
        tc("filter add dev LINK parent 1: protocol ip prio 9 u32 match u32 0 0 flowid 1:1");
    }
    spoilt
}

#[test]
fn a_fault_of_the_link_is_found_and_its_minimal_feature_set_names_it() {
    let Some(devices) = devices() else { return };
    if std::env::var_os("RDMA_GUEST").is_none() {
        eprintln!("left out: links are spoilt in the guest only");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (space, bounds, journal) = (path("space.toml"), path("bounds.json"), path("j.jsonl"));
    fs::write(
        &space,
        "operation = [\"rc-write\"]\ndirection = [\"unidirectional\"]\nmtu = [1024, 4096]\nmemory-a = [\"dram0\"]\nmemory-b = [\"dram0\"]\n\
         [axes]\nqps = [1, 4]\nregions = [1, 1]\nregion-bytes = [16384, 16384]\nbatch = [1, 4]\nsend-depth = [8, 16]\nreceive-depth = [1, 1]\n\
         sges = [1, 1]\nsmallest-bytes = [256, 16384]\nlargest-bytes = [256, 16384]\nmessages = [1, 1]\n",
    )
    .unwrap();
    let on = ["--devices", &devices, "--space", &space];
    let calibrated = volley(&[&["calibrate"], &on, &SHORT, &["--out", &bounds, "--json"]]);
    let calibrated = json(&{ calibrated }.output().unwrap());
    assert!(!calibrated["owed"].as_array().unwrap().is_empty());
    let _spoilt = lose_large_packets();
    // In an emulated guest throughput proves nothing; loss does, and more of it than the guest's own.
    let judged = [
        "--bounds",
        &bounds,
        "--loss-max",
        "0.015",
        "--throughput-min",
        "0",
    ];
    let search = |hours: f64| {
        let hours = hours.to_string();
        let more = ["--hours", &hours, "--journal", &journal, "--json"];
        json(
            &volley(&[&["search"], &on, &SHORT, &judged, &more])
                .output()
                .unwrap(),
        )
    };
    // A search that was too short goes on from its journal.
    let (mut hours, mut known) = (0.01, Value::Null);
    while known["anomalies"].as_array().is_none_or(Vec::is_empty) {
        let records = fs::read_to_string(&journal).unwrap_or_default();
        assert!(hours < 0.15, "{known:#}\n{records}");
        known = search(hours);
        hours *= 2.0;
    }
    let measured = || fs::read_to_string(&journal).unwrap().lines().count();
    let before = measured();
    assert_eq!(search(hours / 2.0), known, "with nothing left to measure");
    assert_eq!(measured(), before);
    let anomaly = &known["anomalies"][0];
    assert!(anomaly["symptom"]["loss"].as_f64() > Some(0.0), "{known:#}");
    let named = anomaly["factors"].to_string();
    assert!(
        named.contains("mtu") || named.contains("largest-bytes"),
        "{anomaly:#}"
    );
}
