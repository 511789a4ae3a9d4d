//! The supervisor: starts every worker, rebuilds those that are lost, and moves the rest to new lanes.
//!
//! A loss is answered by *regrouping*: a new epoch with a new fabric. Lanes that a lost worker held are gone with it, so all workers get new ones; workers
//! that live keep their weights. When every worker has loaded, the frontend is told, and every request goes on from its prompt and the tokens
//! it has: the same answer always (DESIGN D6) makes that invisible but for the pause.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use actix::prelude::*;
use metrics::{Counter, counter};
use volley_transports::{Endpoint, Epoch, InProcessFabric, Placement, Role, Spin, WorkerId};

use crate::cluster_error::ClusterError;
use crate::data_loop::Exit;
use crate::expert::ExpertCommand;
use crate::frontend::{AskStatus, Drain, Frontend, GiveUp, Regrouped};
use crate::metered::Metered;
use crate::placement_map::Grouping;
use crate::protocol::{AttentionCapacity, AttentionCommand, Membership};
use crate::worker::{Blueprint, Worker};
use crate::{attention, expert, metric_names};

/// Losses within [`LOSS_WINDOW`] after which the cluster gives up: something is wrong that a restart does not mend.
const LOSSES_MAX: usize = 5;
/// See [`LOSSES_MAX`].
const LOSS_WINDOW: Duration = Duration::from_secs(60);
/// A worker that is accused has this long to be reported dead before it is taken for dead.
const ACCUSED_GRACE: Duration = Duration::from_millis(100);

/// How far a worker has loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    blueprint: Arc<Blueprint>,
    frontend: Addr<Frontend>,
    /// Told once, when all workers have loaded for the first time or one cannot.
    started: Option<mpsc::Sender<Result<(), ClusterError>>>,
    epoch: u32,
    attention: BTreeMap<u16, Seat<AttentionCommand>>,
    experts: BTreeMap<u16, Seat<ExpertCommand>>,
    loading: BTreeSet<WorkerId>,
    next_life: u64,
    losses: Vec<Instant>,
    stopping: bool,
}

/// A worker in its place. `C` is what it is told.
struct Seat<C: Send + Unpin + 'static> {
    life: u64,
    addr: Addr<Worker<C>>,
}

impl Supervisor {
    pub(crate) fn new(
        blueprint: Blueprint,
        frontend: Addr<Frontend>,
        started: mpsc::Sender<Result<(), ClusterError>>,
    ) -> Self {
        Supervisor {
            blueprint: Arc::new(blueprint),
            frontend,
            started: Some(started),
            epoch: 0,
            attention: BTreeMap::new(),
            experts: BTreeMap::new(),
            loading: BTreeSet::new(),
            next_life: 0,
            losses: Vec::new(),
            stopping: false,
        }
    }

    /// Begins a new epoch: new lanes for all, new workers where there are none.
    fn regroup(&mut self, ctx: &mut Context<Self>) -> Result<(), ClusterError> {
        self.epoch += 1;
        let config = &self.blueprint.config;
        let experts = self.blueprint.weights.spec().experts as u16;
        let epoch = Epoch(self.epoch);
        let placement = Arc::new(Placement::even(epoch, experts, config.expert_workers)?);
        let grouping = Grouping { epoch, placement };
        let topology = self.blueprint.shape.topology(config.micro_batches)?;
        // The crew spins, and does something useful meanwhile.
        for endpoint in InProcessFabric::build_with(topology, Spin::NONE)? {
            let endpoint: Box<dyn Endpoint> = Box::new(Metered::new(Box::new(endpoint)));
            self.seat(endpoint, grouping.clone(), ctx)?;
        }
        self.announce_when_loaded();
        Ok(())
    }

    /// Moves the worker of this endpoint to its new lanes, or starts one where there is none.
    fn seat(
        &mut self,
        endpoint: Box<dyn Endpoint>,
        grouping: Grouping,
        ctx: &mut Context<Self>,
    ) -> Result<(), ClusterError> {
        let worker = endpoint.id();
        let failed = |error| ClusterError::Thread { worker, error };
        let supervisor = ctx.address();
        match worker.role {
            Role::Attention => {
                if let Some(seat) = self.attention.get(&worker.index) {
                    seat.addr.do_send(Regroup { endpoint, grouping });
                    return Ok(());
                }
                let (blueprint, life) = (Arc::clone(&self.blueprint), self.life());
                let frontend = self.frontend.clone().recipient();
                let started = attention::start(
                    blueprint, worker, life, grouping, endpoint, supervisor, frontend,
                );
                let addr = started.map_err(failed)?.start();
                self.attention.insert(worker.index, Seat { life, addr });
            }
            Role::Expert => {
                if let Some(seat) = self.experts.get(&worker.index) {
                    seat.addr.do_send(Regroup { endpoint, grouping });
                    return Ok(());
                }
                let (blueprint, life) = (Arc::clone(&self.blueprint), self.life());
                let started =
                    expert::start(blueprint, worker, life, grouping, endpoint, supervisor);
                let addr = started.map_err(failed)?.start();
                self.experts.insert(worker.index, Seat { life, addr });
            }
        }
        self.loading.insert(worker);
        Ok(())
    }

    fn life(&mut self) -> u64 {
        self.next_life += 1;
        self.next_life
    }

