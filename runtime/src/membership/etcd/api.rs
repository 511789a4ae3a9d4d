//! The few calls of etcd's v3 API that membership needs, through its JSON gateway (part of every etcd server from 3.4 on): no generated code, no second HTTP stack.
//!
//! Keys and values travel in base64, 64-bit numbers as text: <https://etcd.io/docs/v3.5/dev-guide/api_grpc_gateway/>.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hyper::{Method, StatusCode};
use serde_json::{Value, json};

use super::super::http::{Objects, Server};

/// A key with what it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct KeyValue {
    pub(super) key: String,
    pub(super) value: String,
    /// The revision at which it was created: the term of an office.
    pub(super) created: u64,
    /// The lease it lives with; 0 if none.
    pub(super) lease: i64,
}

/// What happened to a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Change {
    Put(KeyValue),
    Deleted(String),
}

fn encode(text: &str) -> String {
    STANDARD.encode(text)
}

fn decode(value: &Value) -> Result<String, String> {
    let text = value.as_str().unwrap_or_default();
    let bytes = STANDARD.decode(text).map_err(|error| error.to_string())?;
    String::from_utf8(bytes).map_err(|error| error.to_string())
}

/// Numbers are texts, and zeros are left out.
fn number<N: std::str::FromStr + Default>(value: &Value) -> N {
    let text = value.as_str().and_then(|text| text.parse().ok());
    text.or_else(|| value.to_string().parse().ok())
        .unwrap_or_default()
}

/// The end of the range of all keys that begin with `prefix`.
fn range_end(prefix: &str) -> String {
    let mut end = prefix.as_bytes().to_vec();
    // Prefixes are ASCII and end with a slash: the last byte can grow.
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    STANDARD.encode(end)
}

fn key_value(value: &Value) -> Result<KeyValue, String> {
    Ok(KeyValue {
        key: decode(&value["key"])?,
        value: decode(&value["value"])?,
        created: number(&value["create_revision"]),
        lease: number(&value["lease"]),
    })
}

async fn post(server: &Server, path: &str, body: Value) -> Result<Value, String> {
    let (status, answer) = server.ask(Method::POST, path, Some(&body)).await?;
    if status == StatusCode::OK {
        return Ok(answer);
    }
    let why = answer["error"].as_str().or(answer["message"].as_str());
    Err(format!(
        "{server}: {path}: {status}: {}",
        why.unwrap_or("it does not say why")
    ))
}

/// A new lease.
pub(super) async fn grant(server: &Server, ttl: Duration) -> Result<i64, String> {
    let ttl = ttl.as_secs().max(1).to_string();
    let answer = post(server, "/v3/lease/grant", json!({"TTL": ttl})).await?;
    match number(&answer["ID"]) {
        0 => Err(format!("{server}: a lease without a number")),
        id => Ok(id),
    }
}

/// Renews a lease; the time it has now, none if it is gone.
pub(super) async fn keep_alive(server: &Server, lease: i64) -> Result<Option<Duration>, String> {
    let body = json!({"ID": lease.to_string()});
    let answer = post(server, "/v3/lease/keepalive", body).await?;
    let ttl: u64 = number(&answer["result"]["TTL"]);
    Ok((ttl > 0).then(|| Duration::from_secs(ttl)))
}

/// Ends a lease, and all keys that live with it.
pub(super) async fn revoke(server: &Server, lease: i64) -> Result<(), String> {
    post(server, "/v3/lease/revoke", json!({"ID": lease.to_string()})).await?;
    Ok(())
}

/// Writes a key.
pub(super) async fn put(server: &Server, key: &str, value: &str, lease: i64) -> Result<(), String> {
    let body = json!({"key": encode(key), "value": encode(value), "lease": lease.to_string()});
    post(server, "/v3/kv/put", body).await?;
    Ok(())
}

/// Writes a key that must not be there; returns the key as it is then.
pub(super) async fn create(
    server: &Server,
    key: &str,
    value: &str,
    lease: i64,
) -> Result<Option<KeyValue>, String> {
    let key = encode(key);
    let get = json!({"request_range": {"key": key}});
    let body = json!({
        "compare": [{"key": key, "target": "CREATE", "create_revision": "0"}],
        "success": [{"request_put": {"key": key, "value": encode(value), "lease": lease.to_string()}}, get],
        "failure": [get],
    });
    let answer = post(server, "/v3/kv/txn", body).await?;
    let responses = answer["responses"].as_array();
    let range = responses
        .and_then(|all| all.last())
        .map(|last| &last["response_range"]);
    let held = range.and_then(|range| range["kvs"].get(0));
    held.map(key_value).transpose()
}

/// Every key under a prefix, and the revision at which this was so.
pub(super) async fn list(server: &Server, prefix: &str) -> Result<(Vec<KeyValue>, u64), String> {
    let body = json!({"key": encode(prefix), "range_end": range_end(prefix)});
    let answer = post(server, "/v3/kv/range", body).await?;
    let all = answer["kvs"].as_array().map_or(&[][..], Vec::as_slice);
    let all = all.iter().map(key_value).collect::<Result<_, _>>()?;
    Ok((all, number(&answer["header"]["revision"])))
}

/// Changes under a prefix, from a revision on.
pub(super) struct Watch(Objects);

impl Watch {
    pub(super) async fn open(server: &Server, prefix: &str, from: u64) -> Result<Self, String> {
        let body = json!({"create_request": {
            "key": encode(prefix), "range_end": range_end(prefix), "start_revision": from.to_string(),
        }});
        let objects = server
            .stream(Method::POST, "/v3/watch", Some(&body))
            .await?;
        Ok(Watch(objects))
    }

    /// The next changes. Dropping the future loses nothing.
    pub(super) async fn next(&mut self) -> Result<Vec<Change>, String> {
        let object = self.0.next().await?.ok_or("the watch ended")?;
        changes(&object)
    }
}

fn changes(object: &Value) -> Result<Vec<Change>, String> {
    let result = &object["result"];
    if result["canceled"].as_bool() == Some(true) || !object["error"].is_null() {
        // Also when the revision was compacted away: everything is read anew then.
        return Err(format!("the watch was cancelled: {object}"));
    }
    let events = result["events"].as_array().map_or(&[][..], Vec::as_slice);
    let change = |event: &Value| match event["type"].as_str() {
        Some("DELETE") => decode(&event["kv"]["key"]).map(Change::Deleted),
        _ => key_value(&event["kv"]).map(Change::Put),
    };
    events.iter().map(change).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn changes_are_read_as_etcd_writes_them() {
        let object = json!({"result": {"header": {"revision": "9"}, "events": [
            {"kv": {"key": encode("/a"), "value": encode("1"), "create_revision": "7", "lease": "-5"}},
            {"type": "DELETE", "kv": {"key": encode("/b"), "mod_revision": "9"}},
        ]}});
        let put = KeyValue {
            key: "/a".to_owned(),
            value: "1".to_owned(),
            created: 7,
            lease: -5,
        };
        assert_eq!(
            changes(&object).unwrap(),
            [Change::Put(put), Change::Deleted("/b".to_owned())]
        );
        assert!(changes(&json!({"result": {"canceled": true, "compact_revision": "8"}})).is_err());
        assert!(
            changes(&json!({"result": {"created": true}}))
                .unwrap()
                .is_empty()
        );
    }

    proptest! {
        #[test]
        fn no_answer_panics(key in "\\PC{0,20}", kind in "\\PC{0,8}") {
            let _ = changes(&json!({"result": {"events": [{"type": kind, "kv": {"key": key}}]}}));
        }
    }
}
