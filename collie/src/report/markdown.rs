//! Reports in Markdown.

use std::fmt::Write as _;

use crate::evaluate::Evaluation;
use crate::known::KnownAnomalies;
use crate::space::{perftest_command, probe_command};

/// A report of what is known of a subsystem: one section an anomaly.
pub fn anomalies_markdown(known: &KnownAnomalies) -> String {
    let mut text = format!(
        "# Anomalies of {}\n\n{} known.\n",
        known.subsystem,
        known.anomalies.len()
    );
    for (place, mfs) in known.anomalies.iter().enumerate() {
        let region = mfs.region(&known.space);
        let _ = write!(
            text,
            "\n## {}. {}\n\nA workload suffers this when all of these hold:\n\n",
            place + 1,
            mfs.symptom
        );
        for condition in &region.conditions {
            let _ = writeln!(text, "* {condition}");
        }
        text.push_str("\nCounters at one such workload, against their idle values:\n\n| counter | times idle |\n|---|---|\n");
        let mut counters: Vec<(&String, &f64)> =
            known.counters.iter().zip(&mfs.signature).collect();
        counters.sort_by(|a, b| b.1.total_cmp(a.1));
        for (name, excess) in counters.into_iter().take(3) {
            let _ = writeln!(text, "| {name} | {:.1} |", 1.0 + excess);
        }
        let _ = write!(
            text,
            "\nTo see it again:\n\n```\n{}\n```\n",
            probe_command(&known.subsystem, &mfs.anchor)
        );
        match perftest_command(&mfs.anchor) {
            Ok(command) => {
                let _ = write!(text, "\nThe same with perftest:\n\n```\n{command}\n```\n");
            }
            Err(reason) => {
                let _ = write!(text, "\nThere is no perftest command for it: {reason}.\n");
            }
        }
        let _ = write!(text, "\nLearnt in {} probes.\n", mfs.probes);
    }
    text
}

/// The table of an evaluation, and the minutes to the k-th anomaly.
pub fn evaluation_markdown(evaluation: &Evaluation) -> String {
    let Evaluation {
        subsystem,
        seeds,
        hours,
        anomalies,
        strategies,
    } = evaluation;
    let mut text = format!(
        "{subsystem}: {anomalies} anomalies, {seeds} seeds, {hours} simulated hours each\n\n"
    );
    text.push_str("| strategy | found (mean) | found (least) | false verdicts | MFS precision | MFS recall | probes an MFS |\n");
    text.push_str("|---|---|---|---|---|---|---|\n");
    let share = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.3}"));
    for s in strategies {
        let probes = s
            .probes_per_mfs
            .map_or("-".to_owned(), |probes| format!("{probes:.0}"));
        let _ = writeln!(
            text,
            "| {} | {:.2} | {} | {:.2} % | {} | {} | {probes} |",
            s.name,
            s.found_mean,
            s.found_min,
            100.0 * s.false_verdicts,
            share(s.mfs_precision),
            share(s.mfs_recall)
        );
    }
    text.push_str("\nMean minutes to the k-th distinct anomaly; where seeds did not get there, `>` and the mean with the whole time charged to them.\n\n| k |");
    for s in strategies {
        let _ = write!(text, " {} |", s.name);
    }
    let _ = write!(text, "\n|---|{}\n", "---|".repeat(strategies.len()));
    for k in 0..*anomalies {
        let _ = write!(text, "| {} |", k + 1);
        for s in strategies {
            let all = s.share_reaching_kth[k] == 1.0;
            let _ = match (all, s.share_reaching_kth[k] > 0.0) {
                (true, _) => write!(text, " {:.0} |", s.minutes_to_kth_at_least[k]),
                (false, true) => write!(text, " > {:.0} |", s.minutes_to_kth_at_least[k]),
                (false, false) => write!(text, " - |"),
            };
        }
        text.push('\n');
    }
    text
}
