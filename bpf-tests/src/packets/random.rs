//! Random cases: a small cluster, so that services, endpoints and flows meet, and packets that mostly matter to it.

use std::net::IpAddr;

use ferroflow_ebpf::noise::Noise;
use serde_json::{Value, json};

use super::barriers;
use super::case::{By, Says, Send, Step, What};
use super::cluster::Configuration;
use super::text::{chunk_bytes, segment};
use super::wire::{ACK, Body, Extras, FIN, Packet, Ports, RST, SYN};

/// The case of this number: some services and policies, which it shares with its neighbours, then packets and changes.
pub fn case(seed: u64, configuration: Configuration) -> Vec<Step> {
    let (mut steps, place) = begin(&mut Noise(seed / NEIGHBOURS), configuration);
    let noise = &mut Noise(seed ^ PACKETS);
    let mut sends = Vec::new();
    for _ in 0..4 + noise.below(14) {
        match noise.below(100) {
            0..12 => steps.extend(change(noise, place).into_iter().map(Step::Apply)),
            12..15 => steps.push(Step::Wait(noise.pick(&[1, 20, 45, 100, 200, 400, 4_000]))),
            _ => {
                let number = sends.len() as u32 + 1;
                let what = what(noise, &sends, place);
                sends.push(what.clone());
                steps.push(Step::Send(Send { number, what, becomes: Vec::new() }));
            }
        }
    }
    steps
}

/// What a case takes place among.
#[derive(Clone, Copy, Debug)]
struct Place {
    services: usize,
    policies: bool,
    configuration: Configuration,
}

/// Of every ten groups of neighbours three are cases of a node that masquerades.
pub fn configuration(seed: u64) -> Configuration {
    if seed / NEIGHBOURS % 10 < 7 { Configuration::Usual } else { Configuration::Masquerading }
}

/// So many cases begin with the same services.
const NEIGHBOURS: u64 = 8;
/// Makes packets another noise than services.
const PACKETS: u64 = 0x70ac_4e75_0000_0000;

fn begin(noise: &mut Noise, configuration: Configuration) -> (Vec<Step>, Place) {
    let place = Place { services: 1 + noise.below(SERVICES), policies: noise.percent(50), configuration };
    let mut objects = if place.policies { barriers::objects(noise) } else { Vec::new() };
    for number in 0..place.services {
        objects.push(service(noise, number));
        for family in [0, 0, 1, 1] {
            if noise.percent(60) {
                objects.push(slice(noise, number, family));
            }
        }
    }
    (objects.into_iter().map(Step::Apply).collect(), place)
}

const SERVICES: usize = 3;
/// Addresses of this node's pods, of other nodes' and of who is outside of the cluster.
pub(super) const LOCAL: [[&str; 2]; 3] =
    [["10.244.1.2", "fd00:244:1::2"], ["10.244.1.3", "fd00:244:1::3"], ["10.244.1.4", "fd00:244:1::4"]];
pub(super) const REMOTE: [[&str; 2]; 2] = [["10.244.2.2", "fd00:244:2::2"], ["10.244.2.3", "fd00:244:2::3"]];
const OUTSIDE: [[&str; 2]; 2] = [["203.0.113.7", "2001:db8::7"], ["198.51.100.9", "2001:db8:1::9"]];
const OWN: [&str; 2] = ["192.168.5.1", "fd00:5::1"];
/// Of this node, and not the one that serves NodePorts.
const SECOND: [&str; 2] = ["192.168.6.1", "fd00:6::1"];
const OTHER_NODE: [&str; 2] = ["192.168.5.2", "fd00:5::2"];

/// The ports that a service may have: name, protocol, its number, the endpoints' number.
const PORTS: [(&str, &str, u16, u16); 4] = [
    ("http", "TCP", 80, 8080),
    ("alt", "TCP", 81, 8080),
    ("dns", "UDP", 53, 5353),
    ("ss7", "SCTP", 2905, 3868),
];

fn cluster_ip(number: usize) -> [String; 2] {
    [format!("10.96.0.{}", 10 + number), format!("fd00:96::{}", 10 + number)]
}

fn balancer_ip(number: usize) -> [String; 2] {
    [format!("192.0.2.{}", 10 + number), format!("2001:db8:b::{}", 10 + number)]
}

fn external_ip(number: usize) -> [String; 2] {
    [format!("192.0.2.{}", 110 + number), format!("2001:db8:e::{}", 110 + number)]
}

