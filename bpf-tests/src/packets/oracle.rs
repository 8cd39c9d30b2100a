//! What must become of a packet at a node: of its flow, of its ends, and of errors about it.
//!
//! The oracle sees what the node did and says whether that may be. Where the node has a choice (a backend, a source
//! port) it holds the node to what it has chosen from then on.
//!
//! ```text
//!   packet ─▶ known flow? ─▶ its ends, both ways                    (rules 30, 31, 34, 35)
//!        └──▶ frontend? ─▶ admitted? ─▶ endpoints ─▶ affinity ─▶ policies ─▶ source
//!        │                                                    (rules 2 to 5, 14 to 19, 22, 26, 29, 47)
//!        └──▶ error about a known flow? ─▶ whose packet it quotes   (rule 37)
//!        └──▶ nothing of ours: see `plain`                          (rules 21, 43 to 49)
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::rc::Rc;

use super::cluster::{Cluster, Configuration, Frontend, Kind, Policy, Socket};
use super::exits::{begins_anew, known_as};
use super::flow::{Age, CLOCKS, Direction, Flow, Signal, State, connects};
use super::isolation::{Isolation, Reason};
use super::plain::{Echo, echo, ends};
use super::refusal::{dropped, refused};
use super::wire::{Body, ETHERNET, Packet, SCTP, TCP, UDP};

/// Where a packet comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum From {
    /// The local pod with this address.
    Pod(IpAddr),
    /// A device of the node.
    Wire,
    /// The node's own stack.
    Host,
}

/// Where a packet went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum To {
    Pod(IpAddr),
    Wire,
    Host,
    /// Back to where it came from: a refusal.
    Sender,
}

impl To {
    /// Where the node's routes lead.
    pub fn of(cluster: &Cluster, dst: IpAddr) -> Self {
        if cluster.local_pods().contains(&dst) {
            Self::Pod(dst)
        } else if cluster.node_addresses().contains(&dst) {
            Self::Host
        } else {
            Self::Wire
        }
    }
}

/// What the node did with a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    Went(To, Packet),
    /// With the reason that was counted, if one was.
    Dropped(Option<Reason>),
}

/// A packet that was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sent {
    pub from: From,
    pub packet: Packet,
    /// So many bytes of the transport in each, a multiple of eight; `None` where it is whole.
    pub fragments: Option<usize>,
    /// What an error quotes, in full.
    pub about: Option<Packet>,
}

/// Whether what was seen may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judgement {
    Right,
    /// What must be instead.
    Wrong(String),
    /// It depends on what the oracle cannot know, which is said; what follows cannot be judged.
    Unsure(&'static str),
}

/// The model of the node.
#[derive(Clone, Debug, Default)]
pub struct Oracle {
    pub cluster: Rc<Cluster>,
    flows: Vec<Flow>,
    /// By protocol, client and frontend.
    forward: BTreeMap<Tuple, usize>,
    /// By protocol, backend and what it takes for the client.
    back: BTreeMap<Tuple, usize>,
    /// By client and service port.
    affinity: BTreeMap<(IpAddr, String), Kept>,
    /// How often an endpoint of a service port has stopped serving.
    lives: BTreeMap<(String, Socket), u32>,
    serving: BTreeMap<String, BTreeSet<Socket>>,
    pub(super) isolation: Isolation,
    pub(super) configuration: Configuration,
}

/// Where a client has to be: at one of these, each in one of its lives. Which is not seen where policies let the client
/// reach none of them.
#[derive(Clone, Debug)]
struct Kept {
    backends: BTreeSet<(Socket, u32)>,
    /// When it was chosen last.
    last: u64,
}

/// Protocol, source, destination.
pub type Tuple = (u8, Socket, Socket);

/// The source ports of masqueraded and of colliding flows: no socket chooses them by itself.
pub(super) const CHOSEN_PORTS: std::ops::RangeInclusive<u16> = 1024..=29_999;

impl Oracle {
    /// Of a node that has seen no packet.
    pub fn new(cluster: Cluster, configuration: Configuration) -> Self {
        let isolation = Isolation::new(cluster.objects());
        Self {
            serving: cluster.serving(),
            cluster: Rc::new(cluster),
            isolation,
            configuration,
            ..Self::default()
        }
    }

