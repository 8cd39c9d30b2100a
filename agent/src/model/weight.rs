//! How much of a Service's traffic each of its endpoints gets.

use ferroflow_common::abi::relay::NodeNumber;
use ferroflow_common::addr::Addr;
use ferroflow_common::hash::mix;

use super::{Family, Prefix};

/// A name of a node or a zone, as far as telling it from others needs: every endpoint carries two, and the names
/// themselves would take more memory than the rest of it. 64 bits of a hash: two names of a cluster are never one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Label(u64);

/// Weights as a Service names them; what none of them names has [`Weights::DEFAULT`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Weights {
    /// Longest range first, then nodes, then zones: the first that fits counts.
    weights: Box<[(Target, u8)]>,
}

/// What a weight is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// Endpoints with an address in it.
    Range(Prefix),
    /// Endpoints on it.
    Node(Label),
    /// Endpoints in it.
    Zone(Label),
}

impl Label {
    /// Of what has no name.
    pub const NONE: Self = Self(0);

    pub fn of(name: &str) -> Self {
        let word = |chunk: &[u8]| chunk.iter().fold(0, |word, byte| (word << 8) | u64::from(*byte));
        Self(name.as_bytes().chunks(8).fold(0, |state, chunk| mix(state, word(chunk))))
    }

    /// What stands for a node of this name in the tables of every node; 0 for what has no name. Two of them may have
    /// one number: that is for the caller to see.
    pub fn number(self) -> NodeNumber {
        if self == Self::NONE { 0 } else { (self.0 as NodeNumber).max(1) }
    }
}

impl Weights {
    pub const DEFAULT: u8 = 1;
    /// As precise as percents.
    pub const MOST: u8 = 100;

    pub fn new(mut weights: Vec<(Target, u8)>) -> Self {
        weights.sort_by_key(|(target, _)| match target {
            Target::Range(range) => (0, 128 - range.bits()),
            Target::Node(_) => (1, 0),
            Target::Zone(_) => (2, 0),
        });
        Self { weights: weights.into() }
    }

    pub fn of(&self, addr: &Addr, node: Label, zone: Label) -> u8 {
        let fits = |target: &Target| match target {
            Target::Range(range) => range.family() == Family::of(addr) && range.contains(addr),
            Target::Node(label) => *label == node,
            Target::Zone(label) => *label == zone,
        };
        self.weights.iter().find(|(target, _)| fits(target)).map_or(Self::DEFAULT, |(_, weight)| *weight)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_says_more_goes_first() {
        let range = |addr, bits| Target::Range(Prefix::new(Addr::v4(addr), bits).unwrap());
        let weights = Weights::new(vec![
            (Target::Zone(Label::of("east")), 7),
            (range([10, 0, 0, 0], 8), 4),
            (Target::Node(Label::of("big")), 5),
            (range([10, 0, 0, 1], 32), 3),
        ]);
        let of = |addr, node, zone| weights.of(&Addr::v4(addr), Label::of(node), Label::of(zone));
        assert_eq!(of([10, 0, 0, 1], "big", "east"), 3);
        assert_eq!(of([10, 0, 0, 2], "big", "east"), 4);
        assert_eq!(of([172, 16, 0, 2], "big", "east"), 5);
        assert_eq!(of([172, 16, 0, 2], "small", "east"), 7);
        assert_eq!(of([172, 16, 0, 2], "small", "west"), Weights::DEFAULT);
        assert_eq!(Label::of(""), Label::NONE);
        assert_ne!(Label::of("node-1"), Label::of("node-2"));
    }
}
