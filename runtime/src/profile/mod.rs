//! `volley profile`: measures the model's modules and the transport on this machine, fits the planner's parameters, and checks what they foretell.

mod measure;
mod verify;

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use volley_models::{ComputeType, Quantization};
use volley_planner::{Efficiency, Gpu, ModelShape, PriceSource, Profile};

use crate::config::Demand;
use crate::failure::Failure;
use crate::flags::{ConfigFlags, Offline};
use crate::launch::Launch;
use crate::logging;

/// Measure this machine for the planner.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  volley profile --out machine.toml                                 the demo model
  volley profile --model DIR --load-format dummy --out machine.toml
  volley plan --model DIR --hardware machine.toml --attention-gpu this-machine --expert-gpu this-machine
  volley profile --verify                                           foretold step times beside measured ones")]
pub(crate) struct ProfileArgs {
    /// Write what `volley plan --hardware` reads
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Most rows of a micro-batch that are measured
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(2..=4096))]
    rows: u32,
    /// Then run clusters of several shapes, and print foretold and measured step times
    #[arg(long)]
    verify: bool,
    /// Print as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigFlags<Offline>,
}

/// Tokens of the longest context that is measured.
const CONTEXT: u32 = 256;

/// The file that `volley plan --hardware` reads.
#[derive(Debug, Serialize)]
struct File {
    gpu: std::collections::BTreeMap<String, Gpu>,
    transport: std::collections::BTreeMap<String, volley_planner::Transport>,
    profile: Profile,
}

/// Runs the command.
///
/// # Errors
/// When the model cannot be loaded, or the file cannot be written.
pub(crate) fn run(args: ProfileArgs) -> Result<(), Failure> {
    let config = args
        .config
        .with_default("limits.max_waiting", 4096)
        .with_default("limits.max_batch_tokens", args.rows.max(256))
        // Micro-batches are opened as asked for, also where that does not pay.
        .with_default("cluster.micro_batch_rows", 1);
    let raw = config.load()?;
    logging::start(&raw.log);
    let demand = Demand::Batch {
        sequences: args.rows,
        tokens: CONTEXT,
    };
    let launch = Launch::prepare(&raw, demand)?;
    let shape = shape(&launch)?;
    let profile = measure::profile(&launch, &shape, args.rows as usize)?;
    let file = file(&shape, profile)?;
    if let Some(path) = &args.out {
        let text = toml::to_string(&file)
            .map_err(|error| Failure::new(format!("the profile cannot be written: {error}")))?;
        let head = "# Measured by `volley profile`. `volley plan --hardware` reads it.\n\n";
        std::fs::write(path, format!("{head}{text}"))
            .map_err(|error| Failure::file(path, &error))?;
    }
    let cases = if args.verify {
        verify::run(&launch, &shape, &file.profile)?
    } else {
        Vec::new()
    };
    let text = if args.json {
        format!(
            "{:#}\n",
            serde_json::json!({"profile": file.profile, "verified": cases})
        )
    } else {
        summary(&file) + &verify::table(&cases)
    };
    std::io::stdout()
        .write_all(text.as_bytes())
        .map_err(Failure::output)
}

/// The model as the planner knows it, by the name it would find it under.
fn shape(launch: &Launch) -> Result<ModelShape, Failure> {
    let name = match &launch.settings.model.path {
        Some(path) => {
            let folder = path.file_name().unwrap_or(path.as_os_str());
            folder.to_string_lossy().into_owned()
        }
        None => launch.settings.model.name.clone(),
    };
    Ok(ModelShape::of_spec(name, launch.model.spec())?)
}

