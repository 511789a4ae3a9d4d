//! The frontend as an actor: the [`Ledger`] between clients, scheduler and attention workers.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use actix::prelude::*;
use tokio::sync::{mpsc, oneshot};
use volley_transports::Epoch;

use super::candidates::{Candidate, Candidates, Leader};
use super::ledger::{Ledger, Limits, Output, Totals};
use super::telemetry::{ClientTimes, FrontendMetrics};
use crate::clock::Clock;
use crate::protocol::{AttentionCommand, AttentionWord, Membership, SequenceId};
use crate::remote::Planner;
use crate::request::{Request, RequestEvent, SubmitError};
use crate::scheduler::{Consult, SchedulerHandle, StartScheduler};

/// How often overdue steps are looked for and full mailboxes are tried again.
const TICK: Duration = Duration::from_millis(20);
/// A scheduler that has not answered after this long is replaced.
const SCHEDULER_DEADLINE: Duration = Duration::from_secs(5);
/// A scheduler of another process is on the way of every step: one that takes longer is replaced, which costs less than waiting for it.
const PROCESS_DEADLINE: Duration = Duration::from_millis(500);
/// A scheduler that dies this often within the window is given up for the shipped one. If that does too, every request ends with an error.
const SCHEDULER_DEATHS_MAX: usize = 5;
/// See [`SCHEDULER_DEATHS_MAX`].
const SCHEDULER_WINDOW: Duration = Duration::from_secs(60);
/// Pause before a scheduler is started again after its second death in the window; doubles with each further one.
const SCHEDULER_PAUSE: Duration = Duration::from_millis(10);
/// A step that takes longer is reported in the log, again each time its age has doubled.
const STEP_OVERDUE: Duration = Duration::from_secs(5);

/// See the module.
pub(crate) struct Frontend {
    ledger: Ledger,
    clients: HashMap<SequenceId, Client>,
    /// By attention worker; none where nobody is.
    workers: Vec<Option<Link>>,
    scheduler: SchedulerSlot,
    clock: Clock,
    metrics: FrontendMetrics,
    last_step: Duration,
    /// Why the cluster cannot go on.
    failed: Option<String>,
    next_warning: Duration,
}

/// A client's end of a request.
struct Client {
    events: mpsc::UnboundedSender<RequestEvent>,
    times: ClientTimes,
}

/// The way to an attention worker. What its mailbox does not take waits here, in order.
struct Link {
    /// Which incarnation of the worker: see [`Regrouped`].
    incarnation: Incarnation,
    worker: Recipient<AttentionCommand>,
    backlog: VecDeque<AttentionCommand>,
}

struct SchedulerSlot {
    start: StartScheduler,
    /// The shipped one, while it is not the one that is started.
    fallback: Option<StartScheduler>,
    handle: SchedulerHandle,
    /// Scheduler processes that offer themselves.
    candidates: Candidates<ProcessScheduler>,
    /// Whose `handle` it is.
    leader: Leader,
    asking: bool,
    /// The last one died, or there is a better one: that one begins when no step is under way.
    down: bool,
    /// When the last ones died, within [`SCHEDULER_WINDOW`].
    deaths: Vec<Duration>,
}

/// A scheduler process that offers itself. Its link ends with this.
struct ProcessScheduler {
    handle: SchedulerHandle,
    _presence: oneshot::Sender<()>,
}

impl Frontend {
    /// With a user's scheduler, if there is one, and the `shipped` one to fall back on.
    pub(crate) fn new(
        limits: Limits,
        users: Option<StartScheduler>,
        shipped: StartScheduler,
        clock: Clock,
    ) -> Self {
        let (start, fallback) = match users {
            Some(users) => (users, Some(shipped)),
            None => (shipped, None),
        };
        Frontend {
            ledger: Ledger::new(limits),
            clients: HashMap::new(),
            workers: Vec::new(),
            scheduler: SchedulerSlot {
                handle: start(),
                start,
                fallback,
                candidates: Candidates::default(),
                leader: Leader::Own,
                asking: false,
                down: false,
                deaths: Vec::new(),
            },
            clock,
            metrics: FrontendMetrics::new(),
            last_step: Duration::ZERO,
            failed: None,
            next_warning: STEP_OVERDUE,
        }
    }

    /// Carries out what the ledger wants and consults the scheduler about what is new.
    fn advance(&mut self, ctx: &mut Context<Self>) {
        let now = self.clock.now();
        let mut gone = Vec::new();
        loop {
            for output in self.ledger.outputs() {
                match output {
                    Output::Worker(worker, command) => {
                        if let Some(Some(link)) = self.workers.get_mut(usize::from(worker)) {
                            link.send(command);
                        }
                    }
                    Output::Client(sequence, event) => {
                        let Some(client) = self.clients.get_mut(&sequence) else {
                            continue;
                        };
                        self.metrics.event(&mut client.times, &event, now);
                        let finished = matches!(event, RequestEvent::Finished(_));
                        let closed = client.events.send(event).is_err();
                        if finished {
                            self.clients.remove(&sequence);
                        } else if closed {
                            gone.push(sequence);
                        }
                    }
                }
            }
            // A client that hung up without a word.
            let Some(sequence) = gone.pop() else { break };
            self.ledger.cancel(sequence);
        }
        self.metrics.state(&self.ledger);
        self.consult(ctx);
    }

