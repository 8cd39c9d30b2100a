//! Network policies.

use ferroflow_common::addr::{Addr, Port, Proto};

use super::label::Selector;
use super::{Family, Prefix};

/// A `networking.k8s.io/v1` NetworkPolicy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct NetworkPolicy {
    /// Which pods of its namespace it is about.
    pub pods: Selector,
    /// What may come in; `None` where the policy is not about that (rule 43). Without a rule, nothing.
    pub ingress: Option<Box<[Rule]>>,
    /// What may go out; likewise.
    pub egress: Option<Box<[Rule]>>,
    pub mode: Mode,
    /// `None` where the policy does not say.
    pub live: Option<Live>,
}

/// What becomes of established flows that policies do not allow any more (rule 52).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, clap::ValueEnum)]
pub enum Live {
    /// They go on until they end
    #[default]
    Finish,
    /// They are dropped, both ways, from their next packet on; a TCP client sees silence and times out
    Cut,
}

/// From the pod that a policy selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    Ingress,
    Egress,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mode {
    #[default]
    Enforce,
    /// What it would drop is told, and passes.
    DryRun,
}

/// Lets through what comes from, or goes to, any of the peers by any of the ports.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    /// Everybody where it is empty (rule 44).
    pub peers: Box<[Peer]>,
    /// Everything, of every protocol, where it is empty (rule 45).
    pub ports: Box<[PolicyPort]>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Peer {
    /// Pods that both selectors mean (rule 44).
    Pods {
        namespaces: Namespaces,
        pods: Selector,
    },
    Block(Block),
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Namespaces {
    /// That of the policy.
    Own,
    Matching(Selector),
}

/// An `ipBlock`: of whatever has such an address, pods and nodes like the world (rule 47).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Block {
    pub range: Prefix,
    /// Within `range`.
    pub except: Box<[Prefix]>,
}

impl Block {
    pub fn contains(&self, addr: &Addr) -> bool {
        self.range.family() == Family::of(addr)
            && self.range.contains(addr)
            && !self.except.iter().any(|except| except.contains(addr))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PolicyPort {
    pub proto: Proto,
    pub number: PortNumber,
}

/// Which ports of a protocol (rule 45).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PortNumber {
    Every,
    /// From the first to the last, both included.
    Range(Port, Port),
    /// What containers of the pod at the receiving end call so (rule 46).
    Named(Box<str>),
}

impl NetworkPolicy {
    /// The rules of a direction that the policy is about.
    pub fn rules(&self, direction: Direction) -> Option<&[Rule]> {
        match direction {
            Direction::Ingress => self.ingress.as_deref(),
            Direction::Egress => self.egress.as_deref(),
        }
    }
}

impl Direction {
    pub const ALL: [Self; 2] = [Self::Ingress, Self::Egress];
}
