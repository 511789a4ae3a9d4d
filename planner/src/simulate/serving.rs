//! A cluster that serves a trace in virtual time: the real [`Ledger`] and [`Scheduler`] over a data plane by rounds.
//!
//! What the frontend would send to attention workers is taken from the ledger and carried out in [`lockstep`](super::lockstep); what workers would report goes back to
//! it. So admission, batching, KV blocks, preemption and the restart of what a lost worker had are those of production, and a scheduler of a
//! user's own can be tried before anything is rented. The scheduler's own time is not counted: in production it plans while the step before runs.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::time::Duration;

use rand::SeedableRng;
use rand_pcg::Pcg64;
use volley_actors::protocol::{
    AttentionCapacity, AttentionCommand, AttentionStep, Membership, SequenceId, SequenceResult,
    StepReport, StepTiming, StepWork,
};
use volley_actors::{
    Activity, FinishReason, Ledger, Limits, Output, Recorder, Request, RequestEvent, Scheduler,
    Span, Timeline,
};
use volley_transports::{Epoch, Layer, MicroBatch, Role, Step, WorkerId};

use super::histogram::Histogram;
use super::lockstep::{Lockstep, Part, Watch};
use super::report::{Report, Side};
use super::{Routing, StageTimes, Trace};
use crate::PlanError;

/// What is simulated.
#[derive(Debug, Clone, PartialEq)]
pub struct ClusterShape {
    /// Attention workers (M).
    pub attention_workers: u16,
    /// Micro-batches in flight (m).
    pub micro_batches: u8,
    /// Layers with experts (L).
    pub layers: usize,
    /// KV blocks of each attention worker.
    pub kv_blocks: u32,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Tokens that one attention worker computes at most in one step.
    pub max_rows: u32,
    /// Longest sequence.
    pub context: u32,
    /// Requests that may wait for a place.
    pub max_waiting: usize,
    /// Whether another expert worker has the experts of one that is lost.
    pub replicas: bool,
}

/// A worker that is gone for a while.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outage {
    /// The worker.
    pub worker: WorkerId,
    /// When it goes, in seconds.
    pub at_s: f64,
    /// For how long.
    pub lasts_s: f64,
}

/// How things vary.
#[derive(Debug, Clone, PartialEq)]
pub struct Variation {
    /// Each hop takes longer by a share drawn evenly up to this.
    pub jitter: f64,
    /// Whether the rows of each expert are drawn; else each gets its mean.
    pub draws: bool,
    /// Prompts come computed, from a prefill cluster, as in the paper: one costs a row, and its KV blocks.
    pub prefilled: bool,
    /// Workers that are gone for a while.
    pub outages: Vec<Outage>,
    /// Time until the loss of a worker is noticed, in seconds.
    pub notice_s: f64,
    /// Of everything that is drawn.
    pub seed: u64,
}

impl Default for Variation {
    fn default() -> Self {
        Variation {
            jitter: 0.0,
            draws: true,
            prefilled: false,
            outages: Vec::new(),
            notice_s: 1.0,
            seed: 0,
        }
    }
}

/// Serves `trace` on a cluster in virtual time. `timeline` records what is computed when, if it keeps spans.
///
/// # Errors
/// The shape makes no cluster, an outage names a worker that is not, or a request can never run.
pub fn serve<T: StageTimes>(
    shape: &ClusterShape,
    routing: Routing,
    times: T,
    scheduler: Box<dyn Scheduler>,
    trace: &Trace,
    variation: &Variation,
    timeline: &Timeline,
) -> Result<Report, PlanError> {
    let mut serving = Serving::new(shape, routing, times, scheduler, trace, variation, timeline)?;
    serving.run()?;
    Ok(serving.report())
}