    fn consult(&mut self, ctx: &mut Context<Self>) {
        let slot = &mut self.scheduler;
        // A process that is better than the one that plans takes over as soon as the steps under way have ended.
        slot.down |= slot.candidates.best(self.clock.now()) != slot.leader;
        if slot.down && !slot.asking {
            self.ledger.absorb();
        }
        if slot.down {
            let rested = self.clock.now() >= slot.resume_at();
            if rested && self.ledger.steps_in_flight() == 0 && !slot.asking {
                self.restart_scheduler(ctx);
            }
            return;
        }
        if slot.asking {
            return;
        }
        let Some(event) = self.ledger.next_event() else {
            return;
        };
        slot.asking = true;
        let answer = slot.handle.send(Consult {
            event,
            now: self.clock.now(),
        });
        let limit = match slot.leader {
            Leader::Own => SCHEDULER_DEADLINE,
            Leader::Process(_) => PROCESS_DEADLINE,
        };
        let answer = tokio::time::timeout(limit, answer);
        ctx.spawn(answer.into_actor(self).map(move |answer, this, ctx| {
            this.scheduler.asking = false;
            match answer {
                Ok(Ok(plans)) => this.ledger.plans(&plans, this.clock.now()),
                Ok(Err(_)) => this.scheduler_died("it panicked or stopped"),
                Err(_) => this.scheduler_died(&format!("it did not answer within {limit:?}")),
            }
            this.advance(ctx);
        }));
    }

    fn scheduler_died(&mut self, why: &str) {
        let slot = &mut self.scheduler;
        let now = self.clock.now();
        slot.down = true;
        if let Leader::Process(id) = slot.leader {
            let candidate = slot.candidates.get(id);
            let name = candidate.map_or("it", |candidate| candidate.name.as_str());
            tracing::error!(
                "the scheduler {name} is lost ({why}); another takes over. No request is lost"
            );
            slot.candidates.failed(id, now);
            self.metrics.scheduler_restarts.increment(1);
            return;
        }
        slot.deaths
            .retain(|&death| now.saturating_sub(death) < SCHEDULER_WINDOW);
        slot.deaths.push(now);
        let deaths = slot.deaths.len();
        self.metrics.scheduler_restarts.increment(1);
        tracing::error!(
            deaths,
            "the scheduler is lost ({why}); a new one is started when the steps under way have ended. No request is lost"
        );
        if deaths < SCHEDULER_DEATHS_MAX {
            return;
        }
        match slot.fallback.take() {
            Some(shipped) => {
                tracing::error!(
                    "the scheduler has died {deaths} times within {SCHEDULER_WINDOW:?}: it is given up, and first come, first served plans from now on, until the program is started again"
                );
                slot.start = shipped;
                slot.deaths.clear();
            }
            None => self
                .ledger
                .fail_all("the scheduler fails again and again; see the server's log"),
        }
    }

    fn restart_scheduler(&mut self, ctx: &mut Context<Self>) {
        let slot = &mut self.scheduler;
        let before = slot.leader;
        slot.leader = slot.candidates.best(self.clock.now());
        let chosen = match slot.leader {
            Leader::Process(id) => slot.candidates.get(id),
            Leader::Own => None,
        };
        match chosen {
            Some(candidate) => {
                slot.handle = candidate.handle.handle.clone();
                tracing::info!("the scheduler {} plans from now on", candidate.name);
            }
            None => {
                slot.handle = (slot.start)();
                if before != Leader::Own {
                    tracing::info!("the controller's own scheduler plans from now on");
                }
            }
        }
        slot.down = false;
        self.ledger.introduce();
        self.advance(ctx);
    }

    fn tick(&mut self, ctx: &mut Context<Self>) {
        for link in self.workers.iter_mut().flatten() {
            link.flush();
        }
        let overdue = self.ledger.overdue(self.clock.now(), STEP_OVERDUE);
        let oldest = overdue
            .iter()
            .map(|step| step.age)
            .max()
            .unwrap_or_default();
        let due = oldest >= self.next_warning;
        // A step with nobody missing waits for an older one of its micro-batch, which is named.
        for step in overdue
            .iter()
            .filter(|step| due && !step.missing.is_empty())
        {
            let missing: Vec<_> = step
                .missing
                .iter()
                .map(|w| format!("attention-{w}"))
                .collect();
            tracing::warn!(
                "{} of {} has been under way for {:.1?}; it waits for {}",
                step.step,
                step.micro_batch,
                step.age,
                missing.join(", ")
            );
        }
        if due {
            self.next_warning = oldest * 2;
        } else if overdue.is_empty() {
            self.next_warning = STEP_OVERDUE;
        }
        self.advance(ctx);
    }
}

