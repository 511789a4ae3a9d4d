//! The real binary in temporary folders: what users type, what they see, and the exit codes they get.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// `volley` with these arguments, in `dir`, with no variables of its own in the environment.
fn command(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_volley"));
    command.current_dir(dir).args(args).stdin(Stdio::null());
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("VOLLEY_") {
            command.env_remove(name);
        }
    }
    command
}

fn volley(args: &[&str]) -> Output {
    command(Path::new("."), args).output().unwrap()
}

/// The exit code and what stood on standard error.
fn refusal(output: Output) -> (i32, String) {
    assert!(
        output.stdout.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
    (
        output.status.code().unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

fn text(output: Output) -> String {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

#[test]
fn help_names_every_command_with_examples_and_exit_codes() {
    let help = text(volley(&["--help"]));
    for command in ["serve", "generate", "bench", "validate", "trace"] {
        assert!(help.contains(&format!("\n  {command}")), "{help}");
        let own = text(volley(&[command, "--help"]));
        assert!(
            own.contains("Examples:") && own.contains("--attention-workers <N>"),
            "{own}"
        );
    }
    assert!(help.contains("Exit codes"), "{help}");
}

#[test]
fn a_command_line_that_cannot_be_understood_is_exit_code_2_with_a_suggestion() {
    let (code, message) = refusal(volley(&["serve", "--modle", "x"]));
    assert_eq!(code, 2);
    assert!(message.contains("'--model'"), "{message}");
    let (code, message) = refusal(volley(&["serve", "--port", "99999"]));
    assert_eq!(code, 2);
    assert!(
        message.contains("'99999' for '--port <PORT>'") && message.contains("from 0 to 65535"),
        "{message}"
    );
    let (code, message) = refusal(volley(&["generate"]));
    assert_eq!(code, 2);
    assert!(message.contains("--prompt"), "{message}");
    let (code, _) = refusal(volley(&["bench", "--rate", "3"]));
    assert_eq!(code, 2, "--rate without --url");
}

#[test]
fn a_bad_configuration_lists_all_its_problems_with_file_key_and_remedy() {
    let dir = folder(&[(
        "volley.toml",
        "[server]\nprot = 1\nport = \"x\"\n[cluster]\nmicro_batches = 100\n",
    )]);
    for name in ["serve", "validate"] {
        let mut command = command(dir.path(), &[name, "--config", "volley.toml"]);
        let (code, message) = refusal(command.env("VOLLEY_LOG_FORMAT", "xml").output().unwrap());
        assert_eq!(code, 1);
        for part in [
            "refused for 4 reasons",
            "volley.toml: `server.prot` is no known key; did you mean `server.port`?",
            "volley.toml: `server.port` is \"x\"; it must be a whole number from 0 to 65535",
            "volley.toml: `cluster.micro_batches` is 100; it must be a whole number from 1 to 8",
            "environment variable VOLLEY_LOG_FORMAT: `log.format` is \"xml\"",
        ] {
            assert!(message.contains(part), "{part}\n---\n{message}");
        }
    }
}

#[test]
fn a_configuration_file_that_is_not_there_is_named() {
    let (code, message) = refusal(volley(&["validate", "--config", "/nowhere/volley.toml"]));
    assert_eq!(code, 1);
    assert!(
        message.contains("/nowhere/volley.toml: cannot be read"),
        "{message}"
    );
}

#[test]
fn a_model_that_is_not_there_is_named_by_every_command() {
    for args in [
        vec!["serve", "--port", "0"],
        vec!["validate", "--port", "0"],
        vec!["generate", "--prompt", "x"],
        vec!["bench"],
        vec!["trace"],
    ] {
        let (code, message) = refusal(volley(
            &[args.as_slice(), &["--model", "/nowhere/model"]].concat(),
        ));
        assert_eq!(code, 1);
        assert!(message.contains("/nowhere/model"), "{message}");
    }
}

#[test]
fn a_port_in_use_is_found_before_the_model_is_looked_at() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let (code, message) = refusal(volley(&[
        "serve",
        "--port",
        &port,
        "--model",
        "/nowhere/model",
    ]));
    assert_eq!(code, 1);
    assert!(
        message.contains(&format!("cannot listen on 127.0.0.1:{port}"))
            && message.contains("--port"),
        "{message}"
    );
    assert!(!message.contains("/nowhere/model"), "{message}");
}

#[test]
fn validate_lists_what_is_wrong_with_port_and_key_and_model_together() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let dir = folder(&[("key", " \n")]);
    let args = [
        "validate",
        "--port",
        &port,
        "--api-key-file",
        "key",
        "--expert-workers",
        "9",
    ];
    let (code, message) = refusal(command(dir.path(), &args).output().unwrap());
    assert_eq!(code, 1);
    assert!(message.contains("3 problems found"), "{message}");
    assert!(
        message.contains("`cluster.expert_workers` is 9, but the model has 8 experts"),
        "{message}"
    );
}

#[test]
fn more_memory_than_there_is_is_refused_with_the_sum() {
    let (code, message) = refusal(volley(&[
        "generate",
        "--prompt",
        "x",
        "--kv-cache-memory",
        "900TiB",
    ]));
    assert_eq!(code, 1);
    assert!(
        message.contains("KV cache") && message.contains("in all") && message.contains("available"),
        "{message}"
    );
}

#[test]
fn validate_sums_the_demo_model_up_and_its_numerics_hold() {
    for (dtype, quantize, precision) in [
        ("f32", "none", "3 micro-batches, f32\n"),
        ("bf16", "none", "3 micro-batches, bf16\n"),
        ("f32", "q8", "3 micro-batches, f32 with q8 weights\n"),
        ("bf16", "q4", "3 micro-batches, bf16 with q4 weights\n"),
    ] {
        let args = [
            "validate",
            "--port",
            "0",
            "--numerics",
            "--dtype",
            dtype,
            "--quantize",
            quantize,
            "--attention-workers",
            "2",
            "--expert-workers",
            "3",
            "--micro-batches",
            "3",
        ];
        let summary = text(volley(&args));
        assert!(
            summary.contains("2 attention x 3 expert workers") && summary.contains("all is well"),
            "{summary}"
        );
        assert!(summary.contains(precision), "{summary}");
        assert!(summary.contains("largest difference"), "{summary}");
    }
}

#[test]
fn the_printed_configuration_can_be_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let printed = text(volley(&[
        "validate",
        "--port",
        "0",
        "--print-config",
        "--max-waiting",
        "77",
    ]));
    assert!(printed.contains("max_waiting = 77"), "{printed}");
    std::fs::write(dir.path().join("volley.toml"), &printed).unwrap();
    let again = command(
        dir.path(),
        &["validate", "--config", "volley.toml", "--print-config"],
    );
    assert_eq!(text({ again }.output().unwrap()), printed);
}

#[test]
fn greedy_text_is_the_same_over_every_shape_of_the_cluster() {
    let args = [
        "generate",
        "--prompt",
        "ROMEO:",
        "--temperature",
        "0",
        "--max-tokens",
        "24",
    ];
    let one = text(volley(&args));
    assert!(
        one.starts_with("ROMEO:") && one.len() > "ROMEO:\n".len() + 10,
        "{one}"
    );
    let shape = [
        "--attention-workers",
        "2",
        "--expert-workers",
        "3",
        "--micro-batches",
        "3",
    ];
    assert_eq!(text(volley(&[&args[..], &shape[..]].concat())), one);
}

#[test]
fn a_batch_is_printed_in_order_under_headings() {
    let args = [
        "generate",
        "--prompt",
        "To be",
        "--prompt",
        "The king",
        "--temperature",
        "0",
        "--max-tokens",
        "8",
    ];
    let batch = text(volley(&args));
    let parts: Vec<_> = batch.split("=== ").collect();
    assert!(
        parts[1].starts_with("1 ===\nTo be") && parts[2].starts_with("2 ===\nThe king"),
        "{batch}"
    );
    // Alone, each says the same as in the batch.
    let alone = text(volley(&[
        "generate",
        "--prompt",
        "The king",
        "--temperature",
        "0",
        "--max-tokens",
        "8",
    ]));
    assert_eq!(parts[2].trim_start_matches("2 ===\n"), alone);
}

#[test]
fn json_has_text_tokens_reason_and_timings_for_each_prompt() {
    let dir = folder(&[("prompt.txt", "KING")]);
    let args = [
        "generate",
        "--prompt",
        "A",
        "--prompt-file",
        "prompt.txt",
        "--json",
        "--seed",
        "3",
        "--max-tokens",
        "6",
        "--ignore-eos",
    ];
    let lines = text(command(dir.path(), &args).output().unwrap());
    let answers: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(answers.len(), 2);
    for (index, (answer, prompt)) in answers.iter().zip(["A", "KING"]).enumerate() {
        assert_eq!(
            (&answer["index"], &answer["prompt"]),
            (&Value::from(index), &Value::from(prompt))
        );
        assert_eq!(answer["token_ids"].as_array().unwrap().len(), 6);
        assert_eq!(answer["finish_reason"], "length");
        assert_eq!(answer["timings"]["completion_tokens"], 6);
        assert!(answer["timings"]["total_s"].as_f64().unwrap() > 0.0);
    }
    let again = text(command(dir.path(), &args).output().unwrap());
    let first: Value = serde_json::from_str(again.lines().next().unwrap()).unwrap();
    assert_eq!(
        first["token_ids"], answers[0]["token_ids"],
        "the seed decides"
    );
}

#[test]
fn a_stop_text_ends_the_answer_before_it() {
    let args = [
        "generate",
        "--prompt",
        "ROMEO:",
        "--temperature",
        "0",
        "--max-tokens",
        "24",
        "--json",
    ];
    let whole: Value = serde_json::from_str(&text(volley(&args))).unwrap();
    let whole = whole["text"].as_str().unwrap();
    let stop: String = whole.chars().skip(5).take(3).collect();
    let stopped: Value =
        serde_json::from_str(&text(volley(&[&args[..], &["--stop", &stop]].concat()))).unwrap();
    assert_eq!(stopped["finish_reason"], "stop");
    assert_eq!(stopped["text"].as_str(), whole.split(&stop).next());
}

#[test]
fn a_chat_prints_the_answer_only() {
    let answer = text(volley(&[
        "generate",
        "--chat",
        "--prompt",
        "Good morrow",
        "--temperature",
        "0",
        "--max-tokens",
        "8",
    ]));
    assert!(
        !answer.contains("Good morrow")
            && !answer.contains("<|im_start|>")
            && !answer.trim().is_empty(),
        "{answer}"
    );
}

#[test]
fn a_reader_that_leaves_is_no_failure() {
    let mut command = command(
        Path::new("."),
        &[
            "generate",
            "--prompt",
            "A",
            "--max-tokens",
            "500",
            "--ignore-eos",
        ],
    );
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[test]
fn a_trace_is_a_file_for_perfetto_and_a_summary() {
    let dir = tempfile::tempdir().unwrap();
    let args = [
        "trace",
        "--out",
        "t.json",
        "--batch",
        "8",
        "--tokens",
        "8",
        "--expert-workers",
        "2",
    ];
    let summary = text(command(dir.path(), &args).output().unwrap());
    for part in [
        "T_a attention",
        "T_e experts",
        "T_c network",
        "m * max(T_a, T_e)",
        "ping-pong",
    ] {
        assert!(summary.contains(part), "{part}\n---\n{summary}");
    }
    let events: Vec<Value> =
        serde_json::from_slice(&std::fs::read(dir.path().join("t.json")).unwrap()).unwrap();
    let named = |name: &str| events.iter().any(|event| event["args"]["name"] == name);
    assert!(named("attention-0") && named("expert-1"));
    assert!(
        events
            .iter()
            .any(|event| event["ph"] == "X" && event["cat"] == "experts")
    );
}

#[test]
fn an_offline_benchmark_has_a_line_and_a_record_for_each_batch() {
    let dir = tempfile::tempdir().unwrap();
    let args = [
        "bench",
        "--batch",
        "1,4",
        "--input-len",
        "8",
        "--output-len",
        "8",
        "--repetitions",
        "2",
        "--json",
        "b.json",
    ];
    let table = text(command(dir.path(), &args).output().unwrap());
    assert_eq!(table.lines().count(), 4, "{table}");
    let report: Value =
        serde_json::from_slice(&std::fs::read(dir.path().join("b.json")).unwrap()).unwrap();
    for (result, batch) in report["batches"].as_array().unwrap().iter().zip([1, 4]) {
        assert_eq!(
            (&result["batch"], result["runs"].as_array().unwrap().len()),
            (&Value::from(batch), 2)
        );
        assert!(result["median"]["decode_tokens_per_s"].as_f64().unwrap() > 0.0);
    }
}

#[test]
fn dummy_weights_need_only_a_configuration_to_be_measured() {
    let config = include_str!("../../models/demo/config.json");
    let dir = folder(&[("config.json", config)]);
    let dummy = ["--model", ".", "--load-format", "dummy"];
    let bench = [
        "bench",
        "--batch",
        "2",
        "--input-len",
        "4",
        "--output-len",
        "4",
    ];
    let table = text(
        command(dir.path(), &[&bench[..], &dummy].concat())
            .output()
            .unwrap(),
    );
    assert_eq!(table.lines().count(), 3, "{table}");
    text(
        command(
            dir.path(),
            &[&["trace", "--tokens", "4"][..], &dummy].concat(),
        )
        .output()
        .unwrap(),
    );
    // Text needs a tokenizer, and says so.
    let generate = [&["generate", "--prompt", "x"][..], &dummy].concat();
    let (code, message) = refusal(command(dir.path(), &generate).output().unwrap());
    assert_eq!(code, 1);
    assert!(message.contains("tokenizer.json"), "{message}");
}

#[test]
fn a_benchmark_longer_than_the_context_is_refused() {
    let (code, message) = refusal(volley(&[
        "bench",
        "--input-len",
        "1000",
        "--output-len",
        "100",
    ]));
    assert_eq!(code, 1);
    assert!(
        message.contains("1100 tokens") && message.contains("--max-context"),
        "{message}"
    );
}

#[test]
fn a_server_that_does_not_answer_is_named() {
    let (code, message) = refusal(volley(&[
        "bench",
        "--url",
        "http://127.0.0.1:1",
        "--requests",
        "1",
    ]));
    assert_eq!(code, 1);
    assert!(
        message.contains("127.0.0.1:1") && message.contains("refused"),
        "{message}"
    );
    let (code, message) = refusal(volley(&[
        "bench",
        "--url",
        "https://example.com",
        "--requests",
        "1",
    ]));
    assert_eq!(code, 1);
    assert!(message.contains("http://"), "{message}");
}

#[test]
fn the_program_explains_itself_to_shells_man_and_people() {
    for (shell, mark) in [
        ("bash", "complete -F _volley"),
        ("zsh", "#compdef volley"),
        ("fish", "complete -c volley"),
    ] {
        let script = text(volley(&["completions", shell]));
        assert!(
            script.contains(mark) && script.contains("micro-batches"),
            "{shell}"
        );
    }
    let dir = tempfile::tempdir().unwrap();
    let pages = dir.path().join("man1");
    assert_eq!(text(volley(&["manual", pages.to_str().unwrap()])), "");
    let page = std::fs::read_to_string(pages.join("volley-serve.1")).unwrap();
    assert!(page.contains(".TH volley-serve 1") && page.contains("Attention workers (M)"));
    assert!(pages.join("volley-vet-search.1").exists());

    let whole = text(volley(&["config", "explain", "cluster.micro_batches"]));
    for expected in [
        "a whole number from 1 to 8",
        "--micro-batches",
        "VOLLEY_CLUSTER_MICRO_BATCHES",
    ] {
        assert!(whole.contains(expected), "{whole}");
    }
    let all = text(volley(&["config", "explain", "--json"]));
    let all: serde_json::Value = serde_json::from_str(&all).unwrap();
    assert_eq!(
        all.as_array().unwrap().len(),
        volley::config::keys::KEYS.len()
    );
    let (code, message) = refusal(volley(&["config", "explain", "cluster.microbatches"]));
    assert_eq!(code, 1);
    assert!(
        message.contains("did you mean `cluster.micro_batches`?"),
        "{message}"
    );
    let version = text(volley(&["--version"]));
    for fact in ["commit:", "build:", "rustc", "kernels:"] {
        assert!(version.contains(fact), "{version}");
    }
}
