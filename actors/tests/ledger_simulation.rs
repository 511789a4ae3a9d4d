//! The ledger and a scheduler against simulated workers, in virtual time: thousands of random histories in which nothing may be lost.
//!
//! The workers here keep the very [`Sequences`] table of real ones and invent tokens from the history of a sequence, so a token that was computed from the
//! wrong place, twice or not at all changes what the client sees.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use proptest::prelude::*;
use volley_actors::protocol::{
    AttentionCapacity, AttentionCommand, AttentionStep, Membership, SchedulerEvent, SequenceId,
    SequenceResult, StepReport, StepTiming,
};
use volley_actors::{
    Batching, EarliestDeadline, FairShare, FinishReason, FirstCome, Ledger, Limits, Output, Pace,
    Policy, PolicyScheduler, Request, RequestEvent, Scheduler, Sequences, SloClass, SubmitError,
    TenantWeights,
};
use volley_transports::Epoch;

const VOCAB: u32 = 1000;
const CONTEXT: u32 = 64;

/// The token that follows a history: what a model is to its server.
fn next_token(history: &[u32]) -> u32 {
    let mix = |hash: u32, &token: &u32| (hash ^ token).wrapping_mul(0x0100_0193);
    history.iter().fold(0x811c_9dc5, mix) % VOCAB
}

/// What a client must see in the end.
fn expected(request: &Request) -> (Vec<u32>, FinishReason) {
    let mut history = request.prompt.clone();
    for _ in 0..request.max_tokens {
        let token = next_token(&history);
        history.push(token);
        if request.stop_tokens.contains(&token) {
            return (history.split_off(request.prompt.len()), FinishReason::Stop);
        }
    }
    (
        history.split_off(request.prompt.len()),
        FinishReason::Length,
    )
}

/// A millisecond, and 10 us for each unit of effort.
fn step_time(step: &AttentionStep) -> Duration {
    let efforts = step
        .work
        .iter()
        .map(|work| Pace::effort(work.start, work.tokens));
    Duration::from_micros(1000 + 10 * efforts.sum::<u64>())
}

struct Worker {
    epoch: Epoch,
    sequences: Sequences,
    /// Tokens whose keys and values are in the cache, as a check that nothing is skipped.
    cached: BTreeMap<SequenceId, u32>,
    /// Tokens computed since the start.
    computed: u64,
    steps: Vec<VecDeque<AttentionStep>>,
}

struct Simulation {
    ledger: Ledger,
    scheduler: Box<dyn Scheduler>,
    membership: Membership,
    workers: Vec<Worker>,
    clients: BTreeMap<SequenceId, Vec<RequestEvent>>,
    now: Duration,
}

impl Simulation {
    fn new(
        workers: usize,
        micro_batches: u8,
        kv_blocks: u32,
        max_rows: u32,
        policy: impl Policy + 'static,
    ) -> Self {
        let capacity = AttentionCapacity {
            alive: true,
            since: Epoch(1),
            kv_blocks,
            block_tokens: 4,
            max_rows,
        };
        let membership = Membership {
            epoch: Epoch(1),
            micro_batches,
            attention: vec![capacity; workers],
        };
        let worker = || Worker {
            epoch: membership.epoch,
            sequences: Sequences::new(kv_blocks, 4),
            cached: BTreeMap::new(),
            computed: 0,
            steps: vec![VecDeque::new(); micro_batches as usize],
        };
        let limits = Limits {
            context: CONTEXT,
            vocab: VOCAB as usize,
            max_waiting: 1000,
        };
        let mut simulation = Simulation {
            ledger: Ledger::new(limits),
            scheduler: Box::new(PolicyScheduler::new(policy)),
            membership: membership.clone(),
            workers: (0..workers).map(|_| worker()).collect(),
            clients: BTreeMap::new(),
            now: Duration::ZERO,
        };
        simulation.ledger.regroup(membership);
        (0..workers).for_each(|worker| simulation.ledger.moved(worker as u16, Epoch(1)));
        simulation.settle();
        simulation
    }

