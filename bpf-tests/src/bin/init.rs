//! The first process of a virtual machine; see [`bpf_tests::vm`].
#![forbid(unsafe_code)]

fn main() {
    bpf_tests::vm::main();
}
