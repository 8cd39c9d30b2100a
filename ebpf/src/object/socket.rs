//! The cgroup programs: they change where a socket goes, and show it the service it asked for.

use aya_ebpf::Global;
use aya_ebpf::bindings::bpf_sock_addr;
use aya_ebpf::helpers::bpf_get_prandom_u32;
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use ferroflow_common::abi::socket::Translation;
use ferroflow_common::addr::{Addr, Port, Proto};
use ferroflow_common::family::{V4, V6};
use ferroflow_ebpf::socket::{self, Datagram, Peer};

use crate::maps::{Kernel, SOCKETS};

/// Whether datagram sockets are translated here too. Off by default: the packet path serves them and moves a flow at
/// its next packet, also for sockets that were connected before.
#[unsafe(no_mangle)]
static SOCKET_UDP: Global<u8> = Global::new(0);

/// Every program here only ever changes an address: it never refuses the system call.
const PROCEED: i32 = 1;

/// Where each family keeps its address in `bpf_sock_addr`.
trait SockAddr {
    /// # Safety
    /// `ctx` is the context of a running program of this family.
    unsafe fn addr(ctx: *mut bpf_sock_addr) -> Addr;
    /// # Safety
    /// `ctx` is the context of a running program of this family.
    unsafe fn set_addr(ctx: *mut bpf_sock_addr, addr: &Addr);
}

impl SockAddr for V4 {
    #[inline(always)]
    unsafe fn addr(ctx: *mut bpf_sock_addr) -> Addr {
        // SAFETY: the caller's promise.
        let field = unsafe { &raw const (*ctx).user_ip4 };
        // SAFETY: as above; volatile keeps it one 32-bit access, all that the kernel allows here.
        Addr::v4(unsafe { field.read_volatile() }.to_ne_bytes())
    }

    #[inline(always)]
    unsafe fn set_addr(ctx: *mut bpf_sock_addr, addr: &Addr) {
        let word = u32::from_ne_bytes(addr.v4_bytes());
        // SAFETY: the caller's promise.
        let field = unsafe { &raw mut (*ctx).user_ip4 };
        // SAFETY: as above.
        unsafe { field.write_volatile(word) };
    }
}

impl SockAddr for V6 {
    #[inline(always)]
    unsafe fn addr(ctx: *mut bpf_sock_addr) -> Addr {
        let mut bytes = [0; 16];
        for (index, chunk) in bytes.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            // SAFETY: the caller's promise; the field has four words and the array four chunks.
            let field = unsafe { &raw const (*ctx).user_ip6[index] };
            // SAFETY: as above.
            *chunk = unsafe { field.read_volatile() }.to_ne_bytes();
        }
        Addr::v6(bytes)
    }

    #[inline(always)]
    unsafe fn set_addr(ctx: *mut bpf_sock_addr, addr: &Addr) {
        for (index, chunk) in addr.bytes.as_chunks::<4>().0.iter().enumerate() {
            let word = u32::from_ne_bytes(*chunk);
            // SAFETY: the caller's promise; the field has four words and the array four chunks.
            let field = unsafe { &raw mut (*ctx).user_ip6[index] };
            // SAFETY: as above.
            unsafe { field.write_volatile(word) };
        }
    }
}

/// The peer that the system call names.
#[inline(always)]
fn peer<F: SockAddr>(ctx: &SockAddrContext) -> Peer {
    // SAFETY: the context is the running program's own, of this family.
    let addr = unsafe { F::addr(ctx.sock_addr) };
    // SAFETY: as above.
    let field = unsafe { &raw const (*ctx.sock_addr).user_port };
    // SAFETY: as above; the port is the low half, in network order.
    let port = unsafe { field.read_volatile() } as u16;
    // SAFETY: as above.
    let proto = unsafe { (*ctx.sock_addr).protocol } as u8;
    Peer { addr, port: Port { be: port.to_ne_bytes() }, proto: Proto { number: proto } }
}

#[inline(always)]
fn redirect<F: SockAddr>(ctx: &SockAddrContext, addr: &Addr, port: Port) {
    // SAFETY: the context is the running program's own, of this family.
    unsafe { F::set_addr(ctx.sock_addr, addr) };
    let port = u32::from(u16::from_ne_bytes(port.be));
    // SAFETY: as above.
    let field = unsafe { &raw mut (*ctx.sock_addr).user_port };
    // SAFETY: as above.
    unsafe { field.write_volatile(port) };
}

#[inline(always)]
fn remembered(ctx: &SockAddrContext) -> Option<Translation> {
    let value = SOCKETS.get_ptr_mut(ctx);
    // SAFETY: null or the socket's own storage, which lives as long as the socket.
    unsafe { value.as_ref() }.copied()
}

/// Keeps the translation in the socket; `false` where the kernel has no memory for it.
#[inline(always)]
fn remember(ctx: &SockAddrContext, mut translation: Translation) -> bool {
    let value = SOCKETS.get_or_insert_ptr_mut(ctx, Some(&mut translation));
    // SAFETY: null or the socket's own storage; it may hold an earlier connection's translation.
    match unsafe { value.as_mut() } {
        Some(value) => {
            *value = translation;
            true
        }
        None => false,
    }
}

#[inline(always)]
fn entropy() -> u32 {
    // SAFETY: the helper takes nothing and cannot fail.
    unsafe { bpf_get_prandom_u32() }
}

#[inline(always)]
fn connect<F: SockAddr>(ctx: &SockAddrContext) -> i32 {
    let peer = peer::<F>(ctx);
    if peer.proto != Proto::TCP && SOCKET_UDP.load() == 0 {
        return PROCEED;
    }
    if let Some(translation) = socket::connect(&Kernel, &peer, entropy())
        && remember(ctx, translation)
    {
        redirect::<F>(ctx, &translation.backend, translation.backend_port);
    }
    PROCEED
}

#[inline(always)]
fn sendmsg<F: SockAddr>(ctx: &SockAddrContext) -> i32 {
    if SOCKET_UDP.load() == 0 {
        return PROCEED;
    }
    let known = match socket::sendmsg(&Kernel, &peer::<F>(ctx), remembered(ctx), entropy()) {
        Datagram::Same(known) => Some(known),
        Datagram::New(new) if remember(ctx, new) => Some(new),
        Datagram::New(_) | Datagram::Leave => None,
    };
    if let Some(known) = known {
        redirect::<F>(ctx, &known.backend, known.backend_port);
    }
    PROCEED
}

/// getpeername and recvmsg: the address that the application is about to see.
#[inline(always)]
fn show<F: SockAddr>(ctx: &SockAddrContext) -> i32 {
    let peer = peer::<F>(ctx);
    if let Some(known) = remembered(ctx)
        && let Some((addr, port)) = socket::seen(&known, peer.addr, peer.port)
    {
        redirect::<F>(ctx, &addr, port);
    }
    PROCEED
}

macro_rules! hooks {
    ($($hook:ident: $function:ident::<$family:ty>;)*) => {
        $(#[cgroup_sock_addr($hook)]
        pub(crate) fn $hook(ctx: SockAddrContext) -> i32 {
            $function::<$family>(&ctx)
        })*
    };
}

hooks! {
    connect4: connect::<V4>;
    connect6: connect::<V6>;
    sendmsg4: sendmsg::<V4>;
    sendmsg6: sendmsg::<V6>;
    recvmsg4: show::<V4>;
    recvmsg6: show::<V6>;
    getpeername4: show::<V4>;
    getpeername6: show::<V6>;
}
