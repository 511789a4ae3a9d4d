//! What can be wrong with what a planner is given.

/// Why there is no plan. Each message names the thing, its place and the remedy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not TOML, or has keys or types that are not its own.
    #[error("{path}: {source}")]
    Syntax {
        /// The file.
        path: String,
        /// What and where.
        source: Box<toml::de::Error>,
    },
    /// A model's description is refused.
    #[error("{path}: {source}")]
    Model {
        /// The file.
        path: String,
        /// What the model loader said.
        source: Box<volley_models::ConfigError>,
    },
    /// A value contradicts itself, another one or physics.
    #[error("{place}: {problem}; {remedy}")]
    Invalid {
        /// File, section and key.
        place: String,
        /// What is wrong.
        problem: String,
        /// What to write instead.
        remedy: String,
    },
    /// A name that no table has.
    #[error("there is no {kind} called {name:?}; known are {known}")]
    Unknown {
        /// What was looked for.
        kind: &'static str,
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// Nothing meets the constraints.
    #[error("no plan: {0}")]
    Infeasible(String),
}

impl PlanError {
    pub(crate) fn invalid(
        place: impl Into<String>,
        problem: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        PlanError::Invalid {
            place: place.into(),
            problem: problem.into(),
            remedy: remedy.into(),
        }
    }

    pub(crate) fn unknown<'a>(
        kind: &'static str,
        name: &str,
        known: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        PlanError::Unknown {
            kind,
            name: name.to_owned(),
            known: known.into_iter().collect::<Vec<_>>().join(", "),
        }
    }
}
