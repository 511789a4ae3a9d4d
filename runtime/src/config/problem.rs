//! What is wrong with a configuration: all of it at once, each problem with its place and its key.

use std::fmt;
use std::path::PathBuf;

/// Where a value was typed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A configuration file.
    File(PathBuf),
    /// An environment variable.
    Variable(String),
    /// A command line flag, without its dashes.
    Flag(&'static str),
    /// Nowhere: it follows from other values, the model or the machine.
    Derived,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where it was typed.
    pub place: Place,
    /// The key concerned, as in `server.port`; empty if the whole file is concerned.
    pub key: String,
    /// What is wrong and what to do, to be read after the key.
    pub message: String,
}

/// A configuration that was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ConfigError {
    /// All that is wrong with it; never empty.
    pub problems: Vec<Problem>,
}

impl Problem {
    /// A problem that follows from the whole rather than from one place.
    pub fn derived(key: &str, message: impl Into<String>) -> Self {
        Problem {
            place: Place::Derived,
            key: key.to_owned(),
            message: message.into(),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::File(file) => write!(f, "{}: ", file.display())?,
            Place::Variable(name) => write!(f, "environment variable {name}: ")?,
            Place::Flag(flag) => write!(f, "--{flag}: ")?,
            Place::Derived => {}
        }
        if !self.key.is_empty() {
            write!(f, "`{}` ", self.key)?;
        }
        f.write_str(&self.message)
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.problems.as_slice() {
            [one] => write!(f, "the configuration was refused: {one}"),
            many => {
                write!(
                    f,
                    "the configuration was refused for {} reasons:",
                    many.len()
                )?;
                many.iter()
                    .try_for_each(|problem| write!(f, "\n  - {problem}"))
            }
        }
    }
}
