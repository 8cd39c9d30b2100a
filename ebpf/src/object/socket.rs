//! The cgroup programs: they change where a socket goes, and show it the service it asked for.

use aya_ebpf::bindings::{BPF_ANY, BPF_TCP_ESTABLISHED, bpf_sock, bpf_sock_addr};
use aya_ebpf::helpers::bpf_get_prandom_u32;
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use aya_ebpf::{EbpfContext as _, Global};
use ferroflow_common::abi::socket::{Translation, Translations};
use ferroflow_common::addr::{Addr, Port, Proto};
use ferroflow_common::family::{V4, V6};
use ferroflow_common::verdict::DropReason;
use ferroflow_ebpf::datagram;
use ferroflow_ebpf::socket::{self, Decision, Peer, Verb};

use crate::maps::{CONNECTED_SOCKETS, DATAGRAM_SOCKETS, Kernel, SOCKETS, count};

/// The cookie of the host's network namespace; 0, which is no cookie: it is the initial one.
#[unsafe(no_mangle)]
static HOST_NETNS: Global<u64> = Global::new(0);

/// Whether the stream sockets of pods are translated here. What the host's own processes open always is.
#[unsafe(no_mangle)]
static POD_TCP: Global<u8> = Global::new(1);

/// Whether their datagram sockets are, too, where they name a peer with each datagram. Off by default: the packet path
/// serves them and moves a flow at its next packet, also for sockets that were connected before.
#[unsafe(no_mangle)]
static POD_UDP: Global<u8> = Global::new(0);

/// The system call goes on.
const PROCEED: i32 = 1;
/// The system call fails with EPERM: older kernels let a program say no other errno.
const FAIL: i32 = 0;

/// ::1. Nothing listens on port 0: on every kernel, who connects there is told at once that the connection is refused.
const LOOPBACK_V6: Addr = Addr::v6([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);

/// Where each family keeps its address in `bpf_sock_addr`.
trait SockAddr {
    /// # Safety
    /// `ctx` is the context of a running program of this family.
    unsafe fn addr(ctx: *mut bpf_sock_addr) -> Addr;
    /// # Safety
    /// `ctx` is the context of a running program of this family.
    unsafe fn set_addr(ctx: *mut bpf_sock_addr, addr: &Addr);
    /// The address that the socket is bound to; unspecified where it is to none.
    ///
    /// # Safety
    /// `ctx` is the context of a running program of this family.
    unsafe fn bound(ctx: *mut bpf_sock_addr) -> Addr;
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

    #[inline(always)]
    unsafe fn bound(ctx: *mut bpf_sock_addr) -> Addr {
        // SAFETY: the caller's promise.
        let sk = unsafe { kernel_socket(ctx) };
        if sk.is_null() {
            return Addr::v4([0; 4]);
        }
        // SAFETY: the kernel's socket, which lives as long as the program runs.
        let field = unsafe { &raw const (*sk).src_ip4 };
        // SAFETY: as above; volatile keeps it one 32-bit access, all that the kernel allows here.
        Addr::v4(unsafe { field.read_volatile() }.to_ne_bytes())
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

    #[inline(always)]
    unsafe fn bound(ctx: *mut bpf_sock_addr) -> Addr {
        // SAFETY: the caller's promise.
        let sk = unsafe { kernel_socket(ctx) };
        if sk.is_null() {
            return Addr::UNSPECIFIED;
        }
        let mut bytes = [0; 16];
        for (index, chunk) in bytes.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            // SAFETY: the kernel's socket, which lives as long as the program runs; the field has four words.
            let field = unsafe { &raw const (*sk).src_ip6[index] };
            // SAFETY: as above.
            *chunk = unsafe { field.read_volatile() }.to_ne_bytes();
        }
        Addr::v6(bytes)
    }
}

/// The kernel's socket.
///
/// # Safety
/// `ctx` is the context of a running program.
#[inline(always)]
unsafe fn kernel_socket(ctx: *mut bpf_sock_addr) -> *mut bpf_sock {
    // SAFETY: the caller's promise.
    let field = unsafe { &raw const (*ctx).__bindgen_anon_1.sk };
    // SAFETY: as above.
    unsafe { field.read_volatile() }
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

/// Whose socket a program may translate.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Owner {
    Host,
    Pod,
}

/// Which system call names the peer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Call {
    Connect,
    Send,
}

/// `None` where the packet path serves it.
#[inline(always)]
fn owner(ctx: &SockAddrContext, proto: Proto) -> Option<Owner> {
    // SAFETY: the context is the running program's own.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let host = match HOST_NETNS.load() {
        // SAFETY: without a context the helper answers for the initial namespace.
        0 => unsafe { bpf_get_netns_cookie(core::ptr::null_mut()) },
        host => host,
    };
    if cookie == host {
        return Some(Owner::Host);
    }
    let of_pods = if proto == Proto::TCP { POD_TCP.load() } else { POD_UDP.load() };
    (of_pods != 0).then_some(Owner::Pod)
}

#[inline(always)]
fn is_connected(ctx: &SockAddrContext) -> bool {
    // SAFETY: the context is the running program's own.
    let sk = unsafe { kernel_socket(ctx.sock_addr) };
    // SAFETY: not null: the kernel's socket, which lives as long as the program runs.
    !sk.is_null() && unsafe { (*sk).state } == BPF_TCP_ESTABLISHED
}

