//! The configuration that runs a plan.

use std::fmt::Write as _;
use std::path::Path;

use toml::Value;
use volley_planner::{Candidate, Dtype, Setting};

use super::anomalies::Traffic;
use crate::config::Raw;
use crate::failure::Failure;

/// A `volley.toml` that `serve` and `worker` take, checked as they would check it. What the file has no key for stands in its comments.
pub(super) fn configuration(
    model: &str,
    setting: Setting<'_>,
    dtype: Dtype,
    candidate: &Candidate,
    traffic: Option<&Traffic>,
) -> Result<String, Failure> {
    let deployment = &candidate.deployment;
    let tp = deployment.attention.tp as f64;
    let memory = &candidate.outlook.attention_memory;
    let (weights, quantize) = match dtype {
        Dtype::F32 => ("f32", "none"),
        Dtype::Bf16 => ("bf16", "none"),
        Dtype::Q8 => ("bf16", "q8"),
        Dtype::Q4 => ("bf16", "q4"),
        Dtype::Fp8 => {
            return Err(Failure::new(
                "a plan with --dtype fp8 can be looked at, but no configuration runs it: workers compute in f32, bf16, q8 and q4; leave out --out",
            ));
        }
    };
    let mut text = format!(
        "# Written by `volley plan`: {}, {:.2} ms a step, {:.0} tokens/s.\n\
         # An attention worker is {} x {}, an expert worker {} x {}.\n",
        setting.model.name,
        candidate.outlook.step_s * 1e3,
        candidate.rates.tokens_per_s,
        deployment.attention.tp,
        deployment.attention.gpu,
        deployment.experts.tp,
        deployment.experts.gpu
    );
    if let Some(traffic) = traffic {
        for line in traffic.to_string().lines() {
            let _ = writeln!(text, "# {line}");
        }
    }
    text += "\n[model]\n";
    if Path::new(model).exists() {
        let path = std::path::absolute(model).unwrap_or_else(|_| model.into());
        let _ = writeln!(text, "path = {}", Value::String(path.display().to_string()));
    } else {
        text += "# path = \"/models/...\"   the directory of the checkpoint\n";
    }
    let transport = if traffic.is_some() {
        "transport = \"rdma\"\n"
    } else {
        ""
    };
    let _ = write!(
        text,
        "dtype = \"{weights}\"\nquantize = \"{quantize}\"\n\n[cluster]\nisolate = \"host\"\n{transport}attention_workers = {}\nexpert_workers = {}\nmicro_batches = {}\nmicro_batch_rows = {}\n\n\
         [limits]\nmax_batch_tokens = {}\nkv_cache_memory = {}\n",
        deployment.attention_workers,
        deployment.expert_workers,
        deployment.micro_batches,
        deployment.rows,
        deployment.rows.max(512),
        // Of a worker: what its GPUs hold together.
        (memory.kv * tp).ceil() as u64
    );
    if let Some(traffic) = traffic {
        text += &traffic.section();
    }
    check(&text)?;
    Ok(text)
}

fn check(text: &str) -> Result<(), Failure> {
    let unwritable = |error| {
        Failure::new(format!(
            "a file to check the configuration cannot be written: {error}"
        ))
    };
    let file = tempfile::Builder::new()
        .suffix(".toml")
        .tempfile()
        .map_err(unwritable)?;
    std::fs::write(file.path(), text).map_err(unwritable)?;
    Raw::load(Some(file.path()), std::iter::empty(), &Default::default())?;
    Ok(())
}
