//! Every metric of the cluster: its name and what it means. `docs/metrics.md` lists the same.

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};

macro_rules! metric_names {
    ($($name:ident = $text:literal, $kind:ident, $help:literal;)*) => {
        $(#[doc = $help] pub const $name: &str = $text;)*

        /// Every metric: name, kind, help.
        pub const ALL: &[(&str, Kind, &str)] = &[$(($name, Kind::$kind, $help)),*];
    };
}

/// Kind of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only grows; its name ends in `_total`.
    Counter,
    /// Goes up and down.
    Gauge,
    /// A distribution of seconds; its name ends in `_seconds`.
    Seconds,
    /// A distribution of counts.
    Counts,
}

metric_names! {
    REQUESTS = "volley_requests_total", Counter, "Requests that ended, by finished_reason: stop, length, cancelled, error.";
    REJECTED = "volley_rejected_requests_total", Counter, "Requests that were not taken, by reason: overload (queue full, draining) or invalid.";
    PROMPT_TOKENS = "volley_prompt_tokens_total", Counter, "Prompt tokens computed, recomputation after preemption included.";
    GENERATION_TOKENS = "volley_generation_tokens_total", Counter, "Tokens generated and sent to clients.";
    PREEMPTIONS = "volley_preemptions_total", Counter, "Sequences taken off a worker to free KV blocks; they go on later.";
    PLAN_REFUSALS = "volley_plan_refusals_total", Counter, "Parts of the scheduler's plans that could not be carried out.";
    STEPS = "volley_steps_total", Counter, "Steps that came to their end, over all micro-batches.";
    SCHEDULER_RESTARTS = "volley_scheduler_restarts_total", Counter, "Schedulers lost to a panic or a missed deadline and replaced.";
    WORKER_RESTARTS = "volley_worker_restarts_total", Counter, "Workers lost and rebuilt, by worker role.";
    REQUESTS_RUNNING = "volley_num_requests_running", Gauge, "Requests with a place on an attention worker.";
    REQUESTS_WAITING = "volley_num_requests_waiting", Gauge, "Requests waiting for a place.";
    KV_USAGE = "volley_kv_cache_usage_ratio", Gauge, "Share of KV cache blocks in use, 0 to 1, over all attention workers.";
    EPOCH = "volley_epoch", Gauge, "Version of membership and placement; grows with each regrouping.";
    EXPERT_BALANCE = "volley_expert_balance_ratio", Gauge, "Mean over maximum rows per expert worker since the start; 1 is perfect balance.";
    TIME_TO_FIRST_TOKEN = "volley_time_to_first_token_seconds", Seconds, "From a request's arrival to its first token.";
    INTER_TOKEN_LATENCY = "volley_inter_token_latency_seconds", Seconds, "Between two tokens of a request.";
    E2E_LATENCY = "volley_e2e_request_latency_seconds", Seconds, "From a request's arrival to its end.";
    ITERATION_TOKENS = "volley_iteration_tokens", Counts, "Tokens computed in one step.";
    STEP_TIME = "volley_step_seconds", Seconds, "From a step's plan to its end, waiting behind the previous step included.";
    ATTENTION_TIME = "volley_attention_seconds", Seconds, "Attention side's computing in one step (T_a summed over layers), slowest worker.";
    EXPERT_TIME = "volley_expert_seconds", Seconds, "Slowest expert worker's computing in one step (T_e summed over layers).";
    EXPERT_QUEUE_TIME = "volley_expert_queue_seconds", Seconds, "Frames of one step waiting at the slowest expert worker.";
    NETWORK_TIME = "volley_network_seconds", Seconds, "Both hops of one step, dispatch and combine (2 T_c summed over layers).";
    READY_TIME = "volley_ready_seconds", Seconds, "Combines of one step lying ready while the attention worker computed another micro-batch.";
    EXPERT_ROWS = "volley_expert_rows_total", Counter, "Rows computed by each expert, summed over the layers; label expert, at most 256 series.";
    M2N_BYTES = "volley_m2n_bytes_total", Counter, "Bytes of frames posted, by direction (dispatch or combine) and peer.";
    M2N_FRAMES = "volley_m2n_frames_total", Counter, "Frames posted, by direction (dispatch or combine) and peer.";
    HOP_MEDIAN = "volley_hop_median_seconds", Gauge, "One way between an attention worker and a peer, median of ten seconds, by worker and peer; half of a round trip less the peer's own time.";
    HOP_P99 = "volley_hop_p99_seconds", Gauge, "The same, 99th percentile.";
}

/// Describes every metric to the installed recorder. A cluster registers them all, at zero, when it starts.
pub fn describe() {
    for &(name, kind, help) in ALL {
        match kind {
            Kind::Counter => describe_counter!(name, help),
            Kind::Gauge => describe_gauge!(name, help),
            Kind::Seconds => describe_histogram!(name, Unit::Seconds, help),
            Kind::Counts => describe_histogram!(name, help),
        }
    }
}
