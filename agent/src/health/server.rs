//! Listens on port 10256 and on the health check ports of services.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ferroflow_common::addr::{Addr, Port};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use super::proxy::{Progress, Stamp};
use super::{Answer, Check, Proxy};
use crate::events::{Reason, Recorder};
use crate::model::{Family, Stay};

/// Where kube-proxy answers.
pub const PROXY_PORT: u16 = 10256;

/// How long a port that is taken waits for its next try.
const RETRY: Duration = Duration::from_secs(5);

/// A load balancer asks in one packet; whoever takes longer goes.
const PATIENCE: Duration = Duration::from_secs(5);

/// Connections at once, on each port.
const CONNECTIONS: usize = 128;

/// The servers; they end with it.
#[derive(Debug)]
pub struct Health {
    state: Arc<Mutex<State>>,
    proxy: JoinHandle<()>,
    ports: BTreeMap<Port, JoinHandle<()>>,
}

#[derive(Debug)]
struct State {
    recorder: Recorder,
    proxy: Proxy,
    checks: BTreeMap<Port, Check>,
}

/// What is asked for on a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Subject {
    Proxy,
    Service(Port),
}

impl Health {
    /// Starts to answer on `proxy_port`, which is [`PROXY_PORT`] but for tests.
    pub fn start(proxy_port: u16, recorder: Recorder) -> Self {
        let state =
            Arc::new(Mutex::new(State { recorder, proxy: Proxy::default(), checks: BTreeMap::new() }));
        let proxy = tokio::spawn(listen(proxy_port, Subject::Proxy, state.clone()));
        Self { state, proxy, ports: BTreeMap::new() }
    }

    /// Replaces the checks that are answered; ports are opened and closed accordingly.
    pub fn set_checks(&mut self, checks: BTreeMap<Port, Check>) {
        self.ports.retain(|port, task| {
            let kept = checks.contains_key(port);
            if !kept {
                task.abort();
            }
            kept
        });
        for port in checks.keys() {
            let state = &self.state;
            self.ports
                .entry(*port)
                .or_insert_with(|| tokio::spawn(listen(port.host(), Subject::Service(*port), state.clone())));
        }
        lock(&self.state).checks = checks;
    }

    /// Whether the tables follow, and whether the node stays.
    pub fn set_proxy(&self, progress: Progress, node: Stay) {
        let proxy = &mut lock(&self.state).proxy;
        proxy.progress(progress, Instant::now(), stamp());
        proxy.node(node);
    }
}

impl State {
    /// Tells the users of a Service that its health check does not listen.
    fn note_bind(&self, subject: Subject, error: &std::io::Error) {
        if let Subject::Service(port) = subject
            && let Some(check) = self.checks.get(&port)
        {
            let reason = Reason::FailedToStartServiceHealthcheck;
            self.recorder.note_service(&check.service, reason, format!("port {port}: {error}"));
        }
    }
}

impl Drop for Health {
    fn drop(&mut self) {
        self.proxy.abort();
        self.ports.values().for_each(JoinHandle::abort);
    }
}

async fn listen(port: u16, subject: Subject, state: Arc<Mutex<State>>) {
    let listener = bind(port, subject, &state).await;
    let permits = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, peer)) => {
                let state = state.clone();
                tokio::spawn(async move {
                    serve(stream, peer, subject, &state).await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::debug!("health check on port {port}: {error}");
                tokio::time::sleep(PATIENCE).await;
            }
        }
    }
}

/// Tries until the port is free.
async fn bind(port: u16, subject: Subject, state: &Mutex<State>) -> TcpListener {
    let mut said = false;
    loop {
        // Both families, or IPv4 where the host has no IPv6.
        let mut bound = TcpListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))).await;
        if bound.is_err() {
            bound = TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))).await;
        }
        match bound {
            Ok(listener) => return listener,
            Err(error) if !said => {
                tracing::warn!(
                    ?subject,
                    "FailedToStartServiceHealthcheck: port {port}: {error}; trying again"
                );
                lock(state).note_bind(subject, &error);
                said = true;
            }
            Err(_) => {}
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn serve(stream: TcpStream, peer: SocketAddr, subject: Subject, state: &Arc<Mutex<State>>) {
    let respond = |request: Request<Incoming>| {
        let answer = answer(&lock(state), subject, peer.ip(), request.uri().path());
        async move { Ok::<_, Infallible>(response(answer)) }
    };
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service_fn(respond));
    match tokio::time::timeout(PATIENCE, connection).await {
        Ok(Ok(())) | Err(_) => {}
        Ok(Err(error)) => tracing::debug!("health check from {peer}: {error}"),
    }
}

