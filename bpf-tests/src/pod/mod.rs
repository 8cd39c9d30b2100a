//! The processes in pods: this executable, started again with `pod` as its first argument.
//!
//! Each moves itself into its cgroup before it opens a socket, writes one line of JSON per result, ends when its
//! standard input closes, and dies with the process that started it.

mod dns;
mod http;
pub mod load;
pub mod sctp;
mod serve;
mod stream;

use std::{
    env,
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{self, Command},
    sync::Arc,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail};
use clap::{Args, Parser, Subcommand};
use nix::{
    errno::Errno,
    sys::{prctl::set_pdeathsig, signal::Signal},
    unistd::getppid,
};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

pub const HTTP_PORT: u16 = 8080;
pub const DNS_PORT: u16 = 5353;
pub const ECHO_PORT: u16 = 9000;
/// HTTP over SCTP.
pub const SCTP_PORT: u16 = 8132;

/// The first argument that makes an executable of this crate a process of a pod.
pub const VERB: &str = "pod";

/// One request, as its client saw it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// Microseconds since the epoch.
    pub started_us: u64,
    pub took_us: u64,
    pub result: Result<Answer, Failure>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The pod that answered.
    pub by: String,
    /// The client's address as the server saw it.
    pub client: SocketAddr,
    /// The server's address as the client sees it: `getpeername`, or where the datagram came from.
    pub server: SocketAddr,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub kind: FailureKind,
    /// The name of the errno, or the error's text.
    pub detail: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    Refused,
    Reset,
    TimedOut,
    Unreachable,
    /// An answer came, and it was not what was asked for.
    Wrong,
    Other,
}

/// How far a stream has come.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Progress {
    /// Bytes that came back and were what had been sent.
    pub verified: u64,
    /// The longest time without a byte.
    pub longest_gap_us: u64,
    pub ended: Option<Result<(), Failure>>,
}

/// What a server writes once it can be reached.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ready {
    pub ready: String,
}

/// If this process was started as one of a pod: be it, and do not return.
pub fn run_if_asked() {
    if env::args().nth(1).as_deref() != Some(VERB) {
        return;
    }
    let code = match Cli::parse_from(env::args().skip(1)).run() {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("pod: {error:#}");
            1
        }
    };
    process::exit(code);
}

#[derive(Debug, Parser)]
#[command(name = VERB)]
struct Cli {
    /// Cgroup to enter first.
    #[arg(long, global = true)]
    cgroup: Option<PathBuf>,
    /// Process id of the parent, whose death it is to share.
    #[arg(long, global = true)]
    parent: Option<i32>,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Answer HTTP, DNS and echo until standard input closes.
    Serve {
        #[arg(long)]
        name: String,
    },
    /// HTTP requests, each on a new connection.
    Http {
        #[command(flatten)]
        requests: Requests,
        /// Each on a new association of SCTP.
        #[arg(long)]
        sctp: bool,
    },
    /// DNS questions, each on a new socket.
    Dns {
        #[command(flatten)]
        requests: Requests,
        /// Leave the socket unconnected, as resolvers with several servers do.
        #[arg(long)]
        unconnected: bool,
    },
    /// DNS questions to each target in turn, all from one socket.
    Resolver {
        #[command(flatten)]
        requests: Requests,
        /// Another target.
        #[arg(long)]
        also: Vec<SocketAddr>,
        /// Connect the socket, to the one target; after an error, open another.
        #[arg(long, conflicts_with = "also")]
        connected: bool,
    },
    /// One long connection that is echoed and compared byte for byte.
    Stream { target: SocketAddr },
    /// Load for measurements.
    Load {
        #[command(subcommand)]
        load: load::Load,
    },
    /// Become the program of a container, whose namespaces this process is in.
    Container { spec: PathBuf },
    /// Become another program.
    Exec {
        program: PathBuf,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
}

#[derive(Clone, Debug, Args)]
struct Requests {
    target: SocketAddr,
    /// 0: until standard input closes.
    #[arg(long, default_value_t = 1)]
    count: u32,
    #[arg(long, default_value_t = 0)]
    interval_ms: u64,
    #[arg(long, default_value_t = 2000)]
    timeout_ms: u64,
    #[arg(long)]
    source_ip: Option<IpAddr>,
    #[arg(long, default_value_t = 0)]
    source_port: u16,
    /// End at the first failure.
    #[arg(long)]
    strict: bool,
}

impl Cli {
    fn run(self) -> Result<()> {
        if let Some(parent) = self.parent {
            die_with(parent)?;
        }
        if let Some(path) = &self.cgroup {
            crate::cgroup::enter(path).with_context(|| format!("enter cgroup {}", path.display()))?;
        }
        if let Verb::Exec { program, args } = self.verb {
            let error = Command::new(&program).args(args).exec();
            return Err(error).with_context(|| format!("execute {}", program.display()));
        }
        if let Verb::Container { spec } = &self.verb {
            return crate::kubelet::enter(spec);
        }
        if let Verb::Load { load } = self.verb {
            return load.run();
        }
        let closed = input_closed()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async move {
            match self.verb {
                Verb::Serve { name } => tokio::select! {
                    ended = serve::serve(name) => ended,
                    () = closed.notified() => Ok(()),
                },
                Verb::Http { requests, sctp: false } => repeat(&requests, &closed, http::request).await,
                Verb::Http { requests, sctp: true } => {
                    repeat(&requests, &closed, http::request_over_sctp).await
                }
                Verb::Dns { requests, unconnected: false } => {
                    repeat(&requests, &closed, dns::ask_connected).await
                }
                Verb::Dns { requests, unconnected: true } => {
                    repeat(&requests, &closed, dns::ask_unconnected).await
                }
                Verb::Resolver { requests, connected: true, also: _ } => {
                    let resolver = dns::ConnectedResolver::default();
                    repeat(&requests, &closed, |requests| resolver.ask(requests)).await
                }
                Verb::Resolver { requests, also, connected: false } => {
                    let resolver = dns::Resolver::new(&requests, &also).await?;
                    repeat(&requests, &closed, |requests| resolver.ask(requests)).await
                }
                Verb::Stream { target } => stream::run(target, &closed).await,
                Verb::Load { .. } | Verb::Container { .. } | Verb::Exec { .. } => Ok(()),
            }
        })
    }
}