    fn announce_when_loaded(&mut self) {
        if !self.loading.is_empty() {
            return;
        }
        let config = &self.blueprint.config;
        let capacity = AttentionCapacity {
            alive: true,
            kv_blocks: config.kv_blocks,
            block_tokens: config.block_tokens,
            max_rows: config.max_rows,
        };
        let membership = Membership {
            epoch: Epoch(self.epoch),
            micro_batches: config.micro_batches,
            attention: vec![capacity; config.attention_workers as usize],
        };
        let workers = self
            .attention
            .values()
            .map(|seat| seat.addr.clone().recipient())
            .collect();
        self.frontend.do_send(Regrouped {
            membership,
            workers,
        });
        if let Some(started) = self.started.take() {
            let _ = started.send(Ok(()));
        }
    }

    /// Whether `life` is the incarnation that holds the worker's seat.
    fn is_current(&self, worker: WorkerId, life: u64) -> bool {
        let current = match worker.role {
            Role::Attention => self.attention.get(&worker.index).map(|seat| seat.life),
            Role::Expert => self.experts.get(&worker.index).map(|seat| seat.life),
        };
        current == Some(life)
    }

    /// Takes a worker for dead and regroups, unless that has happened too often.
    fn lose(&mut self, worker: WorkerId, reason: &str, ctx: &mut Context<Self>) {
        // Its actor goes, and with it the inbox: a thread that still computes ends when it looks there.
        match worker.role {
            Role::Attention => drop(self.attention.remove(&worker.index)),
            Role::Expert => drop(self.experts.remove(&worker.index)),
        }
        self.loading.remove(&worker);
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
        restarts(worker.role).increment(1);
        if let Err(error) = self.regroup(ctx) {
            self.give_up(error.to_string());
        }
    }

    fn give_up(&mut self, reason: String) {
        tracing::error!("the cluster cannot go on: {reason}");
        self.stopping = true;
        self.frontend.do_send(GiveUp(reason));
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
        if let Err(error) = self.regroup(ctx)
            && let Some(started) = self.started.take()
        {
            let _ = started.send(Err(error));
        }
    }
}

/// A worker has its weights.
#[derive(Message)]
#[rtype(result = "()")]
pub(crate) struct Loaded {
    pub(crate) worker: WorkerId,
    pub(crate) life: u64,
}

impl Handler<Loaded> for Supervisor {
    type Result = ();

    fn handle(&mut self, message: Loaded, _: &mut Self::Context) {
        if self.is_current(message.worker, message.life) && self.loading.remove(&message.worker) {
            self.announce_when_loaded();
        }
    }
}

/// A worker's thread has ended.
#[derive(Message)]
#[rtype(result = "()")]
pub(crate) struct WorkerEnded {
    pub(crate) worker: WorkerId,
    pub(crate) life: u64,
    pub(crate) exit: Exit,
}

impl Handler<WorkerEnded> for Supervisor {
    type Result = ();

    fn handle(&mut self, message: WorkerEnded, ctx: &mut Self::Context) {
        let worker = message.worker;
        if self.stopping || !self.is_current(worker, message.life) {
            return;
        }
        match message.exit {
            Exit::Stopped => {}
            Exit::NotLoaded(reason) => match self.started.take() {
                Some(started) => {
                    self.stopping = true;
                    let _ = started.send(Err(ClusterError::Load { worker, reason }));
                }
                None => self.give_up(format!("{worker} could not be rebuilt: {reason}")),
            },
            Exit::Failed(reason) => self.lose(worker, &reason, ctx),
        }
    }
}

/// A worker says that a peer is gone, silent or wrong.
#[derive(Message)]
#[rtype(result = "()")]
pub(crate) struct Accused {
    pub(crate) by: WorkerId,
    pub(crate) epoch: Epoch,
    pub(crate) peer: WorkerId,
    pub(crate) reason: String,
}

impl Handler<Accused> for Supervisor {
    type Result = ();

    fn handle(&mut self, message: Accused, ctx: &mut Self::Context) {
        // A peer whose thread has ended is reported by that thread, with a better reason, at about the same time.
        ctx.run_later(ACCUSED_GRACE, move |this, ctx| {
            if !this.stopping && message.epoch == Epoch(this.epoch) {
                let reason = format!("{} says: {}", message.by, message.reason);
                this.lose(message.peer, &reason, ctx);
            }
        });
    }
}

/// Move to new lanes.
#[derive(Message)]
#[rtype(result = "()")]
pub(crate) struct Regroup {
    pub(crate) endpoint: Box<dyn Endpoint>,
    pub(crate) grouping: Grouping,
}

/// Panic, as a defect would make it. To the supervisor: make this worker do so.
#[derive(Message)]
#[rtype(result = "()")]
pub(crate) struct CrashWorker(pub(crate) WorkerId);

impl Handler<CrashWorker> for Supervisor {
    type Result = ();

    fn handle(&mut self, message: CrashWorker, _: &mut Self::Context) {
        let index = message.0.index;
        match message.0.role {
            Role::Attention => self
                .attention
                .get(&index)
                .map(|seat| seat.addr.do_send(message)),
            Role::Expert => self
                .experts
                .get(&index)
                .map(|seat| seat.addr.do_send(message)),
        };
    }
}

/// End; the answer is the thread to wait for.
#[derive(Message)]
#[rtype(result = "Option<JoinHandle<()>>")]
pub(crate) struct StopWorker;

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
            let attention: Vec<_> = this
                .attention
                .values()
                .map(|s| s.addr.clone().recipient())
                .collect();
            let experts: Vec<_> = this
                .experts
                .values()
                .map(|s| s.addr.clone().recipient())
                .collect();
            async move {
                let mut threads = Vec::new();
                for worker in attention.into_iter().chain(experts) {
                    threads.extend(worker.send(StopWorker).await.ok().flatten());
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
