//! Kinds of configuration values: what is accepted, from a file or from text, and how a refusal reads.

use std::fmt;

use config::ValueKind;
use tracing_subscriber::EnvFilter;

use super::size::ByteSize;

/// What values a key takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// A whole number within bounds, both included.
    Integer {
        /// The least.
        min: i64,
        /// The most.
        max: i64,
    },
    /// The same, or `"auto"`.
    AutoInteger {
        /// The least.
        min: i64,
        /// The most.
        max: i64,
    },
    /// Seconds, whole or not, within bounds, both included.
    Seconds {
        /// The least.
        min: f64,
        /// The most.
        max: f64,
    },
    /// An amount of memory: bytes, or a text such as `"8GiB"`.
    Size,
    /// The same, or `"auto"`.
    AutoSize,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// Any text but the empty one.
    Text,
    /// The path of a file or directory.
    Path,
    /// Log directives.
    Filter,
}

impl Kind {
    /// The value that `text` spells, from a flag or a variable.
    ///
    /// # Errors
    /// What is wrong with it, as in "is `x`; it must be a whole number from 1 to 8".
    pub fn parse(self, text: &str) -> Result<ValueKind, String> {
        let value = match self {
            Kind::Integer { .. } => text.parse().map(ValueKind::I64).ok(),
            Kind::AutoInteger { .. } if text != "auto" => text.parse().map(ValueKind::I64).ok(),
            Kind::Seconds { .. } => text.parse().map(ValueKind::Float).ok(),
            _ => Some(ValueKind::String(text.to_owned())),
        };
        let value = value.ok_or_else(|| self.refusal(&format!("`{text}`")))?;
        self.check(&value)?;
        Ok(value)
    }

    /// Checks a value's type and range.
    ///
    /// # Errors
    /// As [`Kind::parse`].
    pub fn check(self, value: &ValueKind) -> Result<(), String> {
        let accepted = match (self, value) {
            (Kind::Integer { min, max } | Kind::AutoInteger { min, max }, value)
                if integer(value).is_some() =>
            {
                integer(value).is_some_and(|n| (min..=max).contains(&n))
            }
            (Kind::AutoInteger { .. } | Kind::AutoSize, ValueKind::String(text))
                if text == "auto" =>
            {
                true
            }
            (Kind::Seconds { min, max }, value) => {
                seconds(value).is_some_and(|s| (min..=max).contains(&s))
            }
            (Kind::Size | Kind::AutoSize, ValueKind::String(text)) => {
                text.parse::<ByteSize>().is_ok()
            }
            (Kind::Size | Kind::AutoSize, value) => integer(value).is_some_and(|n| n > 0),
            (Kind::Choice(words), ValueKind::String(text)) => words.contains(&text.as_str()),
            (Kind::Text | Kind::Path, ValueKind::String(text)) => !text.trim().is_empty(),
            (Kind::Filter, ValueKind::String(text)) => {
                !text.is_empty() && EnvFilter::try_new(text).is_ok()
            }
            _ => false,
        };
        if accepted {
            Ok(())
        } else {
            Err(self.refusal(&shown(value)))
        }
    }

    fn refusal(self, found: &str) -> String {
        format!("is {found}; it must be {self}")
    }
}

/// What the manual and refusals say is accepted.
impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Integer { min, max } => write!(f, "a whole number from {min} to {max}"),
            Kind::AutoInteger { min, max } => {
                write!(f, "`auto` or a whole number from {min} to {max}")
            }
            Kind::Seconds { min, max } => write!(f, "a number of seconds from {min} to {max}"),
            Kind::Size => write!(f, "bytes, or a text such as `512MiB` or `8GiB`"),
            Kind::AutoSize => write!(f, "`auto`, bytes, or a text such as `512MiB` or `8GiB`"),
            Kind::Choice(words) => {
                let words: Vec<_> = words.iter().map(|word| format!("`{word}`")).collect();
                write!(f, "{}", words.join(" or "))
            }
            Kind::Text => write!(f, "a text"),
            Kind::Path => write!(f, "a path"),
            Kind::Filter => write!(
                f,
                "`error`, `warn`, `info`, `debug`, `trace`, `off`, or directives"
            ),
        }
    }
}

fn integer(value: &ValueKind) -> Option<i64> {
    match *value {
        ValueKind::I64(n) => Some(n),
        ValueKind::U64(n) => i64::try_from(n).ok(),
        ValueKind::I128(n) => i64::try_from(n).ok(),
        ValueKind::U128(n) => i64::try_from(n).ok(),
        _ => None,
    }
}

fn seconds(value: &ValueKind) -> Option<f64> {
    match *value {
        ValueKind::Float(s) => Some(s),
        ref other => integer(other).map(|n| n as f64),
    }
}

/// A value as a refusal quotes it: texts in quotes as in TOML, so that `"8"` and `8` differ.
fn shown(value: &ValueKind) -> String {
    match value {
        ValueKind::String(text) => format!("{text:?}"),
        ValueKind::Table(_) => "a table".to_owned(),
        ValueKind::Array(_) => "a list".to_owned(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_include_their_ends_and_nothing_beyond() {
        let kind = Kind::Integer { min: 1, max: 8 };
        for (value, accepted) in [(0, false), (1, true), (8, true), (9, false), (-1, false)] {
            assert_eq!(
                kind.check(&ValueKind::I64(value)).is_ok(),
                accepted,
                "{value}"
            );
        }
        let seconds = Kind::Seconds {
            min: 0.0,
            max: 10.0,
        };
        assert!(seconds.check(&ValueKind::Float(f64::NAN)).is_err());
        assert!(seconds.check(&ValueKind::I64(10)).is_ok());
    }

    #[test]
    fn a_number_in_quotes_is_refused_in_a_file_but_read_from_a_variable() {
        let kind = Kind::Integer {
            min: 0,
            max: 65_535,
        };
        let refusal = kind.check(&ValueKind::String("80".into())).unwrap_err();
        assert_eq!(
            refusal,
            "is \"80\"; it must be a whole number from 0 to 65535"
        );
        assert_eq!(kind.parse("80"), Ok(ValueKind::I64(80)));
        assert_eq!(
            kind.parse("8o").unwrap_err(),
            "is `8o`; it must be a whole number from 0 to 65535"
        );
    }

    #[test]
    fn auto_is_a_word_only_where_it_means_something() {
        assert!(Kind::AutoSize.parse("auto").is_ok());
        assert!(Kind::AutoInteger { min: 1, max: 2 }.parse("auto").is_ok());
        assert!(Kind::Size.parse("auto").is_err());
        assert!(Kind::Integer { min: 1, max: 2 }.parse("auto").is_err());
        assert!(Kind::AutoInteger { min: 1, max: 2 }.parse("3").is_err());
    }

    #[test]
    fn log_directives_are_checked() {
        assert!(Kind::Filter.parse("info,volley_actors=debug").is_ok());
        assert!(Kind::Filter.parse("info,volley_actors=loud").is_err());
    }
}
