//! The report of a search as one page of HTML.

use std::fmt::Write as _;

use super::advice::checks;
use super::plot::{search_svg, text};
use crate::known::KnownAnomalies;
use crate::mfs::Mfs;
use crate::session::Record;
use crate::space::{Feature, perftest_command, probe_command};

const STYLE: &str = "body{font:15px/1.5 sans-serif;max-width:52em;margin:2em auto;padding:0 1em}\
table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2em .6em;text-align:right}\
td:first-child,th:first-child{text-align:left}pre{background:#f4f4f4;padding:.6em;white-space:pre-wrap}";

/// A report of what is known of a subsystem. With the journal of the search it shows that too, and each anomaly's counters beside those of the most similar
/// clean workload; without it they are given as multiples of their idle values.
pub fn anomalies_html(known: &KnownAnomalies, journal: &[Record]) -> String {
    let name = text(&known.subsystem);
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Anomalies of {name}</title>\
         <style>{STYLE}</style></head><body>\n<h1>Anomalies of {name}</h1>\n<p>{} known.</p>\n<ol>\n",
        known.anomalies.len()
    );
    for (place, mfs) in known.anomalies.iter().enumerate() {
        let _ = writeln!(
            page,
            "<li><a href=\"#a{}\">{}</a></li>",
            place + 1,
            text(&mfs.symptom.to_string())
        );
    }
    page.push_str("</ol>\n");
    if !journal.is_empty() {
        let _ = writeln!(
            page,
            "<h2>The search</h2>\n<p>{} measurements.</p>\n{}",
            journal.len(),
            search_svg(journal)
        );
    }
    for (place, mfs) in known.anomalies.iter().enumerate() {
        section(&mut page, known, place, mfs, journal);
    }
    page.push_str("</body></html>\n");
    page
}

fn section(page: &mut String, known: &KnownAnomalies, place: usize, mfs: &Mfs, journal: &[Record]) {
    let _ = writeln!(
        page,
        "<h2 id=\"a{0}\">{0}. {1}</h2>\n<p>A workload suffers this when all of these hold:</p>\n<ul>",
        place + 1,
        text(&mfs.symptom.to_string())
    );
    for condition in &mfs.region(&known.space).conditions {
        let _ = writeln!(page, "<li>{}</li>", text(&condition.to_string()));
    }
    page.push_str("</ul>\n");
    counters(page, known, mfs, journal);
    let _ = writeln!(
        page,
        "<p>To see it again:</p>\n<pre>{}</pre>",
        text(&probe_command(&known.subsystem, &mfs.anchor))
    );
    let _ = match perftest_command(&mfs.anchor) {
        Ok(command) => writeln!(
            page,
            "<p>The same with perftest:</p>\n<pre>{}</pre>",
            text(&command)
        ),
        Err(reason) => writeln!(
            page,
            "<p>There is no perftest command for it: {}.</p>",
            text(reason)
        ),
    };
    page.push_str("<p>Before the adapter is blamed, check:</p>\n<ul>\n");
    for check in checks(mfs) {
        let _ = writeln!(page, "<li>{}</li>", text(check));
    }
    let _ = writeln!(page, "</ul>\n<p>Learnt in {} probes.</p>", mfs.probes);
}

fn counters(page: &mut String, known: &KnownAnomalies, mfs: &Mfs, journal: &[Record]) {
    let sick = journal
        .iter()
        .find(|record| record.point == mfs.anchor && record.verdict.symptom().is_some());
    let clean = journal
        .iter()
        .filter(|record| record.verdict.is_clean() && !record.counters.is_empty())
        .min_by_key(|record| {
            Feature::all()
                .filter(|f| !f.agrees(&record.point, &mfs.anchor))
                .count()
        });
    let mut order: Vec<usize> = (0..known.counters.len().min(mfs.signature.len())).collect();
    order.sort_by(|&a, &b| mfs.signature[b].total_cmp(&mfs.signature[a]));
    if let (Some(sick), Some(clean)) = (sick, clean) {
        page.push_str("<p>Counters, a second: at the most similar clean workload, and at this one:</p>\n<table><tr><th>counter</th><th>before</th><th>after</th></tr>\n");
        for place in order {
            if let (Some(before), Some(after)) =
                (clean.counters.get(place), sick.counters.get(place))
            {
                let _ = writeln!(
                    page,
                    "<tr><td>{}</td><td>{before:.0}</td><td>{after:.0}</td></tr>",
                    text(&known.counters[place])
                );
            }
        }
    } else {
        page.push_str("<p>Counters, as multiples of their idle values:</p>\n<table><tr><th>counter</th><th>before</th><th>after</th></tr>\n");
        for place in order {
            let _ = writeln!(
                page,
                "<tr><td>{}</td><td>1.0</td><td>{:.1}</td></tr>",
                text(&known.counters[place]),
                1.0 + mfs.signature[place]
            );
        }
    }
    page.push_str("</table>\n");
}
