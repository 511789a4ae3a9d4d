//! A figure as SVG: lines for the model, rings for the paper; or bars.

use std::fmt::Write as _;

use super::figures::Figure;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 360.0;
/// Room for axes, their names and the title.
const LEFT: f64 = 60.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 60.0;
const BOTTOM: f64 = 46.0;
/// Told apart by the colour-blind too.
const COLOURS: [&str; 4] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7"];

/// The whole file.
pub(super) fn draw(figure: &Figure) -> String {
    let points = || {
        figure
            .series
            .iter()
            .flat_map(|s| s.ours.iter().chain(&s.paper))
    };
    let bars = !figure.groups.is_empty();
    let (x_low, x_high) = if bars {
        (-0.5, figure.groups.len() as f64 - 0.5)
    } else {
        (1.0, points().map(|p| p.0).fold(2.0, f64::max))
    };
    let y_high = points().map(|p| p.1).fold(0.0, f64::max) * 1.08;
    let x = |value: f64| LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT);
    let y = |value: f64| HEIGHT - BOTTOM - value / y_high * (HEIGHT - TOP - BOTTOM);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"20\" font-size=\"13\">{}</text>\n",
        figure.title
    );
    for step in 0..=4 {
        let value = y_high * f64::from(step) / 4.0;
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{1:.1}\" y2=\"{1:.1}\" stroke=\"#ddd\"/><text x=\"{2:.1}\" y=\"{3:.1}\" text-anchor=\"end\">{4}</text>",
            WIDTH - RIGHT,
            y(value),
            LEFT - 6.0,
            y(value) + 4.0,
            short(value)
        );
    }
    let ticks: Vec<(f64, String)> = if bars {
        figure
            .groups
            .iter()
            .enumerate()
            .map(|(at, name)| (at as f64, (*name).to_owned()))
            .collect()
    } else {
        let stride = (x_high / 8.0).ceil().max(1.0) as usize;
        (1..=x_high as usize)
            .step_by(stride)
            .map(|at| (at as f64, at.to_string()))
            .collect()
    };
    for (at, name) in ticks {
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{name}</text>",
            x(at),
            HEIGHT - BOTTOM + 16.0
        );
    }
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
        (LEFT + WIDTH - RIGHT) / 2.0,
        HEIGHT - 10.0,
        figure.x
    );
    let count = figure.series.len();
    for (index, series) in figure.series.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let _ = writeln!(
            svg,
            "<rect x=\"{0:.1}\" y=\"32\" width=\"10\" height=\"10\" fill=\"{colour}\"/><text x=\"{1:.1}\" y=\"41\">{2}</text>",
            LEFT + index as f64 * 170.0,
            LEFT + index as f64 * 170.0 + 14.0,
            series.name
        );
        if bars {
            let width = 0.8 / count as f64;
            for &(group, value) in &series.ours {
                let from = group - 0.4 + index as f64 * width;
                let _ = writeln!(
                    svg,
                    "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{colour}\"/>",
                    x(from),
                    y(value),
                    x(from + width * 0.92) - x(from),
                    y(0.0) - y(value)
                );
            }
            continue;
        }
        let line: Vec<String> = series
            .ours
            .iter()
            .map(|&(a, b)| format!("{:.1},{:.1}", x(a), y(b)))
            .collect();
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            line.join(" ")
        );
        for &(a, b) in &series.paper {
            let _ = writeln!(
                svg,
                "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"5\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
                x(a),
                y(b)
            );
        }
    }
    svg + "</svg>\n"
}

fn short(value: f64) -> String {
    if value >= 100.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.2}")
    }
}