    /// Carries out all outputs, and consults the scheduler until it has heard everything.
    fn settle(&mut self) {
        while self.consult() {}
    }

    /// Carries out all outputs, and tells the scheduler one thing. Returns false if there was none.
    fn consult(&mut self) -> bool {
        self.carry_out();
        let Some(event) = self.ledger.next_event() else {
            return false;
        };
        if let SchedulerEvent::Refused(refused) = &event {
            panic!("the shipped scheduler made a plan that was refused: {refused:?}");
        }
        let mut plans = Vec::new();
        self.scheduler.handle(&event, self.now, &mut plans);
        self.ledger.plans(&plans, self.now);
        self.carry_out();
        true
    }

    fn carry_out(&mut self) {
        let outputs: Vec<Output> = self.ledger.outputs().collect();
        for output in outputs {
            match output {
                Output::Worker(index, command) => self.workers[index as usize].command(command),
                Output::Client(sequence, event) => {
                    self.clients.entry(sequence).or_default().push(event);
                }
            }
        }
    }

    /// Workers and micro-batches that have a step to take.
    fn busy(&self) -> Vec<(usize, usize)> {
        let lanes = |(index, worker): (usize, &Worker)| {
            let busy = worker
                .steps
                .iter()
                .enumerate()
                .filter(|(_, steps)| !steps.is_empty());
            busy.map(|(micro_batch, _)| (index, micro_batch))
                .collect::<Vec<_>>()
        };
        self.workers.iter().enumerate().flat_map(lanes).collect()
    }

    /// Lets a worker take a step. The scheduler may hear of it late.
    fn step(&mut self, worker: usize, micro_batch: usize, consults: usize) {
        self.now += Duration::from_millis(1);
        if let Some(report) = self.workers[worker].step(worker as u16, micro_batch) {
            self.ledger.report(report, self.now);
        }
        for _ in 0..consults {
            self.consult();
        }
    }

    /// A new epoch. Some workers are lost, and of these some come back empty; a worker that was gone may come back; the rest, and one at least, go on from
    /// where they are. Reports of the old epoch are still on their way, and the scheduler hears of all that when it likes.
    fn regroup(&mut self, choose: &mut dyn FnMut(usize) -> usize) {
        let mut late = Vec::new();
        for (w, mb) in self.busy() {
            if choose(2) == 0 {
                late.extend(self.workers[w].step(w as u16, mb));
            }
        }
        self.membership.epoch.0 += 1;
        let epoch = self.membership.epoch;
        let spared = choose(self.workers.len());
        for (index, capacity) in self.membership.attention.iter_mut().enumerate() {
            match choose(4) {
                _ if index == spared && capacity.alive => continue,
                0 if index != spared => capacity.alive = false,
                1 if capacity.alive => continue,
                _ => (capacity.alive, capacity.since) = (true, epoch),
            }
        }
        self.ledger.regroup(self.membership.clone());
        let consult = |this: &mut Self, times| {
            for _ in 0..times {
                this.consult();
            }
        };
        consult(self, choose(3));
        // What a worker reported before it moved arrives before its word that it has.
        for report in late {
            self.ledger.report(report, self.now);
            consult(self, choose(2));
        }
        for index in 0..self.workers.len() {
            if choose(8) == 0 {
                // Another epoch begins before all have moved into this one.
                return self.regroup(choose);
            }
            let worker = &mut self.workers[index];
            let capacity = self.membership.attention[index];
            let fresh = capacity.since > worker.epoch || !capacity.alive;
            worker.epoch = epoch;
            worker.steps.iter_mut().for_each(VecDeque::clear);
            // Forgets everything only now: what it is told before would be lost.
            if fresh {
                worker.sequences.clear();
                worker.cached.clear();
            }
            // A word of an epoch that is over means nothing.
            self.ledger.moved(index as u16, Epoch(epoch.0 - 1));
            if self.membership.attention[index].alive {
                self.ledger.moved(index as u16, epoch);
            }
            consult(self, choose(3));
        }
        assert_eq!(self.ledger.moving().count(), 0);
    }

