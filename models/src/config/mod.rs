//! `config.json` and `generation_config.json` to [`ModelSpec`], read as Hugging Face transformers 5.23 reads them.
//!
//! The family is `model_type`; an absent key has the default that the family's configuration class has in
//! transformers; `null` is refused where that class does not allow it. Whatever Volley would compute differently
//! from transformers is refused, not approximated. Deviations, each with a test: DBRX's base of the rotary
//! embedding (see [`dbrx`]), and `null` for `rope_theta` or `head_dim`, which counts as absent.

mod dbrx;
mod error;
mod fields;
mod generation;
pub mod limits;
mod mixtral;
mod qwen3_moe;
mod rope;

use serde_json::Value;

pub use error::ConfigError;
pub use generation::GenerationDefaults;

use self::{
    fields::Fields,
    limits::{HEAD_DIM_MAX, total_bytes},
};
use crate::{Architecture, ElementType, ModelSpec, SpecialTokens};

/// The file that describes a model.
pub(crate) const CONFIG_FILE: &str = "config.json";

const MODEL_TYPES: &str = "\"mixtral\", \"qwen3_moe\" and \"dbrx\"";

/// Reads a model's description.
///
/// `config` holds the bytes of `config.json`; `generation` those of `generation_config.json`, whose token ids win.
///
/// # Errors
/// When a file is malformed, contradicts itself, exceeds a bound in [`limits`], or describes a model
/// that Volley does not run.
pub fn parse_config(
    config: &[u8],
    generation: Option<&[u8]>,
) -> Result<(ModelSpec, GenerationDefaults), ConfigError> {
    let config = json(CONFIG_FILE, config)?;
    let generation = generation
        .map(|bytes| json("generation_config.json", bytes))
        .transpose()?;

    let top = Fields::root(CONFIG_FILE, &config)?;
    let architecture = architecture(&top)?;
    refuse_quantization(&top)?;
    let mut spec = match architecture {
        Architecture::Mixtral => mixtral::spec(&top)?,
        Architecture::Qwen3Moe => qwen3_moe::spec(&top)?,
        Architecture::Dbrx => dbrx::spec(&top)?,
    };
    spec.stored_as = stored_as(&top)?;
    let mut defaults = GenerationDefaults::default();
    if let Some(generation) = &generation {
        let fields = generation::root(generation)?;
        let special = special_tokens(&fields, spec.special)?;
        spec.special = special;
        defaults = generation::defaults(generation)?;
    }
    check(&top, &spec)?;
    Ok((spec, defaults))
}

fn json(file: &str, bytes: &[u8]) -> Result<Value, ConfigError> {
    serde_json::from_slice(bytes).map_err(|source| ConfigError::Syntax {
        file: file.to_owned(),
        source,
    })
}

/// The family by `model_type`, as transformers' `AutoConfig` finds it; `architectures` has to agree where it is given.
fn architecture(top: &Fields<'_>) -> Result<Architecture, ConfigError> {
    const FAMILIES: [(Architecture, &str, &str); 3] = [
        (Architecture::Mixtral, "mixtral", "MixtralForCausalLM"),
        (Architecture::Qwen3Moe, "qwen3_moe", "Qwen3MoeForCausalLM"),
        (Architecture::Dbrx, "dbrx", "DbrxForCausalLM"),
    ];
    let class = top.list("architectures")?.first();
    let by_class = |class: &Value| FAMILIES.iter().find(|family| class == family.2);
    let family = match (top.optional_text("model_type")?, class) {
        (Some(name), _) => FAMILIES
            .iter()
            .find(|family| family.1 == name)
            .ok_or_else(|| {
                top.unsupported("model_type", &Value::String(name.to_owned()), MODEL_TYPES)
            })?,
        (None, Some(class)) => by_class(class)
            .ok_or_else(|| top.unsupported("architectures", class, classes(&FAMILIES)))?,
        (None, None) => {
            return Err(top.missing("model_type", format!("Volley runs {MODEL_TYPES}")));
        }
    };
    match class {
        Some(class) if class != family.2 => {
            Err(top.unsupported("architectures", class, format!("\"{}\" here", family.2)))
        }
        _ => Ok(family.0),
    }
}

