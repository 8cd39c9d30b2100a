//! Listens on port 10256 and on the health check ports of services.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use ferroflow_common::addr::{Addr, Port};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::AttachReusePortCbpf;
use tokio::net::{TcpListener, TcpSocket};
use tokio::task::JoinHandle;

use super::proxy::{Progress, Stamp};
use super::told::Told;
use super::{Answer, Check, Proxy, Verdict, http};
use crate::clock;
use crate::model::{Family, Stay};

/// Where kube-proxy answers.
pub const PROXY_PORT: u16 = 10256;

/// What the agent itself answers; it ends with it.
#[derive(Debug)]
pub struct Health {
    state: Arc<Mutex<State>>,
    server: JoinHandle<()>,
}

/// The health checks of services; they end with it.
#[derive(Debug, Default)]
pub struct Services {
    state: Arc<Mutex<State>>,
    ports: BTreeMap<Port, JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct State {
    proxy: Proxy,
    told: Told,
    checks: BTreeMap<Port, Check>,
    listening: BTreeSet<Port>,
    /// Ports that cannot be listened on.
    problems: BTreeMap<u16, String>,
    /// Nobody new is to be let in.
    finished: bool,
    answered: Answered,
}

/// What load balancers and the kubelet ask the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Question {
    Healthz,
    Livez,
}

/// How often each question got each status.
pub type Answered = BTreeMap<(Question, u16), u64>;

/// What is asked for on a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Subject {
    Proxy,
    Service(Port),
}

impl State {
    fn bound(&mut self, subject: Subject, port: u16) {
        self.problems.remove(&port);
        if let Subject::Service(port) = subject {
            self.listening.insert(port);
        }
    }
}

impl Health {
    /// Starts to answer on `port`, which is [`PROXY_PORT`] but for tests.
    pub fn start(port: u16) -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        let server = tokio::spawn(listen(port, Subject::Proxy, state.clone()));
        Self { state, server }
    }

    /// Whether the tables follow, and whether the node stays.
    pub fn set_proxy(&self, progress: Progress, node: Stay) {
        let proxy = &mut lock(&self.state).proxy;
        proxy.progress(progress, Instant::now(), stamp());
        proxy.node(node);
    }

    /// Whether the tables follow fast enough.
    pub fn verdict(&self) -> Verdict {
        lock(&self.state).proxy.verdict(Instant::now())
    }

    pub fn answered(&self) -> Answered {
        lock(&self.state).answered.clone()
    }

    /// Whether the port is another's.
    pub fn has_problem(&self) -> bool {
        !lock(&self.state).problems.is_empty()
    }
}

impl Drop for Health {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Services {
    /// Replaces what is answered; ports are opened and closed accordingly.
    pub fn set(&mut self, told: &Told) {
        if lock(&self.state).told == *told {
            return;
        }
        let checks = told.checks();
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
        let mut state = lock(&self.state);
        state.listening.retain(|port| checks.contains_key(port));
        state.problems.retain(|port, _| checks.contains_key(&Port::new(*port)));
        (state.checks, state.told) = (checks, told.clone());
    }

    /// Whether every port is listened on, or cannot be.
    pub fn are_ready(&self) -> bool {
        let state = lock(&self.state);
        let settled =
            |port: &Port| state.listening.contains(port) || state.problems.contains_key(&port.host());
        state.checks.keys().all(settled)
    }

    pub fn problems(&self) -> BTreeMap<u16, String> {
        lock(&self.state).problems.clone()
    }

