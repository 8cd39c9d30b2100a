//! Packets through every program that takes packets.
//!
//! A program may pass a packet on as it came, drop it, or change it. What it changed has right checksums where they
//! were right, and wrong ones where they were wrong: damage is not hidden, and none is done. A refusal, which is a new
//! packet, is right in every field.

use std::fs;

use anyhow::{Context as _, Result, bail, ensure};
use ferroflow_ebpf::frame::verify;
use ferroflow_ebpf::noise::Noise;
use nix::net::if_::if_nametoindex;

use super::{Effort, Report, corpus, mutate::mutate};
use crate::packets::case::{Step, What};
use crate::packets::cluster::Configuration;
use crate::packets::node::{Node, PODS};
use crate::packets::oracle::{From, Sent};
use crate::packets::random;
use crate::packets::text::{hex, unhex};
use crate::packets::wire::{ETHERNET, HERE, Packet, SENDER};
use crate::sandbox::Place;

const PROGRAMS: [&str; 7] = [
    "pod_egress",
    "pod_ingress",
    "device_ingress",
    "device_egress",
    "tunnel_ingress",
    "tunnel_egress",
    "device_xdp",
];

/// The kernel runs programs on no shorter IPv6 packet.
const SHORTEST: usize = 54;
/// So many packets meet the same services.
const ROUND: u64 = 5_000;
/// Packets that came out of programs, to be sent again.
const POOL: usize = 64;

pub(super) fn run(place: &Place, seed: u64, effort: Effort) -> Result<Report> {
    let mut node = Node::new(place, Configuration::Usual)?;
    let mut noise = Noise(seed);
    let kept = seeds()?;
    let interface = if_nametoindex(PODS[0])?;
    let mut counts = Counts::default();
    while effort.goes_on(counts.executions) {
        let mut pool = [kept.clone(), cluster(&mut node, &mut noise)?].concat();
        let first = pool.len();
        for _ in 0..ROUND {
            let (one, other) = (noise.below(pool.len()), noise.below(pool.len()));
            let mut packet = match noise.below(20) {
                0 => random_bytes(&mut noise),
                1 => pool[one].clone(),
                _ => mutate(&mut noise, &pool[one], &pool[other], SHORTEST),
            };
            // By these a refusal is told, which goes back.
            packet[..12].copy_from_slice(&[HERE, SENDER].concat());
            let program = noise.pick(&PROGRAMS);
            let (returned, became) = node.programs().run_named(program, Some(interface), &packet)?;
            let outcome = judge(program, &packet, returned, &became)
                .with_context(|| format!("{program}, packet {}\nbecame {}", hex(&packet), hex(&became)))?;
            counts.add(outcome);
            if became != packet && became.len() >= SHORTEST {
                // Whoever got it may answer.
                let place = first + noise.below(POOL);
                let bytes = answer(&became).unwrap_or(became);
                if place < pool.len() { pool[place] = bytes } else { pool.push(bytes) }
            }
        }
        node.sweep()?;
    }
    Ok(counts.report())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Unchanged,
    Changed,
    Refused,
    Dropped,
}

#[derive(Default)]
struct Counts {
    executions: u64,
    changed: u64,
    refused: u64,
    dropped: u64,
}

impl Counts {
    fn add(&mut self, outcome: Outcome) {
        self.executions += 1;
        match outcome {
            Outcome::Unchanged => {}
            Outcome::Changed => self.changed += 1,
            Outcome::Refused => self.refused += 1,
            Outcome::Dropped => self.dropped += 1,
        }
    }

    fn report(self) -> Report {
        let Self { executions, changed, refused, dropped } = self;
        let outcomes = vec![("changed", changed), ("refused", refused), ("dropped", dropped)];
        Report { target: "programs", executions, outcomes }
    }
}

/// TC_ACT_UNSPEC, TC_ACT_SHOT, TC_ACT_REDIRECT.
const TC: [u32; 3] = [u32::MAX, 2, 7];
const SHOT: u32 = 2;
/// XDP_DROP, XDP_PASS, XDP_TX.
const XDP: [u32; 3] = [1, 2, 3];
const XDP_DROP: u32 = 1;

