//! Ordinary maps behind the traits, filled by tests.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

use ferroflow_common::abi::conntrack::{Entry, Tuple};
use ferroflow_common::abi::endpoint::Endpoint;
use ferroflow_common::abi::fragment::{Datagram, DatagramKey, HeldFragment};
use ferroflow_common::abi::lb::{
    Affinity, AffinityKey, Backend, Connections, Frontend, FrontendKey, ServiceClient,
};
use ferroflow_common::abi::node::{NodeAddress, ServiceRange, Settings};
use ferroflow_common::abi::policy::{Class, PolicyKey, PortRange, RangeKey, Rules, Verdict};
use ferroflow_common::abi::relay::NodeNumber;
use ferroflow_common::abi::tunnel::Tunnel;
use ferroflow_common::addr::{Addr, Port, Proto};
use ferroflow_common::family::{Family, V4, V6};
use ferroflow_common::verdict::DropReason;

use super::{Aligned, Datagrams, InsertError, OnConflict, Services, Tables, Tracked};
use crate::icmp::Errors;
use crate::judge::Judges;
use crate::masquerade::Exits;
use crate::packet::Bytes;
use crate::policy::Policies;
use crate::reject::Answer;
use crate::source::Senders;
use crate::steps::Steps;
use crate::tunnel::NodeTunnels;

#[derive(Debug, Default)]
pub struct Fake {
    pub frontends: HashMap<FrontendKey, Frontend>,
    /// This node's own addresses; the first of a family masquerades.
    pub node: BTreeMap<Addr, NodeAddress>,
    pub settings: Option<Settings>,
    /// Open connections by backend index.
    pub connections: RefCell<HashMap<u32, Connections>>,
    /// What the agent does while a program runs.
    pub release: Option<Release>,
    /// Who is admitted where ranges say so, one by one.
    pub ranges: Vec<ServiceClient>,
    pub affinity: RefCell<HashMap<AffinityKey, Affinity>>,
    pub slots: Vec<u32>,
    pub backends: Vec<Backend>,
    pub endpoints: HashMap<Addr, Endpoint>,
    /// Pods of other nodes to which there are routes, one by one.
    pub elsewhere: Vec<Addr>,
    pub node_tunnels: HashMap<Addr, Tunnel>,
    pub conntrack: RefCell<BTreeMap<Tuple<[u8; 16]>, Row>>,
    pub datagrams: RefCell<BTreeMap<DatagramKey, Datagram>>,
    pub held: RefCell<BTreeMap<DatagramKey, Vec<u8>>>,
    /// What was sent round again, first to last.
    pub again: RefCell<Vec<Vec<u8>>>,
    note: Cell<Option<DatagramKey>>,
    pub clock: Cell<u32>,
    /// How many flows fit, counted per direction; all, where it is `None`.
    pub room: Cell<Option<usize>>,
    /// How many of the next inserts the kernel refuses.
    pub refusals: Cell<u32>,
    /// What every throw gives; otherwise each gives another number.
    pub dice: Cell<Option<u32>>,
    thrown: Cell<u32>,
    /// How often a flow's state was written.
    pub refreshed: Rc<Cell<u32>>,
    pub lookups: Cell<Lookups>,
    pub policies: FakePolicies,
    /// What policies in dry run would have dropped, first to last.
    pub would_drop: RefCell<Vec<DropReason>>,
    /// Where pods keep their source; they are masqueraded to all else, where that is said at all.
    pub unmasqueraded: Option<Vec<Addr>>,
    /// The interface that packets of pods come from, where sources are checked.
    pub sender: Option<u32>,
    /// What sockets of the host have.
    pub host_ports: Vec<(Proto, u16)>,
    /// Other nodes.
    pub nodes: BTreeMap<NodeNumber, Addr>,
}

/// A backend that is released between two looks of one program at the tables: slots named it, and then another.
#[derive(Clone, Debug)]
pub struct Release {
    pub index: u32,
    pub instead: u32,
    /// How many more looks at the slot and at its row find it serving.
    pub looks: Cell<u32>,
}

impl Release {
    /// Whether it has been released by this look.
    fn is_done(&self) -> bool {
        let looks = self.looks.get();
        self.looks.set(looks.saturating_sub(1));
        looks == 0
    }
}