/// The machine as one GPU: its bandwidth from the time in which an expert's weights are read, its rate from that of each
/// further row, once there are many.
fn file(model: &ModelShape, profile: Profile) -> Result<File, Failure> {
    let points = profile.expert.points();
    let (first, last) = (points[0], points[points.len() - 1]);
    let before = points[points.len().saturating_sub(2)];
    let weight_bytes = match profile.dtype.as_str() {
        dtype if dtype.ends_with("q8 weights") => volley_planner::Dtype::Q8.bytes(),
        dtype if dtype.ends_with("q4 weights") => volley_planner::Dtype::Q4.bytes(),
        "f32" => 4.0,
        _ => 2.0,
    };
    let bytes_per_s = model.expert_weights() * weight_bytes / first.1;
    let row_s = ((last.1 - before.1) / (last.0 - before.0)).max(last.1 / last.0 / 4.0);
    let flops_per_s = 2.0 * model.expert_weights() / row_s;
    let memory = crate::memory::available_bytes().unwrap_or(1 << 30) as f64;
    let nic_gbps = profile.link_bytes_per_s * 8.0 / 1e9;
    let gpu = Gpu {
        price: 1.0,
        price_source: PriceSource::User,
        memory_gb: memory / 1e9,
        memory_gbs: bytes_per_s / 1e9,
        bf16_tflops: flops_per_s / 1e12,
        fp8_tflops: None,
        power_w: 100.0,
        node_gpus: 1,
        node_link_gbs: nic_gbps / 4.0,
        nic_gbps,
        available: None,
        efficiency: Some(Efficiency {
            compute: 1.0,
            memory: 1.0,
            node_link: 1.0,
            memory_usable: 0.9,
            kernel_us: 0.0,
            collective_us: 0.0,
            network: 1.0,
            fused_all_reduce: false,
        }),
    };
    Ok(File {
        gpu: [(profile.gpu.clone(), gpu)].into(),
        transport: [("in-process".to_owned(), profile.link)].into(),
        profile,
    })
}

fn summary(file: &File) -> String {
    let profile = &file.profile;
    let fits = &profile.fits;
    let gpu = &file.gpu[&profile.gpu];
    let mut text = format!(
        "{} in {} on {} threads\n\n{:<24} {:>12} {:>12} {:>10}\n",
        profile.model.name, profile.dtype, profile.threads, "us", "a unit", "at zero", "residual"
    );
    for (name, line, unit) in [
        ("T_a by rows (k1, k2)", fits.attention, 1e6),
        ("T_e by rows (k3, k4)", fits.expert, 1e6),
        ("T_c by KiB", fits.link, 1e6),
    ] {
        let per = if name.starts_with("T_c") { 1024.0 } else { 1.0 };
        text += &format!(
            "{name:<24} {:>12.3} {:>12.2} {:>9.0}%\n",
            line.slope * unit * per,
            line.intercept * unit,
            100.0 * line.residual
        );
    }
    text += &format!(
        "{:<24} {:>12.5}\n",
        "T_a by cached token",
        profile.per_cached_s * 1e6
    );
    for (name, curve) in [
        ("attention", &profile.attention),
        ("one expert", &profile.expert),
        ("embedding and head", &profile.step),
    ] {
        text += &format!("\n{name}, us by rows:\n ");
        for (rows, seconds) in curve.points() {
            text += &format!(" {rows:.0}: {:.1} ", seconds * 1e6);
        }
    }
    text += &format!(
        "\n\nthe machine reads {:.1} GB/s of weights and computes {:.3} TFLOP/s\n",
        gpu.memory_gbs, gpu.bf16_tflops
    );
    text
}

/// The small runtime that a load needs.
fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    let built = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    built.map_err(|error| Failure::new(format!("no runtime: {error}")))
}

/// Bytes of a row on its way.
fn element_bytes(dtype: ComputeType) -> f64 {
    dtype.bytes() as f64
}

/// As [`volley_actors::ClusterConfig::precision`] says it.
fn precision(dtype: ComputeType, quantize: Option<Quantization>) -> String {
    match quantize {
        None => dtype.to_string(),
        Some(quantization) => format!("{dtype} with {quantization} weights"),
    }
}
