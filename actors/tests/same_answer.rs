//! The same answer always (DESIGN D6): whatever the number of workers and micro-batches and whoever else is served, a greedy request
//! gets the same tokens and log-probabilities, bit for bit.

mod common;

use std::time::Duration;

use common::{Answer, ask, config, join_all, model, request, start};
use volley_actors::{ClusterConfig, FinishReason, Request};
use volley_models::{ComputeType, Quantization};

#[tokio::test]
async fn bit_identical_over_workers_micro_batches_and_company() {
    for (name, dtype, quantize) in [
        ("tiny-mixtral", ComputeType::F32, None),
        ("tiny-qwen3moe", ComputeType::Bf16, None),
        ("tiny-dbrx", ComputeType::F32, None),
        ("tiny-mixtral", ComputeType::F32, Some(Quantization::Q8)),
        ("tiny-qwen3moe", ComputeType::Bf16, Some(Quantization::Q4)),
    ] {
        let model = model(name);
        let requests: Vec<Request> = (0..6)
            .map(|i| request(i, 1 + i * 13, model.spec().vocab))
            .collect();
        let mut reference: Option<Vec<Answer>> = None;
        for workers in [
            (1, 1, 1),
            (1, 1, 2),
            (2, 3, 3),
            (3, 2, 4),
            (1, 4, 2),
            (2, 9, 2),
        ] {
            let config = ClusterConfig {
                quantize,
                ..config(workers, dtype)
            };
            let cluster = start(&model, config, None);
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
            assert_eq!(&alone, expected, "{name} {quantize:?} {workers:?} alone");

            // And all at once, among 26 others.
            let others = (10..36).map(|i| request(i, 1 + i % 40, model.spec().vocab));
            let ours = requests
                .iter()
                .map(|request| ask(&cluster, request.clone()));
            let others = others.map(|other| ask(&cluster, other));
            let (together, others) = tokio::join!(join_all(ours), join_all(others));
            assert_eq!(
                &together, expected,
                "{name} {quantize:?} {workers:?} in company"
            );
            assert_eq!(others.len(), 26);
            cluster.shutdown(Duration::from_secs(5));
        }
    }
}
