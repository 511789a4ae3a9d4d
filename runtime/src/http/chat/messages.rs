//! The conversation of a request, and its tokens.

use serde_json::{Map, Value};
use volley_models::{ChatContent, ChatError, ChatMessage, ChatOptions, ChatPart};

use crate::http::encode::encode;
use crate::http::error::{ApiError, shortened};
use crate::http::fields::{Fields, wrong};
use crate::http::state::App;

/// `messages`, and how the template is to render them.
#[derive(Debug)]
pub(in crate::http) struct Conversation {
    messages: Vec<ChatMessage>,
    add_generation_prompt: bool,
    variables: Option<Map<String, Value>>,
}

impl Conversation {
    /// Takes the fields of a conversation.
    pub(in crate::http) fn take(
        fields: &mut Fields,
        add_generation_prompt: bool,
    ) -> Result<Self, ApiError> {
        let expected = "a list of at least one message";
        let messages = match fields.value("messages") {
            Some(Value::Array(messages)) if !messages.is_empty() => messages,
            Some(other) => return Err(wrong("messages", &other, expected)),
            None => {
                return Err(ApiError::invalid(
                    "messages",
                    format!("`messages` is missing; it must be {expected}"),
                ));
            }
        };
        Ok(Conversation {
            messages: messages
                .into_iter()
                .enumerate()
                .map(|(at, value)| message(at, value))
                .collect::<Result<_, _>>()?,
            add_generation_prompt: fields
                .flag("add_generation_prompt")?
                .unwrap_or(add_generation_prompt),
            variables: fields.object("chat_template_kwargs")?,
        })
    }

    /// The conversation in tokens. Templates write special tokens out themselves, so `add_special` is for exceptions.
    pub(in crate::http) async fn tokens(
        self,
        app: &App,
        add_special: bool,
    ) -> Result<Vec<u32>, ApiError> {
        app.blocking(move |engine| {
            let template = engine.chat.as_ref().ok_or(ChatError::NoTemplate)?;
            let options = ChatOptions {
                add_generation_prompt: self.add_generation_prompt,
                variables: self.variables.as_ref(),
                ..ChatOptions::default()
            };
            let text = template.render(&self.messages, &options)?;
            let tokens = encode(
                &engine.tokenizer,
                &text,
                add_special,
                engine.context as usize,
            );
            tokens.map_err(|error| error.about("messages"))
        })
        .await
    }
}

fn message(at: usize, value: Value) -> Result<ChatMessage, ApiError> {
    let place = format!("messages[{at}]");
    let Value::Object(mut extra) = value else {
        return Err(wrong(&place, &value, "an object with `role` and `content`"));
    };
    let role = match extra.remove("role") {
        // OpenAI's newer name for the same, which templates do not know.
        Some(Value::String(role)) if role == "developer" => "system".to_owned(),
        Some(Value::String(role)) if !role.is_empty() => role,
        other => {
            return Err(wrong(
                &format!("{place}.role"),
                &other.unwrap_or(Value::Null),
                "`system`, `user`, `assistant` or `tool`",
            ));
        }
    };
    let content = match extra.remove("content") {
        None | Some(Value::Null) if role == "assistant" => None,
        Some(Value::String(text)) => Some(ChatContent::Text(text)),
        Some(Value::Array(parts)) => {
            let parts = parts
                .iter()
                .enumerate()
                .map(|(index, value)| part(&format!("{place}.content[{index}]"), value));
            Some(ChatContent::Parts(parts.collect::<Result<_, _>>()?))
        }
        other => {
            return Err(wrong(
                &format!("{place}.content"),
                &other.unwrap_or(Value::Null),
                "a string or a list of text parts",
            ));
        }
    };
    Ok(ChatMessage {
        role,
        content,
        extra,
    })
}

fn part(place: &str, value: &Value) -> Result<ChatPart, ApiError> {
    let kind = value.get("type").and_then(Value::as_str);
    match (kind, value.get("text").and_then(Value::as_str)) {
        (Some("text"), Some(text)) => Ok(ChatPart::Text {
            text: text.to_owned(),
        }),
        (Some(other), _) if other != "text" => {
            let message = format!(
                "`{place}` is of type `{}`; this server takes text only",
                shortened(other)
            );
            Err(ApiError::invalid(format!("{place}.type"), message))
        }
        _ => Err(wrong(place, value, "{\"type\": \"text\", \"text\": ...}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(messages: Value) -> Result<Conversation, ApiError> {
        let body = serde_json::json!({"messages": messages}).to_string();
        Conversation::take(&mut Fields::parse(body.as_bytes()).unwrap(), true)
    }

    #[test]
    fn content_is_text_or_parts_and_other_fields_are_kept() {
        let conversation = take(serde_json::json!([
            {"role": "developer", "content": "be brief", "name": "x"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": null},
        ]));
        let messages = conversation.unwrap().messages;
        assert_eq!(messages[0].role, "system");
        assert_eq!(messages[0].extra["name"], "x");
        let parts = ["a", "b"].map(|text| ChatPart::Text {
            text: text.to_owned(),
        });
        assert_eq!(messages[1].content, Some(ChatContent::Parts(parts.into())));
        assert_eq!(messages[2].content, None);
    }

    #[test]
    fn an_error_names_the_message_and_the_part() {
        let cases = [
            (serde_json::json!([]), "messages"),
            (serde_json::json!("hello"), "messages"),
            (serde_json::json!(["hello"]), "messages[0]"),
            (
                serde_json::json!([{"role": "user", "content": "a"}, {"content": "a"}]),
                "messages[1].role",
            ),
            (serde_json::json!([{"role": "user"}]), "messages[0].content"),
            (
                serde_json::json!([{"role": "user", "content": 5}]),
                "messages[0].content",
            ),
            (
                serde_json::json!([{"role": "user", "content": [{"type": "text", "text": 5}]}]),
                "messages[0].content[0]",
            ),
            (
                serde_json::json!([{"role": "user", "content": [{"type": "image_url"}]}]),
                "messages[0].content[0].type",
            ),
        ];
        for (messages, param) in cases {
            assert_eq!(
                take(messages).unwrap_err().body.param.as_deref(),
                Some(param)
            );
        }
    }
}
