//! How long tests wait for what takes a real machine a moment.
//!
//! An emulated machine takes many times as long: `BPF_TESTS_PATIENCE` says how many times, and every limit of these
//! tests is stretched by it.

use std::{env, sync::OnceLock, time::Duration};

/// The limit as it is on this machine.
pub fn stretched(limit: Duration) -> Duration {
    limit * factor()
}

/// At least 1.
fn factor() -> u32 {
    static FACTOR: OnceLock<u32> = OnceLock::new();
    *FACTOR.get_or_init(|| {
        let Some(value) = env::var_os("BPF_TESTS_PATIENCE") else { return 1 };
        let number = value.to_str().and_then(|value| value.parse().ok()).filter(|&factor| factor > 0);
        number.unwrap_or_else(|| panic!("BPF_TESTS_PATIENCE={} is no number of 1 or more", value.display()))
    })
}