impl Fake {
    /// A service on `addr:port` with these backends, each with its own slot; without any it refuses.
    pub fn service(
        &mut self,
        addr: Addr,
        port: u16,
        proto: Proto,
        backends: &[(Addr, u16)],
    ) -> &mut Frontend {
        let service = 1 + self.frontends.len() as u32;
        let offset = self.slots.len() as u32;
        for &(addr, port) in backends {
            if self.backends.is_empty() {
                self.backends.push(NO_BACKEND);
            }
            self.slots.push(self.backends.len() as u32);
            let port = Port::new(port);
            let flags = Backend::LIVE;
            self.backends.push(Backend { addr, port, proto, flags, generation: 1, service, node: 0 });
        }
        let key = FrontendKey { addr, port: Port::new(port), proto, scope: FrontendKey::EXTERNAL };
        let length = backends.len() as u32;
        let frontend = Frontend { service, offset, length, flags: Frontend::REJECT, affinity: 0 };
        self.frontends.entry(key).insert_entry(frontend).into_mut()
    }

    /// A pod of this node.
    pub fn local(&mut self, addr: Addr, ifindex: u32) {
        self.endpoints.insert(addr, Endpoint { link: ifindex, ..Endpoint::default() });
    }

    /// These have the cluster IPs `F::vip` of the numbers, and all of `F::vip` is a range of such.
    pub fn cluster_ips<F: crate::frame::Names>(&mut self, numbers: &[u8]) {
        let range = ServiceRange::new(&F::vip(0), 120);
        let settings = self.settings.get_or_insert(Settings::NONE);
        if let Some(free) = settings.ranges.iter_mut().find(|it| it.used == 0) {
            *free = range;
        }
        for number in numbers {
            let key = FrontendKey::cluster_ip(F::vip(*number));
            let (flags, service) = (Frontend::REJECT, u32::from(*number));
            let row = Frontend { service, offset: 0, length: 0, flags, affinity: 0 };
            self.frontends.insert(key, row);
        }
    }

    /// The entry that a packet with these ends finds.
    pub fn entry(&self, src: (Addr, u16), dst: (Addr, u16), proto: Proto) -> Option<Entry> {
        self.row(src, dst, proto).map(|row| row.load())
    }

    pub fn row(&self, src: (Addr, u16), dst: (Addr, u16), proto: Proto) -> Option<Row> {
        let tuple = Tuple {
            src: src.0.bytes,
            dst: dst.0.bytes,
            src_port: Port::new(src.1),
            dst_port: Port::new(dst.1),
            proto,
            reserved: [0; 3],
        };
        self.conntrack.borrow().get(&tuple).cloned()
    }

    /// Every tracked direction, v4 addresses mapped.
    pub fn tracked(&self) -> BTreeMap<Tuple<[u8; 16]>, Entry> {
        self.conntrack.borrow().iter().map(|(tuple, row)| (*tuple, row.load())).collect()
    }

    /// The node's first address of the family; unspecified where it has none.
    fn first_own<F: Family>(&self) -> Addr {
        let own = self.node.keys().find(|addr| addr.ip().is_ipv6() == F::CSUM_OFF.is_none());
        own.copied().unwrap_or(Addr::UNSPECIFIED)
    }

    fn count_hash(&self) {
        let lookups = self.lookups.get();
        self.lookups.set(Lookups { hash: lookups.hash + 1, ..lookups });
    }

    fn count_array(&self) {
        let lookups = self.lookups.get();
        self.lookups.set(Lookups { array: lookups.array + 1, ..lookups });
    }

    fn wide<F: Family>(tuple: &Aligned<Tuple<F::Bytes>>) -> Tuple<[u8; 16]> {
        Tuple {
            src: F::addr(tuple.src).bytes,
            dst: F::addr(tuple.dst).bytes,
            src_port: tuple.src_port,
            dst_port: tuple.dst_port,
            proto: tuple.proto,
            reserved: [0; 3],
        }
    }
}

impl Policies for Fake {
    fn class(&self, addr: &Addr) -> Option<Class> {
        self.count_hash();
        self.policies.class(addr)
    }

    fn range_class(&self, addr: &Addr) -> Option<Class> {
        self.count_hash();
        self.policies.range_class(addr)
    }

    fn rules(&self, key: &PolicyKey) -> Option<Rules> {
        self.count_hash();
        self.policies.rules(key)
    }

    fn port_range(&self, row: u32) -> Option<PortRange> {
        self.count_array();
        self.policies.port_range(row)
    }
}

impl Judges for Fake {
    fn would_drop(&self, reason: DropReason) {
        self.would_drop.borrow_mut().push(reason);
    }
}

/// The tables of policies, filled by tests or from the agent's.
#[derive(Debug, Default)]
pub struct FakePolicies {
    pub classes: HashMap<Addr, Class>,
    pub ranges: BTreeMap<RangeKey, Class>,
    pub policy: HashMap<PolicyKey, Rules>,
    pub port_ranges: Vec<PortRange>,
    /// How often `port_ranges` was read.
    pub steps: Cell<u64>,
}