/// See the module.
struct Serving<'a, T> {
    shape: &'a ClusterShape,
    trace: &'a Trace,
    variation: &'a Variation,
    whole: Routing,
    ledger: Ledger,
    scheduler: Box<dyn Scheduler>,
    lockstep: Lockstep<T>,
    lanes: Lanes,
    flights: Vec<Flight>,
    sequences: HashMap<SequenceId, Known>,
    membership: Membership,
    /// Expert workers that are gone.
    gone: Vec<u16>,
    queue: BinaryHeap<Reverse<Due>>,
    serial: u64,
    /// Grows when everything under way is void.
    generation: u64,
    halted: bool,
    next_arrival: usize,
    live: HashMap<SequenceId, Served>,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    completed: u64,
    refused: u64,
    impossible: u64,
    events: u64,
    rows: u64,
    steps: u64,
    ended_s: f64,
}

/// What a worker knows of a sequence.
struct Known {
    worker: u16,
    length: u32,
    limit: u32,
    ended: bool,
}

/// What a client saw.
struct Served {
    arrived_s: f64,
    first_s: Option<f64>,
    latest_s: f64,
    tokens: u32,
}

/// One micro-batch.
struct Flight {
    steps: VecDeque<OpenStep>,
    running: bool,
    layer: usize,
    began_s: f64,
    parts: Vec<Part>,
    /// When each attention worker ended the step before.
    until_s: Vec<f64>,
}

struct OpenStep {
    step: Step,
    epoch: Epoch,
    opened_s: f64,
    work: Vec<(u16, Vec<StepWork>)>,
}

#[derive(Debug)]
struct Due {
    at_s: f64,
    serial: u64,
    what: Happening,
}

#[derive(Debug, Clone, Copy)]
enum Happening {
    Arrive,
    Round(usize, u64),
    Ended(usize, u64),
    Break(usize),
    Noticed(usize),
    Mend(usize),
}

/// The timeline of every worker, and the times of clients.
struct Lanes {
    keep: bool,
    attention: Vec<Recorder>,
    experts: Vec<Recorder>,
    ttft: Histogram,
    tpot: Histogram,
    latency: Histogram,
}

impl<'a, T: StageTimes> Serving<'a, T> {
    fn new(
        shape: &'a ClusterShape,
        routing: Routing,
        times: T,
        scheduler: Box<dyn Scheduler>,
        trace: &'a Trace,
        variation: &'a Variation,
        timeline: &Timeline,
    ) -> Result<Self, PlanError> {
        shape.check()?;
        let experts = routing.workers();
        for outage in &variation.outages {
            let count = match outage.worker.role {
                Role::Attention => usize::from(shape.attention_workers),
                Role::Expert => experts,
            };
            if usize::from(outage.worker.index) >= count {
                return Err(PlanError::invalid(
                    "the failures",
                    format!("there is no {}", outage.worker),
                    format!(
                        "there are {count} {} workers, numbered from 0",
                        outage.worker.role
                    ),
                ));
            }
            if !(outage.at_s >= 0.0
                && outage.lasts_s > 0.0
                && (outage.at_s + outage.lasts_s).is_finite())
            {
                return Err(PlanError::invalid(
                    "the failures",
                    format!(
                        "{} is gone at {} s for {} s",
                        outage.worker, outage.at_s, outage.lasts_s
                    ),
                    "give times that are not negative",
                ));
            }
        }
        let capacity = AttentionCapacity {
            alive: true,
            since: Epoch(1),
            kv_blocks: shape.kv_blocks,
            block_tokens: shape.block_tokens,
            max_rows: shape.max_rows,
        };
        let membership = Membership {
            epoch: Epoch(1),
            micro_batches: shape.micro_batches,
            attention: vec![capacity; shape.attention_workers.into()],
        };
        let limits = Limits {
            context: shape.context,
            vocab: 1,
            max_waiting: shape.max_waiting,
        };
        let random = Pcg64::seed_from_u64(variation.seed);
        let mut lockstep = Lockstep::new(
            times,
            routing.clone(),
            shape.attention_workers.into(),
            random,
        );
        (lockstep.jitter, lockstep.draws) = (variation.jitter, variation.draws);
        let flight = || Flight {
            steps: VecDeque::new(),
            running: false,
            layer: 0,
            began_s: 0.0,
            parts: Vec::with_capacity(shape.attention_workers.into()),
            until_s: vec![0.0; shape.attention_workers.into()],
        };
        let recorders = |role: Role, count: usize| {
            (0..count)
                .map(|index| timeline.recorder(role.worker(index as u16)))
                .collect()
        };
        let mut serving = Serving {
            lanes: Lanes {
                keep: timeline.keeps(),
                attention: recorders(Role::Attention, shape.attention_workers.into()),
                experts: recorders(Role::Expert, experts),
                ttft: Histogram::new(),
                tpot: Histogram::new(),
                latency: Histogram::new(),
            },
            flights: (0..shape.micro_batches).map(|_| flight()).collect(),
            whole: routing,
            ledger: Ledger::new(limits),
            scheduler,
            lockstep,
            sequences: HashMap::new(),
            membership,
            gone: Vec::new(),
            queue: BinaryHeap::new(),
            serial: 0,
            generation: 0,
            halted: false,
            next_arrival: 0,
            live: HashMap::new(),
            counts: Counts::default(),
            shape,
            trace,
            variation,
        };
        serving.ledger.regroup(serving.membership.clone());
        for worker in 0..shape.attention_workers {
            serving.ledger.moved(worker, Epoch(1));
        }
        serving.settle(0.0);
        serving.push(trace.requests()[0].arrival_s, Happening::Arrive);
        for (index, outage) in variation.outages.iter().enumerate() {
            serving.push(outage.at_s, Happening::Break(index));
        }
        Ok(serving)
    }

