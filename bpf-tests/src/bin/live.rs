//! Tests of a real cluster; see [`bpf_tests::live`].
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    bpf_tests::live::main()
}
