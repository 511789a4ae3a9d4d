//! `volley vet probe`: measure one workload.

use clap::Args;
use serde_json::json;
use volley_collie::Verdict;

use super::subsystem::{SubsystemArgs, Unknown};
use super::workload::WorkloadArgs;
use super::{print, print_json};
use crate::failure::Failure;

#[derive(Debug, Args)]
pub(super) struct ProbeArgs {
    #[command(flatten)]
    target: SubsystemArgs,
    /// Seed of a model's noise
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    workload: WorkloadArgs,
    /// Print the measurement as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: ProbeArgs) -> Result<(), Failure> {
    let point = args.workload.point();
    args.target
        .with(None, args.seed, Unknown::LeaveOut, |subsystem, monitor| {
            subsystem
                .space()
                .admits(&point)
                .map_err(|error| Failure::new(error.to_string()))?;
            let (probe, bound) = (subsystem.probe(&point), subsystem.bound(&point));
            let verdict = monitor.judge(&probe, &bound);
            let owed = (monitor.throughput_min > 0.0).then_some(bound);
            let measurement = probe.outcome.ok();
            if args.json {
                return print_json(&json!({
                    "workload": point, "verdict": verdict, "owed": owed, "seconds": probe.seconds,
                    "counters": subsystem.counters(), "measurement": measurement,
                }));
            }
            print(&match &verdict {
                Verdict::Clean { .. } => "clean\n".to_owned(),
                Verdict::Anomalous { symptom, .. } => format!("anomalous: {symptom}\n"),
                Verdict::Invalid { reason } => format!("invalid: {reason}\n"),
            })?;
            let Some(measurement) = measurement else {
                return Ok(());
            };
            for (end, samples) in ["A", "B"].iter().zip(&measurement.ends) {
                for sample in samples {
                    print(&format!(
                        "  host {end} received {:9.3} Gb/s {:12.0} packets/s  pausing {:6.2} %  lost {:7.3} %\n",
                        sample.bits_per_s / 1e9,
                        sample.packets_per_s,
                        sample.pause_ratio * 100.0,
                        sample.loss_ratio * 100.0
                    ))?;
                }
            }
            for (name, value) in subsystem.counters().iter().zip(measurement.counters()) {
                print(&format!("  {name:28} {value:12.0} a second\n"))?;
            }
            Ok(())
        })
}
