//! A worker as an actor: owns a data loop, passes commands to it, and is told by the supervisor when to move or to end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;

use actix::prelude::*;
use volley_models::{AttentionOptions, Crew, ExpertOptions, Member, WeightSource};
use volley_transports::{Endpoint, Epoch, ExchangeShape, Role, WorkerId};

use crate::clock::Clock;
use crate::cluster_config::ClusterConfig;
use crate::data_loop::{DataLoop, Exit};
use crate::expert::{ExpertCommand, ExpertLoad};
use crate::grouping::Grouping;
use crate::protocol::AttentionCommand;
use crate::supervisor::LoadReporter;
use crate::timeline::Timeline;
use crate::voice::{Ear, Voice, WorkerWord};
use crate::{attention, expert};

/// What every worker is made from, again after each loss.
pub(crate) struct Blueprint {
    pub(crate) config: ClusterConfig,
    pub(crate) shape: ExchangeShape,
    pub(crate) crew: Crew,
    pub(crate) attention: AttentionOptions,
    pub(crate) experts: ExpertOptions,
    pub(crate) weights: Arc<dyn WeightSource>,
    pub(crate) clock: Clock,
    pub(crate) timeline: Timeline,
    pub(crate) load: Arc<ExpertLoad>,
    pub(crate) progress: LoadReporter,
    /// Whether peers are in other processes.
    pub(crate) apart: bool,
}

impl Blueprint {
    pub(crate) fn join_crew(&self) -> Result<Member, Exit> {
        self.crew.join().map_err(Exit::not_loaded)
    }

    /// What a worker has before its first epoch.
    pub(crate) fn no_grouping(&self) -> Result<Grouping, Exit> {
        let roster = self.config.roster(self.weights.spec());
        let placement = roster.placement(Epoch(0)).map_err(Exit::not_loaded)?;
        Ok(Grouping::none(self.config.attention_workers, placement))
    }
}

/// How a worker's thread ended; the error is an end before it began.
pub(crate) type Life = Result<Exit, Exit>;

/// See the module.
pub(crate) struct Worker {
    data_loop: Loop,
}

enum Loop {
    Attention(DataLoop<AttentionCommand>),
    Expert(DataLoop<ExpertCommand>),
}

impl Worker {
    /// Starts the data loop; it loads its weights and then waits for its first epoch. `life` is the number of this incarnation; `ear` hears how it goes.
    pub(crate) fn new(
        blueprint: Arc<Blueprint>,
        worker: WorkerId,
        life: u64,
        ear: Arc<dyn Ear>,
    ) -> std::io::Result<Self> {
        let voice = Voice::new(worker, life, ear);
        let last = voice.clone();
        let ended = move |exit| last.say(WorkerWord::Ended(exit));
        let merge = |life: Life| life.unwrap_or_else(|exit| exit);
        let data_loop = match worker.role {
            Role::Attention => Loop::Attention(DataLoop::start(
                worker,
                move |endpoint, inbox| {
                    merge(attention::live(&blueprint, worker, voice, endpoint, inbox))
                },
                ended,
            )?),
            Role::Expert => Loop::Expert(DataLoop::start(
                worker,
                move |endpoint, inbox| {
                    merge(expert::live(&blueprint, worker, voice, endpoint, inbox))
                },
                ended,
            )?),
        };
        Ok(Worker { data_loop })
    }
}

impl Actor for Worker {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(crate::MAILBOX_CAPACITY);
    }
}

impl Handler<AttentionCommand> for Worker {
    type Result = ();

    fn handle(&mut self, command: AttentionCommand, _: &mut Self::Context) {
        match &self.data_loop {
            Loop::Attention(data_loop) => data_loop.command(command),
            Loop::Expert(_) => debug_assert!(false, "an expert worker has no sequences"),
        }
    }
}

/// What the supervisor tells any worker.
#[derive(Message)]
#[rtype(result = "()")]
pub(crate) enum Order {
    /// Take part in a new epoch.
    Regroup(Grouping, Lanes),
    /// Hold these experts beside its own, and no others.
    Adopt(Vec<u16>),
    /// Say what it waits for.
    Waits,
    /// Panic, as a defect would make it.
    Crash,
    /// A worker that wants to leave may.
    Release,
}

/// Where a worker's lanes of an epoch lead.
pub(crate) enum Lanes {
    /// To workers of the same process.
    Here(Box<dyn Endpoint>),
    /// To other processes: the addresses of all expert workers by index, none where nobody is.
    Afar(Vec<Option<SocketAddr>>),
}

impl Handler<Order> for Worker {
    type Result = ();

    fn handle(&mut self, order: Order, _: &mut Self::Context) {
        match (order, &mut self.data_loop) {
            (Order::Regroup(grouping, Lanes::Here(endpoint)), Loop::Attention(data_loop)) => {
                data_loop.regroup(endpoint, grouping);
            }
            (Order::Regroup(grouping, Lanes::Here(endpoint)), Loop::Expert(data_loop)) => {
                data_loop.regroup(endpoint, grouping);
            }
            (Order::Regroup(_, Lanes::Afar(_)), _) => {
                debug_assert!(false, "whoever runs the worker makes its lanes");
            }
            (Order::Adopt(experts), Loop::Expert(data_loop)) => {
                data_loop.command(ExpertCommand::Adopt(experts));
            }
            (Order::Adopt(_), Loop::Attention(_)) => {
                debug_assert!(false, "an attention worker has no experts");
            }
            // Only processes leave by themselves.
            (Order::Release, _) => {}
            (Order::Waits, Loop::Attention(data_loop)) => data_loop.ask_waits(),
            (Order::Waits, Loop::Expert(data_loop)) => data_loop.ask_waits(),
            (Order::Crash, Loop::Attention(data_loop)) => data_loop.crash(),
            (Order::Crash, Loop::Expert(data_loop)) => data_loop.crash(),
        }
    }
}

/// End; the answer is the thread to wait for.
#[derive(Message)]
#[rtype(result = "Option<JoinHandle<()>>")]
pub(crate) struct StopWorker;

impl Handler<StopWorker> for Worker {
    type Result = Option<JoinHandle<()>>;

    fn handle(&mut self, _: StopWorker, ctx: &mut Self::Context) -> Self::Result {
        ctx.stop();
        match &mut self.data_loop {
            Loop::Attention(data_loop) => data_loop.stop(),
            Loop::Expert(data_loop) => data_loop.stop(),
        }
    }
}
