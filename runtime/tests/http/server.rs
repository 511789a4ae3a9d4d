//! A server inside the test's process, and a client that sends whatever bytes it is told to.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::Value;
use tokio::sync::oneshot;
use volley::engine::Engine;
use volley::http::{self, HttpOptions};
use volley::recorder;
use volley_actors::{Cluster, ClusterConfig};
use volley_models::{ComputeType, LoadFormat, ModelDir};

/// What every wait of these tests is bounded by.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);
/// The model's name in the API.
pub(crate) const MODEL: &str = "org/tiny-mixtral";

/// A running server. Dropping it stops it without waiting.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) engine: Arc<Engine>,
    runtime: Option<tokio::runtime::Runtime>,
    stop: Option<oneshot::Sender<()>>,
    done: Option<tokio::task::JoinHandle<io::Result<()>>>,
}

/// A response.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

/// One engine for all tests that do not break it.
pub(crate) fn shared_engine() -> Arc<Engine> {
    static ENGINE: OnceLock<Arc<Engine>> = OnceLock::new();
    Arc::clone(ENGINE.get_or_init(|| {
        // The recorder has to be there before the first handle is made.
        metrics();
        engine(|_| {})
    }))
}

/// An engine of the tiny Mixtral, in f32, as its golden outputs are.
pub(crate) fn engine(configure: impl FnOnce(&mut ClusterConfig)) -> Arc<Engine> {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration/fixtures/models/tiny-mixtral");
    let model = ModelDir::open(path, LoadFormat::Auto).unwrap();
    let mut config = ClusterConfig::for_model(model.spec());
    config.dtype = ComputeType::F32;
    configure(&mut config);
    let context = config.context;
    let cluster = Cluster::start(config, model.weights(), None, Arc::new(|_| {})).unwrap();
    Arc::new(Engine {
        model: MODEL.to_owned(),
        created: 1,
        spec: model.spec().clone(),
        context,
        tokenizer: Arc::new(model.tokenizer().unwrap()),
        chat: Some(model.chat_template().unwrap()),
        defaults: model.generation_defaults(),
        client: cluster.client(),
        cluster: Arc::new(cluster),
        children: Arc::default(),
        office: None,
    })
}

fn metrics() -> PrometheusHandle {
    static METRICS: OnceLock<PrometheusHandle> = OnceLock::new();
    METRICS.get_or_init(|| recorder::install().unwrap()).clone()
}

impl Server {
    /// Serves the shared engine.
    pub(crate) fn start() -> Server {
        Server::with(shared_engine(), HttpOptions::default())
    }

    pub(crate) fn with(engine: Arc<Engine>, options: HttpOptions) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let shutdown = async {
            let _ = stopped.await;
        };
        let done = runtime.spawn(http::serve(
            Arc::clone(&engine),
            listener,
            options,
            metrics(),
            shutdown,
        ));
        Server {
            address,
            engine,
            runtime: Some(runtime),
            stop: Some(stop),
            done: Some(done),
        }
    }

    /// Begins to stop.
    pub(crate) fn stop(&mut self) {
        drop(self.stop.take());
    }

    /// Waits until it has stopped.
    pub(crate) fn join(&mut self) {
        let done = self.done.take().unwrap();
        let runtime = self.runtime.as_ref().unwrap();
        runtime
            .block_on(async { tokio::time::timeout(DEADLINE, done).await })
            .unwrap()
            .unwrap()
            .unwrap();
    }

    /// Sends bytes on a connection of their own.
    pub(crate) fn send(&self, bytes: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.write_all(bytes).unwrap();
        stream
    }

    pub(crate) fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Response {
        read_response(self.send(&request(method, path, headers, body)))
    }

    pub(crate) fn get(&self, path: &str) -> Response {
        self.request("GET", path, &[], b"")
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Response {
        self.request(
            "POST",
            path,
            &[("content-type", "application/json")],
            body.to_string().as_bytes(),
        )
    }

    /// Posts a request that has to succeed.
    pub(crate) fn ask(&self, path: &str, body: Value) -> Value {
        let response = self.post(path, &body);
        assert_eq!(response.status, 200, "{body}: {}", response.text());
        response.json()
    }

    /// Posts a request that streams, and reads it to the end.
    pub(crate) fn stream(&self, path: &str, body: Value) -> Vec<Value> {
        let response = self.post(path, &body);
        assert_eq!(response.status, 200, "{}", response.text());
        assert_eq!(response.header("content-type"), Some("text/event-stream"));
        events(&response.text())
    }

    /// Requests that have not ended.
    pub(crate) fn live(&self) -> u64 {
        self.get("/admin/state").json()["live"].as_u64().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Response {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(other, _)| other == name)
            .map(|(_, value)| value.as_str())
    }
}

/// The bytes of a request after which the connection is closed.
pub(crate) fn request(method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut bytes = format!(
        "{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-length: {}\r\n",
        body.len()
    );
    for (name, value) in headers {
        bytes += &format!("{name}: {value}\r\n");
    }
    bytes += "\r\n";
    [bytes.as_bytes(), body].concat()
}

pub(crate) fn read_response(mut stream: TcpStream) -> Response {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    let end = bytes
        .windows(4)
        .position(|window| window == b"\r\n\r\n")
        .expect("a whole head");
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let mut lines = head.lines();
    let status = lines
        .next()
        .unwrap()
        .split(' ')
        .nth(1)
        .unwrap()
        .parse()
        .unwrap();
    let headers: Vec<(String, String)> = lines
        .map(|line| line.split_once(": ").unwrap())
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let body = bytes.split_off(end + 4);
    let mut response = Response {
        status,
        headers,
        body,
    };
    if response.header("transfer-encoding") == Some("chunked") {
        response.body = unchunk(&response.body);
    }
    response
}

fn unchunk(mut bytes: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    loop {
        let end = bytes
            .windows(2)
            .position(|window| window == b"\r\n")
            .expect("a whole chunk");
        let size = usize::from_str_radix(std::str::from_utf8(&bytes[..end]).unwrap(), 16).unwrap();
        if size == 0 {
            return body;
        }
        let data = &bytes[end + 2..];
        body.extend_from_slice(&data[..size]);
        bytes = &data[size + 2..];
    }
}

/// The chunks of a stream, which has to end with `[DONE]`.
fn events(text: &str) -> Vec<Value> {
    let mut data: Vec<&str> = text
        .split("\n\n")
        .filter_map(|event| event.strip_prefix("data: "))
        .collect();
    assert_eq!(data.pop(), Some("[DONE]"), "{text}");
    data.iter()
        .map(|json| serde_json::from_str(json).unwrap())
        .collect()
}

/// Waits for something to become true.
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + DEADLINE;
    while !holds() {
        assert!(Instant::now() < until, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
