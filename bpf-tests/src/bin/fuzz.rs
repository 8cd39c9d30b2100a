//! What `cargo xtask fuzz` runs.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    bpf_tests::fuzz::main()
}
