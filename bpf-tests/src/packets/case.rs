//! Objects and packets in turn, through the node and past the oracle; and what is left of a case that goes wrong when
//! all that does not matter is taken away.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::ops::AddAssign;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::node::Node;
use super::oracle::{From, Judgement, Oracle, Seen, Sent, To};
use super::plain::{Echo, echo};
use super::text::{chunk_bytes, segment};
use super::wire::{Body, ETHERNET, Packet, Ports};
use crate::oracle::case as json;

/// One thing that happens.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// An object, or one that has `gone: true`.
    Apply(Value),
    /// Seconds pass.
    Wait(u32),
    Send(Send),
}

/// A packet that is sent under a number, by which others refer to it.
#[derive(Clone, Debug, PartialEq)]
pub struct Send {
    pub number: u32,
    pub what: What,
    /// Of the lines one must be what becomes of it; none where only the oracle judges.
    pub becomes: Vec<String>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum What {
    /// From where its source is.
    Packet {
        packet: Packet,
        /// So many bytes of the transport in each, a multiple of eight.
        fragments: Option<usize>,
        /// The pod that sends it, where its source is another's.
        by: Option<IpAddr>,
    },
    /// Who got a packet answers it; nothing where nobody did, or it was of another protocol.
    Answer { to: u32, says: Says },
    /// Somebody refuses a packet that was sent on; nothing where it was not.
    Error { about: u32, by: By, kind: (u8, u8), quoted: usize },
}

/// What an answer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Says {
    Tcp(u8),
    Udp,
    Sctp(u8),
    /// What was sent back to who asked for an echo.
    Echo,
}

/// Who sends an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    Receiver,
    /// On the way from the node to the receiver.
    Router,
}

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Which packet, and what became of it.
    pub packet: String,
    pub seen: String,
    pub expected: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { packet, seen, expected } = self;
        write!(f, "packet {packet}\n  became   {seen}\n  expected {expected}")
    }
}

/// What happened in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub cases: u64,
    pub packets: u64,
    pub objects: u64,
    pub changed: u64,
    pub refused: u64,
    pub dropped: u64,
    /// Of those that were dropped: by policies.
    pub barred: u64,
    /// Because a pod sent them from an address that is not its own.
    pub spoofed: u64,
    pub errors: u64,
    pub fragmented: u64,
    pub unsure: u64,
}

/// A packet that arrived.
struct Arrived {
    to: To,
    packet: Packet,
}

struct Run<'a> {
    node: &'a mut Node,
    oracle: Oracle,
    arrived: BTreeMap<u32, Arrived>,
    counts: &'a mut Counts,
}

/// Runs a case without flows from before, and leaves none. The objects that come first are there when it begins; what
/// cases before applied is not.
///
/// # Errors
/// Where an object makes no sense to the agent, or the kernel refuses.
pub fn run(steps: &[Step], node: &mut Node, counts: &mut Counts) -> Result<Option<Failure>> {
    let first = steps.iter().take_while(|step| matches!(step, Step::Apply(_))).count();
    let (objects, rest) = steps.split_at(first);
    let mut cluster = node.ground().clone();
    for step in objects {
        if let Step::Apply(object) = step {
            cluster.apply(object);
        }
    }
    counts.cases += 1;
    counts.objects += node.become_like(&cluster)?;
    let mut run =
        Run { oracle: Oracle::new(cluster, node.configuration()), node, arrived: BTreeMap::new(), counts };
    let result = run.steps(rest);
    if !matches!(result, Ok(None)) {
        // What the oracle does not know of may be there, too.
        run.node.sweep()?;
    }
    run.node.forget(&run.oracle.tuples(), &run.oracle.clients())?;
    result
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        let Self {
            cases,
            packets,
            objects,
            changed,
            refused,
            dropped,
            barred,
            spoofed,
            errors,
            fragmented,
            unsure,
        } = other;
        self.cases += cases;
        self.packets += packets;
        self.objects += objects;
        self.changed += changed;
        self.refused += refused;
        self.dropped += dropped;
        self.barred += barred;
        self.spoofed += spoofed;
        self.errors += errors;
        self.fragmented += fragmented;
        self.unsure += unsure;
    }
}

