//! Reading one JSON object with a typed refusal for every value that is not what its key calls for.

use serde_json::{Map, Value};

use super::ConfigError;

/// Longest value that an error message quotes, in characters.
const QUOTED_CHARS_MAX: usize = 80;

/// An object of a configuration file, with the name of the file and the path to the object for messages.
pub(crate) struct Fields<'a> {
    file: &'a str,
    path: String,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The object that is the whole of `file`.
    pub(crate) fn root(file: &'a str, value: &'a Value) -> Result<Self, ConfigError> {
        let Value::Object(map) = value else {
            return Err(ConfigError::Value {
                file: file.to_owned(),
                key: "(the whole file)".to_owned(),
                value: quote(value),
                expected: "a JSON object".to_owned(),
            });
        };
        Ok(Fields {
            file,
            path: String::new(),
            map,
        })
    }

    /// The object under `key`; absent and `null` alike give `None`.
    pub(crate) fn section(&self, key: &str) -> Result<Option<Fields<'a>>, ConfigError> {
        match self.present(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Fields {
                file: self.file,
                path: format!("{}{key}.", self.path),
                map,
            })),
            Some(other) => Err(self.wrong(key, other, "an object, or null")),
        }
    }

    /// The value under `key`, `null` included.
    pub(crate) fn raw(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key)
    }

    /// The value under `key` unless it is `null`.
    pub(crate) fn present(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// A size from 1 to `max`, or `default` where the key is absent. `null` is refused, as transformers refuses it.
    pub(crate) fn size(&self, key: &str, default: usize, max: usize) -> Result<usize, ConfigError> {
        match self.raw(key) {
            None => Ok(default),
            Some(value) => self.as_size(key, value, max),
        }
    }

    /// A size that goes by several names (transformers' `attribute_map`). Two names that disagree are refused.
    pub(crate) fn size_by_names(
        &self,
        keys: &[&str],
        default: usize,
        max: usize,
    ) -> Result<usize, ConfigError> {
        let mut found: Option<(&str, usize)> = None;
        for key in keys {
            let Some(value) = self.raw(key) else { continue };
            let size = self.as_size(key, value, max)?;
            match found {
                Some((other, first)) if first != size => {
                    return Err(self.contradiction(format!(
                        "{other} = {first} and {key} = {size} are two names of one number"
                    )));
                }
                _ => found = Some((key, size)),
            }
        }
        Ok(found.map_or(default, |(_, size)| size))
    }

    /// A size where `null` and absence mean "none".
    pub(crate) fn optional_size(
        &self,
        key: &str,
        max: usize,
    ) -> Result<Option<usize>, ConfigError> {
        self.present(key)
            .map(|value| self.as_size(key, value, max))
            .transpose()
    }

    /// A finite number that `accept` takes, or `default` where the key is absent. `null` is refused.
    pub(crate) fn number(
        &self,
        key: &str,
        default: f64,
        expected: &str,
        accept: impl Fn(f64) -> bool,
    ) -> Result<f64, ConfigError> {
        match self.raw(key) {
            None => Ok(default),
            Some(value) => self.as_number(key, value, expected, accept),
        }
    }

    /// A finite number that `accept` takes, where `null` and absence mean "none".
    pub(crate) fn optional_number(
        &self,
        key: &str,
        expected: &str,
        accept: impl Fn(f64) -> bool,
    ) -> Result<Option<f64>, ConfigError> {
        self.present(key)
            .map(|value| self.as_number(key, value, expected, accept))
            .transpose()
    }

    /// `true` or `false`, or `default` where the key is absent. `null` is refused.
    pub(crate) fn flag(&self, key: &str, default: bool) -> Result<bool, ConfigError> {
        match self.raw(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(self.wrong(key, other, "true or false")),
        }
    }

    /// `true`, `false`, or `None` where the key is absent or `null`.
    pub(crate) fn optional_flag(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        match self.present(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(self.wrong(key, other, "true, false or null")),
        }
    }

    /// A string, where `null` and absence mean "none".
    pub(crate) fn optional_text(&self, key: &str) -> Result<Option<&'a str>, ConfigError> {
        match self.present(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(key, other, "a string, or null")),
        }
    }

    /// A list, where `null` and absence mean an empty one.
    pub(crate) fn list(&self, key: &str) -> Result<&'a [Value], ConfigError> {
        match self.present(key) {
            None => Ok(&[]),
            Some(Value::Array(items)) => Ok(items),
            Some(other) => Err(self.wrong(key, other, "a list, or null")),
        }
    }

    /// Refusal of a value that is malformed or out of range.
    pub(crate) fn wrong(
        &self,
        key: &str,
        value: &Value,
        expected: impl Into<String>,
    ) -> ConfigError {
        ConfigError::Value {
            file: self.file.to_owned(),
            key: format!("{}{key}", self.path),
            value: quote(value),
            expected: expected.into(),
        }
    }

    /// Refusal of a value that is well-formed but asks for what Volley does not do.
    pub(crate) fn unsupported(
        &self,
        key: &str,
        value: &Value,
        supported: impl Into<String>,
    ) -> ConfigError {
        ConfigError::Unsupported {
            file: self.file.to_owned(),
            key: format!("{}{key}", self.path),
            value: quote(value),
            supported: supported.into(),
        }
    }

    /// Refusal of an absent key.
    pub(crate) fn missing(&self, key: &str, remedy: impl Into<String>) -> ConfigError {
        ConfigError::Missing {
            file: self.file.to_owned(),
            key: format!("{}{key}", self.path),
            remedy: remedy.into(),
        }
    }

    /// Refusal of values that contradict each other.
    pub(crate) fn contradiction(&self, what: String) -> ConfigError {
        ConfigError::Contradiction {
            file: self.file.to_owned(),
            what,
        }
    }

    fn as_size(&self, key: &str, value: &Value, max: usize) -> Result<usize, ConfigError> {
        value
            .as_u64()
            .and_then(|size| usize::try_from(size).ok())
            .filter(|size| (1..=max).contains(size))
            .ok_or_else(|| self.wrong(key, value, format!("a whole number from 1 to {max}")))
    }

    fn as_number(
        &self,
        key: &str,
        value: &Value,
        expected: &str,
        accept: impl Fn(f64) -> bool,
    ) -> Result<f64, ConfigError> {
        value
            .as_f64()
            .filter(|number| number.is_finite() && accept(*number))
            .ok_or_else(|| self.wrong(key, value, expected))
    }
}

/// A value as JSON, cut to a length that a message bears.
fn quote(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(QUOTED_CHARS_MAX) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
