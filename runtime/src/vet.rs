//! `volley vet`: find the RDMA workloads that a subsystem handles badly, and keep clear of them.

mod host;

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::de::DeserializeOwned;
use serde_json::json;
use volley_collie::{
    Direction, Feature, KnownAnomalies, Memory, Model, Monitor, Operation, Point, Record, Session,
    Simulated, Space, Strategy, Subsystem, anomalies_html, anomalies_markdown, evaluate,
    evaluation_markdown, evaluation_svg, probe_command,
};

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
  volley vet search --subsystem F --hours 10 --out anomalies.json --report anomalies.html
  volley vet match --anomalies anomalies.json --workload mine.json    exit code 1 if it meets one
  volley vet restrict --anomalies anomalies.json --space mine.toml    what a design must avoid
  volley vet diff old.json new.json                                   exit code 1 if anomalies appeared
  volley vet clear --anomalies anomalies.json --workload mine.json --may-change batch,sges
  volley vet evaluate --subsystem F --seeds 100 --plot curves.svg     the search against its rivals

Subsystems are simulated: F and H are the paper's, random:SEED is drawn from a grammar of conditions.";

#[derive(Debug, Subcommand)]
enum Vet {
    /// Search a subsystem for anomalies, and learn what each needs
    Search(SearchArgs),
    /// Measure one workload
    Probe(ProbeArgs),
    /// Say which known anomalies a workload meets, and each way out
    Match(MatchArgs),
    /// Change a workload's settings, where they may be changed, until it meets no known anomaly
    Clear(ClearArgs),
    /// Look at this host's configuration: link, PCIe, NUMA, ordering, ACS, MTU, GIDs, flow control, memlock
    Preflight(host::PreflightArgs),
    /// Watch a device's pauses and losses while an application runs
    Watch(host::WatchArgs),
    /// Say what workloads of a space must avoid
    Restrict(RestrictArgs),
    /// Write the report of a file of known anomalies
    Report(ReportArgs),
    /// Compare two files of known anomalies, as of two firmware versions
    Diff(DiffArgs),
    /// Run every strategy over many seeds against causes that are known
    Evaluate(EvaluateArgs),
}

#[derive(Debug, Args)]
struct SearchArgs {
    /// F, H or random:SEED
    #[arg(long)]
    subsystem: String,
    /// How long to search, hours of the subsystem's clock
    #[arg(long, default_value_t = 10.0)]
    hours: f64,
    /// Seed of the search's choices
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Search only these workloads (TOML; keys left out keep their published range)
    #[arg(long)]
    space: Option<PathBuf>,
    /// Write each measurement here as a line of JSON; a search that was cut off goes on from it
    #[arg(long)]
    journal: Option<PathBuf>,
    /// Write the anomalies here
    #[arg(long)]
    out: Option<PathBuf>,
    /// Write a report here: a page of HTML if the name ends so, else Markdown
    #[arg(long)]
    report: Option<PathBuf>,
    /// Print the anomalies as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct ProbeArgs {
    /// F, H or random:SEED
    #[arg(long)]
    subsystem: String,
    /// Seed of the noise
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    workload: WorkloadArgs,
    /// Print the measurement as JSON
    #[arg(long)]
    json: bool,
}

/// A workload, setting by setting.
#[derive(Debug, Args)]
struct WorkloadArgs {
    /// Transport and verb: rc-send, rc-write, rc-write-imm, rc-read, uc-send, uc-write, uc-write-imm, ud-send
    #[arg(long)]
    operation: Operation,
    /// unidirectional (from B to A), bidirectional or loopback (A also sends to itself)
    #[arg(long, default_value = "unidirectional")]
    direction: Direction,
    /// Path MTU, bytes
    #[arg(long, default_value_t = 4096)]
    mtu: u32,
    /// Where host A's buffers lie: dramN or gpuN
    #[arg(long, default_value = "dram0")]
    memory_a: Memory,
    /// Where host B's buffers lie: dramN or gpuN
    #[arg(long, default_value = "dram0")]
    memory_b: Memory,
    /// Queue pairs in each direction
    #[arg(long, default_value_t = 1)]
    qps: u32,
    /// Memory regions of a queue pair
    #[arg(long, default_value_t = 1)]
    regions: u32,
    /// Length of a region, bytes [default: the largest message, 4096 at least]
    #[arg(long)]
    region_bytes: Option<u32>,
    /// Work requests of a doorbell
    #[arg(long, default_value_t = 1)]
    batch: u32,
    /// Work requests a send queue holds
    #[arg(long, default_value_t = 128)]
    send_depth: u32,
    /// Work requests a receive queue holds
    #[arg(long, default_value_t = 128)]
    receive_depth: u32,
    /// Scatter/gather elements of a work request
    #[arg(long, default_value_t = 1)]
    sges: u32,
    /// Sizes of consecutive messages, bytes
    #[arg(long, value_delimiter = ',', default_value = "65536")]
    messages: Vec<u32>,
}

