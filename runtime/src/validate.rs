//! `volley validate`: everything that could be refused at the start or go wrong in the first minute, checked without serving.

use std::io::Write;

use clap::Args;
use volley_models::{ChatError, ModelDir, ModelError};

use crate::config::{ByteSize, Demand, Raw, Settings};
use crate::failure::Failure;
use crate::flags::{ConfigFlags, Serving};
use crate::{launch, logging, memory, numerics, serve};

/// Check configuration, model, memory and port without serving.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct ValidateArgs {
    #[command(flatten)]
    config: ConfigFlags<Serving>,
    /// Also run a short prompt and hold its log-probabilities against the reference implementation
    #[arg(long)]
    numerics: bool,
    /// Print the resolved configuration as TOML instead of a summary
    #[arg(long, conflicts_with = "numerics")]
    print_config: bool,
}

const AFTER_HELP: &str = "\
Examples:
  volley validate --config volley.toml
  volley validate --model ~/models/Mixtral-8x7B --expert-workers 4
  volley validate --model DIR --numerics
  volley validate --model DIR --print-config > volley.toml

Exit code 1 with every problem listed if something is wrong.";

/// What was found wrong, in order.
#[derive(Debug, Default)]
struct Findings(Vec<String>);

impl Findings {
    fn keep<T, E: std::fmt::Display>(&mut self, result: Result<T, E>) -> Option<T> {
        result.map_err(|error| self.0.push(error.to_string())).ok()
    }
}

/// Checks and reports.
///
/// # Errors
/// With everything that is wrong.
pub fn run(args: ValidateArgs) -> Result<(), Failure> {
    // Without a sound configuration there is no telling what to check next; it lists all its own problems.
    let raw = args.config.with_default("log.level", "warn").load()?;
    logging::start(&raw.log);
    let mut findings = Findings::default();
    let (host, port) = raw.address();
    findings.keep(serve::listen(host, port));
    if let Some(file) = raw.api_key_file() {
        findings.keep(serve::read_api_key(file));
    }
    let checked = findings
        .keep(launch::open_model(&raw))
        .and_then(|model| check_model(&raw, model, &mut findings));
    if !findings.0.is_empty() {
        return Err(report(&findings.0));
    }
    let Some((model, settings)) = checked else {
        return Ok(());
    };
    if args.print_config {
        let mut out = std::io::stdout();
        return write!(out, "{}", settings.to_toml(model.spec())).map_err(Failure::output);
    }
    summarise(&model, &settings).map_err(Failure::output)?;
    if args.numerics {
        numerics::run(&model, &settings)
    } else {
        Ok(())
    }
}

/// Checks what hangs on the model: texts, settings, memory.
fn check_model(
    raw: &Raw,
    model: ModelDir,
    findings: &mut Findings,
) -> Option<(ModelDir, Settings)> {
    findings.keep(model.tokenizer());
    match model.chat_template() {
        Err(ModelError::Chat {
            source: ChatError::NoTemplate,
            ..
        })
        | Ok(_) => {}
        Err(error) => findings.0.push(error.to_string()),
    }
    let available = memory::available_bytes();
    let resolved = Settings::resolve(raw, model.spec(), model.name(), available, Demand::Serving);
    let settings = findings.keep(resolved)?;
    let plan = findings.keep(settings.cluster.memory(model.spec()))?;
    findings.keep(launch::check_memory(&plan, available));
    Some((model, settings))
}

fn report(findings: &[String]) -> Failure {
    let list: Vec<_> = findings
        .iter()
        .map(|text| format!("\n  - {}", text.replace('\n', "\n    ")))
        .collect();
    let noun = if findings.len() == 1 {
        "problem"
    } else {
        "problems"
    };
    Failure::new(format!("{} {noun} found:{}", findings.len(), list.concat()))
}

fn summarise(model: &ModelDir, settings: &Settings) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    let (spec, cluster) = (model.spec(), &settings.cluster);
    writeln!(
        out,
        "model      {}: {:?}, {} layers, hidden {}, {} experts (top {}), vocabulary {}, stored as {}",
        settings.model.name,
        spec.architecture,
        spec.layers.len(),
        spec.hidden,
        spec.experts,
        spec.top_k,
        spec.vocab,
        spec.stored_as
            .map_or("unknown".to_owned(), |stored| format!("{stored:?}")
                .to_lowercase()),
    )?;
    writeln!(
        out,
        "cluster    {} attention x {} expert workers, {} micro-batches, {}",
        cluster.attention_workers,
        cluster.expert_workers,
        cluster.micro_batches,
        cluster.precision()
    )?;
    writeln!(
        out,
        "limits     context {}, {} tokens a step ({} of prompts), {} KV blocks of {} tokens for each attention worker, {} waiting",
        cluster.context,
        cluster.max_rows,
        cluster.prefill_tokens,
        cluster.kv_blocks,
        cluster.block_tokens,
        cluster.max_waiting
    )?;
    writeln!(
        out,
        "server     http://{}:{} is free, {}",
        settings.server.host,
        settings.server.port,
        if settings.server.api_key_file.is_some() {
            "a key is asked for"
        } else {
            "no key is asked for"
        }
    )?;
    match settings.cluster.memory(spec) {
        Ok(plan) => writeln!(out, "memory\n{plan}")?,
        Err(error) => writeln!(out, "memory     {error}")?,
    }
    if let Some(available) = memory::available_bytes() {
        writeln!(out, "available  {}", ByteSize(available))?;
    }
    writeln!(out, "all is well")
}
