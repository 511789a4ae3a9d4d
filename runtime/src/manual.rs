//! `volley completions`, `volley manual` and `volley config`: the command line and the table of keys explain themselves, so none of it can be out of date.

use std::io::Write;
use std::path::PathBuf;

use clap::{Args, Command, Subcommand};
use clap_complete::Shell;
use serde_json::json;

use crate::config::keys::{self, Default as KeyDefault, Key};
use crate::config::suggest;
use crate::failure::Failure;

/// Print completions for a shell.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  volley completions bash > ~/.local/share/bash-completion/completions/volley
  volley completions zsh  > ~/.zfunc/_volley
  volley completions fish > ~/.config/fish/completions/volley.fish")]
pub(crate) struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

/// Write manual pages, one for each command.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  volley manual ~/.local/share/man/man1 && man volley-serve")]
pub(crate) struct ManualArgs {
    /// Where to; made if it is not there
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

/// Explain the keys of the configuration.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  volley config explain                            every key with its default, a line each
  volley config explain cluster.micro_batches      one key, wholly
  volley config explain cluster                    a section
  volley validate --print-config --config FILE     what a file means, with every `auto` replaced")]
pub(crate) struct ConfigArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// What a key decides, its values, default, flag and variable
    Explain {
        /// A key or a section; all keys if it is left out
        key: Option<String>,
        /// An array of objects, one for each key
        #[arg(long)]
        json: bool,
    },
}

/// Prints the completions of `command`.
///
/// # Errors
/// Standard output is closed.
pub(crate) fn completions(args: &CompletionsArgs, mut command: Command) -> Result<(), Failure> {
    // Into memory first: the generator panics when a pipe is closed.
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut command, "volley", &mut text);
    std::io::stdout().write_all(&text).map_err(Failure::output)
}

/// Writes the pages of `command` and of each command below it.
///
/// # Errors
/// The folder cannot be written to.
pub(crate) fn manual(args: &ManualArgs, command: Command) -> Result<(), Failure> {
    let cannot = |error| {
        Failure::new(format!(
            "manual pages cannot be written to {}: {error}",
            args.folder.display()
        ))
    };
    std::fs::create_dir_all(&args.folder).map_err(cannot)?;
    clap_mangen::generate_to(command.disable_help_subcommand(true), &args.folder).map_err(cannot)
}

/// Explains.
///
/// # Errors
/// There is no such key, or standard output is closed.
pub(crate) fn config(args: ConfigArgs) -> Result<(), Failure> {
    let What::Explain { key, json } = args.what;
    let wanted: Vec<&Key> = match &key {
        None => keys::KEYS.iter().collect(),
        Some(name) => {
            let found = keys::KEYS.iter();
            found
                .filter(|key| key.path == name || key.section() == name)
                .collect()
        }
    };
    if let (Some(name), true) = (&key, wanted.is_empty()) {
        let near = suggest::key(name).or_else(|| suggest::section(name));
        let near = near.map_or_else(String::new, |near| format!("; did you mean `{near}`?"));
        return Err(Failure::new(format!(
            "there is no key or section `{name}`{near} `volley config explain` lists all"
        )));
    }
    let text = if json {
        let keys: Vec<_> = wanted.iter().map(|key| object(key)).collect();
        format!("{:#}\n", serde_json::Value::from(keys))
    } else if wanted.len() == 1 {
        whole(wanted[0])
    } else {
        let width = wanted.iter().map(|key| key.path.len()).max().unwrap_or(0);
        let line = |key: &&Key| format!("{:width$}  {}\n", key.path, default(key));
        wanted.iter().map(line).collect()
    };
    std::io::stdout()
        .write_all(text.as_bytes())
        .map_err(Failure::output)
}

fn default(key: &Key) -> &'static str {
    match key.default {
        KeyDefault::Value(value) => value,
        KeyDefault::Unset(meaning) => meaning,
    }
}

fn whole(key: &Key) -> String {
    let mut text = format!(
        "{}\n\n{}\n\nvalues:    {}\ndefault:   {}\nvariable:  {}\n",
        key.path,
        key.help,
        key.kind,
        default(key),
        key.variable()
    );
    if let Some(flag) = key.flag {
        text += &format!("flag:      --{flag}\n");
    }
    text + &format!(
        "file:      [{}]\n           {} = ...\n",
        key.section(),
        key.name()
    )
}

fn object(key: &Key) -> serde_json::Value {
    let (value, unset) = match key.default {
        KeyDefault::Value(value) => (Some(value), None),
        KeyDefault::Unset(meaning) => (None, Some(meaning)),
    };
    json!({
        "key": key.path,
        "values": key.kind.to_string(),
        "default": value,
        "unset_means": unset,
        "flag": key.flag.map(|flag| format!("--{flag}")),
        "variable": key.variable(),
        "help": key.help,
    })
}
