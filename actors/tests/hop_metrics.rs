//! What the metrics say of the network is what the network is like, in virtual time, where that is known exactly.

use std::time::Duration;

use metrics_util::debugging::{DebugValue, DebuggingRecorder};
use volley_actors::simulation::{Arrival, FlatCosts, Scenario, scenario};
use volley_actors::{Request, RosterShape, metric_names as names};
use volley_transports::simulated::Conditions;

const LATENCY: Duration = Duration::from_micros(400);

/// One attention worker and two expert workers, decoding for longer than a window.
fn steady(micro_batches: u8, max_rows: u32, costs: FlatCosts) -> Scenario {
    let mut scenario = scenario(1);
    scenario.config.roster = RosterShape {
        attention: 1,
        expert_workers: 2,
        experts: 8,
        replicas: 1,
        spare: 0,
    };
    scenario.config.micro_batches = micro_batches;
    scenario.config.network = Conditions {
        latency: LATENCY,
        ..Conditions::default()
    };
    scenario.config.layers = 2;
    scenario.config.top_k = 2;
    scenario.config.kv_blocks = 4096;
    scenario.config.context = 16_384;
    scenario.config.max_rows = max_rows;
    scenario.policy = (max_rows, 1);
    scenario.costs = costs;
    scenario.faults.clear();
    let request = |i: u32| Arrival {
        at: Duration::ZERO,
        request: Request::greedy(vec![i], 8000),
        cancelled: None,
    };
    scenario.arrivals = (0..8).map(request).collect();
    scenario
}

/// Median and 99th percentile of each hop, by worker and peer.
fn hops(scenario: &Scenario) -> Vec<(String, f64)> {
    let recorder = DebuggingRecorder::new();
    let snapshots = recorder.snapshotter();
    metrics::with_local_recorder(&recorder, || {
        let mut simulation = scenario.simulation().expect("a cluster").unchecked();
        let outcome = simulation.run(scenario.arrivals.clone(), Vec::new());
        outcome.expect("all streams end");
    });
    let values = snapshots.snapshot().into_vec().into_iter();
    let hops = values.filter_map(|(key, _, _, value)| {
        let key = key.key();
        let label = |name| key.labels().find(|l| l.key() == name).map(|l| l.value());
        let DebugValue::Gauge(value) = value else {
            return None;
        };
        let name = [names::HOP_MEDIAN, names::HOP_P99].contains(&key.name());
        let hop = format!("{} {} {}", key.name(), label("worker")?, label("peer")?);
        name.then_some((hop, value.into_inner()))
    });
    hops.collect()
}

#[test]
fn a_hop_is_as_long_as_the_network_makes_it() {
    let quick = FlatCosts {
        attention: Duration::from_micros(50),
        experts: Duration::from_micros(50),
        row: Duration::ZERO,
    };
    let hops = hops(&steady(1, 32, quick));
    assert_eq!(hops.len(), 4, "two of each peer: {hops:?}");
    for (name, seconds) in &hops {
        let ratio = seconds / LATENCY.as_secs_f64();
        // A frame's own bytes and the bucket come on top.
        assert!((1.0..1.15).contains(&ratio), "{name} is {seconds} s");
    }
}

#[test]
fn waiting_for_a_busy_worker_is_no_hop() {
    // Frames of one micro-batch come while the other is computed: on the side that takes longer.
    // With room for half of the sequences in a step they are spread over both for certain.
    for (attention, experts, max_rows) in [(1, 4, 4), (4, 1, 4), (1, 4, 32), (4, 1, 32)] {
        let costs = FlatCosts {
            attention: Duration::from_millis(attention),
            experts: Duration::from_millis(experts),
            row: Duration::ZERO,
        };
        let hops = hops(&steady(2, max_rows, costs));
        assert_eq!(hops.len(), 4, "two of each peer: {hops:?}");
        for (name, seconds) in hops {
            let ratio = seconds / LATENCY.as_secs_f64();
            assert!(
                ratio < 1.15,
                "{name} is {seconds} s with {attention} and {experts} ms of computing"
            );
        }
    }
}
