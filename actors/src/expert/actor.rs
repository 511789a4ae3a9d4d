//! What an expert worker's data loop is made of.

use std::sync::{Arc, mpsc};

use volley_models::ExpertModule;
use volley_transports::{Endpoint, WorkerId};

use super::data_loop::{ExpertCommand, ExpertLoop, ExpertParts};
use crate::data_loop::{Exit, Signal};
use crate::voice::{Voice, WorkerWord};
use crate::worker::{Blueprint, Life};

/// The body of the worker's thread: loads the module, says so, and serves.
pub(crate) fn live(
    blueprint: &Blueprint,
    worker: WorkerId,
    voice: Voice,
    endpoint: Box<dyn Endpoint>,
    inbox: mpsc::Receiver<Signal<ExpertCommand>>,
) -> Life {
    let said = voice.clone();
    let parts = load(blueprint, worker, voice)?;
    let holds = parts.module.experts().collect();
    let data_loop = ExpertLoop::new(parts, blueprint.no_grouping()?, endpoint, inbox);
    let data_loop = data_loop.map_err(Exit::NotLoaded)?;
    said.say(WorkerWord::Loaded(holds));
    Ok(data_loop.run())
}

fn load(blueprint: &Blueprint, worker: WorkerId, voice: Voice) -> Result<ExpertParts, Exit> {
    let mut progress = blueprint.progress.of(worker);
    let member = blueprint.join_crew()?;
    let roster = blueprint.config.roster(blueprint.weights.spec());
    let experts = roster.home(worker.index).map_err(Exit::not_loaded)?;
    let module = ExpertModule::load(
        &*blueprint.weights,
        &experts,
        blueprint.experts,
        member,
        &mut progress,
    )
    .map_err(Exit::not_loaded)?;
    Ok(ExpertParts {
        worker,
        module,
        weights: Arc::clone(&blueprint.weights),
        spec: blueprint.weights.spec().clone(),
        dtype: blueprint.config.dtype,
        shape: blueprint.shape,
        micro_batches: blueprint.config.micro_batches,
        peer_deadline: blueprint.config.peer_deadline,
        clock: blueprint.clock,
        recorder: blueprint.timeline.recorder(worker),
        load: Arc::clone(&blueprint.load),
        voice,
    })
}
