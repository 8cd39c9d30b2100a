//! What `cargo xtask demo` runs.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    bpf_tests::demo::main()
}
