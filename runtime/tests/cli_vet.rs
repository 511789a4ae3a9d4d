//! `volley vet` as its users run it: the program, files between its commands, and exit codes.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

fn vet(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_volley"))
        .arg("vet")
        .args(args)
        .output()
        .expect("the program runs")
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn what_a_search_learns_is_reported_matched_and_kept_clear_of() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (anomalies, journal) = (path("anomalies.json"), path("journal.jsonl"));
    let (page, workload) = (path("report.html"), path("workload.json"));
    let searched = vet(&[
        "search",
        "--subsystem",
        "H",
        "--hours",
        "4",
        "--seed",
        "3",
        "--journal",
        &journal,
        "--out",
        &anomalies,
        "--report",
        &page,
        "--json",
    ]);
    assert!(searched.status.success(), "{}", err(&searched));
    let known: serde_json::Value = serde_json::from_str(&out(&searched)).unwrap();
    let anchor = &known["anomalies"][0]["anchor"];
    fs::write(&workload, anchor.to_string()).unwrap();

    let html = fs::read_to_string(&page).unwrap();
    for part in [
        "<svg",
        "volley vet probe --subsystem H",
        "<th>before</th>",
        "check:",
    ] {
        assert!(html.contains(part), "{part}");
    }
    let again = path("again.html");
    let reported = vet(&[
        "report",
        "--anomalies",
        &anomalies,
        "--journal",
        &journal,
        "--html",
        &again,
    ]);
    assert!(reported.status.success(), "{}", err(&reported));
    assert_eq!(fs::read_to_string(&again).unwrap(), html);

    let matched = vet(&["match", "--anomalies", &anomalies, "--workload", &workload]);
    assert_eq!(matched.status.code(), Some(1));
    assert!(out(&matched).contains("to avoid it"), "{}", out(&matched));
    let refused = vet(&["clear", "--anomalies", &anomalies, "--workload", &workload]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        err(&refused).contains("meets known anomalies"),
        "{}",
        err(&refused)
    );
    let cleared = vet(&[
        "clear",
        "--anomalies",
        &anomalies,
        "--workload",
        &workload,
        "--json",
        "--may-change",
        "qps,batch,sges,mtu,receive-depth,direction,operation",
    ]);
    assert!(cleared.status.success(), "{}", err(&cleared));
    let cleared: serde_json::Value = serde_json::from_str(&out(&cleared)).unwrap();
    assert!(!cleared["changes"].as_array().unwrap().is_empty());
    fs::write(&workload, cleared["workload"].to_string()).unwrap();
    assert!(
        vet(&["match", "--anomalies", &anomalies, "--workload", &workload])
            .status
            .success()
    );
    let unknown = vet(&[
        "clear",
        "--anomalies",
        &anomalies,
        "--workload",
        &workload,
        "--may-change",
        "color",
    ]);
    assert!(
        err(&unknown).contains("'color' is no setting"),
        "{}",
        err(&unknown)
    );
}

#[test]
fn an_evaluation_draws_every_curve() {
    let folder = tempfile::tempdir().unwrap();
    let plot = folder.path().join("curves.svg");
    let evaluated = vet(&[
        "evaluate",
        "--subsystem",
        "H",
        "--seeds",
        "2",
        "--hours",
        "1",
        "--json",
        "--plot",
        &plot.display().to_string(),
    ]);
    assert!(evaluated.status.success(), "{}", err(&evaluated));
    let svg = fs::read_to_string(plot).unwrap();
    let evaluation: serde_json::Value = serde_json::from_str(&out(&evaluated)).unwrap();
    for strategy in evaluation["strategies"].as_array().unwrap() {
        let name = strategy["name"].as_str().unwrap();
        assert!(svg.contains(name), "{name}");
    }
    assert_eq!(svg.matches("<polyline").count(), 6);
}

