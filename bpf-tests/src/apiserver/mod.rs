//! A Kubernetes API server with nothing behind it: real HTTP/1.1, lists in pages, watches with versions, bookmarks and
//! selection by field, and faults on request. It serves the objects of ordinary manifests, which the directory source
//! of the agent reads too: the same test can run over both.
//!
//! A list's later pages show the objects as they are when they are asked for, under the version of the first; what a
//! client makes of list and watch together is the same as with the snapshots of a real server.

mod fault;
mod follow;
mod http;
mod store;
mod tls;

use std::collections::VecDeque;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use fault::Armed;
pub use fault::{Fault, Verb};
pub use follow::Follower;
use store::Store;
use tls::Tls;

/// A running server, on a thread of its own; it ends when this is dropped.
#[derive(Debug)]
pub struct ApiServer {
    shared: Arc<Shared>,
    address: SocketAddr,
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    stop: Arc<Notify>,
    thread: JoinHandle<()>,
}

/// A request as it was made.
#[derive(Clone, Debug)]
pub struct Recorded {
    pub verb: Verb,
    pub method: String,
    pub path: String,
    pub query: String,
    /// Null where there was none.
    pub body: Value,
}

#[derive(Debug)]
struct Shared {
    store: Mutex<Store>,
    version: watch::Sender<u64>,
    faults: Mutex<VecDeque<Armed>>,
    requests: Mutex<Vec<Recorded>>,
    token: Mutex<Option<String>>,
    bookmarks: Mutex<bool>,
    tls: Option<Tls>,
}

impl ApiServer {
    /// On a free port of the loopback interface.
    pub fn start() -> Result<Self> {
        Self::listen(TcpListener::bind("127.0.0.1:0")?)
    }

    /// The same over TLS, with a certificate for `name`.
    pub fn start_with_tls(name: &str) -> Result<Self> {
        Self::listen_as(TcpListener::bind("127.0.0.1:0")?, Some(Tls::new(name)?))
    }

    /// On a listener that may be of another network namespace.
    pub fn listen(listener: TcpListener) -> Result<Self> {
        Self::listen_as(listener, None)
    }

    /// The same over TLS, with a certificate for `name`, whose text it returns.
    pub fn listen_with_tls(listener: TcpListener, name: &str) -> Result<(Self, String)> {
        let tls = Tls::new(name)?;
        let pem = tls.pem.clone();
        Ok((Self::listen_as(listener, Some(tls))?, pem))
    }

