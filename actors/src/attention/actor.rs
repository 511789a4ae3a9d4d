//! Starting an attention worker: what its data loop is made of, and whom it reports to.

use std::sync::Arc;

use actix::prelude::*;
use volley_models::AttentionModule;
use volley_transports::{Endpoint, WorkerId};

use super::data_loop::{AttentionLoop, AttentionParts};
use crate::placement_map::Grouping;
use crate::protocol::{AttentionCommand, StepReport};
use crate::supervisor::{Accused, Supervisor};
use crate::worker::{Blueprint, Worker};

/// Starts the worker's thread, which loads the module; its reports go to `frontend`.
pub(crate) fn start(
    blueprint: Arc<Blueprint>,
    worker: WorkerId,
    life: u64,
    grouping: Grouping,
    endpoint: Box<dyn Endpoint>,
    supervisor: Addr<Supervisor>,
    frontend: Recipient<StepReport>,
) -> std::io::Result<Worker<AttentionCommand>> {
    let accuser = supervisor.clone();
    let load = move |endpoint, inbox| {
        let parts = load(&blueprint, worker, accuser, frontend)?;
        AttentionLoop::new(parts, grouping, endpoint, inbox)
    };
    Worker::new(worker, life, endpoint, supervisor, load, AttentionLoop::run)
}

fn load(
    blueprint: &Blueprint,
    worker: WorkerId,
    accuser: Addr<Supervisor>,
    frontend: Recipient<StepReport>,
) -> Result<AttentionParts, String> {
    let mut progress = blueprint.progress.of(worker);
    let member = blueprint.crew.join().map_err(|error| error.to_string())?;
    let options = blueprint.attention;
    let module = AttentionModule::load(&*blueprint.weights, options, member, &mut progress)
        .map_err(|error| error.to_string())?;
    let config = &blueprint.config;
    Ok(AttentionParts {
        worker,
        activations: (0..config.micro_batches)
            .map(|_| module.activations())
            .collect(),
        module,
        spec: blueprint.weights.spec().clone(),
        dtype: config.dtype,
        shape: blueprint.shape,
        kv_blocks: config.kv_blocks,
        block_tokens: config.block_tokens,
        peer_deadline: config.peer_deadline,
        clock: blueprint.clock,
        recorder: blueprint.timeline.recorder(worker),
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
