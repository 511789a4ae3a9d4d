//! A view on the screen.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Paragraph};

use super::sample::Worker;
use super::view::{StepTimes, View};

/// Sides that differ by more are out of balance (condition 1).
const BALANCED: f64 = 0.8;

/// Draws the last view, or what keeps it from being known.
pub(super) fn draw(frame: &mut Frame<'_>, url: &str, shown: &Result<View, String>) {
    let view = match shown {
        Ok(view) => view,
        Err(reason) => {
            let text = Line::from(format!("{url}: {reason}").red());
            frame.render_widget(Paragraph::new(text), frame.area());
            return;
        }
    };
    let workers = view.state.workers.len() as u16 + 2;
    let experts = view.experts.len() as u16 + 2;
    let [head, step, middle, map, hops] = Layout::vertical([
        Constraint::Length(3),
        Constraint::Length(8),
        Constraint::Max(workers.max(3)),
        Constraint::Max(experts.max(3)),
        Constraint::Min(0),
    ])
    .areas(frame.area());
    summary(frame, head, url, view);
    times(frame, step, view);
    seats(frame, middle, view);
    heat(frame, map, view);
    slow_hops(frame, hops, view);
}

fn panel(title: &str) -> Block<'_> {
    Block::bordered()
        .border_style(Style::new().dim())
        .title(title)
}

fn summary(frame: &mut Frame<'_>, area: Rect, url: &str, view: &View) {
    let state = &view.state;
    let mut spans: Vec<Span<'_>> = vec![
        format!("{:.0} tokens/s", view.tokens_per_s).bold(),
        format!(
            "  prompts {:.0}/s  running {}  waiting {}  ended {:.0}",
            view.prompt_per_s,
            state.live.saturating_sub(state.waiting),
            state.waiting,
            view.ended
        )
        .into(),
    ];
    if view.errors > 0.0 {
        spans.push(format!("  failed {:.0}", view.errors).red());
    }
    let mean = |name, time: Option<f64>| {
        let time = time.map_or_else(|| "-".to_owned(), seconds);
        Span::from(format!("  {name} {time}"))
    };
    spans.push(mean("TTFT", view.first_token));
    spans.push(mean("TPOT", view.between_tokens));
    if state.draining {
        spans.push("  draining".yellow());
    }
    if let Some(reason) = &state.failed {
        spans.push(format!("  {reason}").red());
    }
    let scheduler = match (&state.scheduler, state.standby.len()) {
        (Some(name), 0) => format!("  scheduler {name}"),
        (Some(name), more) => format!("  scheduler {name} (+{more})"),
        (None, _) => String::new(),
    };
    let title = format!(" {url}  epoch {}{scheduler} ", state.epoch);
    let text = Paragraph::new(Line::from(spans)).block(panel(&title));
    frame.render_widget(text, area);
}

fn times(frame: &mut Frame<'_>, area: Rect, view: &View) {
    let title = " a layer of a micro-batch ";
    let Some(step) = view.step else {
        let text = Paragraph::new("no step ended").block(panel(title));
        frame.render_widget(text, area);
        return;
    };
    let longest = [
        step.attention,
        step.expert,
        step.hop,
        step.queued,
        step.ready,
    ]
    .into_iter()
    .fold(0.0, f64::max);
    let width = usize::from(area.width.saturating_sub(40)).min(60);
    let bar = |name: &'static str, time: f64, colour: Color| {
        let cells = (time / longest.max(f64::MIN_POSITIVE) * width as f64).round() as usize;
        Line::from(vec![
            format!("{name:22} {:>9}  ", seconds(time)).into(),
            Span::styled("█".repeat(cells), colour),
        ])
    };
    let lines = vec![
        bar("T_a attention", step.attention, Color::Blue),
        bar("T_e experts", step.expert, Color::Green),
        bar("T_c one way", step.hop, Color::Yellow),
        bar("queued at experts", step.queued, Color::DarkGray),
        bar("ready at attention", step.ready, Color::DarkGray),
        conditions(&step, view.steps_per_s),
    ];
    frame.render_widget(Paragraph::new(lines).block(panel(title)), area);
}

/// The paper's conditions as lights.
fn conditions(step: &StepTimes, steps_per_s: f64) -> Line<'static> {
    let light = |good: bool, text: String| match good {
        true => format!("● {text}").green(),
        false => format!("○ {text}").red(),
    };
    let balance = step.balance();
    Line::from(vec![
        light(
            balance >= BALANCED,
            format!("(1) sides alike: {balance:.2}"),
        ),
        "   ".into(),
        light(step.hidden(), "(2) T_c < T_f".to_owned()),
        format!("   (3) m >= {:.1}", step.micro_batches()).into(),
        format!(
            "   {steps_per_s:.0} steps/s of {:.1} rows, {} each",
            step.rows,
            seconds(step.total)
        )
        .into(),
    ])
}

