//! Rotary parameters: transformers v5's `rope_parameters` and the older `rope_theta` + `rope_scaling`.
//!
//! Which key wins is transformers' `RotaryEmbeddingConfigMixin.convert_rope_params_to_dict` (5.23): a non-empty `rope_scaling` stands in for
//! `rope_parameters` altogether; the base comes from that object, then from the top level, then from the family.

use serde_json::Value;

use super::{ConfigError, fields::Fields, limits::POSITIONS_MAX};
use crate::{Rope, RopeScaling};

const TYPES: &str = "\"default\", \"linear\", \"llama3\" and \"yarn\"";

/// The rotary embedding of a model whose base is `default_theta` where nothing says otherwise.
pub(super) fn rope(
    top: &Fields<'_>,
    default_theta: f64,
    max_positions: usize,
) -> Result<Rope, ConfigError> {
    let parameters = match non_empty(top, "rope_scaling")? {
        Some(scaling) => Some(scaling),
        None => non_empty(top, "rope_parameters")?,
    };
    let theta = match parameters.as_ref().map(theta).transpose()?.flatten() {
        Some(theta) => theta,
        None => self::theta(top)?.unwrap_or(default_theta),
    };
    whole_heads(top)?;
    let Some(parameters) = parameters else {
        return Ok(Rope {
            theta,
            scaling: RopeScaling::None,
        });
    };
    whole_heads(&parameters)?;
    Ok(Rope {
        theta,
        scaling: scaling(top, &parameters, max_positions)?,
    })
}

/// `rope_theta` of an object, if it gives one.
pub(super) fn theta(fields: &Fields<'_>) -> Result<Option<f64>, ConfigError> {
    // YaRN divides by its logarithm; no model has a base near 1.
    fields.optional_number("rope_theta", "a number above 1", |theta| theta > 1.0)
}

fn scaling(
    top: &Fields<'_>,
    parameters: &Fields<'_>,
    max_positions: usize,
) -> Result<RopeScaling, ConfigError> {
    let key = if parameters.raw("rope_type").is_some() {
        "rope_type"
    } else {
        "type"
    };
    match parameters.optional_text(key)?.unwrap_or("default") {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear {
            factor: required(parameters, "factor")?,
        }),
        "llama3" => {
            let low_freq_factor = required(parameters, "low_freq_factor")?;
            let high_freq_factor = required(parameters, "high_freq_factor")?;
            if high_freq_factor <= low_freq_factor {
                return Err(top.contradiction(format!(
                    "the llama3 rotary scaling has high_freq_factor = {high_freq_factor}, which is not above \
                     low_freq_factor = {low_freq_factor}"
                )));
            }
            Ok(RopeScaling::Llama3 {
                factor: required(parameters, "factor")?,
                low_freq_factor,
                high_freq_factor,
                original_positions: original_positions(top, parameters, max_positions)?,
            })
        }
        "yarn" => yarn(top, parameters, max_positions),
        _ => Err(parameters.unsupported(key, parameters.raw(key).unwrap_or(&Value::Null), TYPES)),
    }
}

/// `_compute_yarn_parameters` of transformers, as far as it is about reading.
fn yarn(
    top: &Fields<'_>,
    parameters: &Fields<'_>,
    max_positions: usize,
) -> Result<RopeScaling, ConfigError> {
    if let Some(value) = parameters.present("truncate")
        && value != &Value::Bool(true)
    {
        return Err(parameters.unsupported("truncate", value, "true"));
    }
    let original_positions = original_positions(top, parameters, max_positions)?;
    // The key must be there, but null means "the ratio of the two contexts".
    let factor = match parameters.raw("factor") {
        Some(Value::Null) => max_positions as f64 / original_positions as f64,
        _ => required(parameters, "factor")?,
    };
    let mscale = |scale: f64, by: f64| {
        if scale <= 1.0 {
            1.0
        } else {
            0.1 * by * scale.ln() + 1.0
        }
    };
    // Python's truth: zero counts as absent for all four of these.
    let given = |key| {
        let number = parameters.optional_number(key, "a number, zero or more", |x| x >= 0.0)?;
        Ok::<_, ConfigError>(number.filter(|&x| x != 0.0))
    };
    let attention_factor =
        match parameters.optional_number("attention_factor", "a number above 0", |x| x > 0.0)? {
            Some(stated) => stated,
            None => match (given("mscale")?, given("mscale_all_dim")?) {
                (Some(one), Some(all)) => mscale(factor, one) / mscale(factor, all),
                _ => mscale(factor, 1.0),
            },
        };
    Ok(RopeScaling::Yarn {
        factor,
        beta_fast: given("beta_fast")?.unwrap_or(32.0),
        beta_slow: given("beta_slow")?.unwrap_or(1.0),
        attention_factor,
        original_positions,
    })
}

/// The trained context: the top level wins over the object, and the model's context is the default.
fn original_positions(
    top: &Fields<'_>,
    parameters: &Fields<'_>,
    max_positions: usize,
) -> Result<usize, ConfigError> {
    const KEY: &str = "original_max_position_embeddings";
    if let Some(positions) = top.optional_size(KEY, POSITIONS_MAX)? {
        return Ok(positions);
    }
    Ok(parameters
        .optional_size(KEY, POSITIONS_MAX)?
        .unwrap_or(max_positions))
}

fn required(parameters: &Fields<'_>, key: &str) -> Result<f64, ConfigError> {
    const EXPECTED: &str = "a number above 0";
    match parameters.raw(key) {
        None => Err(parameters.missing(key, "this rotary scaling needs it")),
        Some(_) => parameters.number(key, 1.0, EXPECTED, |x| x > 0.0),
    }
}

/// An object, unless it is `null` or `{}`, which Python takes for absent.
fn non_empty<'a>(top: &Fields<'a>, key: &str) -> Result<Option<Fields<'a>>, ConfigError> {
    match top.present(key) {
        Some(Value::Object(map)) if map.is_empty() => Ok(None),
        _ => top.section(key),
    }
}

/// Refuses heads that are rotated in part only.
fn whole_heads(fields: &Fields<'_>) -> Result<(), ConfigError> {
    match fields.present("partial_rotary_factor") {
        Some(value) if value.as_f64() != Some(1.0) => {
            Err(fields.unsupported("partial_rotary_factor", value, "1.0"))
        }
        _ => Ok(()),
    }
}
