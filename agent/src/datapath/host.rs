//! What the machine must offer: a BPF file system and cgroup2.

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, getsockopt, socket, sockopt};
use nix::sys::statfs::{BPF_FS_MAGIC, CGROUP2_SUPER_MAGIC, statfs};
use nix::sys::statvfs::{FsFlags, statvfs};

use super::DatapathError;
use crate::config::Bpffs;

/// The usual place, which the agent mounts by itself where an init system has not.
const STANDARD: &str = "/sys/fs/bpf";

/// Makes the directories for pinned maps and links, which must be on a BPF file system.
///
/// # Errors
/// [`DatapathError::NotBpffs`], [`DatapathError::Unwritable`].
pub fn prepare(bpffs: &Bpffs) -> Result<(), DatapathError> {
    ensure_bpffs(&bpffs.dir)?;
    if statvfs(&bpffs.dir).is_ok_and(|found| found.flags().contains(FsFlags::ST_RDONLY)) {
        let source = std::io::ErrorKind::ReadOnlyFilesystem.into();
        return Err(DatapathError::Unwritable { path: bpffs.dir.clone(), source });
    }
    for dir in [bpffs.maps(), bpffs.links()] {
        fs::create_dir_all(&dir).map_err(|source| DatapathError::Unwritable { path: dir, source })?;
    }
    Ok(())
}

/// The same for an agent. The first process of a container mounts nothing: a BPF file system of the container's own would
/// end with it, and with it every program and every connection's entry.
///
/// # Errors
/// As [`prepare`]; [`DatapathError::OwnBpffs`].
pub fn prepare_agent(bpffs: &Bpffs) -> Result<(), DatapathError> {
    if std::process::id() == 1 && !on_bpffs(&bpffs.dir) {
        return Err(DatapathError::OwnBpffs { path: bpffs.dir.clone() });
    }
    prepare(bpffs)
}

fn ensure_bpffs(dir: &Path) -> Result<(), DatapathError> {
    if on_bpffs(dir) {
        return Ok(());
    }
    if dir.starts_with(STANDARD) {
        let none: Option<&str> = None;
        mount(Some("bpf"), STANDARD, Some("bpf"), MsFlags::empty(), none)
            .map_err(|errno| DatapathError::Io { path: STANDARD.into(), source: errno.into() })?;
        tracing::info!(path = STANDARD, "mounted the BPF file system");
        return Ok(());
    }
    Err(DatapathError::NotBpffs { path: dir.to_owned() })
}

/// Where interfaces have their settings.
const SETTINGS: &str = "/proc/sys";

/// Container runtimes mount the kernel's settings read-only, in the container's own mount namespace; those of pods'
/// interfaces have to be made all the same. Outside of a container nothing is done.
pub fn unlock_settings() {
    let locked = statvfs(SETTINGS).is_ok_and(|found| found.flags().contains(FsFlags::ST_RDONLY));
    if !locked {
        return;
    }
    let none: Option<&str> = None;
    let flags =
        MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    match mount(none, SETTINGS, none, flags, none) {
        Ok(()) => tracing::info!(path = SETTINGS, "made the kernel's settings writable in this container"),
        Err(errno) => tracing::warn!(
            path = SETTINGS,
            %errno,
            "the kernel's settings are read-only: interfaces of pods cannot be set up without the capability SYS_ADMIN"
        ),
    }
}

/// Whether the nearest directory that exists is on a BPF file system.
fn on_bpffs(dir: &Path) -> bool {
    dir.ancestors()
        .find_map(|dir| statfs(dir).ok())
        .is_some_and(|file_system| file_system.filesystem_type() == BPF_FS_MAGIC)
}

/// Before 5.11 maps count against the limit on locked memory; where it cannot be raised, creating them says so.
pub(super) fn raise_memlock_limit() {
    if let Err(errno) = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY) {
        tracing::debug!(%errno, "the limit on locked memory stays as it is");
    }
}

