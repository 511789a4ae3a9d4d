//! The step logic by itself, for counting instructions: no kernels, no threads, no clock.
//!
//! `integration/instructions` runs it under callgrind, which counts what happens inside the functions named `measured_...`, and holds the counts against those in
//! the tree. By hand: `cargo bench -p volley-actors --bench step_logic -- control` does the work once and prints how many units it was.

use std::collections::VecDeque;
use std::hint::black_box;
use std::time::Duration;

use volley_actors::protocol::{
    AttentionCapacity, AttentionCommand, AttentionStep, Membership, SequenceResult, StepReport,
    StepTiming,
};
use volley_actors::{
    FirstCome, Ledger, Limits, Output, PolicyScheduler, Request, Sampler, Sampling, Scheduler,
    Sequences,
};
use volley_transports::{
    Arrival, Element, Endpoint, Epoch, Event, ExchangeShape, Gather, InProcess, InProcessFabric,
    Layer, Merge, MicroBatch, Participants, Placement, Rows, RowsMut, Scatter, Step, StepKey,
    Times,
};

fn main() {
    for name in std::env::args().skip(1) {
        let units = match name.as_str() {
            "control" => control(),
            "exchange" => exchange(),
            "sampling" => sampling(),
            // `cargo bench` passes flags of its own.
            flag if flag.starts_with("--") => continue,
            other => panic!("{other:?} is none of control, exchange, sampling"),
        };
        println!("{name}: {units} units");
    }
}

const SEQUENCES: u32 = 64;
const WORKERS: u16 = 2;
const MICRO_BATCHES: u8 = 2;
const TOKENS: u32 = 96;

/// Frontend's books, scheduler and sequences: a unit is a step of a micro-batch, of 16 of 64 sequences.
fn control() -> u64 {
    let epoch = Epoch(1);
    let capacity = AttentionCapacity {
        alive: true,
        since: epoch,
        kv_blocks: 4096,
        block_tokens: 16,
        max_rows: 64,
    };
    let mut books = Books {
        ledger: Ledger::new(Limits {
            context: 1024,
            vocab: 1000,
            max_waiting: 1000,
        }),
        scheduler: PolicyScheduler::new(FirstCome::new(64, 16)),
        workers: (0..WORKERS).map(|_| Sequences::new(4096, 16)).collect(),
        steps: VecDeque::new(),
        now: Duration::ZERO,
    };
    books.ledger.regroup(Membership {
        epoch,
        micro_batches: MICRO_BATCHES,
        attention: vec![capacity; WORKERS.into()],
    });
    (0..WORKERS).for_each(|worker| books.ledger.moved(worker, epoch));
    for sequence in 0..SEQUENCES {
        let prompt = (0..16).map(|i| (sequence * 7 + i) % 1000).collect();
        let request = Request::greedy(prompt, TOKENS);
        books
            .ledger
            .submit(request, books.now)
            .expect("there is room");
    }
    books.settle();
    // Until all sequences decode.
    (0..64).for_each(|_| _ = books.step());
    measured_control(&mut books)
}

#[inline(never)]
fn measured_control(books: &mut Books) -> u64 {
    (0..200).map(|_| u64::from(books.step())).sum()
}

struct Books {
    ledger: Ledger,
    scheduler: PolicyScheduler<FirstCome>,
    workers: Vec<Sequences>,
    /// In the order in which they were given out.
    steps: VecDeque<(u16, AttentionStep)>,
    now: Duration,
}

impl Books {
    /// Takes the oldest step, reports it and lets the scheduler hear of it. False if there was none.
    fn step(&mut self) -> bool {
        let Some((worker, step)) = self.steps.pop_front() else {
            return false;
        };
        self.now += Duration::from_millis(1);
        let sequences = &mut self.workers[usize::from(worker)];
        let results = step.work.iter().map(|work| {
            sequences
                .prepare(work)
                .expect("the books promise that it can be done");
            let sequence = sequences.get_mut(work.sequence).expect("prepared");
            let token = work.sample.then_some(work.start % 1000);
            SequenceResult {
                sequence: work.sequence,
                token,
                logprob: None,
                prompt_logprobs: Vec::new(),
                prompt_start: work.start,
                finished: token.and_then(|token| sequence.push(token)),
            }
        });
        let report = StepReport {
            worker,
            epoch: step.epoch,
            micro_batch: step.micro_batch,
            step: step.step,
            results: results.collect(),
            timing: StepTiming::default(),
        };
        self.ledger.report(report, self.now);
        self.settle();
        true
    }

    fn settle(&mut self) {
        self.carry_out();
        while let Some(event) = self.ledger.next_event() {
            let mut plans = Vec::new();
            self.scheduler.handle(&event, self.now, &mut plans);
            self.ledger.plans(&plans, self.now);
            self.carry_out();
        }
    }

