//! Bad input against the real program: models that lie, and requests that are nonsense or huge. Each is refused with a message that says
//! what is wrong and where, and nothing beside it is disturbed.

mod server;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use self::server::{PATIENCE, Server};

const QUERY: &str = "model.layers.0.self_attn.q_proj.weight";

/// The files of a model in memory, to be harmed.
struct Model {
    config: Value,
    header: Map<String, Value>,
    data: Vec<u8>,
    /// What the file says of its header's length, if not the truth.
    header_bytes: Option<u64>,
    /// Bytes cut off the end of the file.
    cut: usize,
}

impl Model {
    fn read() -> Model {
        let bytes = fs::read(fixture().join("model.safetensors")).unwrap();
        let (length, rest) = bytes.split_at(8);
        let (header, data) = rest.split_at(u64::from_le_bytes(length.try_into().unwrap()) as usize);
        Model {
            config: serde_json::from_slice(&fs::read(fixture().join("config.json")).unwrap())
                .unwrap(),
            header: serde_json::from_slice(header).unwrap(),
            data: data.to_vec(),
            header_bytes: None,
            cut: 0,
        }
    }

    fn write(&self) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
        ] {
            fs::copy(fixture().join(name), dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join("config.json"), self.config.to_string()).unwrap();
        let header = Value::Object(self.header.clone()).to_string();
        let length = self.header_bytes.unwrap_or(header.len() as u64);
        let mut file = [&length.to_le_bytes(), header.as_bytes(), &self.data].concat();
        file.truncate(file.len() - self.cut);
        fs::write(dir.path().join("model.safetensors"), file).unwrap();
        dir
    }

    fn query(&mut self) -> &mut Value {
        self.header.get_mut(QUERY).unwrap()
    }

    /// Takes a tensor out so that the file is sound without it.
    fn remove(&mut self, name: &str) {
        let offsets = self.header.remove(name).unwrap()["data_offsets"].clone();
        let [begin, end] = [0, 1].map(|i| offsets[i].as_u64().unwrap());
        self.data.drain(begin as usize..end as usize);
        for entry in self
            .header
            .values_mut()
            .filter(|entry| entry["data_offsets"].is_array())
        {
            for i in 0..2 {
                let at = entry["data_offsets"][i].as_u64().unwrap();
                if at >= end {
                    entry["data_offsets"][i] = json!(at - (end - begin));
                }
            }
        }
    }
}

type Harm = fn(&mut Model);