impl Run<'_> {
    fn steps(&mut self, steps: &[Step]) -> Result<Option<Failure>> {
        for step in steps {
            match step {
                Step::Apply(object) => {
                    self.counts.objects += 1;
                    self.oracle.apply(object);
                    self.node.apply(object)?;
                }
                Step::Wait(seconds) => {
                    self.node.wait(*seconds, &self.oracle.tuples(), &self.oracle.clients())?;
                }
                Step::Send(send) => match self.send(send)? {
                    Went::Right => {}
                    Went::Unsure => return Ok(None),
                    Went::Wrong(failure) => return Ok(Some(failure)),
                },
            }
        }
        Ok(None)
    }

    fn send(&mut self, send: &Send) -> Result<Went> {
        let Some(sent) = self.sent(&send.what) else { return Ok(Went::Right) };
        self.counts.packets += 1;
        self.counts.fragmented += u64::from(sent.fragments.is_some());
        let packet = format!("{}: {} (from {:?})", send.number, sent.packet, sent.from);
        let now = self.node.now()?;
        let seen = match self.node.send(&sent) {
            Ok(seen) => seen,
            Err(error) => {
                let (seen, expected) = (format!("{error:#}"), "a packet".into());
                return Ok(Went::Wrong(Failure { packet, seen, expected }));
            }
        };
        let wrong =
            |expected| Ok(Went::Wrong(Failure { packet: packet.clone(), seen: seen.to_string(), expected }));
        match self.oracle.judge(&sent, &seen, now) {
            Judgement::Right => {}
            Judgement::Wrong(expected) => return wrong(expected),
            Judgement::Unsure(_why) => {
                self.counts.unsure += 1;
                return Ok(Went::Unsure);
            }
        }
        if !send.becomes.is_empty() && !send.becomes.iter().any(|line| matches(line, &seen.to_string())) {
            return wrong(send.becomes.join(" or "));
        }
        self.count(&sent, &seen);
        if let Seen::Went(to, packet) = seen {
            self.arrived.insert(send.number, Arrived { to, packet });
        }
        Ok(Went::Right)
    }

    fn count(&mut self, sent: &Sent, seen: &Seen) {
        match seen {
            Seen::Dropped(reason) => {
                self.counts.dropped += 1;
                self.counts.barred += u64::from(reason.is_some_and(|it| it.starts_with("policy-")));
                self.counts.spoofed += u64::from(*reason == Some("spoofed-source"));
            }
            Seen::Went(To::Sender, _) => self.counts.refused += 1,
            Seen::Went(To::Pod(_) | To::Wire | To::Host, packet) => {
                let changed = u64::from(*packet != sent.packet);
                self.counts.changed += changed;
                self.counts.errors += u64::from(sent.about.is_some()) * changed;
            }
        }
    }

    /// The packet of a step; `None` where what it is about did not arrive.
    fn sent(&self, what: &What) -> Option<Sent> {
        match what {
            What::Packet { packet, fragments, by } => {
                let (from, packet) = (self.origin(by.unwrap_or(packet.src)), packet.clone());
                Some(Sent { from, packet, fragments: *fragments, about: None })
            }
            What::Answer { to, says } => {
                let Arrived { to, packet } = self.arrived.get(to)?;
                let ports = packet.ports().unwrap_or(Ports { src: 0, dst: 0 });
                let ports = Ports { src: ports.dst, dst: ports.src };
                let body = match (says, &packet.body) {
                    (Says::Echo, Body::Icmp { kind, rest, payload, .. }) => {
                        let kind = match echo(*kind, packet.src)? {
                            Echo::Request if packet.src.is_ipv4() => 0,
                            Echo::Request => 129,
                            Echo::Reply => return None,
                        };
                        Body::Icmp { kind, code: 0, rest: *rest, payload: payload.clone() }
                    }
                    (Says::Tcp(flags), Body::Tcp(_)) => Body::Tcp(segment(ports, *flags)),
                    (Says::Udp, Body::Udp { .. }) => Body::Udp { ports, checksum: true, payload: vec![1] },
                    (Says::Sctp(chunk), Body::Sctp { tag, .. }) => {
                        Body::Sctp { ports, tag: *tag, chunks: chunk_bytes(*chunk, &[]) }
                    }
                    _ => return None,
                };
                let packet = Packet::new(packet.dst, packet.src, body);
                Some(Sent { from: receiver(*to)?, packet, fragments: None, about: None })
            }
            What::Error { about, by, kind: (kind, code), quoted } => {
                let Arrived { to, packet } = self.arrived.get(about)?;
                let from = receiver(*to)?;
                let src = match (by, from) {
                    (By::Receiver, _) => packet.dst,
                    (By::Router, From::Wire) => router(packet.dst),
                    (By::Router, From::Pod(_) | From::Host) => return None,
                };
                let mut payload = packet.build()[ETHERNET..].to_vec();
                payload.truncate(*quoted);
                let body = Body::Icmp { kind: *kind, code: *code, rest: [0, 0, 5, 220], payload };
                let error = Packet::new(src, packet.src, body);
                Some(Sent { from, packet: error, fragments: None, about: Some(packet.clone()) })
            }
        }
    }

    fn origin(&self, src: IpAddr) -> From {
        if self.oracle.cluster.local_pods().contains(&src) {
            From::Pod(src)
        } else if self.oracle.cluster.node_addresses().contains(&src) {
            From::Host
        } else {
            From::Wire
        }
    }
}

