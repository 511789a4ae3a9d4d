//! What a server says at one moment.

use std::time::{Duration, Instant};

use serde::Deserialize;

use crate::http_client::HttpClient;

/// Time for all three answers.
const PATIENCE: Duration = Duration::from_secs(5);

/// Answers of `/admin/state`, `/admin/experts` and `/metrics`.
#[derive(Debug, Clone)]
pub(super) struct Sample {
    pub(super) at: Instant,
    pub(super) state: State,
    /// Rows so far, `[layer][expert]`.
    pub(super) experts: Vec<Vec<u64>>,
    pub(super) metrics: Metrics,
}

/// The part of `/admin/state` that is shown.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct State {
    pub(super) epoch: u32,
    pub(super) live: usize,
    pub(super) waiting: usize,
    #[serde(default)]
    pub(super) draining: bool,
    #[serde(default)]
    pub(super) failed: Option<String>,
    pub(super) attention: Vec<Attention>,
    #[serde(default)]
    pub(super) scheduler: Option<String>,
    #[serde(default)]
    pub(super) standby: Vec<String>,
    pub(super) workers: Vec<Worker>,
}

/// An attention worker's books.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Attention {
    pub(super) sequences: usize,
    pub(super) free_blocks: u32,
    pub(super) kv_blocks: u32,
}

/// A seat, and who is in it.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Worker {
    pub(super) worker: String,
    pub(super) present: bool,
    pub(super) leaving: bool,
    pub(super) since_epoch: Option<u32>,
    /// None: it did not answer.
    pub(super) waits: Option<Vec<Wait>>,
}

/// What a worker waits for.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Wait {
    #[serde(rename = "for")]
    pub(super) peers: Vec<String>,
    pub(super) layer: u32,
    pub(super) seconds: f64,
}

#[derive(Deserialize)]
struct Experts {
    rows: Vec<Vec<u64>>,
}

impl Sample {
    /// Asks.
    pub(super) async fn take(client: &HttpClient) -> Result<Self, String> {
        let all = async {
            let state = client.get("/admin/state").await?;
            let experts = client.get("/admin/experts").await?;
            let metrics = client.text("/metrics").await?;
            Ok::<_, String>((state, experts, metrics))
        };
        let all = tokio::time::timeout(PATIENCE, all).await;
        let (state, experts, metrics) =
            all.map_err(|_| format!("no answer within {PATIENCE:?}"))??;
        Self::read(state, experts, &metrics)
    }

    fn read(
        state: serde_json::Value,
        experts: serde_json::Value,
        metrics: &str,
    ) -> Result<Self, String> {
        let unlike = |what: &'static str| {
            move |error| format!("{what} is not that of a Volley server of this version: {error}")
        };
        let experts: Experts = serde_json::from_value(experts).map_err(unlike("/admin/experts"))?;
        Ok(Sample {
            at: Instant::now(),
            state: serde_json::from_value(state).map_err(unlike("/admin/state"))?,
            experts: experts.rows,
            metrics: Metrics::parse(metrics),
        })
    }
}

/// Names of labels and their values.
pub(super) type Labels = [(String, String)];

/// Prometheus' text format, as far as our own server writes it.
#[derive(Debug, Clone, Default)]
pub(super) struct Metrics(Vec<Series>);

#[derive(Debug, Clone)]
struct Series {
    name: String,
    labels: Box<Labels>,
    value: f64,
}

impl Metrics {
    /// Lines that are no sample are passed over.
    pub(super) fn parse(text: &str) -> Self {
        Metrics(text.lines().filter_map(Series::parse).collect())
    }

    /// The sum over all labels.
    pub(super) fn sum(&self, name: &str) -> f64 {
        self.series(name).map(|(_, value)| value).sum()
    }

    /// Values with their labels.
    pub(super) fn series(&self, name: &str) -> impl Iterator<Item = (&Labels, f64)> {
        let of_name = self.0.iter().filter(move |series| series.name == name);
        of_name.map(|series| (&*series.labels, series.value))
    }
}

impl Series {
    fn parse(line: &str) -> Option<Self> {
        if line.starts_with('#') {
            return None;
        }
        let (name, value) = line.rsplit_once(' ')?;
        let (name, labels) = match name.split_once('{') {
            // Our labels hold no quotes and no commas.
            Some((name, labels)) => (name, labels.strip_suffix('}')?),
            None => (name, ""),
        };
        let labels = labels.split(',').filter_map(|pair| {
            let (key, text) = pair.split_once('=')?;
            Some((key.to_owned(), text.trim_matches('"').to_owned()))
        });
        Some(Series {
            name: name.to_owned(),
            labels: labels.collect(),
            value: value.parse().ok()?,
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;

    /// A server with a lost worker and one that waits.
    pub(crate) fn sample(metrics: &str, rows: u64) -> Sample {
        let worker = |name: &str, present: bool, since: Option<u32>, waits: serde_json::Value| json!({"worker": name, "present": present, "leaving": false, "since_epoch": since, "waits": waits, "address": null});
        let state = json!({
            "epoch": 3, "live": 5, "waiting": 2, "draining": false, "failed": null, "scheduler": "one", "standby": ["two"],
            "attention": [{"alive": true, "sequences": 3, "free_blocks": 25, "kv_blocks": 100}],
            "workers": [
                worker("attention-0", true, Some(1), json!([{"for": ["expert-1"], "step": 9, "layer": 2, "micro_batch": 0, "seconds": 1.5}])),
                worker("expert-0", true, Some(1), json!([])),
                worker("expert-1", false, None, json!(null)),
            ],
        });
        let experts =
            json!({"layers": 2, "experts": 3, "rows": [[rows, 0, 0], [0, 2 * rows, rows]]});
        Sample::read(state, experts, metrics).expect("a sample")
    }

    #[test]
    fn metrics_are_summed_over_labels_and_other_lines_passed_over() {
        let metrics = Metrics::parse(
            "# HELP a_total x\n# TYPE a_total counter\na_total{x=\"1\",y=\"expert-0\"} 2\na_total{x=\"2\"} 3.5\na_total_more 9\n\nnonsense\nb NaN\nplain 4e-1\n",
        );
        assert_eq!(metrics.sum("a_total"), 5.5);
        assert_eq!(metrics.sum("plain"), 0.4);
        assert_eq!(metrics.sum("absent"), 0.0);
        let (labels, _) = metrics.series("a_total").next().unwrap();
        assert_eq!(labels[1], ("y".to_owned(), "expert-0".to_owned()));
    }

    #[test]
    fn another_server_is_said_to_be_one() {
        let error = Sample::read(json!({"hello": 1}), json!({"rows": []}), "").unwrap_err();
        assert!(
            error.contains("/admin/state is not that of a Volley server"),
            "{error}"
        );
    }
}
