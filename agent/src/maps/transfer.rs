//! Moves rows from one map to another that is larger, or whose values are longer: what a new size or a new layout takes.
//! One of the few files with unsafe code.
//!
//! Keys keep their layout and arrays their indices, so that whatever names a row still finds it. New fields of a value
//! stand at its end, and zeros in them mean what was meant before there were any: values are copied as far as both
//! have them, and what is more is zero.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};

use aya::maps::{MapData, MapInfo, MapType};

use super::batch;

const LOOKUP: libc::c_int = 1;
const UPDATE: libc::c_int = 2;
const NEXT_KEY: libc::c_int = 4;

#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    #[error(
        "its {what} changed: no rows can be taken over; `ferroflow cleanup --all` removes it, and with it connections"
    )]
    Incomparable { what: &'static str },
    #[error("rows do not fit into {room}: start the agent with the sizes it had, or larger ones")]
    Room { room: u32 },
    #[error("cannot {what}: {source}")]
    Kernel { what: &'static str, source: io::Error },
}

/// What becomes of a row that the other map has already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    Replaced,
    Kept,
}

/// Copies all rows; how many there were. Of counters by CPU, and of what belongs to sockets, nothing is copied: the
/// kernel has no way to.
///
/// # Errors
/// [`TransferError`]; the map `from` is as it was.
pub fn copy(from: &MapData, to: &MapData, existing: Existing) -> Result<u64, TransferError> {
    let kernel = |what| {
        move |error: aya::maps::MapError| TransferError::Kernel { what, source: io::Error::other(error) }
    };
    let old = from.info().map_err(kernel("look at the old map"))?;
    let new = to.info().map_err(kernel("look at the new map"))?;
    let kind = old.map_type().map_err(kernel("tell the kind of the old map"))?;
    if new.map_type().map_err(kernel("tell the kind of the new map"))? as u32 != kind as u32 {
        return Err(TransferError::Incomparable { what: "kind" });
    }
    if old.key_size() != new.key_size() {
        return Err(TransferError::Incomparable { what: "key" });
    }
    let mut copied = 0;
    let mut put = |key: &[u8], value: &[u8]| put((to, &new), (key, value), (kind, existing), &mut copied);
    let (from, sizes) = (from.fd().as_fd(), (old.key_size() as usize, old.value_size() as usize));
    if is(kind, MapType::Hash) || is(kind, MapType::LruHash) {
        let mut result = Ok(());
        let visit = |key: &[u8], value: &[u8]| {
            if result.is_ok() {
                result = put(key, value);
            }
        };
        batch::for_each_raw(from, sizes, visit)
            .map_err(|source| TransferError::Kernel { what: "read the old map", source })?;
        result?;
    } else if is(kind, MapType::Array) || is(kind, MapType::LpmTrie) {
        walk(from, sizes, &mut put)?;
    }
    Ok(copied)
}

fn is(kind: MapType, other: MapType) -> bool {
    kind as u32 == other as u32
}

/// Rows of arrays that are zero are as they are in a new one.
fn put(
    (to, info): (&MapData, &MapInfo),
    (key, value): (&[u8], &[u8]),
    (kind, existing): (MapType, Existing),
    copied: &mut u64,
) -> Result<(), TransferError> {
    if is(kind, MapType::Array) && value.iter().all(|byte| *byte == 0) {
        return Ok(());
    }
    let mut longer = vec![0; info.value_size() as usize];
    for (to, from) in longer.iter_mut().zip(value) {
        *to = *from;
    }
    let flags = match existing {
        Existing::Replaced => 0,
        // BPF_NOEXIST
        Existing::Kept => 1,
    };
    match command(UPDATE, to.fd().as_fd(), (Some(key), &mut longer), flags) {
        Ok(()) => *copied += 1,
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
        Err(error) if matches!(error.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC)) => {
            return Err(TransferError::Room { room: info.max_entries() });
        }
        Err(source) => return Err(TransferError::Kernel { what: "write to the new map", source }),
    }
    Ok(())
}

/// Key after key: of a map that only the agent changes.
fn walk(
    map: BorrowedFd<'_>,
    (key_size, value_size): (usize, usize),
    visit: &mut impl FnMut(&[u8], &[u8]) -> Result<(), TransferError>,
) -> Result<(), TransferError> {
    let failed = |source| TransferError::Kernel { what: "read the old map", source };
    let (mut key, mut value) = (None::<Vec<u8>>, vec![0; value_size]);
    loop {
        let mut next = vec![0; key_size];
        match command(NEXT_KEY, map, (key.as_deref(), &mut next), 0) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(()),
            Err(error) => return Err(failed(error)),
        }
        command(LOOKUP, map, (Some(&next), &mut value), 0).map_err(failed)?;
        visit(&next, &value)?;
        key = Some(next);
    }
}

/// `union bpf_attr` as the commands on single rows use it.
#[repr(C)]
struct Attributes {
    map_fd: u32,
    padding: u32,
    key: u64,
    /// Or the next key.
    value: u64,
    flags: u64,
}

/// One bpf(2) command on a row. Key and value are as long as the map's.
fn command(
    command: libc::c_int,
    map: BorrowedFd<'_>,
    (key, value): (Option<&[u8]>, &mut [u8]),
    flags: u64,
) -> io::Result<()> {
    let attributes = Attributes {
        map_fd: map.as_raw_fd().unsigned_abs(),
        padding: 0,
        key: key.map_or(0, |key| key.as_ptr().expose_provenance() as u64),
        value: value.as_mut_ptr().expose_provenance() as u64,
        flags,
    };
    let size = size_of::<Attributes>();
    // SAFETY: the attributes say where key and value are, each as long as the caller knows the map's to be.
    let failed = unsafe { libc::syscall(libc::SYS_bpf, command, &raw const attributes, size) } != 0;
    if failed { Err(io::Error::last_os_error()) } else { Ok(()) }
}
