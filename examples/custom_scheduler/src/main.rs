//! Serves three requests with [`custom_scheduler::ShortestFirst`] and prints in which order they end.
//!
//! ```sh
//! cargo run --release -p custom_scheduler
//! ```

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use volley_actors::{Cluster, ClusterConfig, Request};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let model = volley::demo::model_dir()?;
    let config = ClusterConfig::for_model(model.spec());
    let scheduler = Some(custom_scheduler::start());
    let cluster = Cluster::start(config, model.weights(), scheduler, Arc::new(|_| ()))?;

    let mut tasks = tokio::task::JoinSet::new();
    for max_tokens in [200, 20, 100] {
        let mut stream = cluster
            .client()
            .submit(Request::greedy(vec![40, 41, 42], max_tokens))
            .await?;
        tasks.spawn(async move {
            while stream.next().await.is_some() {}
            max_tokens
        });
    }
    while let Some(ended) = tasks.join_next().await {
        println!("the request for {} tokens has ended", ended?);
    }
    cluster.shutdown(Duration::from_secs(5));
    Ok(())
}