    fn listen_as(listener: TcpListener, tls: Option<Tls>) -> Result<Self> {
        let shared = Arc::new(Shared {
            store: Mutex::default(),
            version: watch::Sender::new(0),
            faults: Mutex::default(),
            requests: Mutex::default(),
            token: Mutex::default(),
            bookmarks: Mutex::new(true),
            tls,
        });
        let address = listener.local_addr()?;
        let running = Some(Running::start(listener, shared.clone())?);
        Ok(Self { shared, address, running })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn url(&self) -> String {
        let scheme = if self.shared.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// Writes a kubeconfig that names this server, and the file with its token where there is one.
    pub fn write_kubeconfig(&self, path: &Path, token_file: Option<&Path>) -> Result<()> {
        let user = match token_file {
            Some(path) => format!("{{tokenFile: {}}}", path.display()),
            None => "{}".to_owned(),
        };
        let mut cluster = format!("server: \"{}\"", self.url());
        if let Some(tls) = &self.shared.tls {
            let authority = path.with_extension("pem");
            std::fs::write(&authority, &tls.pem).context("write the certificate")?;
            cluster.push_str(&format!(", certificate-authority: {}", authority.display()));
        }
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: test\n\
             contexts: [{{name: test, context: {{cluster: test, user: test}}}}]\n\
             clusters: [{{name: test, cluster: {{{cluster}}}}}]\nusers: [{{name: test, user: {user}}}]\n"
        );
        std::fs::write(path, text).with_context(|| format!("write {}", path.display()))
    }

    /// Makes the cluster be exactly what these manifests say: YAML of one or several documents each.
    pub fn set(&self, manifests: &[impl AsRef<str>]) -> Result<()> {
        self.set_objects(parse(manifests)?)
    }

    /// The same, from objects.
    pub fn set_objects(&self, objects: Vec<Value>) -> Result<()> {
        self.shared.set_objects(objects)
    }

    /// Makes the cluster be what is in a directory of manifests, and follows it.
    pub fn follow(&self, directory: &Path) -> Result<Follower> {
        Follower::start(self.shared.clone(), directory)
    }

    /// Something that nobody watches changes: the version grows.
    pub fn advance(&self) {
        self.shared.store().advance();
        self.shared.announce();
    }

    /// Forgets the history: older versions are too old from now on.
    pub fn compact(&self) {
        self.shared.store().compact();
    }

    /// Spoils the next `times` requests of this kind whose path ends with `path`.
    pub fn inject(&self, verb: Verb, path: &str, fault: Fault, times: usize) {
        lock(&self.shared.faults).push_back(Armed { verb, path: path.to_owned(), fault, left: times });
    }

    /// How many requests are still to be spoiled.
    pub fn armed(&self) -> usize {
        lock(&self.shared.faults).iter().map(|armed| armed.left).sum()
    }

    /// Takes back what was injected and has not happened.
    pub fn disarm(&self) {
        lock(&self.shared.faults).clear();
    }

    /// From now on requests need this token.
    pub fn require_token(&self, token: &str) {
        *lock(&self.shared.token) = Some(token.to_owned());
    }

    /// Some servers send no bookmarks.
    pub fn without_bookmarks(&self) {
        *lock(&self.shared.bookmarks) = false;
    }

    pub fn requests(&self) -> Vec<Recorded> {
        lock(&self.shared.requests).clone()
    }

    /// Ends all connections and takes no new ones.
    pub fn go_away(&mut self) {
        drop(self.running.take());
    }

    /// Listens again where it did.
    pub fn come_back(&mut self) -> Result<()> {
        let listener =
            TcpListener::bind(self.address).with_context(|| format!("listen on {}", self.address))?;
        self.come_back_on(listener)
    }

    /// Listens again, on a listener of the former address.
    pub fn come_back_on(&mut self, listener: TcpListener) -> Result<()> {
        self.running = Some(Running::start(listener, self.shared.clone())?);
        Ok(())
    }
}

impl Running {
    fn start(listener: TcpListener, shared: Arc<Shared>) -> Result<Self> {
        listener.set_nonblocking(true)?;
        let stop = Arc::new(Notify::new());
        let stopped = stop.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = std::thread::Builder::new().name("apiserver".into()).spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = stopped.notified() => {}
                    served = serve(listener, shared) => if let Err(error) = served {
                        eprintln!("the API server ended: {error:#}");
                    }
                }
            });
            // What hangs on purpose must not hold the thread.
            runtime.shutdown_timeout(Duration::from_millis(100));
        })?;
        Ok(Self { stop, thread })
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.go_away();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.notify_one();
        while !self.thread.is_finished() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

async fn serve(listener: TcpListener, shared: Arc<Shared>) -> Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await?;
        let shared = shared.clone();
        connections.spawn(async move {
            match shared.tls.clone() {
                None => connection(shared, stream).await,
                Some(tls) => {
                    // Clients that do not trust the certificate go.
                    if let Ok(stream) = tls.acceptor.accept(stream).await {
                        connection(shared, stream).await;
                    }
                }
            }
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn connection(shared: Arc<Shared>, stream: impl AsyncRead + AsyncWrite + Unpin) {
    let service = service_fn(move |request| http::answer(shared.clone(), request));
    let served = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    // Connections end badly here, on purpose.
    let _cut = served.await;
}

impl Shared {
    fn store(&self) -> MutexGuard<'_, Store> {
        lock(&self.store)
    }

    fn set_objects(&self, objects: Vec<Value>) -> Result<()> {
        self.store().set(objects)?;
        self.announce();
        Ok(())
    }

    fn announce(&self) {
        let version = self.store().version();
        self.version.send_replace(version);
    }

    fn changed(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    fn bookmarks(&self) -> bool {
        *lock(&self.bookmarks)
    }

    fn record(&self, request: Recorded) {
        lock(&self.requests).push(request);
    }

    fn authorized<B>(&self, request: &hyper::Request<B>) -> bool {
        let given = request.headers().get("authorization").and_then(|value| value.to_str().ok());
        lock(&self.token).as_ref().is_none_or(|token| given == Some(&format!("Bearer {token}")))
    }

    /// The next fault for such a request.
    fn fault(&self, verb: Verb, path: &str) -> Option<Fault> {
        let mut faults = lock(&self.faults);
        let found = faults.iter().position(|it| it.verb == verb && path.ends_with(&it.path))?;
        let armed = faults.get_mut(found)?;
        armed.left -= 1;
        let fault = armed.fault.clone();
        if armed.left == 0 {
            faults.remove(found);
        }
        Some(fault)
    }
}

fn parse(manifests: impl IntoIterator<Item = impl AsRef<str>>) -> Result<Vec<Value>> {
    let mut objects = Vec::new();
    for text in manifests {
        let documents: Vec<Value> = serde_saphyr::from_multiple(text.as_ref())?;
        objects.extend(documents.into_iter().filter(|document| !document.is_null()));
    }
    Ok(objects)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
