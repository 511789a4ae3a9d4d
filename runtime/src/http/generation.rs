//! What chat and completions have in common: the fields that say how to generate.

use std::sync::Arc;

use serde_json::{Map, Value};
use volley_actors::{LOGPROBS_MAX, Request, Sampling};

use super::error::ApiError;
use super::fields::{Fields, wrong};
use super::ids;
use super::state::App;
use crate::engine::Engine;
use crate::text::TextRequest;

/// Answers to one prompt.
const N_MAX: i128 = 128;
/// Stop strings of a request, and bytes of each.
const STOPS_MAX: usize = 16;
const STOP_BYTES_MAX: usize = 1024;
/// Bytes of `user`, which names a tenant to the scheduler.
const USER_BYTES_MAX: usize = 256;

/// How to generate.
#[derive(Debug)]
pub(super) struct Generation {
    /// Answers to each prompt.
    pub(super) n: usize,
    pub(super) stream: bool,
    /// Whether a stream ends with the usage.
    pub(super) include_usage: bool,
    /// As given; `None` where the client leaves it to us.
    pub(super) max_tokens: Option<u64>,
    pub(super) return_token_ids: bool,
    /// Of generated tokens.
    pub(super) logprobs: Option<u8>,
    /// Of the prompt's tokens.
    pub(super) prompt_logprobs: Option<u8>,
    sampling: Sampling,
    stop: Vec<String>,
    stop_tokens: Vec<u32>,
    pub(super) skip_special: bool,
    tenant: Arc<str>,
    priority: i32,
}

impl Generation {
    /// Takes the common fields. `logprobs` and the length have a meaning of their own in each API.
    pub(super) fn take(fields: &mut Fields, app: &App) -> Result<Self, ApiError> {
        check_model(fields, &app.engine.model)?;
        let n = fields.integer("n", 1..=N_MAX)?.unwrap_or(1) as usize;
        let stream = fields.flag("stream")?.unwrap_or(false);
        let include_usage = include_usage(fields, stream)?;
        let ignore_eos = fields.flag("ignore_eos")?.unwrap_or(false);
        let mut stop_tokens = fields.token_ids("stop_token_ids")?.unwrap_or_default();
        if !ignore_eos {
            stop_tokens.extend(&app.engine.spec.special.eos);
        }
        let stop = stop(fields)?;
        refuse_unsupported(
            fields,
            ignore_eos && stop.is_empty() && stop_tokens.is_empty(),
        )?;
        let user = fields.text("user")?.unwrap_or_default();
        if user.len() > USER_BYTES_MAX {
            return Err(ApiError::invalid(
                "user",
                format!(
                    "`user` has {} bytes; it may have {USER_BYTES_MAX}",
                    user.len()
                ),
            ));
        }
        Ok(Generation {
            n,
            stream,
            include_usage,
            max_tokens: None,
            return_token_ids: fields.flag("return_token_ids")?.unwrap_or(false),
            logprobs: None,
            prompt_logprobs: None,
            sampling: sampling(fields, &app.engine)?,
            stop,
            stop_tokens,
            skip_special: fields.flag("skip_special_tokens")?.unwrap_or(true),
            tenant: user.into(),
            priority: fields
                .integer("priority", i128::from(i32::MIN)..=i128::from(i32::MAX))?
                .unwrap_or(0) as i32,
        })
    }

    /// The request for answer `index` to a prompt, of `max_tokens` tokens.
    pub(super) fn request(&self, prompt: &[u32], index: usize, max_tokens: u32) -> TextRequest {
        let seed = self.sampling.seed.wrapping_add(index as u64);
        let request = Request {
            prompt: prompt.to_vec(),
            sampling: Sampling {
                seed,
                ..self.sampling.clone()
            },
            max_tokens,
            stop_tokens: self.stop_tokens.clone(),
            logprobs: self.logprobs,
            prompt_logprobs: self.prompt_logprobs,
            tenant: Arc::clone(&self.tenant),
            priority: self.priority,
        };
        TextRequest {
            request,
            stop: self.stop.clone(),
            skip_special: self.skip_special,
        }
    }
}