    /// Answers those who have come, while others already come to the process that takes over.
    pub async fn finish(mut self) {
        lock(&self.state).finished = true;
        for task in std::mem::take(&mut self.ports).into_values() {
            // One that still waits for its port never ends.
            let _ended = tokio::time::timeout(http::PATIENCE, task).await;
        }
    }
}

impl Drop for Services {
    fn drop(&mut self) {
        self.ports.values().for_each(JoinHandle::abort);
    }
}

async fn listen(port: u16, subject: Subject, state: Arc<Mutex<State>>) {
    let listener = bind(port, subject, &state).await;
    let finishing = state.clone();
    let respond =
        move |peer, path: String| std::future::ready(answer(&mut lock(&state), subject, peer, &path));
    http::listen(listener, move || lock(&finishing).finished, respond).await;
}

/// Tries until the port is free.
async fn bind(port: u16, subject: Subject, state: &Mutex<State>) -> TcpListener {
    let open = || {
        // Both families, or IPv4 where the host has no IPv6.
        try_bind(TcpSocket::new_v6(), (Ipv6Addr::UNSPECIFIED, port).into(), subject)
            .or_else(|_| try_bind(TcpSocket::new_v4(), (Ipv4Addr::UNSPECIFIED, port).into(), subject))
    };
    let failed = |error: &io::Error| {
        if lock(state).problems.insert(port, error.to_string()).is_none() {
            tracing::warn!(?subject, "cannot answer on port {port}: {error}; trying again");
        }
    };
    let listener = http::bind(open, failed).await;
    lock(state).bound(subject, port);
    listener
}

/// Two processes share the port of a service for a moment, when one takes over from the other: connections then go to the
/// one that came last, so that the other can answer those that it has and close without losing one.
fn try_bind(socket: io::Result<TcpSocket>, addr: SocketAddr, subject: Subject) -> io::Result<TcpListener> {
    let socket = socket?;
    socket.set_reuseaddr(true)?;
    if let Subject::Service(_) = subject {
        socket.set_reuseport(true)?;
    }
    socket.bind(addr)?;
    let listener = socket.listen(http::BACKLOG)?;
    if let Subject::Service(_) = subject {
        prefer_the_second(&listener)?;
    }
    Ok(listener)
}

/// Gives new connections to the second listener of the port; where there is only one, to that (a number without a listener
/// leaves the choice to the kernel; `SO_ATTACH_REUSEPORT_CBPF`, kernel commit 538950a1b752).
fn prefer_the_second(listener: &TcpListener) -> io::Result<()> {
    let mut always = [libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: 1 }];
    let program = libc::sock_fprog { len: 1, filter: always.as_mut_ptr() };
    Ok(setsockopt(listener, AttachReusePortCbpf, &program)?)
}

fn answer(state: &mut State, subject: Subject, peer: IpAddr, path: &str) -> Answer {
    let now = Instant::now();
    let none = || Answer { status: 404, headers: Vec::new(), body: String::new() };
    match subject {
        Subject::Service(port) => state.checks.get(&port).map_or_else(none, |check| {
            let family = Family::of(&Addr::from(peer.to_canonical()));
            check.answer(family, state.told.verdict(clock::seconds()))
        }),
        Subject::Proxy => {
            let (question, answer) = match path {
                "/healthz" => (Question::Healthz, state.proxy.healthz(now, stamp())),
                "/livez" => (Question::Livez, state.proxy.livez(now, stamp())),
                _ => return none(),
            };
            *state.answered.entry((question, answer.status)).or_default() += 1;
            answer
        }
    }
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
    use std::time::Duration;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;

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
        let health = Health::start(proxy_port);
        let text = eventually(proxy_port, "/healthz", |it| it.is_some()).await.unwrap();
        assert!(text.starts_with("HTTP/1.1 200") && text.contains("\"nodeEligible\":true"), "{text}");
        health.set_proxy(Progress::Done, Stay::Leaves);
        assert!(ask(proxy_port, "/healthz").await.unwrap().starts_with("HTTP/1.1 503"));
        assert!(ask(proxy_port, "/livez").await.unwrap().starts_with("HTTP/1.1 200"));
        assert!(ask(proxy_port, "/").await.unwrap().starts_with("HTTP/1.1 404"));
        let answered = health.answered();
        assert_eq!((answered[&(Question::Healthz, 503)], answered[&(Question::Livez, 200)]), (1, 1));

        let mut services = Services::default();
        let mut world = World::new("here");
        let mut service = Service::default();
        service.exposure.health_check_port = Some(Port::new(port));
        world.apply(Change::Service(Name::new("shop", "web"), Some(service)));
        services.set(&told(&world));
        let text = eventually(port, "/any/path", |it| it.is_some()).await.unwrap();
        assert!(text.starts_with("HTTP/1.1 503") && text.contains("\"localEndpoints\":0"), "{text}");
        let endpoint = Endpoint::new(Addr::v4([10, 0, 0, 1]), Condition::Ready, Place::Local);
        let slice = EndpointSlice {
            service: "web".into(),
            endpoints: Box::new([endpoint]),
            ..EndpointSlice::default()
        };
        world.apply(Change::EndpointSlice(Name::new("shop", "web-1"), Some(slice)));
        services.set(&told(&world));
        let text = ask(port, "/").await.unwrap();
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
        assert!(text.contains("x-load-balancing-endpoint-weight: 1"), "{text}");
        // Two processes share the port, and the one that is to end answers whom it has.
        let mut next = Services::default();
        next.set(&told(&world));
        while !next.are_ready() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        services.finish().await;
        assert!(ask(port, "/").await.unwrap().starts_with("HTTP/1.1 200"));
        next.set(&Told::default());
        eventually(port, "/", |it| it.is_none()).await;
    }

    fn told(world: &World) -> Told {
        let mut told = Told { stamp: clock::seconds(), healthy: true, ..Told::default() };
        told.set_checks(&checks(world));
        told
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
        let mut services = Services::default();
        services.set(&told(&world));
        eventually(port, "/", |it| it.is_some()).await;
        while !services.are_ready() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(services.problems().into_keys().collect::<Vec<_>>(), [taken_port]);
    }
}
