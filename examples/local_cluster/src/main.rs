//! Volley as a library: two attention workers, three expert workers, one prompt.
//!
//! ```sh
//! cargo run --release -p local_cluster -- "ROMEO:"
//! ```

use std::error::Error;
use std::io::{Write, stdout};
use std::sync::Arc;
use std::time::Duration;

use volley_actors::{Cluster, ClusterConfig, FinishReason, Request, RequestEvent};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let prompt = std::env::args().nth(1).unwrap_or("ROMEO:\n".to_owned());

    // The demo model; `ModelDir::open(path, LoadFormat::Auto)` reads a Hugging Face directory.
    let model = volley::demo::model_dir()?;
    let tokenizer = model.tokenizer()?;
    let config = ClusterConfig {
        attention_workers: 2,
        expert_workers: 3,
        ..ClusterConfig::for_model(model.spec())
    };
    let cluster = Cluster::start(config, model.weights(), None, Arc::new(|_| ()))?;

    let request = Request::greedy(tokenizer.encode(&prompt, true)?, 64);
    let mut stream = cluster.client().submit(request).await?;
    let mut text = tokenizer.detokenizer(true);
    print!("{prompt}");
    while let Some(event) = stream.next().await {
        match event {
            RequestEvent::Token { token, .. } => {
                print!("{}", text.push(token)?.unwrap_or_default())
            }
            RequestEvent::Finished(FinishReason::Error(reason)) => return Err(reason.into()),
            RequestEvent::Finished(_) | RequestEvent::Prompt(_) => {}
        }
        stdout().flush()?;
    }
    println!("{}", text.finish()?.unwrap_or_default());
    cluster.shutdown(Duration::from_secs(5));
    Ok(())
}
