//! The supervisor: fills the seats with workers, hears how they fare, and begins an epoch whenever the [`Roster`] calls for one.
//!
//! In one process the supervisor starts the workers and rebuilds those that are lost. Workers of other processes come and go by themselves ([`Joined`]).
//! Either way a loss costs a pause and nothing else: workers that are left keep their weights and their sequences, and what was under way is given out
//! again under the new epoch.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use actix::prelude::*;
use metrics::{Counter, counter};
use tokio::sync::oneshot;
use volley_models::ModelSpec;
use volley_transports::{Endpoint, Epoch, InProcessFabric, Role, Spin, WorkerId};

use crate::clock::Clock;
use crate::cluster_config::ClusterConfig;
use crate::cluster_error::ClusterError;
use crate::data_loop::Exit;
use crate::frontend::{AskStatus, Drain, Frontend, GiveUp, Regrouped};
use crate::grouping::Grouping;
use crate::metered::Metered;
use crate::metric_names;
use crate::protocol::{AttentionCapacity, AttentionCommand, AttentionWord, Membership};
use crate::remote::Joined;
use crate::roster::Roster;
use crate::startup::{Startup, mark};
use crate::voice::{Ear, WorkerWord};
use crate::waits::{WorkerState, WorkerWait};
use crate::worker::{Blueprint, Lanes, Order, StopWorker, Worker};

/// Losses within [`LOSS_WINDOW`] after which a cluster in one process gives up: something is wrong that a restart does not mend.
const LOSSES_MAX: usize = 5;
/// See [`LOSSES_MAX`].
const LOSS_WINDOW: Duration = Duration::from_secs(60);
/// A worker that is accused has this long to be reported dead before it is taken for dead.
const ACCUSED_GRACE: Duration = Duration::from_millis(100);
/// Workers that are asked what they wait for have this long to answer.
const WAITS_PATIENCE: Duration = Duration::from_millis(200);
/// How often bars that have ended and workers that do not move are looked for.
const TICK: Duration = Duration::from_millis(50);
/// How often load is looked at, to spread experts anew.
const BALANCE_EVERY: Duration = Duration::from_secs(10);
/// Rows that each expert must have computed on average since the last look: fewer say nothing.
const BALANCE_ROWS: u64 = 256;
/// The busiest expert worker must have so much less to do for an epoch to pay.
const BALANCE_GAIN: f64 = 0.1;
/// How often a cluster that waits for workers says for whom.
const MISSED_EVERY: Duration = Duration::from_secs(5);

/// How far a worker has loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LoadProgress {
    /// The worker.
    pub worker: WorkerId,
    /// Bytes of weights that are packed.
    pub done_bytes: u64,
    /// Bytes of weights it will hold.
    pub total_bytes: u64,
}

/// Takes the progress of all workers.
#[derive(Clone)]
pub(crate) struct LoadReporter(pub(crate) Arc<dyn Fn(LoadProgress) + Send + Sync>);

impl LoadReporter {
    /// The end that one worker reports to.
    pub(crate) fn of(&self, worker: WorkerId) -> impl FnMut(volley_models::Progress) {
        let report = Arc::clone(&self.0);
        move |progress| {
            let (done_bytes, total_bytes) =
                (progress.packed_bytes as u64, progress.total_bytes as u64);
            report(LoadProgress {
                worker,
                done_bytes,
                total_bytes,
            });
        }
    }
}

/// See the module.
pub(crate) struct Supervisor {
    site: Site,
    clock: Clock,
    config: ClusterConfig,
    frontend: Addr<Frontend>,
    /// Told once, when all workers have loaded for the first time or one cannot.
    started: Option<mpsc::Sender<Result<(), ClusterError>>>,
    roster: Roster,
    seats: BTreeMap<WorkerId, Seat>,
    /// Attention workers that have not said that they are in the epoch which began at this time.
    moving: BTreeSet<WorkerId>,
    regrouped: Instant,
    next_life: u64,
    losses: Vec<Instant>,
    stopping: bool,
    /// What workers said that they wait for, since they were last asked.
    waits: BTreeMap<WorkerId, Vec<WorkerWait>>,
    /// Told when all have.
    all_told: Option<oneshot::Sender<()>>,
    /// How the start of each went: of threads as seen from here, of processes as they say.
    startups: BTreeMap<WorkerId, Startup>,
    /// When it was last said for whom the cluster waits.
    missed: Instant,
    /// When load was last looked at, and the rows of each expert then.
    balanced: (Instant, Vec<u64>),
}