fn node_port(number: usize, port: usize) -> u16 {
    (30_080 + number * 10 + port) as u16
}

/// Where every case begins: this node and another, ranges of addresses, and the pods of this node.
pub fn ground() -> Vec<Value> {
    let pods = (0..LOCAL.len()).map(local_pod);
    nodes().into_iter().chain(pods).collect()
}

fn nodes() -> Vec<Value> {
    let node = |name: &str, internal: [&str; 2], external: &[&str], ranges: [&str; 2]| {
        let typed = |kind: &str, addr: &&str| json!({"type": kind, "address": addr});
        let addresses: Vec<_> = internal
            .iter()
            .map(|it| typed("InternalIP", it))
            .chain(external.iter().map(|it| typed("ExternalIP", it)))
            .collect();
        json!({"kind": "Node",
            "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": "z1"}},
            "spec": {"podCIDRs": ranges}, "status": {"addresses": addresses}})
    };
    vec![
        node("here", OWN, &SECOND, ["10.244.1.0/24", "fd00:244:1::/64"]),
        node("there", OTHER_NODE, &[], ["10.244.2.0/24", "fd00:244:2::/64"]),
        json!({"kind": "ServiceCIDR", "metadata": {"name": "kubernetes"},
            "spec": {"cidrs": ["10.96.0.0/24", "fd00:96::/112"]}}),
    ]
}

pub(super) fn local_pod(number: usize) -> Value {
    json!({"kind": "Pod", "metadata": {"name": format!("p{number}"), "namespace": "default"},
        "spec": {"nodeName": "here"},
        "status": {"phase": "Running", "podIPs": LOCAL[number].map(|ip| json!({"ip": ip}))}})
}

fn service(noise: &mut Noise, number: usize) -> Value {
    let kind = noise.pick(&["ClusterIP", "NodePort", "LoadBalancer"]);
    let families = noise.pick(&[&[0, 1][..], &[0, 1], &[0], &[1]]);
    let of = |all: [String; 2]| families.iter().map(|family| all[*family].clone()).collect::<Vec<_>>();
    let mut ports = Vec::new();
    for (index, (name, protocol, port, _)) in PORTS.iter().enumerate() {
        if noise.percent(70) || (index + 1 == PORTS.len() && ports.is_empty()) {
            let mut it = json!({"name": name, "protocol": protocol, "port": port});
            if kind != "ClusterIP" && noise.percent(80) {
                it["nodePort"] = node_port(number, index).into();
            }
            ports.push(it);
        }
    }
    let mut object = json!({"kind": "Service",
        "metadata": {"name": format!("s{number}"), "namespace": "default"},
        "spec": {"type": kind, "clusterIP": of(cluster_ip(number))[0], "clusterIPs": of(cluster_ip(number)),
            "ports": ports}});
    for (field, percent) in [("internalTrafficPolicy", 15), ("externalTrafficPolicy", 40)] {
        if noise.percent(percent) && (field == "internalTrafficPolicy" || kind != "ClusterIP") {
            object["spec"][field] = "Local".into();
        }
    }
    if noise.percent(25) {
        object["spec"]["sessionAffinity"] = "ClientIP".into();
        let seconds = noise.pick(&[30, 150, 10_800]);
        object["spec"]["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": seconds}});
    }
    if noise.percent(25) {
        object["spec"]["externalIPs"] = of(external_ip(number)).into();
    }
    if kind == "LoadBalancer" {
        let mode = if noise.percent(10) { "Proxy" } else { "VIP" };
        let ingress: Vec<_> =
            of(balancer_ip(number)).iter().map(|ip| json!({"ip": ip, "ipMode": mode})).collect();
        object["status"] = json!({"loadBalancer": {"ingress": ingress}});
        if noise.percent(35) {
            const RANGES: [&str; 5] =
                ["203.0.113.0/24", " 10.244.1.2/31", "2001:db8::/64", "0.0.0.0/0", "192.0.2.0/24 "];
            let ranges: Vec<_> = RANGES.iter().filter(|_| noise.percent(40)).collect();
            object["spec"]["loadBalancerSourceRanges"] = json!(ranges);
        }
    }
    object
}