/// A host as rxe shows it.
fn host(root: &Path, state: &str) {
    for (name, value) in [
        ("sys/class/infiniband/rxe0/parent", "eth0"),
        ("sys/class/infiniband/rxe0/ports/1/state", state),
        (
            "sys/class/infiniband/rxe0/ports/1/rate",
            "2.5 Gb/sec (1X SDR)",
        ),
        ("sys/class/infiniband/rxe0/ports/1/link_layer", "Ethernet"),
        (
            "sys/class/infiniband/rxe0/ports/1/gid_attrs/types/1",
            "RoCE v2",
        ),
        (
            "sys/class/infiniband/rxe0/ports/1/gids/1",
            "0000:0000:0000:0000:0000:ffff:0a00:0001",
        ),
        (
            "sys/class/infiniband/rxe0/ports/1/hw_counters/rcvd_pkts",
            "12",
        ),
        ("sys/class/net/eth0/mtu", "1500"),
        (
            "proc/self/limits",
            "Max locked memory         unlimited            unlimited            bytes",
        ),
    ] {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("{value}\n")).unwrap();
    }
}

#[test]
fn a_host_is_looked_at_and_what_is_bad_is_the_exit_code() {
    let root = tempfile::tempdir().unwrap();
    let at = root.path().display().to_string();
    let none = vet(&["preflight", "--root", &at]);
    assert!(err(&none).contains("no RDMA device"), "{}", err(&none));
    host(root.path(), "4: ACTIVE");
    let good = vet(&["preflight", "--root", &at, "--json"]);
    assert!(good.status.success(), "{}", err(&good));
    let checks: serde_json::Value = serde_json::from_str(&out(&good)).unwrap();
    let mtu = checks[0]["checks"]
        .as_array()
        .unwrap()
        .iter()
        .find(|check| check["what"] == "MTU")
        .unwrap();
    assert_eq!(mtu["finding"], "warning");
    assert_eq!(mtu["found"], "1500 on eth0, so 1024 for RDMA");
    host(root.path(), "1: DOWN");
    let bad = vet(&["preflight", "--root", &at]);
    assert_eq!(bad.status.code(), Some(1));
    assert!(out(&bad).contains("ip link set IF up"), "{}", out(&bad));
}

#[test]
fn a_silent_device_says_nothing_and_a_strange_one_is_named() {
    let root = tempfile::tempdir().unwrap();
    let at = root.path().display().to_string();
    host(root.path(), "4: ACTIVE");
    let silent = vet(&["watch", "--device", "rxe0", "--seconds", "1", "--root", &at]);
    assert!(
        err(&silent).contains("no traffic arrived"),
        "{}",
        err(&silent)
    );
    let strange = vet(&["watch", "--device", "mlx5_0", "--root", &at]);
    assert!(
        err(&strange).contains("RDMA devices are rxe0"),
        "{}",
        err(&strange)
    );
}

#[test]
fn a_target_that_makes_no_sense_is_refused_with_what_to_give() {
    let refused = |args: &[&str], part: &str| {
        let output = vet(args);
        assert!(!output.status.success());
        assert!(err(&output).contains(part), "{args:?}: {}", err(&output));
    };
    let write = ["--operation", "rc-write"];
    refused(&["probe", write[0], write[1]], "--subsystem");
    refused(
        &[
            "probe",
            "--subsystem",
            "F",
            "--devices",
            "a,b",
            write[0],
            write[1],
        ],
        "cannot be used with",
    );
    refused(
        &["probe", "--subsystem", "F", "--lossy", write[0], write[1]],
        "--lossy",
    );
    refused(&["calibrate", "--devices", "mlx5_0"], "give two");
    refused(&["calibrate", "--devices", "mlx5_0:0,b"], "mlx5_0:2");
    refused(
        &["calibrate", "--devices", "a,b", "--sample", "0.001"],
        "50 milliseconds",
    );
    refused(&["agent", "--listen", "nowhere"], "invalid");
}