fn seats(frame: &mut Frame<'_>, area: Rect, view: &View) {
    let attention = &view.state.attention;
    let line = |worker: &Worker| {
        let (word, colour) = match (worker.present, worker.leaving, worker.since_epoch) {
            (false, ..) => ("lost", Color::Red),
            (true, true, _) => ("leaving", Color::Yellow),
            (true, false, None) => ("aside", Color::Yellow),
            (true, false, Some(_)) => ("serving", Color::Green),
        };
        let mut spans: Vec<Span<'_>> = vec![
            format!("{:14} ", worker.worker).into(),
            Span::styled(format!("{word:8} "), colour),
        ];
        let index = worker.worker.strip_prefix("attention-");
        if let Some(books) = index
            .and_then(|index| index.parse::<usize>().ok())
            .and_then(|index| attention.get(index))
        {
            let used = f64::from(books.kv_blocks - books.free_blocks.min(books.kv_blocks));
            let share = used / f64::from(books.kv_blocks.max(1));
            let cells = (share * 20.0).round() as usize;
            spans.push(format!("{:4} sequences  KV ", books.sequences).into());
            spans.push(Span::styled("█".repeat(cells), Color::Blue));
            spans.push("░".repeat(20 - cells.min(20)).dim());
            spans.push(format!(" {:3.0} %", share * 100.0).into());
        }
        match &worker.waits {
            None if worker.present => spans.push("  does not answer".red()),
            Some(waits) => {
                let longest = waits.iter().max_by(|a, b| a.seconds.total_cmp(&b.seconds));
                // What is shorter is the rally itself.
                if let Some(wait) = longest.filter(|wait| wait.seconds > 0.5) {
                    let text = format!(
                        "  waits {} for {} (layer {})",
                        seconds(wait.seconds),
                        wait.peers.join(", "),
                        wait.layer
                    );
                    spans.push(text.yellow());
                }
            }
            None => {}
        }
        Line::from(spans)
    };
    let lines: Vec<Line<'_>> = view.state.workers.iter().map(line).collect();
    frame.render_widget(Paragraph::new(lines).block(panel(" workers ")), area);
}

/// A row for each layer, a cell for each expert: how much more or less than its share it computed.
fn heat(frame: &mut Frame<'_>, area: Rect, view: &View) {
    const SHADES: [(f64, &str, Color); 5] = [
        (0.25, "·", Color::DarkGray),
        (0.75, "░", Color::Blue),
        (1.33, "▒", Color::Green),
        (2.0, "▓", Color::Yellow),
        (f64::INFINITY, "█", Color::Red),
    ];
    let columns = usize::from(area.width.saturating_sub(12)).max(1);
    let line = |(layer, rows): (usize, &Vec<u64>)| {
        let mean = rows.iter().sum::<u64>() as f64 / rows.len().max(1) as f64;
        // More experts than columns: neighbours share one, and the hottest is shown.
        let shared = rows.len().div_ceil(columns).max(1);
        let mut spans: Vec<Span<'_>> = vec![format!("layer {layer:3}  ").dim()];
        for group in rows.chunks(shared) {
            let most = group.iter().copied().max().unwrap_or(0) as f64;
            let ratio = if mean > 0.0 { most / mean } else { 0.0 };
            let shade = SHADES.iter().find(|(bound, ..)| ratio < *bound);
            let (_, symbol, colour) = shade.unwrap_or(&SHADES[4]);
            spans.push(Span::styled(*symbol, *colour));
        }
        Line::from(spans)
    };
    let lines: Vec<Line<'_>> = view.experts.iter().enumerate().map(line).collect();
    let title = " experts: rows beside a layer's mean ( · none  ░ little  ▒ its share  ▓ much  █ twice and more ) ";
    frame.render_widget(Paragraph::new(lines).block(panel(title)), area);
}

fn slow_hops(frame: &mut Frame<'_>, area: Rect, view: &View) {
    if area.height < 3 {
        return;
    }
    let busier = view.step.map_or(f64::INFINITY, |step| step.busier());
    let lines = view.hops.iter().map(|hop| {
        let text = format!(
            "{:14} {:12} median {:>9}   P99 {:>9}",
            hop.worker,
            hop.peer,
            seconds(hop.median),
            seconds(hop.p99)
        );
        match hop.p99 >= busier {
            true => Line::from(text.yellow()),
            false => Line::from(text),
        }
    });
    let mut lines: Vec<Line<'_>> = lines.collect();
    if lines.is_empty() {
        lines.push("known after ten seconds with work; workers on other hosts show theirs at their own /metrics".dim().into());
    }
    let text = Paragraph::new(lines).block(panel(" slowest hops, one way "));
    frame.render_widget(text, area);
}

/// Three digits and a unit.
fn seconds(time: f64) -> String {
    let (value, unit) = match time {
        t if t >= 1.0 => (t, "s"),
        t if t >= 1e-3 => (t * 1e3, "ms"),
        t => (t * 1e6, "us"),
    };
    match value {
        v if v >= 100.0 => format!("{v:.0} {unit}"),
        v if v >= 10.0 => format!("{v:.1} {unit}"),
        v => format!("{v:.2} {unit}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::printed;
    use super::super::view::tests::view;
    use super::*;

    #[test]
    fn what_matters_is_on_the_screen() {
        let text = printed(&view(), "http://h:1").unwrap();
        for expected in [
            "http://h:1  epoch 3  scheduler one (+1)",
            "150 tokens/s",
            "running 3  waiting 2",
            "failed 1",
            "T_e experts",
            "4.00 ms",
            "(1) sides alike: 0.50",
            "● (2) T_c < T_f",
            "(3) m >= 3.0",
            "waits 1.50 s for expert-1 (layer 2)",
            "expert-1       lost",
            "75 %",
            "layer   1  ·█▒",
            "P99    400 us",
        ] {
            assert!(text.contains(expected), "{expected} is not in\n{text}");
        }
    }

    #[test]
    fn a_small_terminal_and_a_server_that_is_away_are_no_reason_to_fail() {
        use ratatui::Terminal;
        use ratatui::backend::TestBackend;
        for (width, height) in [(1, 1), (20, 5), (80, 24), (300, 100)] {
            let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
            for shown in [Ok(view()), Err("connection refused".to_owned())] {
                terminal
                    .draw(|frame| draw(frame, "http://h:1", &shown))
                    .unwrap();
            }
        }
    }

    #[test]
    fn times_have_three_digits() {
        assert_eq!(
            [12.345, 0.5, 0.012_34, 1.5e-6].map(seconds),
            ["12.3 s", "500 ms", "12.3 ms", "1.50 us"]
        );
    }
}
