//! Every map, and the library's view of them. Sizes here are defaults: the agent sets them when it loads.

use core::arch::asm;

use aya_ebpf::Global;
use aya_ebpf::bindings::{BPF_ANY, BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, BPF_NOEXIST};
use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, SkStorage};
use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_ktime_get_coarse_ns, bpf_ktime_get_ns};
use aya_ebpf::macros::btf_map;
use ferroflow_common::abi::conntrack::{Entry, Tuple};
use ferroflow_common::abi::endpoint::Endpoint;
use ferroflow_common::abi::fragment::{Datagram, DatagramKey, HeldFragment};
use ferroflow_common::abi::lb::{
    Affinity, AffinityKey, Backend, Connections, Frontend, FrontendKey, ServiceClient, ServiceName,
    SourceRange, SourceRangeKey,
};
use ferroflow_common::abi::node::{Masquerade, NodeAddress, Settings};
use ferroflow_common::abi::policy::{Class, Meaning, PolicyKey, PortRange, RangeKey, Rules, Verdict};
use ferroflow_common::abi::relay::{NodeNumber, Relay};
use ferroflow_common::abi::socket::{Translation, Translations};
use ferroflow_common::abi::state::AgentState;
use ferroflow_common::abi::tunnel::Tunnel;
use ferroflow_common::addr::Addr;
use ferroflow_common::family::{Family, V4, V6};
use ferroflow_common::verdict::{DROP_ROWS, DropReason};
use ferroflow_ebpf::judge::Judges;
use ferroflow_ebpf::policy::{Policies, Wanted};
use ferroflow_ebpf::tables::{Aligned, Datagrams, InsertError, OnConflict, Services, Tables, Tracked};
use ferroflow_ebpf::tunnel::{NodeTunnels, Tunnels};

use crate::direct;
use crate::skb::Skb;
use crate::steps;

/// The kernel has a clock that only reads what the last tick wrote (5.11, commit d05512618056): exact enough for
/// seconds, and a seventh of the cost. Where it has not, the verifier drops the call with this constant.
#[unsafe(no_mangle)]
static COARSE_CLOCK: Global<u8> = Global::new(0);

const MMAP: usize = BPF_F_MMAPABLE as usize;
/// Control-plane tables take memory as they fill.
const ON_DEMAND: usize = BPF_F_NO_PREALLOC as usize;

#[btf_map(name = "frontends", pin_by_name)]
static FRONTENDS: HashMap<FrontendKey, Frontend, 131_072, ON_DEMAND> = HashMap::new();

#[btf_map(name = "source_ranges", pin_by_name)]
static SOURCE_RANGES: LpmTrie<ServiceClient, SourceRange, 65_536> = LpmTrie::new();

#[btf_map(name = "affinity", pin_by_name)]
static AFFINITY: LruHashMap<AffinityKey, Affinity, 65_536> = LruHashMap::new();

#[btf_map(name = "slots", pin_by_name)]
static SLOTS: Array<u32, 524_288, MMAP> = Array::new();

#[btf_map(name = "backends", pin_by_name)]
static BACKENDS: Array<Backend, 131_072, MMAP> = Array::new();

#[btf_map(name = "connections", pin_by_name)]
static CONNECTIONS: Array<Connections, 131_072, MMAP> = Array::new();

#[btf_map(name = "services", pin_by_name)]
static SERVICES: HashMap<u32, ServiceName, 131_072, ON_DEMAND> = HashMap::new();

#[btf_map(name = "ipcache", pin_by_name)]
static IPCACHE: HashMap<Addr, Class, 131_072, ON_DEMAND> = HashMap::new();

#[btf_map(name = "ipcache_ranges", pin_by_name)]
static IPCACHE_RANGES: LpmTrie<Addr, Class, 65_536> = LpmTrie::new();

#[btf_map(name = "policy", pin_by_name)]
static POLICY: HashMap<PolicyKey, Rules, 131_072, ON_DEMAND> = HashMap::new();

#[btf_map(name = "port_ranges", pin_by_name)]
static PORT_RANGES: Array<PortRange, 131_072, MMAP> = Array::new();