impl FakePolicies {
    pub fn lay(&mut self, set: u32, class: Class, otherwise: Verdict, ranges: &[PortRange]) {
        let offset = self.port_ranges.len() as u32;
        self.port_ranges.extend(ranges);
        let rules = Rules { offset, length: ranges.len() as u32, otherwise: otherwise as u32 };
        self.policy.insert(PolicyKey { set, class }, rules);
    }
}

impl Policies for FakePolicies {
    fn class(&self, addr: &Addr) -> Option<Class> {
        self.classes.get(addr).copied()
    }

    fn range_class(&self, addr: &Addr) -> Option<Class> {
        let bits = |addr: &Addr| u128::from_be_bytes(addr.bytes);
        let has = |key: &RangeKey| (bits(&key.addr) ^ bits(addr)).leading_zeros() >= key.bits;
        self.ranges.iter().rev().find(|(key, _)| has(key)).map(|(_, class)| *class)
    }

    fn rules(&self, key: &PolicyKey) -> Option<Rules> {
        self.policy.get(key).copied()
    }

    fn port_range(&self, row: u32) -> Option<PortRange> {
        self.steps.set(self.steps.get() + 1);
        self.port_ranges.get(row as usize).copied()
    }
}

/// How often tables were read or written; a trie counts as a hash table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lookups {
    pub hash: u32,
    pub array: u32,
}

/// What index 0 holds.
const NO_BACKEND: Backend = Backend {
    addr: Addr::UNSPECIFIED,
    port: Port::ZERO,
    proto: Proto { number: 0 },
    flags: 0,
    generation: 0,
    service: 0,
    node: 0,
};

/// A tracked direction that lives in the table.
#[derive(Clone, Debug)]
pub struct Row {
    pub entry: Rc<Cell<Entry>>,
    refreshed: Rc<Cell<u32>>,
}

impl Tracked for Row {
    fn load(&self) -> Entry {
        self.entry.get()
    }

    fn store_state(&self, state: u8, expires: u32) {
        self.refreshed.set(self.refreshed.get() + 1);
        self.entry.set(Entry { state, expires, ..self.entry.get() });
    }

    fn store_flags(&self, flags: u8) {
        self.entry.set(Entry { flags, ..self.entry.get() });
    }

    fn store_epoch(&self, epoch: u32) {
        self.entry.set(Entry { epoch, ..self.entry.get() });
    }
}

impl Services for Fake {
    fn frontend(&self, key: &FrontendKey) -> Option<Frontend> {
        self.count_hash();
        self.frontends.get(key).copied()
    }

    fn node_address(&self, addr: &Addr) -> Option<NodeAddress> {
        self.count_hash();
        self.node.get(addr).copied()
    }

    fn is_service_address(&self, addr: &Addr) -> bool {
        self.count_array();
        self.settings.is_some_and(|settings| settings.is_service_address(addr))
    }

    fn is_elsewhere(&self, addr: &Addr) -> bool {
        self.count_hash();
        self.elsewhere.contains(addr)
    }

    fn settings(&self) -> u32 {
        self.count_array();
        self.settings.map_or(0, |settings| settings.flags)
    }

    fn epoch(&self) -> u32 {
        self.count_array();
        self.settings.map_or(0, |settings| settings.epoch)
    }

    fn allows(&self, client: &ServiceClient) -> bool {
        self.count_hash();
        self.ranges.contains(client)
    }

    fn remembered(&self, key: &AffinityKey) -> Option<Affinity> {
        self.count_hash();
        self.affinity.borrow().get(key).copied()
    }

    fn remember(&self, key: &AffinityKey, choice: &Affinity) {
        self.count_hash();
        self.affinity.borrow_mut().insert(*key, *choice);
    }

    fn slot(&self, slot: u32) -> Option<u32> {
        self.count_array();
        let index = self.slots.get(slot as usize).copied()?;
        let released = self.release.as_ref().filter(|it| it.index == index && it.is_done());
        Some(released.map_or(index, |it| it.instead))
    }

    fn backend(&self, index: u32) -> Option<Backend> {
        self.count_array();
        let row = self.backends.get(index as usize).copied()?;
        let released = self.release.as_ref().is_some_and(|it| it.index == index && it.is_done());
        Some(if released { Backend { generation: row.generation + 1, flags: 0, ..row } } else { row })
    }

    fn connections(&self, index: u32) -> Connections {
        self.count_array();
        self.connections.borrow().get(&index).copied().unwrap_or(0)
    }

    fn connect(&self, index: u32) {
        self.count_array();
        *self.connections.borrow_mut().entry(index).or_insert(0) += 1;
    }

    fn node(&self, number: NodeNumber) -> Option<Addr> {
        self.count_hash();
        self.nodes.get(&number).copied()
    }

    fn is_peer(&self, addr: &Addr) -> bool {
        self.count_hash();
        self.nodes.values().any(|node| node == addr)
    }

    fn relays(&self) -> bool {
        self.count_array();
        !self.nodes.is_empty()
    }
}

