//! `ferroflow policy explain`: what becomes of a new flow, and which rule of which policy says so. The answer is found in
//! the pinned maps by the function that the programs run; pods that are named, and not by their addresses, are the
//! agent's to find.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use ferroflow_common::abi::policy::{Cause, EndpointPolicy, Verdict};
use ferroflow_common::addr::{Addr, Port, Proto};
use ferroflow_ebpf::policy::{Wanted, class_of, decided};
use serde::Serialize;

use super::policy::View;
use super::table::table;
use super::{Answer, CliError};
use crate::config::Query;
use crate::maps::kernel::KernelMaps;
use crate::maps::{Maps as _, NodeAddresses};
use crate::observe::{PODS, PORT, pods::PodAddresses};

/// Which flow is asked about.
#[derive(Args, Debug)]
pub struct Question {
    /// Who opens the flow: a pod by its name (shop/web, or web where there is one of that name), or an address
    from: Place,
    /// Whom it goes to, a pod or an address, and the port there: shop/db:5432, 10.0.0.1:53/UDP, [fd00::1]:80/TCP
    to: Target,
    /// Where the agent shows its metrics: it knows pods by name
    #[arg(long, value_name = "ADDRESS", default_value_t = SocketAddr::from(([127, 0, 0, 1], PORT)))]
    agent: SocketAddr,
    #[command(flatten)]
    pub(super) query: Query,
}

/// An end of a flow.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Addr(IpAddr),
    Pod(String),
}

/// `shop/db:5432/UDP`; TCP where no protocol is said.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    place: Place,
    port: u16,
    proto: Proto,
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
        if let Ok(addr) = bare.parse() {
            return Ok(Self::Addr(addr));
        }
        let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-./".contains(&byte);
        let is_name = !text.is_empty() && text.bytes().all(fits) && text.matches('/').count() < 2;
        if is_name {
            Ok(Self::Pod(text.into()))
        } else {
            Err(format!("`{text}` is neither an address nor a pod's name"))
        }
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (place, rest) = text
            .rsplit_once(':')
            .ok_or_else(|| format!("`{text}` has no port: write NAME:PORT or ADDRESS:PORT"))?;
        let (port, proto) = rest.split_once('/').unwrap_or((rest, "TCP"));
        let proto = [Proto::TCP, Proto::UDP, Proto::SCTP]
            .into_iter()
            .find(|it| it.name().is_some_and(|name| name.eq_ignore_ascii_case(proto)))
            .ok_or_else(|| format!("`{proto}` is not TCP, UDP or SCTP"))?;
        let port = port.parse().map_err(|_error| format!("`{port}` is not a port"))?;
        Ok(Self { place: place.parse()?, port, proto })
    }
}

/// What one end's policies say.
#[derive(Debug, Serialize)]
struct Finding {
    from: IpAddr,
    to: IpAddr,
    side: Side,
    verdict: &'static str,
    /// The rule that says so, as `shop/web ingress[0]`; where there is none, why that is so.
    by: String,
    policies: String,
    /// What the other end is to these policies.
    peer: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Side {
    Egress,
    Ingress,
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Self::Egress => "egress",
            Self::Ingress => "ingress",
        }
    }
}

pub(super) fn explain(maps: &KernelMaps, question: &Question) -> Result<Answer, CliError> {
    let Question { from, to, agent, query: _ } = question;
    let view = View::read(maps)?;
    let (froms, tos) = (addresses(from, *agent)?, addresses(&to.place, *agent)?);
    let wanted = Wanted { proto: to.proto, port: Port::new(to.port) };
    let mut findings = Vec::new();
    let own: Vec<_> = maps.dump::<NodeAddresses>()?.into_iter().map(|(addr, _)| addr).collect();
    for from in &froms {
        for to in tos.iter().filter(|to| to.is_ipv4() == from.is_ipv4()) {
            findings.extend(found(&view, (*from, *to), wanted, &own));
        }
    }
    if findings.is_empty() {
        let name = |place: &Place, addresses: &[IpAddr]| match (place, addresses) {
            (Place::Addr(addr), _) => addr.to_string(),
            (Place::Pod(name), addresses) => format!("{name} ({addresses:?})"),
        };
        return Err(CliError::NoPod { ends: [name(from, &froms), name(&to.place, &tos)].join(" and ") });
    }
    let lines = findings.iter().map(|it| {
        let ends = [it.from.to_string(), it.to.to_string(), it.side.name().to_owned()];
        let [from, to, side] = ends;
        [from, to, side, it.verdict.to_owned(), it.by.clone(), it.policies.clone(), it.peer.clone()]
    });
    let table = table(["FROM", "TO", "SIDE", "VERDICT", "BY", "POLICIES", "PEER"], lines);
    Ok(Answer { table, json: serde_json::to_value(&findings)? })
}

