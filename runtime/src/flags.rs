//! Configuration keys as flags: the table of keys gives each its name, help, values and check, so that no flag can drift from its key.

use std::marker::PhantomData;
use std::path::PathBuf;

use clap::builder::{PossibleValue, TypedValueParser};
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgMatches, Args, Command, FromArgMatches, ValueHint};

use crate::config::keys::{self, Default as KeyDefault, Key};
use crate::config::{ConfigError, FlagValues, Kind, Raw, environment};

/// The configuration of a command, before anything is known of the model.
#[derive(Debug, Clone)]
pub struct ConfigFlags<S> {
    file: Option<PathBuf>,
    values: FlagValues,
    sections: PhantomData<S>,
}

/// Sections whose keys are flags of a command.
pub trait Sections {
    /// Their names.
    const SECTIONS: &'static [&'static str];
    /// The level of the log, unless something else is asked for.
    const LOG_LEVEL: &'static str;
}

/// For commands that serve, or check what would be served: all sections.
#[derive(Debug, Clone)]
pub struct Serving;

impl Sections for Serving {
    const SECTIONS: &'static [&'static str] = &[
        "model",
        "cluster",
        "limits",
        "scheduler",
        "network",
        "membership",
        "server",
        "log",
        "trace",
    ];
    const LOG_LEVEL: &'static str = "info";
}

/// For processes of a cluster that hold no model.
#[derive(Debug, Clone)]
pub struct Joining;

impl Sections for Joining {
    const SECTIONS: &'static [&'static str] = &["scheduler", "network", "membership", "log"];
    const LOG_LEVEL: &'static str = "info";
}

/// For commands that run the model and end.
#[derive(Debug, Clone)]
pub struct Offline;

impl Sections for Offline {
    const SECTIONS: &'static [&'static str] =
        &["model", "cluster", "limits", "scheduler", "network", "log"];
    // What such a command has to say stands on standard output.
    const LOG_LEVEL: &'static str = "warn";
}

const CONFIG: &str = "config";
const LOG_LEVEL: &str = "log.level";

impl<S: Sections> ConfigFlags<S> {
    /// Reads file and environment under the flags that were given.
    ///
    /// # Errors
    /// With all that is wrong in them.
    pub fn load(&self) -> Result<Raw, ConfigError> {
        Raw::load(self.file.as_deref(), environment(), &self.values)
    }

    /// Reads this file, if one is given, instead of that of `--config`.
    pub fn with_file(mut self, file: Option<PathBuf>) -> Self {
        self.file = file.or(self.file);
        self
    }

    /// Sets the default of this command for a key, where it differs from the table's.
    pub fn with_default(mut self, key: &'static str, value: impl ToString) -> Self {
        self.values.set_default(key, value);
        self
    }
}

impl<S: Sections> Args for ConfigFlags<S> {
    fn augment_args(command: Command) -> Command {
        let config = Arg::new(CONFIG)
            .long(CONFIG)
            .value_name("FILE")
            .env("VOLLEY_CONFIG")
            .value_hint(ValueHint::FilePath)
            .value_parser(clap::value_parser!(PathBuf))
            .help("Configuration file; flags and VOLLEY_* variables go over it (docs/configuration.md)")
            .help_heading("Configuration");
        flagged::<S>().fold(command.arg(config), |command, (key, flag)| {
            command.arg(argument::<S>(key, flag))
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl<S: Sections> FromArgMatches for ConfigFlags<S> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut values = FlagValues::default();
        values.set_default(LOG_LEVEL, S::LOG_LEVEL);
        for (key, flag) in flagged::<S>() {
            values.set(key.path, matches.get_one::<String>(flag));
        }
        Ok(ConfigFlags {
            file: matches.get_one(CONFIG).cloned(),
            values,
            sections: PhantomData,
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// Keys of the sections that have a flag.
fn flagged<S: Sections>() -> impl Iterator<Item = (&'static Key, &'static str)> {
    keys::KEYS
        .iter()
        .filter(|key| S::SECTIONS.contains(&key.section()))
        .filter_map(|key| Some((key, key.flag?)))
}

fn argument<S: Sections>(key: &'static Key, flag: &'static str) -> Arg {
    let default = match key.default {
        _ if key.path == LOG_LEVEL => S::LOG_LEVEL,
        KeyDefault::Value(value) => value,
        KeyDefault::Unset(meaning) => meaning,
    };
    let (name, hint) = match (key.path, key.kind) {
        ("model.path", _) => ("DIR", ValueHint::DirPath),
        ("server.host", _) => ("HOST", ValueHint::Hostname),
        ("server.port", _) => ("PORT", ValueHint::Other),
        (_, Kind::Integer { .. } | Kind::AutoInteger { .. }) => ("N", ValueHint::Other),
        (_, Kind::Size | Kind::AutoSize) => ("SIZE", ValueHint::Other),
        (_, Kind::Seconds { .. }) => ("SECONDS", ValueHint::Other),
        (_, Kind::Path) => ("FILE", ValueHint::FilePath),
        (_, Kind::Choice(_)) => ("CHOICE", ValueHint::Other),
        (_, Kind::Filter) => ("LEVEL", ValueHint::Other),
        ("scheduler.weights" | "scheduler.classes", _) => ("NAME=N,...", ValueHint::Other),
        (_, Kind::Text) => ("NAME", ValueHint::Other),
    };
    Arg::new(flag)
        .long(flag)
        .value_name(name)
        .value_hint(hint)
        .value_parser(KeyParser(key))
        .help(format!(
            "{} [default: {default}]",
            key.help.replace('`', "")
        ))
        .help_heading(heading(key.section()))
}

fn heading(section: &str) -> &'static str {
    match section {
        "model" => "Model",
        "cluster" => "Cluster",
        "limits" => "Limits",
        "scheduler" => "Scheduler",
        "network" => "Network",
        "membership" => "Membership",
        "server" => "Server",
        "log" => "Log",
        _ => "Trace",
    }
}

/// Checks a flag's text as the key's kind has it, and hands it on as it is.
#[derive(Debug, Clone, Copy)]
struct KeyParser(&'static Key);

impl TypedValueParser for KeyParser {
    type Value = String;

    fn parse_ref(
        &self,
        command: &Command,
        arg: Option<&Arg>,
        value: &std::ffi::OsStr,
    ) -> Result<String, clap::Error> {
        let text = value
            .to_str()
            .ok_or_else(|| clap::Error::new(ErrorKind::InvalidUtf8).with_cmd(command))?;
        if self.0.kind.parse(text).is_ok() {
            return Ok(text.to_owned());
        }
        let mut error = clap::Error::new(ErrorKind::ValueValidation).with_cmd(command);
        if let Some(arg) = arg {
            error.insert(
                ContextKind::InvalidArg,
                ContextValue::String(arg.to_string()),
            );
        }
        error.insert(
            ContextKind::InvalidValue,
            ContextValue::String(text.to_owned()),
        );
        let remedy = format!("it must be {}", self.0.kind);
        error.insert(
            ContextKind::Suggested,
            ContextValue::StyledStrs(vec![remedy.into()]),
        );
        Err(error)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        match self.0.kind {
            Kind::Choice(words) => Some(Box::new(words.iter().map(PossibleValue::new))),
            _ => None,
        }
    }
}