    /// Takes a change of an object in.
    pub fn apply(&mut self, object: &serde_json::Value) {
        Rc::make_mut(&mut self.cluster).apply(object);
        self.isolation.apply(object);
        let serving = self.cluster.serving();
        for (port_name, before) in &self.serving {
            let now = serving.get(port_name);
            for socket in before.iter().filter(|it| now.is_none_or(|now| !now.contains(it))) {
                *self.lives.entry((port_name.clone(), *socket)).or_default() += 1;
            }
        }
        self.serving = serving;
    }

    /// Every tuple that the node's tables may have a flow for.
    pub fn tuples(&self) -> BTreeSet<Tuple> {
        let both =
            |flow: &Flow| [(flow.proto, flow.client, flow.frontend), (flow.proto, flow.backend, flow.seen)];
        self.flows.iter().flat_map(both).collect()
    }

    /// Every client that may be kept at a backend.
    pub fn clients(&self) -> BTreeSet<IpAddr> {
        self.affinity.keys().map(|(client, _)| *client).collect()
    }

    /// Whether the node may have done this with the packet, at this second.
    pub fn judge(&mut self, sent: &Sent, seen: &Seen, now: u64) -> Judgement {
        match self.expect(&Observed { sent, seen, now }) {
            Ok(()) => Judgement::Right,
            Err(judgement) => judgement,
        }
    }

    fn expect(&mut self, observed: &Observed<'_>) -> Result<(), Judgement> {
        let &Observed { sent: Sent { from, packet, .. }, now, .. } = observed;
        if self.is_spoofed(observed.sent) {
            return dropped(observed.seen, &["spoofed-source"]);
        }
        if let Some(error) = self.translated_error(observed)? {
            return self.goes(&error, observed);
        }
        let Some(protocol) = protocol_of(packet) else { return self.portless(observed) };
        let ends = ends(packet);
        if let Some(rewritten) = self.known(packet, ends, now)? {
            return self.goes_on(&rewritten, observed);
        }
        if *from == From::Host {
            // Of no service: the host's own processes are served at their sockets.
            return self.plain(packet, observed);
        }
        let cluster = Rc::clone(&self.cluster);
        match cluster.frontend(ends.1, protocol) {
            Some(frontend) => self.opens(&frontend, ends, observed),
            None => self.without_service(observed),
        }
    }

    /// A packet for no service port.
    fn without_service(&mut self, observed: &Observed<'_>) -> Result<(), Judgement> {
        let (packet, dst) = (&observed.sent.packet, observed.sent.packet.dst);
        if To::of(&self.cluster, dst) != To::Wire || !self.cluster.in_service_range(dst) {
            return self.beside_a_service(packet, observed);
        }
        // Rule 19.
        if self.cluster.is_cluster_ip(dst) {
            refused(observed.sent, observed.seen)
        } else {
            dropped(observed.seen, &["unallocated-service-address"])
        }
    }

    /// A client that talks to a backend through a service, too, from the same port, gets another one there (rule 34). Which,
    /// and from when on, is not foretold.
    fn beside_a_service(&mut self, packet: &Packet, observed: &Observed<'_>) -> Result<(), Judgement> {
        let (client, backend) = ends(packet);
        let back = self.back.get(&(packet.proto(), backend, client));
        if back.is_none_or(|index| self.flows[*index].port_name.is_none()) {
            return self.plain(packet, observed);
        }
        if let Err(reason) = self.admits(packet, client.0, backend)
            && dropped(observed.seen, &[reason]).is_ok()
        {
            return Ok(());
        }
        let seen_as = match observed.seen {
            Seen::Went(_, went) => went.ports().map(|ports| (packet.src, ports.src)),
            Seen::Dropped(_) => None,
        };
        let chosen = seen_as.filter(|(_, port)| CHOSEN_PORTS.contains(port));
        let seen = chosen.unwrap_or(client);
        self.goes(&packet.between(seen, backend), observed)?;
        self.flows.push(Flow { seen, ..Flow::plain(packet.proto(), client, backend, observed.now) });
        Err(Judgement::Unsure("which port a client has that talks to a backend in both ways"))
    }

