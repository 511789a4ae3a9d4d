//! The attention worker as an actor: passes commands to its data loop, and tells the supervisor how it fares.

use actix::prelude::*;
use volley_models::{AttentionModule, AttentionOptions, WeightSource};
use volley_transports::{Endpoint, ExchangeShape, WorkerId};

use super::data_loop::{AttentionLoop, AttentionParts};
use crate::clock::Clock;
use crate::cluster_config::ClusterConfig;
use crate::data_loop::{DataLoop, Exit};
use crate::placement_map::Grouping;
use crate::protocol::{AttentionCommand, StepReport};
use crate::supervisor::{
    Accused, CrashWorker, LoadReporter, Loaded, Regroup, StopWorker, Supervisor, WorkerEnded,
};
use crate::timeline::Timeline;

/// What an attention worker is built from, again after each loss.
#[derive(Clone)]
pub(crate) struct AttentionWorkerSetup {
    pub(crate) worker: WorkerId,
    /// Number of this incarnation; words of an earlier one are ignored.
    pub(crate) life: u64,
    pub(crate) config: ClusterConfig,
    pub(crate) options: AttentionOptions,
    pub(crate) shape: ExchangeShape,
    pub(crate) weights: std::sync::Arc<dyn WeightSource>,
    pub(crate) clock: Clock,
    pub(crate) timeline: Timeline,
    pub(crate) progress: LoadReporter,
}

/// See the module.
pub(crate) struct AttentionWorker {
    data_loop: DataLoop<AttentionCommand>,
}

impl AttentionWorker {
    /// Starts the data loop; the module is loaded on its thread. Reports go to `frontend`.
    pub(crate) fn new(
        setup: AttentionWorkerSetup,
        grouping: Grouping,
        endpoint: Box<dyn Endpoint>,
        supervisor: Addr<Supervisor>,
        frontend: Recipient<StepReport>,
    ) -> std::io::Result<Self> {
        let (worker, life) = (setup.worker, setup.life);
        let (ended, accuser) = (supervisor.clone(), supervisor.clone());
        let body = move |endpoint, inbox| {
            let parts = match load(setup, accuser, frontend) {
                Ok(parts) => parts,
                Err(error) => return Exit::NotLoaded(error),
            };
            match AttentionLoop::new(parts, grouping, endpoint, inbox) {
                Ok(data_loop) => {
                    supervisor.do_send(Loaded { worker, life });
                    data_loop.run()
                }
                Err(error) => Exit::NotLoaded(error),
            }
        };
        // Lifecycle words are a handful in a worker's life, so the mailbox bound does not matter to them.
        let ended = move |exit| ended.do_send(WorkerEnded { worker, life, exit });
        Ok(AttentionWorker {
            data_loop: DataLoop::start(worker, endpoint, body, ended)?,
        })
    }
}

fn load(
    setup: AttentionWorkerSetup,
    accuser: Addr<Supervisor>,
    frontend: Recipient<StepReport>,
) -> Result<AttentionParts, String> {
    let worker = setup.worker;
    let mut progress = setup.progress.of(worker);
    let module = AttentionModule::load(&*setup.weights, setup.options, &mut progress)
        .map_err(|error| error.to_string())?;
    Ok(AttentionParts {
        worker,
        activations: (0..setup.config.micro_batches)
            .map(|_| module.activations())
            .collect(),
        module,
        spec: setup.weights.spec().clone(),
        dtype: setup.config.dtype,
        shape: setup.shape,
        kv_blocks: setup.config.kv_blocks,
        block_tokens: setup.config.block_tokens,
        peer_deadline: setup.config.peer_deadline,
        clock: setup.clock,
        recorder: setup.timeline.recorder(worker),
        report: Box::new(move |report| match frontend.try_send(report) {
            Err(SendError::Full(report)) => Some(report),
            // Without a frontend there is nobody to report to; the worker is about to be stopped.
            Ok(()) | Err(SendError::Closed(_)) => None,
        }),
        accuse: Box::new(move |epoch, peer, reason| {
            accuser.do_send(Accused {
                by: worker,
                epoch,
                peer,
                reason,
            });
        }),
    })
}

impl Actor for AttentionWorker {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(crate::MAILBOX_CAPACITY);
    }
}

impl Handler<AttentionCommand> for AttentionWorker {
    type Result = ();

    fn handle(&mut self, command: AttentionCommand, _: &mut Self::Context) {
        self.data_loop.command(command);
    }
}

impl Handler<Regroup> for AttentionWorker {
    type Result = ();

    fn handle(&mut self, message: Regroup, _: &mut Self::Context) {
        self.data_loop.regroup(message.endpoint, message.grouping);
    }
}

impl Handler<CrashWorker> for AttentionWorker {
    type Result = ();

    fn handle(&mut self, _: CrashWorker, _: &mut Self::Context) {
        self.data_loop.crash();
    }
}

impl Handler<StopWorker> for AttentionWorker {
    type Result = MessageResult<StopWorker>;

    fn handle(&mut self, _: StopWorker, ctx: &mut Self::Context) -> Self::Result {
        ctx.stop();
        MessageResult(self.data_loop.stop())
    }
}
