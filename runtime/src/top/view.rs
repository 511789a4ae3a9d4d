//! What two samples and the time between them say. Pure.

use serde_json::{Value, json};
use volley_actors::metric_names as names;

use super::sample::{Labels, Sample, State};

/// One interval of a cluster.
#[derive(Debug, Clone)]
pub(super) struct View {
    pub(super) state: State,
    /// Generated tokens per second.
    pub(super) tokens_per_s: f64,
    /// Prompt tokens per second.
    pub(super) prompt_per_s: f64,
    /// Steps of micro-batches per second.
    pub(super) steps_per_s: f64,
    /// Requests that ended in the interval, and those of them with an error.
    pub(super) ended: f64,
    pub(super) errors: f64,
    /// Where a step's time went; none if no step ended.
    pub(super) step: Option<StepTimes>,
    /// Seconds, means of the interval.
    pub(super) first_token: Option<f64>,
    pub(super) between_tokens: Option<f64>,
    /// Rows in the interval, `[layer][expert]`.
    pub(super) experts: Vec<Vec<u64>>,
    /// Slowest first.
    pub(super) hops: Vec<Hop>,
}

/// Means of the steps of an interval, in seconds for one layer with experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct StepTimes {
    /// Tokens of a step.
    pub(super) rows: f64,
    /// The whole step, over all layers.
    pub(super) total: f64,
    /// T_a.
    pub(super) attention: f64,
    /// T_e.
    pub(super) expert: f64,
    /// T_c, one way.
    pub(super) hop: f64,
    /// Waiting for one's turn: at the experts, and at the attention worker.
    pub(super) queued: f64,
    pub(super) ready: f64,
}

impl StepTimes {
    /// T_f, the busier side.
    pub(super) fn busier(&self) -> f64 {
        self.attention.max(self.expert)
    }

    /// Condition 1: the less busy side's share of the busier.
    pub(super) fn balance(&self) -> f64 {
        self.attention.min(self.expert) / self.busier().max(f64::MIN_POSITIVE)
    }

    /// Condition 2.
    pub(super) fn hidden(&self) -> bool {
        self.hop < self.busier()
    }

    /// Condition 3: micro-batches that keep both sides busy, `m >= 2 (1 + T_c / T_f)`.
    pub(super) fn micro_batches(&self) -> f64 {
        2.0 * (1.0 + self.hop / self.busier().max(f64::MIN_POSITIVE))
    }
}

/// One way between two workers.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Hop {
    pub(super) worker: String,
    pub(super) peer: String,
    pub(super) median: f64,
    pub(super) p99: f64,
}

impl View {
    /// A counter that went back is of a server that was started again: it counts from zero.
    pub(super) fn between(before: &Sample, now: &Sample) -> Self {
        let seconds = now.at.duration_since(before.at).as_secs_f64().max(1e-3);
        let grown = |name: &str| {
            let (then, now) = (before.metrics.sum(name), now.metrics.sum(name));
            if now >= then { now - then } else { now }
        };
        let mean = |name: &str| {
            let count = grown(&format!("{name}_count"));
            (count > 0.0).then(|| grown(&format!("{name}_sum")) / count)
        };
        let layers = now
            .experts
            .iter()
            .filter(|layer| layer.iter().any(|&n| n > 0));
        let layers = layers.count().max(1) as f64;
        let step = mean(names::STEP_TIME).map(|total| {
            let of = |name| mean(name).unwrap_or(0.0) / layers;
            StepTimes {
                rows: mean(names::ITERATION_TOKENS).unwrap_or(0.0),
                total,
                attention: of(names::ATTENTION_TIME),
                expert: of(names::EXPERT_TIME),
                hop: of(names::NETWORK_TIME) / 2.0,
                queued: of(names::EXPERT_QUEUE_TIME),
                ready: of(names::READY_TIME),
            }
        });
        let errors = |sample: &Sample| -> f64 {
            let series = sample.metrics.series(names::REQUESTS);
            let of_errors = series.filter(|(labels, _)| labels.iter().any(|(_, v)| v == "error"));
            of_errors.map(|(_, value)| value).sum()
        };
        let experts = now.experts.iter().enumerate().map(|(layer, rows)| {
            let then = before.experts.get(layer);
            let row = |(expert, &rows): (usize, &u64)| {
                let then = then.and_then(|then| then.get(expert));
                rows.checked_sub(then.copied().unwrap_or(0)).unwrap_or(rows)
            };
            rows.iter().enumerate().map(row).collect()
        });
        View {
            state: now.state.clone(),
            tokens_per_s: grown(names::GENERATION_TOKENS) / seconds,
            prompt_per_s: grown(names::PROMPT_TOKENS) / seconds,
            steps_per_s: grown(names::STEPS) / seconds,
            ended: grown(names::REQUESTS),
            errors: (errors(now) - errors(before)).max(0.0),
            step,
            first_token: mean(names::TIME_TO_FIRST_TOKEN),
            between_tokens: mean(names::INTER_TOKEN_LATENCY),
            experts: experts.collect(),
            hops: hops(now),
        }
    }

