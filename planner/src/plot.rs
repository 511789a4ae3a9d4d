//! Plots as SVG: lines over a number, bars over names. No styling beyond what a reader needs.

use std::fmt::Write;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 360.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 60.0;
const COLOURS: [&str; 6] = [
    "#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a",
];

/// A named line.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Series {
    /// What to call it.
    pub(crate) name: String,
    /// Points, x ascending.
    pub(crate) points: Vec<(f64, f64)>,
}

/// Lines over x, from zero on both axes. What is not finite is left out.
pub(crate) fn lines(title: &str, x_name: &str, y_name: &str, series: &[Series]) -> String {
    let all = series.iter().flat_map(|series| &series.points);
    let finite = all.filter(|(x, y)| x.is_finite() && y.is_finite());
    let (x_max, y_max) = finite.fold((0.0_f64, 0.0_f64), |(x, y), point| {
        (x.max(point.0), y.max(point.1))
    });
    let (x_step, y_step) = (step(x_max), step(y_max));
    let (x_top, y_top) = (ceil(x_max, x_step), ceil(y_max, y_step));
    let place = |x: f64, y: f64| {
        (
            LEFT + x / x_top * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - y / y_top * (HEIGHT - TOP - BOTTOM),
        )
    };
    let mut svg = frame(title, x_name, y_name);
    for tick in ticks(x_top, x_step) {
        let (x, y) = place(tick, 0.0);
        let _ = writeln!(
            svg,
            r#"<text x="{x:.1}" y="{:.1}" text-anchor="middle">{}</text>"#,
            y + 18.0,
            number(tick)
        );
    }
    y_axis(&mut svg, y_top, y_step, |tick| place(0.0, tick).1);
    for (index, series) in series.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let finite = series
            .points
            .iter()
            .filter(|(x, y)| x.is_finite() && y.is_finite());
        let placed: Vec<(f64, f64)> = finite.map(|&(x, y)| place(x, y)).collect();
        let points: Vec<String> = placed
            .iter()
            .map(|(x, y)| format!("{x:.1},{y:.1}"))
            .collect();
        let _ = writeln!(
            svg,
            r#"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="2"/>"#,
            points.join(" ")
        );
        for (x, y) in placed {
            let _ = writeln!(
                svg,
                r#"<circle cx="{x:.1}" cy="{y:.1}" r="3" fill="{colour}"/>"#
            );
        }
        let y = TOP + 16.0 * index as f64;
        let _ = writeln!(
            svg,
            r#"<text x="{:.1}" y="{y:.1}" text-anchor="end" fill="{colour}">{}</text>"#,
            WIDTH - RIGHT,
            escape(&series.name)
        );
    }
    svg + "</svg>\n"
}

/// A bar for each name.
pub(crate) fn bars(title: &str, y_name: &str, bars: &[(String, f64)]) -> String {
    let y_max = bars
        .iter()
        .map(|bar| bar.1)
        .filter(|y| y.is_finite())
        .fold(0.0, f64::max);
    let y_step = step(y_max);
    let y_top = ceil(y_max, y_step);
    let place = |y: f64| HEIGHT - BOTTOM - y / y_top * (HEIGHT - TOP - BOTTOM);
    let mut svg = frame(title, "", y_name);
    y_axis(&mut svg, y_top, y_step, place);
    let room = (WIDTH - LEFT - RIGHT) / bars.len().max(1) as f64;
    for (index, (name, value)) in bars.iter().enumerate() {
        let x = LEFT + room * index as f64;
        let middle = x + room / 2.0;
        if value.is_finite() {
            let y = place(*value);
            let _ = writeln!(
                svg,
                r#"<rect x="{:.1}" y="{y:.1}" width="{:.1}" height="{:.1}" fill="{}"><title>{}: {}</title></rect>"#,
                x + room * 0.1,
                room * 0.8,
                HEIGHT - BOTTOM - y,
                COLOURS[0],
                escape(name),
                number(*value)
            );
        }
        let y = HEIGHT - BOTTOM + 12.0;
        let _ = writeln!(
            svg,
            r#"<text x="{middle:.1}" y="{y:.1}" text-anchor="end" font-size="10" transform="rotate(-35 {middle:.1} {y:.1})">{}</text>"#,
            escape(name)
        );
    }
    svg + "</svg>\n"
}

