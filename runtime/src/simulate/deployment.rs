//! Which deployment is simulated: a plan's, a configuration's, or what flags say.

use std::path::Path;

use serde::Deserialize;
use serde_json::json;
use volley_planner::cost::Side;
use volley_planner::simulate::Deployed;
use volley_planner::{Deployment, Dtype, Hardware, ModelShape, Precision};

use super::SimulateArgs;
use crate::config::{ClusterOutline, Raw, environment};
use crate::failure::Failure;

/// Sequences of an attention worker in one micro-batch, where nothing says it.
const ROWS: usize = 64;

/// The parts of a plan that matter here.
#[derive(Deserialize)]
struct PlanFile {
    model: NamedModel,
    precision: Precision,
    transport: String,
    plan: Best,
}

#[derive(Deserialize)]
struct NamedModel {
    name: String,
}

#[derive(Deserialize)]
struct Best {
    best: Planned,
}

#[derive(Deserialize)]
struct Planned {
    deployment: Deployment,
}

/// What is simulated, resolved.
pub(super) struct Resolved {
    pub(super) model: ModelShape,
    pub(super) precision: Precision,
    pub(super) transport: String,
    pub(super) deployment: Deployment,
    /// What a configuration says beyond that.
    pub(super) outline: Option<ClusterOutline>,
}

/// The deployment that the arguments name.
pub(super) fn resolve(args: &SimulateArgs, hardware: &Hardware) -> Result<Resolved, Failure> {
    match (&args.plan, &args.config) {
        (Some(path), _) => of_plan(args, path),
        (None, Some(path)) => of_configuration(args, path, hardware),
        (None, None) => of_flags(args),
    }
}

fn of_flags(args: &SimulateArgs) -> Result<Resolved, Failure> {
    let (Some(model), Some(attention), Some(experts)) =
        (&args.model, &args.attention, &args.experts)
    else {
        return Err(Failure::new(
            "give --plan, --config, or --model, --attention and --experts",
        ));
    };
    let model = ModelShape::find(model)?;
    let expert_workers = args.expert_workers.map_or(model.experts, usize::from);
    Ok(Resolved {
        precision: Precision::of_weights(dtype(args.dtype.as_deref().unwrap_or("bf16"))?),
        transport: args.transport.clone().unwrap_or_else(|| "m2n".to_owned()),
        deployment: Deployment {
            attention: attention.0.clone(),
            attention_workers: args.attention_workers.into(),
            experts: experts.0.clone(),
            experts_per_worker: model.experts.div_ceil(expert_workers),
            expert_workers,
            micro_batches: args.micro_batches.into(),
            rows: args.rows.map_or(ROWS, |rows| rows as usize),
        },
        model,
        outline: None,
    })
}

fn of_plan(args: &SimulateArgs, path: &Path) -> Result<Resolved, Failure> {
    let text = std::fs::read_to_string(path).map_err(|error| Failure::file(path, &error))?;
    let plan: PlanFile = serde_json::from_str(&text).map_err(|error| {
        Failure::new(format!(
            "{}: {error}; it must be a plan: what `volley plan --json` prints",
            path.display()
        ))
    })?;
    let name = args.model.as_deref().unwrap_or(&plan.model.name);
    let model = ModelShape::find(name).map_err(|error| {
        Failure::new(format!(
            "{}: the plan is for the model {:?}: {error}; give its directory with --model",
            path.display(),
            plan.model.name
        ))
    })?;
    if !model.name.eq_ignore_ascii_case(&plan.model.name) {
        return Err(Failure::new(format!(
            "{}: the plan is for {}, not for {}; plan again with --model {name}",
            path.display(),
            plan.model.name,
            model.name
        )));
    }
    let deployment = plan.plan.best.deployment;
    if deployment.expert_workers * deployment.experts_per_worker < model.experts {
        return Err(Failure::new(format!(
            "{}: {} expert workers with {} experts each do not hold the {} experts of {}",
            path.display(),
            deployment.expert_workers,
            deployment.experts_per_worker,
            model.experts,
            model.name
        )));
    }
    Ok(Resolved {
        model,
        precision: match &args.dtype {
            Some(name) => Precision::of_weights(dtype(name)?),
            None => plan.precision,
        },
        transport: args.transport.clone().unwrap_or(plan.transport),
        deployment,
        outline: None,
    })
}