fn answer(state: &State, subject: Subject, peer: IpAddr, path: &str) -> Answer {
    let now = Instant::now();
    let none = || Answer { status: 404, headers: Vec::new(), body: String::new() };
    match subject {
        Subject::Service(port) => state.checks.get(&port).map_or_else(none, |check| {
            let family = Family::of(&Addr::from(peer.to_canonical()));
            check.answer(family, state.proxy.verdict(now))
        }),
        Subject::Proxy => match path {
            "/healthz" => state.proxy.healthz(now, stamp()),
            "/livez" => state.proxy.livez(now, stamp()),
            _ => none(),
        },
    }
}

fn response(answer: Answer) -> Response<Full<Bytes>> {
    let mut builder = Response::builder().status(answer.status);
    for (name, value) in answer.headers {
        builder = builder.header(name, value);
    }
    // Our own names and numbers always make a response.
    builder.body(Full::from(answer.body)).unwrap_or_default()
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn stamp() -> Stamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Stamp(i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::health::service::checks;
    use crate::model::service::Place;
    use crate::model::{Change, Condition, Endpoint, EndpointSlice, Name, Service, World};

    /// A port that was free a moment ago.
    async fn free_port() -> u16 {
        TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port()
    }

    async fn ask(port: u16, path: &str) -> Option<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.ok()?;
        stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await.ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await.ok()?;
        Some(text)
    }

    /// Asks until somebody listens, or nobody does any more.
    async fn eventually(port: u16, path: &str, wanted: impl Fn(Option<&str>) -> bool) -> Option<String> {
        for _ in 0..500 {
            let answer = ask(port, path).await;
            if wanted(answer.as_deref()) {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("port {port} does not get there");
    }

    #[tokio::test]
    async fn rules_40_and_41_ports_are_opened_answered_and_closed() {
        let (proxy_port, port) = (free_port().await, free_port().await);
        let mut health = Health::start(proxy_port, Recorder::new().0);
        let text = eventually(proxy_port, "/healthz", |it| it.is_some()).await.unwrap();
        assert!(text.starts_with("HTTP/1.1 200") && text.contains("\"nodeEligible\":true"), "{text}");
        health.set_proxy(Progress::Done, Stay::Leaves);
        assert!(ask(proxy_port, "/healthz").await.unwrap().starts_with("HTTP/1.1 503"));
        assert!(ask(proxy_port, "/livez").await.unwrap().starts_with("HTTP/1.1 200"));
        assert!(ask(proxy_port, "/").await.unwrap().starts_with("HTTP/1.1 404"));

        let mut world = World::new("here");
        let mut service = Service::default();
        service.exposure.health_check_port = Some(Port::new(port));
        world.apply(Change::Service(Name::new("shop", "web"), Some(service)));
        health.set_checks(checks(&world));
        let text = eventually(port, "/any/path", |it| it.is_some()).await.unwrap();
        assert!(text.starts_with("HTTP/1.1 503") && text.contains("\"localEndpoints\":0"), "{text}");
        let endpoint = Endpoint::new(Addr::v4([10, 0, 0, 1]), Condition::Ready, Place::Local);
        let slice = EndpointSlice {
            service: "web".into(),
            endpoints: Box::new([endpoint]),
            ..EndpointSlice::default()
        };
        world.apply(Change::EndpointSlice(Name::new("shop", "web-1"), Some(slice)));
        health.set_checks(checks(&world));
        let text = ask(port, "/").await.unwrap();
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
        assert!(text.contains("x-load-balancing-endpoint-weight: 1"), "{text}");
        health.set_checks(BTreeMap::new());
        eventually(port, "/", |it| it.is_none()).await;
    }

    #[tokio::test]
    async fn a_port_that_is_taken_does_not_keep_others_from_answering() {
        let taken = TcpListener::bind("[::]:0").await.unwrap();
        let (taken_port, port) = (taken.local_addr().unwrap().port(), free_port().await);
        let mut world = World::new("here");
        for (name, port) in [("a", taken_port), ("b", port)] {
            let mut service = Service::default();
            service.exposure.health_check_port = Some(Port::new(port));
            world.apply(Change::Service(Name::new("shop", name), Some(service)));
        }
        let (recorder, mut notes) = Recorder::new();
        let mut health = Health::start(free_port().await, recorder);
        health.set_checks(checks(&world));
        eventually(port, "/", |it| it.is_some()).await;
        let note = notes.recv().await.unwrap();
        assert_eq!((&*note.object.name.name, note.reason), ("a", Reason::FailedToStartServiceHealthcheck));
    }
}
