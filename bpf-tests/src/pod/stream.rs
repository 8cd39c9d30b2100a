//! One long transfer: every byte is sent, echoed and compared.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::Result;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::Notify,
    time::{sleep, timeout},
};

use super::{Failure, Progress, micros, say};
use crate::patience::stretched;

/// 2 MB a second: enough to have bytes under way at any time, little enough for a small machine.
const CHUNK: usize = 8 * 1024;
const PACE: Duration = Duration::from_millis(4);
const REPORT: Duration = Duration::from_millis(50);
/// Without a byte for this long the connection counts as dead.
const PATIENCE: Duration = Duration::from_secs(5);

/// Until `closed`; then what is still under way is read and the stream ended in order.
pub(super) async fn run(target: SocketAddr, closed: &Notify) -> Result<()> {
    let mut progress = Progress::default();
    let ended = match connect(target).await {
        Ok((read, write)) => match tokio::try_join!(send(write, closed), verify(read, &mut progress)) {
            Ok((sent, received)) if sent == received => Ok(()),
            Ok((sent, received)) => Err(Failure::wrong(format!("{sent} bytes sent, {received} came back"))),
            Err(failure) => Err(failure),
        },
        Err(failure) => Err(failure),
    };
    progress.ended = Some(ended);
    say(&progress)
}

async fn connect(target: SocketAddr) -> Result<(OwnedReadHalf, OwnedWriteHalf), Failure> {
    let connected = timeout(stretched(Duration::from_secs(2)), TcpStream::connect(target)).await;
    Ok(connected.unwrap_or_else(|_elapsed| Err(std::io::ErrorKind::TimedOut.into()))?.into_split())
}

async fn send(mut stream: OwnedWriteHalf, closed: &Notify) -> Result<u64, Failure> {
    let mut sent = 0;
    let mut chunk = [0; CHUNK];
    let stop = closed.notified();
    tokio::pin!(stop);
    loop {
        tokio::select! {
            biased;
            () = &mut stop => break,
            () = sleep(PACE) => {}
        }
        fill(&mut chunk, sent);
        let written = timeout(stretched(PATIENCE), stream.write_all(&chunk)).await;
        written.unwrap_or_else(|_elapsed| Err(std::io::ErrorKind::TimedOut.into()))?;
        sent += CHUNK as u64;
    }
    stream.shutdown().await?;
    Ok(sent)
}

/// The number of bytes read to the end of the stream.
async fn verify(mut stream: OwnedReadHalf, progress: &mut Progress) -> Result<u64, Failure> {
    let (mut last_byte, mut last_report) = (Instant::now(), Instant::now());
    let (mut received, mut expected) = ([0; CHUNK], [0; CHUNK]);
    loop {
        let read = timeout(stretched(PATIENCE), stream.read(&mut received)).await;
        let len = read.unwrap_or_else(|_elapsed| Err(std::io::ErrorKind::TimedOut.into()))?;
        if len == 0 {
            return Ok(progress.verified);
        }
        progress.longest_gap_us = progress.longest_gap_us.max(micros(last_byte.elapsed()));
        last_byte = Instant::now();
        fill(&mut expected[..len], progress.verified);
        if received[..len] != expected[..len] {
            return Err(Failure::wrong(format!("other bytes than sent after {}", progress.verified)));
        }
        progress.verified += len as u64;
        if last_report.elapsed() > REPORT {
            last_report = Instant::now();
            let _parent_gone = say(progress);
        }
    }
}

/// The bytes from position `at` on: a lost, repeated or moved segment does not compare equal.
fn fill(chunk: &mut [u8], at: u64) {
    for (byte, position) in chunk.iter_mut().zip(at..) {
        *byte = (position ^ (position >> 8) ^ (position >> 16)) as u8;
    }
}