/// Where the workers are.
pub(crate) enum Site {
    /// On threads of this process, which the supervisor starts.
    Here(Arc<Blueprint>),
    /// In processes of their own, which end with the cluster if they are our `children`.
    Afar {
        /// Whether this process started them.
        children: bool,
    },
}

/// The way to a worker in its seat.
pub(crate) struct Seat {
    pub(crate) orders: Recipient<Order>,
    pub(crate) stop: Recipient<StopWorker>,
    /// To an attention worker.
    pub(crate) commands: Option<Recipient<AttentionCommand>>,
    /// Where an expert worker of another process takes lanes.
    pub(crate) address: Option<SocketAddr>,
}

/// Carries words of workers in this process to its actors.
struct Here {
    supervisor: Addr<Supervisor>,
    frontend: Recipient<AttentionWord>,
}

impl Ear for Here {
    fn word(&self, worker: WorkerId, life: u64, word: WorkerWord) {
        // Words of a worker's life are few, so the mailbox bound does not matter to them.
        self.supervisor.do_send(Heard { worker, life, word });
    }

    fn report(&self, word: AttentionWord) -> Option<AttentionWord> {
        match self.frontend.try_send(word) {
            Err(SendError::Full(word)) => Some(word),
            // Without a frontend there is nobody to report to; the worker is about to be stopped.
            Ok(()) | Err(SendError::Closed(_)) => None,
        }
    }
}

impl Supervisor {
    pub(crate) fn new(
        site: Site,
        clock: Clock,
        config: ClusterConfig,
        spec: &ModelSpec,
        frontend: Addr<Frontend>,
        started: mpsc::Sender<Result<(), ClusterError>>,
    ) -> Self {
        Supervisor {
            site,
            clock,
            roster: Roster::new(config.roster(spec)),
            config,
            frontend,
            started: Some(started),
            seats: BTreeMap::new(),
            moving: BTreeSet::new(),
            regrouped: Instant::now(),
            next_life: 0,
            losses: Vec::new(),
            stopping: false,
            waits: BTreeMap::new(),
            all_told: None,
            startups: BTreeMap::new(),
            missed: Instant::now(),
            balanced: (Instant::now(), Vec::new()),
        }
    }

    /// Starts a worker in every empty seat, if workers are ours to start.
    fn fill_seats(&mut self, ctx: &Context<Self>) -> Result<(), ClusterError> {
        let Site::Here(blueprint) = &self.site else {
            return Ok(());
        };
        for worker in self.roster.empty_seats() {
            self.next_life += 1;
            let life = self.next_life;
            let ear = Arc::new(Here {
                supervisor: ctx.address(),
                frontend: self.frontend.clone().recipient(),
            });
            let addr = Worker::new(Arc::clone(blueprint), worker, life, ear)
                .map_err(|error| ClusterError::Thread { worker, error })?
                .start();
            self.roster.seat(worker, life);
            let commands = (worker.role == Role::Attention).then(|| addr.clone().recipient());
            let seat = Seat {
                orders: addr.clone().recipient(),
                stop: addr.recipient(),
                commands,
                address: None,
            };
            self.seats.insert(worker, seat);
        }
        Ok(())
    }

    /// Begins an epoch if one is due, and has experts adopted that nobody holds.
    fn advance(&mut self) {
        if self.stopping {
            return;
        }
        let now = self.clock.now();
        for (worker, experts) in self.roster.adoptions(now) {
            tracing::warn!("{worker} takes over experts {experts:?}, whose workers are lost");
            self.order(worker, Order::Adopt(experts));
        }
        match self.roster.next(now) {
            Ok(Some(grouping)) => {
                if let Err(error) = self.regroup(grouping) {
                    self.give_up(error.to_string());
                }
            }
            Ok(None) => {}
            Err(error) => self.give_up(error.to_string()),
        }
        self.release();
    }

