//! What `cargo xtask verify` runs.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    bpf_tests::verify::main()
}
