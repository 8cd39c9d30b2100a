//! The agent's half: a socket, and behind it the attachments of this node's pods.

mod attachments;
mod busy;
pub mod conflist;
mod die;
pub mod order;
#[cfg(test)]
mod tests;

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::watch;

use super::protocol::{Addresses, LONGEST_LINE, Reply, Request};
use super::types::{CniError, Code};
use crate::ipam::ledger::{Ledger, LedgerError};
use crate::lock::{Lock, LockError};
use crate::net::pod::{Kind, Netlink, PodError};
use attachments::Attachments;
use conflist::Conflist;
use order::{Order, Place};

/// Where things are.
#[derive(Clone, Debug)]
pub struct Options {
    pub socket: PathBuf,
    pub state_dir: PathBuf,
    pub conflist: Conflist,
    /// Of new pods; those that run keep theirs.
    pub device: Kind,
}

/// Ready to serve; connections that are made meanwhile wait.
#[derive(Debug)]
pub struct Server {
    options: Options,
    /// `None` as long as there can be no socket.
    listener: Option<UnixListener>,
    attachments: Arc<Attachments>,
    /// `None` without a directory to lock.
    _lock: Option<Lock>,
}

/// How often leftovers are looked for: leases whose pod is gone, removals in the spool, a configuration that is not
/// there.
const UPKEEP: Duration = Duration::from_secs(5);

/// The same until the configuration has been written.
const UPKEEP_AT_FIRST: Duration = Duration::from_millis(100);

/// A plugin sends its request at once.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);

impl Server {
    /// Takes over what the agent before left: frees leases of pods that are gone, and does what waits in the spool.
    /// Also says which addresses are behind which interfaces and whose, which the daemon is to know before it writes
    /// anything.
    ///
    /// Where a directory cannot be written pods are not attached, which is said and answered, and all else goes on.
    ///
    /// # Errors
    /// [`StartError`]. A lease file that cannot be read is none: commands are refused with the reason then.
    pub async fn start(
        options: Options,
        netlink: Arc<dyn Netlink>,
        daemon: UnboundedSender<Order>,
    ) -> Result<(Self, Vec<Place>), StartError> {
        let dir = &options.state_dir;
        let (lock, ledger) = match make_directory(dir) {
            Ok(()) => (Some(Lock::acquire(dir)?), Ledger::open(dir)),
            Err(source) => (None, Err(LedgerError::NoDirectory { path: dir.clone(), source })),
        };
        if let Err(error) = &ledger {
            tracing::error!(%error, "no pod can be attached");
        }
        let attachments = Attachments::new(options.state_dir.clone(), ledger, netlink, daemon);
        let attachments = Arc::new(attachments.device(options.device));
        let attached = attachments.take_over().await?;
        // Why there is none is said where it is tried again.
        let listener = listen(&options.socket).ok();
        Ok((Self { options, listener, attachments, _lock: lock }, attached))
    }

