//! The way to the agent.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::cni::protocol::{LONGEST_LINE, Reply, Request};
use crate::cni::types::{CniError, Code};

/// The agent gives up earlier by itself, and says why; runtimes wait minutes.
const LIMIT: Duration = Duration::from_secs(60);

/// DEL has the spool to fall back to, and pods wait for its end.
const LIMIT_DEL: Duration = Duration::from_secs(20);

#[derive(Debug, thiserror::Error)]
#[error("no answer from the agent at {socket}: {reason}")]
pub(super) struct Unreachable {
    socket: PathBuf,
    reason: String,
}

impl From<Unreachable> for CniError {
    fn from(unreachable: Unreachable) -> Self {
        Self::new(Code::TRY_AGAIN_LATER, unreachable.to_string())
            .details("is `ferroflow agent --cni` running on this node, with this socket?")
    }
}

/// Asks once.
///
/// # Errors
/// Where there is no agent, or it does not answer in time or with no reply.
pub(super) fn ask(socket: &Path, request: &Request) -> Result<Reply, Unreachable> {
    let failed = |reason: String| Unreachable { socket: socket.to_owned(), reason };
    let limit = if matches!(request, Request::Del(_)) { LIMIT_DEL } else { LIMIT };
    exchange(socket, request, limit).map_err(|error| failed(error.to_string()))
}

fn exchange(socket: &Path, request: &Request, limit: Duration) -> std::io::Result<Reply> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut answer = String::new();
    BufReader::new(stream.take(LONGEST_LINE)).read_line(&mut answer)?;
    if answer.is_empty() {
        return Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "it ended without a reply"));
    }
    Ok(serde_json::from_str(&answer)?)
}
