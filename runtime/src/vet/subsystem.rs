//! What is searched or probed: a model, or two adapters with what they owe.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use volley_collie::engine::{Adapters, Calibration, Place, Progress, Timing};
use volley_collie::{Model, Monitor, Simulated, Space, Subsystem};

use super::print;
use crate::failure::Failure;

/// A model, or two adapters.
#[derive(Debug, Args)]
pub(super) struct SubsystemArgs {
    /// A model: F, H or random:SEED
    #[arg(long, required_unless_present = "devices", conflicts_with_all = ["devices", "agent", "bounds", "lossy", "loss_max", "throughput_min"])]
    subsystem: Option<String>,
    #[command(flatten)]
    adapters: AdapterArgs,
    /// What plain traffic reaches, as `volley vet calibrate` writes it. A search measures it first where the file is not there, and writes it
    #[arg(long)]
    bounds: Option<PathBuf>,
    /// The fabric has no flow control: judge losses, over ten times those of plain traffic and over a thousandth
    #[arg(long)]
    lossy: bool,
    /// Judge losses over this share of packets, whatever plain traffic lost
    #[arg(long, value_name = "SHARE")]
    loss_max: Option<f64>,
    /// Throughput below this share of what is owed is too little
    #[arg(long, default_value_t = 0.8)]
    throughput_min: f64,
}

/// Two adapters and how they are measured.
#[derive(Debug, Args)]
pub(super) struct AdapterArgs {
    /// Devices of hosts A and B, as in /sys/class/infiniband: mlx5_0,mlx5_1; a second port is mlx5_0:2
    #[arg(long, value_name = "A,B", value_delimiter = ',')]
    devices: Vec<String>,
    /// Management address of `volley vet agent` on host B [default: B is this host]
    #[arg(long, value_name = "HOST:PORT")]
    agent: Option<String>,
    /// Seconds that traffic flows before it is sampled
    #[arg(long, default_value_t = 2.0)]
    settle: f64,
    /// Seconds of a sample
    #[arg(long, default_value_t = 1.0)]
    sample: f64,
    /// Samples of a probe
    #[arg(long, default_value_t = 4)]
    samples: u32,
    /// Seconds that a probe may take, with set-up
    #[arg(long, default_value_t = 60.0)]
    limit: f64,
}

/// What a command does where nothing says what is owed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unknown {
    /// Measures it.
    Measure,
    /// Judges pauses and losses only.
    LeaveOut,
}

pub(super) fn model(name: &str) -> Result<Model, Failure> {
    Model::named(name).map_err(|error| Failure::new(format!("--subsystem: {error}")))
}

impl AdapterArgs {
    /// Opens both ends, kept to the workloads of a space.
    pub(super) fn open(&self, space: Option<&Space>) -> Result<Adapters, Failure> {
        let says = |error: volley_collie::engine::EngineError| Failure::new(error.to_string());
        let timing = Timing {
            settle_ms: milliseconds("--settle", self.settle)?,
            sample_ms: milliseconds("--sample", self.sample)?,
            samples: self.samples,
        };
        let timing = timing.checked().map_err(Failure::new)?;
        let limit = Duration::from_millis(milliseconds("--limit", self.limit)?);
        let mut adapters = Adapters::open(&self.place()?, timing, limit).map_err(says)?;
        if let Some(space) = space {
            adapters.restrict(space).map_err(says)?;
        }
        Ok(adapters)
    }

    fn place(&self) -> Result<Place, Failure> {
        let [a, b] = self.devices.as_slice() else {
            return Err(Failure::new(format!(
                "--devices: {} given; give two, as mlx5_0,mlx5_1",
                self.devices.len()
            )));
        };
        let parse = |name: &str| -> Result<(String, u8), Failure> {
            let (device, port) = name.split_once(':').unwrap_or((name, "1"));
            match port.parse() {
                Ok(port) if port > 0 && !device.is_empty() => Ok((device.to_owned(), port)),
                _ => Err(Failure::new(format!(
                    "--devices: '{name}' is no port of a device; write mlx5_0, or mlx5_0:2 for its second port"
                ))),
            }
        };
        let ((a, port_a), (b, port_b)) = (parse(a)?, parse(b)?);
        Ok(Place {
            devices: [a, b],
            ports: [port_a, port_b],
            agent: self.agent.clone(),
        })
    }
}

