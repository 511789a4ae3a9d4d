//! `volley vet search`: find a subsystem's anomalies, and learn what each needs.

use std::fs;
use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use volley_collie::{KnownAnomalies, Session, Strategy, anomalies_html, anomalies_markdown};

use super::journal::journal;
use super::subsystem::{SubsystemArgs, Unknown};
use super::{positive_hours, print, print_json, read_space};
use crate::failure::Failure;

#[derive(Debug, Args)]
pub(super) struct SearchArgs {
    #[command(flatten)]
    target: SubsystemArgs,
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

pub(super) fn run(args: &SearchArgs) -> Result<(), Failure> {
    let hours = positive_hours(args.hours)?;
    let space = args.space.as_deref().map(read_space).transpose()?;
    let (known, records) = args.target.with(
        space.as_ref(),
        args.seed,
        Unknown::Measure,
        |subsystem, monitor| {
            let (name, counters) = (subsystem.name(), subsystem.counters().to_vec());
            let space = subsystem.space().clone();
            let mut session = Session::new(subsystem, space.clone(), monitor, hours * 3600.0);
            if let Some(path) = &args.journal {
                let (done, file) = journal(path)?;
                session = session.with_journal(done, file);
            }
            let learnt = Strategy::Diagnostic.run(&mut session, args.seed);
            if let (Some(error), Some(path)) = (session.broken(), &args.journal) {
                return Err(Failure::new(format!("{}: {error}", path.display())));
            }
            let known = KnownAnomalies::new(name, space, counters, learnt);
            Ok((known, session.records().to_vec()))
        },
    )?;
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
    let mut text = format!(
        "{} anomalies in {} probes\n",
        known.anomalies.len(),
        records.len()
    );
    for (place, mfs) in known.anomalies.iter().enumerate() {
        text += &format!(
            "{:3}. {}\n     when {}\n",
            place + 1,
            mfs.symptom,
            mfs.region(&known.space)
        );
    }
    let foreign = records.iter().filter(|record| {
        record.verdict.symptom().is_some() && known.met_by(&record.point).is_empty()
    });
    match foreign.count() {
        0 => {}
        count => {
            text += &format!(
                "{count} more measurements were anomalous, of which too little is known yet: go on with more --hours and the same --journal\n"
            );
        }
    }
    print(&text)
}