    fn run(&mut self) -> Result<(), PlanError> {
        while let Some(Reverse(Due { at_s, what, .. })) = self.queue.pop() {
            self.counts.events += 1;
            match what {
                Happening::Arrive => self.arrive(at_s),
                Happening::Round(flight, generation) if generation == self.generation => {
                    self.round(flight, at_s);
                }
                Happening::Ended(flight, generation) if generation == self.generation => {
                    self.ended(flight, at_s);
                }
                Happening::Round(..) | Happening::Ended(..) => {}
                Happening::Break(index) => {
                    // Whoever waits for it waits until it is missed.
                    self.void();
                    self.halted = true;
                    self.push(at_s + self.variation.notice_s, Happening::Noticed(index));
                    let outage = self.variation.outages[index];
                    let back = outage.lasts_s.max(self.variation.notice_s);
                    self.push(at_s + back, Happening::Mend(index));
                }
                Happening::Noticed(index) => self.regroup(index, false, at_s),
                Happening::Mend(index) => self.regroup(index, true, at_s),
            }
        }
        if self.live.is_empty() {
            return Ok(());
        }
        Err(PlanError::Infeasible(format!(
            "{} requests are left over for which the scheduler plans nothing; give attention workers more KV blocks, or look at the scheduler",
            self.live.len()
        )))
    }

    /// Takes in what arrives at this time.
    fn arrive(&mut self, now_s: f64) {
        while let Some(request) = self.trace.requests().get(self.next_arrival) {
            if request.arrival_s > now_s {
                self.push(request.arrival_s, Happening::Arrive);
                break;
            }
            self.next_arrival += 1;
            let prompt = vec![0; request.input_tokens as usize];
            let request = Request::greedy(prompt, request.output_tokens);
            match self.ledger.submit(request, at(now_s)) {
                Ok(sequence) => {
                    let served = Served {
                        arrived_s: now_s,
                        first_s: None,
                        latest_s: now_s,
                        tokens: 0,
                    };
                    self.live.insert(sequence, served);
                }
                Err(error) if error.is_overload() => self.counts.refused += 1,
                Err(_) => self.counts.impossible += 1,
            }
        }
        self.settle(now_s);
    }

    /// Tells the scheduler everything and carries out what it wants.
    fn settle(&mut self, now_s: f64) {
        loop {
            self.carry_out(now_s);
            let Some(event) = self.ledger.next_event() else {
                break;
            };
            let mut plans = Vec::new();
            self.scheduler.handle(&event, at(now_s), &mut plans);
            self.ledger.plans(&plans, at(now_s));
        }
        for flight in 0..self.flights.len() {
            self.begin(flight, now_s);
        }
    }