/// What the ends that are pods of this node say, which has these addresses of its `own`.
fn found(view: &View, (from, to): (IpAddr, IpAddr), wanted: Wanted, own: &[Addr]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let sides = [(Side::Egress, from, to), (Side::Ingress, to, from)];
    for (side, end, peer) in sides {
        let Some(policy) = view.endpoints.get(&Addr::from(end)) else { continue };
        let set = match side {
            Side::Egress => policy.egress,
            Side::Ingress => policy.ingress,
        };
        let class = class_of(view, &Addr::from(peer));
        let (verdict, cause) = decided(view, set, class, wanted);
        let exempt = if from == to {
            Some("a pod always reaches itself")
        } else if side == Side::Ingress && own.contains(&Addr::from(from)) {
            Some("this node's own processes always may")
        } else {
            None
        };
        let policies = view.set_text(set);
        let (verdict, by) = match exempt {
            Some(why) => ("allowed", why.to_owned()),
            None => (said(verdict), reason(set, &policies, (verdict, cause))),
        };
        findings.push(Finding { from, to, side, verdict, by, policies, peer: view.class_text(class) });
    }
    findings
}

fn said(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Allow => "allowed",
        Verdict::Deny => "denied",
        Verdict::WouldDeny => "allowed; denied but for dry run",
    }
}

/// `shop/web ingress[0]`, from the text of a set: its direction and its policies.
fn reason(set: u32, text: &str, (verdict, cause): (Verdict, Cause)) -> String {
    if set == EndpointPolicy::OPEN || set == EndpointPolicy::CLOSED {
        return text.to_owned();
    }
    let words: Vec<_> = text.split(' ').collect();
    let direction = words.first().copied().unwrap_or_default();
    if let Some((policy, rule)) = cause.places() {
        // The names of very many policies are cut.
        let number = format!("policy {} of these", policy + 1);
        let name = words.get(policy + 1).map_or(number, |name| (*name).to_owned());
        return format!("{name} {direction}[{rule}]");
    }
    match verdict {
        _ if cause == Cause::UNNAMED => "a rule of these policies".into(),
        Verdict::Allow => "no rule denies it".into(),
        Verdict::Deny | Verdict::WouldDeny => "no rule allows it".into(),
    }
}

/// Those of a pod that is named, as the agent knows it.
fn addresses(place: &Place, agent: SocketAddr) -> Result<Vec<IpAddr>, CliError> {
    let name = match place {
        Place::Addr(addr) => return Ok(vec![*addr]),
        Place::Pod(name) => name,
    };
    let failed = |source| CliError::NoAgent { name: name.clone(), agent, source };
    let mut pods = named(agent, name).map_err(failed)?;
    let found: Vec<_> = pods.iter().map(|it| it.pod.clone()).collect();
    match (pods.pop(), pods.is_empty()) {
        (Some(pod), true) => Ok(pod.addresses),
        (None, _) => Err(CliError::UnknownPod { name: name.clone() }),
        (Some(_), false) => Err(CliError::ManyPods { name: name.clone(), found: found.join(", ") }),
    }
}

