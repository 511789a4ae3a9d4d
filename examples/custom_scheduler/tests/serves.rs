//! The example's scheduler serves as well as the shipped one: the same tokens, nothing lost, also when the KV cache is scarce.

use std::sync::Arc;

use volley_actors::{Cluster, ClusterConfig, Request, RequestEvent, StartScheduler};

async fn serve(scheduler: Option<StartScheduler>, kv_blocks: u32) -> Vec<Vec<u32>> {
    let model = volley::demo::model_dir().expect("the demo model opens");
    let config = ClusterConfig {
        attention_workers: 2,
        expert_workers: 3,
        context: 256,
        kv_blocks,
        max_rows: 64,
        prefill_tokens: 32,
        ..ClusterConfig::for_model(model.spec())
    };
    let cluster = Cluster::start(config, model.weights(), scheduler, Arc::new(|_| ()))
        .expect("the cluster starts");
    let mut tasks = tokio::task::JoinSet::new();
    for index in 0..24u32 {
        let prompt = (0..5 + index * 7)
            .map(|i| 5 + (i * 37 + index) % 900)
            .collect();
        let request = Request::greedy(prompt, 10 + index);
        let mut stream = cluster
            .client()
            .submit(request)
            .await
            .expect("the request is taken");
        tasks.spawn(async move {
            let mut tokens = Vec::new();
            while let Some(event) = stream.next().await {
                if let RequestEvent::Token { token, .. } = event {
                    tokens.push(token);
                }
            }
            (index, tokens)
        });
    }
    let mut answers = tasks.join_all().await;
    answers.sort();
    answers.into_iter().map(|(_, tokens)| tokens).collect()
}

#[tokio::test]
async fn the_same_tokens_as_with_the_shipped_scheduler() {
    let expected = serve(None, 256).await;
    assert_eq!(expected.len(), 24);
    assert_eq!(expected[23].len(), 33);
    assert_eq!(serve(Some(custom_scheduler::start()), 256).await, expected);
    assert_eq!(serve(Some(custom_scheduler::start()), 17).await, expected);
    assert_eq!(serve(None, 17).await, expected);
}
