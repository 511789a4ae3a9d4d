//! What tests of text share.

use volley_models::Tokenizer;

/// A tokenizer with one token a byte (ids 0 to 255) and the special token 256.
pub(crate) fn byte_tokenizer() -> Tokenizer {
    // GPT-2's alphabet: printable bytes stand for themselves, the others for 256 and on.
    let mut stand_in = 256u32;
    let mut vocab = serde_json::Map::new();
    for byte in 0..=255u32 {
        let printable = matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let code = if printable {
            byte
        } else {
            stand_in += 1;
            stand_in - 1
        };
        vocab.insert(char::from_u32(code).unwrap().to_string(), byte.into());
    }
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [{"id": 256, "content": "<end>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": []},
    });
    Tokenizer::from_bytes(tokenizer.to_string().as_bytes(), None).unwrap()
}
