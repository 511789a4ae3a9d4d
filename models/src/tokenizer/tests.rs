//! Tokenizers of every kind of decoder that the plan tells apart, small enough to write here.

use proptest::prelude::*;
use serde_json::json;

use super::*;

const FIXTURE: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../integration/fixtures/models/tiny-mixtral/tokenizer.json"
);

fn byte_level() -> Tokenizer {
    Tokenizer::from_bytes(&std::fs::read(FIXTURE).unwrap(), None).unwrap()
}

/// A word-level model with tokens that are awkward for `decoder`, so that every id can follow every other.
fn with_decoder(decoder: serde_json::Value) -> Tokenizer {
    let mut tokens: Vec<String> = [
        "<unk>", "▁", "▁▁", "▁the", "a▁b", "", " ", "  x", "é", "▁é▁", "<0x", "##ing", "</w>",
    ]
    .map(str::to_owned)
    .to_vec();
    tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    let vocab: serde_json::Map<_, _> = tokens
        .iter()
        .enumerate()
        .map(|(id, token)| (token.clone(), json!(id)))
        .collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
        "post_processor": null,
        "added_tokens": [
            {"id": 300, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
             "normalized": false, "special": true},
            {"id": 301, "content": "▁added", "single_word": false, "lstrip": false, "rstrip": false,
             "normalized": true, "special": false},
        ],
        "decoder": decoder,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    });
    Tokenizer::from_bytes(tokenizer.to_string().as_bytes(), None).unwrap()
}

fn llama(strip: usize) -> serde_json::Value {
    json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": strip, "stop": 0},
    ]})
}

fn decoders() -> Vec<serde_json::Value> {
    vec![
        json!(null),
        llama(1),
        llama(3),
        json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]}),
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}),
        json!({"type": "Sequence", "decoders": [
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]}),
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}),
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": true}),
        json!({"type": "ByteFallback"}),
        json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
        json!({"type": "BPEDecoder", "suffix": "</w>"}),
        json!({"type": "Sequence", "decoders": [
            {"type": "Fuse"}, {"type": "Replace", "pattern": {"String": "▁t"}, "content": "T"}]}),
    ]
}