impl SubsystemArgs {
    /// Opens what is meant, kept to the workloads of a space, and hands it over with the thresholds that it is judged by.
    pub(super) fn with<R>(
        &self,
        space: Option<&Space>,
        seed: u64,
        unknown: Unknown,
        run: impl FnOnce(&mut dyn Subsystem, Monitor) -> Result<R, Failure>,
    ) -> Result<R, Failure> {
        if let Some(name) = &self.subsystem {
            let mut model = model(name)?;
            if let Some(space) = space {
                model.space = space.clone();
            }
            return run(&mut Simulated::new(&model, seed), Monitor::default());
        }
        let throughput_min = share("--throughput-min", self.throughput_min)?;
        let loss_max = self.loss_max.map(|most| share("--loss-max", most));
        let loss_max = loss_max.transpose()?;
        let mut adapters = self.adapters.open(space)?;
        let calibration = self.calibration(&mut adapters, unknown)?;
        let mut monitor = Monitor {
            throughput_min,
            loss_max,
            ..Monitor::default()
        };
        if calibration.is_none() {
            monitor.throughput_min = 0.0;
        }
        if self.lossy && loss_max.is_none() {
            let clean = calibration.as_ref();
            let clean = clean.map_or(0.0, |known| known.clean_loss(adapters.space()));
            monitor.loss_max = Monitor::lossy(clean).loss_max;
        }
        if let Some(calibration) = calibration {
            adapters.calibrated(calibration);
        }
        run(&mut adapters, monitor)
    }

    /// What the adapters owe: read, or measured and written.
    fn calibration(
        &self,
        adapters: &mut Adapters,
        unknown: Unknown,
    ) -> Result<Option<Calibration>, Failure> {
        if let Some(path) = &self.bounds
            && (path.exists() || unknown == Unknown::LeaveOut)
        {
            let known = load(path)?;
            return match known.missing(adapters.space()) {
                Some((operation, direction)) if unknown == Unknown::Measure => {
                    Err(Failure::new(format!(
                        "{}: {operation} traffic, {direction}, was not measured: `volley vet calibrate` with the same --space",
                        path.display()
                    )))
                }
                _ => Ok(Some(known)),
            };
        }
        if unknown == Unknown::LeaveOut {
            return Ok(None);
        }
        let known = calibrate(adapters)?;
        if let Some(path) = &self.bounds {
            save(path, &known)?;
        }
        Ok(Some(known))
    }
}

/// Measures what adapters owe, telling on standard error how far it has come.
pub(super) fn calibrate(adapters: &mut Adapters) -> Result<Calibration, Failure> {
    let mut told = |Progress { done, all }: Progress| {
        eprintln!("calibrating: {done} of {all} workloads of plain traffic");
    };
    let known = adapters.calibrate(&mut told);
    known.map_err(|error| Failure::new(format!("plain traffic does not flow: {error}")))
}

fn load(path: &Path) -> Result<Calibration, Failure> {
    let text = fs::read_to_string(path).map_err(|error| Failure::file(path, &error))?;
    serde_json::from_str(&text)
        .map_err(|error| Failure::new(format!("{}: {error}", path.display())))
}

pub(super) fn save(path: &Path, known: &Calibration) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(known).expect("plain data") + "\n";
    fs::write(path, text).map_err(|error| Failure::file(path, &error))
}

/// Prints what plain traffic reached.
pub(super) fn show(known: &Calibration) -> Result<(), Failure> {
    print(&format!("{}\n", known.subsystem))?;
    for owed in &known.owed {
        print(&format!(
            "  {:12} {:14} MTU {:4} {:8} B {:12.0} messages/s {:9.3} Gb/s  lost {:.3} %\n",
            owed.operation.to_string(),
            owed.direction.to_string(),
            owed.mtu,
            owed.bytes,
            owed.messages_per_s,
            owed.messages_per_s * f64::from(owed.bytes) * 8.0 / 1e9,
            owed.loss * 100.0
        ))?;
    }
    Ok(())
}

fn share(option: &str, share: f64) -> Result<f64, Failure> {
    if (0.0..=1.0).contains(&share) {
        return Ok(share);
    }
    Err(Failure::new(format!(
        "{option} is {share}: give a share from 0 to 1"
    )))
}

fn milliseconds(option: &str, seconds: f64) -> Result<u64, Failure> {
    match (seconds * 1000.0).round() {
        ms if (0.0..=3_600_000.0).contains(&ms) => Ok(ms as u64),
        _ => Err(Failure::new(format!(
            "{option} is {seconds}: give seconds, up to an hour"
        ))),
    }
}
