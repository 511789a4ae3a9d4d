//! What an expert worker's data loop is made of.

use std::sync::{Arc, mpsc};

use volley_models::ExpertModule;
use volley_transports::{Endpoint, WorkerId};

use super::compute::{ExpertCompute, Loaded};
use super::logic::{ExpertCommand, ExpertLogic, ExpertParts};
use crate::data_loop::{Exit, Signal, run};
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
    let holds = parts.module.holds();
    let logic = ExpertLogic::new(parts, blueprint.no_grouping()?, endpoint);
    let logic = logic.map_err(Exit::NotLoaded)?;
    said.say(WorkerWord::Loaded(holds));
    Ok(run(logic, &inbox))
}

fn load(
    blueprint: &Blueprint,
    worker: WorkerId,
    voice: Voice,
) -> Result<ExpertParts<Loaded>, Exit> {
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
        module: Loaded {
            module,
            weights: Arc::clone(&blueprint.weights),
        },
        hidden: blueprint.weights.spec().hidden,
        dtype: blueprint.config.dtype,
        shape: blueprint.shape,
        micro_batches: blueprint.config.micro_batches,
        peer_deadline: blueprint.config.peer_deadline,
        clock: blueprint.clock.clone(),
        recorder: blueprint.timeline.recorder(worker),
        load: Arc::clone(&blueprint.load),
        voice,
    })
}
