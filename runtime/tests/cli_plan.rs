//! `volley plan` and `volley reproduce` as users type them.

use std::path::Path;
use std::process::{Command, Output};

use rand::SeedableRng;
use rand_pcg::Pcg64;
use serde_json::Value;
use volley_collie::{
    Axis, Category, Choice, Edge, Factor, KnownAnomalies, Memory, Mfs, Operation, Quantity, Space,
    Symptom,
};

fn volley(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_volley"))
        .current_dir(dir)
        .args(args)
        .output()
        .unwrap()
}

fn text(output: Output) -> String {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    String::from_utf8(output.stdout).unwrap()
}

fn refusal(output: Output) -> String {
    assert!(!output.status.success());
    assert!(output.stdout.is_empty());
    String::from_utf8(output.stderr).unwrap()
}

const CONFIG: &str = r#"{"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32, "num_local_experts": 8,
    "num_experts_per_tok": 2, "vocab_size": 32000, "max_position_embeddings": 32768, "torch_dtype": "bfloat16"}"#;

fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

#[test]
fn a_plan_says_what_it_delivers_what_binds_and_what_comes_next() {
    let dir = folder(&[]);
    let args = [
        "plan",
        "--model",
        "mixtral-8x22b",
        "--attention-gpu",
        "H20",
        "--expert-gpu",
        "L40S,L20",
    ];
    let said = text(volley(dir.path(), &args));
    for part in [
        "T_a",
        "condition",
        "slack",
        "binds",
        "runners-up",
        "colocated",
        "verdict",
        "x H20",
    ] {
        assert!(said.contains(part), "{part} is missing in\n{said}");
    }
    let json: Value = serde_json::from_str(&text(volley(
        dir.path(),
        &[&args[..], &["--json"]].concat(),
    )))
    .unwrap();
    let best = &json["plan"]["best"];
    assert_eq!(best["deployment"]["attention"]["gpu"], "H20");
    assert!(best["outlook"]["step_s"].as_f64().unwrap() <= 0.15);
    assert!(json["plan"]["disaggregate"].as_bool().unwrap());
}

#[test]
fn the_configuration_of_a_plan_is_one_that_validates() {
    let dir = folder(&[("config.json", CONFIG)]);
    let model = dir.path().display().to_string();
    let args = [
        "plan",
        "--model",
        &model,
        "--attention-gpu",
        "H20",
        "--expert-gpu",
        "L40S",
        "--out",
        "volley.toml",
    ];
    text(volley(dir.path(), &args));
    let written = std::fs::read_to_string(dir.path().join("volley.toml")).unwrap();
    for part in [
        "[cluster]",
        "attention_workers",
        "micro_batches",
        "kv_cache_memory",
        &model,
    ] {
        assert!(written.contains(part), "{part} is missing in\n{written}");
    }
    let planned: Value = serde_json::from_str(&text(volley(
        dir.path(),
        &[&args[..7], &["--json"]].concat(),
    )))
    .unwrap();
    let validated = volley(
        dir.path(),
        &[
            "validate",
            "--config",
            "volley.toml",
            "--load-format",
            "dummy",
        ],
    );
    // The directory has no tokenizer, which is all that may be said against it.
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&validated.stdout),
        String::from_utf8_lossy(&validated.stderr)
    );
    assert!(
        validated.status.success() || said.contains("tokenizer"),
        "{said}"
    );
    let workers = planned["plan"]["best"]["deployment"]["attention_workers"]
        .as_u64()
        .unwrap();
    assert!(written.contains(&format!("attention_workers = {workers}\n")));
}

#[test]
fn what_is_asked_for_wrongly_is_told_where_and_how_to_mend_it() {
    let gpu = "[gpu.X]\nprice = 1\nprice_source = \"user\"\nmemory_gb = 80\nmemory_gbs = BANDWIDTH\nbf16_tflops = 300\npower_w = 400\nnode_gpus = 8\nnode_link_gbs = 600\nnic_gbps = 200\n";
    let dir = folder(&[
        ("zero.toml", &gpu.replace("BANDWIDTH", "0")),
        (
            "contradictory.toml",
            &gpu.replace("BANDWIDTH", "2000")
                .replace("nic_gbps = 200", "nic_gbps = 9000"),
        ),
        ("good.toml", &gpu.replace("BANDWIDTH", "2000")),
        (
            "past.jsonl",
            "{\"arrival_s\": -1, \"input_tokens\": 5, \"output_tokens\": 5}\n",
        ),
    ]);
    for (args, says) in [
        (
            vec!["--hardware", "zero.toml"],
            "zero.toml: gpu.X.memory_gbs: 0 is not a positive number",
        ),
        (
            vec!["--hardware", "contradictory.toml"],
            "node_link_gbs is in bytes and counts both ways",
        ),
        (vec!["--hardware", "none.toml"], "none.toml"),
        (
            vec!["--hardware", "good.toml", "--attention-gpu", "Y"],
            "there is no GPU called \"Y\"",
        ),
        (
            vec!["--workload", "past.jsonl"],
            "past.jsonl: line 1: the arrival is -1",
        ),
        (vec!["--slo-tpot", "900us"], "raise --slo-tpot to"),
        (vec!["--gpus", "2"], "or more (--gpus"),
        (vec!["--slo-tpot", "150"], "150ms"),
        (
            vec!["--transport", "carrier-pigeon"],
            "there is no transport called",
        ),
        (vec!["--mean-input", "0"], "mean input"),
        (
            vec!["--dtype", "fp8", "--out", "x.toml"],
            "no configuration runs it",
        ),
    ] {
        let said = refusal(volley(
            dir.path(),
            &[&["plan", "--model", "mixtral-8x22b"], &args[..]].concat(),
        ));
        assert!(said.contains(says), "{args:?}: {said}");
    }
    let said = refusal(volley(dir.path(), &["plan", "--model", "gpt-2"]));
    assert!(said.contains("mixtral-8x22b"), "{said}");
}

