//! `volley vet`: find the RDMA workloads that a subsystem handles badly, and keep clear of them.

mod agent;
mod evaluate;
mod host;
mod journal;
mod known;
mod probe;
mod search;
mod subsystem;
mod workload;

use std::fs;
use std::io::Write;
use std::path::Path;

use clap::{Args, Subcommand};
use serde::de::DeserializeOwned;
use volley_collie::Space;

use crate::failure::Failure;

/// Find RDMA workloads that a subsystem handles badly, and keep clear of them.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct VetArgs {
    #[command(subcommand)]
    command: Vet,
}

const AFTER_HELP: &str = "\
  volley vet preflight                                                exit code 1 if a check is bad
  volley vet watch --device mlx5_0 --seconds 10                       exit code 1 on pauses or losses
  volley vet agent --listen 10.0.0.2:7471                             on host B, an address for management
  volley vet calibrate --devices mlx5_0,mlx5_0 --agent 10.0.0.2:7471 --out bounds.json
  volley vet search --devices mlx5_0,mlx5_0 --agent 10.0.0.2:7471 --bounds bounds.json --journal j.jsonl --out anomalies.json
  volley vet probe --devices mlx5_0,mlx5_1 --operation rc-write --qps 8 --batch 16
  volley vet search --subsystem F --hours 10 --out anomalies.json --report anomalies.html
  volley vet match --anomalies anomalies.json --workload mine.json    exit code 1 if it meets one
  volley vet restrict --anomalies anomalies.json --space mine.toml    what a design must avoid
  volley vet diff old.json new.json                                   exit code 1 if anomalies appeared
  volley vet clear --anomalies anomalies.json --workload mine.json --may-change batch,sges
  volley vet evaluate --subsystem F --seeds 100 --plot curves.svg     the search against its rivals

A subsystem is two adapters (--devices), or a model (--subsystem): F and H are the paper's, random:SEED is drawn from a grammar of conditions.";

#[derive(Debug, Subcommand)]
enum Vet {
    /// Search a subsystem for anomalies, and learn what each needs
    Search(search::SearchArgs),
    /// Measure one workload
    Probe(probe::ProbeArgs),
    /// Measure what two adapters owe, by plain traffic
    Calibrate(agent::CalibrateArgs),
    /// Serve this host's adapters to a search on another host
    Agent(agent::AgentArgs),
    /// Say which known anomalies a workload meets, and each way out
    Match(known::MatchArgs),
    /// Change a workload's settings, where they may be changed, until it meets no known anomaly
    Clear(known::ClearArgs),
    /// Look at this host's configuration: link, PCIe, NUMA, ordering, ACS, MTU, GIDs, flow control, memlock
    Preflight(host::PreflightArgs),
    /// Watch a device's pauses and losses while an application runs
    Watch(host::WatchArgs),
    /// Say what workloads of a space must avoid
    Restrict(known::RestrictArgs),
    /// Write the report of a file of known anomalies
    Report(known::ReportArgs),
    /// Compare two files of known anomalies, as of two firmware versions
    Diff(known::DiffArgs),
    /// Run every strategy over many seeds against causes that are known
    Evaluate(evaluate::EvaluateArgs),
}

/// Runs the command.
///
/// # Errors
/// What was wrong with the input, or that a check failed.
pub(crate) fn run(args: VetArgs) -> Result<(), Failure> {
    match args.command {
        Vet::Search(args) => search::run(&args),
        Vet::Probe(args) => probe::run(args),
        Vet::Calibrate(args) => agent::run_calibrate(&args),
        Vet::Agent(args) => agent::run_agent(&args),
        Vet::Match(args) => known::match_workload(args),
        Vet::Clear(args) => known::clear(args),
        Vet::Restrict(args) => known::restrict(args),
        Vet::Report(args) => known::report(args),
        Vet::Diff(args) => known::diff(args),
        Vet::Preflight(args) => host::run_preflight(args),
        Vet::Watch(args) => host::run_watch(args),
        Vet::Evaluate(args) => evaluate::run(&args),
    }
}

fn positive_hours(hours: f64) -> Result<f64, Failure> {
    if hours.is_finite() && hours > 0.0 {
        return Ok(hours);
    }
    Err(Failure::new(format!(
        "--hours is {hours}: give a number over 0"
    )))
}

fn print(text: &str) -> Result<(), Failure> {
    std::io::stdout()
        .write_all(text.as_bytes())
        .map_err(Failure::output)
}

fn print_json(value: &serde_json::Value) -> Result<(), Failure> {
    print(&format!("{value:#}\n"))
}

/// A file in JSON, or in TOML if that is its name's end.
fn read<T: DeserializeOwned>(path: &Path) -> Result<T, Failure> {
    let text = fs::read_to_string(path).map_err(|error| Failure::file(path, &error))?;
    let wrong = |error: String| Failure::new(format!("{}: {error}", path.display()));
    if path.extension().is_some_and(|end| end == "json") {
        serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))
    } else {
        toml::from_str(&text).map_err(|error| wrong(error.to_string()))
    }
}

fn read_space(path: &Path) -> Result<Space, Failure> {
    let space: Space = read(path)?;
    space
        .checked()
        .map_err(|error| Failure::new(format!("{}: {error}", path.display())))
}
