//! The few paths of the Kubernetes API that membership uses, over real HTTP: list and watch of Pods, and Leases with optimistic concurrency, in the form of the API's reference.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::sync::broadcast;

/// A running API; it ends with the test.
pub(crate) struct Api {
    pub(crate) url: String,
    state: Store,
    _runtime: tokio::runtime::Runtime,
}

#[derive(Clone)]
struct Store {
    inner: Arc<Mutex<Inner>>,
    events: broadcast::Sender<Value>,
}

#[derive(Default)]
struct Inner {
    version: u64,
    pods: BTreeMap<String, Value>,
    leases: BTreeMap<String, Value>,
    refuses: bool,
}

impl Api {
    pub(crate) fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let state = Store {
            inner: Arc::default(),
            events: broadcast::Sender::new(64),
        };
        let leases = "/apis/coordination.k8s.io/v1/namespaces/default/leases";
        let router = Router::new()
            .route("/api/v1/namespaces/default/pods", get(pods))
            .route(leases, axum::routing::post(create))
            .route(&format!("{leases}/{{name}}"), get(read).put(replace))
            .with_state(state.clone());
        let listener = runtime
            .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
            .unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        runtime.spawn(async move { axum::serve(listener, router).await });
        Api {
            url,
            state,
            _runtime: runtime,
        }
    }

    /// Makes or changes a Pod.
    pub(crate) fn pod(&self, name: &str, phase: &str, ip: &str, ending: bool) {
        let mut inner = self.state.inner.lock().unwrap();
        inner.version += 1;
        let mut object = json!({
            "kind": "Pod",
            "metadata": {"name": name, "resourceVersion": inner.version.to_string(), "labels": {"volley/cluster": "test"}},
            "status": {"phase": phase, "podIP": ip},
        });
        if ending {
            object["metadata"]["deletionTimestamp"] = json!("2026-11-25T00:00:00Z");
        }
        let before = inner.pods.insert(name.to_owned(), object.clone());
        let kind = if before.is_some() {
            "MODIFIED"
        } else {
            "ADDED"
        };
        let _ = self
            .state
            .events
            .send(json!({"type": kind, "object": object}));
    }

    /// Answers nothing but errors, and ends all watches.
    pub(crate) fn refuse(&self, refuses: bool) {
        self.state.inner.lock().unwrap().refuses = refuses;
        let _ = self.state.events.send(Value::Null);
    }
}

fn status(code: StatusCode, message: &str) -> Response {
    (code, Json(json!({"kind": "Status", "message": message}))).into_response()
}

async fn pods(
    State(store): State<Store>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Response {
    assert_eq!(query["labelSelector"], "volley/cluster=test");
    let mut events = store.events.subscribe();
    let inner = store.inner.lock().unwrap();
    if inner.refuses {
        return status(
            StatusCode::SERVICE_UNAVAILABLE,
            "etcdserver: request timed out",
        );
    }
    if !query.contains_key("watch") {
        let items: Vec<Value> = inner.pods.values().cloned().collect();
        let version = inner.version.to_string();
        return Json(
            json!({"kind": "PodList", "metadata": {"resourceVersion": version}, "items": items}),
        )
        .into_response();
    }
    // What has changed since the list comes first.
    let since: u64 = query["resourceVersion"].parse().unwrap();
    let newer = |pod: &&Value| {
        pod["metadata"]["resourceVersion"]
            .as_str()
            .unwrap()
            .parse::<u64>()
            .unwrap()
            > since
    };
    let missed: Vec<Value> = inner
        .pods
        .values()
        .filter(newer)
        .map(|pod| json!({"type": "MODIFIED", "object": pod}))
        .collect();
    drop(inner);
    let (sender, receiver) = tokio::sync::mpsc::channel::<Result<Bytes, Infallible>>(64);
    tokio::spawn(async move {
        let line = |event: Value| Ok(Bytes::from(format!("{event}\n")));
        for event in missed {
            let _ = sender.send(line(event)).await;
        }
        while let Ok(event) = events.recv().await {
            if event.is_null() || sender.send(line(event)).await.is_err() {
                return;
            }
        }
    });
    let stream = futures_util::stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|item| (item, receiver))
    });
    Body::from_stream(stream).into_response()
}

async fn read(State(store): State<Store>, Path(name): Path<String>) -> Response {
    let inner = store.inner.lock().unwrap();
    if inner.refuses {
        return status(
            StatusCode::SERVICE_UNAVAILABLE,
            "etcdserver: request timed out",
        );
    }
    match inner.leases.get(&name) {
        Some(lease) => Json(lease.clone()).into_response(),
        None => status(
            StatusCode::NOT_FOUND,
            "leases.coordination.k8s.io not found",
        ),
    }
}

fn write(inner: &mut Inner, name: &str, mut lease: Value) -> Value {
    inner.version += 1;
    lease["metadata"]["resourceVersion"] = json!(inner.version.to_string());
    inner.leases.insert(name.to_owned(), lease.clone());
    lease
}

async fn create(State(store): State<Store>, Json(lease): Json<Value>) -> Response {
    let mut inner = store.inner.lock().unwrap();
    let name = lease["metadata"]["name"].as_str().unwrap().to_owned();
    if inner.leases.contains_key(&name) {
        return status(StatusCode::CONFLICT, "already exists");
    }
    (StatusCode::CREATED, Json(write(&mut inner, &name, lease))).into_response()
}

async fn replace(
    State(store): State<Store>,
    Path(name): Path<String>,
    Json(lease): Json<Value>,
) -> Response {
    let mut inner = store.inner.lock().unwrap();
    let Some(held) = inner.leases.get(&name) else {
        return status(StatusCode::NOT_FOUND, "not found");
    };
    if held["metadata"]["resourceVersion"] != lease["metadata"]["resourceVersion"] {
        return status(StatusCode::CONFLICT, "the object has been modified");
    }
    Json(write(&mut inner, &name, lease)).into_response()
}
