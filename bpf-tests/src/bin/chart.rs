//! What `cargo xtask chart` runs.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    bpf_tests::chart::main()
}
