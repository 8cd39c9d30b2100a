//! Work inside another network namespace.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns};
use rtnetlink::Handle;
use tokio::runtime::Runtime;

use super::pod::PodError;

/// A namespace that is kept as long as the value lives.
#[derive(Debug)]
pub(super) struct Netns {
    path: PathBuf,
    file: File,
}

impl Netns {
    /// Opens a namespace that is not the host's.
    pub(super) fn open(path: &Path) -> Result<Self, PodError> {
        let failed = |source| PodError::NoNetns { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        let of = |file: &File| file.metadata().map(|found| (found.dev(), found.ino()));
        let own = File::open("/proc/thread-self/ns/net").map_err(failed)?;
        if of(&file).map_err(failed)? == of(&own).map_err(failed)? {
            return Err(PodError::HostNetns { path: path.to_owned() });
        }
        Ok(Self { path: path.to_owned(), file })
    }

    pub(super) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Runs work in the namespace, on a thread that ends with it: a thread is in one namespace.
    pub(super) fn inside<T: Send>(
        &self,
        work: impl FnOnce(&Session) -> Result<T, PodError> + Send,
    ) -> Result<T, PodError> {
        let failed = |source| PodError::NoNetns { path: self.path.clone(), source };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("netns".into()).spawn_scoped(scope, || {
                setns(&self.file, CloneFlags::CLONE_NEWNET).map_err(|errno| failed(errno.into()))?;
                work(&Session::open()?)
            });
            match thread.map_err(failed)?.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }
}

/// Netlink in the namespace of the thread that opened it.
pub(super) struct Session {
    runtime: Runtime,
    pub(super) netlink: Handle,
}

impl Session {
    pub(super) fn open() -> Result<Self, PodError> {
        let failed =
            |error: io::Error| PodError::Kernel { what: "open netlink".into(), reason: error.to_string() };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let netlink = {
            let _inside = runtime.enter();
            let (connection, netlink, _events) = rtnetlink::new_connection().map_err(failed)?;
            runtime.spawn(connection);
            netlink
        };
        Ok(Self { runtime, netlink })
    }

    pub(super) fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    /// Waits for a request, and says what it was about where the kernel refuses.
    pub(super) fn request<T>(
        &self,
        what: impl FnOnce() -> String,
        request: impl Future<Output = Result<T, rtnetlink::Error>>,
    ) -> Result<T, PodError> {
        self.wait(request).map_err(|error| PodError::Kernel { what: what(), reason: reason(&error) })
    }
}

/// The kernel's own words.
fn reason(error: &rtnetlink::Error) -> String {
    if let rtnetlink::Error::NetlinkError(message) = error {
        return message.to_io().to_string();
    }
    error.to_string()
}

/// Sets a sysctl of the thread's namespace.
pub(super) fn sysctl(name: &str, value: &str) -> io::Result<()> {
    std::fs::write(format!("/proc/sys/net/{name}"), value)
}
