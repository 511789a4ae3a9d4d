//! Chat templates of real shapes, held against what transformers renders (`make_chat_cases.py` wrote the expected texts).

use std::time::{Duration, SystemTime};

use serde::Deserialize;
use serde_json::{Map, Value, json};
use volley_models::{ChatError, ChatMessage, ChatOptions, ChatTemplate};

#[derive(Deserialize)]
struct Case {
    name: String,
    template: String,
    messages: Vec<ChatMessage>,
    variables: Map<String, Value>,
    expected: Option<String>,
    refused: Option<String>,
}

/// 2024-03-27 09:05 UTC, as in the script.
fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_711_530_300)
}

fn template(source: &str) -> ChatTemplate {
    let config = json!({"bos_token": "<s>", "eos_token": {"content": "</s>", "special": true}});
    ChatTemplate::from_bytes(Some(source.as_bytes()), Some(config.to_string().as_bytes())).unwrap()
}

#[test]
fn every_case_renders_as_transformers_renders_it() {
    let cases: Vec<Case> = serde_json::from_str(include_str!("chat_cases.json")).unwrap();
    assert!(cases.len() >= 15);
    for mut case in cases {
        let tools = case.variables.remove("tools");
        let add_generation_prompt = case.variables.remove("add_generation_prompt");
        let options = ChatOptions {
            add_generation_prompt: add_generation_prompt == Some(Value::Bool(true)),
            tools: tools
                .as_ref()
                .map(|tools| tools.as_array().unwrap().as_slice()),
            variables: Some(&case.variables),
            now: Some(now()),
            ..ChatOptions::default()
        };
        let rendered = template(&case.template).render(&case.messages, &options);
        match (case.expected, case.refused) {
            (Some(expected), None) => assert_eq!(rendered.unwrap(), expected, "{}", case.name),
            (None, Some(refused)) => match rendered {
                Err(ChatError::Refused { message, line, .. }) => {
                    assert_eq!(message, refused, "{}", case.name);
                    assert!(line > 0);
                }
                other => panic!("{}: {other:?}", case.name),
            },
            _ => unreachable!("a case has one outcome"),
        }
    }
}

#[test]
fn parts_are_joined_unless_the_template_goes_over_them() {
    let parts: Vec<ChatMessage> = serde_json::from_value(json!([{"role": "user", "content": [
        {"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]))
    .unwrap();
    let text = vec![ChatMessage::new("user", "one")];
    let options = ChatOptions::default();

    let plain = template("{{ messages[0].content }}");
    assert_eq!(plain.render(&parts, &options).unwrap(), "one\ntwo");

    let parted = template("{% for part in messages[0].content %}[{{ part.text }}]{% endfor %}");
    assert_eq!(parted.render(&parts, &options).unwrap(), "[one][two]");
    assert_eq!(parted.render(&text, &options).unwrap(), "[one]");
}

#[test]
fn a_part_that_is_no_text_is_refused_when_the_message_is_read() {
    let image =
        json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]});
    assert!(serde_json::from_value::<ChatMessage>(image).is_err());
}

#[test]
fn a_message_without_content_is_none_to_the_template() {
    let message: ChatMessage =
        serde_json::from_value(json!({"role": "assistant", "content": null, "tool_calls": []}))
            .unwrap();
    let rendered =
        template("{{ messages[0].content is none }} {{ messages[0].tool_calls|length }}")
            .render(&[message], &ChatOptions::default());
    assert_eq!(rendered.unwrap(), "True 0");
}

#[test]
fn the_jinja_file_wins_and_a_list_is_chosen_from_as_transformers_does() {
    let config = |value: Value| json!({ "chat_template": value }).to_string().into_bytes();
    let one = config(json!("config"));
    let many = config(json!([
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools"},
        {"name": "rag", "template": "rag"},
    ]));
    let render = |jinja: Option<&[u8]>, config: &[u8], options: &ChatOptions<'_>| {
        ChatTemplate::from_bytes(jinja, Some(config))
            .unwrap()
            .render(&[], options)
    };
    let plain = ChatOptions::default();
    let with_tools = ChatOptions {
        tools: Some(&[]),
        ..ChatOptions::default()
    };
    let named = |name| ChatOptions {
        template: Some(name),
        ..ChatOptions::default()
    };
    assert_eq!(render(Some(b"file"), &one, &plain).unwrap(), "file");
    assert_eq!(render(Some(b"file"), &many, &with_tools).unwrap(), "file");
    assert_eq!(render(None, &one, &plain).unwrap(), "config");
    assert_eq!(render(None, &one, &with_tools).unwrap(), "config");
    assert_eq!(render(None, &many, &plain).unwrap(), "plain");
    assert_eq!(render(None, &many, &with_tools).unwrap(), "tools");
    assert_eq!(render(None, &many, &named("rag")).unwrap(), "rag");
    match render(None, &many, &named("other")) {
        Err(ChatError::NoSuchTemplate { wanted, available }) => {
            assert_eq!(
                (wanted.as_str(), available.as_str()),
                ("other", "default, rag, tool_use")
            );
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn absent_and_broken_templates_say_so() {
    assert!(matches!(
        ChatTemplate::from_bytes(None, Some(b"{}")),
        Err(ChatError::NoTemplate)
    ));
    assert!(matches!(
        ChatTemplate::from_bytes(None, None),
        Err(ChatError::NoTemplate)
    ));
    assert!(matches!(
        ChatTemplate::from_bytes(None, Some(br#"{"chat_template": 3}"#)),
        Err(ChatError::Malformed { .. })
    ));
    assert!(matches!(
        ChatTemplate::from_bytes(Some(b"\xff"), None),
        Err(ChatError::Malformed { .. })
    ));
    match ChatTemplate::from_bytes(Some(b"one\n{% if %}\n"), None) {
        Err(ChatError::Syntax { template, line, .. }) => {
            assert_eq!((template.as_str(), line), ("default", 2));
        }
        other => panic!("{other:?}"),
    }
    match template("\n\n{{ messages[0].role.nothing() }}")
        .render(&[ChatMessage::new("user", "x")], &ChatOptions::default())
    {
        Err(error @ ChatError::Render { line: 3, .. }) => {
            assert!(
                error
                    .to_string()
                    .contains("template `default` failed in line 3"),
                "{error}"
            );
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_template_that_runs_away_is_stopped() {
    let endless = [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(x) %}{{ f(x + 1) }}{% endmacro %}{{ f(0) }}",
        "{% for a in range(9999) %}{{ 'x' * 90000000 }}{% endfor %}",
        "{% set ns = namespace(s='xxxxxxxx') %}{% for a in range(64) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    ];
    for source in endless {
        match template(source).render(&[], &ChatOptions::default()) {
            Err(ChatError::TooMuch { .. } | ChatError::Render { .. }) => {}
            other => panic!("{source}: {:?}", other.map(|text| text.len())),
        }
    }
}