/// Takes a number of alternatives to each token.
pub(super) fn alternatives(fields: &mut Fields, name: &str) -> Result<Option<u8>, ApiError> {
    Ok(fields
        .integer(name, 0..=i128::from(LOGPROBS_MAX))?
        .map(|count| count as u8))
}

/// Takes a number of tokens. Above any context it stays what it was, for the error to say so.
pub(super) fn max_tokens(
    fields: &mut Fields,
    name: &str,
    least: u8,
) -> Result<Option<u64>, ApiError> {
    let max_tokens = fields.integer(name, i128::from(least)..=i128::MAX)?;
    Ok(max_tokens.map(|tokens| {
        u64::try_from(tokens)
            .unwrap_or(u64::MAX >> 1)
            .min(u64::MAX >> 1)
    }))
}

/// The length of an answer: as given, which must fit, or `default` as far as it fits.
pub(super) fn fit(
    prompt: &[u32],
    given: Option<u64>,
    default: u64,
    context: u32,
    param: &str,
) -> Result<u32, ApiError> {
    let left = u64::from(context).saturating_sub(prompt.len() as u64);
    let wanted = given.unwrap_or(default.min(left).max(1));
    if prompt.len() as u64 + wanted > u64::from(context) {
        return Err(ApiError::too_long(param, prompt.len(), wanted, context));
    }
    u32::try_from(wanted).map_err(|_| ApiError::too_long(param, prompt.len(), wanted, context))
}

/// Takes `model`. Without one, the model that is served is meant.
fn check_model(fields: &mut Fields, served: &str) -> Result<(), ApiError> {
    match fields.text("model")? {
        Some(model) if model != served => Err(ApiError::no_such_model(&model, served)),
        _ => Ok(()),
    }
}

fn include_usage(fields: &mut Fields, stream: bool) -> Result<bool, ApiError> {
    let Some(options) = fields.object("stream_options")? else {
        return Ok(false);
    };
    if !stream {
        return Err(ApiError::invalid(
            "stream_options",
            "`stream_options` is only for requests with `stream: true`",
        ));
    }
    match options.get("include_usage") {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(other) => Err(wrong(
            "stream_options.include_usage",
            other,
            "true or false",
        )),
    }
}

fn stop(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let expected = format!(
        "a string or a list of at most {STOPS_MAX} strings, none of them empty or longer than {STOP_BYTES_MAX} bytes"
    );
    let Some(value) = fields.value("stop") else {
        return Ok(Vec::new());
    };
    let stops: Option<Vec<String>> = match &value {
        Value::String(stop) => Some(vec![stop.clone()]),
        Value::Array(stops) => stops
            .iter()
            .map(|stop| stop.as_str().map(str::to_owned))
            .collect(),
        _ => None,
    };
    stops
        .filter(|stops| {
            stops.len() <= STOPS_MAX
                && stops
                    .iter()
                    .all(|stop| (1..=STOP_BYTES_MAX).contains(&stop.len()))
        })
        .ok_or_else(|| wrong("stop", &value, &expected))
}

