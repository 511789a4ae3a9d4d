//! What an attention worker's data loop is made of.

use std::sync::mpsc;

use volley_models::AttentionModule;
use volley_transports::{Endpoint, WorkerId};

use super::compute::Outline;
use super::logic::{AttentionLogic, AttentionParts};
use crate::data_loop::{Exit, Signal, run};
use crate::protocol::AttentionCommand;
use crate::voice::{Voice, WorkerWord};
use crate::worker::{Blueprint, Life};

/// The body of the worker's thread: loads the module, says so, and serves.
pub(crate) fn live(
    blueprint: &Blueprint,
    worker: WorkerId,
    voice: Voice,
    endpoint: Box<dyn Endpoint>,
    inbox: mpsc::Receiver<Signal<AttentionCommand>>,
) -> Life {
    let said = voice.clone();
    let parts = load(blueprint, worker, voice)?;
    let logic = AttentionLogic::new(parts, blueprint.no_grouping()?, endpoint);
    let logic = logic.map_err(Exit::NotLoaded)?;
    said.say(WorkerWord::Loaded(Vec::new()));
    Ok(run(logic, &inbox))
}

fn load(
    blueprint: &Blueprint,
    worker: WorkerId,
    voice: Voice,
) -> Result<AttentionParts<AttentionModule>, Exit> {
    let mut progress = blueprint.progress.of(worker);
    let member = blueprint.join_crew()?;
    let options = blueprint.attention;
    let module = AttentionModule::load(&*blueprint.weights, options, member, &mut progress)
        .map_err(Exit::not_loaded)?;
    let config = &blueprint.config;
    Ok(AttentionParts {
        worker,
        activations: (0..config.micro_batches)
            .map(|_| module.activations())
            .collect(),
        module,
        outline: Outline::from(blueprint.weights.spec()),
        dtype: config.dtype,
        shape: blueprint.shape,
        kv_blocks: config.kv_blocks,
        block_tokens: config.block_tokens,
        peer_deadline: config.peer_deadline,
        hops_are_named: blueprint.apart,
        clock: blueprint.clock.clone(),
        recorder: blueprint.timeline.recorder(worker),
        voice,
    })
}
