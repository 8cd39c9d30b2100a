//! What stands in a slot range.

use ferroflow_common::abi::lb::Frontend;

use super::backends::Planned;
use super::{frontends, maglev};
use crate::model::Family;

/// Which backends the slots of a frontend with these flags name, as positions in `backends`. A Maglev table, or slots in
/// proportion to the weights: each backend once where they are equal.
pub fn positions(backends: &[Planned], family: Family, flags: u32, lengths: &[u32]) -> Vec<usize> {
    let set = frontends::set(flags);
    let members = backends.iter().enumerate();
    let members = members.filter(|(_, it)| it.sets & set != 0 && Family::of(&it.addr) == family);
    let (positions, chosen): (Vec<_>, Vec<_>) = members.map(|(position, it)| (position, *it)).unzip();
    // Where none has weight all are alike.
    let weights: Vec<u32> = chosen.iter().map(|it| u32::from(it.weight.max(1))).collect();
    let order = if flags & Frontend::MAGLEV == 0 {
        interleaved(&weights)
    } else {
        let keys: Vec<_> = chosen.iter().map(|it| (it.addr, it.port)).collect();
        maglev::table(&keys, &weights, lengths)
    };
    order.into_iter().filter_map(|at| positions.get(at).copied()).collect()
}

/// Each number so often as its weight says, spread evenly over the whole: the turns of a number with weight w are at
/// 1/2w, 3/2w and so on.
fn interleaved(weights: &[u32]) -> Vec<usize> {
    let weights = in_small_numbers(weights);
    let turn = |index: usize, weight: u32, turn: u32| {
        ((u64::from(2 * turn + 1) << 32) / u64::from(2 * weight), index)
    };
    let mut turns: Vec<(u64, usize)> = weights
        .iter()
        .enumerate()
        .flat_map(|(index, &weight)| (0..weight).map(move |number| turn(index, weight, number)))
        .collect();
    turns.sort_unstable();
    turns.into_iter().map(|(_, index)| index).collect()
}

/// Weights that are in the same proportion, as small as that allows; where their sum is large, nearly the same.
fn in_small_numbers(weights: &[u32]) -> Vec<u32> {
    let divisor = weights.iter().copied().fold(0, gcd).max(1);
    let sum: u32 = weights.iter().map(|weight| weight / divisor).sum();
    let most = MOST_SLOTS.max(weights.len() as u32);
    let scaled = |weight: u32| {
        let weight = weight / divisor;
        if sum <= most { weight } else { (weight * most).div_ceil(sum).max(1) }
    };
    weights.iter().map(|weight| scaled(*weight)).collect()
}

/// The length of a range that weights may take; a hundred backends keep their weights exactly.
const MOST_SLOTS: u32 = 10_000;

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use ferroflow_common::abi::lb::Backend;
    use ferroflow_common::addr::{Addr, Port};

    use super::*;
    use crate::model::Condition;

    #[test]
    fn every_backend_of_the_set_and_family_has_its_share() {
        let backend = |addr, sets| Planned {
            addr,
            port: Port::new(80),
            condition: Condition::Ready,
            sets,
            weight: 1,
            node: 0,
        };
        let backends = [
            backend(Addr::v4([10, 0, 0, 1]), Backend::CLUSTER),
            backend(Addr::v4([10, 0, 0, 2]), 0),
            backend(Addr::v4([10, 0, 0, 3]), Backend::CLUSTER | Backend::LOCAL),
            backend(Addr::v6([0xfd; 16]), Backend::CLUSTER),
        ];
        let positions = |family, flags| positions(&backends, family, flags, &[7]);
        assert_eq!(positions(Family::V4, 0), [0, 2]);
        assert_eq!(positions(Family::V6, 0), [3]);
        assert_eq!(positions(Family::V4, Frontend::LOCAL), [2]);
        assert_eq!(positions(Family::V6, Frontend::LOCAL), [0; 0]);
        let mut table = positions(Family::V4, Frontend::MAGLEV);
        assert_eq!(table.len(), 7);
        table.sort_unstable();
        table.dedup();
        assert_eq!(table, [0, 2]);
        assert_eq!(positions(Family::V4, Frontend::MAGLEV | Frontend::LOCAL), [2]);
    }

    #[test]
    fn weighted_slots_are_in_proportion_and_interleaved() {
        assert_eq!(interleaved(&[1, 1, 1]), [0, 1, 2]);
        assert_eq!(interleaved(&[100, 100]), [0, 1], "no longer than needed");
        assert_eq!(interleaved(&[4, 2, 2]), [0, 1, 2, 0]);
        assert_eq!(interleaved(&[]), [0; 0]);
        let weights: Vec<u32> = (0..3000).map(|n| 1 + (n * 37) % 100).collect();
        let slots = interleaved(&weights);
        assert!(slots.len() < 15_000, "{}", slots.len());
        let sum: u32 = weights.iter().sum();
        for half in slots.chunks(slots.len() / 2).take(2) {
            let heavy = half.iter().filter(|&&at| weights[at] > 50).count() as f64 / half.len() as f64;
            let due = f64::from(weights.iter().filter(|it| **it > 50).sum::<u32>()) / f64::from(sum);
            assert!((heavy - due).abs() < 0.06, "{heavy} of {due}");
        }
    }

    /// New flows by hash over the slots, for both layouts.
    #[test]
    fn flows_are_spread_by_weight_within_a_few_percent() {
        let weights = [1, 2, 5, 10, 82];
        let backends = weights.map(|weight| Planned {
            addr: Addr::v4([10, 0, 0, weight]),
            port: Port::new(80),
            condition: Condition::Ready,
            sets: Backend::CLUSTER,
            weight,
            node: 0,
        });
        for flags in [0, Frontend::MAGLEV] {
            let slots = positions(&backends, Family::V4, flags, maglev::LENGTHS);
            let mut counts = [0u32; 5];
            for flow in 0..200_000u64 {
                let hash = ferroflow_common::hash::finish(ferroflow_common::hash::mix(1, flow));
                counts[slots[ferroflow_common::hash::slot(hash, slots.len() as u32) as usize]] += 1;
            }
            for (count, weight) in counts.into_iter().zip(weights) {
                let (share, due) = (f64::from(count) / 200_000.0, f64::from(weight) / 100.0);
                assert!((share - due).abs() < 0.01 + due * 0.05, "{flags}: {share} of {due}");
            }
        }
    }
}
