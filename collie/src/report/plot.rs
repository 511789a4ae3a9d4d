//! Plots as SVG.

use std::fmt::Write as _;

use crate::evaluate::Evaluation;
use crate::session::{Purpose, Record};

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 360.0;
const LEFT: f64 = 56.0;
const BOTTOM: f64 = 44.0;
const TOP: f64 = 16.0;
/// Room for the names of the curves.
const RIGHT: f64 = 210.0;
/// Told apart by those who do not see red and green apart, too (Okabe and Ito).
const COLOURS: [&str; 6] = [
    "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#cc79a7", "#555555",
];

/// Axes, and where a value falls on them.
struct Frame {
    x_max: f64,
    y_max: f64,
}

impl Frame {
    fn at(&self, x: f64, y: f64) -> (f64, f64) {
        (
            LEFT + x / self.x_max * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - y / self.y_max * (HEIGHT - BOTTOM - TOP),
        )
    }

    fn open(&self, x_name: &str, y_name: &str, y_step: f64) -> String {
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#ffffff\"/>\n"
        );
        let line = |svg: &mut String, (x1, y1): (f64, f64), (x2, y2): (f64, f64), colour: &str| {
            let _ = writeln!(
                svg,
                "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{colour}\"/>"
            );
        };
        let mut y = 0.0;
        while y <= self.y_max {
            let (left, height) = self.at(0.0, y);
            line(&mut svg, (left, height), self.at(self.x_max, y), "#dddddd");
            let _ = writeln!(
                svg,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{y}</text>",
                left - 6.0,
                height + 4.0
            );
            y += y_step;
        }
        for part in 0..=5 {
            let x = self.x_max * f64::from(part) / 5.0;
            let (across, base) = self.at(x, 0.0);
            let _ = writeln!(
                svg,
                "<text x=\"{across:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{x:.0}</text>",
                base + 16.0
            );
        }
        line(
            &mut svg,
            self.at(0.0, 0.0),
            self.at(self.x_max, 0.0),
            "#000000",
        );
        line(
            &mut svg,
            self.at(0.0, 0.0),
            self.at(0.0, self.y_max),
            "#000000",
        );
        let (middle, _) = self.at(self.x_max / 2.0, 0.0);
        let _ = writeln!(
            svg,
            "<text x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{x_name}</text>\n\
             <text transform=\"translate(14 {:.1}) rotate(-90)\" text-anchor=\"middle\">{y_name}</text>",
            HEIGHT - 8.0,
            (HEIGHT - BOTTOM + TOP) / 2.0
        );
        svg
    }
}

/// Each strategy's mean time to the k-th distinct anomaly. A curve ends where a seed did not get there.
pub fn evaluation_svg(evaluation: &Evaluation) -> String {
    let frame = Frame {
        x_max: evaluation.hours * 60.0,
        y_max: evaluation.anomalies.max(1) as f64,
    };
    let mut svg = frame.open(
        "mean minutes of the subsystem's clock",
        &format!("distinct anomalies of {}", text(&evaluation.subsystem)),
        1.0,
    );
    for (place, strategy) in evaluation.strategies.iter().enumerate() {
        let colour = COLOURS[place % COLOURS.len()];
        let reached = strategy
            .minutes_to_kth_at_least
            .iter()
            .zip(&strategy.share_reaching_kth)
            .take_while(|(_, share)| **share == 1.0);
        let mut points = Vec::new();
        for (k, (minutes, _)) in reached.enumerate() {
            let (x, y) = frame.at(*minutes, k as f64 + 1.0);
            points.push(format!("{x:.1},{y:.1}"));
            let _ = writeln!(
                svg,
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>"
            );
        }
        let height = TOP + 14.0 + 18.0 * place as f64;
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>\n\
             <text x=\"{:.1}\" y=\"{height:.1}\" fill=\"{colour}\">{}</text>",
            points.join(" "),
            WIDTH - RIGHT + 8.0,
            text(&strategy.name)
        );
    }
    svg + "</svg>\n"
}

/// The throughput of every measurement of a search over its time, by verdict.
pub(super) fn search_svg(records: &[Record]) -> String {
    let frame = Frame {
        x_max: records
            .last()
            .map_or(1.0, |record| record.at_s / 60.0)
            .max(1.0),
        y_max: 1.2,
    };
    let mut svg = frame.open("minutes", "throughput, share of what is owed", 0.2);
    let kinds = [
        ("clean", "#bbbbbb"),
        ("anomalous, while searching", "#d55e00"),
        ("anomalous, while learning", "#0072b2"),
        ("invalid", "#000000"),
    ];
    for record in records {
        let kind = match (record.verdict.symptom(), record.purpose) {
            (Some(_), Purpose::Search) => 1,
            (Some(_), _) => 2,
            (None, _) if record.verdict.is_clean() => 0,
            (None, _) => 3,
        };
        let (x, y) = frame.at(record.at_s / 60.0, record.throughput.clamp(0.0, 1.2));
        let _ = writeln!(
            svg,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.2\" fill=\"{}\"/>",
            kinds[kind].1
        );
    }
    for (place, (name, colour)) in kinds.into_iter().enumerate() {
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" fill=\"{colour}\">{name}</text>",
            WIDTH - RIGHT + 8.0,
            TOP + 14.0 + 18.0 * place as f64
        );
    }
    svg + "</svg>\n"
}

/// Text that may stand in XML and HTML.
pub(super) fn text(raw: &str) -> String {
    raw.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}
