//! Why a command ended without success, and the exit code that says so.

use std::io;

/// A command's end without success. Its text goes to standard error as it is.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Something went wrong; the message says what, where and what to do.
    #[error("{0}")]
    Message(String),
    /// Whoever read our output has enough (`volley generate | head`): no failure at all.
    #[error("the output was closed")]
    OutputClosed,
}

impl Failure {
    /// With this message.
    pub fn new(message: impl Into<String>) -> Self {
        Failure::Message(message.into())
    }

    /// A file that could not be written or read.
    pub fn file(path: &std::path::Path, error: &io::Error) -> Self {
        Failure::Message(format!("{}: {error}", path.display()))
    }

    /// From an error on standard output.
    pub fn output(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Failure::OutputClosed,
            _ => Failure::Message(format!("standard output cannot be written: {error}")),
        }
    }
}

/// Errors whose text says all there is to say.
macro_rules! says_itself {
    ($($error:ty),* $(,)?) => {
        $(impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                Failure::Message(error.to_string())
            }
        })*
    };
}

says_itself!(
    crate::config::ConfigError,
    volley_actors::ClusterError,
    volley_actors::SubmitError,
    volley_models::ModelError,
    volley_planner::PlanError,
);
