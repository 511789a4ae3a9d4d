//! Starting an expert worker: what its data loop is made of.

use std::sync::Arc;

use actix::Addr;
use volley_models::ExpertModule;
use volley_transports::{Endpoint, Layer, WorkerId};

use super::data_loop::{ExpertCommand, ExpertLoop, ExpertParts};
use crate::placement_map::Grouping;
use crate::supervisor::{Accused, Supervisor};
use crate::worker::{Blueprint, Worker};

/// Starts the worker's thread, which loads the module.
pub(crate) fn start(
    blueprint: Arc<Blueprint>,
    worker: WorkerId,
    life: u64,
    grouping: Grouping,
    endpoint: Box<dyn Endpoint>,
    supervisor: Addr<Supervisor>,
) -> std::io::Result<Worker<ExpertCommand>> {
    let accuser = supervisor.clone();
    let load = move |endpoint, inbox| {
        let parts = load(&blueprint, worker, &grouping, accuser)?;
        ExpertLoop::new(parts, grouping, endpoint, inbox)
    };
    Worker::new(worker, life, endpoint, supervisor, load, ExpertLoop::run)
}

fn load(
    blueprint: &Blueprint,
    worker: WorkerId,
    grouping: &Grouping,
    accuser: Addr<Supervisor>,
) -> Result<ExpertParts, String> {
    let mut progress = blueprint.progress.of(worker);
    let member = blueprint.crew.join().map_err(|error| error.to_string())?;
    // The first placements have one map for all layers.
    let experts = grouping.placement.local_experts(Layer(0), worker.index);
    let module = ExpertModule::load(
        &*blueprint.weights,
        experts,
        blueprint.experts,
        member,
        &mut progress,
    )
    .map_err(|error| error.to_string())?;
    Ok(ExpertParts {
        worker,
        module,
        experts: experts.to_vec(),
        spec: blueprint.weights.spec().clone(),
        dtype: blueprint.config.dtype,
        shape: blueprint.shape,
        micro_batches: blueprint.config.micro_batches,
        peer_deadline: blueprint.config.peer_deadline,
        clock: blueprint.clock,
        recorder: blueprint.timeline.recorder(worker),
        load: Arc::clone(&blueprint.load),
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