    /// Moves everybody to the lanes of a new epoch.
    fn regroup(&mut self, grouping: Grouping) -> Result<(), ClusterError> {
        let epoch = grouping.epoch;
        tracing::debug!("{epoch} begins");
        // The frontend first: it must know of the epoch before a worker says that it is there.
        self.tell_frontend(epoch);
        self.moving = self
            .seats
            .keys()
            .filter(|id| id.role == Role::Attention && grouping.includes(**id))
            .copied()
            .collect();
        self.regrouped = Instant::now();
        match &self.site {
            Site::Here(blueprint) => {
                let topology = blueprint.shape.topology(self.config.micro_batches)?;
                // The crew spins, and does something useful meanwhile. Ends of workers that take no part are dropped: nobody minds.
                for endpoint in InProcessFabric::build_with(topology, Spin::NONE)? {
                    let worker = endpoint.id();
                    if grouping.includes(worker) && self.roster.takes_part(worker) {
                        let endpoint: Box<dyn Endpoint> =
                            Box::new(Metered::new(Box::new(endpoint)));
                        let lanes = Lanes::Here(endpoint);
                        self.order(worker, Order::Regroup(grouping.clone(), lanes));
                    }
                }
            }
            Site::Afar { .. } => {
                let experts = (0..self.config.expert_workers).map(|index| {
                    let worker = Role::Expert.worker(index);
                    let seat = self.seats.get(&worker);
                    seat.filter(|_| grouping.includes(worker))
                        .and_then(|seat| seat.address)
                });
                let addresses: Vec<Option<SocketAddr>> = experts.collect();
                let members = self.seats.keys().filter(|id| grouping.includes(**id));
                for worker in members.copied().collect::<Vec<_>>() {
                    let lanes = Lanes::Afar(addresses.clone());
                    self.order(worker, Order::Regroup(grouping.clone(), lanes));
                }
            }
        }
        if let Some(started) = self.started.take() {
            if matches!(self.site, Site::Here(_)) {
                let now = self.clock.now();
                for (worker, startup) in &mut self.startups {
                    mark(&mut startup.first_epoch, now);
                    tracing::info!("{worker}: {startup}");
                }
            }
            let _ = started.send(Ok(()));
        }
        Ok(())
    }

    fn tell_frontend(&self, epoch: Epoch) {
        let config = &self.config;
        let attention = (0..config.attention_workers).map(|index| {
            let worker = Role::Attention.worker(index);
            let since = self.roster.since(worker);
            let capacity = AttentionCapacity {
                alive: since.is_some(),
                since: since.unwrap_or(epoch),
                kv_blocks: config.kv_blocks,
                block_tokens: config.block_tokens,
                max_rows: config.max_rows,
            };
            let link = since.and_then(|since| {
                let life = self.roster.life(worker)?;
                let commands = self.seats.get(&worker)?.commands.clone()?;
                Some(((life, since), commands))
            });
            (capacity, link)
        });
        let (attention, workers) = attention.unzip();
        let membership = Membership {
            epoch,
            micro_batches: config.micro_batches,
            attention,
        };
        self.frontend.do_send(Regrouped {
            membership,
            workers,
        });
    }

    /// Tells a worker something. One that is gone hears nothing: its end is reported by whoever saw it.
    fn order(&self, worker: WorkerId, order: Order) {
        if let Some(seat) = self.seats.get(&worker) {
            seat.orders.do_send(order);
        }
    }

    /// Takes a worker for dead.
    fn lose(&mut self, worker: WorkerId, reason: &str, ctx: &Context<Self>) {
        // Its actor goes, and with it the inbox: a thread that still computes ends when it looks there.
        self.seats.remove(&worker);
        self.roster.lost(worker);
        self.moving.remove(&worker);
        restarts(worker.role).increment(1);
        if matches!(self.site, Site::Here(_)) {
            let now = Instant::now();
            self.losses
                .retain(|&loss| now.duration_since(loss) < LOSS_WINDOW);
            self.losses.push(now);
            if self.losses.len() > LOSSES_MAX {
                self.give_up(format!(
                    "{worker} was lost ({reason}), the {}th loss within {LOSS_WINDOW:?}",
                    self.losses.len()
                ));
                return;
            }
            tracing::error!(
                "{worker} is lost ({reason}); it is rebuilt, and requests go on from the tokens they have"
            );
            if let Err(error) = self.fill_seats(ctx) {
                self.give_up(error.to_string());
                return;
            }
        } else {
            tracing::error!(
                "{worker} is lost ({reason}); requests go on from the tokens they have"
            );
        }
        self.missed = Instant::now();
        self.advance();
    }

    /// Lets workers go that want to leave and are not needed any more.
    fn release(&mut self) {
        for worker in self.roster.released() {
            tracing::info!("{worker} leaves");
            self.order(worker, Order::Release);
        }
    }

