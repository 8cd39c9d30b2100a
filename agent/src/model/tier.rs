//! Cluster network policies: the tiers around those of namespaces.

use super::label::Selector;
use super::policy::{Direction, Live, Rule};

/// A `policy.networking.k8s.io/v1alpha2` ClusterNetworkPolicy.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ClusterNetworkPolicy {
    pub tier: Tier,
    /// From 0 on; of policies of one tier the lower one is asked first.
    pub priority: u16,
    pub subject: Subject,
    /// The first rule that means a flow decides. Without a rule the policy says nothing of the direction.
    pub ingress: Box<[TierRule]>,
    pub egress: Box<[TierRule]>,
    /// `None` where the policy does not say.
    pub live: Option<Live>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// Asked before the policies of namespaces.
    Admin,
    /// Asked where no policy of a namespace selects the pod.
    Baseline,
}

/// The pods that it is about: those that both selectors mean.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Subject {
    pub namespaces: Selector,
    pub pods: Selector,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TierRule {
    pub action: Action,
    /// Whom and what it is about.
    pub about: Rule,
}

/// What a rule does to flows that it is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    Accept,
    Deny,
    /// Leaves them to the next tier.
    Pass,
}

impl ClusterNetworkPolicy {
    pub fn rules(&self, direction: Direction) -> &[TierRule] {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }
}

impl Tier {
    /// As the API spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Admin => "Admin",
            Self::Baseline => "Baseline",
        }
    }
}
