//! The command line: what `volley` can do, and how it ends.

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::failure::Failure;
use crate::{
    bench, build, certs, doctor, drain, generate, manual, plan, profile, reproduce, scheduler,
    serve, simulate, top, trace, validate, vet, worker,
};

/// Serves large Mixture-of-Experts language models with attention and experts disaggregated.
#[derive(Debug, Parser)]
#[command(name = "volley", version, long_version = build::LONG_VERSION.as_str(), max_term_width = 110, after_help = AFTER_HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
Examples:
  volley generate --prompt 'ROMEO:'                the demo model inside the program
  volley serve --model ~/models/Mixtral-8x7B       an OpenAI-compatible server
  volley validate --config volley.toml             check everything before it counts
  volley help serve                                all flags of a command

Exit codes: 0 success, 1 failure (standard error says why), 2 a command line that cannot be understood.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a model over an OpenAI-compatible HTTP API
    Serve(serve::ServeArgs),
    /// Run one attention or expert worker that joins a server
    Worker(worker::WorkerArgs),
    /// Run a scheduler that offers itself to a server, or stands by
    Scheduler(scheduler::SchedulerArgs),
    /// Make certificates for the processes of a cluster
    Certs(certs::CertsArgs),
    /// Check this host, and the way to the controller
    Doctor(doctor::DoctorArgs),
    /// Move a worker's work elsewhere, so that it can be stopped
    Drain(drain::DrainArgs),
    /// Generate text in the terminal
    Generate(generate::GenerateArgs),
    /// Measure speed: the engine offline, or any OpenAI-compatible server by its URL
    Bench(bench::BenchArgs),
    /// Check configuration, model, memory and port without serving
    Validate(validate::ValidateArgs),
    /// Watch a server: workers, time on each side, queue, experts, hops
    Top(top::TopArgs),
    /// Record a timeline of attention and experts at work, and say what it shows
    Trace(trace::TraceArgs),
    /// Plan a deployment: GPUs, workers, batch, and what they will deliver
    Plan(Box<plan::PlanArgs>),
    /// Measure this machine for the planner, and check what it foretells
    Profile(Box<profile::ProfileArgs>),
    /// Compute the MegaScale-Infer paper's evaluation from first principles
    Reproduce(reproduce::ReproduceArgs),
    /// Serve a trace on a planned deployment in virtual time
    Simulate(simulate::SimulateArgs),
    /// Find RDMA workloads that a subsystem handles badly, and keep clear of them
    Vet(vet::VetArgs),
    /// Explain the keys of the configuration
    Config(manual::ConfigArgs),
    /// Print completions for a shell
    Completions(manual::CompletionsArgs),
    /// Write manual pages, one for each command
    Manual(manual::ManualArgs),
}

/// Runs the command that the process's arguments ask for.
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Serve(args) => serve::run(args),
        Command::Worker(args) => worker::run(args),
        Command::Scheduler(args) => scheduler::run(args),
        Command::Certs(args) => certs::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Drain(args) => drain::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Validate(args) => validate::run(args),
        Command::Trace(args) => trace::run(args),
        Command::Plan(args) => plan::run(*args),
        Command::Profile(args) => profile::run(*args),
        Command::Reproduce(args) => reproduce::run(args),
        Command::Simulate(args) => simulate::run(args),
        Command::Vet(args) => vet::run(args),
        Command::Top(args) => top::run(args),
        Command::Config(args) => manual::config(args),
        Command::Completions(args) => manual::completions(&args, Cli::command()),
        Command::Manual(args) => manual::manual(&args, Cli::command()),
    };
    exit(result)
}

/// What a command's end means for whoever started the process.
pub(crate) fn exit(result: Result<(), Failure>) -> ExitCode {
    match result {
        Ok(()) | Err(Failure::OutputClosed) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("volley: {failure}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clap_finds_no_fault_with_the_flags() {
        Cli::command().debug_assert();
    }
}