    fn carry_out(&mut self, now_s: f64) {
        for output in self.ledger.outputs().collect::<Vec<_>>() {
            match output {
                Output::Worker(
                    worker,
                    AttentionCommand::Admit {
                        sequence,
                        request,
                        generated,
                        limit,
                    },
                ) => {
                    let length = (request.prompt.len() + generated.len()) as u32;
                    self.sequences.insert(
                        sequence,
                        Known {
                            worker,
                            length,
                            limit,
                            ended: false,
                        },
                    );
                }
                Output::Worker(_, AttentionCommand::Release(sequence)) => {
                    self.sequences.remove(&sequence);
                }
                Output::Worker(worker, AttentionCommand::Step(step)) => {
                    self.open(worker, step, now_s)
                }
                Output::Client(sequence, event) => self.client(sequence, &event, now_s),
            }
        }
    }

    /// One worker's part of a step; the parts of a step come one after the other.
    fn open(&mut self, worker: u16, step: AttentionStep, now_s: f64) {
        let steps = &mut self.flights[usize::from(step.micro_batch.0)].steps;
        match steps.back_mut() {
            Some(open) if open.step == step.step => open.work.push((worker, step.work)),
            _ => steps.push_back(OpenStep {
                step: step.step,
                epoch: step.epoch,
                opened_s: now_s,
                work: vec![(worker, step.work)],
            }),
        }
    }

    /// Begins a micro-batch's next step, if it can.
    fn begin(&mut self, index: usize, now_s: f64) {
        let flight = &mut self.flights[index];
        let (false, false, Some(step)) = (self.halted, flight.running, flight.steps.front()) else {
            return;
        };
        flight.parts.clear();
        for (worker, work) in &step.work {
            let live = work.iter().filter(|work| {
                self.sequences
                    .get(&work.sequence)
                    .is_some_and(|known| !known.ended)
            });
            let (mut rows, mut cached) = (0, 0u64);
            for work in live {
                rows += if self.variation.prefilled {
                    1
                } else {
                    work.tokens
                };
                cached += u64::from(work.start + work.tokens);
            }
            self.counts.rows += u64::from(rows);
            flight.parts.push(Part {
                worker: usize::from(*worker),
                rows: f64::from(rows),
                cached: cached as f64,
                ready_s: step.opened_s.max(flight.until_s[usize::from(*worker)]),
            });
        }
        (flight.running, flight.layer) = (true, 0);
        flight.began_s = first(&flight.parts);
        let at_s = flight.began_s.max(now_s);
        self.push(at_s, Happening::Round(index, self.generation));
    }

    fn round(&mut self, index: usize, now_s: f64) {
        let flight = &mut self.flights[index];
        let Some(step) = flight.steps.front() else {
            return;
        };
        let mut watch = Recording {
            lanes: &mut self.lanes,
            micro_batch: MicroBatch(index as u8),
            step: step.step,
            layer: Layer(flight.layer as u16),
            activity: Activity::Attention,
        };
        let (at_s, what) = if flight.layer < self.shape.layers {
            self.lockstep.round(&mut flight.parts, &mut watch);
            flight.layer += 1;
            (
                first(&flight.parts),
                Happening::Round(index, self.generation),
            )
        } else {
            // Behind the last layer, in a turn of its own: another micro-batch may come first.
            watch.activity = Activity::Sample;
            self.lockstep.head(&mut flight.parts, &mut watch);
            for part in &flight.parts {
                flight.until_s[part.worker] = part.ready_s;
            }
            let last_s = flight.parts.iter().map(|part| part.ready_s);
            (
                last_s.fold(0.0, f64::max),
                Happening::Ended(index, self.generation),
            )
        };
        self.push(at_s.max(now_s), what);
    }

