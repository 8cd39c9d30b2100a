//! The clock that the programs stamp flows with, and what they need to read it.

use ferroflow_common::clock::Ticks;
use nix::sys::time::TimeValLike as _;
use nix::time::{ClockId, clock_getres, clock_gettime};

/// Seconds of `CLOCK_MONOTONIC`; 0 should the kernel have no such clock.
pub fn seconds() -> u32 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |time| u32::try_from(time.tv_sec()).unwrap_or(u32::MAX))
}

/// How the kernel counts ticks; `None` where some may be lost, because no timer of high resolution makes them (`highres=off`).
///
/// A coarse clock's resolution is a tick (`posix_get_coarse_res`), and that of an exact one a nanosecond unless timers are of
/// low resolution (`hrtimer_resolution`).
pub fn ticks() -> Option<Ticks> {
    let resolution = |clock| u64::try_from(clock_getres(clock).ok()?.num_nanoseconds()).ok();
    if resolution(ClockId::CLOCK_MONOTONIC)? != 1 {
        return None;
    }
    Ticks::of(resolution(ClockId::CLOCK_MONOTONIC_COARSE)?)
}
