//! A cluster, requests and faults drawn from a seed.

use std::sync::Arc;
use std::time::Duration;

use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use volley_transports::simulated::Conditions;
use volley_transports::{Role, WorkerId};

use super::faults::workers;
use super::{Arrival, Fault, FaultKind, FlatCosts, Simulation, SimulationConfig};
use crate::request::Request;
use crate::roster::RosterShape;
use crate::scheduler::{FirstCome, PolicyScheduler};

const VOCAB: usize = 97;
const CONTEXT: u32 = 64;

/// All that a seed stands for.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// The cluster.
    pub config: SimulationConfig,
    /// Prompt tokens of a step, and rows of a micro-batch before there is another.
    pub policy: (u32, u32),
    /// Time of each piece of work.
    pub costs: FlatCosts,
    /// The requests.
    pub arrivals: Vec<Arrival>,
    /// The faults.
    pub faults: Vec<Fault>,
}

impl Scenario {
    /// The cluster of the scenario, about to start.
    ///
    /// # Errors
    /// As [`Simulation::new`].
    pub fn simulation(&self) -> Result<Simulation, String> {
        let (prefill, fill) = self.policy;
        let make = move || Box::new(PolicyScheduler::new(FirstCome::new(prefill, fill))) as _;
        Simulation::new(self.config.clone(), Box::new(self.costs), Box::new(make))
    }
}

/// The scenario of a seed: clusters of up to 3 x 4 workers, networks from quiet to 5 % loss and 50 ms with jitter, up to 30 requests and up to 6 faults.
pub fn scenario(seed: u64) -> Scenario {
    let random = &mut Pcg64::seed_from_u64(seed);
    let roster = RosterShape {
        attention: random.random_range(1..4),
        expert_workers: random.random_range(1..5),
        experts: random.random_range(4..9),
        replicas: random.random_range(1..4),
        spare: *[0, 0, 2, 8].choose(random).unwrap_or(&0),
    };
    let ms = Duration::from_millis;
    let network = Conditions {
        latency: *[Duration::from_micros(5), ms(1), ms(50)]
            .choose(random)
            .unwrap_or(&ms(1)),
        jitter: *[Duration::ZERO, ms(1), ms(20)]
            .choose(random)
            .unwrap_or(&ms(1)),
        bytes_per_s: *[1e6, 1e8, 1e10].choose(random).unwrap_or(&1e8),
        loss: *[0.0, 0.0, 0.01, 0.05].choose(random).unwrap_or(&0.0),
        packet_bytes: 1200,
        retransmit: ms(random.random_range(1..100)),
        idle_timeout: ms(800),
    };
    let max_rows = random.random_range(1..40);
    let config = SimulationConfig {
        roster,
        layers: random.random_range(1..4),
        top_k: random.random_range(1..4),
        vocab: VOCAB,
        popularity: Arc::new([]),
        micro_batches: random.random_range(1..4),
        // As few as one full context, so that preemption happens.
        kv_blocks: random.random_range(CONTEXT / 4..40),
        block_tokens: 4,
        max_rows,
        context: CONTEXT,
        max_waiting: 1000,
        peer_deadline: ms(random.random_range(1000..3000)),
        network,
        row_bytes: None,
        load_time: ms(random.random_range(10..1000)),
        adopt_time: ms(random.random_range(1..500)),
        scheduler_time: Duration::from_micros(random.random_range(0..5000)),
        timeline_spans: 0,
        seed,
    };
    let costs = FlatCosts {
        attention: Duration::from_micros(random.random_range(1..5000)),
        experts: Duration::from_micros(random.random_range(1..5000)),
        row: Duration::from_micros(random.random_range(0..100)),
    };
    let span_ms = random.random_range(500..8000);
    let arrivals = (0..random.random_range(1..31))
        .map(|_| arrival(random, span_ms))
        .collect();
    let faults = (0..random.random_range(0..7))
        .map(|_| fault(random, roster, span_ms))
        .collect();
    Scenario {
        policy: (
            random.random_range(1..40).min(max_rows),
            random.random_range(1..8),
        ),
        config,
        costs,
        arrivals,
        faults,
    }
}

fn arrival(random: &mut Pcg64, span_ms: u64) -> Arrival {
    let prompt: Vec<u32> = (0..random.random_range(1..45))
        .map(|_| random.random_range(0..VOCAB as u32))
        .collect();
    let mut request = Request::greedy(prompt, random.random_range(0..20));
    if random.random_bool(0.3) {
        request.stop_tokens = (0..VOCAB as u32).step_by(16).collect();
    }
    let at = Duration::from_millis(random.random_range(0..span_ms));
    let patience = Duration::from_millis(random.random_range(0..3000));
    Arrival {
        at,
        request,
        cancelled: random.random_bool(0.1).then_some(at + patience),
    }
}

fn fault(random: &mut Pcg64, roster: RosterShape, span_ms: u64) -> Fault {
    let all: Vec<WorkerId> = workers(Role::Attention, roster.attention)
        .chain(workers(Role::Expert, roster.expert_workers))
        .collect();
    let worker = all[random.random_range(0..all.len())];
    let kind = match random.random_range(0..10) {
        0 => FaultKind::Kill { worker, told: true },
        1 => FaultKind::Kill {
            worker,
            told: false,
        },
        2 => FaultKind::Stop(worker),
        3 => FaultKind::Hang(worker),
        4 => FaultKind::Slow(worker, random.random_range(2..200)),
        5 => FaultKind::Cut(
            Role::Attention.worker(random.random_range(0..roster.attention)),
            Role::Expert.worker(random.random_range(0..roster.expert_workers)),
        ),
        6 => FaultKind::CutOff(worker),
        7 => FaultKind::Unseen(worker),
        8 => FaultKind::Leave(worker),
        _ => FaultKind::SchedulerDies,
    };
    Fault {
        at: Duration::from_millis(random.random_range(0..span_ms)),
        lasts: Duration::from_millis(random.random_range(10..10_000)),
        kind,
    }
}