/// The request decides, else the model's `generation_config.json`, else everything is drawn from the unchanged distribution.
fn sampling(fields: &mut Fields, engine: &Engine) -> Result<Sampling, ApiError> {
    let defaults = &engine.defaults;
    let default_temperature = match defaults.do_sample {
        Some(false) => 0.0,
        _ => defaults.temperature.unwrap_or(1.0),
    };
    let top_k = fields.integer("top_k", -1..=i128::from(u32::MAX))?;
    let sampling = Sampling {
        temperature: fields.number("temperature")?.unwrap_or(default_temperature),
        top_p: fields.number("top_p")?.or(defaults.top_p).unwrap_or(1.0),
        // -1 is vLLM's word for all.
        top_k: top_k
            .map(|k| k.max(0) as u32)
            .or(defaults.top_k)
            .unwrap_or(0),
        min_p: fields.number("min_p")?.unwrap_or(0.0),
        repetition_penalty: fields
            .number("repetition_penalty")?
            .or(defaults.repetition_penalty)
            .unwrap_or(1.0),
        presence_penalty: fields.number("presence_penalty")?.unwrap_or(0.0),
        frequency_penalty: fields.number("frequency_penalty")?.unwrap_or(0.0),
        logit_bias: fields
            .object("logit_bias")?
            .map_or(Ok(Vec::new()), |bias| logit_bias(&bias, engine.spec.vocab))?,
        seed: match fields.integer("seed", i128::from(i64::MIN)..=i128::from(u64::MAX))? {
            // A negative one is as good as any: its two's complement.
            Some(seed) => seed as u64,
            None => ids::random(),
        },
    };
    sampling
        .validate()
        .map_err(|error| ApiError::invalid(error.field, error.to_string()))?;
    Ok(sampling)
}

fn logit_bias(map: &Map<String, Value>, vocab: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    let entry = |(token, bias): (&String, &Value)| {
        let id = token
            .parse::<u32>()
            .ok()
            .filter(|&id| (id as usize) < vocab);
        let id = id.ok_or_else(|| {
            wrong(
                "logit_bias",
                &Value::from(token.as_str()),
                &format!("a map whose keys are token ids below {vocab}"),
            )
        })?;
        let bias = bias.as_f64().ok_or_else(|| {
            wrong(
                "logit_bias",
                bias,
                "a map whose values are numbers from -100 to 100",
            )
        })?;
        Ok((id, bias as f32))
    };
    map.iter().map(entry).collect()
}

