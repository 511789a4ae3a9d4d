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

#[tokio::test]
async fn bit_identical_while_experts_move_between_their_holders() {
    let model = model("tiny-qwen3moe");
    let experts = model.spec().experts;
    let requests: Vec<Request> = (0..12)
        .map(|i| request(i, 1 + i * 5, model.spec().vocab))
        .collect();
    let mut answers = Vec::new();
    for (workers, replicas) in [((1, 1, 1), 1), ((2, 3, 2), 2), ((1, 4, 3), 3)] {
        let config = ClusterConfig {
            expert_replicas: replicas,
            ..config(workers, ComputeType::Bf16)
        };
        let cluster = start(&model, config, None);
        let ours = requests
            .iter()
            .map(|request| ask(&cluster, request.clone()));
        // Load that drifts: now one range of experts, which is at home with one worker, is hot, now another.
        let drift = async {
            let mut moved = 0;
            for round in 0..12 {
                let hot = |expert: usize| {
                    let range = expert * 4 / experts;
                    1 + 500 * u64::from(range == round % 4) * (expert as u64 + 1)
                };
                let rows = (0..experts).map(hot).collect();
                moved += u32::from(cluster.rebalance(rows).await);
                tokio::time::sleep(Duration::from_millis(3)).await;
            }
            moved
        };
        let (ours, moved) = tokio::join!(join_all(ours), drift);
        assert_eq!(moved > 0, replicas > 1, "{workers:?}");
        answers.push(ours);
        cluster.shutdown(Duration::from_secs(5));
    }
    assert_eq!(answers[1], answers[0]);
    assert_eq!(answers[2], answers[0]);
}
