//! Load for measurements: blocking loops of one thread on one CPU, so that two runs differ by the network alone.
//!
//! Client and server share a CPU on purpose: what is measured is then the work per connection, request or byte, and
//! not how fast one CPU wakes another.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use nix::{
    libc,
    sched::{CpuSet, sched_setaffinity},
    sys::socket::{setsockopt, sockopt},
    unistd::{Pid, setsid},
};
use serde::{Deserialize, Serialize};

use super::{Ready, say};

/// What one run of a client saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// Connections, requests or bytes.
    pub count: u64,
    pub elapsed_ns: u64,
    /// Of one connection or request; 0 for a stream.
    pub p50_ns: u64,
    pub p99_ns: u64,
}

/// What a client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// Connections of one request and one answer of a byte each, ended by a reset so that ports do not run out
    Short,
    /// Requests and answers of a byte on one connection
    RoundTrip,
    /// One transfer
    Stream,
}

#[derive(Debug, Subcommand)]
pub(super) enum Load {
    /// Answer on some ports until standard input closes.
    Serve {
        first_port: u16,
        ports: u16,
        #[arg(long)]
        cpu: usize,
    },
    /// Make requests for some time.
    Run(Run),
}

#[derive(Debug, Args)]
pub(super) struct Run {
    #[arg(value_enum)]
    kind: Kind,
    /// Taken in turns, one a connection.
    #[arg(required = true)]
    targets: Vec<SocketAddr>,
    #[arg(long)]
    cpu: usize,
    #[arg(long)]
    millis: u64,
}

/// The first byte of a stream; any other is to be answered.
const STREAM: u8 = b's';
const REQUEST: u8 = b'r';
const CHUNK: usize = 64 * 1024;
/// The part of a run before it counts: caches, neighbours and window sizes settle.
const WARM_UP: u32 = 10;

impl Load {
    pub(super) fn run(self) -> Result<()> {
        go_first();
        match self {
            Self::Serve { first_port, ports, cpu } => serve(first_port, ports, cpu),
            Self::Run(run) => {
                pin(run.cpu)?;
                say(&run.sample()?)
            }
        }
    }
}

impl Run {
    fn sample(&self) -> Result<Sample> {
        let time = Duration::from_millis(self.millis);
        match self.kind {
            Kind::Short => {
                let mut targets = self.targets.iter().cycle();
                timed(time, || targets.next().map_or(Ok(()), short))
            }
            Kind::RoundTrip => {
                let mut stream = self.connect()?;
                timed(time, || round_trip(&mut stream))
            }
            Kind::Stream => stream(self.connect()?, time),
        }
    }

    fn connect(&self) -> Result<TcpStream> {
        let target = self.targets.first().context("no target")?;
        let stream = TcpStream::connect(target).with_context(|| format!("connect to {target}"))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

/// Before other work on this machine, where the scheduler groups processes by session; elsewhere it is measured as
/// one process among others.
fn go_first() {
    let _is_leader = setsid();
    let _not_grouped = fs::write("/proc/self/autogroup", "-20");
}

fn pin(cpu: usize) -> Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &cpus).with_context(|| format!("keep to CPU {cpu}"))
}

/// Repeats it for some time and keeps how long each took.
fn timed(time: Duration, mut once: impl FnMut() -> io::Result<()>) -> Result<Sample> {
    let warm = Instant::now() + time / WARM_UP;
    while Instant::now() < warm {
        once()?;
    }
    let mut took = Vec::with_capacity(1 << 18);
    let start = Instant::now();
    let mut before = start;
    while before - start < time {
        once()?;
        let now = Instant::now();
        took.push(nanos(now - before));
        before = now;
    }
    took.sort_unstable();
    let at = |percent: usize| took.get((took.len() * percent / 100).min(took.len() - 1)).copied();
    let (Some(p50_ns), Some(p99_ns)) = (at(50), at(99)) else { bail!("nothing was done in {time:?}") };
    Ok(Sample { count: took.len() as u64, elapsed_ns: nanos(before - start), p50_ns, p99_ns })
}

fn short(target: &SocketAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect(target)?;
    let reset = libc::linger { l_onoff: 1, l_linger: 0 };
    setsockopt(&stream, sockopt::Linger, &reset)?;
    round_trip(&mut stream)
}

fn round_trip(stream: &mut TcpStream) -> io::Result<()> {
    stream.write_all(&[REQUEST])?;
    stream.read_exact(&mut [0])
}

/// The server counts, so that what only reached a buffer is not counted.
fn stream(mut stream: TcpStream, time: Duration) -> Result<Sample> {
    let chunk = vec![0; CHUNK];
    let start = Instant::now();
    stream.write_all(&[STREAM])?;
    while start.elapsed() < time {
        stream.write_all(&chunk)?;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut count = [0; 8];
    stream.read_exact(&mut count).context("the server did not say how much came")?;
    let elapsed_ns = nanos(start.elapsed());
    Ok(Sample { count: u64::from_be_bytes(count), elapsed_ns, p50_ns: 0, p99_ns: 0 })
}

fn serve(first: u16, ports: u16, cpu: usize) -> Result<()> {
    for port in first..first.saturating_add(ports) {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))
            .with_context(|| format!("listen on port {port}"))?;
        thread::Builder::new().name(format!("port {port}")).spawn(move || answer_all(&listener, cpu))?;
    }
    say(&Ready { ready: format!("ports from {first}") })?;
    let _ended = io::stdin().lock().read_to_end(&mut Vec::new());
    Ok(())
}

/// One connection after the other: there is one client.
fn answer_all(listener: &TcpListener, cpu: usize) {
    if let Err(error) = pin(cpu) {
        eprintln!("pod: {error:#}");
        return;
    }
    let mut buffer = vec![0; 2 * CHUNK];
    for stream in listener.incoming().flatten() {
        // Short connections end with a reset; what is really wrong fails at the client.
        let _reset = answer(stream, &mut buffer);
    }
}

fn answer(mut stream: TcpStream, buffer: &mut [u8]) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut read = stream.read(buffer)?;
    if buffer.first() == Some(&STREAM) {
        let mut count = 0;
        while read > 0 {
            count += read as u64;
            read = stream.read(buffer)?;
        }
        return stream.write_all(&count.to_be_bytes());
    }
    while read > 0 {
        stream.write_all(buffer.get(..read).unwrap_or_default())?;
        read = stream.read(buffer)?;
    }
    Ok(())
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_load_is_answered() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let target = listener.local_addr().unwrap();
        thread::spawn(move || answer_all(&listener, 0));
        for kind in [Kind::Short, Kind::RoundTrip, Kind::Stream] {
            let run = Run { kind, targets: vec![target], cpu: 0, millis: 20 };
            let Sample { count, elapsed_ns, p50_ns, p99_ns } = run.sample().unwrap();
            assert!(count > 0 && elapsed_ns > 0 && p50_ns <= p99_ns, "{kind:?}");
            assert_eq!(p50_ns == 0, kind == Kind::Stream);
        }
    }
}