impl SchedulerSlot {
    /// When one that died may be started again: at once after a first death, later and later after further ones.
    fn resume_at(&self) -> Duration {
        if self.leader != Leader::Own {
            return Duration::ZERO;
        }
        let Some(&last) = self.deaths.last() else {
            return Duration::ZERO;
        };
        match self.deaths.len() as u32 {
            1 => last,
            deaths => last + SCHEDULER_PAUSE * 2u32.pow((deaths - 2).min(9)),
        }
    }
}

impl Link {
    fn send(&mut self, command: AttentionCommand) {
        self.backlog.push_back(command);
        self.flush();
    }

    fn flush(&mut self) {
        while let Some(command) = self.backlog.pop_front() {
            match self.worker.try_send(command) {
                Ok(()) => {}
                Err(SendError::Full(command)) => {
                    self.backlog.push_front(command);
                    return;
                }
                // The worker is gone: the supervisor announces a new membership, which voids this command.
                Err(SendError::Closed(_)) => {}
            }
        }
    }
}

impl Actor for Frontend {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(crate::MAILBOX_CAPACITY);
        ctx.run_interval(TICK, Self::tick);
        self.advance(ctx);
    }
}

/// A client's request.
#[derive(Message)]
#[rtype(result = "Result<SequenceId, SubmitError>")]
pub(crate) struct Enqueue {
    pub(crate) request: Request,
    pub(crate) events: mpsc::UnboundedSender<RequestEvent>,
}

impl Handler<Enqueue> for Frontend {
    type Result = Result<SequenceId, SubmitError>;

    fn handle(&mut self, message: Enqueue, ctx: &mut Self::Context) -> Self::Result {
        let now = self.clock.now();
        let result = self.ledger.submit(message.request, now);
        match &result {
            Ok(sequence) => {
                let client = Client {
                    events: message.events,
                    times: ClientTimes::new(now),
                };
                self.clients.insert(*sequence, client);
                self.advance(ctx);
            }
            Err(error) => self.metrics.rejected(error),
        }
        result
    }
}

/// A client has no use for its request any more.
#[derive(Message)]
#[rtype(result = "()")]
pub(crate) struct Cancel(pub(crate) SequenceId);

impl Handler<Cancel> for Frontend {
    type Result = ();

    fn handle(&mut self, message: Cancel, ctx: &mut Self::Context) {
        self.ledger.cancel(message.0);
        self.advance(ctx);
    }
}

impl Handler<AttentionWord> for Frontend {
    type Result = ();

    fn handle(&mut self, word: AttentionWord, ctx: &mut Self::Context) {
        let now = self.clock.now();
        match word {
            AttentionWord::Step(report) => {
                for (done, age) in self.ledger.report(report, now) {
                    self.last_step = now;
                    self.metrics.step(&done, age);
                }
            }
            AttentionWord::Moved { worker, epoch } => self.ledger.moved(worker, epoch),
        }
        self.advance(ctx);
    }
}

/// News of a scheduler process.
#[derive(Message)]
#[rtype(result = "()")]
pub(crate) enum SchedulerNews {
    /// It offers itself, with this number, name and term. The sender is dropped when it is not wanted any more.
    Joined(u64, String, Option<u64>, Planner, oneshot::Sender<()>),
    /// An election chose it, with this term, or another instead.
    Elected(u64, Option<u64>),
    /// Its link has ended.
    Left(u64),
}

impl Handler<SchedulerNews> for Frontend {
    type Result = ();

    fn handle(&mut self, news: SchedulerNews, ctx: &mut Self::Context) {
        let candidates = &mut self.scheduler.candidates;
        match news {
            SchedulerNews::Joined(id, name, term, planner, presence) => {
                candidates.joined(Candidate {
                    id,
                    name,
                    term,
                    handle: ProcessScheduler {
                        handle: planner.start().recipient(),
                        _presence: presence,
                    },
                });
            }
            SchedulerNews::Elected(id, term) => candidates.elected(id, term),
            SchedulerNews::Left(id) => candidates.left(id),
        }
        self.advance(ctx);
    }
}

/// A client has all it wants of its request.
#[derive(Message)]
#[rtype(result = "()")]
pub(crate) struct Complete(pub(crate) SequenceId);

impl Handler<Complete> for Frontend {
    type Result = ();

    fn handle(&mut self, message: Complete, ctx: &mut Self::Context) {
        self.ledger.complete(message.0);
        self.advance(ctx);
    }
}

