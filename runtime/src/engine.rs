//! A running model: the cluster and what is needed to speak text with it.

use std::sync::Arc;
use std::time::Duration;

use volley_actors::{Client, Cluster};
use volley_models::{ChatTemplate, GenerationDefaults, ModelSpec, Tokenizer};

use crate::children::{self, Family};
use crate::launch::ControllerOffice;

/// Everything that answers requests, shared by the HTTP handlers and the command line.
pub struct Engine {
    /// Name of the model in the API.
    pub model: String,
    /// Seconds since the Unix epoch when the model was loaded.
    pub created: u64,
    /// Its shape.
    pub spec: ModelSpec,
    /// Longest sequence, prompt and output together, in tokens.
    pub context: u32,
    /// Text to tokens and back.
    pub tokenizer: Arc<Tokenizer>,
    /// Messages to text; absent where the model has no chat template.
    pub chat: Option<ChatTemplate>,
    /// The model's own sampling defaults.
    pub defaults: GenerationDefaults,
    /// The way to the cluster.
    pub client: Client,
    /// The cluster, for metrics, timeline and shutdown.
    pub cluster: Arc<Cluster>,
    /// Workers in processes of their own that this process has started.
    pub children: Arc<Family>,
    /// With workers on other hosts: the right to be their controller.
    pub office: Option<ControllerOffice>,
}

impl Engine {
    /// Stops the cluster, and then the processes that were started for it.
    pub fn shutdown(&self, deadline: Duration) {
        self.cluster.shutdown(deadline);
        children::end_all(&self.children);
    }
}
