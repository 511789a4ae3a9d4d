//! The real server against outputs of an independent implementation (HF transformers, f32): every fixture and variant, over HTTP.
//!
//! The second half asks one model the same over many shapes of the cluster, alone and in company, and wants the same bits.

mod server;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use safetensors::SafeTensors;
use serde::Deserialize;
use serde_json::{Value, json};

use self::server::{PATIENCE, Server};

/// How far a log-probability may be from the golden one. A greedy choice between two tokens that are closer than this is free.
const TOLERANCE: f64 = 2e-3;
/// Alternatives asked for with each token.
const TOP: usize = 5;
/// Other requests in flight beside the one that is compared.
const COMPANY: usize = 32;

/// One prompt of `golden/NAME.json`.
#[derive(Deserialize)]
struct Golden {
    prompt: String,
    prompt_ids: Vec<u32>,
    greedy_ids: Vec<u32>,
    /// Lead of the best logit over the second at each greedy step.
    top2_gaps: Vec<f64>,
}

#[test]
fn the_fixtures_match() {
    for name in ["tiny-dbrx", "tiny-mixtral", "tiny-qwen3moe"] {
        check(
            &fixtures().join("models").join(name),
            &fixtures().join("golden"),
            name,
        );
    }
}

#[test]
fn the_variants_match() {
    let variants = fixtures().join("variants");
    let mut checked = 0;
    for entry in fs::read_dir(&variants).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if entry.path().join("config.json").exists() {
            check(&entry.path(), &variants.join("golden"), &name);
            checked += 1;
        }
    }
    assert_eq!(checked, 5);
}

#[test]
fn the_demo_model_matches() {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo");
    let server = Server::start(&demo, &["--dtype", "f32"]);
    let prompts = read_golden(&demo, "golden");
    assert!(!prompts.is_empty());
    for (p, golden) in prompts.iter().enumerate() {
        let answer = ask(&server, json!(golden.prompt_ids), golden);
        check_greedy(&answer, golden, &format!("demo, prompt {p}"));
    }
}

#[test]
fn every_shape_of_the_cluster_answers_the_same_alone_and_in_company() {
    let model = fixtures().join("models/tiny-mixtral");
    let prompts = read_golden(&fixtures().join("golden"), "tiny-mixtral");
    let mut expected: Option<Vec<Value>> = None;
    for (m, n, micro_batches) in [(1, 1, 1), (1, 1, 2), (2, 3, 3), (3, 2, 4), (1, 4, 2)] {
        let shape = [m, n, micro_batches].map(|count: u32| count.to_string());
        let args = [
            "--attention-workers",
            &shape[0],
            "--expert-workers",
            &shape[1],
            "--micro-batches",
            &shape[2],
            "--dtype",
            "f32",
        ];
        let server = Server::start(&model, &args);
        let ask_all = || -> Vec<Value> {
            prompts
                .iter()
                .map(|golden| ask(&server, json!(golden.prompt_ids), golden))
                .collect()
        };
        let alone = ask_all();
        let expected = expected.get_or_insert_with(|| alone.clone());
        assert!(alone == *expected, "(M, N, m) = {shape:?}, alone");
        let company = Company::join(&server);
        let together = ask_all();
        assert_eq!(
            company.ended.load(Ordering::SeqCst),
            0,
            "requests ended before the comparison did: make them longer"
        );
        assert!(
            together == *expected,
            "(M, N, m) = {shape:?}, with {COMPANY} others"
        );
    }
}