#[btf_map(name = "policy_sets", pin_by_name)]
static POLICY_SETS: HashMap<u32, Meaning, 16_384, ON_DEMAND> = HashMap::new();

#[btf_map(name = "peer_classes", pin_by_name)]
static PEER_CLASSES: HashMap<Class, Meaning, 65_536, ON_DEMAND> = HashMap::new();

#[btf_map(name = "endpoints", pin_by_name)]
static ENDPOINTS: HashMap<Addr, Endpoint, 4_096, ON_DEMAND> = HashMap::new();

#[btf_map(name = "tunnels", pin_by_name)]
static TUNNELS: LpmTrie<Addr, Tunnel, 65_536> = LpmTrie::new();

#[btf_map(name = "node_tunnels", pin_by_name)]
static NODE_TUNNELS: HashMap<Addr, Tunnel, 65_536, ON_DEMAND> = HashMap::new();

#[btf_map(name = "node_addresses", pin_by_name)]
static NODE_ADDRESSES: HashMap<Addr, NodeAddress, 1_024, ON_DEMAND> = HashMap::new();

#[btf_map(name = "relay_nodes", pin_by_name)]
static RELAY_NODES: HashMap<NodeNumber, Addr, 16_384, ON_DEMAND> = HashMap::new();

#[btf_map(name = "relay_peers", pin_by_name)]
static RELAY_PEERS: HashMap<Addr, NodeNumber, 65_536, ON_DEMAND> = HashMap::new();

#[btf_map(name = "masquerade", pin_by_name)]
static MASQUERADE: Array<Masquerade, 1, MMAP> = Array::new();

#[btf_map(name = "settings", pin_by_name)]
static SETTINGS: Array<Settings, 1, MMAP> = Array::new();

#[btf_map(name = "conntrack_v4", pin_by_name)]
static CONNTRACK_V4: LruHashMap<Tuple<[u8; 4]>, Entry, 262_144> = LruHashMap::new();

#[btf_map(name = "conntrack_v6", pin_by_name)]
static CONNTRACK_V6: LruHashMap<Tuple<[u8; 16]>, Entry, 131_072> = LruHashMap::new();

#[btf_map(name = "datagrams", pin_by_name)]
static DATAGRAMS: LruHashMap<DatagramKey, Datagram, 16_384> = LruHashMap::new();

#[btf_map(name = "noted_datagram", pin_by_name)]
static NOTED_DATAGRAM: PerCpuArray<DatagramKey, 1> = PerCpuArray::new();

#[btf_map(name = "held_fragments", pin_by_name)]
static HELD_FRAGMENTS: LruHashMap<DatagramKey, HeldFragment, 256> = LruHashMap::new();

#[btf_map(name = "held_buffer", pin_by_name)]
static HELD_BUFFER: PerCpuArray<HeldFragment, 1> = PerCpuArray::new();

#[btf_map(name = "sockets", pin_by_name)]
pub(crate) static SOCKETS: SkStorage<Translation> = SkStorage::new();

#[btf_map(name = "datagram_sockets", pin_by_name)]
pub(crate) static DATAGRAM_SOCKETS: SkStorage<Translations> = SkStorage::new();

#[btf_map(name = "connected_sockets", pin_by_name)]
pub(crate) static CONNECTED_SOCKETS: HashMap<u64, Translation, 65_536, ON_DEMAND> = HashMap::new();

#[btf_map(name = "drops", pin_by_name)]
static DROPS: PerCpuArray<u64, DROP_ROWS> = PerCpuArray::new();

/// No program reads this map, `services`, `policy_sets` or `peer_classes`: the object declares them so that they are created, typed and pinned with
/// the others.
#[btf_map(name = "agent", pin_by_name)]
static AGENT: Array<AgentState, 1> = Array::new();

/// Counts a dropped packet, or a system call that fails for the same reason.
#[inline(always)]
pub(crate) fn count(reason: DropReason) {
    if let Some(count) = DROPS.get_ptr_mut(reason as u32) {
        // SAFETY: the row is this CPU's own; where one program interrupts another a count may be lost.
        unsafe { *count += 1 };
    }
}

/// The kernel's maps behind the library's traits.
pub(crate) struct Kernel;