    /// The first packet of a flow, or one whose flow chooses again.
    fn opens(
        &mut self,
        frontend: &Frontend<'_>,
        (src, dst): (Socket, Socket),
        observed: &Observed<'_>,
    ) -> Result<(), Judgement> {
        let &Observed { sent: Sent { from, packet, .. }, seen, now } = observed;
        if !frontend.admits(src.0) {
            return dropped(seen, &["source-range"]);
        }
        // Rule 16: traffic of this node to what is outside goes anywhere.
        let inside = matches!(from, From::Pod(_)) && frontend.kind != Kind::ClusterIp;
        let policy = if inside { Policy::Cluster } else { frontend.policy() };
        let (choices, anywhere) = self.cluster.choices(frontend, dst.0, policy);
        if choices.is_empty() {
            return if anywhere {
                dropped(seen, &["no-local-endpoint"])
            } else {
                refused(observed.sent, observed.seen)
            };
        }
        let name = frontend.port_name();
        let mut may = self.kept(frontend, (src.0, &name), &choices, now)?.unwrap_or(choices);
        let mut barred = BTreeMap::new();
        may.retain(|backend| match self.admits(packet, src.0, *backend) {
            Ok(()) => true,
            Err(reason) => {
                barred.insert(*backend, reason);
                false
            }
        });
        if matches!(seen, Seen::Dropped(_)) && !barred.is_empty() {
            self.keep(frontend, (src.0, &name), barred.keys().copied(), now);
            return dropped(seen, &barred.into_values().collect::<Vec<_>>());
        }
        let went =
            if let Seen::Went(_, went) = seen { went.ports().map(|ports| (went, ports)) } else { None };
        let Some((went, ports)) = went.filter(|(went, ports)| may.contains(&(went.dst, ports.dst))) else {
            return Err(Judgement::Wrong(format!("to one of {may:?}")));
        };
        let backend = (went.dst, ports.dst);
        let stands_in = match self.stands_in(*from, frontend, backend.0) {
            Ok(stands_in) => stands_in,
            Err(NoAddress) => return dropped(seen, &["no-masquerade-address"]),
        };
        let (ends, proto) = ((src, dst), packet.proto());
        let seen_as = self.source(ends, (proto, backend, ports.src), stands_in, now)?;
        let life = self.life(&name, backend);
        self.keep(frontend, (src.0, &name), [backend].into_iter(), now);
        let mut flow = Flow {
            client: src,
            frontend: dst,
            backend,
            seen: seen_as,
            proto,
            port_name: Some(name),
            life,
            masqueraded: false,
            state: State::default(),
            last: now,
        };
        flow.note(Signal::of(packet), Direction::Forward, now);
        self.enter(flow);
        self.goes(&packet.between(seen_as, backend), observed)
    }

    /// A new flow; each direction takes the place of what had its tuple.
    pub(super) fn enter(&mut self, flow: Flow) {
        let index = self.flows.len();
        let (there, back) = ((flow.proto, flow.client, flow.frontend), (flow.proto, flow.backend, flow.seen));
        self.back.remove(&there);
        self.forward.remove(&back);
        self.forward.insert(there, index);
        self.back.insert(back, index);
        self.flows.push(flow);
    }

    /// The node's address that stands in for a client, whose answers would bypass the node otherwise (rule 26).
    fn stands_in(
        &self,
        from: From,
        frontend: &Frontend<'_>,
        backend: IpAddr,
    ) -> Result<Option<IpAddr>, NoAddress> {
        let keeps_client = frontend.kind != Kind::ClusterIp && frontend.policy() == Policy::Local;
        if !self.is_masqueraded(from, backend) && (from != From::Wire || keeps_client) {
            return Ok(None);
        }
        self.cluster.primary(backend).map(Some).ok_or(NoAddress)
    }

    /// What a backend must take for the client, which used the source port `port` towards it.
    fn source(
        &self,
        ends: (Socket, Socket),
        (proto, backend, port): (u8, Socket, u16),
        stands_in: Option<IpAddr>,
        now: u64,
    ) -> Result<Socket, Judgement> {
        let (src, dst) = ends;
        // What goes to the node itself comes back through it, and it takes no packets from its own address.
        let stands_in = stands_in.filter(|_| To::of(&self.cluster, backend.0) != To::Host);
        // Rule 26 b: nor does a pod.
        let addr = if backend.0 == src.0 { dst.0 } else { stands_in.unwrap_or(src.0) };
        if stands_in.is_none() && !self.is_taken(&(proto, backend, (addr, src.1)), ends, now)? {
            return Ok((addr, src.1));
        }
        if CHOSEN_PORTS.contains(&port) && !self.is_taken(&(proto, backend, (addr, port)), ends, now)? {
            return Ok((addr, port));
        }
        Err(Judgement::Wrong(format!("from a free port of {addr}")))
    }

