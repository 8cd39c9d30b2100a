//! One node as packets see it: the agent's tables and the programs in this machine's kernel, with the hooks in the
//! order in which a kernel runs them.
//!
//! ```text
//!   pod ─▶ pod_egress ─────┐
//!                          ├─▶ to a local pod: past its interface's hook ──────────────────▶ pod
//!  wire ─▶ device_ingress ─┼─▶ past the stack: ─▶ device_egress ───────────────────────────▶ wire
//!                          ├─▶ refused: to a pod at once, ─▶ device_egress to the wire ────▶ sender
//!  host ───────────────────┴─▶ to the stack: routed ─▶ pod_ingress ─▶ pod, device_egress ─▶ wire, or ─▶ host
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::{Context as _, Result, ensure};
use aya::maps::{HashMap, Map, MapData, PerCpuArray};
use ferroflow::config::{Masquerade, Xdp};
use ferroflow::datapath::{Options, Sources};
use ferroflow::maps::kernel::KernelMaps;
use ferroflow::maps::{Frontends, Services};
use ferroflow::reconcile::Limits;
use ferroflow_common::abi::conntrack::Entry;
use ferroflow_common::abi::lb::{Affinity, AffinityKey};
use ferroflow_common::verdict::DropReason;
use nix::net::if_::if_nametoindex;
use nix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use zerocopy::{FromBytes as _, IntoBytes as _};

use super::cluster::{Cluster, Configuration, NODE, Socket};
use super::control::{Control, Interfaces};
use super::isolation;
use super::oracle::{From, Seen, Sent, To, Tuple};
use super::random::ground as ground_objects;
use super::wire::{HERE, Packet, SENDER, bytes_of, reassemble};
use crate::netns::{End, Netns, Prefix, Route};
use crate::run::{Action, DEFAULTS, Program, Programs, options};
use crate::sandbox::Place;

/// The node under test, in the network namespace of the thread that made it.
pub struct Node {
    programs: Programs,
    control: Control<KernelMaps>,
    configuration: Configuration,
    /// For which addresses lead where.
    cluster: Cluster,
    /// What it was at first.
    ground: Cluster,
    flows: Flows,
    affinity: HashMap<MapData, [u8; KEPT], [u8; size_of::<Affinity>()]>,
    drops: PerCpuArray<MapData, u64>,
    /// How many packets were dropped for which reason when that was looked at last.
    dropped: BTreeMap<&'static str, u64>,
    /// Objects that policies have to do with have changed since the last case began.
    reshuffled: bool,
    /// Seconds by which the tables have been aged.
    waited: u64,
}

/// The connection tables; the keys are bytes as `common` lays them out.
struct Flows {
    v4: HashMap<MapData, [u8; 16], EntryBytes>,
    v6: HashMap<MapData, [u8; 40], EntryBytes>,
}

type EntryBytes = [u8; size_of::<Entry>()];
const KEPT: usize = size_of::<AffinityKey>();

/// The pods for which there are interfaces.
pub const PODS: [&str; 3] = ["p0", "p1", "p2"];
const DEVICE: &str = "device";

/// A namespace with a device that leads everywhere, and an interface for each of [`PODS`].
///
/// # Errors
/// Where the kernel refuses.
pub fn namespace() -> Result<(Netns, Netns)> {
    let (here, there) = (Netns::new("node")?, Netns::new("others")?);
    for (number, name) in PODS.iter().chain([&DEVICE]).enumerate() {
        let end = |side: u8| End { name: (*name).to_owned(), mac: [2, 0, 0, 0, side, number as u8] };
        here.veth(&end(1), &there, &end(2))?;
    }
    here.run(|inside| {
        for (addr, len, gateway, all) in
            [("192.168.5.1", 24, "192.168.5.254", "0.0.0.0"), ("fd00:5::1", 64, "fd00:5::fe", "::")]
        {
            inside.address(DEVICE, Prefix { addr: addr.parse()?, len })?;
            let gateway: IpAddr = gateway.parse()?;
            inside.neighbour(DEVICE, gateway, [2, 0, 0, 0, 9, 9])?;
            let to = Prefix { addr: all.parse()?, len: 0 };
            inside.route(Route { to, via: Some(gateway), dev: DEVICE })?;
        }
        anyhow::Ok(())
    })??;
    // The programs ask the kernel's routes where a packet goes that is not the host's own.
    here.sysctl("ipv4/conf/all/forwarding", "1")?;
    here.sysctl("ipv6/conf/all/forwarding", "1")?;
    Ok((here, there))
}