enum Went {
    Right,
    Unsure,
    Wrong(Failure),
}

fn receiver(to: To) -> Option<From> {
    match to {
        To::Pod(addr) => Some(From::Pod(addr)),
        To::Wire => Some(From::Wire),
        To::Host => Some(From::Host),
        To::Sender => None,
    }
}

fn router(like: IpAddr) -> IpAddr {
    if like.is_ipv4() {
        IpAddr::from([192, 0, 2, 254])
    } else {
        IpAddr::from([0x2001, 0xdb8, 0xfe, 0, 0, 0, 0, 1])
    }
}

/// Whether a line is what was expected, in which a port may be `*`.
fn matches(expected: &str, seen: &str) -> bool {
    let (expected, mut seen): (Vec<_>, Vec<_>) =
        (expected.split_whitespace().collect(), seen.split_whitespace().collect());
    // For whichever reason.
    if expected == ["dropped"] {
        seen.truncate(1);
    }
    let word = |(expected, seen): (&&str, &&str)| {
        expected.strip_suffix(":*").map_or(expected == seen, |start| {
            seen.rsplit_once(':').is_some_and(|(addr, _port)| addr == start)
        })
    };
    expected.len() == seen.len() && expected.iter().zip(&seen).all(word)
}

/// Takes away steps and parts of objects, as long as the case still goes wrong.
///
/// # Errors
/// Where a step cannot be written as text.
pub fn shrink(steps: &[Step], mut fails: impl FnMut(&[Step]) -> bool) -> Result<Vec<Step>> {
    let values: Vec<Value> = steps
        .iter()
        .map(|step| match step {
            Step::Apply(object) => object.clone(),
            Step::Wait(_) | Step::Send(_) => Value::String(step.to_string()),
        })
        .collect();
    let read = |values: &[Value]| -> Result<Vec<Step>> {
        let step = |value: &Value| match value {
            Value::String(line) => line.parse(),
            Value::Object(_) => Ok(Step::Apply(value.clone())),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) => bail!("no step: {value}"),
        };
        values.iter().map(step).collect()
    };
    let smallest = json::shrink(values, may_go, |values| read(values).is_ok_and(|steps| fails(&steps)));
    read(&smallest).context("a shrunk case")
}

/// Steps, elements of lists, and fields without which an object is still one that the API would take.
fn may_go(path: &[String]) -> bool {
    const FIELDS: [&str; 9] = [
        "conditions",
        "externalIPs",
        "externalTrafficPolicy",
        "hints",
        "internalTrafficPolicy",
        "loadBalancerSourceRanges",
        "nodePort",
        "sessionAffinity",
        "sessionAffinityConfig",
    ];
    path.last().is_some_and(|last| FIELDS.contains(&last.as_str()) || last.parse::<usize>().is_ok())
        // An endpoint has one address, and a pod keeps its own.
        && !path.iter().any(|it| it == "addresses" || it == "clusterIPs" || it == "podIPs")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_may_be_any() {
        let seen = "pod tcp 192.168.5.1:2048 > 10.244.1.2:8080 SYN";
        assert!(matches("pod tcp 192.168.5.1:*  > 10.244.1.2:8080 SYN", seen));
        assert!(!matches("pod tcp 192.168.5.2:* > 10.244.1.2:8080 SYN", seen));
        assert!(!matches("pod tcp 192.168.5.1:* > 10.244.1.2:8080", seen));
        assert!(matches("dropped", "dropped source-range"));
        assert!(!matches("dropped policy-egress", "dropped source-range"));
        assert!(matches("wire udp [fd00::1]:* > [fd00::2]:53", "wire udp [fd00::1]:9 > [fd00::2]:53"));
    }

    #[test]
    fn what_does_not_matter_is_taken_away() {
        let line = |line: &str| line.parse::<Step>().unwrap();
        let steps = [
            Step::Apply(
                serde_json::json!({"kind": "Pod", "spec": {"containers": [{"name": "a"}, {"name": "b"}]}}),
            ),
            line("1: send udp 10.0.0.1:1 > 10.0.0.2:2"),
            line("wait 30"),
            line("2: answer 1 udp"),
        ];
        let fails = |steps: &[Step]| {
            let object = steps.iter().any(|it| it.to_string().contains(r#""name":"b""#));
            object && steps.iter().any(|it| *it == line("wait 30"))
        };
        let expected =
            Step::Apply(serde_json::json!({"kind": "Pod", "spec": {"containers": [{"name": "b"}]}}));
        assert_eq!(shrink(&steps, fails).unwrap(), [expected, line("wait 30")]);
    }
}