    fn give_up(&mut self, reason: String) {
        tracing::error!("the cluster cannot go on: {reason}");
        self.stopping = true;
        self.frontend.do_send(GiveUp(reason));
    }

    /// A worker is said to be silent or wrong. Here it is rebuilt; a process elsewhere sits out for a while.
    fn accused(&mut self, worker: WorkerId, epoch: Epoch, reason: &str, ctx: &Context<Self>) {
        if self.stopping || epoch != self.roster.epoch() || !self.roster.takes_part(worker) {
            return;
        }
        if matches!(self.site, Site::Here(_)) {
            self.lose(worker, reason, ctx);
        } else if self.roster.accused(worker, epoch, self.clock.now()) {
            tracing::warn!("{worker} is suspect: {reason}");
            self.advance();
        }
    }

    fn tick(&mut self, ctx: &Context<Self>) {
        if self.regrouped.elapsed() > self.config.peer_deadline
            && let Some(worker) = self.moving.pop_first()
        {
            let reason = format!(
                "it did not move to the new epoch within {:?}",
                self.config.peer_deadline
            );
            self.lose(worker, &reason, ctx);
        }
        self.balance();
        self.advance();
        self.name_the_missed();
    }

    /// Looks at the load since the last time, and spreads experts anew over the workers that hold them where that pays.
    /// Workers of other processes count for themselves, so only a cluster in one process does so.
    fn balance(&mut self) {
        let Site::Here(blueprint) = &self.site else {
            return;
        };
        if self.config.expert_replicas < 2 || self.balanced.0.elapsed() < BALANCE_EVERY {
            return;
        }
        let layers = blueprint.load.rows();
        let experts = layers.first().map_or(0, Vec::len);
        let rows: Vec<u64> = (0..experts)
            .map(|expert| layers.iter().map(|layer| layer[expert]).sum())
            .collect();
        let before = std::mem::replace(&mut self.balanced, (Instant::now(), rows.clone())).1;
        let since = rows.iter().enumerate();
        let since: Vec<u64> = since
            .map(|(expert, rows)| rows - before.get(expert).copied().unwrap_or(0))
            .collect();
        if since.iter().sum::<u64>() >= BALANCE_ROWS * experts as u64 {
            self.rebalance(&since);
        }
    }

    fn rebalance(&mut self, rows: &[u64]) -> bool {
        let pays = self.roster.rebalance(rows, BALANCE_GAIN);
        if pays {
            tracing::info!(
                "load has drifted: experts are spread anew over the workers that hold them"
            );
        }
        pays
    }

    /// Says who is missed while the cluster stands still for want of workers.
    fn name_the_missed(&mut self) {
        if self.stopping || self.missed.elapsed() < MISSED_EVERY {
            return;
        }
        let empty = self.roster.empty_seats();
        if empty.is_empty() {
            return;
        }
        self.missed = Instant::now();
        let names: Vec<String> = empty.iter().map(WorkerId::to_string).collect();
        let effect = if self.roster.is_viable(self.clock.now()) {
            "the others go on without"
        } else {
            "requests wait until"
        };
        tracing::warn!("missing: {}; {effect} them", names.join(", "));
    }
}

/// How often workers of a role were lost.
fn restarts(role: Role) -> Counter {
    counter!(metric_names::WORKER_RESTARTS, "role" => role.to_string())
}

impl Actor for Supervisor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(crate::MAILBOX_CAPACITY);
        // Present from the first scrape, at zero.
        let _ = [Role::Attention, Role::Expert].map(restarts);
        if let Err(error) = self.fill_seats(ctx)
            && let Some(started) = self.started.take()
        {
            let _ = started.send(Err(error));
        }
        ctx.run_interval(TICK, |this, ctx| this.tick(ctx));
    }
}

/// A worker said something.
#[derive(Message)]
#[rtype(result = "()")]
pub(crate) struct Heard {
    pub(crate) worker: WorkerId,
    pub(crate) life: u64,
    pub(crate) word: WorkerWord,
}

impl Handler<Heard> for Supervisor {
    type Result = ();