fn slice(noise: &mut Noise, number: usize, family: usize) -> Value {
    let part = noise.below(LOCAL.len());
    let ports: Vec<_> = PORTS
        .iter()
        .map(|(name, protocol, _, target)| json!({"name": name, "protocol": protocol, "port": target}))
        .filter(|_| noise.percent(90))
        .collect();
    let count = if number == HINTED { 1 } else { noise.below(4) };
    let endpoint = |_| if number == HINTED { hinted(noise, family, part) } else { endpoint(noise, family) };
    let endpoints: Vec<_> = (0..count).map(endpoint).collect();
    json!({"kind": "EndpointSlice",
        "metadata": {"name": format!("s{number}-{part}-v{}", 4 + 2 * family), "namespace": "default",
            "labels": {"kubernetes.io/service-name": format!("s{number}")}},
        "addressType": (["IPv4", "IPv6"][family]), "ports": ports, "endpoints": endpoints})
}

/// The service whose endpoints have hints.
const HINTED: usize = 2;

/// The same address has the same node.
fn endpoint(noise: &mut Noise, family: usize) -> Value {
    let (addr, node) = match noise.below(26) {
        0 | 1 => (OWN[family], "here".into()),
        2..14 => (noise.pick(&LOCAL)[family], "here".into()),
        14..24 => (noise.pick(&REMOTE)[family], "there".into()),
        _ => (noise.pick(&OUTSIDE)[family], Value::Null),
    };
    let mut object = json!({"addresses": [addr], "nodeName": node});
    match noise.below(10) {
        0 => object["conditions"] = json!({"ready": false, "serving": true, "terminating": true}),
        1 => object["conditions"] = json!({"ready": false, "serving": false, "terminating": false}),
        2 => object["conditions"] = json!({"ready": false, "serving": true, "terminating": false}),
        3 => object["conditions"] = json!({"ready": true, "serving": true, "terminating": true}),
        _ => {}
    }
    object
}

/// In no other slice: which of two copies' hints count is nobody's rule.
fn hinted(noise: &mut Noise, family: usize, part: usize) -> Value {
    let mut object = endpoint(noise, family);
    let (addr, node) = if part == 0 { (REMOTE[part], "there") } else { (LOCAL[part], "here") };
    object["addresses"] = json!([addr[family]]);
    object["nodeName"] = node.into();
    if noise.percent(90) {
        let zone = noise.pick(&["z1", "z1", "z2"]);
        object["hints"]["forZones"] = json!([{"name": zone}]);
        if noise.percent(60) {
            object["hints"]["forNodes"] = json!([{"name": node}]);
        }
    }
    object
}

fn change(noise: &mut Noise, place: Place) -> Vec<Value> {
    if place.policies && noise.percent(60) {
        return barriers::change(noise);
    }
    let number = noise.below(place.services);
    let mut object = match noise.below(10) {
        0..3 => service(noise, number),
        _ => {
            let family = noise.below(2);
            slice(noise, number, family)
        }
    };
    if noise.percent(20) {
        let metadata = &object["metadata"];
        object = json!({"kind": object["kind"], "metadata": metadata, "gone": true});
    }
    vec![object]
}

/// What is sent next, given what was sent before.
fn what(noise: &mut Noise, before: &[What], place: Place) -> What {
    let earlier = |noise: &mut Noise| 1 + noise.below(before.len()) as u32;
    match noise.below(100) {
        // Mostly of what was sent last.
        0..35 if !before.is_empty() => {
            let to = if noise.percent(60) { before.len() as u32 } else { earlier(noise) };
            What::Answer { to, says: says(noise, before, to) }
        }
        35..43 if !before.is_empty() => {
            let about = earlier(noise);
            let by = noise.pick(&[By::Receiver, By::Router]);
            // Seldom one that the family does not have.
            let v4 = origin(before, about).src.is_ipv4() != noise.percent(5);
            let kinds: &[_] =
                if v4 { &[(3, 4), (3, 3), (11, 0), (12, 0)] } else { &[(1, 4), (2, 0), (3, 0), (4, 0)] };
            let kind = noise.pick(kinds);
            What::Error { about, by, kind, quoted: noise.pick(&[28, 40, 48, 60, 68, 1_500, 1_500]) }
        }
        43..55 if !before.is_empty() => {
            let index = noise.below(before.len());
            again(noise, &before[index])
        }
        _ => {
            let masquerading = place.configuration == Configuration::Masquerading;
            let packet = if masquerading && noise.percent(45) {
                outward(noise)
            } else if place.policies && noise.percent(45) {
                direct(noise)
            } else {
                packet(noise, place.services)
            };
            let by = (masquerading && noise.percent(4)).then(|| another(noise, packet.src));
            let whole = !matches!(packet.body, Body::Udp { .. } | Body::Tcp(_)) || noise.percent(93);
            // A TCP header in two fragments is nobody's honest packet, and dropped (RFC 1858).
            let least = if matches!(packet.body, Body::Tcp(_)) { 32 } else { 8 };
            let fragments = (!whole).then(|| noise.pick(&[least, 40, 64]));
            let packet = if fragments.is_some() { long(noise, packet) } else { packet };
            What::Packet { packet, fragments, by }
        }
    }
}

