//! What is done with a file of known anomalies: `match`, `clear`, `restrict`, `report`, `diff`.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use volley_collie::{
    Feature, KnownAnomalies, Point, anomalies_html, anomalies_markdown, probe_command,
};

use super::journal::read_journal;
use super::{print, print_json, read, read_space};
use crate::failure::Failure;

#[derive(Debug, Args)]
pub(super) struct MatchArgs {
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
pub(super) struct ClearArgs {
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
pub(super) struct RestrictArgs {
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
pub(super) struct ReportArgs {
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
pub(super) struct DiffArgs {
    /// The file of known anomalies of before
    old: PathBuf,
    /// The file of known anomalies of now
    new: PathBuf,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

fn load(path: &Path) -> Result<KnownAnomalies, Failure> {
    KnownAnomalies::load(path).map_err(|error| Failure::new(error.to_string()))
}

pub(super) fn report(args: ReportArgs) -> Result<(), Failure> {
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

pub(super) fn clear(args: ClearArgs) -> Result<(), Failure> {
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

pub(super) fn match_workload(args: MatchArgs) -> Result<(), Failure> {
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

pub(super) fn restrict(args: RestrictArgs) -> Result<(), Failure> {
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

pub(super) fn diff(args: DiffArgs) -> Result<(), Failure> {
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