    /// Serves until the runtime ends.
    pub async fn run(self) {
        let Self { options, listener, attachments, _lock } = self;
        let (heard, hears) = watch::channel(listener.is_some());
        let socket = options.socket.clone();
        tokio::spawn(upkeep(attachments.clone(), options, hears));
        let listener = match listener {
            Some(listener) => listener,
            None => listen_later(&socket).await,
        };
        heard.send_replace(true);
        tracing::info!(socket = %socket.display(), "attaching pods");
        loop {
            match listener.accept().await {
                Ok((stream, _from)) => {
                    tokio::spawn(serve(stream, attachments.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a plugin's connection");
                    tokio::time::sleep(UPKEEP_AT_FIRST).await;
                }
            }
        }
    }
}

/// Rule 61: the configuration is there as soon as pods can be attached, and stays.
async fn upkeep(attachments: Arc<Attachments>, options: Options, hears: watch::Receiver<bool>) {
    let mut ready = false;
    let mut said = None;
    let addresses = if options.conflist.ipam.is_some() { Addresses::Given } else { Addresses::Own };
    loop {
        if !ready && *hears.borrow() {
            ready = attachments.status(addresses).await.is_ok();
        }
        if ready {
            let refused = options.conflist.write(&options).err().map(|error| error.to_string());
            if let Some(error) = refused.as_ref().filter(|_| said != refused) {
                let path = options.conflist.path();
                tracing::warn!(
                    "{}: {error}: runtimes find no network until it can be written; trying again (another directory: \
                     --cni-conf-dir)",
                    path.display()
                );
            }
            said = refused;
        }
        attachments.replay().await;
        attachments.sweep().await;
        attachments.mend().await;
        let waits_for_others = !ready && *hears.borrow();
        tokio::time::sleep(if waits_for_others { UPKEEP_AT_FIRST } else { UPKEEP }).await;
    }
}

/// Tries until there is a socket, and says why there is none.
async fn listen_later(path: &Path) -> UnixListener {
    let mut said = None;
    loop {
        let refused = match listen(path) {
            Ok(listener) => return listener,
            Err(error) => Some(error.to_string()),
        };
        if let Some(error) = refused.as_ref().filter(|_| said != refused) {
            tracing::error!(
                "{}: {error}: no pod can be attached or removed until plugins are answered there; trying again (another \
                 place: --cni-socket)",
                path.display()
            );
        }
        said = refused;
        tokio::time::sleep(UPKEEP).await;
    }
}

async fn serve(stream: UnixStream, attachments: Arc<Attachments>) {
    if let Err(error) = exchange(stream, &attachments).await {
        tracing::warn!(%error, "a plugin's request came to nothing");
    }
}

async fn exchange(mut stream: UnixStream, attachments: &Attachments) -> io::Result<()> {
    let uid = stream.peer_cred()?.uid();
    if uid != 0 {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("it is of user {uid}, not root"),
        ));
    }
    let mut line = String::new();
    let (reading, mut writing) = stream.split();
    let mut reading = BufReader::new(reading.take(LONGEST_LINE));
    tokio::time::timeout(REQUEST_LIMIT, reading.read_line(&mut line)).await??;
    if line.is_empty() {
        return Ok(());
    }
    let request = serde_json::from_str(&line);
    let reply = match &request {
        Ok(request) => answer(request, attachments).await,
        Err(error) => Reply::Failed(
            CniError::new(Code::DECODING, format!("the agent cannot read the plugin's request: {error}"))
                .details("plugin and agent are of different versions: install both of one"),
        ),
    };
    let mut answer = serde_json::to_vec(&reply)?;
    answer.push(b'\n');
    let written = writing.write_all(&answer).await;
    if let (Err(_), Ok(Request::Add(attachment)), Reply::Attached(_)) = (&written, &request, &reply) {
        // Nobody knows of it, and nobody will ask to remove it.
        attachments.del(&attachment.owner).await.map_err(io::Error::other)?;
    }
    written
}

async fn answer(request: &Request, attachments: &Attachments) -> Reply {
    let done = match request {
        Request::Add(attachment) => {
            return match attachments.add(attachment).await {
                Ok(attached) => Reply::Attached(attached),
                Err(error) => {
                    let owner = &attachment.owner;
                    tracing::warn!(container = %owner.container_id, ifname = %owner.ifname, %error, "ADD failed");
                    Reply::Failed(error)
                }
            };
        }
        Request::Del(removal) => attachments.del(&removal.owner).await,
        Request::Check { attachment, addresses } => attachments.check(attachment, addresses).await,
        Request::Gc { network, valid } => attachments.gc(network, valid).await,
        Request::Status { addresses } => attachments.status(*addresses).await,
    };
    done.map_or_else(Reply::Failed, |()| Reply::Done)
}

fn make_directory(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Root alone may connect. The socket gets its name once it listens: a plugin that finds it is answered. What is there
/// already is of an agent that is gone, for this one has the lock.
fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(dir) = path.parent() {
        make_directory(dir)?;
    }
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    match fs::remove_file(&name) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&name)?;
    fs::set_permissions(&name, Permissions::from_mode(0o600))?;
    fs::rename(&name, path)?;
    Ok(listener)
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error(transparent)]
    Pod(#[from] PodError),
}
