//! The same answer always (DESIGN D6): whatever the number of workers and micro-batches and whoever else is served, a greedy request
//! gets the same tokens and log-probabilities, bit for bit.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use volley_actors::{Cluster, ClusterConfig, FinishReason, Request, RequestEvent, TokenLogprob};
use volley_models::{ComputeType, LoadFormat, ModelDir};

fn model(name: &str) -> ModelDir {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../integration/fixtures/models").join(name);
    ModelDir::open(&path, LoadFormat::Auto).expect("the fixture opens")
}

fn config(workers: (u16, u16, u8), dtype: ComputeType) -> ClusterConfig {
    ClusterConfig {
        attention_workers: workers.0,
        expert_workers: workers.1,
        micro_batches: workers.2,
        dtype,
        context: 256,
        block_tokens: 16,
        kv_blocks: 64,
        max_rows: 48,
        prefill_tokens: 24,
        max_waiting: 1000,
        peer_deadline: Duration::from_secs(30),
        timeline_spans: 0,
    }
}

fn start(model: &ModelDir, workers: (u16, u16, u8), dtype: ComputeType) -> Cluster {
    let progress = Arc::new(|_| ());
    Cluster::start(config(workers, dtype), model.weights(), None, progress).expect("the cluster starts")
}

#[derive(Debug, Clone, PartialEq)]
struct Answer {
    tokens: Vec<u32>,
    logprobs: Vec<TokenLogprob>,
    prompt: Vec<TokenLogprob>,
    reason: Option<FinishReason>,
}

async fn ask(cluster: &Cluster, request: Request) -> Answer {
    let mut stream = cluster.client().submit(request).await.expect("the request is taken");
    let mut answer = Answer { tokens: vec![], logprobs: vec![], prompt: vec![], reason: None };
    while let Some(event) = stream.next().await {
        match event {
            RequestEvent::Prompt(logprobs) => answer.prompt.extend(logprobs),
            RequestEvent::Token { token, logprob } => {
                answer.tokens.push(token);
                answer.logprobs.extend(logprob);
            }
            RequestEvent::Finished(reason) => answer.reason = Some(reason),
        }
    }
    answer
}

fn request(seed: u32, length: u32, vocab: u32) -> Request {
    let prompt = (0..length).map(|i| (seed * 131 + i * i * 17 + i * 3) % vocab).collect();
    let mut request = Request::greedy(prompt, 12 + seed % 9);
    (request.logprobs, request.prompt_logprobs) = (Some(3), Some(1));
    request
}

#[tokio::test]
async fn bit_identical_over_workers_micro_batches_and_company() {
    for (name, dtype) in [
        ("tiny-mixtral", ComputeType::F32),
        ("tiny-qwen3moe", ComputeType::Bf16),
        ("tiny-dbrx", ComputeType::F32),
    ] {
        let model = model(name);
        let requests: Vec<Request> =
            (0..6).map(|i| request(i, 1 + i * 13, model.spec().vocab as u32)).collect();
        let mut reference: Option<Vec<Answer>> = None;
        for workers in [(1, 1, 1), (1, 1, 2), (2, 3, 3), (3, 2, 4), (1, 4, 2), (2, 9, 2)] {
            let cluster = start(&model, workers, dtype);
            let mut alone = Vec::new();
            for request in &requests {
                alone.push(ask(&cluster, request.clone()).await);
            }
            for (answer, request) in alone.iter().zip(&requests) {
                assert_eq!(answer.reason, Some(FinishReason::Length));
                assert_eq!(answer.prompt.len(), request.prompt.len() - 1);
                assert_eq!(answer.logprobs.len(), answer.tokens.len());
            }
            let expected = reference.get_or_insert(alone.clone());
            assert_eq!(&alone, expected, "{name} {workers:?} alone");

            // And all at once, among 26 others.
            let others = (10..36).map(|i| request(i, 1 + i % 40, model.spec().vocab as u32));
            let company: Vec<_> = others.map(|other| ask(&cluster, other)).collect();
            let ours = requests.iter().map(|request| ask(&cluster, request.clone()));
            let (together, others) =
                tokio::join!(join_all(ours.collect()), join_all(company));
            assert_eq!(&together, expected, "{name} {workers:?} in company");
            assert_eq!(others.len(), 26);
            cluster.shutdown(Duration::from_secs(5));
        }
    }
}

/// Runs futures concurrently on this task, in order of their results.
async fn join_all<F: Future>(futures: Vec<F>) -> Vec<F::Output> {
    let mut futures: Vec<_> = futures.into_iter().map(Box::pin).collect();
    let mut results: Vec<Option<F::Output>> = futures.iter().map(|_| None).collect();
    std::future::poll_fn(move |cx| {
        for (future, result) in futures.iter_mut().zip(&mut results) {
            if result.is_none()
                && let std::task::Poll::Ready(value) = future.as_mut().poll(cx)
            {
                *result = Some(value);
            }
        }
        match results.iter().all(Option::is_some) {
            true => std::task::Poll::Ready(results.iter_mut().filter_map(Option::take).collect()),
            false => std::task::Poll::Pending,
        }
    })
    .await
}
