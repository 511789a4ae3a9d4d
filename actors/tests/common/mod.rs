//! What the tests with real clusters share.
#![allow(dead_code, unreachable_pub)] // each test uses its own part

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use volley_actors::{
    Cluster, ClusterConfig, FinishReason, Request, RequestEvent, StartScheduler, TokenLogprob,
};
use volley_models::{ComputeType, LoadFormat, ModelDir};

/// A folder of the fixtures.
pub fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../integration/fixtures")
}

pub fn model(name: &str) -> ModelDir {
    ModelDir::open(fixtures().join("models").join(name), LoadFormat::Auto)
        .expect("the fixture opens")
}

/// A small cluster of (attention workers, expert workers, micro-batches).
pub fn config(shape: (u16, u16, u8), dtype: ComputeType) -> ClusterConfig {
    ClusterConfig {
        attention_workers: shape.0,
        expert_workers: shape.1,
        micro_batches: shape.2,
        micro_batch_rows: 2,
        threads: 3,
        dtype,
        quantize: None,
        context: 256,
        block_tokens: 16,
        kv_blocks: 64,
        max_rows: 48,
        prefill_tokens: 24,
        expert_replicas: 1,
        spare_experts: 0,
        max_waiting: 1000,
        peer_deadline: Duration::from_secs(30),
        timeline_spans: 0,
    }
}

pub fn start(
    model: &ModelDir,
    config: ClusterConfig,
    scheduler: Option<StartScheduler>,
) -> Cluster {
    Cluster::start(config, model.weights(), scheduler, Arc::new(|_| ()))
        .expect("the cluster starts")
}

/// All that came back for a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    pub tokens: Vec<u32>,
    pub logprobs: Vec<TokenLogprob>,
    pub prompt: Vec<TokenLogprob>,
    pub reason: Option<FinishReason>,
}

pub async fn ask(cluster: &Cluster, request: Request) -> Answer {
    let mut stream = cluster
        .client()
        .submit(request)
        .await
        .expect("the request is taken");
    let mut answer = Answer {
        tokens: vec![],
        logprobs: vec![],
        prompt: vec![],
        reason: None,
    };
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

/// A greedy request with log-probabilities, its prompt made from a number.
pub fn request(seed: u32, length: u32, vocab: usize) -> Request {
    let prompt = (0..length)
        .map(|i| (seed * 131 + i * i * 17 + i * 3) % vocab as u32)
        .collect();
    let mut request = Request::greedy(prompt, 12 + seed % 9);
    (request.logprobs, request.prompt_logprobs) = (Some(3), Some(1));
    request
}

/// Runs futures concurrently on this task; results in the order of the futures.
pub async fn join_all<F: Future>(futures: impl IntoIterator<Item = F>) -> Vec<F::Output> {
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