#[inline(always)]
fn decide<F: SockAddr>(
    ctx: &SockAddrContext,
    owner: Owner,
    peer: &Peer,
    known: Option<Translation>,
) -> Decision {
    match owner {
        Owner::Host => {
            // SAFETY: the context is the running program's own, of this family.
            let bound = unsafe { F::bound(ctx.sock_addr) };
            socket::host(&Kernel, peer, bound, known, entropy())
        }
        Owner::Pod => socket::pod(&Kernel, peer, known, entropy()),
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
    let Some(owner) = owner(ctx, peer.proto) else { return PROCEED };
    // What a connected datagram socket sends asks no program again: the packet path moves that of a pod (rule 31). That
    // of the host the agent takes from a backend that is gone.
    if owner == Owner::Pod && peer.proto != Proto::TCP {
        forget(ctx, &peer);
        return PROCEED;
    }
    let Decision { verb, number } = decide::<F>(ctx, owner, &peer, None);
    match verb {
        Verb::Leave => {
            forget(ctx, &peer);
            unwatch(ctx, &peer);
        }
        Verb::Translate => return translate::<F>(ctx, (owner, Call::Connect), &peer, number),
        Verb::Refuse => {
            let own = if peer.addr.is_v4() { Addr::v4([127, 0, 0, 1]) } else { LOOPBACK_V6 };
            redirect::<F>(ctx, &own, Port::ZERO);
        }
        Verb::Deny => return deny(DropReason::from_number(number)),
    }
    PROCEED
}

#[inline(always)]
fn sendmsg<F: SockAddr>(ctx: &SockAddrContext) -> i32 {
    let peer = peer::<F>(ctx);
    let Some(owner) = owner(ctx, peer.proto) else { return PROCEED };
    let known = memory(ctx).and_then(|memory| datagram::known(memory, &peer));
    let Decision { verb, number } = decide::<F>(ctx, owner, &peer, known);
    match verb {
        // The kernel also asks for a connected IPv6 socket whose peer is IPv4, and names the backend.
        Verb::Leave if is_connected(ctx) => {}
        Verb::Leave => forget(ctx, &peer),
        Verb::Translate => return translate::<F>(ctx, (owner, Call::Send), &peer, number),
        Verb::Refuse => return FAIL,
        Verb::Deny => return deny(DropReason::from_number(number)),
    }
    PROCEED
}

/// Sends the socket to the backend, and remembers that. Where the kernel has no memory for it, a pod's socket is left to
/// the packet path; one of the host's goes all the same, and is shown the backend's address.
#[inline(always)]
fn translate<F: SockAddr>(
    ctx: &SockAddrContext,
    (owner, call): (Owner, Call),
    peer: &Peer,
    backend: u32,
) -> i32 {
    let Some(translation) = socket::translation(&Kernel, peer, backend) else {
        return deny(DropReason::NoBackend);
    };
    if call == Call::Connect && peer.proto != Proto::TCP {
        // Where so many were connected since the agent looked last that there is no room, it goes without being watched.
        let _unwatched = CONNECTED_SOCKETS.insert(&cookie(ctx), &translation, u64::from(BPF_ANY));
    }
    if remember(ctx, peer, &translation) || owner == Owner::Host {
        redirect::<F>(ctx, &translation.backend, translation.backend_port);
    }
    PROCEED
}

#[inline(always)]
fn deny(reason: DropReason) -> i32 {
    count(reason);
    FAIL
}

/// The agent need not take the socket from a backend any more; that it was to is seldom.
#[inline(always)]
fn unwatch(ctx: &SockAddrContext, peer: &Peer) {
    if peer.proto != Proto::TCP {
        let _unwatched = CONNECTED_SOCKETS.remove(&cookie(ctx));
    }
}

#[inline(always)]
fn cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the context is the program's own.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

/// What a datagram socket remembers, if anything.
#[inline(always)]
fn memory<'a>(ctx: &SockAddrContext) -> Option<&'a mut Translations> {
    // SAFETY: null or the socket's own storage, which lives as long as the socket; system calls on a socket that run
    // programs do so one after the other.
    unsafe { DATAGRAM_SOCKETS.get_ptr_mut(ctx).as_mut() }
}

/// As [`memory`], of a stream socket.
#[inline(always)]
fn connection<'a>(ctx: &SockAddrContext) -> Option<&'a mut Translation> {
    // SAFETY: as above.
    unsafe { SOCKETS.get_ptr_mut(ctx).as_mut() }
}

/// `false` where the kernel has no memory for it.
#[inline(always)]
fn remember(ctx: &SockAddrContext, peer: &Peer, translation: &Translation) -> bool {
    if peer.proto == Proto::TCP {
        // SAFETY: null or the socket's own storage; it may hold what the socket was connected to before.
        let value = unsafe { SOCKETS.get_or_insert_ptr_mut(ctx, None).as_mut() };
        return value.map(|value| *value = *translation).is_some();
    }
    // SAFETY: as above.
    let memory = unsafe { DATAGRAM_SOCKETS.get_or_insert_ptr_mut(ctx, None).as_mut() };
    memory.map(|memory| datagram::keep(memory, translation)).is_some()
}

/// The socket goes to the peer that it named, whatever it was translated to before.
#[inline(always)]
fn forget(ctx: &SockAddrContext, peer: &Peer) {
    if peer.proto == Proto::TCP {
        if let Some(known) = connection(ctx) {
            known.index = 0;
        }
    } else if let Some(memory) = memory(ctx) {
        datagram::forget(memory, peer.addr, peer.port);
    }
}

/// getpeername and recvmsg: the address that the application is about to see.
#[inline(always)]
fn show<F: SockAddr>(ctx: &SockAddrContext) -> i32 {
    let peer = peer::<F>(ctx);
    let seen = if peer.proto == Proto::TCP {
        connection(ctx).and_then(|known| socket::seen(known, peer.addr, peer.port))
    } else {
        memory(ctx).and_then(|memory| datagram::seen(memory, peer.addr, peer.port))
    };
    if let Some((addr, port)) = seen {
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
