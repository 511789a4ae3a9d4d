//! The frontend's logic: owns every request from its arrival to its last token. Pure: events in, [`Output`]s out.
//!
//! What happens is queued for the scheduler; [`Ledger::next_event`] takes one event from the queue and enters it in the books at that moment, and
//! [`Ledger::plans`] takes the answer. So the books against which plans are checked are always those the scheduler planned from, however late it answers.
//!
//! A request lives here and nowhere else. Schedulers know lengths, attention workers hold what they need to compute, and either can be lost: the ledger has
//! the prompt and every token that was sent, which is all it takes to go on elsewhere.
//!
//! # A new epoch
//! Workers that go on keep their sequences. Each drops the steps it has not ended and says so ([`AttentionWord::Moved`]); since its words come in order, the
//! ledger then knows which parts of which steps are not done, and when all have spoken it gives just these out again, under the same step and with the
//! participants that are left. A step computed twice gives the same tokens, so nobody can tell. What was on a worker that is gone waits for another place.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use volley_transports::{Epoch, MicroBatch, Participants, Step};

use crate::protocol::{
    AttentionCommand, AttentionStep, Held, Membership, Now, Outcome, SchedulerEvent, SequenceId,
    SequenceResult, StepDone, StepPlan, StepReport, StepTiming, StepWork, Submit,
};
use crate::request::{FinishReason, Request, RequestEvent, SubmitError};
use crate::scheduler::View;

/// What the frontend admits.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Longest sequence, prompt and output together.
    pub context: u32,
    /// Entries of the vocabulary.
    pub vocab: usize,
    /// Requests that may wait for a place on a worker.
    pub max_waiting: usize,
}

/// What the frontend wants done.
#[derive(Debug)]
pub enum Output {
    /// Tell an attention worker.
    Worker(u16, AttentionCommand),
    /// Tell a client.
    Client(SequenceId, RequestEvent),
}

/// See the module.
#[derive(Debug)]
pub struct Ledger {
    limits: Limits,
    membership: Membership,
    view: View,
    records: BTreeMap<SequenceId, Record>,
    steps: BTreeMap<Step, OpenStep>,
    next_sequence: u64,
    next_step: u64,
    /// Attention workers that have not said that they are in the new epoch. Until they have, no step is given out.
    moving: BTreeSet<u16>,
    /// What these are to be told when they have.
    held: Vec<(u16, AttentionCommand)>,
    draining: bool,
    /// What the scheduler has not been told yet.
    pending: VecDeque<SchedulerEvent>,
    outputs: Vec<Output>,
    /// Sums since the start.
    pub totals: Totals,
}

/// Counts since the start; `/progressz` and the metrics are made of these.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Totals {
    /// Steps that came to their end.
    pub steps: u64,
    /// Prompt tokens computed, recomputation after preemption included.
    pub prompt_tokens: u64,
    /// Tokens sent to clients.
    pub generated_tokens: u64,
    /// Sequences taken off a worker to free its KV blocks.
    pub preemptions: u64,
    /// Parts of plans that were refused.
    pub refusals: u64,
}

/// A request that has not ended.
#[derive(Debug)]
struct Record {
    request: Arc<Request>,
    generated: Vec<u32>,
    limit: u32,
    arrived: Now,
    /// Its client has been told the end; the record stays until the books know it too.
    closed: bool,
    /// Prompt log-probabilities sent so far; a recomputed prompt must not send them twice.
    prompt_logprobs: usize,
}

/// A step under way.
#[derive(Debug)]
struct OpenStep {
    micro_batch: MicroBatch,
    opened: Now,
    /// Workers that have not reported, and what they were to do.
    missing: BTreeMap<u16, Vec<StepWork>>,
    /// In the order of the plan.
    outcomes: Vec<Outcome>,
    /// Where each sequence stands in `outcomes`, by sequence.
    places: Vec<(SequenceId, u32)>,
    timing: StepTiming,
}

/// A step that has been under way for long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OverdueStep {
    /// The micro-batch.
    pub micro_batch: MicroBatch,
    /// The step.
    pub step: Step,
    /// Attention workers that have not reported.
    pub missing: Vec<u16>,
    /// For how long it has been under way.
    pub age: Duration,
}

impl Ledger {
    /// A ledger of a cluster that has no workers yet: requests wait until [`Ledger::regroup`] brings some.
    pub fn new(limits: Limits) -> Self {
        let membership = Membership {
            epoch: Epoch(0),
            micro_batches: 0,
            attention: Vec::new(),
        };
        Ledger {
            limits,
            membership,
            view: View::default(),
            records: BTreeMap::new(),
            steps: BTreeMap::new(),
            next_sequence: 0,
            next_step: 0,
            moving: BTreeSet::new(),
            held: Vec::new(),
            draining: false,
            pending: VecDeque::new(),
            outputs: Vec::new(),
            totals: Totals::default(),
        }
    }

