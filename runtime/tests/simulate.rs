//! `volley simulate` through the real binary: what it prints, what it writes, and what it refuses.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn simulate(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_volley"));
    command
        .current_dir(dir)
        .arg("simulate")
        .args(args)
        .output()
        .unwrap()
}

fn refusal(output: Output) -> String {
    assert!(output.stdout.is_empty());
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8(output.stderr).unwrap()
}

fn json(output: Output) -> Value {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

/// DBRX on eight-GPU attention workers and one GPU for each expert.
const DEPLOYMENT: &[&str] = &[
    "--model",
    "dbrx",
    "--attention",
    "A800:8",
    "--attention-workers",
    "2",
    "--experts",
    "A800",
    "--micro-batches",
    "3",
];

fn with<'a>(more: &[&'a str]) -> Vec<&'a str> {
    DEPLOYMENT.iter().chain(more).copied().collect()
}

#[test]
fn a_trace_is_served_and_the_same_seed_gives_the_same_figures() {
    let dir = tempfile::tempdir().unwrap();
    let args = with(&[
        "--rate",
        "5",
        "--duration",
        "4",
        "--mean-output",
        "20",
        "--zipf",
        "0.8",
        "--jitter",
        "0.2",
        "--timeline",
        "t.json",
        "--json",
    ]);
    let mut reports = [
        json(simulate(dir.path(), &args)),
        json(simulate(dir.path(), &args)),
    ];
    for report in &mut reports {
        report["simulated_in_s"].take();
    }
    let [report, again] = reports;
    assert_eq!(report, again);
    assert!(report["requests"].as_u64().unwrap() > 5);
    assert_eq!(report["completed"], report["requests"]);
    assert!(report["tpot"]["mean_s"].as_f64().unwrap() > 0.0);
    let trace: Value =
        serde_json::from_slice(&std::fs::read(dir.path().join("t.json")).unwrap()).unwrap();
    assert!(trace.as_array().unwrap().len() > 100);
}

#[test]
fn a_lost_worker_costs_time_and_no_request() {
    let dir = tempfile::tempdir().unwrap();
    let load = [
        "--rate",
        "5",
        "--duration",
        "4",
        "--mean-output",
        "20",
        "--json",
    ];
    let quiet = json(simulate(dir.path(), &with(&load)));
    for fail in ["expert-2@1+2", "attention-0@1+2"] {
        let failing: Vec<&str> = load.iter().copied().chain(["--fail", fail]).collect();
        let report = json(simulate(dir.path(), &with(&failing)));
        assert_eq!(report["completed"], report["requests"], "{fail}");
        assert_eq!(report["epochs"], 3, "{fail}");
        assert!(
            report["latency"]["mean_s"].as_f64() > quiet["latency"]["mean_s"].as_f64(),
            "{fail}"
        );
    }
}

#[test]
fn a_plan_is_simulated_by_rounds_and_by_frames() {
    let dir = tempfile::tempdir().unwrap();
    let side = |tp| serde_json::json!({"gpu": "A800", "tp": tp});
    let deployment = serde_json::json!({
        "attention": side(8), "attention_workers": 2, "experts": side(1), "experts_per_worker": 1,
        "expert_workers": 8, "micro_batches": 3, "rows": 64,
    });
    let bf16 = serde_json::json!({"attention": "bf16", "experts": "bf16", "kv": "bf16", "dispatch": "bf16", "combine": "bf16"});
    let plan = serde_json::json!({
        "model": {"name": "mixtral-8x22b"}, "precision": bf16, "transport": "m2n", "plan": {"best": {"deployment": deployment}},
    });
    std::fs::write(dir.path().join("plan.json"), plan.to_string()).unwrap();
    let line =
        |at: f64| format!("{{\"arrival_s\": {at}, \"input_tokens\": 64, \"output_tokens\": 8}}\n");
    std::fs::write(
        dir.path().join("trace.jsonl"),
        line(0.0) + &line(0.01) + &line(0.02),
    )
    .unwrap();
    let args = ["--plan", "plan.json", "--trace", "trace.jsonl", "--json"];
    let rounds = json(simulate(dir.path(), &args));
    let frames = json(simulate(
        dir.path(),
        &[&args[..], &["--detail", "frames"]].concat(),
    ));
    for report in [&rounds, &frames] {
        assert_eq!(report["completed"], 3);
        assert_eq!(report["output_tokens"], 24);
    }
    let wrong = refusal(simulate(
        dir.path(),
        &[&args[..], &["--model", "dbrx"]].concat(),
    ));
    assert!(
        wrong.contains("the plan is for") && wrong.contains("not for dbrx"),
        "{wrong}"
    );
}

