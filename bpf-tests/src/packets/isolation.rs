//! Which packets of a node policies are asked about, and by which ends. What a policy says of a flow is
//! [`crate::oracle`]'s to say.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::rc::Rc;

use serde_json::Value;

use super::cluster::{NODE, Socket};
use super::wire::{ICMP, ICMPV6, SCTP, TCP, UDP};
use crate::oracle::{Answer, Flow, Oracle as Objects, Way};

/// Why a packet is dropped: what is counted.
pub(super) type Reason = &'static str;

/// What the policies of a cluster are to the pods of one node.
#[derive(Clone, Debug, Default)]
pub(super) struct Isolation {
    objects: Rc<Objects>,
    /// Local pods by their addresses.
    pods: BTreeMap<IpAddr, Pod>,
}

#[derive(Clone, Debug)]
struct Pod {
    object: Rc<Value>,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// No policy is about it.
    Open,
    Isolated,
    /// Isolated, and what it had going when its first policy came goes on (rule 52).
    Adopting,
}

/// A flow's first packet, after service translation and before any masquerade (rule 47).
#[derive(Clone, Copy, Debug)]
pub(super) struct First {
    pub(super) from: IpAddr,
    pub(super) to: Socket,
    pub(super) proto: u8,
    /// It can only be of a connection that stands.
    pub(super) middle: bool,
}

impl First {
    /// If it is an answer, this is what was asked.
    pub(super) fn turned(self, port: u16) -> Self {
        Self { from: self.to.0, to: (self.from, port), ..self }
    }
}

impl Isolation {
    /// Pods that policies isolate from the beginning have nothing going.
    pub(super) fn new<'a>(objects: impl Iterator<Item = &'a Value>) -> Self {
        let mut all = Objects::default();
        objects.filter(|object| concerns(object)).for_each(|object| all.apply(object));
        let mut isolation = Self { objects: Rc::new(all), pods: BTreeMap::new() };
        isolation.follow();
        isolation
    }

    /// Takes a change of an object in.
    pub(super) fn apply(&mut self, object: &Value) {
        if concerns(object) {
            Rc::make_mut(&mut self.objects).apply(object);
            self.follow();
        }
    }

    fn follow(&mut self) {
        let before = std::mem::take(&mut self.pods);
        for (pod, addresses) in self.objects.pods_on(NODE) {
            let (object, isolated) = (Rc::new(pod.clone()), self.objects.isolates(pod));
            for addr in addresses {
                let state = match before.get(&addr).map(|pod| pod.state) {
                    _ if !isolated => State::Open,
                    Some(State::Open | State::Adopting) => State::Adopting,
                    Some(State::Isolated) | None => State::Isolated,
                };
                self.pods.insert(addr, Pod { object: Rc::clone(&object), state });
            }
        }
    }

    /// Whether policies apply to any pod of the node.
    pub(super) fn is_in_session(&self) -> bool {
        self.pods.values().any(|pod| pod.state != State::Open)
    }

    pub(super) fn isolates(&self, addr: IpAddr) -> bool {
        self.pods.get(&addr).is_some_and(|pod| pod.state != State::Open)
    }

    /// Asks the sender's policies, then the receiver's (rule 48).
    pub(super) fn verdict(&self, first: First) -> Result<(), Reason> {
        let First { from, to: (to, port), proto, middle } = first;
        // A pod and itself (rule 49).
        if from == to {
            return Ok(());
        }
        let protocol = protocol(proto);
        for (own, peer, way, reason) in
            [(from, to, Way::Out, "policy-egress"), (to, from, Way::In, "policy-ingress")]
        {
            let Some(pod) = self.pods.get(&own).filter(|pod| pod.state != State::Open) else { continue };
            let answer = self.objects.ask(&pod.object, way, Flow { peer, protocol, port });
            if answer == Answer::Dropped && !(middle && pod.state == State::Adopting) {
                return Err(reason);
            }
        }
        Ok(())
    }
}

/// Whether an object has to do with policies.
pub(super) fn concerns(object: &Value) -> bool {
    ["NetworkPolicy", "Namespace", "Pod"].iter().any(|kind| object["kind"] == **kind)
}

fn protocol(proto: u8) -> &'static str {
    match proto {
        TCP => "TCP",
        UDP => "UDP",
        SCTP => "SCTP",
        ICMP | ICMPV6 => "ICMP",
        _ => "none that has ports",
    }
}
