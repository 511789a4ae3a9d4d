//! `volley drain`: takes a worker's work away, and ends when the worker may be stopped.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use volley_transports::Role;

use crate::failure::Failure;
use crate::http_client::HttpClient;
use crate::serve::read_api_key;

/// How often the server is asked how far it is.
const POLL: Duration = Duration::from_millis(200);

/// Move a worker's work elsewhere, and say when its process may be stopped.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct DrainArgs {
    /// What the worker computes
    #[arg(long)]
    role: WorkerRole,
    /// Its number among the workers of its role, from 0
    #[arg(long, value_name = "N")]
    index: u16,
    /// The server's HTTP address
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8000")]
    url: String,
    /// File with the server's API key
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Give up after so many seconds; the worker stays drained as far as it is
    #[arg(long, value_name = "SECONDS", default_value_t = 120.0)]
    timeout: f64,
    /// Have the worker used again
    #[arg(long)]
    undo: bool,
    /// One JSON object on standard output instead of lines
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum WorkerRole {
    /// Requests and their KV cache
    Attention,
    /// A share of every layer's experts
    Expert,
}

const AFTER_HELP: &str = "\
Streams go on. Sequences of an attention worker are computed again on others; rows of an expert worker go to replicas, or to workers that load its experts
(cluster.spare_experts). The process stays until it is stopped, and is used again after --undo, or when it is started again.

  volley drain --role expert --index 1 && systemctl stop volley-expert@1
  volley drain --role expert --index 1 --undo

Exit codes: 0 it may be stopped, 1 it may not: the others do not suffice, or there is no such worker.";

/// Runs until the worker may be stopped.
///
/// # Errors
/// The server cannot be reached or refuses, or the time is up.
pub fn run(args: DrainArgs) -> Result<(), Failure> {
    let key = args.api_key_file.as_deref().map(read_api_key).transpose()?;
    let client = HttpClient::new(&args.url, key.as_deref())?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(format!("threads cannot be started: {error}")))?;
    let state = runtime.block_on(drain(&args, &client));
    let state = state.map_err(|error| Failure::new(format!("{}: {error}", args.url)))?;
    if args.json {
        println!("{state}");
    }
    let worker = worker_name(&args);
    if args.undo || state["safe_to_stop"] == true {
        let done = if args.undo {
            "is used again"
        } else {
            "has no work left; its process may be stopped"
        };
        if !args.json {
            println!("{worker} {done}");
        }
        return Ok(());
    }
    Err(Failure::new(format!(
        "{worker} still takes part after {} s: the others do not suffice. An expert worker needs cluster.expert_replicas of 2 or more, or cluster.spare_experts; an attention \
         worker another one. Its work moves as soon as they do; `--undo` takes the wish back",
        args.timeout
    )))
}

fn worker_name(args: &DrainArgs) -> String {
    let role = match args.role {
        WorkerRole::Attention => Role::Attention,
        WorkerRole::Expert => Role::Expert,
    };
    role.worker(args.index).to_string()
}

/// Asks, and looks until it is done or the time is up; returns how the seat stands.
async fn drain(args: &DrainArgs, client: &HttpClient) -> Result<Value, String> {
    let name = worker_name(args);
    let (role, _) = name.split_once('-').unwrap_or((&name, ""));
    let wish = json!({"role": role, "index": args.index, "undo": args.undo});
    let answer = client.post("/admin/drain", wish.to_string().into()).await?;
    // Its body is the seat as it stood at once; what follows is looked up below.
    drop(answer);
    let until = Instant::now() + Duration::from_secs_f64(args.timeout.max(0.0));
    let mut said = String::new();
    loop {
        let state = client.get("/admin/state").await?;
        let workers = state["workers"]
            .as_array()
            .ok_or("the server does not list its workers")?;
        let seat = workers.iter().find(|seat| seat["worker"] == name.as_str());
        let seat = seat.ok_or("the server does not list this worker")?;
        let done = args.undo || seat["safe_to_stop"] == true;
        let others = workers
            .iter()
            .filter(|of| !of["since_epoch"].is_null() && of["worker"] != name.as_str());
        let line = format!(
            "{name}: {}; epoch {}, {} other workers take part, {} requests live, {} wait",
            if done {
                "out"
            } else {
                "still in, until the others suffice"
            },
            state["epoch"],
            others.count(),
            state["live"],
            state["waiting"]
        );
        if line != said && !args.json {
            eprintln!("{line}");
            said = line;
        }
        if done || Instant::now() >= until {
            return Ok(seat.clone());
        }
        tokio::time::sleep(POLL).await;
    }
}