#[test]
fn bad_input_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let line =
        |at: f64| format!("{{\"arrival_s\": {at}, \"input_tokens\": 5, \"output_tokens\": 5}}\n");
    for (name, text) in [
        ("negative", line(-1.0)),
        ("unsorted", line(2.0) + &line(1.0)),
        ("empty", String::new()),
        ("words", "hello\n".to_owned()),
        ("plan", "{\"plan\": 1}".to_owned()),
        ("popularity", "[1, 2, 3]".to_owned()),
    ] {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    for (args, said) in [
        (
            &["--trace", "negative"][..],
            "negative, line 1: the request arrives at -1 s",
        ),
        (
            &["--trace", "unsorted"],
            "unsorted, line 2: the request arrives at 1 s, before the one above it; sort the trace",
        ),
        (&["--trace", "empty"], "empty: there are no requests"),
        (&["--trace", "words"], "words, line 1"),
        (&["--trace", "nowhere"], "nowhere"),
        (&["--rate", "0"], "the rate is 0"),
        (
            &["--rate", "1", "--popularity", "popularity"],
            "popularity: 3 experts, but dbrx has 16",
        ),
        (&["--rate", "1", "--zipf", "-1"], "--zipf"),
        (
            &["--rate", "1", "--fail", "expert-99@1+1"],
            "there is no expert-99",
        ),
        (&["--rate", "1", "--transport", "pigeon"], "pigeon"),
        (
            &["--rate", "1", "--expert-workers", "17"],
            "17 expert workers for 16 experts",
        ),
    ] {
        let error = refusal(simulate(dir.path(), &with(args)));
        assert!(error.contains(said), "{args:?}: {error}");
    }
    let error = refusal(simulate(dir.path(), &["--plan", "plan", "--rate", "1"]));
    assert!(
        error.contains("plan: ") && error.contains("what `volley plan --json` prints"),
        "{error}"
    );
    let output = simulate(dir.path(), &with(&["--rate", "1", "--fail", "expert"]));
    assert_eq!(
        output.status.code(),
        Some(2),
        "a command line that cannot be understood"
    );
}

/// The hand-off between the two commands, with the very file and configuration that `plan` writes.
#[test]
fn what_plan_writes_is_what_simulate_reads() {
    let dir = tempfile::tempdir().unwrap();
    let planned = Command::new(env!("CARGO_BIN_EXE_volley"))
        .current_dir(dir.path())
        .args(["plan", "--model", "dbrx", "--attention-gpu", "H20"])
        .args(["--expert-gpu", "L40S", "--json", "--out", "volley.toml"])
        .output()
        .unwrap();
    let plan = json(planned);
    std::fs::write(dir.path().join("plan.json"), plan.to_string()).unwrap();
    let load = [
        "--rate",
        "20",
        "--duration",
        "2",
        "--mean-output",
        "10",
        "--json",
    ];
    let of_plan = json(simulate(
        dir.path(),
        &[&["--plan", "plan.json"], &load[..]].concat(),
    ));
    assert_eq!(of_plan["completed"], of_plan["requests"]);
    let deployment = &plan["plan"]["best"]["deployment"];
    let side = |side: &str| {
        let side = &deployment[side];
        format!("{}:{}", side["gpu"].as_str().unwrap(), side["tp"])
    };
    let (attention, experts) = (side("attention"), side("experts"));
    let config = [
        "--config",
        "volley.toml",
        "--model",
        "dbrx",
        "--attention",
        &attention,
        "--experts",
        &experts,
    ];
    let of_config = json(simulate(dir.path(), &[&config[..], &load[..]].concat()));
    assert_eq!(of_config["completed"], of_config["requests"]);
    assert_eq!(of_config["output_tokens"], of_plan["output_tokens"]);
    let nowhere = refusal(simulate(dir.path(), &[&config[..4], &load[..]].concat()));
    assert!(nowhere.contains("give --attention GPU"), "{nowhere}");
}