/// A `volley.toml` says how many workers there are, not on which hardware: that is said by flags, or it is the machine of the profile.
fn of_configuration(
    args: &SimulateArgs,
    path: &Path,
    hardware: &Hardware,
) -> Result<Resolved, Failure> {
    let raw = Raw::load(Some(path), environment(), &Default::default())?;
    let outline = raw.outline();
    let profiled = hardware.profile.as_ref();
    let configured = raw.model_path().map(|path| path.display().to_string());
    let name = args.model.clone().or(configured);
    let name = name.or_else(|| profiled.map(|profile| profile.model.name.clone()));
    let name = name.ok_or_else(|| {
        Failure::new(format!(
            "{}: names no model; give one with --model",
            path.display()
        ))
    })?;
    let model = match profiled {
        Some(profile) if profile.model.name == name => profile.model.clone(),
        _ => ModelShape::find(&name)?,
    };
    let side = |flag: &Option<super::flags::GpuFlag>, name: &str| {
        let given = flag.as_ref().map(|flag| flag.0.clone());
        let here = || {
            let gpu = profiled?.gpu.clone();
            Some(Side { gpu, tp: 1 })
        };
        given.or_else(here).ok_or_else(|| {
            Failure::new(format!(
                "{}: says how many workers there are, not on which hardware; give --{name} GPU, or with --hardware what `volley profile` wrote",
                path.display()
            ))
        })
    };
    let transport = match (&args.transport, profiled) {
        (Some(name), _) => name.clone(),
        (None, Some(_)) if outline.one_machine => "in-process".to_owned(),
        (None, _) => "m2n".to_owned(),
    };
    Ok(Resolved {
        precision: Precision::of_weights(dtype(args.dtype.as_deref().unwrap_or(outline.dtype))?),
        transport,
        deployment: Deployment {
            attention: side(&args.attention, "attention")?,
            attention_workers: outline.attention_workers.into(),
            experts: side(&args.experts, "experts")?,
            experts_per_worker: model.experts.div_ceil(outline.expert_workers.into()),
            expert_workers: outline.expert_workers.into(),
            micro_batches: outline.micro_batches.into(),
            rows: args
                .rows
                .or(outline.micro_batch_rows)
                .map_or(ROWS, |rows| rows as usize),
        },
        model,
        outline: Some(outline),
    })
}

impl Resolved {
    /// Sets what only a configuration says: the scheduler's limits, replicas, the size of the KV cache.
    pub(super) fn configure(&self, deployed: &mut Deployed) {
        let Some(outline) = &self.outline else {
            return;
        };
        deployed.shape.replicas |= outline.replicas;
        deployed.shape.max_rows = outline.max_batch_tokens;
        deployed.micro_batch_rows = outline.micro_batch_rows.unwrap_or(1);
        if let Some(bytes) = outline.kv_cache_bytes {
            let token = self.model.attention.cached_elements(1)
                * self.model.layers() as f64
                * self.precision.kv.bytes();
            let blocks = bytes as f64 / token / f64::from(deployed.shape.block_tokens);
            let least = deployed.shape.context.div_ceil(deployed.shape.block_tokens);
            deployed.shape.kv_blocks = (blocks as u32).clamp(least, deployed.shape.kv_blocks);
        }
    }
}

fn dtype(name: &str) -> Result<Dtype, Failure> {
    serde_json::from_value(json!(name)).map_err(|_| {
        Failure::new(format!(
            "there is no type {name:?}; known are f32, bf16, fp8, q8 and q4"
        ))
    })
}