/// Fields that change the answer and that this server does not have, unless they are set to what it does anyway.
/// To ignore them would be to answer something else than was asked.
fn refuse_unsupported(fields: &mut Fields, never_stops: bool) -> Result<(), ApiError> {
    let empty = |value: &Value| match value {
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(object) => object.is_empty(),
        Value::Null => true,
    };
    const UNSUPPORTED: &[&str] = &[
        "tools",
        "functions",
        "audio",
        "prediction",
        "suffix",
        "use_beam_search",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "structured_outputs",
        "allowed_token_ids",
        "bad_words",
        "truncate_prompt_tokens",
        "continue_final_message",
    ];
    for name in UNSUPPORTED {
        if fields.value(name).is_some_and(|value| !empty(&value)) {
            return Err(ApiError::unsupported(
                name,
                format!("`{name}` is not supported by this server; leave it out"),
            ));
        }
    }
    if let Some(format) = fields.value("response_format")
        && format.get("type").and_then(Value::as_str) != Some("text")
    {
        return Err(ApiError::unsupported(
            "response_format",
            "`response_format` must be {\"type\": \"text\"}; structured output is not supported",
        ));
    }
    let min_tokens = fields.integer("min_tokens", 0..=i128::MAX)?.unwrap_or(0);
    if min_tokens > 0 && !never_stops {
        return Err(ApiError::unsupported(
            "min_tokens",
            "`min_tokens` is not supported by this server, except with `ignore_eos: true` and nothing to stop at",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(value: Value) -> Fields {
        Fields::parse(value.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn stop_is_a_string_or_a_short_list() {
        let stop = |value: Value| stop(&mut fields(serde_json::json!({"stop": value})));
        assert_eq!(stop("a".into()).unwrap(), ["a"]);
        assert_eq!(stop(serde_json::json!(["a", "b"])).unwrap(), ["a", "b"]);
        assert!(stop(Value::Null).unwrap().is_empty());
        for wrong in [
            serde_json::json!(""),
            serde_json::json!(["a", ""]),
            serde_json::json!(5),
            serde_json::json!([5]),
            vec!["a"; 17].into(),
        ] {
            assert_eq!(stop(wrong).unwrap_err().body.param.as_deref(), Some("stop"));
        }
    }

    #[test]
    fn logit_bias_takes_token_ids_as_keys() {
        let bias = |value: Value| logit_bias(value.as_object().unwrap(), 100);
        assert_eq!(
            bias(serde_json::json!({"5": -100, "7": 1.5})).unwrap(),
            [(5, -100.0), (7, 1.5)]
        );
        for wrong in [
            serde_json::json!({"x": 1}),
            serde_json::json!({"100": 1}),
            serde_json::json!({"1": "x"}),
            serde_json::json!({"-1": 1}),
        ] {
            assert!(bias(wrong).is_err());
        }
    }

    #[test]
    fn a_given_length_must_fit_and_a_default_is_made_to() {
        assert_eq!(fit(&[0; 8], None, 16, 10, "max_tokens").unwrap(), 2);
        assert_eq!(fit(&[0; 8], Some(2), 16, 10, "max_tokens").unwrap(), 2);
        assert_eq!(fit(&[0; 10], Some(0), 16, 10, "max_tokens").unwrap(), 0);
        for (prompt, given) in [
            (8, Some(3)),
            (10, None),
            (11, Some(0)),
            (8, Some(10u64.pow(18))),
        ] {
            let error = fit(&vec![0; prompt], given, 16, 10, "max_tokens").unwrap_err();
            assert_eq!(error.body.code, Some("context_length_exceeded"));
        }
    }

    #[test]
    fn huge_lengths_are_numbers_like_others() {
        let take = |value: Value| {
            max_tokens(
                &mut fields(serde_json::json!({"max_tokens": value})),
                "max_tokens",
                1,
            )
        };
        assert_eq!(take(serde_json::json!(1e18)).unwrap(), Some(10u64.pow(18)));
        assert_eq!(take(serde_json::json!(1e30)).unwrap(), Some(u64::MAX >> 1));
        assert!(take(serde_json::json!(0)).is_err());
        assert!(take(serde_json::json!(-1)).is_err());
        assert!(take(serde_json::json!("5")).is_err());
    }

    #[test]
    fn what_would_change_the_answer_is_refused_unless_neutral() {
        let refuse =
            |value: Value, never_stops| refuse_unsupported(&mut fields(value), never_stops);
        assert!(
            refuse(
                serde_json::json!({"tools": [], "suffix": "", "use_beam_search": false}),
                false
            )
            .is_ok()
        );
        assert!(
            refuse(
                serde_json::json!({"response_format": {"type": "text"}, "min_tokens": 0}),
                false
            )
            .is_ok()
        );
        assert!(refuse(serde_json::json!({"min_tokens": 5}), true).is_ok());
        for value in [
            serde_json::json!({"tools": [{}]}),
            serde_json::json!({"suffix": "x"}),
            serde_json::json!({"response_format": {"type": "json_object"}}),
            serde_json::json!({"min_tokens": 5}),
        ] {
            assert_eq!(
                refuse(value, false).unwrap_err().body.code,
                Some("unsupported_parameter")
            );
        }
    }

    #[test]
    fn usage_in_a_stream_only() {
        let take = |value: Value, stream| include_usage(&mut fields(value), stream);
        assert!(
            take(
                serde_json::json!({"stream_options": {"include_usage": true}}),
                true
            )
            .unwrap()
        );
        assert!(!take(serde_json::json!({"stream_options": {}}), true).unwrap());
        assert!(
            take(
                serde_json::json!({"stream_options": {"include_usage": true}}),
                false
            )
            .is_err()
        );
        assert!(
            take(
                serde_json::json!({"stream_options": {"include_usage": 1}}),
                true
            )
            .is_err()
        );
    }
}