    fn carry_out(&mut self) {
        let outputs: Vec<Output> = self.ledger.outputs().collect();
        for output in outputs {
            match output {
                Output::Worker(worker, AttentionCommand::Step(step)) => {
                    self.steps.push_back((worker, step));
                }
                Output::Worker(
                    worker,
                    AttentionCommand::Admit {
                        sequence,
                        request,
                        generated,
                        limit,
                    },
                ) => {
                    self.workers[usize::from(worker)].admit(sequence, request, &generated, limit);
                }
                Output::Worker(worker, AttentionCommand::Release(sequence)) => {
                    self.workers[usize::from(worker)].release(sequence);
                }
                Output::Client(_, event) => _ = black_box(event),
            }
        }
    }
}

const ROWS: u16 = 32;
const HIDDEN: u16 = 64;

/// Scatter, merge and gather between an attention worker and two expert workers: a unit is a layer of 32 rows, each to the top 2 of 8 experts. Rows are narrow, so
/// that copying them is not what is counted.
fn exchange() -> u64 {
    let shape = ExchangeShape {
        attention_workers: 1,
        expert_workers: 2,
        max_rows: ROWS.into(),
        hidden: HIDDEN.into(),
        top_k: 2,
        element: Element::F32,
    };
    let mut ends = InProcessFabric::build(shape.topology(1).expect("a shape")).expect("a topology");
    let experts = ends.split_off(1);
    let batch = MicroBatch(0);
    let mut table = Table {
        placement: Placement::even(Epoch(0), 8, 2).expect("a placement"),
        scatter: Scatter::new(shape).expect("a shape"),
        gather: Gather::new(shape, batch).expect("a shape"),
        merges: [0, 1].map(|me| Merge::new(shape, me, batch, 4).expect("a shape")),
        attention: ends.remove(0),
        experts,
        x: vec![0.0; usize::from(ROWS) * 2 * usize::from(HIDDEN)],
        rows: vec![0.5; usize::from(ROWS) * usize::from(HIDDEN)],
        weights: vec![0.5; usize::from(ROWS) * 2],
        ids: (0..ROWS * 2)
            .map(|at| (at / 2 * 5 + at % 2 * 3) % 8)
            .collect(),
        out: vec![0.0; usize::from(ROWS) * usize::from(HIDDEN)],
    };
    (0..4).for_each(|step| table.layer(step));
    measured_exchange(&mut table)
}

#[inline(never)]
fn measured_exchange(table: &mut Table) -> u64 {
    (4..204).for_each(|step| table.layer(step));
    200
}

struct Table {
    placement: Placement,
    scatter: Scatter,
    gather: Gather,
    merges: [Merge; 2],
    attention: InProcess,
    experts: Vec<InProcess>,
    x: Vec<f32>,
    rows: Vec<f32>,
    weights: Vec<f32>,
    ids: Vec<u16>,
    out: Vec<f32>,
}

impl Table {
    fn layer(&mut self, step: u64) {
        let key = StepKey {
            epoch: Epoch(0),
            step: Step(step),
            layer: Layer(0),
            micro_batch: MicroBatch(0),
        };
        let written = self.scatter.write(
            &mut self.attention,
            &self.placement,
            key,
            &Participants::all(1),
            Rows::F32(&self.rows),
            &self.ids,
            &self.weights,
            &mut self.gather,
        );
        written.expect("a dispatch");
        for (end, merge) in self.experts.iter_mut().zip(&mut self.merges) {
            let Some(Event::Arrived { lane, .. }) = end.poll() else {
                panic!("no dispatch")
            };
            let arrived = merge.arrived(end, &self.placement, lane);
            assert_eq!(arrived, Ok(Arrival::Ready(key)));
            let groups = merge.groups(end, &mut RowsMut::F32(&mut self.x));
            let size = groups.expect("a batch").total() as usize * usize::from(HIDDEN);
            let responded = merge.respond(end, Rows::F32(&self.x[..size]), Times::default());
            responded.expect("answers");
        }
        while let Some(Event::Arrived { lane, .. }) = self.attention.poll() {
            let frame = self.attention.received(lane).expect("it came back");
            self.gather.add(lane.peer, frame).expect("outputs");
        }
        let combined = self.gather.combine(&self.attention, &mut self.out);
        combined.expect("all outputs");
    }
}

/// From logits to tokens: a unit is a token of a vocabulary of 4096, every second one drawn from a nucleus.
fn sampling() -> u64 {
    let mut sampler = Sampler::new(4096);
    let logits: Vec<f32> = (0..4096u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 20) as f32 / 512.0)
        .collect();
    measured_sampling(&mut sampler, &logits)
}

#[inline(never)]
fn measured_sampling(sampler: &mut Sampler, logits: &[f32]) -> u64 {
    let mut row = logits.to_vec();
    let drawn = Sampling {
        temperature: 0.8,
        top_p: 0.9,
        ..Sampling::greedy()
    };
    let greedy = Sampling::greedy();
    for i in 0..20 {
        row.copy_from_slice(logits);
        let sampling = if i % 2 == 0 { &greedy } else { &drawn };
        black_box(sampler.sample(&mut row, sampling, &[1, 2, 3], &[4; 5]));
    }
    20
}