    /// A step has come to its end: every worker reports.
    fn ended(&mut self, index: usize, now_s: f64) {
        let flight = &mut self.flights[index];
        flight.running = false;
        let Some(step) = flight.steps.pop_front() else {
            return;
        };
        self.counts.steps += 1;
        self.counts.ended_s = now_s;
        let timing = StepTiming {
            total: at(now_s - flight.began_s),
            ..StepTiming::default()
        };
        for ((worker, work), part) in step.work.iter().zip(&flight.parts) {
            let results = work
                .iter()
                .filter_map(|work| result(&mut self.sequences, work))
                .collect();
            let report = StepReport {
                worker: *worker,
                epoch: step.epoch,
                micro_batch: MicroBatch(index as u8),
                step: step.step,
                results,
                timing: StepTiming {
                    rows: part.rows as u32,
                    ..timing
                },
            };
            self.ledger.report(report, at(now_s));
        }
        self.settle(now_s);
    }

    fn client(&mut self, sequence: SequenceId, event: &RequestEvent, now_s: f64) {
        let Some(served) = self.live.get_mut(&sequence) else {
            return;
        };
        match event {
            RequestEvent::Token { .. } => {
                served.first_s.get_or_insert(now_s);
                served.latest_s = now_s;
                served.tokens += 1;
            }
            RequestEvent::Finished(_) => {
                let first_s = served.first_s.unwrap_or(now_s);
                self.lanes.ttft.add(first_s - served.arrived_s);
                self.lanes.latency.add(now_s - served.arrived_s);
                if served.tokens > 1 {
                    let each = (served.latest_s - first_s) / f64::from(served.tokens - 1);
                    self.lanes.tpot.add(each);
                }
                self.counts.completed += 1;
                self.live.remove(&sequence);
            }
            RequestEvent::Prompt(_) => {}
        }
    }

    /// Everything under way is void.
    fn void(&mut self) {
        self.generation += 1;
        for flight in &mut self.flights {
            flight.running = false;
        }
    }

    /// A new epoch, without a worker or with it again: what was not reported is given out again.
    fn regroup(&mut self, index: usize, back: bool, now_s: f64) {
        let Outage { worker, .. } = self.variation.outages[index];
        self.void();
        self.membership.epoch.0 += 1;
        let epoch = self.membership.epoch;
        match worker.role {
            Role::Attention => {
                let capacity = &mut self.membership.attention[usize::from(worker.index)];
                capacity.alive = back;
                capacity.since = epoch;
                self.sequences
                    .retain(|_, known| known.worker != worker.index);
            }
            Role::Expert => {
                self.gone.retain(|gone| *gone != worker.index);
                if !back {
                    self.gone.push(worker.index);
                }
                self.lockstep.routing = self.whole.without(&self.gone);
            }
        }
        let some = self.membership.attention.iter().any(|worker| worker.alive);
        let held =
            self.gone.is_empty() || (self.shape.replicas && self.gone.len() < self.whole.workers());
        self.halted = !(some && held);
        for flight in &mut self.flights {
            flight.steps.clear();
            flight.until_s.fill(now_s);
        }
        self.lockstep.free_from(now_s);
        self.ledger.regroup(self.membership.clone());
        for (index, worker) in (0..).zip(&self.membership.attention) {
            if worker.alive {
                self.ledger.moved(index, epoch);
            }
        }
        self.settle(now_s);
    }

    fn push(&mut self, at_s: f64, what: Happening) {
        self.serial += 1;
        let serial = self.serial;
        self.queue.push(Reverse(Due { at_s, serial, what }));
    }

