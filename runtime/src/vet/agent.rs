//! `volley vet agent` and `volley vet calibrate`: what a vetting of real adapters needs beside the search.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde_json::json;
use volley_collie::engine::{Agent, AgentOptions};

use super::subsystem::{AdapterArgs, calibrate, save, show};
use super::{print, print_json, read_space};
use crate::failure::Failure;

#[derive(Debug, Args)]
pub(super) struct AgentArgs {
    /// Management address to listen on. Whoever reaches it can make this host's adapters send: keep it from others, or use 127.0.0.1 behind a tunnel
    #[arg(long, value_name = "ADDR:PORT")]
    listen: SocketAddr,
    /// Seconds that a coordinator may rest between two workloads
    #[arg(long, default_value_t = 120)]
    rest: u64,
    /// End after the first coordinator
    #[arg(long)]
    once: bool,
}

#[derive(Debug, Args)]
pub(super) struct CalibrateArgs {
    #[command(flatten)]
    adapters: AdapterArgs,
    /// Only what these workloads need (TOML; keys left out keep their published range)
    #[arg(long)]
    space: Option<PathBuf>,
    /// Write it here, for --bounds
    #[arg(long)]
    out: Option<PathBuf>,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run_agent(args: &AgentArgs) -> Result<(), Failure> {
    let options = AgentOptions {
        listen: args.listen,
        rest: Duration::from_secs(args.rest),
    };
    let failed = |error| Failure::new(format!("--listen {}: {error}", args.listen));
    let agent = Agent::bind(&options).map_err(failed)?;
    print(&format!(
        "listening on {}\n",
        agent.address().map_err(failed)?
    ))?;
    loop {
        agent
            .serve_one(&mut |note| eprintln!("{note}"))
            .map_err(failed)?;
        if args.once {
            return Ok(());
        }
    }
}

pub(super) fn run_calibrate(args: &CalibrateArgs) -> Result<(), Failure> {
    let space = args.space.as_deref().map(read_space).transpose()?;
    let mut adapters = args.adapters.open(space.as_ref())?;
    let known = calibrate(&mut adapters)?;
    if let Some(path) = &args.out {
        save(path, &known)?;
    }
    if args.json {
        print_json(&json!(known))
    } else {
        show(&known)
    }
}