#[test]
fn a_model_that_lies_is_refused_with_what_and_where() {
    const NEAR_2_63: u64 = 1 << 63;
    let cases: &[(&str, Harm, &[&str])] = &[
        ("nothing", |_| {}, &[]),
        (
            "a byte is missing",
            |model| model.cut = 1,
            &["model.safetensors", "is the download complete?"],
        ),
        (
            "only a piece of the header",
            |model| model.cut = model.data.len() + 1000,
            &["model.safetensors", "its header alone takes"],
        ),
        (
            "a header of 2^63 bytes",
            |model| model.header_bytes = Some(NEAR_2_63),
            &["a header of 9223372036854775808 bytes"],
        ),
        (
            "a header of 2^64 - 1 bytes",
            |model| model.header_bytes = Some(u64::MAX),
            &["a header of 18446744073709551615 bytes"],
        ),
        (
            "offsets near 2^63",
            |model| model.query()["data_offsets"] = json!([NEAR_2_63 - 8, NEAR_2_63]),
            &[QUERY, "9223372036854775800"],
        ),
        (
            "offsets near 2^64",
            |model| model.query()["data_offsets"] = json!([u64::MAX - 8, u64::MAX]),
            &[QUERY, "18446744073709551615"],
        ),
        (
            "offsets backwards",
            |model| model.query()["data_offsets"] = json!([100, 8]),
            &[QUERY, "begins at byte 100", "ends at byte 8"],
        ),
        (
            "a negative offset",
            |model| model.query()["data_offsets"] = json!([-8, 8]),
            &[QUERY, "malformed"],
        ),
        (
            "a shape that overflows",
            |model| model.query()["shape"] = json!([1u64 << 32, 1u64 << 32]),
            &[QUERY, "does not fill its 32768 bytes"],
        ),
        (
            "a shape near 2^63",
            |model| model.query()["shape"] = json!([1u64 << 62, 2]),
            &[QUERY, "does not fill its 32768 bytes"],
        ),
        (
            "another shape of the same size",
            |model| model.query()["shape"] = json!([256, 64]),
            &[QUERY, "[256, 64]", "[128, 128]"],
        ),
        (
            "a wider type",
            |model| model.query()["dtype"] = json!("F32"),
            &[QUERY, "F32", "does not fill its 32768 bytes"],
        ),
        (
            "a type of the same width",
            |model| model.query()["dtype"] = json!("I16"),
            &[QUERY, "stored as I16", "F32, F16 and BF16"],
        ),
        (
            "a type that does not exist",
            |model| model.query()["dtype"] = json!("Q4_K"),
            &[QUERY, "Q4_K"],
        ),
        (
            "a missing tensor",
            |model| model.remove(QUERY),
            &["there is no tensor", QUERY],
        ),
        (
            "an unknown architecture",
            |model| model.config["model_type"] = json!("llama"),
            &["config.json", "\"llama\"", "mixtral"],
        ),
        (
            "more experts than weights",
            |model| model.config["num_local_experts"] = json!(8),
            &["does not fit its config.json", "experts.4"],
        ),
        (
            "fewer experts than weights",
            |model| model.config["num_local_experts"] = json!(2),
            &["does not fit its config.json", "gate.weight"],
        ),
        (
            "more layers than weights",
            |model| model.config["num_hidden_layers"] = json!(3),
            &["there is no tensor", "layers.2"],
        ),
        (
            "fewer layers than weights",
            |model| model.config["num_hidden_layers"] = json!(1),
            &["config.json has 1 layers", "layers.1"],
        ),
        (
            "another width",
            |model| model.config["hidden_size"] = json!(256),
            &["has shape", "but config.json calls for"],
        ),
        (
            "a width near 2^63",
            |model| model.config["hidden_size"] = json!(NEAR_2_63),
            &["`hidden_size` is 9223372036854775808"],
        ),
        (
            "a vocabulary of 10^18",
            |model| model.config["vocab_size"] = json!(10u64.pow(18)),
            &["`vocab_size` is 1000000000000000000"],
        ),
    ];
    for (name, harm, expected) in cases {
        let mut model = Model::read();
        harm(&mut model);
        let dir = model.write();
        let (code, message) = generate(dir.path());
        // The first case shows that the others fail for the reason they name.
        assert_eq!(
            code,
            if expected.is_empty() { 0 } else { 1 },
            "{name}: {message}"
        );
        for part in *expected {
            assert!(
                message.contains(part),
                "{name}: `{part}` is not in: {message}"
            );
        }
        assert!(
            expected.is_empty() || message.contains(dir.path().to_str().unwrap()),
            "{name}: no path in: {message}"
        );
    }
}

#[test]
fn a_broken_tokenizer_is_named_with_its_folder() {
    for (file, text, expected) in [
        (
            "tokenizer.json",
            "{\"version\": \"1.",
            "tokenizer.json is not a tokenizer",
        ),
        (
            "tokenizer_config.json",
            "nope",
            "tokenizer_config.json: it is not valid JSON",
        ),
    ] {
        let dir = Model::read().write();
        fs::write(dir.path().join(file), text).unwrap();
        let (code, message) = generate(dir.path());
        assert_eq!(code, 1, "{message}");
        assert!(
            message.contains(expected) && message.contains(dir.path().to_str().unwrap()),
            "{message}"
        );
    }
}

#[test]
fn weights_that_are_no_numbers_fail_the_request_and_not_the_server() {
    let mut model = Model::read();
    let offsets = model.header["model.norm.weight"]["data_offsets"].clone();
    let [begin, end] = [0, 1].map(|i| offsets[i].as_u64().unwrap() as usize);
    // bf16 NaN.
    model.data[begin..end]
        .chunks_exact_mut(2)
        .for_each(|bytes| bytes.copy_from_slice(&[0xC0, 0x7F]));
    let dir = model.write();
    let server = Server::start(dir.path(), &[]);
    for temperature in [0.0, 1.0] {
        let body = json!({"prompt": "I am", "max_tokens": 4, "temperature": temperature});
        let (status, answer) = server.post("/v1/completions", &body);
        assert_eq!(status, 500, "{answer}");
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(message.contains("not finite numbers"), "{message}");
    }
    assert_eq!(server.get("/livez").0, 200);
}

