//! The clock that the programs stamp flows with.

use nix::time::{ClockId, clock_gettime};

/// Seconds of `CLOCK_MONOTONIC`; 0 should the kernel have no such clock.
pub fn seconds() -> u32 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |time| u32::try_from(time.tv_sec()).unwrap_or(u32::MAX))
}