impl Services for Kernel {
    #[inline(always)]
    fn frontend(&self, key: &FrontendKey) -> Option<Frontend> {
        // SAFETY: copied before anything else is called; the agent replaces a row by a new one, never in place.
        unsafe { FRONTENDS.get(key) }.copied()
    }

    #[inline(always)]
    fn node_address(&self, addr: &Addr) -> Option<NodeAddress> {
        // SAFETY: copied before anything else is called.
        unsafe { NODE_ADDRESSES.get(addr) }.copied()
    }

    #[inline(always)]
    fn is_service_address(&self, addr: &Addr) -> bool {
        SETTINGS.get(0).is_some_and(|settings| settings.is_service_address(addr))
    }

    #[inline(always)]
    fn is_elsewhere(&self, addr: &Addr) -> bool {
        TUNNELS.get(&Key::new(RangeKey::EVERY_BIT, *addr)).is_some()
    }

    #[inline(always)]
    fn settings(&self) -> u32 {
        SETTINGS.get(0).map_or(0, |settings| settings.flags)
    }

    #[inline(always)]
    fn epoch(&self) -> u32 {
        SETTINGS.get(0).map_or(0, |settings| settings.epoch)
    }

    #[inline(always)]
    fn allows(&self, client: &ServiceClient) -> bool {
        SOURCE_RANGES
            .get(&Key::new(SourceRangeKey::EVERY_BIT, *client))
            .is_some_and(|verdict| *verdict == SourceRangeKey::ALLOW)
    }

    #[inline(always)]
    fn remembered(&self, key: &AffinityKey) -> Option<Affinity> {
        // SAFETY: copied before anything else is called.
        unsafe { AFFINITY.get(key) }.copied()
    }

    #[inline(always)]
    fn remember(&self, key: &AffinityKey, choice: &Affinity) {
        // Where the kernel refuses, the client's next connection chooses anew: no reason to fail this one.
        let _forgotten = AFFINITY.insert(key, choice, u64::from(BPF_ANY));
    }

    #[inline(always)]
    fn slot(&self, slot: u32) -> Option<u32> {
        SLOTS.get(slot).copied()
    }

    #[inline(always)]
    fn backend(&self, index: u32) -> Option<Backend> {
        BACKENDS.get(index).copied()
    }

    #[inline(always)]
    fn connections(&self, index: u32) -> Connections {
        CONNECTIONS.get(index).copied().unwrap_or(0)
    }

    #[inline(always)]
    fn connect(&self, index: u32) {
        if let Some(count) = CONNECTIONS.get_ptr_mut(index) {
            // SAFETY: a row of the array, which lives as long as the program; the addition is atomic.
            unsafe { asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) count, in(reg) 1u64, options(nostack)) };
        }
    }

    #[inline(always)]
    fn node(&self, number: NodeNumber) -> Option<Addr> {
        // SAFETY: copied before anything else is called.
        unsafe { RELAY_NODES.get(&number) }.copied()
    }

    #[inline(always)]
    fn is_peer(&self, addr: &Addr) -> bool {
        // SAFETY: copied before anything else is called.
        unsafe { RELAY_PEERS.get(addr) }.is_some_and(|number| *number != 0)
    }

    #[inline(always)]
    fn relays(&self) -> bool {
        self.relay().device != 0
    }
}

impl Kernel {
    /// How packets are relayed to other nodes.
    #[inline(always)]
    pub(crate) fn relay(&self) -> Relay {
        SETTINGS.get(0).map_or(Relay { device: 0, room: 0, vni: 0 }, |settings| settings.relay)
    }
}

impl Policies for Kernel {
    #[inline(always)]
    fn class(&self, addr: &Addr) -> Option<Class> {
        // SAFETY: copied before anything else is called.
        unsafe { IPCACHE.get(addr) }.copied()
    }

    #[inline(always)]
    fn range_class(&self, addr: &Addr) -> Option<Class> {
        IPCACHE_RANGES.get(&Key::new(RangeKey::EVERY_BIT, *addr)).copied()
    }

    #[inline(always)]
    fn rules(&self, key: &PolicyKey) -> Option<Rules> {
        // SAFETY: copied before anything else is called; the agent replaces a row by a new one, never in place.
        unsafe { POLICY.get(key) }.copied()
    }