impl Node {
    /// In the calling thread's network namespace, which is one of [`namespace`], with the objects of every case's
    /// beginning.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn new(place: &Place, configuration: Configuration) -> Result<Self> {
        let programs = match configuration {
            Configuration::Usual => Programs::load(place, DEFAULTS)?,
            Configuration::Masquerading => Programs::load_with(
                place,
                Options {
                    masquerade: Masquerade::On,
                    sources: Sources::Checked,
                    ..options(&place.bpffs, Xdp::Off)
                },
            )?,
        };
        let maps = programs.maps()?;
        let limits =
            Limits { services: maps.capacity::<Services>()?, frontends: maps.capacity::<Frontends>()? };
        let index = |name: &str| if_nametoindex(name).with_context(|| format!("no interface {name}"));
        let pods = PODS.iter().map(|name| Ok(((*name).to_owned(), index(name)?))).collect::<Result<_>>()?;
        let interfaces = Interfaces { device: index(DEVICE)?, pods };
        let control = Control::new(maps, limits, interfaces, configuration)?;
        let lru =
            |name: &str| Ok::<_, anyhow::Error>(Map::LruHashMap(MapData::from_pin(programs.pin(name))?));
        let flows = Flows {
            v4: HashMap::try_from(lru("conntrack_v4")?)?,
            v6: HashMap::try_from(lru("conntrack_v6")?)?,
        };
        let affinity = HashMap::try_from(lru("affinity")?)?;
        let drops = PerCpuArray::try_from(Map::PerCpuArray(MapData::from_pin(programs.pin("drops"))?))?;
        let (cluster, ground) = (Cluster::default(), Cluster::default());
        let dropped = BTreeMap::new();
        let mut node = Self {
            programs,
            control,
            configuration,
            cluster,
            ground,
            flows,
            affinity,
            drops,
            dropped,
            reshuffled: false,
            waited: 0,
        };
        ground_objects().iter().try_for_each(|object| node.apply(object))?;
        node.ground = node.cluster.clone();
        Ok(node)
    }

    /// For packets that need not be any.
    pub fn programs(&mut self) -> &mut Programs {
        &mut self.programs
    }

    pub fn configuration(&self) -> Configuration {
        self.configuration
    }

    /// The objects that are there at the beginning.
    pub fn ground(&self) -> &Cluster {
        &self.ground
    }

    /// # Errors
    /// Where the object makes no sense to the agent, or the tables refuse.
    pub fn apply(&mut self, object: &Value) -> Result<()> {
        self.reshuffled |= isolation::concerns(object);
        self.cluster.apply(object);
        self.control.apply(object)
    }

    /// Seconds on the clock of the case.
    ///
    /// # Errors
    /// Where the kernel has no such clock.
    pub fn now(&self) -> Result<u64> {
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
        Ok(now.tv_sec().cast_unsigned() + self.waited)
    }

    /// Sends a packet and says what becomes of it.
    ///
    /// # Errors
    /// Where a program makes of it what no packet is, or does with it what no kernel would take.
    pub fn send(&mut self, sent: &Sent) -> Result<Seen> {
        let &Sent { from, ref packet, fragments, .. } = sent;
        let Some(size) = fragments else {
            let seen = self.send_frame(from, &packet.build())?;
            let Some((to, frame)) = seen else { return Ok(Seen::Dropped(self.reason()?)) };
            return Ok(Seen::Went(to, Packet::parse(&frame).with_context(|| format!("to {to:?}"))?));
        };
        let (mut places, mut arrived, mut reason) = (Vec::new(), Vec::new(), None);
        for frame in packet.fragments(size) {
            if let Some((to, frame)) = self.send_frame(from, &frame)? {
                places.push(to);
                arrived.push(frame);
            } else {
                reason = reason.or(self.reason()?);
            }
        }
        let Some(to) = places.first().copied() else { return Ok(Seen::Dropped(reason)) };
        if let (To::Sender, [answer]) = (to, arrived.as_slice()) {
            return Ok(Seen::Went(to, Packet::parse(answer)?));
        }
        ensure!(places.iter().all(|place| *place == to), "fragments of one packet went to {places:?}");
        Ok(Seen::Went(to, reassemble(&arrived).with_context(|| format!("fragments to {to:?}"))?))
    }

    /// Why the last packet was dropped, if that was counted. What a policy in dry run would drop was not.
    fn reason(&mut self) -> Result<Option<&'static str>> {
        let mut found = None;
        for reason in DropReason::ALL.iter().filter(|reason| !reason.is_dry_run()) {
            let count = self.drops.get(&(*reason as u32), 0)?.iter().sum();
            if self.dropped.insert(reason.as_str(), count).unwrap_or_default() != count {
                found = Some(reason.as_str());
            }
        }
        Ok(found)
    }

    /// `None` where it is dropped.
    fn send_frame(&mut self, from: From, frame: &[u8]) -> Result<Option<(To, Vec<u8>)>> {
        let device = self.control.interfaces().device;
        let (program, interface) = match from {
            From::Pod(addr) => (Program::PodEgress, self.interface(addr)?),
            From::Wire => (Program::DeviceIngress, device),
            From::Host => return self.route(from, frame),
        };
        let (action, bytes) = self.programs.run_on(program, interface, frame)?;
        match action {
            Action::Drop => Ok(None),
            Action::Next => self.route(from, &bytes),
            Action::Redirect if bytes[..12] == [SENDER, HERE].concat() => match from {
                // To the pod's own end of its interface.
                From::Pod(_) => Ok(Some((To::Sender, bytes))),
                From::Wire | From::Host => {
                    let passed = self.pass(Program::DeviceEgress, interface, from, &bytes)?;
                    Ok(passed.map(|bytes| (To::Sender, bytes)))
                }
            },
            Action::Redirect => match self.destination(&bytes)? {
                To::Pod(addr) => Ok(Some((To::Pod(addr), bytes))),
                To::Wire | To::Sender => {
                    let passed = self.pass(Program::DeviceEgress, device, from, &bytes)?;
                    Ok(passed.map(|bytes| (To::Wire, bytes)))
                }
                // Past the stack, to what only the stack has.
                To::Host => anyhow::bail!("{} redirects to the node itself", program.name()),
            },
        }
    }

    /// What the kernel does with what a program leaves to it.
    fn route(&mut self, from: From, frame: &[u8]) -> Result<Option<(To, Vec<u8>)>> {
        let source = ip(frame, Side::Source)?;
        // "Martian": nobody else sends from the node's own address.
        if from != From::Host && self.cluster.node_addresses().contains(&source) {
            return Ok(None);
        }
        let to = self.destination(frame)?;
        let (program, interface) = match to {
            To::Pod(addr) => (Program::PodIngress, self.interface(addr)?),
            To::Wire | To::Sender => (Program::DeviceEgress, self.control.interfaces().device),
            To::Host => return Ok(Some((to, frame.to_vec()))),
        };
        Ok(self.pass(program, interface, from, frame)?.map(|bytes| (to, bytes)))
    }

    /// Through a hook on the way out, which may change a packet or drop it.
    fn pass(
        &mut self,
        program: Program,
        interface: u32,
        from: From,
        frame: &[u8],
    ) -> Result<Option<Vec<u8>>> {
        let (action, bytes) = match from {
            From::Host => self.programs.run_own(program, interface, frame)?,
            From::Pod(_) | From::Wire => self.programs.run_on(program, interface, frame)?,
        };
        ensure!(action != Action::Redirect, "{} redirects what is on its way out", program.name());
        Ok((action == Action::Next).then_some(bytes))
    }

    fn destination(&self, frame: &[u8]) -> Result<To> {
        Ok(To::of(&self.cluster, ip(frame, Side::Destination)?))
    }

    fn interface(&self, pod: IpAddr) -> Result<u32> {
        let name = self.cluster.pod_at(pod).with_context(|| format!("{pod} is no local pod"))?;
        self.control.interfaces().pods.get(&name).copied().with_context(|| format!("no interface {name}"))
    }

    /// Lets seconds pass: brings everything that the tables remember of these flows and clients nearer its end.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn wait(&mut self, seconds: u32, tuples: &BTreeSet<Tuple>, clients: &BTreeSet<IpAddr>) -> Result<()> {
        self.waited += u64::from(seconds);
        for tuple in tuples {
            let aged = |mut bytes: EntryBytes| {
                let mut entry = Entry::read_from_bytes(&bytes).ok()?;
                entry.expires = entry.expires.saturating_sub(seconds);
                bytes.copy_from_slice(entry.as_bytes());
                Some(bytes)
            };
            self.flows.change(tuple, aged)?;
        }
        for key in self.kept(clients)? {
            let bytes = self.affinity.get(&key, 0)?;
            let Ok(mut kept) = Affinity::read_from_bytes(&bytes) else { continue };
            kept.last_used = kept.last_used.saturating_sub(seconds);
            let mut bytes = bytes;
            bytes.copy_from_slice(kept.as_bytes());
            self.affinity.insert(&key, &bytes, 0)?;
        }
        Ok(())
    }

    /// Applies what makes the objects these, and says how many changes that took. Pods of this node that policies apply to
    /// come after these, so that they have nothing going (rule 52).
    ///
    /// # Errors
    /// Where an object makes no sense to the agent, or the tables refuse.
    pub fn become_like(&mut self, cluster: &Cluster) -> Result<u64> {
        let mut changes = self.cluster.changes_to(cluster);
        self.reshuffled |= changes.iter().any(isolation::concerns);
        if self.reshuffled && cluster.objects().any(|object| object["kind"] == "NetworkPolicy") {
            let here: Vec<_> =
                cluster.objects().filter(|it| it["spec"]["nodeName"] == NODE).cloned().collect();
            changes.retain(|object| !here.contains(object));
            let gone = |pod: &Value| json!({"kind": "Pod", "metadata": pod["metadata"], "gone": true});
            changes.splice(0..0, here.iter().map(gone));
            changes.extend(here);
        }
        changes.iter().try_for_each(|object| self.apply(object))?;
        self.reshuffled = false;
        Ok(changes.len() as u64)
    }

    /// Forgets these flows, and all affinity of these clients.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn forget(&mut self, tuples: &BTreeSet<Tuple>, clients: &BTreeSet<IpAddr>) -> Result<()> {
        for tuple in tuples {
            self.flows.change(tuple, |_entry| None)?;
        }
        for key in self.kept(clients)? {
            self.affinity.remove(&key)?;
        }
        self.waited = 0;
        Ok(())
    }

    /// Forgets every flow, whoever knows of it.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn sweep(&mut self) -> Result<()> {
        self.programs.set_tracked(&BTreeMap::new())
    }

    /// What the affinity table has of clients.
    fn kept(&self, clients: &BTreeSet<IpAddr>) -> Result<Vec<[u8; KEPT]>> {
        if clients.is_empty() {
            return Ok(Vec::new());
        }
        let keys = self.affinity.keys().collect::<Result<Vec<_>, _>>()?;
        let of = |key: &[u8; KEPT]| {
            let addr = AffinityKey::read_from_bytes(key).map(|key| key.client.ip());
            addr.is_ok_and(|addr| clients.contains(&addr))
        };
        Ok(keys.into_iter().filter(of).collect())
    }

    /// How many directions of flows the tables have.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn tracked(&self) -> Result<usize> {
        Ok(self.programs.tracked()?.len())
    }

    /// What was dropped, by reason.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn drops(&self) -> Result<BTreeMap<&'static str, u64>> {
        let drops = self.programs.drops()?;
        Ok(drops.into_iter().map(|(reason, count)| (reason.as_str(), count)).collect())
    }
}