    /// The scheduler dies and another one takes over as soon as no step is under way.
    fn replace_scheduler(
        &mut self,
        scheduler: Box<dyn Scheduler>,
        mut choose: impl FnMut(usize) -> usize,
    ) {
        loop {
            self.ledger.absorb();
            self.carry_out();
            if self.ledger.steps_in_flight() == 0 {
                break;
            }
            let busy = self.busy();
            let (worker, micro_batch) = busy[choose(busy.len())];
            self.step(worker, micro_batch, 0);
        }
        self.scheduler = scheduler;
        self.ledger.introduce();
        self.settle();
    }

    fn finish(&mut self, mut choose: impl FnMut(usize) -> usize) {
        for _ in 0..1_000_000 {
            let mut busy = self.busy();
            if busy.is_empty() {
                self.settle();
                busy = self.busy();
            }
            if busy.is_empty() {
                assert_eq!(
                    self.ledger.live(),
                    0,
                    "requests are left, but nobody has work"
                );
                assert!(
                    self.ledger.view().is_empty(),
                    "the books are not empty at the end"
                );
                return;
            }
            let (worker, micro_batch) = busy[choose(busy.len())];
            self.step(worker, micro_batch, choose(3));
        }
        panic!("no end in sight");
    }
}

impl Worker {
    fn command(&mut self, command: AttentionCommand) {
        match command {
            AttentionCommand::Admit {
                sequence,
                request,
                generated,
                limit,
            } => {
                self.sequences.admit(sequence, request, &generated, limit);
                self.cached.insert(sequence, 0);
            }
            AttentionCommand::Release(sequence) => {
                self.sequences.release(sequence);
                self.cached.remove(&sequence);
            }
            AttentionCommand::Step(step) if step.epoch != self.epoch => {}
            AttentionCommand::Step(step) => self.steps[step.micro_batch.0 as usize].push_back(step),
        }
    }

    fn step(&mut self, index: u16, micro_batch: usize) -> Option<StepReport> {
        let step = self.steps[micro_batch].pop_front()?;
        let mut results = Vec::new();
        let mut seen = BTreeSet::new();
        for work in &step.work {
            assert!(seen.insert(work.sequence), "a sequence twice in one step");
            if !self
                .sequences
                .prepare(work)
                .expect("the books promise that it can be done")
            {
                continue;
            }
            let cached = self.cached.get_mut(&work.sequence).expect("admitted");
            assert_eq!(
                *cached, work.start,
                "tokens are computed in order, each once"
            );
            *cached += work.tokens;
            self.computed += u64::from(work.tokens);
            let sequence = self.sequences.get_mut(work.sequence).expect("prepared");
            let mut result = SequenceResult {
                sequence: work.sequence,
                token: None,
                logprob: None,
                prompt_logprobs: Vec::new(),
                prompt_start: work.start,
                finished: None,
            };
            if work.sample {
                assert_eq!((work.start + work.tokens) as usize, sequence.tokens().len());
                let token = next_token(sequence.tokens());
                result.token = Some(token);
                result.finished = sequence.push(token);
            } else {
                result.finished = sequence.end_without_output((work.start + work.tokens) as usize);
            }
            results.push(result);
        }
        let timing = StepTiming {
            total: step_time(&step),
            ..StepTiming::default()
        };
        let (epoch, micro_batch, step) = (step.epoch, step.micro_batch, step.step);
        Some(StepReport {
            worker: index,
            epoch,
            micro_batch,
            step,
            results,
            timing,
        })
    }
}

fn tokens(events: &[RequestEvent]) -> Vec<u32> {
    let token = |event: &RequestEvent| match event {
        RequestEvent::Token { token, .. } => Some(*token),
        _ => None,
    };
    events.iter().filter_map(token).collect()
}

