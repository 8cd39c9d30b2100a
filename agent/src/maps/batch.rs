//! Reading a live hash table in large steps: bpf(2) `BPF_MAP_LOOKUP_BATCH` (kernel 5.6, commit 05799638), which aya
//! does not have. A dump takes a third of the time of key after key, and meets each entry at most once although the
//! table changes meanwhile. One of the few files with unsafe code.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use super::Plain;

const LOOKUP_BATCH: libc::c_int = 24;

/// Rows at once; a bucket of the table must fit.
const ROWS: u32 = 4096;
const MOST_ROWS: u32 = 1 << 20;

/// `union bpf_attr` as the batch commands use it.
#[repr(C)]
struct Attributes {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Calls `visit` with every row, in no order.
///
/// # Errors
/// The kernel's refusal; `E2BIG` where more rows than fit in a step are in one bucket.
pub(super) fn for_each<K: Plain, V: Plain>(
    map: BorrowedFd<'_>,
    mut visit: impl FnMut(&K, &V),
) -> io::Result<()> {
    for_each_raw(map, (size_of::<K>(), size_of::<V>()), |key, value| {
        if let (Ok(key), Ok(value)) = (K::read_from_bytes(key), V::read_from_bytes(value)) {
            visit(&key, &value);
        }
    })
}

/// The same of a map whose keys and values have these sizes.
///
/// # Errors
/// As [`for_each`].
pub(super) fn for_each_raw(
    map: BorrowedFd<'_>,
    (key_size, value_size): (usize, usize),
    mut visit: impl FnMut(&[u8], &[u8]),
) -> io::Result<()> {
    let mut rows = ROWS;
    let mut from: Option<u32> = None;
    loop {
        let mut keys = vec![0u8; key_size * rows as usize];
        let mut values = vec![0u8; value_size * rows as usize];
        let mut next = 0u32;
        let mut attributes = Attributes {
            in_batch: from.as_ref().map_or(0, |from| std::ptr::from_ref(from).addr() as u64),
            out_batch: std::ptr::from_mut(&mut next).expose_provenance() as u64,
            keys: keys.as_mut_ptr().expose_provenance() as u64,
            values: values.as_mut_ptr().expose_provenance() as u64,
            count: rows,
            map_fd: map.as_raw_fd().unsigned_abs(),
            elem_flags: 0,
            flags: 0,
        };
        let size = size_of::<Attributes>();
        // SAFETY: the attributes say where the two buffers are and that each has room for `rows` elements of the
        // map's sizes; a hash table's position is four bytes.
        let failed = unsafe { libc::syscall(libc::SYS_bpf, LOOKUP_BATCH, &raw mut attributes, size) } != 0;
        let error = io::Error::last_os_error();
        let end = failed && error.raw_os_error() == Some(libc::ENOENT);
        if failed && error.raw_os_error() == Some(libc::ENOSPC) {
            rows = rows.saturating_mul(4);
            if rows > MOST_ROWS {
                return Err(io::Error::from_raw_os_error(libc::E2BIG));
            }
            continue;
        }
        if failed && !end {
            return Err(error);
        }
        let found = keys.chunks_exact(key_size).zip(values.chunks_exact(value_size));
        found.take(attributes.count as usize).for_each(|(key, value)| visit(key, value));
        if end {
            return Ok(());
        }
        from = Some(next);
    }
}
