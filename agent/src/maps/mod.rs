//! The tables of the datapath, typed: what `reconcile` writes and the CLI reads.
//!
//! Two implementations: `kernel` (pinned BPF maps) and `fake` (ordinary maps that may fail on purpose).

mod batch;
pub mod fake;
pub mod kernel;
pub mod transfer;

use std::hash::Hash;

use ferroflow_common::abi::endpoint::Endpoint;
use ferroflow_common::abi::lb::{
    Backend, Connections, Frontend, FrontendKey, ServiceName, Slot, SourceRange, SourceRangeKey,
};
use ferroflow_common::abi::node::{Masquerade, NodeAddress, Settings, Unmasqueraded};
use ferroflow_common::abi::policy::{Class, Meaning, PolicyKey, PortRange, RangeKey, Rules};
use ferroflow_common::abi::relay::NodeNumber;
use ferroflow_common::abi::socket::Translation;
use ferroflow_common::abi::tunnel::Tunnel;
use ferroflow_common::addr::Addr;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// What may stand in a map: plain bytes of a fixed size.
pub trait Plain: FromBytes + IntoBytes + Immutable + Copy + 'static {}

impl<T: FromBytes + IntoBytes + Immutable + Copy + 'static> Plain for T {}

/// A hash table; its rows are replaced one by one, each atomically.
pub trait HashTable {
    const NAME: &'static str;
    type Key: Plain + Ord + Hash + std::fmt::Debug;
    type Value: Plain + PartialEq + std::fmt::Debug;
}

/// An array whose rows always exist and are zero at first.
pub trait ArrayTable {
    const NAME: &'static str;
    type Value: Plain + PartialEq + std::fmt::Debug;
}

macro_rules! tables {
    ($kind:ident: $($(#[$doc:meta])* $table:ident = $name:literal, $($associated:ident = $ty:ty),+;)*) => {
        $($(#[$doc])* #[derive(Debug)] pub enum $table {}
        impl $kind for $table {
            const NAME: &'static str = $name;
            $(type $associated = $ty;)+
        })*
    };
}

tables! { HashTable:
    Frontends = "frontends", Key = FrontendKey, Value = Frontend;
    /// Service id -> name.
    Services = "services", Key = u32, Value = ServiceName;
    /// A trie to the programs; here its prefixes are written and removed like any other rows.
    SourceRanges = "source_ranges", Key = SourceRangeKey, Value = SourceRange;
    /// This node's own addresses.
    NodeAddresses = "node_addresses", Key = Addr, Value = NodeAddress;
    /// The node that has a range of pods. A trie, like `SourceRanges`.
    Tunnels = "tunnels", Key = RangeKey, Value = Tunnel;
    /// The way to another node itself, by its address.
    NodeTunnels = "node_tunnels", Key = Addr, Value = Tunnel;
    /// The address by which packets are relayed to a node.
    RelayNodes = "relay_nodes", Key = NodeNumber, Value = Addr;
    /// Whose packets may be relayed here.
    RelayPeers = "relay_peers", Key = Addr, Value = NodeNumber;
    /// What pods leave by, by interface.
    ExitAddresses = "exit_addresses", Key = u32, Value = Masquerade;
    /// A trie, like `SourceRanges`.
    UnmasqueradedRanges = "unmasqueraded", Key = RangeKey, Value = Unmasqueraded;
    /// The class of an address.
    Ipcache = "ipcache", Key = Addr, Value = Class;
    /// A trie, like `SourceRanges`.
    IpcacheRanges = "ipcache_ranges", Key = RangeKey, Value = Class;
    Policy = "policy", Key = PolicyKey, Value = Rules;
    /// Set -> which one it is.
    PolicySets = "policy_sets", Key = u32, Value = Meaning;
    /// Class -> which one it is.
    PeerClasses = "peer_classes", Key = Class, Value = Meaning;
    /// Cookie -> what the host's socket was connected through. The programs write it.
    ConnectedSockets = "connected_sockets", Key = u64, Value = Translation;
    /// Local pods by address.
    Endpoints = "endpoints", Key = Addr, Value = Endpoint;
}

tables! { ArrayTable:
    Slots = "slots", Value = Slot;
    Backends = "backends", Value = Backend;
    /// By backend index.
    ConnectionCounts = "connections", Value = Connections;
    PortRanges = "port_ranges", Value = PortRange;
    /// One row.
    Masquerades = "masquerade", Value = Masquerade;
    /// One row.
    SettingsRow = "settings", Value = Settings;
}

/// The rows of a hash table, in no order.
pub type Rows<T> = Vec<(<T as HashTable>::Key, <T as HashTable>::Value)>;

/// The tables as a whole. Every write is counted by the implementation, successful ones only.
#[expect(clippy::len_without_is_empty, reason = "an array has as many rows as it was made with")]
pub trait Maps {
    /// All rows, in no order.
    ///
    /// # Errors
    /// The kernel's refusal; the table is as it was.
    fn dump<T: HashTable>(&self) -> Result<Rows<T>, MapError>;

    /// Inserts or replaces one row.
    ///
    /// # Errors
    /// [`MapError::Full`] or the kernel's refusal; the table is as it was.
    fn put<T: HashTable>(&mut self, key: &T::Key, value: &T::Value) -> Result<(), MapError>;

    /// Removes one row; that it was not there is no error.
    ///
    /// # Errors
    /// The kernel's refusal; the table is as it was.
    fn delete<T: HashTable>(&mut self, key: &T::Key) -> Result<(), MapError>;

    /// How many rows an array has.
    fn len<T: ArrayTable>(&self) -> u32;

    /// # Errors
    /// [`MapError::Index`] where the array is shorter.
    fn read<T: ArrayTable>(&self, index: u32) -> Result<T::Value, MapError>;

    /// # Errors
    /// [`MapError::Index`] where the array is shorter, or the kernel's refusal.
    fn write<T: ArrayTable>(&mut self, index: u32, value: &T::Value) -> Result<(), MapError>;

    /// Rows written or deleted since this was opened.
    fn writes(&self) -> u64;
}

#[derive(Debug, thiserror::Error)]
pub enum MapError {
    #[error("map `{map}` is full: raise its size")]
    Full { map: &'static str },
    #[error("map `{map}` has {len} rows, row {index} was asked for")]
    Index { map: &'static str, index: u32, len: u32 },
    #[error("map `{map}`: {call}: {source}")]
    Kernel { map: &'static str, call: &'static str, source: std::io::Error },
    #[error("map `{map}` is not pinned under {dir}: no agent of this version has run with this --bpffs")]
    Missing { map: &'static str, dir: std::path::PathBuf },
}
