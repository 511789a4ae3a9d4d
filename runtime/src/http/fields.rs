//! The fields of a JSON request, taken one by one, so that an error names the field, what was given and what is allowed.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::{ApiError, shortened};

/// What is left of a request's object. `null` counts as absent.
#[derive(Debug)]
pub(super) struct Fields {
    left: Map<String, Value>,
}

impl Fields {
    /// # Errors
    /// When the body is not JSON, or no object.
    pub(super) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(left)) => Ok(Fields { left }),
            Ok(other) => Err(ApiError::malformed(format!(
                "the request body is {}; it must be a JSON object",
                shown(&other)
            ))),
            Err(error) => Err(ApiError::malformed(format!(
                "the request body is not valid JSON: {error}"
            ))),
        }
    }

    /// Takes a field as it is.
    pub(super) fn value(&mut self, name: &str) -> Option<Value> {
        self.left.remove(name).filter(|value| !value.is_null())
    }

    pub(super) fn flag(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        self.typed(name, "true or false", |value| value.as_bool())
    }

    /// A whole number; `2.0` is one too, as JSON does not tell.
    pub(super) fn integer(
        &mut self,
        name: &str,
        range: RangeInclusive<i128>,
    ) -> Result<Option<i128>, ApiError> {
        let expected = match (*range.start(), *range.end()) {
            (low, high) if high >= i128::from(i64::MAX) => format!("a whole number, {low} or more"),
            (low, high) => format!("a whole number from {low} to {high}"),
        };
        self.typed(name, &expected, |value| {
            whole(value).filter(|number| range.contains(number))
        })
    }

    pub(super) fn number(&mut self, name: &str) -> Result<Option<f32>, ApiError> {
        self.typed(name, "a number", |value| {
            value.as_f64().map(|number| number as f32)
        })
    }

    pub(super) fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        self.typed(name, "a string", |value| value.as_str().map(str::to_owned))
    }

    pub(super) fn object(&mut self, name: &str) -> Result<Option<Map<String, Value>>, ApiError> {
        self.typed(name, "an object", |value| value.as_object().cloned())
    }

    /// A list of token ids.
    pub(super) fn token_ids(&mut self, name: &str) -> Result<Option<Vec<u32>>, ApiError> {
        let ids = |value: &Value| {
            value
                .as_array()?
                .iter()
                .map(token_id)
                .collect::<Option<Vec<u32>>>()
        };
        self.typed(name, "a list of token ids", ids)
    }

    /// Logs what nobody has taken. It is ignored, as OpenAI-compatible servers do.
    pub(super) fn ignore_rest(self) {
        if !self.left.is_empty() {
            let names: Vec<String> = self.left.keys().map(|name| shortened(name)).collect();
            tracing::debug!(
                "The request has fields that this server ignores: {}",
                names.join(", ")
            );
        }
    }

    fn typed<T>(
        &mut self,
        name: &str,
        expected: &str,
        take: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        match self.value(name) {
            None => Ok(None),
            Some(value) => take(&value)
                .map(Some)
                .ok_or_else(|| wrong(name, &value, expected)),
        }
    }
}

/// The error for a field of the wrong type or out of range.
pub(super) fn wrong(name: &str, given: &Value, expected: &str) -> ApiError {
    ApiError::invalid(
        name,
        format!("`{name}` is {}; it must be {expected}", shown(given)),
    )
}

/// The token id that a value is.
pub(super) fn token_id(value: &Value) -> Option<u32> {
    u32::try_from(whole(value)?).ok()
}

fn whole(value: &Value) -> Option<i128> {
    let number = value.as_number()?;
    let exact = number
        .as_i64()
        .map(i128::from)
        .or_else(|| number.as_u64().map(i128::from));
    exact.or_else(|| {
        number
            .as_f64()
            .filter(|number| number.fract() == 0.0)
            .map(|number| number as i128)
    })
}

/// A value for a message.
fn shown(value: &Value) -> String {
    match value {
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
        other => shortened(&other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(json: &str) -> Fields {
        Fields::parse(json.as_bytes()).unwrap()
    }

    #[test]
    fn null_counts_as_absent() {
        let mut fields = fields(r#"{"a": null, "b": null}"#);
        assert_eq!(fields.flag("a").unwrap(), None);
        assert_eq!(fields.integer("b", 0..=1).unwrap(), None);
        assert_eq!(fields.text("c").unwrap(), None);
    }

    #[test]
    fn a_wrong_type_is_refused_with_name_value_and_range() {
        let error = fields(r#"{"max_tokens": "5"}"#)
            .integer("max_tokens", 1..=16)
            .unwrap_err();
        assert_eq!(error.body.param.as_deref(), Some("max_tokens"));
        assert_eq!(
            error.body.message,
            "`max_tokens` is \"5\"; it must be a whole number from 1 to 16"
        );
        assert!(fields(r#"{"a": 1}"#).flag("a").is_err());
        assert!(fields(r#"{"a": true}"#).number("a").is_err());
        assert!(fields(r#"{"a": []}"#).text("a").is_err());
        assert!(fields(r#"{"a": [1, -1]}"#).token_ids("a").is_err());
    }

    #[test]
    fn whole_numbers_in_any_notation() {
        for (json, expected) in [
            ("5", 5),
            ("5.0", 5),
            ("5e0", 5),
            ("1e18", 10i128.pow(18)),
            ("18446744073709551615", (1 << 64) - 1),
        ] {
            assert_eq!(
                fields(&format!(r#"{{"a": {json}}}"#))
                    .integer("a", 0..=i128::MAX)
                    .unwrap(),
                Some(expected),
                "{json}"
            );
        }
        for json in ["5.5", "-1", "1e300", "false"] {
            assert!(
                fields(&format!(r#"{{"a": {json}}}"#))
                    .integer("a", 0..=1 << 64)
                    .is_err(),
                "{json}"
            );
        }
    }

    #[test]
    fn what_is_no_json_object_is_refused() {
        for body in [
            &b"{"[..],
            b"",
            b"[]",
            b"5",
            b"{\"a\": NaN}",
            b"{\"a\": Infinity}",
            b"{\"a\": 1e999}",
            b"\xff{}",
            b"{\"a\": \"\xc3\"}",
        ] {
            assert!(Fields::parse(body).is_err(), "{body:?}");
        }
        assert!(Fields::parse("[".repeat(100_000).as_bytes()).is_err());
    }
}
