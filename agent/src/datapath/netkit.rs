//! The program in the transmission of a pod that has a netkit: a BPF link at `BPF_NETKIT_PEER` of the host's end (kernel
//! 6.7, commit 35dfaad7188c), by bpf(2), because aya has no such attachment. One of the few files with unsafe code.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use zerocopy::{Immutable, IntoBytes};

/// Commands of bpf(2), and an attach type, as `linux/bpf.h` numbers them.
const OBJ_PIN: libc::c_int = 6;
const OBJ_GET: libc::c_int = 7;
const LINK_CREATE: libc::c_int = 28;
const LINK_UPDATE: libc::c_int = 29;
const NETKIT_PEER: u32 = 55;

/// `union bpf_attr` as `OBJ_PIN` and `OBJ_GET` use it.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Object {
    path: u64,
    fd: u32,
    flags: u32,
}

/// The same for `LINK_CREATE`: behind all other links.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Create {
    program: u32,
    ifindex: u32,
    attach_type: u32,
    flags: u32,
    relative: u32,
    reserved: u32,
    revision: u64,
}

/// The same for `LINK_UPDATE`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Update {
    link: u32,
    program: u32,
    flags: u32,
    former: u32,
}

/// A link; as long as it is pinned the program stays.
#[derive(Debug)]
pub(super) struct Link(OwnedFd);

impl Link {
    /// Lets the program run on what the pod sends.
    ///
    /// # Errors
    /// `ENXIO` where the interface is no netkit, `EINVAL` where the kernel has none.
    pub(super) fn create(program: BorrowedFd<'_>, ifindex: u32) -> io::Result<Self> {
        let attributes = Create {
            program: number(program),
            ifindex,
            attach_type: NETKIT_PEER,
            flags: 0,
            relative: 0,
            reserved: 0,
            revision: 0,
        };
        owned(bpf(LINK_CREATE, attributes.as_bytes())?).map(Self)
    }

    /// `None` where nothing is pinned.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub(super) fn open(pin: &Path) -> io::Result<Option<Self>> {
        let path = CString::new(pin.as_os_str().as_bytes())?;
        let attributes = Object { path: path.as_ptr().expose_provenance() as u64, fd: 0, flags: 0 };
        match bpf(OBJ_GET, attributes.as_bytes()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            found => owned(found?).map(|fd| Some(Self(fd))),
        }
    }

    /// # Errors
    /// What the kernel refuses.
    pub(super) fn pin(&self, pin: &Path) -> io::Result<()> {
        let path = CString::new(pin.as_os_str().as_bytes())?;
        let fd = number(self.0.as_fd());
        let attributes = Object { path: path.as_ptr().expose_provenance() as u64, fd, flags: 0 };
        bpf(OBJ_PIN, attributes.as_bytes()).map(drop)
    }

    /// Puts another program in the place of the one that runs, without a packet in between that meets none.
    ///
    /// # Errors
    /// `ENOLINK` where the interface is gone.
    pub(super) fn update(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        let attributes =
            Update { link: number(self.0.as_fd()), program: number(program), flags: 0, former: 0 };
        bpf(LINK_UPDATE, attributes.as_bytes()).map(drop)
    }
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().unsigned_abs()
}

fn owned(returned: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(returned).map_err(io::Error::other)?;
    // SAFETY: the command gave it to this process a moment ago, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What the command returns: a file descriptor, or 0.
fn bpf(command: libc::c_int, attributes: &[u8]) -> io::Result<libc::c_long> {
    // SAFETY: these commands only read the attributes, as many as are said to be there, and the paths that they name,
    // which live as long as the callers' own frames.
    let returned = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), attributes.len()) };
    if returned < 0 { Err(io::Error::last_os_error()) } else { Ok(returned) }
}