/// The text of a stream, piece by piece.
fn stream(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> Vec<String> {
    let mut detokenizer = tokenizer.detokenizer(skip_special);
    let mut pieces: Vec<String> = ids
        .iter()
        .filter_map(|&id| detokenizer.push(id).unwrap())
        .collect();
    pieces.extend(detokenizer.finish().unwrap());
    assert!(pieces.iter().all(|piece| !piece.is_empty()));
    pieces
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn a_stream_of_any_ids_is_the_text_of_all(
        ids in prop::collection::vec(0u32..310, 0..40), skip_special: bool
    ) {
        for decoder in decoders() {
            let tokenizer = with_decoder(decoder.clone());
            let expected = tokenizer.decode(&ids, skip_special).unwrap();
            prop_assert_eq!(stream(&tokenizer, &ids, skip_special).concat(), expected, "{}", decoder);
        }
    }

    #[test]
    fn a_stream_of_any_ids_of_a_real_vocabulary_is_the_text_of_all(
        ids in prop::collection::vec(0u32..520, 0..200), skip_special: bool
    ) {
        let tokenizer = byte_level();
        let expected = tokenizer.decode(&ids, skip_special).unwrap();
        prop_assert_eq!(stream(&tokenizer, &ids, skip_special).concat(), expected);
    }

    #[test]
    fn text_comes_back_whole_and_no_piece_breaks_a_character(text in "(\\PC|[é你好🌍👩🏽‍🚀\n ]){0,60}") {
        let tokenizer = byte_level();
        let ids = tokenizer.encode(&text, false).unwrap();
        let pieces = stream(&tokenizer, &ids, false);
        let replacement = char::REPLACEMENT_CHARACTER;
        if !text.contains(replacement) {
            prop_assert!(!pieces.iter().any(|piece| piece.contains(replacement)));
        }
        prop_assert_eq!(pieces.concat(), text);
    }
}

#[test]
fn every_known_decoder_streams() {
    // Held back is a part of a character and a run of bytes, nothing else: a plain token comes out at once.
    for (decoder, streams) in decoders().into_iter().zip([
        true, true, true, true, true, true, true, true, true, false, false, false,
    ]) {
        let tokenizer = with_decoder(decoder.clone());
        let mut detokenizer = tokenizer.detokenizer(true);
        let id = tokenizer.token_id("a▁b").unwrap();
        assert_eq!(
            detokenizer.push(id).unwrap().is_some(),
            streams,
            "{decoder}"
        );
    }
}

#[test]
fn a_character_in_parts_is_held_until_it_is_whole() {
    let tokenizer = byte_level();
    let ids = tokenizer.encode("你", false).unwrap();
    assert_eq!(ids.len(), 3);
    let mut detokenizer = tokenizer.detokenizer(false);
    assert_eq!(detokenizer.push(ids[0]).unwrap(), None);
    assert_eq!(detokenizer.push(ids[1]).unwrap(), None);
    assert_eq!(detokenizer.push(ids[2]).unwrap().as_deref(), Some("你"));
    assert_eq!(detokenizer.push(ids[0]).unwrap(), None);
    assert_eq!(detokenizer.finish().unwrap().as_deref(), Some("\u{fffd}"));
}

#[test]
fn a_run_of_bytes_is_held_until_it_ends() {
    let tokenizer = with_decoder(llama(1));
    let byte = |byte: u8| tokenizer.token_id(&format!("<0x{byte:02X}>")).unwrap();
    let mut detokenizer = tokenizer.detokenizer(true);
    for b in "é".bytes() {
        assert_eq!(detokenizer.push(byte(b)).unwrap(), None);
    }
    let the = tokenizer.token_id("▁the").unwrap();
    assert_eq!(detokenizer.push(the).unwrap().as_deref(), Some("é the"));
    assert_eq!(detokenizer.push(byte(0xe4)).unwrap(), None);
    assert_eq!(detokenizer.push(byte(0xbd)).unwrap(), None);
    assert_eq!(
        detokenizer.finish().unwrap().as_deref(),
        Some("\u{fffd}\u{fffd}")
    );
}

#[test]
fn a_token_tells_its_bytes_and_its_text() {
    let tokenizer = byte_level();
    let ids = tokenizer.encode(" é", false).unwrap();
    let bytes: Vec<u8> = ids
        .iter()
        .flat_map(|&id| tokenizer.token_bytes(id).unwrap())
        .collect();
    assert_eq!(bytes, " é".as_bytes());
    let last = *ids.last().unwrap();
    assert_eq!(tokenizer.token_text(last).unwrap(), "\u{fffd}");
    assert!(tokenizer.is_special(2) && !tokenizer.is_special(last));
    assert_eq!(tokenizer.token(2).as_deref(), Some("</s>"));
    assert_eq!(tokenizer.token_bytes(2).as_deref(), Some(&b"</s>"[..]));
    assert_eq!(tokenizer.token_bytes(9999), None);
    assert_eq!(tokenizer.vocab().len(), tokenizer.vocab_size());

    let llama = with_decoder(llama(1));
    let bytes = |token: &str| llama.token_bytes(llama.token_id(token).unwrap()).unwrap();
    assert_eq!(bytes("▁the"), b" the");
    assert_eq!(bytes("<0xE4>"), [0xe4]);
}

#[test]
fn bos_and_eos_are_added_as_the_configuration_says() {
    let file = std::fs::read(FIXTURE).unwrap();
    let mut with_processor: serde_json::Value = serde_json::from_slice(&file).unwrap();
    with_processor["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    });
    let with_processor = with_processor.to_string().into_bytes();
    let encode = |file: &[u8], config: serde_json::Value| {
        let tokenizer = Tokenizer::from_bytes(file, Some(config.to_string().as_bytes())).unwrap();
        let plain = tokenizer.encode("return", false).unwrap();
        let full = tokenizer.encode("return", true).unwrap();
        let at = full
            .windows(plain.len())
            .position(|window| window == plain)
            .unwrap();
        (full[..at].to_vec(), full[at + plain.len()..].to_vec())
    };
    let tokens = json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}});
    let and = |key: &str, value: bool| {
        let mut config = tokens.clone();
        config[key] = json!(value);
        config
    };
    // No key: the post-processor decides. A key: it alone decides.
    assert_eq!(encode(&file, tokens.clone()), (vec![], vec![]));
    assert_eq!(encode(&with_processor, tokens.clone()), (vec![1], vec![]));
    assert_eq!(encode(&file, and("add_bos_token", true)), (vec![1], vec![]));
    assert_eq!(
        encode(&with_processor, and("add_bos_token", true)),
        (vec![1], vec![])
    );
    assert_eq!(
        encode(&with_processor, and("add_bos_token", false)),
        (vec![], vec![])
    );
    assert_eq!(
        encode(&with_processor, and("add_eos_token", true)),
        (vec![], vec![2])
    );
    assert_eq!(
        encode(&file, json!({"add_bos_token": true})),
        (vec![], vec![])
    );
    let unknown = json!({"add_bos_token": true, "bos_token": "<none>"});
    assert!(matches!(
        Tokenizer::from_bytes(&file, Some(unknown.to_string().as_bytes())),
        Err(TokenizerError::Config { .. })
    ));
}

#[test]
fn malformed_files_are_refused() {
    assert!(matches!(
        Tokenizer::from_bytes(b"{}", None),
        Err(TokenizerError::Malformed { .. })
    ));
    let file = std::fs::read(FIXTURE).unwrap();
    let mut stripping: serde_json::Value = serde_json::from_slice(&file).unwrap();
    stripping["decoder"] = json!({"type": "Sequence", "decoders": [
        {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 0, "stop": 1}]});
    assert!(matches!(
        Tokenizer::from_bytes(stripping.to_string().as_bytes(), None),
        Err(TokenizerError::Malformed { .. })
    ));
    for config in ["", "[]", r#"{"add_bos_token": 1}"#, r#"{"bos_token": 1}"#] {
        assert!(matches!(
            Tokenizer::from_bytes(&file, Some(config.as_bytes())),
            Err(TokenizerError::Config { .. })
        ));
    }
}

#[test]
fn the_least_number_of_tokens_is_never_above_the_true_one() {
    let tokenizer = byte_level();
    let longest = tokenizer
        .vocab()
        .keys()
        .map(|token| token.chars().count())
        .max()
        .unwrap();
    assert_eq!(tokenizer.least_tokens(""), 0);
    assert_eq!(tokenizer.least_tokens(&"a".repeat(longest * 3 + 1)), 4);
    for text in [
        "I am the king of the world",
        "        ",
        "\u{1F600}\u{1F600}",
        "x1y2z3",
    ] {
        let tokens = tokenizer.encode(text, false).unwrap().len();
        assert!(tokenizer.least_tokens(text) <= tokens, "{text}");
    }
}
