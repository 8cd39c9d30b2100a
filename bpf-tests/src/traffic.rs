//! Requests between pods, from the side of the test that makes them.

use std::{
    fmt,
    io::{BufRead as _, BufReader},
    net::{IpAddr, SocketAddr},
    process::{self, Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail};
use serde::de::DeserializeOwned;

use crate::patience::stretched;
use crate::pod::{Answer, Failure, FailureKind, Outcome, VERB};

/// Requests to make, each on a new connection or socket.
#[derive(Clone, Debug)]
pub struct Ask {
    protocol: Protocol,
    target: SocketAddr,
    count: u32,
    interval: Duration,
    timeout: Duration,
    source: Option<IpAddr>,
    source_port: u16,
    also: Vec<SocketAddr>,
    strict: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Http,
    Dns,
    /// DNS over a socket that is not connected.
    DnsUnconnected,
    /// The same, and all questions from one socket.
    DnsOneSocket,
    /// All questions from one connected socket, and from another after an error.
    DnsConnected,
    /// HTTP over SCTP.
    Sctp,
}

/// A process that writes one line of JSON per result. Dropping it kills the process.
#[derive(Debug)]
pub struct Client<T> {
    child: Child,
    input: Option<ChildStdin>,
    lines: Arc<Lines<T>>,
}

#[derive(Debug)]
struct Lines<T> {
    read: Mutex<Read<T>>,
    changed: Condvar,
}

#[derive(Debug)]
struct Read<T> {
    values: Vec<T>,
    /// A line that is no result.
    garbage: Option<String>,
    ended: bool,
}

impl Ask {
    pub fn new(protocol: Protocol, target: SocketAddr) -> Self {
        let (interval, timeout) = (Duration::ZERO, Duration::from_secs(2));
        let also = Vec::new();
        Self {
            protocol,
            target,
            count: 1,
            interval,
            timeout,
            source: None,
            source_port: 0,
            also,
            strict: false,
        }
    }

    pub fn http(target: SocketAddr) -> Self {
        Self::new(Protocol::Http, target)
    }

    pub fn dns(target: SocketAddr) -> Self {
        Self::new(Protocol::Dns, target)
    }

    pub fn count(self, count: u32) -> Self {
        Self { count, ..self }
    }

    pub fn interval(self, interval: Duration) -> Self {
        Self { interval, ..self }
    }

    pub fn timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// The address to bind to.
    pub fn source(self, source: IpAddr) -> Self {
        Self { source: Some(source), ..self }
    }

    /// Further targets, which [`Protocol::DnsOneSocket`] asks in turn.
    pub fn also(self, also: &[SocketAddr]) -> Self {
        Self { also: also.to_owned(), ..self }
    }

    pub fn source_port(self, source_port: u16) -> Self {
        Self { source_port, ..self }
    }

    /// Ends at the first failure, so that what fails does not take forty timeouts.
    pub fn strict(self) -> Self {
        Self { strict: true, ..self }
    }

    /// The longest it can take, if no answer comes at all.
    pub(crate) fn limit(&self) -> Duration {
        (self.interval + stretched(self.timeout)) * self.count + Duration::from_secs(5)
    }

    pub(crate) fn args(&self) -> Vec<String> {
        let verb: &[&str] = match self.protocol {
            Protocol::Http => &["http"],
            Protocol::Dns => &["dns"],
            Protocol::DnsUnconnected => &["dns", "--unconnected"],
            Protocol::DnsOneSocket => &["resolver"],
            Protocol::DnsConnected => &["resolver", "--connected"],
            Protocol::Sctp => &["http", "--sctp"],
        };
        let mut args: Vec<_> = verb.iter().map(|&arg| arg.to_owned()).collect();
        args.push(self.target.to_string());
        for (name, value) in [
            ("--count", self.count.to_string()),
            ("--interval-ms", self.interval.as_millis().to_string()),
            ("--timeout-ms", stretched(self.timeout).as_millis().to_string()),
            ("--source-port", self.source_port.to_string()),
        ] {
            args.extend([name.to_owned(), value]);
        }
        args.extend(self.source.iter().flat_map(|source| ["--source-ip".to_owned(), source.to_string()]));
        args.extend(self.also.iter().flat_map(|target| ["--also".to_owned(), target.to_string()]));
        args.extend(self.strict.then(|| "--strict".to_owned()));
        args
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Http => "HTTP",
            Self::Dns => "DNS",
            Self::DnsUnconnected => "DNS (unconnected)",
            Self::DnsOneSocket => "DNS (one socket)",
            Self::DnsConnected => "DNS (one connected socket)",
            Self::Sctp => "SCTP",
        })
    }
}

