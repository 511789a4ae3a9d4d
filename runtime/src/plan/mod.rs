//! `volley plan`: which hardware for which side, how many workers, which batch, what it will deliver, and the configuration that runs it.

mod anomalies;
mod print;
mod toml;

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use serde_json::json;
use volley_planner::{
    Candidate, Dtype, Hardware, ModelShape, Objective, Precision, Request, Setting, Workload, plan,
};

use crate::failure::Failure;

/// Plan a deployment.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct PlanArgs {
    /// A directory with a config.json, or a name: mixtral-8x7b, mixtral-8x22b, dbrx, scaled-moe, qwen3-30b-a3b, deepseek-v3
    #[arg(long, value_name = "MODEL")]
    model: String,
    /// GPUs, prices and what is reached of them (TOML), over the catalogue inside the program; or what `volley profile` wrote
    #[arg(long, value_name = "FILE")]
    hardware: Option<PathBuf>,
    /// Longest time between two tokens of a request
    #[arg(long, value_name = "TIME", default_value = "150ms")]
    slo_tpot: Latency,
    /// What is made as large as possible
    #[arg(long, value_enum, default_value_t = ObjectiveFlag::ThroughputPerCost)]
    objective: ObjectiveFlag,
    /// Requests whose lengths are planned for: a JSON object a line
    #[arg(long, value_name = "FILE", conflicts_with_all = ["mean_input", "mean_output"])]
    workload: Option<PathBuf>,
    /// Mean tokens of a prompt
    #[arg(long, value_name = "TOKENS", default_value_t = Workload::PAPER.mean_input)]
    mean_input: f64,
    /// Mean tokens of an answer
    #[arg(long, value_name = "TOKENS", default_value_t = Workload::PAPER.mean_output)]
    mean_output: f64,
    /// Rows of the busiest expert worker by the mean
    #[arg(long, value_name = "RATIO", default_value_t = 1.0)]
    imbalance: f64,
    /// GPUs there are, of all types together
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    gpus: Option<u32>,
    /// Types allowed for attention [default: all]
    #[arg(long, value_name = "GPU,...", value_delimiter = ',')]
    attention_gpu: Vec<String>,
    /// Types allowed for experts [default: all]
    #[arg(long, value_name = "GPU,...", value_delimiter = ',')]
    expert_gpu: Vec<String>,
    /// Type of the weights
    #[arg(long, value_enum, default_value_t = DtypeFlag::Bf16)]
    dtype: DtypeFlag,
    /// Transport between the sides: m2n, nccl, or one of the hardware file's
    #[arg(long, value_name = "NAME", default_value = "m2n")]
    transport: String,
    /// Known anomalies of the RDMA subsystem (`volley vet search --out`): a plan whose traffic meets one is refused
    #[arg(long, value_name = "FILE")]
    anomalies: Option<PathBuf>,
    /// Change MTU, queue pairs, doorbell batch, depth and message size until no known anomaly is met
    #[arg(long, requires = "anomalies")]
    reshape: bool,
    /// Write the configuration that `serve` and `worker` run
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

const AFTER_HELP: &str = "\
Examples:
  volley plan --model mixtral-8x22b --slo-tpot 150ms
  volley plan --model dbrx --attention-gpu H20 --expert-gpu L40S --objective per-watt
  volley plan --model ~/models/Mixtral-8x7B --hardware mine.toml --gpus 64 --workload trace.jsonl --out volley.toml
  volley plan --model deepseek-v3 --dtype fp8 --anomalies anomalies.json --reshape --json