/// Requests that run beside the ones under test until this is dropped.
struct Company {
    ended: Arc<AtomicUsize>,
    stop: Arc<AtomicUsize>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Company {
    /// Starts them all and waits until each has had a token.
    fn join(server: &Server) -> Company {
        let (begun, ended, stop) = (
            Arc::new(AtomicUsize::new(0)),
            Arc::new(AtomicUsize::new(0)),
            Arc::new(AtomicUsize::new(0)),
        );
        let mut threads = Vec::new();
        for i in 0..COMPANY {
            let prompt: Vec<usize> = (0..=i).map(|token| 20 + (7 * token + i) % 200).collect();
            let body = json!({"prompt": prompt, "max_tokens": 4000, "seed": i, "temperature": 1.0, "ignore_eos": true, "stream": true});
            let mut stream = server.stream("/v1/completions", &body);
            let (begun, ended, stop) = (begun.clone(), ended.clone(), stop.clone());
            threads.push(std::thread::spawn(move || {
                let first = stream.event();
                assert!(first.is_some());
                begun.fetch_add(1, Ordering::SeqCst);
                while stop.load(Ordering::SeqCst) == 0 {
                    if stream.event().is_none() {
                        ended.fetch_add(1, Ordering::SeqCst);
                        return;
                    }
                }
            }));
        }
        let until = Instant::now() + PATIENCE;
        while begun.load(Ordering::SeqCst) < COMPANY {
            assert!(
                Instant::now() < until,
                "the other requests do not all begin"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        Company {
            ended,
            stop,
            threads,
        }
    }
}

impl Drop for Company {
    fn drop(&mut self) {
        self.stop.store(1, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Asks the server of one model for every golden prompt, in tokens and in text.
fn check(model: &Path, golden: &Path, name: &str) {
    let server = Server::start(model, &["--dtype", "f32"]);
    let bytes = fs::read(golden.join(format!("{name}.safetensors"))).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let prompts = read_golden(golden, name);
    assert!(!prompts.is_empty());
    for (p, golden) in prompts.iter().enumerate() {
        let place = format!("{name}, prompt {p}");
        let logprobs = log_softmax(&tensors, &format!("logits.{p}"));
        assert_eq!(logprobs.len(), golden.prompt_ids.len(), "{place}");
        let in_tokens = ask(&server, json!(golden.prompt_ids), golden);
        check_prompt(&in_tokens, golden, &logprobs, &place);
        check_greedy(&in_tokens, golden, &place);
        let in_text = ask(&server, json!(golden.prompt), golden);
        assert_eq!(
            in_text["prompt_token_ids"],
            json!(golden.prompt_ids),
            "{place}, as text"
        );
        assert_eq!(
            in_text["token_ids"], in_tokens["token_ids"],
            "{place}, as text"
        );
        assert_eq!(
            in_text["logprobs"]["token_logprobs"], in_tokens["logprobs"]["token_logprobs"],
            "{place}, as text"
        );
    }
}

/// The log-probability of each prompt token after the first, and the best alternatives in its place.
fn check_prompt(choice: &Value, golden: &Golden, logprobs: &[Vec<f64>], place: &str) {
    let given = choice["logprobs"]["token_logprobs"].as_array().unwrap();
    let tops = choice["logprobs"]["top_logprobs"].as_array().unwrap();
    let generated = golden.greedy_ids.len();
    assert_eq!(
        (given.len(), tops.len()),
        (
            golden.prompt_ids.len() + generated,
            golden.prompt_ids.len() + generated
        ),
        "{place}"
    );
    assert!(
        given[0].is_null() && tops[0].is_null(),
        "{place}: nothing precedes the first token"
    );
    for (at, &token) in golden.prompt_ids.iter().enumerate().skip(1) {
        let expected = &logprobs[at - 1];
        close(
            given[at].as_f64().unwrap(),
            expected[token as usize],
            &format!("{place}, position {at}"),
        );
        check_top(&tops[at], expected, &format!("{place}, position {at}"));
    }
    // The first generated token comes from the logits of the last of the prompt.
    let (at, expected) = (golden.prompt_ids.len(), logprobs.last().unwrap());
    close(
        given[at].as_f64().unwrap(),
        expected[golden.greedy_ids[0] as usize],
        &format!("{place}, first answer"),
    );
    check_top(&tops[at], expected, &format!("{place}, first answer"));
}

/// The alternatives carry the greatest log-probabilities there are. (Their names need not be unique to an id; values say enough.)
fn check_top(top: &Value, expected: &[f64], place: &str) {
    let mut given: Vec<f64> = top
        .as_object()
        .unwrap()
        .values()
        .map(|value| value.as_f64().unwrap())
        .collect();
    assert!(
        given.len() == TOP || given.len() == TOP + 1,
        "{place}: {top}"
    );
    given.sort_by(|a, b| b.total_cmp(a));
    let mut expected = expected.to_vec();
    expected.sort_by(|a, b| b.total_cmp(a));
    for (rank, (&given, &expected)) in given.iter().zip(&expected).take(TOP).enumerate() {
        close(given, expected, &format!("{place}, alternative {rank}"));
    }
}

/// The greedy continuation, up to the first choice that is too close to call.
fn check_greedy(choice: &Value, golden: &Golden, place: &str) {
    let given: Vec<u32> = serde_json::from_value(choice["token_ids"].clone()).unwrap();
    let sure = golden
        .top2_gaps
        .iter()
        .position(|&gap| gap < TOLERANCE)
        .unwrap_or(golden.greedy_ids.len());
    assert_eq!(given.len(), golden.greedy_ids.len(), "{place}");
    assert_eq!(given[..sure], golden.greedy_ids[..sure], "{place}");
    let tops = choice["logprobs"]["top_logprobs"].as_array().unwrap();
    for (step, top) in tops[golden.prompt_ids.len()..]
        .iter()
        .enumerate()
        .take(sure)
    {
        let mut values: Vec<f64> = top
            .as_object()
            .unwrap()
            .values()
            .map(|value| value.as_f64().unwrap())
            .collect();
        values.sort_by(|a, b| b.total_cmp(a));
        close(
            values[0] - values[1],
            golden.top2_gaps[step],
            &format!("{place}, lead at step {step}"),
        );
    }
}

fn close(given: f64, expected: f64, place: &str) {
    assert!(
        (given - expected).abs() <= TOLERANCE,
        "{place}: {given} where {expected} is expected"
    );
}

/// The choice of a greedy completion with everything there is to compare.
fn ask(server: &Server, prompt: Value, golden: &Golden) -> Value {
    let body = json!({
        "prompt": prompt, "max_tokens": golden.greedy_ids.len(), "temperature": 0, "ignore_eos": true,
        "echo": true, "logprobs": TOP, "return_token_ids": true,
    });
    let (status, mut answer) = server.post("/v1/completions", &body);
    assert_eq!(status, 200, "{answer}");
    answer["choices"][0].take()
}

fn read_golden(folder: &Path, name: &str) -> Vec<Golden> {
    serde_json::from_slice(&fs::read(folder.join(format!("{name}.json"))).unwrap()).unwrap()
}

/// Rows of log-probabilities from a tensor of logits [length, vocabulary].
fn log_softmax(tensors: &SafeTensors<'_>, name: &str) -> Vec<Vec<f64>> {
    let tensor = tensors.tensor(name).unwrap();
    let logits: Vec<f64> = tensor
        .data()
        .chunks_exact(4)
        .map(|bytes| f64::from(f32::from_le_bytes(bytes.try_into().unwrap())))
        .collect();
    let rows = logits.chunks_exact(tensor.shape()[1]).map(|row| {
        let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let log_sum = max
            + row
                .iter()
                .map(|logit| (logit - max).exp())
                .sum::<f64>()
                .ln();
        row.iter().map(|logit| logit - log_sum).collect()
    });
    rows.collect()
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration/fixtures")
}