    fn report(mut self) -> Report {
        let span_s = self.counts.ended_s.max(f64::MIN_POSITIVE);
        for recorder in self
            .lanes
            .attention
            .iter_mut()
            .chain(&mut self.lanes.experts)
        {
            recorder.flush();
        }
        let totals = self.ledger.totals;
        Report {
            requests: self.trace.requests().len() as u64,
            completed: self.counts.completed,
            refused: self.counts.refused,
            impossible: self.counts.impossible,
            preemptions: totals.preemptions,
            plan_refusals: totals.refusals,
            span_s,
            output_tokens: totals.generated_tokens,
            output_tokens_per_s: totals.generated_tokens as f64 / span_s,
            prompt_tokens: totals.prompt_tokens,
            ttft: self.lanes.ttft.quantiles(),
            tpot: self.lanes.tpot.quantiles(),
            latency: self.lanes.latency.quantiles(),
            attention: Side::of(self.lockstep.attention(), span_s),
            experts: Side::of(self.lockstep.experts(), span_s),
            bubbles: self.lockstep.totals.into(),
            steps: self.counts.steps,
            rows_per_step: self.counts.rows as f64 / self.counts.steps.max(1) as f64,
            expert_imbalance: self.whole.imbalance(),
            events: self.counts.events,
            epochs: self.membership.epoch.0,
        }
    }
}

impl ClusterShape {
    fn check(&self) -> Result<(), PlanError> {
        for (name, value) in [
            ("attention workers", u64::from(self.attention_workers)),
            ("micro-batches", self.micro_batches.into()),
            ("layers", self.layers as u64),
            ("KV blocks", self.kv_blocks.into()),
            ("tokens of a block", self.block_tokens.into()),
            ("rows of a step", self.max_rows.into()),
            ("the context", self.context.into()),
        ] {
            if value == 0 {
                return Err(PlanError::invalid(
                    "the cluster",
                    format!("{name}: 0"),
                    "give at least 1",
                ));
            }
        }
        let room = u64::from(self.kv_blocks) * u64::from(self.block_tokens);
        if room < u64::from(self.context) {
            return Err(PlanError::invalid(
                "the cluster",
                format!(
                    "an attention worker's KV cache holds {room} tokens, a sequence may have {}",
                    self.context
                ),
                "give it more KV blocks, or lower the context",
            ));
        }
        Ok(())
    }
}

/// What a worker reports of a sequence; nothing if it had ended.
fn result(sequences: &mut HashMap<SequenceId, Known>, work: &StepWork) -> Option<SequenceResult> {
    let known = sequences
        .get_mut(&work.sequence)
        .filter(|known| !known.ended)?;
    known.length += u32::from(work.sample);
    known.ended =
        known.length >= known.limit && (work.sample || work.start + work.tokens >= known.length);
    Some(SequenceResult {
        sequence: work.sequence,
        token: work.sample.then_some(0),
        logprob: None,
        prompt_logprobs: Vec::new(),
        prompt_start: work.start,
        finished: known.ended.then_some(FinishReason::Length),
    })
}

fn first(parts: &[Part]) -> f64 {
    parts
        .iter()
        .map(|part| part.ready_s)
        .fold(f64::INFINITY, f64::min)
}

fn at(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds.max(0.0))
}

/// Writes a round into the timeline.
struct Recording<'a> {
    lanes: &'a mut Lanes,
    micro_batch: MicroBatch,
    step: Step,
    layer: Layer,
    activity: Activity,
}

impl Recording<'_> {
    fn span(&self, activity: Activity, rows: f64, start_s: f64, end_s: f64) -> Span {
        Span {
            activity,
            micro_batch: self.micro_batch,
            step: self.step,
            layer: self.layer,
            rows: rows as u32,
            start: at(start_s),
            end: at(end_s),
        }
    }
}

impl Watch for Recording<'_> {
    fn attention(&mut self, worker: usize, rows: f64, start_s: f64, end_s: f64) {
        if self.lanes.keep {
            let span = self.span(self.activity, rows, start_s, end_s);
            self.lanes.attention[worker].record(span);
        }
    }

    fn experts(&mut self, worker: usize, rows: f64, start_s: f64, end_s: f64) {
        if self.lanes.keep {
            let span = self.span(Activity::Experts, rows, start_s, end_s);
            self.lanes.experts[worker].record(span);
        }
    }
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.serial == other.serial
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.at_s
            .total_cmp(&other.at_s)
            .then(self.serial.cmp(&other.serial))
    }
}