Exit code 1 if there is no plan; standard error says which constraint to relax, and by how much. docs/planner.md says what is assumed.";

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ObjectiveFlag {
    ThroughputPerCost,
    PerGpu,
    PerWatt,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum DtypeFlag {
    F32,
    Bf16,
    Fp8,
    Q8,
    Q4,
}

/// A time with its unit, in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Latency(f64);

impl FromStr for Latency {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let units = [("us", 1e-6), ("ms", 1e-3), ("s", 1.0)];
        let parsed = units.iter().find_map(|(unit, seconds)| {
            let number: f64 = text.strip_suffix(unit)?.trim().parse().ok()?;
            Some(number * seconds)
        });
        match parsed.filter(|seconds| seconds.is_finite() && *seconds > 0.0) {
            Some(seconds) => Ok(Latency(seconds)),
            None => Err("write a positive number with its unit: 150ms, 0.15s or 900us".to_owned()),
        }
    }
}

/// Runs the command.
///
/// # Errors
/// What was wrong with the input, that nothing meets the constraints, or that the traffic meets a known anomaly.
pub(crate) fn run(args: PlanArgs) -> Result<(), Failure> {
    let hardware = match &args.hardware {
        Some(path) => Hardware::with_file(path)?,
        None => Hardware::embedded(),
    };
    let model = ModelShape::find(&args.model)?;
    let mut workload = match &args.workload {
        Some(path) => Workload::from_trace(path)?,
        None => Workload {
            mean_input: args.mean_input,
            mean_output: args.mean_output,
            imbalance: 1.0,
        },
    };
    workload.imbalance = args.imbalance;
    let dtype = match args.dtype {
        DtypeFlag::F32 => Dtype::F32,
        DtypeFlag::Bf16 => Dtype::Bf16,
        DtypeFlag::Fp8 => Dtype::Fp8,
        DtypeFlag::Q8 => Dtype::Q8,
        DtypeFlag::Q4 => Dtype::Q4,
    };
    let precision = Precision::of_weights(dtype);
    let setting = Setting {
        hardware: &hardware,
        model: &model,
        precision: &precision,
        workload: &workload,
        transport: &args.transport,
    };
    let request = Request {
        slo_s: args.slo_tpot.0,
        objective: match args.objective {
            ObjectiveFlag::ThroughputPerCost => Objective::ThroughputPerCost,
            ObjectiveFlag::PerGpu => Objective::PerGpu,
            ObjectiveFlag::PerWatt => Objective::PerWatt,
        },
        gpus: args.gpus.map(|gpus| gpus as usize),
        attention_gpus: args.attention_gpu.clone(),
        expert_gpus: args.expert_gpu.clone(),
        attention_workers_max: 1024,
    };
    let found = plan(setting, &request)?;
    let traffic = match &args.anomalies {
        Some(path) => Some(anomalies::vet(path, setting, &found.best, args.reshape)?),
        None => None,
    };
    if let Some(path) = &args.out {
        let text = toml::configuration(&args.model, setting, dtype, &found.best, traffic.as_ref())?;
        std::fs::write(path, text).map_err(|error| Failure::file(path, &error))?;
    }
    if args.json {
        let document = json!({
            "model": model, "workload": workload, "precision": precision, "transport": args.transport,
            "plan": found, "traffic": traffic,
        });
        return print::out(&format!("{document:#}\n"));
    }
    let mut text = print::plan(setting, &request, &found);
    if let Some(traffic) = &traffic {
        text += &traffic.to_string();
    }
    if let Some(path) = &args.out {
        text += &format!("configuration    {}\n", path.display());
    }
    print::out(&text)
}

/// Rows of one message from an attention worker to an expert worker, on average.
fn rows_to_each(candidate: &Candidate, model: &ModelShape) -> f64 {
    let deployment = &candidate.deployment;
    let visited = volley_planner::cost::workers_visited(
        model.experts,
        model.top_k,
        deployment.experts_per_worker,
    );
    deployment.rows as f64 * visited / deployment.expert_workers as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_latency_has_a_unit() {
        assert_eq!("150ms".parse(), Ok(Latency(0.15)));
        assert_eq!("2s".parse(), Ok(Latency(2.0)));
        for wrong in ["150", "-1ms", "0s", "ms", "infs", ""] {
            assert!(wrong.parse::<Latency>().is_err(), "{wrong}");
        }
    }
}