    /// Whether another flow that lives has the tuple towards a backend.
    pub(super) fn is_taken(
        &self,
        tuple: &Tuple,
        ends: (Socket, Socket),
        now: u64,
    ) -> Result<bool, Judgement> {
        let entry = self.back.get(tuple).or_else(|| self.forward.get(tuple));
        let Some(flow) = entry.map(|index| &self.flows[*index]) else { return Ok(false) };
        if (flow.client, flow.frontend) == ends || (connects(flow.proto) && flow.state.is_over()) {
            return Ok(false);
        }
        match flow.age(now) {
            Age::Alive => Ok(true),
            Age::Expired => Ok(false),
            Age::Unsure => Err(Judgement::Unsure("whether another flow lives")),
        }
    }

    /// The backends at one of which a client has to be (rule 29).
    fn kept(
        &self,
        frontend: &Frontend<'_>,
        (client, name): (IpAddr, &str),
        choices: &BTreeSet<Socket>,
        now: u64,
    ) -> Result<Option<BTreeSet<Socket>>, Judgement> {
        let Some(timeout) = frontend.affinity() else { return Ok(None) };
        let Some(Kept { backends, last }) = self.affinity.get(&(client, name.to_owned())) else {
            return Ok(None);
        };
        let stays =
            |(backend, life): &(Socket, u32)| *life == self.life(name, *backend) && choices.contains(backend);
        if !backends.iter().all(stays) {
            return Ok(None);
        }
        match (now.saturating_sub(*last), timeout) {
            (idle, timeout) if idle + CLOCKS < timeout => {
                Ok(Some(backends.iter().map(|(it, _)| *it).collect()))
            }
            (idle, timeout) if idle > timeout + CLOCKS => Ok(None),
            _ => Err(Judgement::Unsure("whether a client is still kept at its backend")),
        }
    }

    /// Keeps a client at one of these.
    fn keep(
        &mut self,
        frontend: &Frontend<'_>,
        (client, name): (IpAddr, &str),
        backends: impl Iterator<Item = Socket>,
        now: u64,
    ) {
        if frontend.affinity().is_some() {
            let backends = backends.map(|it| (it, self.life(name, it))).collect();
            self.affinity.insert((client, name.to_owned()), Kept { backends, last: now });
        }
    }

    fn life(&self, name: &str, backend: Socket) -> u32 {
        self.lives.get(&(name.to_owned(), backend)).copied().unwrap_or_default()
    }

    /// Whether a flow's backend has stopped serving since it was chosen (rule 31).
    fn is_gone(&self, flow: &Flow) -> bool {
        flow.port_name.as_ref().is_some_and(|name| self.life(name, flow.backend) != flow.life)
    }

    /// What a packet of a known flow becomes.
    pub(super) fn known(
        &mut self,
        packet: &Packet,
        (src, dst): (Socket, Socket),
        now: u64,
    ) -> Result<Option<Packet>, Judgement> {
        let Some((index, direction)) = self.find(&(packet.proto(), src, dst), now)? else {
            return Ok(None);
        };
        let (flow, signal) = (&self.flows[index], Signal::of(packet));
        let over = match direction {
            Direction::Forward if flow.masqueraded => begins_anew(packet, flow),
            // Rules 30, 31 and 35.
            Direction::Forward if !connects(packet.proto()) => self.is_gone(flow),
            Direction::Forward => signal.opens && (flow.state != State::default() || self.is_gone(flow)),
            // A server that opens a connection to its client's port: no reply.
            Direction::Reply => signal.opens,
        };
        if over {
            self.forget(index);
            return Ok(None);
        }
        let flow = &self.flows[index];
        let rewritten = match direction {
            Direction::Forward => known_as(packet, flow.seen, flow.backend),
            Direction::Reply => known_as(packet, flow.frontend, flow.client),
        };
        self.flows[index].note(signal, direction, now);
        Ok(Some(rewritten))
    }

