//! `volley vet preflight` and `volley vet watch`: what this host says of its RDMA devices, without root and without traffic of our own.

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;
use volley_collie::host::{
    Check, Finding, PortCounters, devices, interface, preflight, read_ethtool,
};
use volley_collie::{Bound, Measurement, Monitor, Probe, Sample, Verdict};

use super::{print, print_json};
use crate::failure::Failure;

/// Seconds that are watched, at most: an hour.
const SECONDS_MAX: u32 = 3600;

#[derive(Debug, Args)]
pub(super) struct PreflightArgs {
    /// The RDMA device, as in /sys/class/infiniband [default: every one]
    #[arg(long)]
    device: Option<String>,
    /// Its port
    #[arg(long, default_value_t = 1)]
    port: u8,
    /// The folder that stands for /, to look at the recorded files of another host
    #[arg(long, default_value = "/")]
    root: PathBuf,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct WatchArgs {
    /// The RDMA device, as in /sys/class/infiniband
    #[arg(long)]
    device: String,
    /// Its port
    #[arg(long, default_value_t = 1)]
    port: u8,
    /// Samples of a second each
    #[arg(long, default_value_t = 4)]
    seconds: u32,
    /// Share of packets that a clean run loses; ten times that, and at least a thousandth, is too much
    #[arg(long, default_value_t = 0.0)]
    clean_loss: f64,
    /// The folder that stands for /
    #[arg(long, default_value = "/", hide = true)]
    root: PathBuf,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run_preflight(args: PreflightArgs) -> Result<(), Failure> {
    let names = match &args.device {
        Some(name) => vec![name.clone()],
        None => devices(&args.root),
    };
    if names.is_empty() {
        return Err(Failure::new(
            "this host has no RDMA device: /sys/class/infiniband is empty. Load the adapter's driver, or `rdma link add rxe0 type rxe netdev IF` for one of software",
        ));
    }
    let checks: Vec<(String, Vec<Check>)> = names
        .into_iter()
        .map(|name| {
            let checks = preflight(&args.root, &name, args.port);
            (name, checks)
        })
        .collect();
    if args.json {
        let devices = checks
            .iter()
            .map(|(device, checks)| json!({ "device": device, "checks": checks }));
        print_json(&devices.collect())?;
    } else {
        for (device, checks) in &checks {
            print(&format!("{device}, port {}\n", args.port))?;
            for check in checks {
                let finding = match check.finding {
                    Finding::Good => "good",
                    Finding::Warning => "warning",
                    Finding::Bad => "BAD",
                    Finding::Unknown => "unknown",
                };
                print(&format!(
                    "  {finding:8} {:20} {}\n",
                    check.what, check.found
                ))?;
                if let Some(remedy) = check.remedy {
                    print(&format!("           {remedy}\n"))?;
                }
            }
        }
    }
    let all = checks.iter().flat_map(|(_, checks)| checks);
    match all.filter(|check| check.finding == Finding::Bad).count() {
        0 => Ok(()),
        bad => Err(Failure::new(format!("{bad} checks are bad"))),
    }
}

pub(super) fn run_watch(args: WatchArgs) -> Result<(), Failure> {
    if !(1..=SECONDS_MAX).contains(&args.seconds) {
        return Err(Failure::new(format!(
            "--seconds is {}: give 1 to {SECONDS_MAX}",
            args.seconds
        )));
    }
    if !(0.0..1.0).contains(&args.clean_loss) {
        return Err(Failure::new(format!(
            "--clean-loss is {}: give a share from 0 up to 1",
            args.clean_loss
        )));
    }
    let port = PortCounters::open(&args.root, &args.device, args.port)
        .map_err(|error| Failure::new(error.to_string()))?;
    let name = interface(&args.root, &args.device);
    let read = || {
        let of_interface = name.as_deref().map(read_ethtool).unwrap_or_default();
        (Instant::now(), port.read().and(of_interface))
    };
    let mut samples: Vec<Sample> = Vec::new();
    let (mut at, mut last) = read();
    let (began, first) = (at, last.clone());
    for _ in 0..args.seconds {
        thread::sleep(Duration::from_secs(1));
        let (now, values) = read();
        samples.push(values.since(&last).sample((now - at).as_secs_f64()));
        (at, last) = (now, values);
    }
    let growth = last.since(&first);
    // What an application's traffic is owed nobody knows here: pauses and losses are judged.
    let monitor = Monitor {
        throughput_min: 0.0,
        ..Monitor::lossy(args.clean_loss)
    };
    let bound = Bound {
        bits_per_s: 1.0,
        packets_per_s: 1.0,
    };
    let seconds = (at - began).as_secs_f64();
    let probe = Probe {
        seconds,
        outcome: Ok(Measurement {
            ends: [samples.clone(), Vec::new()],
        }),
    };
    let verdict = monitor.judge(&probe, &bound);
    if args.json {
        print_json(
            &json!({ "device": args.device, "verdict": verdict, "samples": samples, "grown": growth.0, "seconds": seconds }),
        )?;
    } else {
        for (second, sample) in samples.iter().enumerate() {
            print(&format!(
                "{:4} s  received {:8.3} Gb/s {:10.0} packets/s  pausing {:6.2} %  lost {:7.3} %\n",
                second + 1,
                sample.bits_per_s / 1e9,
                sample.packets_per_s,
                sample.pause_ratio * 100.0,
                sample.loss_ratio * 100.0
            ))?;
        }
        for (name, value) in growth.0.iter().filter(|(_, value)| **value > 0) {
            print(&format!("  {name:32} +{value}\n"))?;
        }
    }
    match verdict {
        Verdict::Clean { .. } => Ok(()),
        Verdict::Anomalous { symptom, .. } => Err(Failure::new(format!("anomalous: {symptom}"))),
        Verdict::Invalid { reason } => Err(Failure::new(format!(
            "nothing can be said: {reason}. Watch while the application runs"
        ))),
    }
}