    fn handle(&mut self, message: Heard, ctx: &mut Self::Context) {
        let Heard { worker, life, word } = message;
        if self.stopping || !self.roster.is_current(worker, life) {
            return;
        }
        match word {
            WorkerWord::Startup(startup) => {
                self.startups.insert(worker, startup);
            }
            WorkerWord::Loaded(holds) => {
                self.roster.loaded(worker, life, holds);
                if matches!(self.site, Site::Here(_)) {
                    let startup = self.startups.entry(worker).or_default();
                    mark(&mut startup.loaded, self.clock.now());
                }
                self.advance();
            }
            WorkerWord::Waits(waits) => {
                self.waits.insert(worker, waits);
                if self.waits.len() >= self.seats.len()
                    && let Some(all) = self.all_told.take()
                {
                    let _ = all.send(());
                }
            }
            WorkerWord::Moved(epoch) => {
                if epoch == self.roster.epoch() {
                    self.moving.remove(&worker);
                }
            }
            WorkerWord::Accused {
                epoch,
                peer,
                reason,
            } => {
                // A peer whose thread has ended is reported by that thread, with a better reason, at about the same time.
                ctx.run_later(ACCUSED_GRACE, move |this, ctx| {
                    this.accused(peer, epoch, &format!("{worker} says: {reason}"), ctx);
                });
            }
            WorkerWord::Ended(Exit::Stopped) => {}
            WorkerWord::Ended(Exit::NotLoaded(reason)) => match self.started.take() {
                Some(started) => {
                    self.stopping = true;
                    let _ = started.send(Err(ClusterError::Load { worker, reason }));
                }
                None if matches!(self.site, Site::Here(_)) => {
                    self.give_up(format!("{worker} could not be rebuilt: {reason}"));
                }
                None => self.lose(worker, &format!("it could not load: {reason}"), ctx),
            },
            WorkerWord::Ended(Exit::Failed(reason)) => self.lose(worker, &reason, ctx),
        }
    }
}

impl Handler<Joined> for Supervisor {
    type Result = Result<u64, String>;

    fn handle(&mut self, message: Joined, _: &mut Self::Context) -> Self::Result {
        let worker = message.worker;
        if self.stopping {
            return Err("the cluster stops".to_owned());
        }
        if !self.roster.has_seat(worker) {
            return Err(format!(
                "there is no {worker}: the cluster has {} attention and {} expert workers",
                self.config.attention_workers, self.config.expert_workers
            ));
        }
        if self.seats.contains_key(&worker) {
            return Err(format!(
                "{worker} is there already; was its index given twice? One that is gone frees its seat in a moment"
            ));
        }
        self.next_life += 1;
        let life = self.next_life;
        self.roster.seat(worker, life);
        let addr = message.proxy().start();
        let seat = Seat {
            orders: addr.clone().recipient(),
            stop: addr.clone().recipient(),
            commands: (worker.role == Role::Attention).then(|| addr.recipient()),
            address: (worker.role == Role::Expert).then_some(message.peer.address),
        };
        self.seats.insert(worker, seat);
        Ok(life)
    }
}

/// A worker wants to leave when its work has gone elsewhere.
#[derive(Message)]
#[rtype(result = "()")]
pub(crate) struct Leaving {
    pub(crate) worker: WorkerId,
    pub(crate) life: u64,
}

impl Handler<Leaving> for Supervisor {
    type Result = ();

    fn handle(&mut self, message: Leaving, _: &mut Self::Context) {
        if self.roster.is_current(message.worker, message.life) {
            tracing::info!("{} wants to leave", message.worker);
            self.roster.leaving(message.worker);
            self.advance();
        }
    }
}

/// Take a worker's work away, but let it stay; or use it again. The error is why that cannot be.
#[derive(Message)]
#[rtype(result = "Result<(), String>")]
pub(crate) struct DrainWorker {
    pub(crate) worker: WorkerId,
    pub(crate) drained: bool,
}

impl Handler<DrainWorker> for Supervisor {
    type Result = Result<(), String>;

    fn handle(&mut self, message: DrainWorker, _: &mut Self::Context) -> Self::Result {
        let DrainWorker { worker, drained } = message;
        if !self.roster.has_seat(worker) {
            return Err(format!(
                "there is no {worker}: the cluster has {} attention and {} expert workers, numbered from 0",
                self.config.attention_workers, self.config.expert_workers
            ));
        }
        if !self.roster.drain(worker, drained) {
            return Err(format!("{worker} is not there, so it has no work"));
        }
        let what = if drained {
            "is drained"
        } else {
            "is used again"
        };
        tracing::info!("{worker} {what}, as it was asked for");
        self.advance();
        Ok(())
    }
}

