//! What the answers of chat and completions have in common.

use serde::Serialize;

use super::ids;
use crate::text::Usage;

/// The first fields of every answer and every chunk of it.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Head {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
}

impl Head {
    pub(super) fn new(prefix: &str, object: &'static str, model: &str) -> Self {
        Head {
            id: ids::name(prefix),
            object,
            created: ids::now(),
            model: model.to_owned(),
        }
    }
}

/// `usage` as OpenAI spells it.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct UsageBody {
    prompt_tokens: u64,
    completion_tokens: u64,
    total_tokens: u64,
}

impl From<Usage> for UsageBody {
    fn from(usage: Usage) -> Self {
        let Usage {
            prompt_tokens,
            completion_tokens,
        } = usage;
        UsageBody {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
        }
    }
}