    /// What is to be done since the last call, in order.
    pub fn outputs(&mut self) -> std::vec::Drain<'_, Output> {
        self.outputs.drain(..)
    }

    /// The books.
    pub fn view(&self) -> &View {
        &self.view
    }

    /// Version of membership and placement.
    pub fn epoch(&self) -> Epoch {
        self.membership.epoch
    }

    /// Takes a request in.
    ///
    /// # Errors
    /// When the request can never run, or not now; see [`SubmitError::is_overload`].
    pub fn submit(&mut self, request: Request, now: Now) -> Result<SequenceId, SubmitError> {
        if self.draining {
            return Err(SubmitError::Draining);
        }
        let limit = self.limits.check(&request)?;
        let waiting = self.waiting();
        if waiting >= self.limits.max_waiting {
            return Err(SubmitError::QueueFull { waiting });
        }
        let sequence = SequenceId(self.next_sequence);
        self.next_sequence += 1;
        let record = Record {
            request: Arc::new(request),
            generated: Vec::new(),
            limit,
            arrived: now,
            closed: false,
            prompt_logprobs: 0,
        };
        let submit = record.submit(sequence, None);
        self.records.insert(sequence, record);
        self.pending.push_back(SchedulerEvent::Submit(submit));
        Ok(sequence)
    }

    /// Ends a request whose client does not want it any more. Unknown and ended ones are ignored.
    pub fn cancel(&mut self, sequence: SequenceId) {
        self.close(sequence, FinishReason::Cancelled);
    }

    /// Ends a request whose client has all it wants, as a stop token would. Unknown and ended ones are ignored.
    pub fn complete(&mut self, sequence: SequenceId) {
        self.close(sequence, FinishReason::Stop);
    }

    /// Ends every request with an error: the cluster cannot go on.
    pub fn fail_all(&mut self, reason: &str) {
        for sequence in self.records.keys().copied().collect::<Vec<_>>() {
            self.close(sequence, FinishReason::Error(reason.to_owned()));
        }
    }

    /// The next event that the scheduler is to be told; it is in the books from now on. Give the answer to [`Ledger::plans`] before the next call.
    pub fn next_event(&mut self) -> Option<SchedulerEvent> {
        let event = self.pending.pop_front()?;
        self.enter(&event);
        Some(event)
    }

    /// Carries out what the scheduler wants, as far as it is possible.
    pub fn plans(&mut self, plans: &[StepPlan], now: Now) {
        let mut refused = Vec::new();
        for plan in plans {
            let accepted = self.view.plan(plan);
            refused.extend(accepted.refused);
            self.totals.preemptions += accepted.preempted.len() as u64;
            self.release(accepted.preempted);
            if accepted.work.is_empty() {
                continue;
            }
            let step = Step(self.next_step);
            self.next_step += 1;

            let mut work: BTreeMap<u16, Vec<StepWork>> = BTreeMap::new();
            let mut outcomes = Vec::with_capacity(accepted.work.len());
            for part in &accepted.work {
                let sequence = part.work.sequence;
                if part.admits
                    && let Some(record) = self.records.get(&sequence)
                {
                    let admit = AttentionCommand::Admit {
                        sequence,
                        request: Arc::clone(&record.request),
                        generated: record.generated.clone(),
                        limit: record.limit,
                    };
                    self.command(part.work.worker, admit);
                }
                outcomes.push(Outcome {
                    sequence,
                    sampled: false,
                    finished: None,
                });
                work.entry(part.work.worker).or_default().push(StepWork {
                    sequence,
                    start: part.start,
                    tokens: part.work.tokens,
                    sample: part.samples,
                });
            }
            let mut open = OpenStep {
                micro_batch: plan.micro_batch,
                opened: now,
                missing: work,
                outcomes,
                places: Vec::new(),
                timing: StepTiming::default(),
            };
            open.find_places();
            self.steps.insert(step, open);
            if self.moving.is_empty() {
                self.issue(step);
            }
        }
        if !refused.is_empty() {
            self.totals.refusals += refused.len() as u64;
            self.pending.push_back(SchedulerEvent::Refused(refused));
        }
    }

    /// Enters an attention worker's report. Returns the steps that ended with it, each with its age.
    ///
    /// A report of an older epoch counts, since it comes before its worker's word that it has moved; but not if an earlier incarnation of the worker made it.
    pub fn report(&mut self, report: StepReport, now: Now) -> Vec<(StepDone, Duration)> {
        let worker = self.membership.attention.get(usize::from(report.worker));
        if !worker.is_some_and(|worker| worker.alive && report.epoch >= worker.since) {
            return Vec::new();
        }
        let Some(open) = self.steps.get_mut(&report.step) else {
            return Vec::new();
        };
        if open.missing.remove(&report.worker).is_none() {
            return Vec::new();
        }
        let rows = open.timing.rows + report.timing.rows;
        if report.timing.total > open.timing.total {
            open.timing = report.timing;
        }
        open.timing.rows = rows;
        for result in report.results {
            if let Some(outcome) = open.outcome(result.sequence) {
                outcome.sampled = result.token.is_some();
                outcome.finished = result.finished.clone();
            }
            Self::deliver(
                &mut self.records,
                &mut self.outputs,
                &mut self.totals,
                result,
            );
        }
        let micro_batch = open.micro_batch;
        self.end_steps(micro_batch, now)
    }

    /// Goes on under a new membership: see the module. Call [`Ledger::moved`] when a worker says that it is there.
    pub fn regroup(&mut self, membership: Membership) {
        let since = |membership: &Membership, worker: u16| {
            let worker = membership.attention.get(usize::from(worker))?;
            worker.alive.then_some(worker.since)
        };
        self.held.retain(|&(worker, _)| {
            let now = since(&membership, worker);
            now.is_some() && now == since(&self.membership, worker)
        });
        let workers = membership.attention.iter().zip(0..);
        self.moving = workers
            .filter_map(|(worker, index)| worker.alive.then_some(index))
            .collect();
        self.membership = membership.clone();
        self.pending
            .push_back(SchedulerEvent::MembershipChanged(membership));
    }

    /// An attention worker is in a new epoch: it has dropped what it has not reported.
    pub fn moved(&mut self, worker: u16, epoch: Epoch) {
        if epoch != self.membership.epoch || !self.moving.remove(&worker) {
            return;
        }
        let held = std::mem::take(&mut self.held).into_iter();
        let (told, held): (Vec<_>, Vec<_>) = held.partition(|&(of, _)| of == worker);
        self.held = held;
        let told = told.into_iter();
        self.outputs
            .extend(told.map(|(of, command)| Output::Worker(of, command)));
        if self.moving.is_empty() {
            for step in self.steps.keys().copied().collect::<Vec<_>>() {
                self.issue(step);
            }
        }
    }

    /// Attention workers that are on their way into the current epoch.
    pub fn moving(&self) -> impl Iterator<Item = u16> + '_ {
        self.moving.iter().copied()
    }

    /// Enters all events in the books without telling anybody: while there is no scheduler. Steps that wait for a worker that is gone end by this.
    pub fn absorb(&mut self) {
        while let Some(event) = self.pending.pop_front() {
            self.enter(&event);
        }
    }

    /// Prepares for a scheduler that was started anew: it will be told all there is to know. Call it when no step is under way.
    pub fn introduce(&mut self) {
        debug_assert!(self.steps.is_empty());
        self.absorb();
        let before = std::mem::take(&mut self.view);
        let open = self.records.iter().filter(|(_, record)| !record.closed);
        let submits = open.map(|(&sequence, record)| {
            let held = before.sequence(sequence).and_then(|view| {
                Some(Held {
                    worker: view.worker?,
                    computed: view.computed,
                })
            });
            record.submit(sequence, held)
        });
        self.pending.push_back(SchedulerEvent::Introduced(
            self.membership.clone(),
            submits.collect(),
        ));
    }

    /// Takes no new requests from now on.
    pub fn drain(&mut self) {
        self.draining = true;
    }

    /// Whether new requests are refused.
    pub fn is_draining(&self) -> bool {
        self.draining
    }

    /// Requests that have not ended.
    pub fn live(&self) -> usize {
        self.records
            .values()
            .filter(|record| !record.closed)
            .count()
    }

    /// Requests without a place on a worker, those included that the scheduler has not been told of.
    pub fn waiting(&self) -> usize {
        let untold = |event: &&SchedulerEvent| {
            // After a regrouping all are told again; those the books have are counted there.
            matches!(event, SchedulerEvent::Submit(submit) if self.view.sequence(submit.sequence).is_none())
        };
        self.view.waiting().len() + self.pending.iter().filter(untold).count()
    }

    /// Steps under way.
    pub fn steps_in_flight(&self) -> usize {
        self.steps.len()
    }

    /// Steps that have been under way for longer than `limit`, and who has not reported.
    pub fn overdue(&self, now: Now, limit: Duration) -> Vec<OverdueStep> {
        let age = |open: &OpenStep| now.saturating_sub(open.opened);
        self.steps
            .iter()
            .filter(|(_, open)| age(open) > limit)
            .map(|(&step, open)| OverdueStep {
                micro_batch: open.micro_batch,
                step,
                missing: open.missing.keys().copied().collect(),
                age: age(open),
            })
            .collect()
    }

    /// Whether what the books say of a worker is true of the incarnation that is there now. Nothing is sent to others.
    fn is_current(&self, worker: u16) -> bool {
        let index = usize::from(worker);
        let (Some(books), Some(there)) = (
            self.view.workers().get(index),
            self.membership.attention.get(index),
        ) else {
            return false;
        };
        there.alive && books.capacity.since == there.since
    }

    fn command(&mut self, worker: u16, command: AttentionCommand) {
        if !self.is_current(worker) {
            return;
        }
        if self.moving.contains(&worker) {
            self.held.push((worker, command));
        } else {
            self.outputs.push(Output::Worker(worker, command));
        }
    }

    /// Gives out what is not done of a step.
    fn issue(&mut self, step: Step) {
        let Some(open) = self.steps.get(&step) else {
            return;
        };
        let mut participants = Participants::none(self.membership.attention.len() as u16);
        let workers = open.missing.keys().copied();
        workers
            .filter(|&worker| self.is_current(worker))
            .for_each(|worker| participants.insert(worker));
        let participants = Arc::new(participants);
        let parts = open
            .missing
            .iter()
            .filter(|&(&worker, _)| participants.contains(worker));
        let commands = parts.map(|(&worker, work)| {
            let step = AttentionStep {
                epoch: self.membership.epoch,
                micro_batch: open.micro_batch,
                step,
                participants: Arc::clone(&participants),
                work: work.clone(),
            };
            Output::Worker(worker, AttentionCommand::Step(step))
        });
        self.outputs.extend(commands);
    }

    /// Ends what is done of a micro-batch's steps. They end in order, also if a later one's few participants are quicker.
    fn end_steps(&mut self, micro_batch: MicroBatch, now: Now) -> Vec<(StepDone, Duration)> {
        let mut ended = Vec::new();
        while let Some(step) = self.oldest_open(micro_batch)
            && self.steps[&step].missing.is_empty()
            && let Some(open) = self.steps.remove(&step)
        {
            ended.push(self.end_step(step, open, now));
        }
        ended
    }

    fn oldest_open(&self, micro_batch: MicroBatch) -> Option<Step> {
        let mut steps = self.steps.iter();
        steps
            .find(|(_, open)| open.micro_batch == micro_batch)
            .map(|(&step, _)| step)
    }

    fn end_step(&mut self, step: Step, open: OpenStep, now: Now) -> (StepDone, Duration) {
        self.totals.steps += 1;
        let done = StepDone {
            micro_batch: open.micro_batch,
            step,
            outcomes: open.outcomes,
            timing: open.timing,
        };
        self.pending
            .push_back(SchedulerEvent::StepDone(done.clone()));
        (done, now.saturating_sub(open.opened))
    }

    /// Enters an event in the books.
    fn enter(&mut self, event: &SchedulerEvent) {
        match event {
            SchedulerEvent::Submit(submit) => self.view.submit(submit),
            SchedulerEvent::Cancel(sequence) => {
                self.records.remove(sequence);
                let left = self.view.end(*sequence);
                self.release(left);
            }
            SchedulerEvent::StepDone(done) => {
                for (work, start) in self.view.oldest_step(done.micro_batch) {
                    let prompt = self
                        .records
                        .get(&work.sequence)
                        .map_or(0, |r| r.request.prompt.len() as u32);
                    self.totals.prompt_tokens +=
                        u64::from(prompt.saturating_sub(start).min(work.tokens));
                }
                for outcome in &done.outcomes {
                    if outcome.finished.is_some() {
                        self.records.remove(&outcome.sequence);
                    }
                }
                let left = self.view.step_done(done);
                self.release(left);
            }
            SchedulerEvent::MembershipChanged(membership) => {
                let evicted = self.view.membership(membership);
                self.evict(&evicted);
            }
            SchedulerEvent::Introduced(membership, submits) => {
                self.view.introduce(membership, submits);
            }
            SchedulerEvent::Refused(_) => {}
        }
    }

    /// Takes sequences whose worker is gone out of the steps under way, and submits them again.
    fn evict(&mut self, evicted: &BTreeSet<SequenceId>) {
        for open in self.steps.values_mut() {
            open.missing.retain(|_, work| {
                work.retain(|work| !evicted.contains(&work.sequence));
                !work.is_empty()
            });
            open.outcomes
                .retain(|outcome| !evicted.contains(&outcome.sequence));
            open.find_places();
        }
        // Right behind the event that evicted them, before whatever else has happened since.
        for &sequence in evicted.iter().rev() {
            if let Some(record) = self.records.get(&sequence) {
                self.pending.push_front(if record.closed {
                    SchedulerEvent::Cancel(sequence)
                } else {
                    SchedulerEvent::Submit(record.submit(sequence, None))
                });
            }
        }
        for index in 0..self.membership.micro_batches {
            let now = self.steps.values().map(|open| open.opened).max();
            self.end_steps(MicroBatch(index), now.unwrap_or_default());
        }
    }

    fn release(&mut self, left: impl IntoIterator<Item = (SequenceId, u16)>) {
        for (sequence, worker) in left {
            self.command(worker, AttentionCommand::Release(sequence));
        }
    }

    fn close(&mut self, sequence: SequenceId, reason: FinishReason) {
        let Some(record) = self
            .records
            .get_mut(&sequence)
            .filter(|record| !record.closed)
        else {
            return;
        };
        record.closed = true;
        self.outputs
            .push(Output::Client(sequence, RequestEvent::Finished(reason)));
        self.pending.push_back(SchedulerEvent::Cancel(sequence));
    }

    fn deliver(
        records: &mut BTreeMap<SequenceId, Record>,
        outputs: &mut Vec<Output>,
        totals: &mut Totals,
        mut result: SequenceResult,
    ) {
        let sequence = result.sequence;
        let Some(record) = records.get_mut(&sequence).filter(|record| !record.closed) else {
            return; // cancelled meanwhile
        };
        if let Some(last) = result.prompt_logprobs.len().checked_sub(1) {
            // Sent in order, each once: a prompt computed again after a preemption starts over at its first token.
            let first = result.prompt_start as usize;
            let skip = record.prompt_logprobs.saturating_sub(first);
            if skip <= last {
                let fresh = result.prompt_logprobs.split_off(skip);
                record.prompt_logprobs += fresh.len();
                outputs.push(Output::Client(sequence, RequestEvent::Prompt(fresh)));
            }
        }
        if let Some(token) = result.token {
            record.generated.push(token);
            totals.generated_tokens += 1;
            let event = RequestEvent::Token {
                token,
                logprob: result.logprob,
            };
            outputs.push(Output::Client(sequence, event));
        }
        if let Some(reason) = result.finished {
            record.closed = true;
            outputs.push(Output::Client(sequence, RequestEvent::Finished(reason)));
        }
    }
}