impl Flows {
    /// Makes of an entry, where there is one, what `change` says; nothing where that is `None`.
    fn change(
        &mut self,
        (proto, src, dst): &Tuple,
        change: impl FnOnce(EntryBytes) -> Option<EntryBytes>,
    ) -> Result<()> {
        let key = |(src, src_port): &Socket, (dst, dst_port): &Socket| {
            let ports = [src_port.to_be_bytes(), dst_port.to_be_bytes()].concat();
            [bytes_of(*src), bytes_of(*dst), ports, vec![*proto, 0, 0, 0]].concat()
        };
        let key = key(src, dst);
        if let Ok(key) = <[u8; 16]>::try_from(key.as_slice()) {
            changed(&mut self.v4, key, change)
        } else {
            changed(&mut self.v6, <[u8; 40]>::try_from(key.as_slice())?, change)
        }
    }
}

fn changed<K: aya::Pod>(
    table: &mut HashMap<MapData, K, EntryBytes>,
    key: K,
    change: impl FnOnce(EntryBytes) -> Option<EntryBytes>,
) -> Result<()> {
    let Ok(entry) = table.get(&key, 0) else { return Ok(()) };
    match change(entry) {
        Some(entry) => table.insert(&key, &entry, 0)?,
        None => table.remove(&key)?,
    }
    Ok(())
}

#[derive(Clone, Copy)]
enum Side {
    Source,
    Destination,
}

fn ip(frame: &[u8], side: Side) -> Result<IpAddr> {
    let part = |v4: usize, v6: usize| -> Result<IpAddr> {
        let far = usize::from(matches!(side, Side::Destination));
        if frame[12..14] == [8, 0] {
            let at = v4 + far * 4;
            Ok(<[u8; 4]>::try_from(frame.get(at..at + 4).context("IPv4 is cut")?)?.into())
        } else {
            let at = v6 + far * 16;
            Ok(<[u8; 16]>::try_from(frame.get(at..at + 16).context("IPv6 is cut")?)?.into())
        }
    };
    part(26, 22)
}