impl WorkloadArgs {
    fn point(self) -> Point {
        let largest = self.messages.iter().copied().max().unwrap_or(0);
        Point {
            operation: self.operation,
            direction: self.direction,
            mtu: self.mtu,
            memory_a: self.memory_a,
            memory_b: self.memory_b,
            qps: self.qps,
            regions: self.regions,
            region_bytes: self.region_bytes.unwrap_or(largest.max(4096)),
            batch: self.batch,
            send_depth: self.send_depth,
            receive_depth: self.receive_depth,
            sges: self.sges,
            messages: self.messages,
        }
    }
}

#[derive(Debug, Args)]
struct MatchArgs {
    /// The file of known anomalies
    #[arg(long)]
    anomalies: PathBuf,
    /// The workload (JSON or TOML), as `volley vet probe --json` prints one
    #[arg(long)]
    workload: PathBuf,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct ClearArgs {
    /// The file of known anomalies
    #[arg(long)]
    anomalies: PathBuf,
    /// The workload (JSON or TOML), as `volley vet probe --json` prints one
    #[arg(long)]
    workload: PathBuf,
    /// Settings that may be changed, by their options of `volley vet probe`: batch,send-depth,mtu
    #[arg(long, value_delimiter = ',')]
    may_change: Vec<String>,
    /// Print the workload and the changes as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct RestrictArgs {
    /// The file of known anomalies
    #[arg(long)]
    anomalies: PathBuf,
    /// The workloads of the design (TOML; keys left out keep their published range)
    #[arg(long)]
    space: PathBuf,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct ReportArgs {
    /// The file of known anomalies
    #[arg(long)]
    anomalies: PathBuf,
    /// The journal of the search, for its plot and for counters before and after
    #[arg(long)]
    journal: Option<PathBuf>,
    /// Write a page of HTML here, instead of printing Markdown
    #[arg(long)]
    html: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct DiffArgs {
    /// The file of known anomalies of before
    old: PathBuf,
    /// The file of known anomalies of now
    new: PathBuf,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct EvaluateArgs {
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

/// Runs the command.
///
/// # Errors
/// What was wrong with the input, or that a check failed.
pub(crate) fn run(args: VetArgs) -> Result<(), Failure> {
    match args.command {
        Vet::Search(args) => search(args),
        Vet::Probe(args) => probe(args),
        Vet::Match(args) => match_workload(args),
        Vet::Restrict(args) => restrict(args),
        Vet::Clear(args) => clear(args),
        Vet::Preflight(args) => host::run_preflight(args),
        Vet::Watch(args) => host::run_watch(args),
        Vet::Report(args) => report(args),
        Vet::Diff(args) => diff(args),
        Vet::Evaluate(args) => {
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
    }
}

fn model(name: &str) -> Result<Model, Failure> {
    Model::named(name).map_err(|error| Failure::new(format!("--subsystem: {error}")))
}

fn positive_hours(hours: f64) -> Result<f64, Failure> {
    if hours.is_finite() && hours > 0.0 {
        return Ok(hours);
    }
    Err(Failure::new(format!(
        "--hours is {hours}: give a number over 0"
    )))
}

fn load(path: &Path) -> Result<KnownAnomalies, Failure> {
    KnownAnomalies::load(path).map_err(|error| Failure::new(error.to_string()))
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

fn search(args: SearchArgs) -> Result<(), Failure> {
    let (mut model, hours) = (model(&args.subsystem)?, positive_hours(args.hours)?);
    let mut space = model.space.clone();
    if let Some(path) = &args.space {
        space = read_space(path)?;
        model.space = space.clone();
    }
    let mut subsystem = Simulated::new(&model, args.seed);
    let counters = subsystem.counters().to_vec();
    let mut session = Session::new(
        &mut subsystem,
        space.clone(),
        Monitor::default(),
        hours * 3600.0,
    );
    if let Some(path) = &args.journal {
        let (done, file) = journal(path)?;
        session = session.with_journal(done, file);
    }
    let learnt = Strategy::Diagnostic.run(&mut session, args.seed);
    if let (Some(error), Some(path)) = (session.broken(), &args.journal) {
        return Err(Failure::new(format!("{}: {error}", path.display())));
    }
    let records = session.records().to_vec();
    let probes = records.len();
    let known = KnownAnomalies::new(args.subsystem, space, counters, learnt);
    if let Some(path) = &args.out {
        known
            .save(path)
            .map_err(|error| Failure::new(error.to_string()))?;
    }
    if let Some(path) = &args.report {
        let text = if path.extension().is_some_and(|end| end == "html") {
            anomalies_html(&known, &records)
        } else {
            anomalies_markdown(&known)
        };
        fs::write(path, text).map_err(|error| Failure::file(path, &error))?;
    }
    if args.json {
        return print_json(&json!(known));
    }
    let mut text = format!("{} anomalies in {probes} probes\n", known.anomalies.len());
    for (place, mfs) in known.anomalies.iter().enumerate() {
        text += &format!(
            "{:3}. {}\n     when {}\n",
            place + 1,
            mfs.symptom,
            mfs.region(&known.space)
        );
    }
    print(&text)
}

fn report(args: ReportArgs) -> Result<(), Failure> {
    let known = load(&args.anomalies)?;
    let Some(path) = &args.html else {
        return print(&anomalies_markdown(&known));
    };
    let records = match &args.journal {
        Some(journal) => read_journal(journal)?.0,
        None => Vec::new(),
    };
    fs::write(path, anomalies_html(&known, &records)).map_err(|error| Failure::file(path, &error))
}

/// The measurements of a journal, and the file to append further ones to. A last line that was cut off with the search is dropped.
fn journal(path: &Path) -> Result<(Vec<Record>, File), Failure> {
    let (done, whole) = if path.exists() {
        read_journal(path)?
    } else {
        (Vec::new(), 0)
    };
    let open = || -> std::io::Result<File> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        file.set_len(whole)?;
        Ok(file)
    };
    open()
        .map(|file| (done, file))
        .map_err(|error| Failure::file(path, &error))
}

/// The measurements of a journal, and how many bytes its whole lines take.
fn read_journal(path: &Path) -> Result<(Vec<Record>, u64), Failure> {
    let (mut done, mut whole, mut line) = (Vec::new(), 0, String::new());
    let file = File::open(path).map_err(|error| Failure::file(path, &error))?;
    let mut reader = BufReader::new(file);
    while reader
        .read_line(&mut line)
        .map_err(|error| Failure::file(path, &error))?
        > 0
        && line.ends_with('\n')
    {
        let record = serde_json::from_str(&line).map_err(|error| {
            Failure::new(format!(
                "{}: line {}: {error}",
                path.display(),
                done.len() + 1
            ))
        })?;
        done.push(record);
        whole += line.len() as u64;
        line.clear();
    }
    Ok((done, whole))
}

fn probe(args: ProbeArgs) -> Result<(), Failure> {
    let model = model(&args.subsystem)?;
    let point = args.workload.point();
    model
        .space
        .admits(&point)
        .map_err(|error| Failure::new(error.to_string()))?;
    let mut subsystem = Simulated::new(&model, args.seed);
    let (probe, bound) = (subsystem.probe(&point), subsystem.bound(&point));
    let verdict = Monitor::default().judge(&probe, &bound);
    let measurement = probe.outcome.ok();
    if args.json {
        return print_json(
            &json!({ "workload": point, "verdict": verdict, "owed": bound, "measurement": measurement }),
        );
    }
    let mut text = match (verdict.symptom(), verdict.is_clean()) {
        (Some(symptom), _) => format!("anomalous: {symptom}\n"),
        (None, true) => "clean\n".to_owned(),
        (None, false) => format!("invalid: {verdict:?}\n"),
    };
    if let Some(measurement) = measurement {
        for (name, value) in subsystem.counters().iter().zip(measurement.counters()) {
            text += &format!("  {name:28} {value:12.0} a second\n");
        }
    }
    print(&text)
}

/// A workload of the space that anomalies are known of.
fn read_workload(path: &Path, known: &KnownAnomalies) -> Result<Point, Failure> {
    let point: Point = read(path)?;
    known.space.admits(&point).map_err(|error| {
        Failure::new(format!(
            "{}: {error}: of such workloads nothing is known",
            path.display()
        ))
    })?;
    Ok(point)
}

fn clear(args: ClearArgs) -> Result<(), Failure> {
    let known = load(&args.anomalies)?;
    let point = read_workload(&args.workload, &known)?;
    let may_change: Vec<Feature> = args
        .may_change
        .iter()
        .map(|name| {
            Feature::all()
                .find(|feature| feature.name() == name)
                .ok_or_else(|| {
                    let all: Vec<&str> = Feature::all().map(Feature::name).collect();
                    Failure::new(format!(
                        "--may-change: '{name}' is no setting: give some of {}",
                        all.join(", ")
                    ))
                })
        })
        .collect::<Result<_, _>>()?;
    let (there, changes) = known
        .clear(&point, &may_change)
        .map_err(|error| Failure::new(error.to_string()))?;
    if args.json {
        let changes: Vec<String> = changes.iter().map(ToString::to_string).collect();
        return print_json(&json!({ "workload": there, "changes": changes }));
    }
    for change in &changes {
        print(&format!("{change}\n"))?;
    }
    print(&format!("{}\n", probe_command(&known.subsystem, &there)))
}

fn match_workload(args: MatchArgs) -> Result<(), Failure> {
    let known = load(&args.anomalies)?;
    let point = read_workload(&args.workload, &known)?;
    let met = known.met_by(&point);
    if args.json {
        print_json(&json!(met))?;
    } else if met.is_empty() {
        print("meets no known anomaly\n")?;
    } else {
        for met in &met {
            print(&format!(
                "meets anomaly {}: {}\n  since {}\n",
                met.anomaly, met.symptom, met.conditions
            ))?;
            for way in &met.ways_out {
                print(&format!("  to avoid it, {way}\n"))?;
            }
        }
    }
    if met.is_empty() {
        Ok(())
    } else {
        Err(Failure::new(format!(
            "the workload meets {} known anomalies",
            met.len()
        )))
    }
}

fn restrict(args: RestrictArgs) -> Result<(), Failure> {
    let reachable = load(&args.anomalies)?.reachable_in(&read_space(&args.space)?);
    if args.json {
        return print_json(&json!(reachable));
    }
    if reachable.is_empty() {
        return print("no known anomaly can be met within this space\n");
    }
    for one in &reachable {
        print(&format!(
            "anomaly {}: {}\n  avoid together: {}\n",
            one.anomaly, one.symptom, one.avoid
        ))?;
    }
    Ok(())
}

fn diff(args: DiffArgs) -> Result<(), Failure> {
    let (old, new) = (load(&args.old)?, load(&args.new)?);
    let difference = new.since(&old);
    if args.json {
        print_json(&json!(difference))?;
    } else {
        let words = |known: &KnownAnomalies, place: usize| {
            known.anomalies[place - 1].region(&known.space).to_string()
        };
        for &place in &difference.appeared {
            print(&format!("appeared: {}\n", words(&new, place)))?;
        }
        for &place in &difference.vanished {
            print(&format!("vanished: {}\n", words(&old, place)))?;
        }
        print(&format!("{} remained\n", difference.remained.len()))?;
    }
    match difference.appeared.len() {
        0 => Ok(()),
        count => Err(Failure::new(format!("{count} anomalies appeared"))),
    }
}