fn check_complete(events: &[RequestEvent], request: &Request) {
    let (want, reason) = expected(request);
    assert_eq!(tokens(events), want);
    assert_eq!(events.last(), Some(&RequestEvent::Finished(reason)));
    let ends = events
        .iter()
        .filter(|event| matches!(event, RequestEvent::Finished(_)));
    assert_eq!(ends.count(), 1);
}

/// Shipped policies.
const SHIPPED: usize = 4;

fn shipped(which: usize, prefill: u32, fill: u32) -> Box<dyn Scheduler> {
    fn boxed(policy: impl Policy + 'static) -> Box<dyn Scheduler> {
        Box::new(PolicyScheduler::new(policy))
    }
    let first_come = FirstCome::new(prefill, fill);
    match which {
        0 => boxed(first_come),
        1 => boxed(Batching::by(FairShare::default(), prefill, fill)),
        2 => {
            let class = |priority| SloClass {
                priority,
                target: Duration::from_millis(100 / (priority as u64 + 1)),
            };
            let classes = vec![class(1), class(2)];
            let order = EarliestDeadline::new(classes, Duration::from_millis(300));
            boxed(Batching::by(order, prefill, fill))
        }
        // A row takes two thirds of a millisecond: the target is often out of reach.
        _ => boxed(first_come.paced(Pace::new(Duration::from_millis(9)))),
    }
}

#[derive(Debug, Clone)]
enum Act {
    Submit {
        prompt: usize,
        max_tokens: u32,
        stop: bool,
    },
    Steps(usize),
    Cancel(usize),
    Regroup,
    ReplaceScheduler,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        6 => (1..50usize, 0..14u32, any::<bool>())
            .prop_map(|(prompt, max_tokens, stop)| Act::Submit { prompt, max_tokens, stop }),
        8 => (1..30usize).prop_map(Act::Steps),
        1 => any::<usize>().prop_map(Act::Cancel),
        2 => Just(Act::Regroup),
        1 => Just(Act::ReplaceScheduler),
    ];
    prop::collection::vec(act, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 5000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_request_gets_its_tokens_whatever_happens(
        acts in acts(),
        (workers, micro_batches) in (1..4usize, 1..4u8),
        // As few blocks as one full context, so that preemption is the rule.
        kv_blocks in 16..40u32,
        (max_rows, prefill, fill) in (1..40u32, 1..40u32, 1..8u32),
        which in 0..SHIPPED,
        mut random in any::<u64>(),
    ) {
        let mut choose = move |n: usize| {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (random >> 33) as usize % n
        };
        let make = || shipped(which, prefill.min(max_rows), fill);
        let mut simulation = Simulation::new(workers, micro_batches, kv_blocks, max_rows, FirstCome::new(1, 1));
        simulation.replace_scheduler(make(), &mut choose);
        let mut requests = Vec::new();
        let mut cancelled = BTreeSet::new();
        for act in acts {
            match act {
                Act::Submit { prompt, max_tokens, stop } => {
                    let prompt = (0..prompt as u32).map(|i| (i * 7 + requests.len() as u32) % VOCAB).collect();
                    let mut request = Request::greedy(prompt, max_tokens);
                    request.tenant = ["a", "b", "c"][choose(3)].into();
                    request.priority = choose(3) as i32;
                    if stop {
                        request.stop_tokens = (0..VOCAB).step_by(8).collect();
                    }
                    let sequence = simulation.ledger.submit(request.clone(), simulation.now).unwrap();
                    requests.push((sequence, request));
                    simulation.consult();
                }
                Act::Steps(count) => {
                    for _ in 0..count {
                        let busy = simulation.busy();
                        if busy.is_empty() {
                            break;
                        }
                        let (worker, micro_batch) = busy[choose(busy.len())];
                        simulation.step(worker, micro_batch, choose(3));
                    }
                }
                Act::Cancel(which) if !requests.is_empty() => {
                    let (sequence, _) = requests[which % requests.len()];
                    simulation.ledger.cancel(sequence);
                    cancelled.insert(sequence);
                }
                Act::Cancel(_) => {}
                Act::Regroup => simulation.regroup(&mut choose),
                Act::ReplaceScheduler => simulation.replace_scheduler(make(), &mut choose),
            }
        }
        simulation.finish(&mut choose);
        for (sequence, request) in &requests {
            let events = &simulation.clients[sequence];
            if cancelled.contains(sequence) && events.last() == Some(&RequestEvent::Finished(FinishReason::Cancelled)) {
                let (want, _) = expected(request);
                prop_assert!(want.starts_with(&tokens(events)));
            } else {
                check_complete(events, request);
            }
        }
        let sent: usize = simulation.clients.values().map(|events| tokens(events).len()).sum();
        prop_assert_eq!(simulation.ledger.totals.generated_tokens, sent as u64);
        prop_assert_eq!(simulation.ledger.totals.refusals, 0);
        for (worker, view) in simulation.workers.iter().zip(simulation.ledger.view().workers()) {
            prop_assert_eq!(view.free_blocks, if view.capacity.alive { kv_blocks } else { 0 });
            prop_assert_eq!(worker.sequences.free_blocks(), kv_blocks as usize);
        }
    }
}

