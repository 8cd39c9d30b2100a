//! What has to change so that the actual becomes the desired.

use std::cmp::Ordering;
use std::iter::Peekable;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step<D, A> {
    Add(D),
    /// In both; whether they are equal is for the caller to see.
    Keep(D, A),
    Remove(A),
}

/// Pairs two sequences up, each in ascending order of its keys. A key stands once in the desired one; where it
/// stands more than once in the actual one, all but the first are removed.
pub(super) fn steps<K: Ord, D, A>(
    desired: impl IntoIterator<Item = (K, D)>,
    actual: impl IntoIterator<Item = (K, A)>,
) -> impl Iterator<Item = Step<D, A>> {
    Steps { desired: desired.into_iter().peekable(), actual: actual.into_iter().peekable() }
}

struct Steps<D: Iterator, A: Iterator> {
    desired: Peekable<D>,
    actual: Peekable<A>,
}

impl<K: Ord, D, A, I: Iterator<Item = (K, D)>, J: Iterator<Item = (K, A)>> Iterator for Steps<I, J> {
    type Item = Step<D, A>;

    fn next(&mut self) -> Option<Self::Item> {
        let order = match (self.desired.peek(), self.actual.peek()) {
            (Some((desired, _)), Some((actual, _))) => desired.cmp(actual),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => return None,
        };
        match order {
            Ordering::Less => self.desired.next().map(|(_, desired)| Step::Add(desired)),
            Ordering::Greater => self.actual.next().map(|(_, actual)| Step::Remove(actual)),
            Ordering::Equal => {
                let pair = self.desired.next().zip(self.actual.next());
                pair.map(|((_, desired), (_, actual))| Step::Keep(desired, actual))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Step::{Add, Keep, Remove};
    use super::*;

    #[test]
    fn both_sequences_are_walked_to_the_end() {
        let desired = [(1, 'a'), (3, 'c'), (4, 'd')];
        let actual = [(0, 'z'), (3, 'C'), (3, 'x'), (4, 'D'), (9, 'y')];
        let found: Vec<_> = steps(desired, actual).collect();
        assert_eq!(found, [Remove('z'), Add('a'), Keep('c', 'C'), Remove('x'), Keep('d', 'D'), Remove('y')]);
        assert_eq!(steps([(1, ())], []).collect::<Vec<Step<(), ()>>>(), [Add(())]);
        assert_eq!(steps([], [(1, ())]).collect::<Vec<Step<(), ()>>>(), [Remove(())]);
    }
}
