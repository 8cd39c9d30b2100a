//! The maps as the datapath sees them, and ordinary ones for tests.

use core::ops::Deref;

use ferroflow_common::abi::conntrack::{Entry, Tuple};
use ferroflow_common::abi::endpoint::Endpoint;
use ferroflow_common::abi::fragment::{Datagram, DatagramKey};
use ferroflow_common::abi::lb::{
    Affinity, AffinityKey, Backend, Connections, Frontend, FrontendKey, ServiceClient,
};
use ferroflow_common::abi::node::NodeAddress;
use ferroflow_common::abi::relay::NodeNumber;
use ferroflow_common::addr::Addr;
use ferroflow_common::family::Family;
use ferroflow_common::verdict::DropReason;

/// A flow's key on the stack. It is bytes and has no alignment of its own; without one the compiler would build it,
/// and take it apart, byte by byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct Aligned<T>(pub T);

impl<T> Deref for Aligned<T> {
    type Target = T;

    #[inline(always)]
    fn deref(&self) -> &T {
        &self.0
    }
}

/// The load-balancing tables.
pub trait Services {
    fn frontend(&self, key: &FrontendKey) -> Option<Frontend>;
    /// This node's own address, if it is one.
    fn node_address(&self, addr: &Addr) -> Option<NodeAddress>;
    /// Whether the address is in a range of cluster IPs (rule 19).
    fn is_service_address(&self, addr: &Addr) -> bool;
    /// Whether the address is of a range of another node's pods to which this node has a route of its own: packets to and
    /// from there go past the stack, in both directions or in none, or its packet filter takes flows for broken.
    fn is_elsewhere(&self, addr: &Addr) -> bool;
    /// The bits of [`Settings::flags`](ferroflow_common::abi::node::Settings::flags).
    fn settings(&self) -> u32;
    /// See [`Settings::epoch`](ferroflow_common::abi::node::Settings::epoch).
    fn epoch(&self) -> u32;
    /// Whether a range that the service admits has the client (rule 22).
    fn allows(&self, client: &ServiceClient) -> bool;
    fn remembered(&self, key: &AffinityKey) -> Option<Affinity>;
    fn remember(&self, key: &AffinityKey, choice: &Affinity);
    /// `None` past the end of the array.
    fn slot(&self, slot: u32) -> Option<u32>;
    /// `None` past the end of the array; a row that was never used is all zeros.
    fn backend(&self, index: u32) -> Option<Backend>;
    /// How many connections the backend has open; 0 past the end of the array.
    fn connections(&self, index: u32) -> Connections;
    /// Counts one more.
    fn connect(&self, index: u32);
    /// The address by which packets are relayed to the node with this number.
    fn node(&self, number: NodeNumber) -> Option<Addr>;
    /// Whether a node of the cluster has the address.
    fn is_peer(&self, addr: &Addr) -> bool;
    /// Whether this node relays packets.
    fn relays(&self) -> bool;
}

/// A live entry of the connection table. Two CPUs may write it at once: both write what they saw, each field is one
/// machine word or byte, and a lost update is made again by the next packet.
pub trait Tracked {
    fn load(&self) -> Entry;
    fn store_state(&self, state: u8, expires: u32);
    fn store_flags(&self, flags: u8);
    fn store_epoch(&self, epoch: u32);
}

/// Why the connection table took no entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InsertError {
    /// The tuple is there already.
    Exists,
    /// The kernel's refusal (rule 36).
    Refused,
}

/// What an insert does where the tuple is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnConflict {
    Fail,
    Replace,
}

/// Everything a packet of one family meets.
pub trait Tables<F: Family>: Services {
    type Tracked: Tracked;

    fn tracked(&self, tuple: &Aligned<Tuple<F::Bytes>>) -> Option<Self::Tracked>;
    /// # Errors
    /// See [`InsertError`].
    fn track(
        &self,
        tuple: &Aligned<Tuple<F::Bytes>>,
        entry: &Entry,
        conflict: OnConflict,
    ) -> Result<(), InsertError>;
    fn untrack(&self, tuple: &Aligned<Tuple<F::Bytes>>);
    fn endpoint(&self, addr: &Addr) -> Option<Endpoint>;
    /// This node's address that stands in for clients; unspecified where it has none of the family.
    fn masquerade(&self) -> F::Bytes;
    /// Seconds of `CLOCK_MONOTONIC`.
    fn now(&self) -> u32;
    fn random(&self) -> u32;
}

/// Fragmented datagrams, and the packets that wait for their first fragment.
pub trait Datagrams<P> {
    fn datagram(&self, key: &DatagramKey) -> Option<Datagram>;
    /// # Errors
    /// See [`InsertError`].
    fn remember_datagram(&self, key: &DatagramKey, datagram: &Datagram) -> Result<(), InsertError>;
    /// Keeps the key for later steps of the same packet.
    fn note(&self, key: &DatagramKey);
    fn noted(&self) -> Option<DatagramKey>;
    /// Keeps a copy of the packet.
    ///
    /// # Errors
    /// [`DropReason::EarlyFragment`] where it is too long or the table takes it not.
    fn hold(&self, packet: &P, key: &DatagramKey) -> Result<(), DropReason>;
    /// Sends a copy of the packet to where it came from: it arrives once more, behind what has arrived since.
    ///
    /// # Errors
    /// [`DropReason::EarlyFragment`] where the kernel refuses.
    fn again(&self, packet: &mut P) -> Result<(), DropReason>;
    /// Turns the packet into the one that was kept, which is kept no longer; `false` where it is gone.
    ///
    /// # Errors
    /// [`DropReason::EarlyFragment`] where the kernel refuses to reshape the packet.
    fn release(&self, packet: &mut P, key: &DatagramKey) -> Result<bool, DropReason>;
}

#[cfg(not(target_arch = "bpf"))]
pub mod fake;