impl OpenStep {
    /// The outcome of a sequence. A step of a large cluster has thousands, so they are not searched one by one.
    fn outcome(&mut self, sequence: SequenceId) -> Option<&mut Outcome> {
        let found = self.places.binary_search_by_key(&sequence, |place| place.0);
        let (_, at) = self.places[found.ok()?];
        self.outcomes.get_mut(at as usize)
    }

    fn find_places(&mut self) {
        self.places.clear();
        let sequences = self.outcomes.iter().map(|outcome| outcome.sequence);
        self.places.extend(sequences.zip(0..));
        self.places.sort_unstable();
    }
}

impl Record {
    fn submit(&self, sequence: SequenceId, held: Option<Held>) -> Submit {
        Submit {
            sequence,
            length: (self.request.prompt.len() + self.generated.len()) as u32,
            limit: self.limit,
            tenant: Arc::clone(&self.request.tenant),
            priority: self.request.priority,
            arrived: self.arrived,
            held,
        }
    }
}

impl Limits {
    /// Checks a request against the limits; returns the greatest length its sequence can have.
    fn check(&self, request: &Request) -> Result<u32, SubmitError> {
        if request.prompt.is_empty() {
            return Err(SubmitError::EmptyPrompt);
        }
        let too_long = SubmitError::TooLong {
            prompt: request.prompt.len(),
            max_tokens: request.max_tokens,
            context: self.context,
        };
        let limit = u32::try_from(request.prompt.len())
            .ok()
            .and_then(|prompt| prompt.checked_add(request.max_tokens))
            .filter(|&limit| limit <= self.context)
            .ok_or(too_long)?;
        let unknown = |&(_, &token): &(usize, &u32)| token as usize >= self.vocab;
        if let Some((position, &token)) = request.prompt.iter().enumerate().find(unknown) {
            return Err(SubmitError::UnknownToken {
                token,
                position,
                vocab: self.vocab,
            });
        }
        request.sampling.validate()?;
        Ok(limit)
    }
}