#[test]
fn a_plan_that_meets_a_known_anomaly_is_refused_or_reshaped() {
    let dir = folder(&[]);
    let space = Space {
        operation: vec![Operation::RcWriteImm],
        memory_a: vec![Memory::Gpu(0)],
        memory_b: vec![Memory::Gpu(0)],
        ..Space::default()
    };
    let save = |name: &str, factors: Vec<Factor>| {
        let anomaly = Mfs {
            factors,
            anchor: space.sample(&mut Pcg64::seed_from_u64(1)),
            symptom: Symptom {
                pause: Some(0.2),
                throughput: None,
                loss: None,
            },
            signature: vec![1.0],
            probes: 9,
        };
        let known = KnownAnomalies::new(
            "F".to_owned(),
            space.clone(),
            vec!["c".to_owned()],
            vec![anomaly],
        );
        known.save(&dir.path().join(name)).unwrap();
    };
    // Whatever is sent meets it, and no shape helps.
    save("all.json", Vec::new());
    // Meets it only with the largest MTU and a deep queue.
    let clean = [256, 512, 1024, 2048].map(Choice::Mtu).to_vec();
    save(
        "mtu.json",
        vec![
            Factor::Among {
                category: Category::Mtu,
                anomalous: vec![Choice::Mtu(4096)],
                clean,
            },
            Factor::Within {
                quantity: Quantity::Axis(Axis::SendDepth),
                lower: Some(Edge {
                    inside: 16.0,
                    outside: 15.0,
                    likely: None,
                }),
                upper: None,
            },
        ],
    );
    let base = [
        "plan",
        "--model",
        "mixtral-8x22b",
        "--attention-gpu",
        "H20",
        "--expert-gpu",
        "L40S",
        "--anomalies",
    ];
    let said = refusal(volley(dir.path(), &[&base[..], &["all.json"]].concat()));
    assert!(
        said.contains("meets known anomalies of F") && said.contains("--reshape"),
        "{said}"
    );
    let said = refusal(volley(
        dir.path(),
        &[&base[..], &["all.json", "--reshape"]].concat(),
    ));
    assert!(said.contains("avoids all of them"), "{said}");
    let said = refusal(volley(dir.path(), &[&base[..], &["mtu.json"]].concat()));
    assert!(said.contains("set MTU to"), "{said}");
    let said = text(volley(
        dir.path(),
        &[
            &base[..],
            &["mtu.json", "--reshape", "--out", "volley.toml"],
        ]
        .concat(),
    ));
    assert!(
        said.contains("none met with MTU 2048 instead of 4096"),
        "{said}"
    );
    let written = std::fs::read_to_string(dir.path().join("volley.toml")).unwrap();
    assert!(written.contains("MTU 2048"), "{written}");
    let written: toml::Table = written.parse().unwrap();
    assert_eq!(written["rdma"]["mtu"].as_integer(), Some(2048));
    assert!(written["rdma"].get("depth").is_none());
    assert_eq!(written["cluster"]["transport"].as_str(), Some("rdma"));
    let said = refusal(volley(dir.path(), &[&base[..], &["none.json"]].concat()));
    assert!(said.contains("none.json"), "{said}");
}

#[test]
fn the_reproduction_in_the_docs_is_what_the_program_says() {
    let dir = folder(&[]);
    let table = text(volley(dir.path(), &["reproduce", "--docs", "."]));
    assert!(table.contains("within 10 %"), "{table}");
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
    for name in [
        "reproduction.md",
        "reproduction/micro-batches.svg",
        "reproduction/attention-replicas.svg",
        "reproduction/per-cost.svg",
    ] {
        let (now, kept) = (
            std::fs::read_to_string(dir.path().join(name)),
            std::fs::read_to_string(docs.join(name)),
        );
        assert!(
            now.unwrap() == kept.unwrap(),
            "docs/{name} is stale: run `volley reproduce --docs docs`"
        );
    }
    let json: Value =
        serde_json::from_str(&text(volley(dir.path(), &["reproduce", "--json"]))).unwrap();
    let readings = json["readings"].as_array().unwrap().len();
    for row in json["rows"].as_array().unwrap() {
        for key in ["name", "paper", "ours", "ratio", "note"] {
            assert!(!row[key].is_null(), "{row}");
        }
        assert_eq!(row["readings"].as_array().unwrap().len(), readings, "{row}");
    }
}
