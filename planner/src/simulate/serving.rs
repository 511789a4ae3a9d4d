//! A cluster that serves a trace in virtual time: the real [`Ledger`] and [`Scheduler`] over a data plane by rounds.
//!
//! What the frontend would send to attention workers is taken from the ledger and carried out in [`lockstep`](super::lockstep); what workers would report goes back to
//! it. So admission, batching, KV blocks, preemption and the restart of what a lost worker had are those of production, and a scheduler of a
//! user's own can be tried before anything is rented. The scheduler's own time is not counted: in production it plans while the step before runs.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use rand::SeedableRng;
use rand_pcg::Pcg64;
use volley_actors::protocol::{
    AttentionCapacity, AttentionCommand, AttentionStep, Membership, SequenceId, SequenceResult,
    StepReport, StepTiming, StepWork,
};
use volley_actors::{Activity, FinishReason, Ledger, Limits, Output, Request, Scheduler, Timeline};
use volley_transports::{Epoch, Layer, MicroBatch, Role, Step};

use super::clients::Clients;
use super::lanes::{Lanes, Recording};
use super::lockstep::{Lockstep, Part};
use super::queue::{Happening, Queue};
use super::report::{Report, Side};
use super::shape::{ClusterShape, Outage, Variation};
use super::{Routing, StageTimes, Trace};
use crate::PlanError;

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
    clients: Clients,
    flights: Vec<Flight>,
    sequences: HashMap<SequenceId, Known>,
    membership: Membership,
    /// Expert workers that are gone.
    gone: Vec<u16>,
    queue: Queue,
    /// Grows when everything under way is void.
    generation: u64,
    halted: bool,
    next_arrival: usize,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
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
            outage.check(shape.attention_workers.into(), experts)?;
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
        let mut serving = Serving {
            lanes: Lanes::new(timeline, shape.attention_workers.into(), experts),
            clients: Clients::new(),
            flights: (0..shape.micro_batches).map(|_| flight()).collect(),
            whole: routing,
            ledger: Ledger::new(limits),
            scheduler,
            lockstep,
            sequences: HashMap::new(),
            membership,
            gone: Vec::new(),
            queue: Queue::default(),
            generation: 0,
            halted: false,
            next_arrival: 0,
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
        serving
            .queue
            .push(trace.requests()[0].arrival_s, Happening::Arrive);
        for (index, outage) in variation.outages.iter().enumerate() {
            serving.queue.push(outage.at_s, Happening::Break(index));
        }
        Ok(serving)
    }

    fn run(&mut self) -> Result<(), PlanError> {
        while let Some((at_s, what)) = self.queue.pop() {
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
                    self.queue
                        .push(at_s + self.variation.notice_s, Happening::Noticed(index));
                    let outage = self.variation.outages[index];
                    let back = outage.lasts_s.max(self.variation.notice_s);
                    self.queue.push(at_s + back, Happening::Mend(index));
                }
                Happening::Noticed(index) => self.regroup(index, false, at_s),
                Happening::Mend(index) => self.regroup(index, true, at_s),
            }
        }
        if self.clients.waiting() == 0 {
            return Ok(());
        }
        Err(PlanError::Infeasible(format!(
            "{} requests are left over for which the scheduler plans nothing; give attention workers more KV blocks, or look at the scheduler",
            self.clients.waiting()
        )))
    }

    /// Takes in what arrives at this time.
    fn arrive(&mut self, now_s: f64) {
        while let Some(request) = self.trace.requests().get(self.next_arrival) {
            if request.arrival_s > now_s {
                self.queue.push(request.arrival_s, Happening::Arrive);
                break;
            }
            self.next_arrival += 1;
            let prompt = vec![0; request.input_tokens as usize];
            let request = Request::greedy(prompt, request.output_tokens);
            match self.ledger.submit(request, at(now_s)) {
                Ok(sequence) => self.clients.ask(sequence, now_s),
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
                Output::Client(sequence, event) => self.clients.hear(sequence, &event, now_s),
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
        self.queue
            .push(at_s, Happening::Round(index, self.generation));
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
        self.queue.push(at_s.max(now_s), what);
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

    fn report(mut self) -> Report {
        let span_s = self.counts.ended_s.max(f64::MIN_POSITIVE);
        self.lanes.flush();
        let totals = self.ledger.totals;
        Report {
            requests: self.trace.requests().len() as u64,
            completed: self.clients.completed,
            refused: self.counts.refused,
            impossible: self.counts.impossible,
            preemptions: totals.preemptions,
            plan_refusals: totals.refusals,
            span_s,
            output_tokens: totals.generated_tokens,
            output_tokens_per_s: totals.generated_tokens as f64 / span_s,
            prompt_tokens: totals.prompt_tokens,
            ttft: self.clients.ttft.quantiles(),
            tpot: self.clients.tpot.quantiles(),
            latency: self.clients.latency.quantiles(),
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