    fn find(&self, tuple: &Tuple, now: u64) -> Result<Option<(usize, Direction)>, Judgement> {
        let forward = self.forward.get(tuple).map(|index| (*index, Direction::Forward));
        let back = || self.back.get(tuple).map(|index| (*index, Direction::Reply));
        let Some((index, direction)) = forward.or_else(back) else { return Ok(None) };
        match self.flows[index].age(now) {
            Age::Alive => Ok(Some((index, direction))),
            Age::Expired => Ok(None),
            Age::Unsure => Err(Judgement::Unsure("whether a flow lives")),
        }
    }

    fn forget(&mut self, index: usize) {
        self.forward.retain(|_, it| *it != index);
        self.back.retain(|_, it| *it != index);
    }

    /// An error about a known flow goes to who sent what it quotes, and quotes what that one sent (rule 37). Its source
    /// stays, unless it is the flow's other end, or goes to another address than it came for.
    fn translated_error(&self, observed: &Observed<'_>) -> Result<Option<Packet>, Judgement> {
        let Sent { packet, about, .. } = observed.sent;
        let (Body::Icmp { kind, payload, .. }, Some(about)) = (&packet.body, about) else { return Ok(None) };
        let kinds: &[u8] = if packet.src.is_ipv4() { &[3, 11, 12] } else { &[1, 2, 3, 4] };
        // Of messages without ports only an echo says which flow it is of.
        let asks =
            matches!(about.body, Body::Icmp { kind, .. } if echo(kind, about.src) == Some(Echo::Request));
        if !kinds.contains(kind) || about.src != packet.dst || !(about.ports().is_some() || asks) {
            return Ok(None);
        }
        // Without the first eight bytes of the transport (RFC 792) it says nothing of ports.
        if payload.len() + about.transport_length() < about.build().len() - ETHERNET + 8 {
            return Ok(None);
        }
        let (src, dst) = ends(about);
        let answered = (about.proto(), dst, src);
        let Some((index, direction)) = self.find(&answered, observed.now)? else { return Ok(None) };
        let flow = &self.flows[index];
        // What the quoted packet was before it was sent on, and what its sender takes for the flow's other end.
        let (before, (other, other_as)) = match direction {
            Direction::Reply => ((flow.client, flow.frontend), (flow.backend.0, flow.frontend.0)),
            Direction::Forward => ((flow.backend, flow.seen), (flow.client.0, flow.seen.0)),
        };
        let mut error = packet.clone();
        error.dst = before.0.0;
        if packet.src == other || (error.dst != packet.dst && !flow.masqueraded) {
            error.src = other_as;
        }
        let mut quoted = known_as(about, before.0, before.1).build()[ETHERNET..].to_vec();
        quoted.truncate(payload.len());
        if let Body::Icmp { payload, .. } = &mut error.body {
            *payload = quoted;
        }
        Ok(Some(error))
    }

    /// A packet of a known flow, as that makes it. Only policies know a flow whose packets stay what they are.
    pub(super) fn goes_on(&mut self, packet: &Packet, observed: &Observed<'_>) -> Result<(), Judgement> {
        if *packet == observed.sent.packet {
            self.leaves(packet, observed)
        } else {
            self.goes(packet, observed)
        }
    }

    /// Whether exactly this packet went where its destination is.
    pub(super) fn goes(&self, packet: &Packet, observed: &Observed<'_>) -> Result<(), Judgement> {
        let to = To::of(&self.cluster, packet.dst);
        match observed.seen {
            Seen::Went(place, went) if *place == to && went == packet => Ok(()),
            Seen::Went(..) | Seen::Dropped(_) => Err(Judgement::Wrong(format!("to {to:?}: {packet}"))),
        }
    }
}

/// A packet, what became of it, and the second of that.
pub(super) struct Observed<'a> {
    pub(super) sent: &'a Sent,
    pub(super) seen: &'a Seen,
    pub(super) now: u64,
}

/// The node has no address of the family that could stand in for a client.
struct NoAddress;

fn protocol_of(packet: &Packet) -> Option<&'static str> {
    match packet.proto() {
        TCP => Some("TCP"),
        UDP => Some("UDP"),
        SCTP => Some("SCTP"),
        _ => None,
    }
}
