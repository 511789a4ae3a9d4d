use std::io::Write;

use super::*;

fn load(
    file: &str,
    variables: &[(&str, &str)],
    flags: &[(&'static str, &str)],
) -> Result<Raw, ConfigError> {
    let mut written = tempfile::NamedTempFile::new().unwrap();
    written.write_all(file.as_bytes()).unwrap();
    let variables = variables
        .iter()
        .map(|(name, value)| (name.to_string(), value.to_string()));
    let mut given = FlagValues::default();
    for (key, value) in flags {
        given.set(key, Some(value));
    }
    Raw::load(Some(written.path()), variables, &given)
}

/// What is wrong, without the file's name, which is another one each time.
fn problems(result: Result<Raw, ConfigError>) -> Vec<String> {
    let problems = result.unwrap_err().problems;
    problems
        .into_iter()
        .map(|problem| match problem.place {
            Place::File(_) => Problem {
                place: Place::Derived,
                ..problem
            }
            .to_string(),
            _ => problem.to_string(),
        })
        .collect()
}

#[test]
fn every_default_in_the_table_is_accepted_by_its_own_key() {
    for key in KEYS {
        if let KeyDefault::Value(text) = key.default {
            assert!(key.kind.parse(text).is_ok(), "{}", key.path);
        }
    }
    let raw = load("", &[], &[]).unwrap();
    assert_eq!(raw.server.port, 8000);
    assert_eq!(raw.server.max_body, ByteSize(4 << 20));
    assert_eq!(raw.limits.kv_cache_memory, Auto::Auto);
    assert_eq!(raw.model.path, None);
}

#[test]
fn flags_lie_over_variables_over_the_file_over_defaults() {
    let file = "[server]\nport = 1\nhost = \"a\"\n[cluster]\nmicro_batches = 3\n[limits]\nmax_waiting = 7\n";
    let variables = [
        ("VOLLEY_SERVER_PORT", "2"),
        ("VOLLEY_CLUSTER_MICRO_BATCHES", "4"),
        ("PATH", "/bin"),
    ];
    let raw = load(file, &variables, &[("server.port", "3")]).unwrap();
    assert_eq!(raw.server.port, 3);
    assert_eq!(raw.cluster.micro_batches, 4);
    assert_eq!(raw.server.host, "a");
    assert_eq!(raw.limits.max_waiting, 7);
    assert_eq!(raw.cluster.attention_workers, 1);
}

#[test]
fn all_problems_of_all_layers_are_reported_at_once() {
    let file = "
        [server]
        prot = 80
        port = \"80\"
        [cluster]
        micro_batches = 99
        [sever]
        host = \"x\"
        [limits]
        kv_cache_memory = \"lots\"
    ";
    let variables = [("VOLLEY_LOG_FORMAT", "xml"), ("VOLLEY_SERVER_PROT", "1")];
    assert_eq!(
        problems(load(file, &variables, &[("model.dtype", "int3")])),
        [
            "`cluster.micro_batches` is 99; it must be a whole number from 1 to 8",
            "`limits.kv_cache_memory` is \"lots\"; it must be `auto`, bytes, or a text such as `512MiB` or `8GiB`",
            "`server.port` is \"80\"; it must be a whole number from 0 to 65535",
            "`server.prot` is no known key; did you mean `server.port`?",
            "`sever` is no known section; did you mean `[server]`?",
            "environment variable VOLLEY_LOG_FORMAT: `log.format` is \"xml\"; it must be `text` or `json`",
            "environment variable VOLLEY_SERVER_PROT: is no known variable of Volley; did you mean `VOLLEY_SERVER_PORT`?",
            "--dtype: `model.dtype` is \"int3\"; it must be `auto` or `f32` or `bf16`",
        ]
    );
}

#[test]
fn a_key_without_its_section_is_led_home() {
    assert_eq!(
        problems(load("port = 80", &[], &[])),
        ["`port` is not a key of its own; did you mean `server.port`?"]
    );
}

#[test]
fn a_file_that_is_no_toml_is_refused_with_the_line() {
    let problems = problems(load("[server]\nport = \n", &[], &[]));
    assert_eq!(problems.len(), 1);
    assert!(
        problems[0].starts_with("is not TOML: ") && problems[0].contains("line 2"),
        "{}",
        problems[0]
    );
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let error = Raw::load(
        Some(Path::new("/nowhere/volley.toml")),
        [],
        &FlagValues::default(),
    )
    .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("/nowhere/volley.toml: cannot be read"),
        "{error}"
    );
}

#[test]
fn variables_of_kubernetes_services_are_not_configuration() {
    let variables = [
        ("VOLLEY_SERVER_PORT", "tcp://10.0.0.7:8000"),
        ("VOLLEY_SERVER_SERVICE_HOST", "10.0.0.7"),
        ("VOLLEY_SERVER_SERVICE_PORT_HTTP", "8000"),
        ("VOLLEY_SERVER_PORT_8000_TCP_ADDR", "10.0.0.7"),
        ("VOLLEY_PORT", "tcp://10.0.0.7:8000"),
    ];
    assert_eq!(load("", &variables, &[]).unwrap().server.port, 8000);
}

#[test]
fn sizes_may_be_numbers_or_texts() {
    let raw = load(
        "[limits]\nkv_cache_memory = 1048576\n[server]\nmax_body = \"1MiB\"",
        &[],
        &[],
    )
    .unwrap();
    assert_eq!(raw.limits.kv_cache_memory, Auto::Value(ByteSize(1 << 20)));
    assert_eq!(raw.server.max_body, ByteSize(1 << 20));
}