/// The process of a worker has ended: known at once to whoever started it.
#[derive(Message)]
#[rtype(result = "()")]
pub(crate) struct ProcessEnded(pub(crate) WorkerId, pub(crate) String);

impl Handler<ProcessEnded> for Supervisor {
    type Result = ();

    fn handle(&mut self, message: ProcessEnded, ctx: &mut Self::Context) {
        if !self.stopping && self.seats.contains_key(&message.0) {
            self.lose(message.0, &message.1, ctx);
        }
    }
}

/// How every seat stands, and what its worker waits for. The answer takes [`WAITS_PATIENCE`] at most.
#[derive(Message)]
#[rtype(result = "Vec<WorkerState>")]
pub(crate) struct AskWorkers;

impl Handler<AskWorkers> for Supervisor {
    type Result = ResponseActFuture<Self, Vec<WorkerState>>;

    fn handle(&mut self, _: AskWorkers, _: &mut Self::Context) -> Self::Result {
        self.waits.clear();
        for &worker in self.seats.keys() {
            self.order(worker, Order::Waits);
        }
        let (all, answered) = oneshot::channel();
        self.all_told = Some(all);
        let answered = tokio::time::timeout(WAITS_PATIENCE, answered).into_actor(self);
        Box::pin(answered.map(|_, this, _| {
            let state = |worker: WorkerId| {
                let seat = this.seats.get(&worker);
                WorkerState {
                    worker,
                    address: seat.and_then(|seat| seat.address),
                    present: seat.is_some(),
                    leaving: this.roster.is_leaving(worker),
                    startup: this.startups.get(&worker).copied().unwrap_or_default(),
                    since: this.roster.since(worker),
                    waits: this.waits.get(&worker).cloned(),
                }
            };
            this.roster.all_seats().map(state).collect()
        }))
    }
}

/// Make this worker panic, as a defect would make it.
#[derive(Message)]
#[rtype(result = "()")]
pub(crate) struct CrashWorker(pub(crate) WorkerId);

impl Handler<CrashWorker> for Supervisor {
    type Result = ();

    fn handle(&mut self, message: CrashWorker, _: &mut Self::Context) {
        self.order(message.0, Order::Crash);
    }
}

/// Spread experts anew, as if each had computed so many rows of late. Answers whether that pays.
#[derive(Message)]
#[rtype(result = "bool")]
pub(crate) struct Rebalance(pub(crate) Vec<u64>);

impl Handler<Rebalance> for Supervisor {
    type Result = bool;

    fn handle(&mut self, message: Rebalance, _: &mut Self::Context) -> Self::Result {
        let pays = self.rebalance(&message.0);
        self.advance();
        pays
    }
}

/// Let requests finish until the deadline, then stop everything. The threads to wait for go to `done`.
#[derive(Message)]
#[rtype(result = "()")]
pub(crate) struct Shutdown {
    pub(crate) deadline: Duration,
    pub(crate) done: mpsc::Sender<Vec<JoinHandle<()>>>,
}

impl Handler<Shutdown> for Supervisor {
    type Result = ResponseActFuture<Self, ()>;

    fn handle(&mut self, message: Shutdown, _: &mut Self::Context) -> Self::Result {
        let frontend = self.frontend.clone();
        let until = Instant::now() + message.deadline;
        let drained = async move {
            let _ = frontend.send(Drain).await;
            while Instant::now() < until {
                match frontend.send(AskStatus).await {
                    Ok(status) if status.live > 0 => {
                        tokio::time::sleep(Duration::from_millis(10)).await
                    }
                    _ => break,
                }
            }
        };
        let stop = drained.into_actor(self).then(|(), this, _| {
            this.stopping = true;
            this.frontend.do_send(GiveUp(
                "the server shut down before this request was complete".into(),
            ));
            if let Site::Afar { children: true } = this.site {
                let all: Vec<WorkerId> = this.seats.keys().copied().collect();
                all.into_iter()
                    .for_each(|id| this.order(id, Order::Release));
            }
            let seats = std::mem::take(&mut this.seats);
            async move {
                let mut threads = Vec::new();
                for seat in seats.into_values() {
                    threads.extend(seat.stop.send(StopWorker).await.ok().flatten());
                }
                threads
            }
            .into_actor(this)
        });
        Box::pin(stop.map(move |threads, _, _| {
            let _ = message.done.send(threads);
            System::current().stop();
        }))
    }
}