fn named(agent: SocketAddr, name: &str) -> io::Result<Vec<PodAddresses>> {
    let mut stream = TcpStream::connect_timeout(&agent, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {PODS}{name} HTTP/1.1\r\nhost: agent\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
    let status = head.lines().next().unwrap_or_default();
    if status.split(' ').nth(1) != Some("200") {
        return Err(io::Error::other(format!("its answer is `{status}`")));
    }
    Ok(serde_json::from_str(body)?)
}

const PATIENCE: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use ferroflow_common::abi::policy::{Meaning, PolicyKey, PortRange, RangeKey, Rules};

    use super::*;

    #[test]
    fn ends_are_addresses_or_names() {
        let parsed = |text: &str| text.parse::<Target>().map(|it| (it.place, it.port, it.proto));
        let addr = |text: &str| Place::Addr(text.parse().unwrap());
        assert_eq!(parsed("10.0.0.1:80"), Ok((addr("10.0.0.1"), 80, Proto::TCP)));
        assert_eq!(parsed("[fd00::1]:53/udp"), Ok((addr("fd00::1"), 53, Proto::UDP)));
        assert_eq!(parsed("shop/web-0:80/SCTP"), Ok((Place::Pod("shop/web-0".into()), 80, Proto::SCTP)));
        assert_eq!(parsed("web:80"), Ok((Place::Pod("web".into()), 80, Proto::TCP)));
        assert_eq!(parsed("10.0.0.1:80/ICMP"), Err("`ICMP` is not TCP, UDP or SCTP".into()));
        assert!(parsed("10.0.0.1").unwrap_err().contains("has no port"));
        assert!(parsed("a/b/c:80").is_err() && parsed(":80").is_err() && parsed("web:http").is_err());
        assert_eq!("fd00::1".parse(), Ok(addr("fd00::1")));
    }

    #[test]
    fn both_sides_are_told_with_the_rule_that_decides() {
        let at = |last| Addr::v4([10, 0, 0, last]);
        let cause = Cause::new(1, 3);
        let port = PortRange { first: 80, last: 81, proto: Proto::TCP, verdict: 1, cause: cause.0 };
        let row = |length| Rules { offset: 0, length, otherwise: Verdict::Deny as u32 };
        let key = |class| PolicyKey { set: 5, class };
        let isolated = EndpointPolicy { ingress: 5, ..EndpointPolicy::default() };
        let view = View {
            endpoints: HashMap::from([(at(1), EndpointPolicy::default()), (at(2), isolated)]),
            classes: [(at(1), 7)].into(),
            ranges: vec![(RangeKey { bits: 96 + 8, addr: at(0) }, 8)],
            rules: [(key(7), row(1)), (key(PolicyKey::OTHERS), row(0))].into(),
            port_ranges: vec![port],
            sets: [(5, Meaning::new([0; 16], "ingress shop/other shop/web Admin:first"))].into(),
            meanings: [(7, Meaning::new([0; 16], "pods app=client in shop"))].into(),
        };
        let ask = |from: u8, to: u8, port, own: &[Addr]| {
            let wanted = Wanted { proto: Proto::TCP, port: Port::new(port) };
            let findings = found(&view, (at(from).ip(), at(to).ip()), wanted, own);
            let line = |it: Finding| format!("{} {} by {}", it.side.name(), it.verdict, it.by);
            findings.into_iter().map(line).collect::<Vec<_>>()
        };
        let open = "egress allowed by not isolated";
        assert_eq!(ask(1, 2, 80, &[]), [open, "ingress allowed by shop/web ingress[3]"]);
        assert_eq!(ask(1, 2, 82, &[]), [open, "ingress denied by no rule allows it"]);
        assert_eq!(ask(9, 2, 80, &[]), ["ingress denied by no rule allows it"]);
        assert_eq!(ask(9, 2, 80, &[at(9)]), ["ingress allowed by this node's own processes always may"]);
        assert_eq!(ask(2, 9, 80, &[]), [open]);
        assert_eq!(ask(2, 2, 80, &[]).len(), 2);
        assert_eq!(ask(8, 9, 80, &[]), [""; 0]);
    }
}
