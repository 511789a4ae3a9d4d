//! `volley reproduce`: the evaluation of the MegaScale-Infer paper from first principles, row by row beside the paper's.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use volley_planner::reproduce::{Assumptions, reproduce};

use crate::failure::Failure;

/// Compute the paper's evaluation.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  volley reproduce                 a table: the paper's figure, ours, the ratio
  volley reproduce --json          the same with the figures' points, all assumptions, and every row under other readings
  volley reproduce --docs docs     writes docs/reproduction.md and its plots")]
pub(crate) struct ReproduceArgs {
    /// Write reproduction.md and reproduction/*.svg into this folder
    #[arg(long, value_name = "DIR")]
    docs: Option<PathBuf>,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// When something cannot be written.
pub(crate) fn run(args: ReproduceArgs) -> Result<(), Failure> {
    let reproduction = reproduce()?;
    if let Some(docs) = &args.docs {
        let folder = docs.join("reproduction");
        std::fs::create_dir_all(&folder).map_err(|error| Failure::file(&folder, &error))?;
        let page = ("reproduction.md".to_owned(), reproduction.markdown());
        let drawings = reproduction
            .drawings()
            .map(|(name, svg)| (format!("reproduction/{name}"), svg));
        for (name, text) in std::iter::once(page).chain(drawings) {
            let path = docs.join(name);
            std::fs::write(&path, text).map_err(|error| Failure::file(&path, &error))?;
        }
    }
    let text = if args.json {
        let assumptions: serde_json::Map<_, _> = Assumptions::table()
            .into_iter()
            .map(|(of, assumed)| (of.to_owned(), json!(assumed)))
            .collect();
        let readings: Vec<_> = Assumptions::readings()
            .into_iter()
            .map(|(words, _)| words)
            .collect();
        let document = json!({
            "rows": reproduction.rows, "figures": reproduction.figures, "assumptions": assumptions, "readings": readings,
        });
        format!("{document:#}\n")
    } else {
        reproduction.table()
    };
    std::io::stdout()
        .write_all(text.as_bytes())
        .map_err(Failure::output)
}
