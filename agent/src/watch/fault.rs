//! What can be wrong with an object.

use std::fmt;
use std::net::IpAddr;

/// An object that cannot be served, and the field that is to blame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {fault}")]
pub struct Invalid {
    /// As in `kubectl explain`, with indices: `spec.ports[1].port`.
    pub path: String,
    pub fault: Fault,
}

/// Each says what is wrong and the way out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("is missing: {needed}")]
    Missing { needed: &'static str },
    #[error("`{text}` is not a name: use at most {limit} lower case letters, digits, `-`{}", dots(.limit))]
    NotAName { text: String, limit: usize },
    #[error("{value} is not a port (1-65535)")]
    NotAPort { value: i32 },
    #[error("`{text}` is not a protocol of a port: use TCP, UDP or SCTP")]
    NotAProtocol { text: String },
    #[error("`{text}` is not an IP address: write it like 10.96.0.10 or fd00::10")]
    NotAnAddress { text: String },
    #[error("`{text}` is an IPv4 address written as IPv6: write {canonical}")]
    MappedAddress { text: String, canonical: IpAddr },
    #[error("{addr} is {what}, which is the same on every host: use an address of the cluster")]
    SpecialAddress { addr: IpAddr, what: &'static str },
    #[error("`{text}` is not an address range: write it like 10.244.1.0/24 or fd00:1::/64")]
    NotARange { text: String },
    #[error("`{text}` is not a smaller part of {range}: except leaves out addresses of its cidr")]
    NotWithin { text: String, range: String },
    #[error("{last} is before port {first}, where the range begins: exchange them")]
    EndsBefore { first: u16, last: u16 },
    #[error("ends no range: it needs a port that is a number")]
    EndsNothing,
    #[error(
        "`{text}` is not the name of a port: use at most 15 lower case letters, digits and `-`, with a letter"
    )]
    NotAPortName { text: String },
    #[error("does not go together with {others}: use one or the other")]
    Alone { others: &'static str },
    #[error("{value} is not a priority: use 0 to 1000, of which 0 comes first")]
    NotAPriority { value: i32 },
    #[error("is not supported: {way_out}")]
    NotSupported { way_out: &'static str },
    #[error("`{text}` is none of its values: use {values}")]
    NotOneOf { text: String, values: &'static str },
    #[error(
        "`{text}` is not a weight: write it like node/NAME=3, zone/NAME=2, 10.244.1.5=0 or 10.244.1.0/24=5, from 0 to \
         {most}"
    )]
    NotAWeight { text: String, most: u8 },
    #[error("{value} is not a session affinity timeout: use 1 to 86400 seconds")]
    NotATimeout { value: i32 },
    #[error("`{text}` is not an address type: use IPv4, IPv6 or FQDN")]
    NotAnAddressType { text: String },
    #[error("{addr} does not fit {family}: {way_out}")]
    WrongFamily { addr: IpAddr, family: String, way_out: &'static str },
    #[error("{addr} is a second {} address: a Service has at most one of each family", family(.addr))]
    SecondOfFamily { addr: IpAddr },
    #[error("`{text}` contradicts `{other}` in {path}: leave one of them out")]
    Contradicts { text: String, other: String, path: &'static str },
    #[error("{port}/{proto} is also {first}: a Service has a port and protocol once")]
    DuplicatePort { port: u16, proto: &'static str, first: String },
    #[error("`{name}` is also {first}: the ports of a Service have different names")]
    DuplicateName { name: String, first: String },
}

impl Fault {
    pub(super) fn at(self, path: impl Into<String>) -> Invalid {
        Invalid { path: path.into(), fault: self }
    }
}

fn family(addr: &IpAddr) -> &'static str {
    if addr.is_ipv4() { "IPv4" } else { "IPv6" }
}

fn dots(limit: &usize) -> &'static str {
    if *limit > 63 { " and `.`" } else { "" }
}

impl Invalid {
    /// The same fault in an object that is itself a field of another.
    pub(super) fn within(self, outer: impl fmt::Display) -> Self {
        Self { path: format!("{outer}.{}", self.path), fault: self.fault }
    }
}
