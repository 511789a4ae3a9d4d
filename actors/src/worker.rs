//! A worker as an actor: owns a data loop, passes commands to it, and is told by the supervisor when to move or to end.

use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use actix::prelude::*;
use volley_models::{AttentionOptions, Crew, ExpertOptions, WeightSource};
use volley_transports::{Endpoint, ExchangeShape, WorkerId};

use crate::clock::Clock;
use crate::cluster_config::ClusterConfig;
use crate::data_loop::{DataLoop, Exit, Signal};
use crate::expert::ExpertLoad;
use crate::protocol::AttentionCommand;
use crate::supervisor::{
    CrashWorker, LoadReporter, Loaded, Regroup, StopWorker, Supervisor, WorkerEnded,
};
use crate::timeline::Timeline;

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
}

/// See the module. `C` is what its data loop is told.
pub(crate) struct Worker<C> {
    data_loop: DataLoop<C>,
}

impl<C: Send + 'static> Worker<C> {
    /// Starts the data loop. On its thread `load` makes the loop, with the weights, and `run` runs it; the supervisor hears how that goes. `life` is the number
    /// of this incarnation, by which words of an earlier one are known.
    pub(crate) fn new<L: 'static>(
        worker: WorkerId,
        life: u64,
        endpoint: Box<dyn Endpoint>,
        supervisor: Addr<Supervisor>,
        load: impl FnOnce(Box<dyn Endpoint>, mpsc::Receiver<Signal<C>>) -> Result<L, String>
        + Send
        + 'static,
        run: impl FnOnce(L) -> Exit + Send + 'static,
    ) -> std::io::Result<Self> {
        let ended = supervisor.clone();
        let body = move |endpoint, inbox| match load(endpoint, inbox) {
            Ok(data_loop) => {
                // Words of a worker's life are few, so the mailbox bound does not matter to them.
                supervisor.do_send(Loaded { worker, life });
                run(data_loop)
            }
            Err(error) => Exit::NotLoaded(error),
        };
        let ended = move |exit| ended.do_send(WorkerEnded { worker, life, exit });
        Ok(Worker {
            data_loop: DataLoop::start(worker, endpoint, body, ended)?,
        })
    }
}

impl<C: Send + Unpin + 'static> Actor for Worker<C> {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(crate::MAILBOX_CAPACITY);
    }
}

impl Handler<AttentionCommand> for Worker<AttentionCommand> {
    type Result = ();

    fn handle(&mut self, command: AttentionCommand, _: &mut Self::Context) {
        self.data_loop.command(command);
    }
}

impl<C: Send + Unpin + 'static> Handler<Regroup> for Worker<C> {
    type Result = ();

    fn handle(&mut self, message: Regroup, _: &mut Self::Context) {
        self.data_loop.regroup(message.endpoint, message.grouping);
    }
}

impl<C: Send + Unpin + 'static> Handler<CrashWorker> for Worker<C> {
    type Result = ();

    fn handle(&mut self, _: CrashWorker, _: &mut Self::Context) {
        self.data_loop.crash();
    }
}

impl<C: Send + Unpin + 'static> Handler<StopWorker> for Worker<C> {
    type Result = Option<JoinHandle<()>>;

    fn handle(&mut self, _: StopWorker, ctx: &mut Self::Context) -> Self::Result {
        ctx.stop();
        self.data_loop.stop()
    }
}