/// The same ends once more, with something else to say.
fn again(noise: &mut Noise, what: &What) -> What {
    let mut what = what.clone();
    if let What::Packet { packet, fragments, .. } = &mut what {
        *fragments = None;
        packet.extras = Extras::default();
        // A whole packet of IPv6 has none.
        packet.id = 7;
        match &mut packet.body {
            Body::Tcp(it) => *it = segment(it.ports, noise.pick(&FLAGS)),
            Body::Sctp { chunks, .. } => *chunks = chunk_bytes(noise.pick(&CHUNKS), &[]),
            Body::Udp { .. } | Body::Icmp { .. } | Body::Other { .. } => {}
        }
    }
    what
}

const FLAGS: [u8; 9] = [SYN, SYN, ACK, ACK | 8, FIN | ACK, FIN | ACK, RST, RST | ACK, SYN | ACK];
const CHUNKS: [u8; 9] = [1, 1, 2, 0, 0, 6, 7, 8, 14];

/// The packet that an answer or error goes back to.
fn origin(before: &[What], mut number: u32) -> &Packet {
    loop {
        match &before[number as usize - 1] {
            What::Packet { packet, .. } => return packet,
            What::Answer { to, .. } => number = *to,
            What::Error { about, .. } => number = *about,
        }
    }
}

fn says(noise: &mut Noise, before: &[What], to: u32) -> Says {
    match origin(before, to).body {
        Body::Tcp(_) => Says::Tcp(noise.pick(&[SYN | ACK, SYN | ACK, ACK, ACK, FIN | ACK, RST, SYN])),
        Body::Sctp { .. } => Says::Sctp(noise.pick(&[2, 2, 0, 0, 7, 6, 1])),
        Body::Icmp { .. } => Says::Echo,
        Body::Udp { .. } | Body::Other { .. } => Says::Udp,
    }
}

fn addr(text: &str) -> IpAddr {
    text.parse().unwrap_or(IpAddr::from([0; 4]))
}

fn packet(noise: &mut Noise, services: usize) -> Packet {
    let family = noise.below(2);
    let (index, number) = (noise.below(PORTS.len()), noise.below(services));
    let (_, protocol, port, target) = PORTS[index];
    let src = match noise.below(10) {
        0..5 => noise.pick(&LOCAL)[family],
        5..9 => noise.pick(&OUTSIDE)[family],
        _ => noise.pick(&REMOTE)[family],
    };
    let of = |all: [String; 2]| addr(&all[family]);
    let (dst, dst_port) = match noise.below(20) {
        0..9 => (of(cluster_ip(number)), port),
        9..12 => (of(balancer_ip(number)), port),
        12..14 => (of(external_ip(number)), port),
        14..17 => (addr(OWN[family]), node_port(number, index)),
        17 => (addr(noise.pick(&[SECOND, OTHER_NODE])[family]), node_port(number, index)),
        18 => (addr(noise.pick(&LOCAL)[family]), target),
        _ => (of(cluster_ip(noise.below(SERVICES + 3))), noise.pick(&[443, port])),
    };
    // Who asks a pod by its own address has another port: what is tracked is not told from what is not.
    let first = if dst_port == target { 6_000 } else { 4_000 };
    let ports = Ports { src: first + noise.below(2) as u16, dst: dst_port };
    let body = body(noise, protocol, ports);
    let mut packet = Packet::new(addr(src), dst, body);
    if noise.percent(10) {
        packet.extras = extras(packet.src);
    }
    packet.hops = noise.pick(&[64, 64, 3, 255]);
    packet.id = if packet.src.is_ipv4() { noise.number() as u16 } else { packet.id };
    packet
}