/// This executable as a process of a pod; arguments follow.
pub(crate) fn pod_command() -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg(VERB).arg("--parent").arg(process::id().to_string());
    command
}

impl<T: DeserializeOwned + Clone + Send + 'static> Client<T> {
    /// `spawn` starts the command, in whatever namespace it belongs.
    pub(crate) fn start(mut command: Command, spawn: impl FnOnce(Command) -> Result<Child>) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = spawn(command)?;
        let input = child.stdin.take();
        let output = child.stdout.take().context("no standard output")?;
        let lines = Arc::new(Lines {
            read: Mutex::new(Read { values: Vec::new(), garbage: None, ended: false }),
            changed: Condvar::new(),
        });
        let reader = lines.clone();
        thread::Builder::new().name("client".into()).spawn(move || reader.read_all(output))?;
        Ok(Self { child, input, lines })
    }

    /// What it has written so far.
    pub fn seen(&self) -> Vec<T> {
        self.lines.lock().values.clone()
    }

    /// How many results it has written so far.
    pub fn count(&self) -> usize {
        self.lines.lock().values.len()
    }

    /// The last result that it has written.
    pub fn last(&self) -> Option<T> {
        self.lines.lock().values.last().cloned()
    }

    /// Waits until `enough` holds for what it has written.
    pub fn wait_until(&self, limit: Duration, enough: impl Fn(&[T]) -> bool) -> Result<Vec<T>> {
        self.wait(limit, enough)?;
        Ok(self.seen())
    }

    /// The same, without a copy of it: a client that has run for long has written much.
    pub fn wait(&self, limit: Duration, enough: impl Fn(&[T]) -> bool) -> Result<()> {
        let read = self.lines.wait(stretched(limit), |read| read.ended || enough(&read.values));
        if let Some(garbage) = &read.garbage {
            bail!("a line that is no result: {garbage}");
        }
        if !enough(&read.values) {
            let ended = if read.ended { "it ended" } else { "it did not come in time" };
            bail!("waited {limit:?} for a result: {ended}, after {} results", read.values.len());
        }
        Ok(())
    }

    /// Waits for its end.
    pub fn finish(mut self, limit: Duration) -> Result<Vec<T>> {
        let read = self.lines.wait(stretched(limit), |read| read.ended);
        if !read.ended {
            bail!("a client did not end within {limit:?}; {} results so far", read.values.len());
        }
        let (values, garbage) = (read.values.clone(), read.garbage.clone());
        drop(read);
        let status = self.child.wait().context("wait for a client")?;
        if let Some(garbage) = garbage {
            bail!("a line that is no result: {garbage}");
        }
        if !status.success() {
            bail!("a client ended with {status}, after {} results", values.len());
        }
        Ok(values)
    }

    /// Tells it to end, and waits for that.
    pub fn stop(mut self) -> Result<Vec<T>> {
        drop(self.input.take());
        self.finish(Duration::from_secs(10))
    }
}

impl<T> Drop for Client<T> {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

impl<T: DeserializeOwned> Lines<T> {
    fn read_all(&self, output: ChildStdout) {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            let mut read = self.lock();
            match serde_json::from_str(&line) {
                Ok(value) => read.values.push(value),
                Err(_) => read.garbage = Some(line),
            }
            self.changed.notify_all();
        }
        self.lock().ended = true;
        self.changed.notify_all();
    }
}

impl<T> Lines<T> {
    fn lock(&self) -> MutexGuard<'_, Read<T>> {
        self.read.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self, limit: Duration, done: impl Fn(&Read<T>) -> bool) -> MutexGuard<'_, Read<T>> {
        let waited = self.changed.wait_timeout_while(self.lock(), limit, |read| !done(read));
        waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

impl Outcome {
    pub fn took(&self) -> Duration {
        Duration::from_micros(self.took_us)
    }

    pub fn started(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_micros(self.started_us)
    }

    pub fn answer(&self) -> Option<&Answer> {
        self.result.as_ref().ok()
    }

    pub fn failure(&self) -> Option<&Failure> {
        self.result.as_ref().err()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            FailureKind::Refused => "refused",
            FailureKind::Reset => "reset",
            FailureKind::TimedOut => "timed out",
            FailureKind::Unreachable => "unreachable",
            FailureKind::Wrong => "wrong answer",
            FailureKind::Other => "failed",
        };
        write!(f, "{kind} ({})", self.detail)
    }
}