/// Whom commands are for: the life of a worker, and the epoch since which it has taken part without a break.
pub(crate) type Incarnation = (u64, Epoch);

/// The workers changed: what is under way goes on under the new membership.
#[derive(Message)]
#[rtype(result = "()")]
pub(crate) struct Regrouped {
    pub(crate) membership: Membership,
    /// The attention workers that take part, by index.
    pub(crate) workers: Vec<Option<(Incarnation, Recipient<AttentionCommand>)>>,
}

impl Handler<Regrouped> for Frontend {
    type Result = ();

    fn handle(&mut self, message: Regrouped, ctx: &mut Self::Context) {
        let mut before = std::mem::take(&mut self.workers).into_iter();
        for worker in message.workers {
            let before = before.next().flatten();
            self.workers.push(worker.map(|(incarnation, worker)| {
                // What one that goes on has not been told yet still holds; what was for another is void.
                let kept = before.filter(|link| link.incarnation == incarnation);
                Link {
                    incarnation,
                    worker,
                    backlog: kept.map(|link| link.backlog).unwrap_or_default(),
                }
            }));
        }
        self.ledger.regroup(message.membership);
        self.advance(ctx);
    }
}

/// The cluster cannot go on; every request ends with this reason.
#[derive(Message)]
#[rtype(result = "()")]
pub(crate) struct GiveUp(pub(crate) String);

impl Handler<GiveUp> for Frontend {
    type Result = ();

    fn handle(&mut self, message: GiveUp, ctx: &mut Self::Context) {
        self.ledger.drain();
        self.ledger.fail_all(&message.0);
        self.failed = Some(message.0);
        self.advance(ctx);
    }
}

/// Take no new requests.
#[derive(Message)]
#[rtype(result = "()")]
pub(crate) struct Drain;

impl Handler<Drain> for Frontend {
    type Result = ();

    fn handle(&mut self, _: Drain, _: &mut Self::Context) {
        self.ledger.drain();
    }
}

/// How things stand.
#[derive(Message)]
#[rtype(result = "Status")]
pub(crate) struct AskStatus;

/// How the cluster stands, for health checks and people.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Status {
    /// Version of membership and placement.
    pub epoch: u32,
    /// Requests that have not ended.
    pub live: usize,
    /// Of these, without a place on a worker.
    pub waiting: usize,
    /// Steps under way.
    pub steps_in_flight: usize,
    /// Time since the last step ended, or since the start; in seconds when serialised.
    #[serde(serialize_with = "seconds")]
    pub since_last_step: Duration,
    /// Whether new requests are refused.
    pub draining: bool,
    /// Why the cluster cannot go on, if it cannot.
    pub failed: Option<String>,
    /// Tokens and events since the start.
    #[serde(flatten)]
    pub totals: Totals,
    /// By attention worker: sequences, free and all KV blocks.
    pub attention: Vec<AttentionStatus>,
    /// Who plans: a scheduler process by its name; none if it is the controller's own.
    pub scheduler: Option<String>,
    /// Scheduler processes that stand by.
    pub standby: Vec<String>,
}

fn seconds<S: serde::Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(time.as_secs_f64())
}

/// One attention worker in a [`Status`].
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct AttentionStatus {
    /// Whether it can be given work.
    pub alive: bool,
    /// Sequences whose KV cache it holds.
    pub sequences: usize,
    /// KV blocks that no sequence holds.
    pub free_blocks: u32,
    /// All its KV blocks.
    pub kv_blocks: u32,
}

impl Handler<AskStatus> for Frontend {
    type Result = MessageResult<AskStatus>;

    fn handle(&mut self, _: AskStatus, _: &mut Self::Context) -> Self::Result {
        let view = self.ledger.view();
        let slot = &self.scheduler;
        let names = |leads: bool| {
            let all = slot.candidates.iter();
            let some = all.filter(move |of| (slot.leader == Leader::Process(of.id)) == leads);
            some.map(|candidate| candidate.name.clone())
        };
        MessageResult(Status {
            scheduler: names(true).next(),
            standby: names(false).collect(),
            epoch: self.ledger.epoch().0,
            live: self.ledger.live(),
            waiting: self.ledger.waiting(),
            steps_in_flight: self.ledger.steps_in_flight(),
            since_last_step: self.clock.now().saturating_sub(self.last_step),
            draining: self.ledger.is_draining(),
            failed: self.failed.clone(),
            totals: self.ledger.totals,
            attention: view
                .workers()
                .iter()
                .map(|worker| AttentionStatus {
                    alive: worker.capacity.alive,
                    sequences: worker.sequences.len(),
                    free_blocks: worker.free_blocks,
                    kv_blocks: worker.capacity.kv_blocks,
                })
                .collect(),
        })
    }
}