    #[inline(always)]
    fn port_range(&self, row: u32) -> Option<PortRange> {
        PORT_RANGES.get(row).copied()
    }

    #[inline(always)]
    fn forget(&self, number: u32, unknown: u32) -> u32 {
        direct::forgotten(number, unknown)
    }
}

impl Judges for Kernel {
    #[inline(always)]
    fn would_drop(&self, reason: DropReason) {
        count(reason);
        steps::log(reason as u32);
    }

    #[inline(always)]
    fn weigh(&self, set: u32, class: Class, wanted: Wanted) -> Verdict {
        Verdict::from_row(steps::weigh(set, class, wanted.place()) as u32)
    }
}

impl Tunnels for Kernel {
    #[inline(always)]
    fn tunnel(&self, addr: &Addr) -> Option<Tunnel> {
        TUNNELS.get(&Key::new(RangeKey::EVERY_BIT, *addr)).copied()
    }
}

/// A row of a connection table.
pub(crate) struct Row(*mut Entry);

impl Tracked for Row {
    #[inline(always)]
    fn load(&self) -> Entry {
        // SAFETY: a lookup returned it; LRU memory is never freed while a program runs, only reused, and any bytes
        // are an `Entry`.
        unsafe { self.0.read() }
    }

    #[inline(always)]
    fn store_state(&self, state: u8, expires: u32) {
        // SAFETY: as above; should the row have been reused for another flow, that flow's state is a moment wrong.
        let entry = unsafe { &mut *self.0 };
        entry.state = state;
        entry.expires = expires;
    }

    #[inline(always)]
    fn store_flags(&self, flags: u8) {
        // SAFETY: as above.
        let entry = unsafe { &mut *self.0 };
        entry.flags = flags;
    }

    #[inline(always)]
    fn store_epoch(&self, epoch: u32) {
        // SAFETY: as above.
        let entry = unsafe { &mut *self.0 };
        entry.epoch = epoch;
    }
}

/// Which connection table a family's flows are in.
pub(crate) trait Flows: Family {
    fn lookup(tuple: &Aligned<Tuple<Self::Bytes>>) -> Option<*mut Entry>;
    fn insert(tuple: &Aligned<Tuple<Self::Bytes>>, entry: &Entry, flags: u64) -> Result<(), i32>;
    fn remove(tuple: &Aligned<Tuple<Self::Bytes>>);
    /// The node's address of this family.
    fn own(masquerade: &Masquerade) -> Self::Bytes;
}

macro_rules! flows {
    ($family:ty, $map:ident, $own:ident) => {
        impl Flows for $family {
            #[inline(always)]
            fn lookup(tuple: &Aligned<Tuple<Self::Bytes>>) -> Option<*mut Entry> {
                $map.get_ptr_mut(&tuple.0)
            }

            #[inline(always)]
            fn insert(tuple: &Aligned<Tuple<Self::Bytes>>, entry: &Entry, flags: u64) -> Result<(), i32> {
                $map.insert(&tuple.0, entry, flags)
            }

            #[inline(always)]
            fn remove(tuple: &Aligned<Tuple<Self::Bytes>>) {
                // That it is gone already is what was wanted.
                let _gone = $map.remove(&tuple.0);
            }

            #[inline(always)]
            fn own(masquerade: &Masquerade) -> Self::Bytes {
                Self::bytes(&masquerade.$own)
            }
        }
    };
}

flows!(V4, CONNTRACK_V4, v4);
flows!(V6, CONNTRACK_V6, v6);

const EEXIST: i32 = -17;

impl Datagrams<Skb> for Kernel {
    #[inline(always)]
    fn datagram(&self, key: &DatagramKey) -> Option<Datagram> {
        // SAFETY: copied before anything else is called.
        unsafe { DATAGRAMS.get(key) }.copied()
    }

    #[inline(always)]
    fn remember_datagram(&self, key: &DatagramKey, datagram: &Datagram) -> Result<(), InsertError> {
        DATAGRAMS.insert(key, datagram, u64::from(BPF_ANY)).map_err(|_errno| InsertError::Refused)
    }

