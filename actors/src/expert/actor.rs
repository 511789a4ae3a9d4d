//! The expert worker as an actor: owns its data loop, and tells the supervisor how it fares.

use std::sync::Arc;

use actix::prelude::*;
use volley_models::{ExpertModule, ExpertOptions, WeightSource};
use volley_transports::{Endpoint, ExchangeShape, WorkerId};

use super::data_loop::{ExpertCommand, ExpertLoop, ExpertParts};
use super::load::ExpertLoad;
use crate::clock::Clock;
use crate::cluster_config::ClusterConfig;
use crate::data_loop::{DataLoop, Exit};
use crate::placement_map::Grouping;
use crate::supervisor::{
    Accused, CrashWorker, LoadReporter, Loaded, Regroup, StopWorker, Supervisor, WorkerEnded,
};
use crate::timeline::Timeline;

/// What an expert worker is built from, again after each loss.
#[derive(Clone)]
pub(crate) struct ExpertWorkerSetup {
    pub(crate) worker: WorkerId,
    /// Number of this incarnation; words of an earlier one are ignored.
    pub(crate) life: u64,
    pub(crate) config: ClusterConfig,
    pub(crate) options: ExpertOptions,
    pub(crate) shape: ExchangeShape,
    pub(crate) weights: Arc<dyn WeightSource>,
    pub(crate) clock: Clock,
    pub(crate) timeline: Timeline,
    pub(crate) load: Arc<ExpertLoad>,
    pub(crate) progress: LoadReporter,
}

/// See the module.
pub(crate) struct ExpertWorker {
    data_loop: DataLoop<ExpertCommand>,
}

impl ExpertWorker {
    /// Starts the data loop; the module is loaded on its thread.
    pub(crate) fn new(
        setup: ExpertWorkerSetup,
        grouping: Grouping,
        endpoint: Box<dyn Endpoint>,
        supervisor: Addr<Supervisor>,
    ) -> std::io::Result<Self> {
        let (worker, life) = (setup.worker, setup.life);
        let (ended, accuser) = (supervisor.clone(), supervisor.clone());
        let body = move |endpoint, inbox| {
            let parts = match load(setup, &grouping, accuser) {
                Ok(parts) => parts,
                Err(error) => return Exit::NotLoaded(error),
            };
            match ExpertLoop::new(parts, grouping, endpoint, inbox) {
                Ok(data_loop) => {
                    supervisor.do_send(Loaded { worker, life });
                    data_loop.run()
                }
                Err(error) => Exit::NotLoaded(error),
            }
        };
        let ended = move |exit| ended.do_send(WorkerEnded { worker, life, exit });
        Ok(ExpertWorker {
            data_loop: DataLoop::start(worker, endpoint, body, ended)?,
        })
    }
}

fn load(
    setup: ExpertWorkerSetup,
    grouping: &Grouping,
    accuser: Addr<Supervisor>,
) -> Result<ExpertParts, String> {
    let worker = setup.worker;
    let mut progress = setup.progress.of(worker);
    // The first epochs have one map for all layers.
    let experts = grouping
        .placement
        .local_experts(volley_transports::Layer(0), worker.index);
    let module = ExpertModule::load(&*setup.weights, experts, setup.options, &mut progress)
        .map_err(|error| error.to_string())?;
    Ok(ExpertParts {
        worker,
        module,
        experts: experts.to_vec(),
        spec: setup.weights.spec().clone(),
        dtype: setup.config.dtype,
        shape: setup.shape,
        micro_batches: setup.config.micro_batches,
        clock: setup.clock,
        recorder: setup.timeline.recorder(worker),
        load: setup.load,
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

impl Actor for ExpertWorker {
    type Context = Context<Self>;
}

impl Handler<Regroup> for ExpertWorker {
    type Result = ();

    fn handle(&mut self, message: Regroup, _: &mut Self::Context) {
        self.data_loop.regroup(message.endpoint, message.grouping);
    }
}

impl Handler<CrashWorker> for ExpertWorker {
    type Result = ();

    fn handle(&mut self, _: CrashWorker, _: &mut Self::Context) {
        self.data_loop.crash();
    }
}

impl Handler<StopWorker> for ExpertWorker {
    type Result = MessageResult<StopWorker>;

    fn handle(&mut self, _: StopWorker, ctx: &mut Self::Context) -> Self::Result {
        ctx.stop();
        MessageResult(self.data_loop.stop())
    }
}
