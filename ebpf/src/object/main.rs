//! The one BPF object: every program, so that all share one set of maps, and all unsafe code of the datapath.
//!
//! The logic is in the library; here are the hooks, the kernel's packet and maps, and the translation of verdicts.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod direct;
mod fib;
mod maps;
mod masquerade;
mod mtu;
mod relay;
mod skb;
mod socket;
mod steps;
mod tc;
mod tunnel;
mod xdp;

/// Helpers such as `bpf_redirect_peer` are for GPL-compatible programs.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Nothing may panic: the linker would leave a call that the verifier refuses.
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