    #[inline(always)]
    fn note(&self, key: &DatagramKey) {
        if let Some(note) = NOTED_DATAGRAM.get_ptr_mut(0) {
            // SAFETY: the row is this CPU's own, and a program is not interrupted by another one of its kind.
            unsafe { *note = *key };
        }
    }

    #[inline(always)]
    fn noted(&self) -> Option<DatagramKey> {
        NOTED_DATAGRAM.get(0).copied()
    }

    #[inline(always)]
    fn hold(&self, packet: &Skb, key: &DatagramKey) -> Result<(), DropReason> {
        let buffer = HELD_BUFFER.get_ptr_mut(0).ok_or(DropReason::EarlyFragment)?;
        // SAFETY: the row is this CPU's own, and a program is not interrupted by another one of its kind.
        let buffer = unsafe { &mut *buffer };
        buffer.length = packet.copy_to(&mut buffer.bytes).ok_or(DropReason::EarlyFragment)?;
        HELD_FRAGMENTS.insert(key, &*buffer, u64::from(BPF_ANY)).map_err(|_errno| DropReason::EarlyFragment)
    }

    #[inline(always)]
    fn again(&self, packet: &mut Skb) -> Result<(), DropReason> {
        packet.send_round()
    }

    #[inline(always)]
    fn release(&self, packet: &mut Skb, key: &DatagramKey) -> Result<bool, DropReason> {
        // SAFETY: LRU memory is never freed while a program runs, only reused: should that happen amid the copying, the
        // datagram's checksum tells.
        let Some(held) = (unsafe { HELD_FRAGMENTS.get(key) }) else { return Ok(false) };
        let replaced = packet.replace(&held.bytes, held.length);
        // That it is gone already is what was wanted.
        let _gone = HELD_FRAGMENTS.remove(key);
        replaced.map(|()| true)
    }
}

impl<F: Flows> Tables<F> for Kernel {
    type Tracked = Row;

    #[inline(always)]
    fn tracked(&self, tuple: &Aligned<Tuple<F::Bytes>>) -> Option<Row> {
        F::lookup(tuple).map(Row)
    }

    #[inline(always)]
    fn track(
        &self,
        tuple: &Aligned<Tuple<F::Bytes>>,
        entry: &Entry,
        conflict: OnConflict,
    ) -> Result<(), InsertError> {
        let flags = match conflict {
            OnConflict::Fail => BPF_NOEXIST,
            OnConflict::Replace => BPF_ANY,
        };
        match F::insert(tuple, entry, u64::from(flags)) {
            Ok(()) => Ok(()),
            Err(EEXIST) => Err(InsertError::Exists),
            Err(_) => Err(InsertError::Refused),
        }
    }

    #[inline(always)]
    fn untrack(&self, tuple: &Aligned<Tuple<F::Bytes>>) {
        F::remove(tuple);
    }

    #[inline(always)]
    fn endpoint(&self, addr: &Addr) -> Option<Endpoint> {
        // SAFETY: copied before anything else is called.
        unsafe { ENDPOINTS.get(addr) }.copied()
    }

    #[inline(always)]
    fn masquerade(&self) -> F::Bytes {
        F::own(MASQUERADE.get(0).unwrap_or(&Masquerade { v4: Addr::UNSPECIFIED, v6: Addr::UNSPECIFIED }))
    }

    #[inline(always)]
    fn now(&self) -> u32 {
        let nanoseconds = if COARSE_CLOCK.load() != 0 {
            // SAFETY: the helper takes nothing and cannot fail.
            unsafe { bpf_ktime_get_coarse_ns() }
        } else {
            // SAFETY: as above.
            unsafe { bpf_ktime_get_ns() }
        };
        (nanoseconds / 1_000_000_000) as u32
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: as above.
        unsafe { bpf_get_prandom_u32() }
    }
}

impl NodeTunnels for Kernel {
    #[inline(always)]
    fn node_tunnel(&self, addr: &Addr) -> Option<Tunnel> {
        // SAFETY: copied before anything else is called; the agent replaces a row by a new one, never in place.
        unsafe { NODE_TUNNELS.get(addr) }.copied()
    }
}
