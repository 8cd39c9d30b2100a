//! What `cargo xtask bench` runs.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    bpf_tests::bench::main()
}