fn judge(program: &str, packet: &[u8], returned: u32, became: &[u8]) -> Result<Outcome> {
    let (known, dropped) = if program == "device_xdp" { (XDP, XDP_DROP) } else { (TC, SHOT) };
    ensure!(known.contains(&returned), "returned {returned}");
    if returned == dropped {
        return Ok(Outcome::Dropped);
    }
    if became == packet {
        return Ok(Outcome::Unchanged);
    }
    // A fragment may have become one that waited for it, which was judged when it came.
    if let (Some(came), Some(went)) = (fragment(packet), fragment(became))
        && (came != went || packet.len() != became.len())
    {
        return Ok(Outcome::Changed);
    }
    if became.len() != packet.len() || became[..12] == [SENDER, HERE].concat() {
        Packet::parse(became).context("a refusal")?;
        return Ok(Outcome::Refused);
    }
    match (verify(packet), verify(became)) {
        (Ok(()), Err(damage)) => bail!("was right, and is now wrong: {damage}"),
        (Err(damage), Ok(())) => bail!("was wrong ({damage}), and is now right"),
        (Ok(()), Ok(())) | (Err(_), Err(_)) => Ok(Outcome::Changed),
    }
}

/// What tells a fragment from others of its datagram and of other datagrams; `None` of a whole packet.
fn fragment(frame: &[u8]) -> Option<&[u8]> {
    let ip = frame.get(ETHERNET..)?;
    match ip.first()? >> 4 {
        4 => {
            let field = ip.get(4..8)?;
            (u16::from_be_bytes([field[2], field[3]]) & 0x3fff != 0).then_some(field)
        }
        6 => {
            let (mut next, mut at) = (*ip.get(6)?, 40);
            // Hop-by-hop, routing, fragment, authentication and destination headers (RFC 8200, RFC 4302).
            while [0, 43, 51, 60].contains(&next) {
                let length = usize::from(*ip.get(at + 1)?);
                let own = std::mem::replace(&mut next, ip[at]);
                at += if own == 51 { length * 4 + 8 } else { length * 8 + 8 };
            }
            if next == 44 { ip.get(at..at + 8) } else { None }
        }
        _ => None,
    }
}

fn random_bytes(noise: &mut Noise) -> Vec<u8> {
    let length = SHORTEST + noise.below(200);
    let mut bytes = noise.bytes(length);
    let kind = noise.pick(&[[8, 0], [0x86, 0xdd], [8, 6], [0x81, 0]]);
    bytes[12..14].copy_from_slice(&kind);
    bytes
}

/// The same packet on its way back; `None` where it is none.
fn answer(frame: &[u8]) -> Option<Vec<u8>> {
    let packet = Packet::parse(frame).ok()?;
    let ports = packet.ports()?;
    Some(packet.between((packet.dst, ports.dst), (packet.src, ports.src)).build())
}

/// Other services, with flows; gives the packets that opened them.
fn cluster(node: &mut Node, noise: &mut Noise) -> Result<Vec<Vec<u8>>> {
    let mut cluster = node.ground().clone();
    let mut packets = Vec::new();
    let seed = noise.number() >> 8;
    for step in (seed..seed + 8).flat_map(|seed| random::case(seed, Configuration::Usual)) {
        match step {
            Step::Apply(object) => cluster.apply(&object),
            Step::Send(send) => {
                if let What::Packet { packet, fragments: None, .. } = send.what {
                    packets.push(packet);
                }
            }
            Step::Wait(_) => {}
        }
    }
    node.become_like(&cluster)?;
    for packet in &packets {
        let pod = cluster.local_pods().contains(&packet.src);
        let from = if pod { From::Pod(packet.src) } else { From::Wire };
        node.send(&Sent { from, packet: packet.clone(), fragments: None, about: None })?;
    }
    Ok(packets.iter().map(Packet::build).collect())
}

/// The packets that are kept: lines of text, or of bytes.
fn seeds() -> Result<Vec<Vec<u8>>> {
    let path = corpus("packets.txt");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let frame = |line: &str| match line.strip_prefix("bytes ") {
        Some(bytes) => unhex(bytes),
        None => Ok(line.parse::<Packet>()?.build()),
    };
    let mut frames = lines.map(frame).collect::<Result<Vec<_>>>()?;
    frames.iter_mut().for_each(|frame| frame.resize(frame.len().max(SHORTEST), 0));
    ensure!(!frames.is_empty(), "{} is empty", path.display());
    Ok(frames)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_that_is_done_or_hidden_is_told() {
        let right = seeds().unwrap().into_iter().find(|frame| verify(frame).is_ok()).unwrap();
        let mut wrong = right.clone();
        *wrong.last_mut().unwrap() ^= 1;
        let mut other = right.clone();
        other[24] ^= 1;
        let next = u32::MAX;
        for (packet, became) in [(&right, &other), (&other, &right)] {
            assert!(judge("pod_egress", packet, next, became).is_err());
        }
        assert!(judge("pod_egress", &right, next, &right).is_ok());
        assert!(judge("pod_egress", &right, SHOT, &other).is_ok(), "nobody gets it");
        assert!(judge("pod_egress", &right, 3, &right).is_err(), "TC_ACT_PIPE is none of ours");
    }
}