#[test]
fn a_new_epoch_computes_nothing_again_that_is_on_a_worker_that_stays() {
    for lost in [None, Some(1)] {
        let mut simulation = Simulation::new(2, 2, 64, 32, FirstCome::new(32, 1));
        let requests: Vec<Request> = (0..6).map(|i| Request::greedy(vec![i; 20], 30)).collect();
        for request in &requests {
            simulation
                .ledger
                .submit(request.clone(), Duration::ZERO)
                .unwrap();
        }
        simulation.settle();
        for _ in 0..20 {
            let (worker, micro_batch) = simulation.busy()[0];
            simulation.step(worker, micro_batch, 9);
        }
        simulation.membership.epoch.0 += 1;
        let epoch = simulation.membership.epoch;
        if let Some(lost) = lost {
            simulation.membership.attention[lost].alive = false;
        }
        simulation.ledger.regroup(simulation.membership.clone());
        for worker in 0..2 {
            simulation.workers[worker].epoch = epoch;
            simulation.workers[worker]
                .steps
                .iter_mut()
                .for_each(VecDeque::clear);
            if lost != Some(worker) {
                simulation.ledger.moved(worker as u16, epoch);
            }
        }
        simulation.finish(|n| n - 1);
        let computed: u64 = simulation
            .workers
            .iter()
            .map(|worker| worker.computed)
            .sum();
        let once = 6 * (20 + 29);
        match lost {
            None => assert_eq!(computed, once),
            Some(_) => assert!(computed > once),
        }
    }
}

#[test]
fn preemption_happens_and_loses_nothing() {
    let mut simulation = Simulation::new(1, 2, 16, 32, FirstCome::new(32, 1));
    let requests: Vec<Request> = (0..6)
        .map(|i| Request::greedy(vec![i, i + 1, i + 2], 40))
        .collect();
    let ids: Vec<SequenceId> = requests
        .iter()
        .map(|r| simulation.ledger.submit(r.clone(), Duration::ZERO).unwrap())
        .collect();
    simulation.settle();
    simulation.finish(|n| n - 1);
    assert!(simulation.ledger.totals.preemptions > 0);
    for (sequence, request) in ids.iter().zip(&requests) {
        check_complete(&simulation.clients[sequence], request);
    }
}

