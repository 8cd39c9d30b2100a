//! The process's own memory. A list of a whole cluster leaves holes between what is kept, which the allocator holds
//! for the next one: megabytes that a node of many pods can use better. One of the few files with unsafe code.

/// Gives free pages back to the kernel; a millisecond for each ten megabytes. Without glibc there is no such thing to
/// ask for, and nothing is done.
pub(crate) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it has no preconditions: the allocator takes its own locks.
    unsafe {
        libc::malloc_trim(0)
    };
}
