//! `volley vet evaluate`: every strategy over many seeds against causes that are known.

use std::fs;
use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use volley_collie::{Strategy, evaluate, evaluation_markdown, evaluation_svg};

use super::subsystem::model;
use super::{positive_hours, print, print_json};
use crate::failure::Failure;

#[derive(Debug, Args)]
pub(super) struct EvaluateArgs {
    /// F, H or random:SEED
    #[arg(long)]
    subsystem: String,
    /// Seeds 0 up to this
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// Simulated hours of each search
    #[arg(long, default_value_t = 10.0)]
    hours: f64,
    /// Plot every strategy's curve here, as SVG
    #[arg(long)]
    plot: Option<PathBuf>,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &EvaluateArgs) -> Result<(), Failure> {
    let hours = positive_hours(args.hours)?;
    if args.seeds == 0 {
        return Err(Failure::new("--seeds is 0: give at least 1"));
    }
    let evaluation = evaluate(&model(&args.subsystem)?, &Strategy::ALL, args.seeds, hours);
    if let Some(path) = &args.plot {
        fs::write(path, evaluation_svg(&evaluation))
            .map_err(|error| Failure::file(path, &error))?;
    }
    if args.json {
        print_json(&json!(evaluation))
    } else {
        print(&evaluation_markdown(&evaluation))
    }
}
