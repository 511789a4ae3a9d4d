//! `volley top`: what a running cluster is doing, in a terminal.
//!
//! It asks a server, over HTTP like any other client, for `/admin/state`, `/admin/experts` and `/metrics`: two such [`Sample`]s and the time between them make a
//! [`View`], and a view is drawn. Nothing of it runs in the server, so it can be as far away as a browser; a server that is away is said to be, and asked again.

mod draw;
mod sample;
mod view;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyModifiers};
use ratatui::{DefaultTerminal, Terminal};

use crate::failure::Failure;
use crate::http_client::HttpClient;
use crate::serve::read_api_key;
use sample::Sample;
use view::View;

/// Watch a server: workers, time on each side, queue, experts, hops.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct TopArgs {
    /// The server's HTTP address
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8000")]
    url: String,
    /// File with the server's API key
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, value_parser = interval)]
    interval: f64,
    /// Look once, over one interval, and print it as text: for logs, and where there is no terminal
    #[arg(long)]
    once: bool,
    /// As --once, as one JSON object
    #[arg(long)]
    json: bool,
}

const AFTER_HELP: &str = "\
Rates are over the last interval. T_a and T_e are a side's computing in one layer for one micro-batch, T_c is one way between them; the lights are the conditions of the
MegaScale-Infer paper (section 4.1): both sides take alike long, the network is hidden, and how many micro-batches that takes.

  volley top                              the server of this machine; q leaves
  volley top --url http://HOST:8000 --interval 5
  volley top --once | tee -a cluster.log
  volley top --json | jq .tokens_per_s";

/// Size of what --once prints, where there is no terminal to ask.
const PRINTED: (u16, u16) = (120, 40);
/// How often keys are looked for.
const KEYS: Duration = Duration::from_millis(100);

fn interval(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("it must be a number of seconds from 0.1 to 3600".to_owned()),
    }
}

/// Watches until it is told to leave.
///
/// # Errors
/// With `--once` or `--json` when the server cannot be asked; else only when the terminal cannot be used.
pub(crate) fn run(args: TopArgs) -> Result<(), Failure> {
    let key = args.api_key_file.as_deref().map(read_api_key).transpose()?;
    let server = Server {
        client: HttpClient::new(&args.url, key.as_deref())?,
        url: args.url.clone(),
        runtime: tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| Failure::new(format!("threads cannot be started: {error}")))?,
    };
    let interval = Duration::from_secs_f64(args.interval);
    if args.once || args.json {
        let view = server.view_over(interval)?;
        if args.json {
            println!("{}", view.json());
            return Ok(());
        }
        print!("{}", printed(&view, &args.url)?);
        return Ok(());
    }
    if !std::io::stdout().is_terminal() {
        return Err(Failure::new(
            "standard output is no terminal; --once or --json print what is to be seen",
        ));
    }
    let mut terminal = ratatui::try_init()
        .map_err(|error| Failure::new(format!("the terminal cannot be used: {error}")))?;
    let result = watch(&server, interval, &mut terminal);
    ratatui::restore();
    result.map_err(|error| Failure::new(format!("the terminal failed: {error}")))
}

struct Server {
    client: HttpClient,
    url: String,
    runtime: tokio::runtime::Runtime,
}

impl Server {
    fn sample(&self) -> Result<Sample, String> {
        self.runtime.block_on(Sample::take(&self.client))
    }

    fn view_over(&self, interval: Duration) -> Result<View, Failure> {
        let failed = |error| Failure::new(format!("{}: {error}", self.url));
        let before = self.sample().map_err(failed)?;
        std::thread::sleep(interval);
        Ok(View::between(&before, &self.sample().map_err(failed)?))
    }
}

/// A view as it would look, without colours.
fn printed(view: &View, url: &str) -> Result<String, Failure> {
    let (width, height) = PRINTED;
    let mut terminal = Terminal::new(TestBackend::new(width, height))
        .map_err(|error| Failure::new(error.to_string()))?;
    let drawn = terminal.draw(|frame| draw::draw(frame, url, &Ok(view.clone())));
    drawn.map_err(|error| Failure::new(error.to_string()))?;
    let cells = terminal.backend().buffer().content().chunks(width.into());
    let lines = cells.map(|row| {
        let line: String = row.iter().map(|cell| cell.symbol()).collect();
        line.trim_end().to_owned() + "\n"
    });
    let text: String = lines.collect();
    Ok(text.trim_end().to_owned() + "\n")
}

fn watch(
    server: &Server,
    interval: Duration,
    terminal: &mut DefaultTerminal,
) -> std::io::Result<()> {
    let mut before = None;
    let mut shown: Result<View, String> = Err("asking".to_owned());
    loop {
        let due = Instant::now() + interval;
        shown = match (server.sample(), before.take()) {
            (Ok(now), Some(then)) => {
                let view = View::between(&then, &now);
                before = Some(now);
                Ok(view)
            }
            (Ok(now), None) => {
                before = Some(now);
                shown
            }
            (Err(error), _) => Err(error),
        };
        loop {
            terminal.draw(|frame| draw::draw(frame, &server.url, &shown))?;
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            if !event::poll(left.min(KEYS))? {
                continue;
            }
            if let Event::Key(key) = event::read()? {
                let interrupt =
                    key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('c');
                if interrupt || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc) {
                    return Ok(());
                }
            }
        }
    }
}