    /// For scripts.
    pub(super) fn json(&self) -> Value {
        let step = self.step.map(|step| {
            json!({
                "rows": step.rows, "seconds": step.total, "t_a": step.attention, "t_e": step.expert, "t_c": step.hop,
                "queued": step.queued, "ready": step.ready, "balance": step.balance(), "network_hidden": step.hidden(),
                "micro_batches_needed": step.micro_batches(),
            })
        });
        let hops = self.hops.iter().map(|hop| {
            json!({"worker": hop.worker, "peer": hop.peer, "median": hop.median, "p99": hop.p99})
        });
        let workers = self.state.workers.iter().map(|worker| {
            json!({"worker": worker.worker, "present": worker.present, "leaving": worker.leaving, "since_epoch": worker.since_epoch})
        });
        json!({
            "epoch": self.state.epoch, "live": self.state.live, "waiting": self.state.waiting, "tokens_per_s": self.tokens_per_s,
            "prompt_tokens_per_s": self.prompt_per_s, "steps_per_s": self.steps_per_s, "requests_ended": self.ended, "requests_failed": self.errors,
            "time_to_first_token_s": self.first_token, "inter_token_s": self.between_tokens, "step": step,
            "workers": workers.collect::<Vec<_>>(), "hops": hops.collect::<Vec<_>>(), "expert_rows": self.experts,
        })
    }
}

fn hops(sample: &Sample) -> Vec<Hop> {
    let label = |labels: &Labels, name: &str| {
        let found = labels.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.clone())
    };
    let ends = |labels: &Labels| Some((label(labels, "worker")?, label(labels, "peer")?));
    let medians: Vec<_> = sample.metrics.series(names::HOP_MEDIAN).collect();
    let of_one = |(labels, p99): (&Labels, f64)| {
        let (worker, peer) = ends(labels)?;
        let same = medians
            .iter()
            .find(|(labels, _)| ends(labels) == Some((worker.clone(), peer.clone())));
        let median = same.map_or(0.0, |(_, median)| *median);
        (p99 > 0.0).then_some(Hop {
            worker,
            peer,
            median,
            p99,
        })
    };
    let mut hops: Vec<Hop> = sample
        .metrics
        .series(names::HOP_P99)
        .filter_map(of_one)
        .collect();
    hops.sort_by(|a, b| b.p99.total_cmp(&a.p99));
    hops
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use super::super::sample::tests::sample;
    use super::*;

    fn metrics(times: f64) -> String {
        format!(
            "volley_generation_tokens_total {}\nvolley_prompt_tokens_total 7\nvolley_steps_total {}\n\
             volley_requests_total{{finished_reason=\"stop\"}} {times}\nvolley_requests_total{{finished_reason=\"error\"}} {times}\n\
             volley_step_seconds_sum {}\nvolley_step_seconds_count {}\nvolley_iteration_tokens_sum {}\nvolley_iteration_tokens_count {}\n\
             volley_attention_seconds_sum {}\nvolley_attention_seconds_count {}\nvolley_expert_seconds_sum {}\nvolley_expert_seconds_count {}\n\
             volley_network_seconds_sum {}\nvolley_network_seconds_count {}\n\
             volley_hop_median_seconds{{worker=\"attention-0\",peer=\"expert-0\"}} 0.0001\nvolley_hop_p99_seconds{{worker=\"attention-0\",peer=\"expert-0\"}} 0.0004\n",
            300.0 * times,
            100.0 * times,
            2.0 * times,
            100.0 * times,
            800.0 * times,
            100.0 * times,
            0.4 * times,
            100.0 * times,
            0.8 * times,
            100.0 * times,
            0.8 * times,
            100.0 * times,
        )
    }

    /// Two seconds in which a hundred steps of two layers ended.
    pub(crate) fn view() -> View {
        let (before, mut now) = (sample(&metrics(1.0), 10), sample(&metrics(2.0), 30));
        now.at = before.at + Duration::from_secs(2);
        View::between(&before, &now)
    }

    #[test]
    fn rates_are_of_the_interval_and_times_of_a_layer() {
        let view = view();
        assert_eq!((view.tokens_per_s, view.prompt_per_s), (150.0, 0.0));
        assert_eq!((view.ended, view.errors), (2.0, 1.0));
        let step = view.step.unwrap();
        let near =
            |found: f64, expected: f64| assert!((found / expected - 1.0).abs() < 1e-9, "{found}");
        near(step.total, 0.02);
        near(step.rows, 8.0);
        near(step.attention, 0.002);
        near(step.expert, 0.004);
        near(step.hop, 0.002);
        near(step.balance(), 0.5);
        near(step.micro_batches(), 3.0);
        assert!(step.hidden());
        assert_eq!(view.experts, [[20, 0, 0], [0, 40, 20]]);
        assert_eq!(view.hops.len(), 1);
        assert_eq!(view.json()["step"]["t_c"], json!(step.hop));
    }

    #[test]
    fn a_server_that_was_started_again_counts_from_zero() {
        let (before, mut now) = (sample(&metrics(5.0), 50), sample(&metrics(1.0), 10));
        now.at = before.at + Duration::from_secs(1);
        let view = View::between(&before, &now);
        assert_eq!((view.tokens_per_s, view.errors), (300.0, 0.0));
        assert_eq!(view.experts[0][0], 10);
    }

    #[test]
    fn an_idle_server_has_no_step() {
        let (before, mut now) = (sample(&metrics(1.0), 10), sample(&metrics(1.0), 10));
        now.at = before.at + Duration::from_secs(1);
        assert_eq!(View::between(&before, &now).step, None);
    }
}