#[test]
fn a_micro_batch_is_filled_before_another_is_opened() {
    // Rows of the steps under way on the only worker, by micro-batch.
    fn rows(simulation: &Simulation) -> [usize; 2] {
        let steps = &simulation.workers[0].steps;
        [0, 1].map(|mb: usize| steps[mb].front().map_or(0, |step| step.work.len()))
    }
    for (fill, opened) in [(1, [3, 3]), (3, [3, 3]), (4, [6, 0])] {
        let mut simulation = Simulation::new(1, 2, 64, 32, FirstCome::new(32, fill));
        let submit = |simulation: &mut Simulation, limit| {
            let request = Request::greedy(vec![1], limit);
            simulation.ledger.submit(request, Duration::ZERO).unwrap();
        };
        // Three that end soon, and three that go on alone.
        (0..6).for_each(|i| submit(&mut simulation, if i < 3 { 4 } else { 40 }));
        simulation.settle();
        let mut seen = Vec::new();
        while !simulation.busy().is_empty() {
            for (worker, micro_batch) in simulation.busy() {
                simulation.step(worker, micro_batch, 0);
                simulation.settle();
            }
            seen.push(rows(&simulation));
        }
        assert!(seen.contains(&opened), "{fill}: {seen:?}");
        // What is left is too little for two micro-batches: it gathers in one.
        let last = seen[seen.len() - 8];
        assert_eq!(last[0] + last[1], 3);
        assert_eq!(last[1] == 0, fill > 1, "{fill}: {seen:?}");
    }
}

#[test]
fn what_cannot_run_is_refused_with_the_numbers() {
    let mut simulation = Simulation::new(1, 1, 16, 32, FirstCome::new(32, 1));
    let mut submit = |request| simulation.ledger.submit(request, Duration::ZERO);
    assert_eq!(
        submit(Request::greedy(vec![], 1)),
        Err(SubmitError::EmptyPrompt)
    );
    let long = submit(Request::greedy(vec![1; 60], 5));
    assert_eq!(
        long,
        Err(SubmitError::TooLong {
            prompt: 60,
            max_tokens: 5,
            context: 64
        })
    );
    assert!(submit(Request::greedy(vec![1; 60], u32::MAX)).is_err());
    let unknown = submit(Request::greedy(vec![1, 1000], 5));
    assert_eq!(
        unknown,
        Err(SubmitError::UnknownToken {
            token: 1000,
            position: 1,
            vocab: 1000
        })
    );
    let mut request = Request::greedy(vec![1], 5);
    request.sampling.temperature = f32::NAN;
    assert!(matches!(submit(request), Err(SubmitError::Sampling(_))));
    simulation.ledger.drain();
    let drained = simulation
        .ledger
        .submit(Request::greedy(vec![1], 5), Duration::ZERO);
    assert_eq!(drained, Err(SubmitError::Draining));
}

#[test]
fn the_waiting_queue_is_bounded() {
    let limits = Limits {
        context: CONTEXT,
        vocab: VOCAB as usize,
        max_waiting: 3,
    };
    let mut ledger = Ledger::new(limits);
    for _ in 0..3 {
        ledger
            .submit(Request::greedy(vec![1], 5), Duration::ZERO)
            .unwrap();
    }
    let full = ledger.submit(Request::greedy(vec![1], 5), Duration::ZERO);
    assert_eq!(full, Err(SubmitError::QueueFull { waiting: 3 }));
    assert!(full.unwrap_err().is_overload());
}

/// How many tokens each tenant got while all had work waiting.
fn generated_by(
    simulation: &Simulation,
    requests: &[(SequenceId, Request)],
) -> BTreeMap<String, usize> {
    let mut by = BTreeMap::new();
    for (sequence, request) in requests {
        let events = simulation.clients.get(sequence);
        let tokens = events.map_or(0, |events| tokens(events).len());
        *by.entry(request.tenant.to_string()).or_default() += tokens;
    }
    by
}

/// One worker with room for three or four sequences, and many that want in.
fn crowd(
    policy: impl Policy + 'static,
    tenants: &[(&str, usize)],
    steps: usize,
) -> BTreeMap<String, usize> {
    let mut simulation = Simulation::new(1, 1, 16, 32, policy);
    let mut requests = Vec::new();
    for &(tenant, count) in tenants {
        for i in 0..count {
            let mut request = Request::greedy(vec![i as u32 % VOCAB; 4], 12);
            request.tenant = tenant.into();
            let sequence = simulation
                .ledger
                .submit(request.clone(), Duration::ZERO)
                .unwrap();
            requests.push((sequence, request));
        }
    }
    simulation.settle();
    for _ in 0..steps {
        simulation.step(0, 0, 9);
    }
    generated_by(&simulation, &requests)
}