/// Between pods, this node and others, by their own addresses.
fn direct(noise: &mut Noise) -> Packet {
    let family = noise.below(2);
    let (_, protocol, _, target) = noise.pick(&PORTS);
    let mut pick = |local| {
        let text = match noise.below(20) {
            it if it < local => noise.pick(&LOCAL),
            0..14 => noise.pick(&REMOTE),
            14..18 => noise.pick(&OUTSIDE),
            18 => OWN,
            _ => OTHER_NODE,
        };
        addr(text[family])
    };
    let (src, mut dst) = (pick(8), pick(14));
    if [src, dst].iter().all(|it| LOCAL.iter().all(|pod| addr(pod[family]) != *it)) {
        dst = addr(noise.pick(&LOCAL)[family]);
    }
    let ports =
        Ports { src: 6_000 + noise.below(2) as u16, dst: noise.pick(&[target, target, target, 9_090, 80]) };
    let body = if noise.percent(20) { echo(noise, src) } else { body(noise, protocol, ports) };
    Packet::new(src, dst, body)
}

/// From a pod to who is outside of the cluster, or from there to a port of the node.
fn outward(noise: &mut Noise) -> Packet {
    let family = noise.below(2);
    let (_, protocol, port, _) = noise.pick(&PORTS);
    let (pod, other) = (addr(noise.pick(&LOCAL)[family]), addr(noise.pick(&OUTSIDE)[family]));
    if noise.percent(8) {
        let ports = Ports { src: port, dst: 1_024 + noise.below(28_976) as u16 };
        return Packet::new(other, addr(OWN[family]), body(noise, protocol, ports));
    }
    let ports = Ports { src: 5_000 + noise.below(2) as u16, dst: port };
    let body = match noise.below(20) {
        0..4 => echo(noise, pod),
        4 => Body::Other { proto: 47, bytes: noise.bytes(12) },
        _ => body(noise, protocol, ports),
    };
    Packet::new(pod, other, body)
}

/// A local pod that does not have the address.
fn another(noise: &mut Noise, src: IpAddr) -> IpAddr {
    let family = usize::from(src.is_ipv6());
    let pods = LOCAL.map(|pod| addr(pod[family]));
    let others: Vec<_> = pods.into_iter().filter(|pod| *pod != src).collect();
    noise.pick(&others)
}

fn echo(noise: &mut Noise, src: IpAddr) -> Body {
    let kinds = if src.is_ipv4() { &[8, 8, 8, 0, 13] } else { &[128, 128, 128, 129, 100] };
    let [high, low] = noise.pick(&[0_u16, 7, 513]).to_be_bytes();
    Body::Icmp { kind: noise.pick(kinds), code: 0, rest: [high, low, 0, 1], payload: noise.bytes(5) }
}

fn body(noise: &mut Noise, protocol: &str, ports: Ports) -> Body {
    let length = noise.pick(&[0, 1, 7, 40]);
    let payload = noise.bytes(length);
    if noise.percent(2) {
        // Never all zeros: incremental sums do not tell the two zeros of one's complement apart (RFC 1624).
        return Body::Icmp { kind: noise.pick(&[8, 128]), code: 0, rest: [0, 0, 0, 1], payload };
    }
    match protocol {
        "TCP" => {
            let mut segment = segment(ports, if noise.percent(60) { SYN } else { noise.pick(&FLAGS) });
            segment.options = vec![1; noise.below(3) * 4];
            segment.seq = noise.number() as u32;
            segment.payload = payload;
            Body::Tcp(segment)
        }
        "SCTP" => {
            let chunk = if noise.percent(60) { 1 } else { noise.pick(&CHUNKS) };
            Body::Sctp { ports, tag: noise.number() as u32, chunks: chunk_bytes(chunk, &payload) }
        }
        _ => Body::Udp { ports, checksum: true, payload },
    }
}

fn extras(src: IpAddr) -> Extras {
    if src.is_ipv4() {
        Extras { options: vec![1; 8], ..Extras::default() }
    } else {
        // Hop-by-hop and destination options, each with padding only (RFC 8200 section 4.2).
        let extensions = vec![(0, vec![0, 1, 4, 0, 0, 0, 0]), (60, vec![0, 1, 4, 0, 0, 0, 0])];
        Extras { extensions, ..Extras::default() }
    }
}

/// With enough to carry for several fragments, and an identification that no other has had lately.
fn long(noise: &mut Noise, mut packet: Packet) -> Packet {
    let length = 30 + noise.below(100);
    match &mut packet.body {
        Body::Tcp(segment) => segment.payload = noise.bytes(length),
        Body::Udp { payload, .. } => *payload = noise.bytes(length),
        Body::Sctp { .. } | Body::Icmp { .. } | Body::Other { .. } => {}
    }
    packet.extras = Extras::default();
    packet.id = noise.number() as u16;
    packet
}