#[test]
fn nonsense_and_huge_bodies_are_refused_and_a_stream_beside_them_goes_on() {
    let server = Server::start(&fixture(), &[]);
    let greedy = json!({"prompt": "I am", "max_tokens": 3000, "temperature": 0, "ignore_eos": true, "stream": true, "return_token_ids": true});
    let alone = tokens(&server, &greedy);
    assert_eq!(alone.len(), 3000);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Also when a check below fails, lest the scope wait for the streams for ever.
        let finish = SetOnDrop(&done);
        // One stream after the other, as long as there is something to disturb them.
        let beside = scope.spawn(|| {
            let mut streams = 0;
            while !done.load(Ordering::SeqCst) || streams == 0 {
                let same = tokens(&server, &greedy) == alone;
                assert!(
                    same,
                    "a stream beside the refused requests has other tokens"
                );
                streams += 1;
            }
        });
        // The first is below the largest body that is taken, the second above.
        let (large, huge) = (3_000_000, 10_000_000);
        let ids = format!("{{\"prompt\": [{}5]}}", "5,".repeat(large / 2));
        let text = format!("{{\"prompt\": \"{}\"}}", "a ".repeat(huge / 2));
        let refused: &[(&str, &[u8], u16)] = &[
            ("nothing", b"", 400),
            ("half an object", b"{\"prompt\": \"a\"", 400),
            ("a trailing comma", b"{\"prompt\": \"a\",}", 400),
            ("a list", b"[]", 400),
            ("invalid UTF-8", b"{\"prompt\": \"\xff\xfe\"}", 400),
            ("half a surrogate pair", br#"{"prompt": "\ud800"}"#, 400),
            (
                "a number beyond all",
                br#"{"prompt": "a", "max_tokens": 1e999}"#,
                400,
            ),
            ("max_tokens 0", br#"{"prompt": "a", "max_tokens": 0}"#, 400),
            (
                "max_tokens 10^18",
                br#"{"prompt": "a", "max_tokens": 1000000000000000000}"#,
                400,
            ),
            (
                "max_tokens as text",
                br#"{"prompt": "a", "max_tokens": "5"}"#,
                400,
            ),
            (
                "a token beyond the vocabulary",
                br#"{"prompt": [4294967295]}"#,
                400,
            ),
            ("3 MB of token ids", ids.as_bytes(), 400),
            ("3 MB of brackets", &vec![b'['; large], 400),
            ("10 MB of text", text.as_bytes(), 413),
            ("10 MB of brackets", &vec![b'['; huge], 413),
        ];
        for (name, body, expected) in refused {
            let (status, answer) = server.post_bytes("/v1/completions", body);
            let answer = String::from_utf8_lossy(&answer);
            assert_eq!(status, *expected, "{name}: {answer}");
            let error: Value =
                serde_json::from_str(&answer).unwrap_or_else(|_| panic!("{name}: {answer}"));
            assert!(
                error["error"]["message"]
                    .as_str()
                    .is_some_and(|message| message.len() > 10),
                "{name}: {answer}"
            );
            assert_eq!(
                error["error"]["type"], "invalid_request_error",
                "{name}: {answer}"
            );
        }
        drop(finish);
        beside.join().unwrap();
    });
}

/// Sets a flag when it goes out of scope.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// The tokens of a streamed completion that must end as it should.
fn tokens(server: &Server, body: &Value) -> Vec<Value> {
    let mut stream = server.stream("/v1/completions", body);
    let mut tokens = Vec::new();
    while let Some(event) = stream.event() {
        if event == "[DONE]" {
            return tokens;
        }
        let chunk: Value = serde_json::from_str(&event).unwrap();
        assert!(chunk["error"].is_null(), "{event}");
        tokens.extend(
            chunk["choices"][0]["token_ids"]
                .as_array()
                .into_iter()
                .flatten()
                .cloned(),
        );
    }
    panic!("the stream ended without [DONE]");
}

/// The exit code of `volley generate` with the model in `dir`, and what it says on standard error. Neither a panic nor a hang.
fn generate(dir: &Path) -> (i32, String) {
    let log = tempfile::NamedTempFile::new().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_volley"))
        .args([
            "generate",
            "--prompt",
            "I am",
            "--max-tokens",
            "2",
            "--temperature",
            "0",
            "--model",
        ])
        .arg(dir)
        .stdout(Stdio::null())
        .stderr(log.reopen().unwrap())
        .spawn()
        .unwrap();
    let until = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > until {
            let _ = child.kill();
            panic!(
                "`volley generate` hangs: {}",
                fs::read_to_string(log.path()).unwrap()
            );
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let message = fs::read_to_string(log.path()).unwrap();
    assert!(!message.contains("panicked"), "{message}");
    (status.code().expect("ended by a signal"), message)
}

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration/fixtures/models/tiny-mixtral")
}
