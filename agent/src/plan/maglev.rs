//! Maglev tables: every node chooses the same backend for a flow, and mostly still does when backends come and go.
//!
//! As in section 3.4 of "Maglev: A Fast and Reliable Software Network Load Balancer" (Eisenbud et al., NSDI 2016):
//! each backend has a permutation of the table's positions, and the backends take turns in claiming the next position
//! of theirs that is free. The permutation comes from the backend's address and port alone, so that nodes agree
//! whatever they have seen before.

use ferroflow_common::addr::{Addr, Port};
use ferroflow_common::hash::{finish, mix};

/// The lengths that a table may have: primes, so that every step walks through all positions. The shortest that has
/// [`PER_BACKEND`] positions for each backend is taken, or the longest. They are few and far apart because another
/// length moves most flows to other backends.
pub const LENGTHS: &[u32] = &[251, 1021, 4093, 16381];

/// Positions per backend that make the shares even: the fullest and the emptiest differ by a few in a hundred.
const PER_BACKEND: usize = 100;

/// The table of these backends, as positions in `backends`, which must be in an order that all nodes agree on.
/// `weights` are theirs, none of them 0: who has half of another's has half as many positions. `lengths` are primes in
/// ascending order. A single backend needs no table.
pub fn table(backends: &[(Addr, Port)], weights: &[u32], lengths: &[u32]) -> Vec<usize> {
    let wanted = backends.len() * PER_BACKEND;
    let length = lengths.iter().find(|&&length| length as usize >= wanted).or(lengths.last());
    match length {
        Some(&length) if backends.len() > 1 => populate(backends, weights, length.max(2)),
        Some(_) | None => (0..backends.len()).collect(),
    }
}

/// The positions of a backend, best first; without end.
struct Permutation {
    next: u32,
    skip: u32,
    length: u32,
}

impl Permutation {
    fn new((addr, port): (Addr, Port), length: u32) -> Self {
        Self { next: hash(0, addr, port) % length, skip: hash(1, addr, port) % (length - 1) + 1, length }
    }
}

impl Iterator for Permutation {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let position = self.next;
        self.next = (self.next + self.skip) % self.length;
        Some(position as usize)
    }
}

/// Who has the most weight claims a position in every round, others in so many rounds as their weight is of that.
fn populate(backends: &[(Addr, Port)], weights: &[u32], length: u32) -> Vec<usize> {
    const FREE: usize = usize::MAX;
    let mut table = vec![FREE; length as usize];
    let mut permutations: Vec<_> = backends.iter().map(|it| Permutation::new(*it, length)).collect();
    let most = weights.iter().copied().max().unwrap_or(1);
    let mut credits = vec![0; backends.len()];
    let mut left = table.len();
    for backend in (0..backends.len()).cycle() {
        if left == 0 {
            break;
        }
        credits[backend] += weights[backend];
        if credits[backend] < most {
            continue;
        }
        credits[backend] -= most;
        if let Some(position) = permutations[backend].find(|&position| table[position] == FREE) {
            table[position] = backend;
            left -= 1;
        }
    }
    table
}

fn hash(seed: u64, addr: Addr, port: Port) -> u32 {
    let (high, low) = addr.bytes.split_at(8);
    let word = |half: &[u8]| half.iter().fold(0, |word, byte| (word << 8) | u64::from(*byte));
    finish(mix(mix(mix(mix(seed, word(high)), word(low)), u64::from(port.host())), seed))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backends(count: u16) -> Vec<(Addr, Port)> {
        (0..count).map(|n| (Addr::v4([10, 244, (n >> 8) as u8, n as u8]), Port::new(8080))).collect()
    }

    fn table(backends: &[(Addr, Port)], lengths: &[u32]) -> Vec<usize> {
        super::table(backends, &vec![1; backends.len()], lengths)
    }

    /// How many positions each has.
    fn shares(table: &[usize], count: usize) -> Vec<usize> {
        let mut shares = vec![0; count];
        for backend in table {
            shares[*backend] += 1;
        }
        shares
    }

    #[test]
    fn lengths_are_primes_and_sized_to_the_backends() {
        for length in LENGTHS {
            assert!((2..*length).take_while(|it| it * it <= *length).all(|it| length % it != 0), "{length}");
        }
        let length = |count| table(&backends(count), LENGTHS).len();
        assert_eq!([0, 1, 2, 10, 11, 40, 41, 500].map(length), [0, 1, 251, 1021, 4093, 4093, 16381, 16381]);
    }

    #[test]
    fn shares_are_even() {
        for count in [2, 3, 5, 10, 17, 40, 100, 160] {
            let shares = shares(&table(&backends(count), LENGTHS), usize::from(count));
            let (least, most) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
            assert!(most - least <= 1 + most / 50, "{count} backends: {least} to {most}");
        }
    }

    /// Of the positions that a backend had which is still there, few have another one now.
    fn moved(before: &[(Addr, Port)], after: &[(Addr, Port)]) -> f64 {
        let lengths = &[4093];
        let (old, new) = (table(before, lengths), table(after, lengths));
        let kept = old.iter().zip(&new).filter(|(old, _)| after.contains(&before[**old]));
        let moved = kept.filter(|(old, new)| before[**old] != after[**new]).count();
        moved as f64 / old.len() as f64
    }

    #[test]
    fn a_backend_that_goes_or_comes_moves_few_others() {
        for count in [5, 10, 30] {
            let all = backends(count);
            for gone in 0..usize::from(count) {
                let mut fewer = all.clone();
                fewer.remove(gone);
                let share = moved(&all, &fewer);
                assert!(share < 0.06, "{count} backends, {gone} goes: {share} of the positions moved");
                // One that comes has to take its own share from others; what they swap among them is little.
                let (taken, own) = (moved(&fewer, &all), 1.0 / f64::from(count));
                assert!(taken < own + 0.06, "{count} backends, {gone} comes: {taken} moved");
            }
        }
    }

    #[test]
    fn the_table_depends_on_addresses_and_ports_alone() {
        let sorted = backends(7);
        let reference: Vec<_> = table(&sorted, LENGTHS).into_iter().map(|it| sorted[it]).collect();
        assert_eq!(table(&sorted, LENGTHS).into_iter().map(|it| sorted[it]).collect::<Vec<_>>(), reference);
        // The first choices of each backend are its own, whoever else there is.
        for backend in sorted {
            let own: Vec<_> = Permutation::new(backend, 251).take(251).collect();
            let mut all = own.clone();
            all.sort_unstable();
            assert_eq!(all, (0..251).collect::<Vec<_>>(), "a permutation");
        }
        let other_port: Vec<_> = backends(7).into_iter().map(|(addr, _)| (addr, Port::new(9090))).collect();
        assert_ne!(table(&other_port, LENGTHS), table(&backends(7), LENGTHS));
    }
}