/// Text inside SVG and HTML.
pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

fn frame(title: &str, x_name: &str, y_name: &str) -> String {
    let (bottom, middle) = (HEIGHT - BOTTOM, (HEIGHT - BOTTOM + TOP) / 2.0);
    format!(
        concat!(
            r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}" font-family="sans-serif" font-size="12">"#,
            "\n",
            r##"<rect width="{w}" height="{h}" fill="white"/>"##,
            "\n",
            r#"<text x="{left}" y="20" font-size="14" font-weight="bold">{title}</text>"#,
            "\n",
            r#"<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="black"/>"#,
            "\n",
            r#"<text x="{centre}" y="{low}" text-anchor="middle">{x_name}</text>"#,
            "\n",
            r#"<text x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">{y_name}</text>"#,
            "\n"
        ),
        w = WIDTH,
        h = HEIGHT,
        left = LEFT,
        right = WIDTH - RIGHT,
        top = TOP,
        bottom = bottom,
        centre = (LEFT + WIDTH - RIGHT) / 2.0,
        low = HEIGHT - 12.0,
        middle = middle,
        title = escape(title),
        x_name = escape(x_name),
        y_name = escape(y_name),
    )
}

fn y_axis(svg: &mut String, top: f64, step: f64, place: impl Fn(f64) -> f64) {
    for tick in ticks(top, step) {
        let y = place(tick);
        let _ = writeln!(
            svg,
            r##"<path d="M{LEFT} {y:.1}H{:.1}" stroke="#d0d7de"/>"##,
            WIDTH - RIGHT
        );
        let _ = writeln!(
            svg,
            r#"<text x="{:.1}" y="{:.1}" text-anchor="end">{}</text>"#,
            LEFT - 6.0,
            y + 4.0,
            number(tick)
        );
    }
}

/// A round distance between ticks: 1, 2 or 5 times a power of ten, such that there are from four to ten.
fn step(max: f64) -> f64 {
    if max <= 0.0 {
        return 1.0;
    }
    let power = 10f64.powf((max / 4.0).log10().floor());
    let fits = [5.0, 2.0]
        .into_iter()
        .find(|times| times * power <= max / 4.0);
    fits.unwrap_or(1.0) * power
}

fn ceil(max: f64, step: f64) -> f64 {
    (max / step - 1e-9).ceil().max(1.0) * step
}

fn ticks(top: f64, step: f64) -> impl Iterator<Item = f64> {
    (0..=(top / step).round() as usize).map(move |index| index as f64 * step)
}

fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if size >= 10_000.0 => format!("{:.0}k", value / 1e3),
        size if size >= 10.0 => format!("{value:.0}"),
        size if size >= 1.0 => format!("{:.2}", value)
            .trim_end_matches('0')
            .trim_end_matches('.')
            .to_owned(),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_four_to_ten_ticks() {
        for max in [1e-6, 0.3, 1.0, 7.0, 9.99, 10.0, 12345.0, 4e9] {
            let step = step(max);
            let count = ticks(ceil(max, step), step).count() - 1;
            assert!((4..=10).contains(&count), "{max}: {count} of {step}");
        }
    }

    #[test]
    fn a_plot_has_every_point_and_escapes_names() {
        let series = Series {
            name: "a<b".to_owned(),
            points: vec![(1.0, 10.0), (2.0, f64::NAN), (3.0, 30.0)],
        };
        let svg = lines("t & u", "x", "y", &[series]);
        assert_eq!(svg.matches("<circle").count(), 2);
        assert!(svg.contains("a&lt;b") && svg.contains("t &amp; u"));
        let svg = bars(
            "t",
            "y",
            &[("one".to_owned(), 1.0), ("two".to_owned(), 2.0)],
        );
        assert_eq!(svg.matches("<rect").count(), 3, "two bars and the ground");
        assert!(lines("empty", "", "", &[]).ends_with("</svg>\n"));
    }
}