#[test]
fn tenants_share_by_weight_and_a_flood_takes_nothing_from_others() {
    let tenants = [("flood", 300), ("small", 100)];
    let first = crowd(FirstCome::new(32, 1), &tenants, 300);
    assert_eq!(
        first["small"], 0,
        "whoever came first has it all: {first:?}"
    );
    let equal = crowd(Batching::by(FairShare::default(), 32, 1), &tenants, 300);
    let share =
        |by: &BTreeMap<String, usize>| by["small"] as f64 / (by["small"] + by["flood"]) as f64;
    assert!((0.45..0.55).contains(&share(&equal)), "{equal:?}");
    let weights = TenantWeights::new([("flood".to_owned(), 3.0)].into(), 1.0).unwrap();
    let weighted = crowd(Batching::by(FairShare::new(weights), 32, 1), &tenants, 300);
    assert!((0.2..0.3).contains(&share(&weighted)), "{weighted:?}");
}

#[test]
fn the_earliest_deadline_starts_next() {
    let class = SloClass {
        priority: 5,
        target: Duration::from_millis(50),
    };
    let order = EarliestDeadline::new(vec![class], Duration::from_secs(1));
    let mut simulation = Simulation::new(1, 1, 16, 32, Batching::by(order, 32, 1));
    let submit = |simulation: &mut Simulation, priority, at| {
        let mut request = Request::greedy(vec![1; 4], 12);
        request.priority = priority;
        simulation
            .ledger
            .submit(request, Duration::from_millis(at))
            .unwrap()
    };
    let patient: Vec<SequenceId> = (0..40).map(|_| submit(&mut simulation, 0, 0)).collect();
    simulation.settle();
    simulation.step(0, 0, 9);
    // One that came when it could not be met any more would stand behind those that wait since long ago.
    let urgent = submit(&mut simulation, 5, 2);
    let hopeless = submit(&mut simulation, 5, 999);
    while !simulation.clients.contains_key(&hopeless) {
        simulation.step(0, 0, 9);
    }
    let order: Vec<SequenceId> = simulation.clients.keys().copied().collect();
    assert!(order.contains(&urgent));
    let started = patient.iter().filter(|id| order.contains(id)).count();
    assert_eq!(started, 40, "the deadline of the hopeless one is the last");
}

#[test]
fn a_pace_keeps_steps_within_their_time_and_a_hopeless_one_stops_nobody() {
    let longest = |target: Option<u64>| {
        let policy = FirstCome::new(64, 1);
        let policy = match target {
            Some(target) => policy.paced(Pace::new(Duration::from_millis(target))),
            None => policy,
        };
        let mut simulation = Simulation::new(1, 1, 400, 64, policy);
        let ids: Vec<SequenceId> = (0..40)
            .map(|i| {
                let request = Request::greedy(vec![i; 8], 40);
                simulation.ledger.submit(request, Duration::ZERO).unwrap()
            })
            .collect();
        simulation.settle();
        let (mut steps, mut longest) = (0, Duration::ZERO);
        while let Some(step) = simulation.workers[0].steps[0].front() {
            let time = step_time(step);
            steps += 1;
            // The first steps teach it.
            if steps > 20 {
                longest = longest.max(time);
            }
            simulation.step(0, 0, 9);
        }
        let request = |i: usize| Request::greedy(vec![i as u32; 8], 40);
        for (i, id) in ids.iter().enumerate() {
            check_complete(&simulation.clients[id], &request(i));
        }
        longest
    };
    // Contexts grow by half after their sequences were taken in.
    let (paced, free) = (longest(Some(9)), longest(None));
    assert!(paced < Duration::from_millis(14), "{paced:?}");
    assert!(free > 2 * paced, "{free:?} {paced:?}");
    longest(Some(0));
}