impl Datagrams<Bytes> for Fake {
    fn datagram(&self, key: &DatagramKey) -> Option<Datagram> {
        self.count_hash();
        self.datagrams.borrow().get(key).copied()
    }

    fn remember_datagram(&self, key: &DatagramKey, datagram: &Datagram) -> Result<(), InsertError> {
        self.count_hash();
        self.datagrams.borrow_mut().insert(*key, *datagram);
        Ok(())
    }

    fn note(&self, key: &DatagramKey) {
        self.note.set(Some(*key));
    }

    fn noted(&self) -> Option<DatagramKey> {
        self.note.get()
    }

    fn hold(&self, packet: &Bytes, key: &DatagramKey) -> Result<(), DropReason> {
        if packet.0.len() > HeldFragment::MAX_LEN {
            return Err(DropReason::EarlyFragment);
        }
        self.held.borrow_mut().insert(*key, packet.0.clone());
        Ok(())
    }

    fn again(&self, packet: &mut Bytes) -> Result<(), DropReason> {
        self.again.borrow_mut().push(packet.0.clone());
        Ok(())
    }

    fn release(&self, packet: &mut Bytes, key: &DatagramKey) -> Result<bool, DropReason> {
        let held = self.held.borrow_mut().remove(key);
        Ok(held.map(|bytes| packet.0 = bytes).is_some())
    }
}

impl Senders<Bytes> for Fake {
    fn checks_sources(&self) -> bool {
        self.sender.is_some()
    }

    fn sender(&self, _packet: &Bytes) -> u32 {
        self.sender.unwrap_or(0)
    }
}

impl NodeTunnels for Fake {
    fn node_tunnel(&self, addr: &Addr) -> Option<Tunnel> {
        self.count_hash();
        self.node_tunnels.get(addr).copied()
    }
}

impl Exits<Bytes> for Fake {
    fn masquerades(&self) -> bool {
        self.unmasqueraded.is_some()
    }

    fn keeps_source(&self, dst: &Addr) -> bool {
        self.unmasqueraded.as_ref().is_some_and(|kept| kept.contains(dst))
    }

    fn exit_address<F: Family>(&self, _packet: &Bytes) -> F::Bytes {
        F::bytes(&self.first_own::<F>())
    }

    fn is_hosts<F: Family>(&self, _packet: &Bytes, tuple: &Aligned<Tuple<F::Bytes>>) -> bool {
        self.host_ports.contains(&(tuple.proto, tuple.dst_port.host()))
    }
}

macro_rules! tables {
    ($family:ty) => {
        impl Tables<$family> for Fake {
            type Tracked = Row;

            fn tracked(&self, tuple: &Aligned<Tuple<<$family as Family>::Bytes>>) -> Option<Row> {
                self.count_hash();
                self.conntrack.borrow().get(&Self::wide::<$family>(tuple)).cloned()
            }

            fn track(
                &self,
                tuple: &Aligned<Tuple<<$family as Family>::Bytes>>,
                entry: &Entry,
                conflict: OnConflict,
            ) -> Result<(), InsertError> {
                self.count_hash();
                let key = Self::wide::<$family>(tuple);
                let mut rows = self.conntrack.borrow_mut();
                let present = rows.contains_key(&key);
                if present && conflict == OnConflict::Fail {
                    return Err(InsertError::Exists);
                }
                if let Some(refusals) = self.refusals.get().checked_sub(1) {
                    self.refusals.set(refusals);
                    return Err(InsertError::Refused);
                }
                if !present && self.room.get().is_some_and(|room| rows.len() >= room) {
                    return Err(InsertError::Refused);
                }
                let row = Row { entry: Rc::new(Cell::new(*entry)), refreshed: self.refreshed.clone() };
                rows.insert(key, row);
                Ok(())
            }

            fn untrack(&self, tuple: &Aligned<Tuple<<$family as Family>::Bytes>>) {
                self.count_hash();
                self.conntrack.borrow_mut().remove(&Self::wide::<$family>(tuple));
            }

            fn endpoint(&self, addr: &Addr) -> Option<Endpoint> {
                self.count_hash();
                self.endpoints.get(addr).copied()
            }

            fn masquerade(&self) -> <$family as Family>::Bytes {
                self.count_array();
                <$family>::bytes(&self.first_own::<$family>())
            }

            fn now(&self) -> u32 {
                self.clock.get()
            }

            fn random(&self) -> u32 {
                self.thrown.set(self.thrown.get().wrapping_add(0x9e37_79b9));
                self.dice.get().unwrap_or(self.thrown.get())
            }
        }
    };
}

tables!(V4);
tables!(V6);

impl<F: Answer + Errors> Steps<F, Bytes> for Fake where Self: Tables<F> {}
