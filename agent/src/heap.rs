//! The process's own memory, as its allocator sees it. One of the few files with unsafe code.

/// Has all threads share one heap, and large buffers leave the process as soon as they are freed. Threads that sweep a
/// table or ask a tool live for seconds; glibc would keep a heap for each of them, and in each as much as the largest
/// buffer that it ever had: 2 MB, times three. To be called before there is a second thread.
pub fn share() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: it has no preconditions; a value that is not taken leaves things as they are.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
        // SAFETY: as above. Naming it, though it is the default, keeps it from growing with what is freed.
        unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE) };
    }
}

/// Bytes from which on a buffer is one of the kernel's.
#[cfg(target_env = "gnu")]
const LARGE: libc::c_int = 128 * 1024;

/// Gives free pages back to the kernel; a millisecond for each ten megabytes. A list of a whole cluster leaves holes
/// between what is kept, which the allocator holds for the next one: megabytes that a node of many pods can use better.
/// Without glibc there is no such thing to ask for, and nothing is done.
pub(crate) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it has no preconditions: the allocator takes its own locks.
    unsafe {
        libc::malloc_trim(0)
    };
}

/// Bytes that are allocated: what a leak adds to, whatever holes there are between them. `None` without glibc, which
/// alone says (mallinfo(3)).
#[cfg(target_env = "gnu")]
pub(crate) fn in_use() -> Option<u64> {
    // SAFETY: it has no preconditions: the allocator takes its own locks.
    let found = unsafe { libc::mallinfo2() };
    Some((found.uordblks + found.hblkhd) as u64)
}

#[cfg(not(target_env = "gnu"))]
pub(crate) fn in_use() -> Option<u64> {
    None
}