/// Whether the running kernel is of this version or a later one; no, should it not say.
pub(crate) fn kernel_is_at_least(major: u32, minor: u32) -> bool {
    let name = nix::sys::utsname::uname();
    let release = name.as_ref().ok().and_then(|name| name.release().to_str());
    release.and_then(version).is_some_and(|running| running >= (major, minor))
}

/// The socket option that names a socket's network namespace (5.14).
#[derive(Clone, Copy, Debug)]
struct NetnsCookie;

nix::getsockopt_impl!(NetnsCookie, libc::SOL_SOCKET, SO_NETNS_COOKIE, u64, sockopt::GetStruct<u64>);

/// As `asm-generic/socket.h` has it, which all 64-bit targets of this agent use; libc does not have it yet.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// The cookie of the network namespace that this process is in, which is the host's: its sockets and those of every
/// other process in it are told from the sockets of pods by this. 0, which is no cookie and stands for the initial
/// namespace, on kernels that do not say: there the agent must not run in another one.
pub(super) fn netns_cookie() -> u64 {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None);
    match socket.and_then(|socket| getsockopt(&socket, NetnsCookie)) {
        Ok(cookie) => cookie,
        Err(errno) => {
            tracing::info!(%errno, "the kernel does not name network namespaces: the host's is taken to be the initial one");
            0
        }
    }
}

/// `6.18.44-fc` is 6.18.
fn version(release: &str) -> Option<(u32, u32)> {
    let (major, rest) = release.split_once('.')?;
    let minor = rest.split(|c: char| !c.is_ascii_digit()).next()?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Where cgroup2 is mounted: it may be anywhere (`/sys/fs/cgroup`, or a directory below it on a hybrid host).
///
/// # Errors
/// [`DatapathError::NoCgroup2`].
pub fn cgroup2_mount() -> Result<PathBuf, DatapathError> {
    let table = "/proc/self/mountinfo";
    let text =
        fs::read_to_string(table).map_err(|source| DatapathError::Io { path: table.into(), source })?;
    mount_points(&text, "cgroup2")
        .find(|point| statfs(point).is_ok_and(|found| found.filesystem_type() == CGROUP2_SUPER_MAGIC))
        .ok_or(DatapathError::NoCgroup2)
}

/// The mount points of one type of file system, from proc_pid_mountinfo(5).
fn mount_points<'a>(table: &'a str, kind: &'a str) -> impl Iterator<Item = PathBuf> + 'a {
    table.lines().filter_map(move |line| {
        let (mount, file_system) = line.split_once(" - ")?;
        if file_system.split(' ').next()? != kind {
            return None;
        }
        Some(PathBuf::from(mount.split(' ').nth(4)?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
24 1 0:22 / /proc rw,relatime - proc proc rw
31 28 0:27 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:28 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw
33 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu";

    #[test]
    fn cgroup2_is_found_wherever_it_is_mounted() {
        let found: Vec<_> = mount_points(TABLE, "cgroup2").collect();
        assert_eq!(found, [PathBuf::from("/sys/fs/cgroup/unified")]);
    }

    #[test]
    fn a_kernel_says_its_version() {
        assert_eq!(version("5.10.0-33-amd64"), Some((5, 10)));
        assert_eq!(version("6.18-rc1"), Some((6, 18)));
        assert_eq!(version("unknown"), None);
        assert!(kernel_is_at_least(4, 0));
    }

    #[test]
    fn a_network_namespace_has_one_cookie() {
        assert_eq!(netns_cookie(), netns_cookie());
        assert_eq!(netns_cookie() != 0, kernel_is_at_least(5, 14));
    }

    #[test]
    fn an_ordinary_directory_is_refused_with_the_way_out() {
        let dir = std::env::temp_dir().join("not-bpffs");
        let error = ensure_bpffs(&dir).unwrap_err().to_string();
        assert!(error.contains("mount -t bpf"), "{error}");
    }
}
