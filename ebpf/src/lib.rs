//! The datapath as a library: a packet and the tables in, `Result<Verdict, DropReason>` out.
//!
//! ```text
//!            pod's eth0
//!                |  (TC ingress on the host's end: pod::leaving)
//!   parse -> conntrack -- known flow ----------------------------+
//!                |                                               v
//!                +-- an ICMP error about a known flow: icmp;  a fragment: fragment
//!                +-- lb: frontend -> slot -> backend -> judge -> track -> nat -> route: local pod | kernel
//!                +-- of no service, from or to a pod with policies: judge -> track -> route
//!                          |
//!                          +-- no endpoints: reject (RST, port unreachable)
//!
//!            node's stack
//!                |  (TC egress on the host's end: pod::entering_pod)
//!   parse -> conntrack -- reply of a service flow -> nat -> pod's eth0
//!                +-- unknown, to a pod with policies: judge -> track -> pod's eth0
//!
//!            a device of the node
//!                |  (XDP, where it is on: xdp) a known flow that leaves by the same device -> nat -> back out
//!                |  (TC ingress: device::arriving) all else: conntrack, service, nat, route; TC egress as a pod's
//!
//!            the tunnel's device
//!                |  (TC egress: as a device's, then tunnel: which node; TC ingress: as a device's)
//!
//!            connect(2), sendmsg(2)
//!                |  (cgroup programs: socket, datagram)
//!                +-- lb: frontend -> slot -> backend -> the socket's destination
//! ```
//!
//! Nothing here knows aya or the kernel: a packet is a [`packet::Packet`], the maps are [`tables::Tables`], and tests
//! run all of it on the host for both families. `object/` implements both traits for the kernel and holds all unsafe.
//! Everything is generic and inlined into one function for each of the [`steps`] and one for each program, so it costs
//! nothing there.
#![cfg_attr(target_arch = "bpf", no_std)]
#![forbid(unsafe_code)]

pub mod conntrack;
pub mod datagram;
pub mod device;
pub mod fragment;
#[cfg(not(target_arch = "bpf"))]
pub mod frame;
pub mod icmp;
pub mod judge;
pub mod lb;
pub mod live;
pub mod masquerade;
pub mod mtu;
pub mod nat;
#[cfg(not(target_arch = "bpf"))]
pub mod noise;
pub mod packet;
pub mod parse;
pub mod pod;
pub mod policy;
pub mod reject;
pub mod relay;
pub mod route;
pub mod service;
pub mod shadow;
pub mod socket;
pub mod source;
pub mod steps;
pub mod tables;
pub mod tunnel;
pub mod xdp;
