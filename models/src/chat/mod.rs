//! Chat templates: a conversation to the text a model was trained on, as transformers' `apply_chat_template` renders it.
//!
//! Templates are Jinja programs out of the model's directory, run by minijinja with Python's methods on strings, lists and
//! dictionaries. They are not trusted: fuel bounds their time and memory, and they see nothing but their variables.

mod json;
mod strftime;

use std::{collections::BTreeMap, io, sync::Arc, time::SystemTime};

use minijinja::{
    Environment, Error, ErrorKind, UndefinedBehavior, Value, syntax::SyntaxConfig, value::Serde,
};
use serde::{Deserialize, Serialize};
use serde_json::Map;

use crate::tokenizer::TokenizerConfig;

/// Work that one rendering may do: about one unit an instruction, and one for 64 bytes made. A conversation of a thousand long
/// messages takes some 10^5, and this much bounds a rendering to about a second and 256 MB.
pub const FUEL: u64 = 4_000_000;

/// Longest rendered conversation, in bytes.
pub const OUTPUT_BYTES_MAX: usize = 64 << 20;

/// Deepest nesting of macros, loops and calls.
const RECURSION_MAX: usize = 200;

/// Why a conversation could not be rendered. `template` is a name in the model's list, `default` for a single one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChatError {
    /// The model has no template.
    #[error(
        "the model has no chat template (neither chat_template.jinja nor `chat_template` in tokenizer_config.json); \
         send a plain completion, or add a template"
    )]
    NoTemplate,
    /// The model has several templates, but not the one asked for.
    #[error("there is no chat template `{wanted}`; this model has {available}")]
    NoSuchTemplate {
        /// What was asked for.
        wanted: String,
        /// The names there are.
        available: String,
    },
    /// A file with templates is malformed.
    #[error("{file}: {detail}")]
    Malformed {
        /// The file.
        file: &'static str,
        /// What is wrong.
        detail: String,
    },
    /// A template does not compile.
    #[error("chat template `{template}` does not compile, line {line}: {detail}")]
    Syntax {
        /// The template.
        template: String,
        /// Line, from 1; 0 if unknown.
        line: usize,
        /// What is wrong.
        detail: String,
    },
    /// The template refused the conversation by `raise_exception`: the conversation is at fault, not the server.
    #[error(
        "the chat template refuses this conversation: {message} (template `{template}`, line {line})"
    )]
    Refused {
        /// The template.
        template: String,
        /// Line, from 1; 0 if unknown.
        line: usize,
        /// What the template says.
        message: String,
    },
    /// The template failed while it ran.
    #[error("chat template `{template}` failed in line {line}: {detail}")]
    Render {
        /// The template.
        template: String,
        /// Line, from 1; 0 if unknown.
        line: usize,
        /// What happened.
        detail: String,
    },
    /// The template did more work than [`FUEL`] or wrote more than [`OUTPUT_BYTES_MAX`].
    #[error(
        "chat template `{template}` exceeds the limit of {limit}, line {line}; shorten the conversation"
    )]
    TooMuch {
        /// The template.
        template: String,
        /// Line, from 1; 0 if unknown.
        line: usize,
        /// Which limit.
        limit: String,
    },
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant`, `tool`, or what the template knows.
    pub role: String,
    /// What it says; absent in an assistant's message that only calls tools.
    #[serde(default)]
    pub content: Option<ChatContent>,
    /// Anything else the template may look at: `tool_calls`, `name`, `reasoning_content`, ...
    #[serde(flatten)]
    pub extra: Map<String, serde_json::Value>,
}

/// Content of a message.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ChatContent {
    /// As text.
    Text(String),
    /// As a list of parts.
    Parts(Vec<ChatPart>),
}

/// A part of a message: text, the only kind that Volley's models take.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ChatPart {
    /// `{"type": "text", "text": ...}`.
    Text {
        /// The text.
        text: String,
    },
}

/// What a rendering is told beside the messages.
#[derive(Debug, Clone, Default)]
pub struct ChatOptions<'a> {
    /// Whether to end with the beginning of the assistant's answer.
    pub add_generation_prompt: bool,
    /// Tools the model may call, as JSON schemas; `None` is Python's `None`.
    pub tools: Option<&'a [serde_json::Value]>,
    /// Name of a template, where a model has several. By default `tool_use` if there are tools and it exists, else `default`.
    pub template: Option<&'a str>,
    /// More variables (`chat_template_kwargs`, such as `enable_thinking`). They cannot replace the messages.
    pub variables: Option<&'a Map<String, serde_json::Value>>,
    /// The time that `strftime_now` tells, in UTC; the system's clock if `None`.
    pub now: Option<SystemTime>,
}

impl ChatMessage {
    /// A message of text.
    pub fn new(role: impl Into<String>, text: impl Into<String>) -> ChatMessage {
        ChatMessage {
            role: role.into(),
            content: Some(ChatContent::Text(text.into())),
            extra: Map::new(),
        }
    }
}

/// The compiled chat templates of a model. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    environment: Environment<'static>,
    /// For each template, whether it wants content as a list of parts.
    templates: BTreeMap<String, bool>,
    /// `bos_token`, `eos_token` and the like.
    tokens: Vec<(String, String)>,
}

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

impl ChatTemplate {
    /// Compiles the template of `chat_template.jinja`, which wins, or those of `tokenizer_config.json`.
    ///
    /// # Errors
    /// When there is none, or one does not compile.
    pub fn from_bytes(
        jinja: Option<&[u8]>,
        tokenizer_config: Option<&[u8]>,
    ) -> Result<ChatTemplate, ChatError> {
        let config = match tokenizer_config {
            Some(bytes) => TokenizerConfig::parse(bytes).map_err(|error| ChatError::Malformed {
                file: "tokenizer_config.json",
                detail: error.to_string(),
            })?,
            None => TokenizerConfig::default(),
        };
        let sources = match (jinja, config.chat_template) {
            (Some(jinja), _) => {
                let source = std::str::from_utf8(jinja).map_err(|error| ChatError::Malformed {
                    file: "chat_template.jinja",
                    detail: error.to_string(),
                })?;
                vec![(DEFAULT.to_owned(), source.to_owned())]
            }
            (None, Some(value)) => sources(value)?,
            (None, None) => return Err(ChatError::NoTemplate),
        };
        ChatTemplate::compile(sources, config.special)
    }

    /// The text of a conversation.
    ///
    /// Content given as parts is joined to one text with line feeds, unless the template itself goes over parts.
    ///
    /// # Errors
    /// When the template refuses the conversation, fails, or exceeds a limit.
    pub fn render(
        &self,
        messages: &[ChatMessage],
        options: &ChatOptions<'_>,
    ) -> Result<String, ChatError> {
        let (name, wants_parts) = self.choose(options)?;
        let messages: Vec<ChatMessage> = messages
            .iter()
            .map(|message| shaped(message, wants_parts))
            .collect();
        self.run(name, &messages, options)
    }

    /// Names of the model's templates.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.inner.templates.keys().map(String::as_str)
    }

    fn compile(
        sources: Vec<(String, String)>,
        tokens: Vec<(String, String)>,
    ) -> Result<ChatTemplate, ChatError> {
        let mut environment = environment();
        let mut templates = BTreeMap::new();
        for (name, source) in sources {
            environment
                .add_template_owned(name.clone(), without_generation_tags(&source))
                .map_err(|error| ChatError::Syntax {
                    template: name.clone(),
                    line: error.line().unwrap_or(0),
                    detail: describe(&error),
                })?;
            templates.insert(name, false);
        }
        let mut template = ChatTemplate {
            inner: Arc::new(Inner {
                environment,
                templates,
                tokens,
            }),
        };
        let wanting: Vec<String> = template
            .names()
            .filter(|name| template.wants_parts(name))
            .map(str::to_owned)
            .collect();
        if let Some(inner) = Arc::get_mut(&mut template.inner) {
            for name in wanting {
                inner.templates.insert(name, true);
            }
        }
        Ok(template)
    }

    /// Whether a template loses content that is a text, and takes it as parts. Found out by trying both, since
    /// templates do not say.
    fn wants_parts(&self, name: &str) -> bool {
        const NEEDLE: &str = "volley probes this template";
        let shows = |wants_parts: bool| {
            let message = shaped(&ChatMessage::new("user", NEEDLE), wants_parts);
            self.run(name, &[message], &ChatOptions::default())
                .is_ok_and(|text| text.contains(NEEDLE))
        };
        !shows(false) && shows(true)
    }

    /// transformers' `get_chat_template`.
    fn choose<'s>(&'s self, options: &ChatOptions<'s>) -> Result<(&'s str, bool), ChatError> {
        let templates = &self.inner.templates;
        let wanted = match options.template {
            Some(name) => name,
            None if options.tools.is_some() && templates.contains_key(TOOL_USE) => TOOL_USE,
            None => DEFAULT,
        };
        match templates.get_key_value(wanted) {
            Some((name, wants_parts)) => Ok((name, *wants_parts)),
            None => Err(ChatError::NoSuchTemplate {
                wanted: wanted.to_owned(),
                available: self.names().collect::<Vec<_>>().join(", "),
            }),
        }
    }

    fn run(
        &self,
        name: &str,
        messages: &[ChatMessage],
        options: &ChatOptions<'_>,
    ) -> Result<String, ChatError> {
        let failed = |error: Error| classify(name, &error);
        let template = self.inner.environment.get_template(name).map_err(failed)?;
        // Later entries win, as the keyword arguments of `apply_chat_template` do over special tokens.
        let mut context: BTreeMap<&str, Value> = BTreeMap::new();
        for (key, token) in &self.inner.tokens {
            context.insert(key, Value::from(token.as_str()));
        }
        for (key, value) in options.variables.into_iter().flatten() {
            context.insert(key, Value::from(Serde(value)));
        }
        let tools = options.tools.map(|tools| Value::from(Serde(tools)));
        context.insert("messages", Value::from(Serde(messages)));
        context.insert("tools", tools.unwrap_or(Value::from(())));
        context.entry("documents").or_insert(Value::from(()));
        context.insert(
            "add_generation_prompt",
            Value::from(options.add_generation_prompt),
        );
        let now = options.now;
        context.insert(
            "strftime_now",
            Value::from_function(move |format: &str| {
                strftime::format(now.unwrap_or_else(SystemTime::now), format)
            }),
        );
        let mut text = Bounded(Vec::new());
        template
            .render_captured_to(Value::from_pairs(context), &mut text)
            .map_err(failed)?;
        String::from_utf8(text.0).map_err(|error| ChatError::Render {
            template: name.to_owned(),
            line: 0,
            detail: error.to_string(),
        })
    }
}

/// A message whose content is a text, or parts, as the template wants it. No content stays none.
fn shaped(message: &ChatMessage, wants_parts: bool) -> ChatMessage {
    let content = message.content.as_ref().map(|content| match content {
        ChatContent::Text(text) if wants_parts => {
            ChatContent::Parts(vec![ChatPart::Text { text: text.clone() }])
        }
        ChatContent::Parts(parts) if !wants_parts => {
            let texts: Vec<&str> = parts
                .iter()
                .map(|ChatPart::Text { text }| text.as_str())
                .collect();
            ChatContent::Text(texts.join("\n"))
        }
        fitting => fitting.clone(),
    });
    ChatMessage {
        role: message.role.clone(),
        content,
        extra: message.extra.clone(),
    }
}

/// `chat_template` of `tokenizer_config.json`: one template, or a list of named ones.
fn sources(value: serde_json::Value) -> Result<Vec<(String, String)>, ChatError> {
    #[derive(Deserialize)]
    struct Named {
        name: String,
        template: String,
    }
    let malformed = |detail: String| ChatError::Malformed {
        file: "tokenizer_config.json",
        detail: format!(
            "`chat_template` is neither a string nor a list of {{name, template}}: {detail}"
        ),
    };
    match value {
        serde_json::Value::String(source) => Ok(vec![(DEFAULT.to_owned(), source)]),
        other => {
            let named: Vec<Named> =
                serde_json::from_value(other).map_err(|error| malformed(error.to_string()))?;
            if named.is_empty() {
                return Err(ChatError::NoTemplate);
            }
            Ok(named
                .into_iter()
                .map(|named| (named.name, named.template))
                .collect())
        }
    }
}

/// The environment that transformers makes (`_cached_compile_jinja_template`).
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build();
    match syntax {
        Ok(syntax) => environment.set_syntax(syntax),
        Err(error) => unreachable!("the default delimiters are valid: {error}"),
    }
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(RECURSION_MAX);
    environment.add_filter("tojson", json::tojson);
    environment.add_function(
        "raise_exception",
        |message: String| -> Result<Value, Error> {
            let raised = Raised(message.clone());
            Err(Error::new(ErrorKind::InvalidOperation, message).with_source(raised))
        },
    );
    environment
}

/// Marks an error as the template's own word.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

/// Marks an error as too much output.
#[derive(Debug, thiserror::Error)]
#[error("the output exceeds {OUTPUT_BYTES_MAX} bytes")]
struct Overflowed;

/// Output up to the limit.
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > OUTPUT_BYTES_MAX {
            return Err(io::Error::other(Overflowed));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn classify(template: &str, error: &Error) -> ChatError {
    let template = template.to_owned();
    let line = error.line().unwrap_or(0);
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = cause {
        if let Some(Raised(message)) = current.downcast_ref() {
            return ChatError::Refused {
                template,
                line,
                message: message.clone(),
            };
        }
        if let Some(inner) = current.downcast_ref::<Error>()
            && inner.kind() == ErrorKind::OutOfFuel
        {
            return ChatError::TooMuch {
                template,
                line,
                limit: format!("{FUEL} units of work"),
            };
        }
        cause = current.source();
    }
    if error.kind() == ErrorKind::WriteFailure {
        return ChatError::TooMuch {
            template,
            line,
            limit: format!("{OUTPUT_BYTES_MAX} bytes of output"),
        };
    }
    ChatError::Render {
        template,
        line,
        detail: describe(error),
    }
}

/// Kind and detail of an error, without the place, which our own messages name.
fn describe(error: &Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

/// Transformers' `{% generation %}` marks what an assistant said, for training; here it only has to be transparent. The tags
/// become an `if` that always holds, which treats white space alike.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(end + "%}".len());
        let word = tag.trim_start_matches("{%").trim_end_matches("%}");
        match word.trim_matches(['-', '+']).trim() {
            "generation" => out.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}