impl Requests {
    fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }

    /// What to bind to for the asked source.
    fn source(&self) -> SocketAddr {
        let any = match self.target {
            SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        SocketAddr::new(self.source_ip.unwrap_or(any), self.source_port)
    }

    /// Whether a source was asked for.
    fn names_source(&self) -> bool {
        self.source_ip.is_some() || self.source_port != 0
    }
}

impl Failure {
    fn wrong(detail: impl Into<String>) -> Self {
        Self { kind: FailureKind::Wrong, detail: detail.into() }
    }

    fn timed_out() -> Self {
        Self { kind: FailureKind::TimedOut, detail: "no answer in time".into() }
    }

    /// The io error behind another one, if there is one.
    fn caused_by(error: &(dyn std::error::Error + 'static)) -> Self {
        let mut source = Some(error);
        while let Some(cause) = source {
            if let Some(io) = cause.downcast_ref::<io::Error>() {
                return io.into();
            }
            source = cause.source();
        }
        Self { kind: FailureKind::Other, detail: error.to_string() }
    }
}

impl From<&io::Error> for Failure {
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "the kinds of io errors grow with the standard library"
    )]
    fn from(error: &io::Error) -> Self {
        let kind = match error.kind() {
            io::ErrorKind::ConnectionRefused => FailureKind::Refused,
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::UnexpectedEof => {
                FailureKind::Reset
            }
            io::ErrorKind::TimedOut => FailureKind::TimedOut,
            io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => FailureKind::Unreachable,
            _ => FailureKind::Other,
        };
        let detail = error
            .raw_os_error()
            .map_or_else(|| error.to_string(), |code| format!("{:?}", Errno::from_raw(code)));
        Self { kind, detail }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::from(&error)
    }
}

/// A v4 address that an IPv6 socket shows as `::ffff:a.b.c.d`.
fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

async fn repeat<F>(requests: &Requests, closed: &Notify, ask: impl Fn(Requests) -> F) -> Result<()>
where
    F: Future<Output = Result<Answer, Failure>>,
{
    let mut made = 0;
    while requests.count == 0 || made < requests.count {
        let started = SystemTime::now().duration_since(UNIX_EPOCH)?;
        let clock = Instant::now();
        let result = tokio::time::timeout(requests.timeout(), ask(requests.clone()))
            .await
            .unwrap_or_else(|_elapsed| Err(Failure::timed_out()));
        let give_up = requests.strict && result.is_err();
        say(&Outcome { started_us: micros(started), took_us: micros(clock.elapsed()), result })?;
        made += 1;
        if give_up {
            break;
        }
        tokio::select! {
            () = closed.notified() => break,
            () = tokio::time::sleep(Duration::from_millis(requests.interval_ms)) => {}
        }
    }
    Ok(())
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn say(line: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_vec(line)?;
    line.push(b'\n');
    io::stdout().lock().write_all(&line).context("the parent has gone")
}

fn input_closed() -> Result<Arc<Notify>> {
    let closed = Arc::new(Notify::new());
    let notify = closed.clone();
    thread::Builder::new().name("stdin".into()).spawn(move || {
        let _ended = io::stdin().lock().read_to_end(&mut Vec::new());
        notify.notify_one();
    })?;
    Ok(closed)
}

/// The parent is a thread of that process: the one that lives in the network namespace.
fn die_with(parent: i32) -> Result<()> {
    set_pdeathsig(Signal::SIGKILL).context("ask for a signal when the parent dies")?;
    if getppid().as_raw() != parent {
        bail!("the parent has gone");
    }
    Ok(())
}