fn classes(families: &[(Architecture, &str, &str)]) -> String {
    families.iter().map(|f| f.2).collect::<Vec<_>>().join(", ")
}

fn refuse_quantization(top: &Fields<'_>) -> Result<(), ConfigError> {
    for key in ["quantization_config", "compression_config"] {
        if let Some(value) = top.present(key) {
            return Err(top.unsupported(key, value, "unquantized checkpoints (F32, F16 and BF16)"));
        }
    }
    Ok(())
}

/// `dtype`, or the older `torch_dtype`.
fn stored_as(top: &Fields<'_>) -> Result<Option<ElementType>, ConfigError> {
    for key in ["dtype", "torch_dtype"] {
        let Some(name) = top.optional_text(key)? else {
            continue;
        };
        return match name.strip_prefix("torch.").unwrap_or(name) {
            "auto" => Ok(None),
            "bfloat16" => Ok(Some(ElementType::Bf16)),
            "float16" | "half" => Ok(Some(ElementType::F16)),
            "float32" | "float" => Ok(Some(ElementType::F32)),
            _ => Err(top.unsupported(
                key,
                &Value::String(name.to_owned()),
                "\"float32\", \"float16\" and \"bfloat16\"",
            )),
        };
    }
    Ok(None)
}

/// `bos_token_id` and `eos_token_id` of `fields`, over `defaults` where a key is absent.
fn special_tokens(
    fields: &Fields<'_>,
    defaults: SpecialTokens,
) -> Result<SpecialTokens, ConfigError> {
    Ok(SpecialTokens {
        bos: match generation::token_ids(fields, "bos_token_id")? {
            Some(ids) => ids.first().copied(),
            None => defaults.bos,
        },
        eos: generation::token_ids(fields, "eos_token_id")?.unwrap_or(defaults.eos),
    })
}

/// The activation must be SiLU, by either of transformers' names for it.
fn refuse_other_activation(fields: &Fields<'_>, key: &str) -> Result<(), ConfigError> {
    match fields.raw(key) {
        None => Ok(()),
        Some(Value::String(name)) if name == "silu" || name == "swish" => Ok(()),
        Some(other) => Err(fields.unsupported(key, other, "\"silu\"")),
    }
}

/// `rms_norm_eps`.
fn norm_eps(top: &Fields<'_>, default: f64) -> Result<f32, ConfigError> {
    let expected = "a number above 0 and below 1";
    let accept = |eps: f64| eps as f32 > 0.0 && eps < 1.0;
    Ok(top.number("rms_norm_eps", default, expected, accept)? as f32)
}

/// Width of a head that the configuration does not state: `hidden / heads`, which has to divide.
fn derived_head_dim(top: &Fields<'_>, hidden: usize, heads: usize) -> Result<usize, ConfigError> {
    if !hidden.is_multiple_of(heads) {
        return Err(top.contradiction(format!(
            "the hidden size {hidden} does not divide by the {heads} attention heads, and there is no head_dim"
        )));
    }
    Ok(hidden / heads)
}

/// What every family has to satisfy, whatever its keys are called.
fn check(top: &Fields<'_>, spec: &ModelSpec) -> Result<(), ConfigError> {
    let refuse = |what: String| Err(top.contradiction(what));
    if !spec.heads.is_multiple_of(spec.kv_heads) {
        return refuse(format!(
            "{} query heads do not divide by {} key/value heads",
            spec.heads, spec.kv_heads
        ));
    }
    if !spec.head_dim.is_multiple_of(2) || spec.head_dim > HEAD_DIM_MAX {
        return refuse(format!(
            "the head width is {}; the rotary embedding needs an even one, up to {HEAD_DIM_MAX}",
            spec.head_dim
        ));
    }
    if spec.top_k > spec.experts {
        return refuse(format!(
            "each token visits {} experts, but there are only {}",
            spec.top_k, spec.experts
        ));
    }
    if spec.moe_layers().next().is_none() {
        return refuse("no layer has experts; Volley runs Mixture-of-Experts models".to_owned());
    }
    if total_bytes(spec).is_none() {
        return refuse(format!(
            "its sizes together make more than {} bytes of weights",
            limits::MODEL_BYTES_MAX
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
