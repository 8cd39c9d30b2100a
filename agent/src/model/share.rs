//! Equal values kept once: a cluster has many objects and few different namespaces, nodes, labels and ports.

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::Arc;

/// Finds a value that somebody has already. What nobody else has any longer is forgotten, though not at once.
#[derive(Debug)]
pub struct Shared<T: ?Sized> {
    values: HashSet<Arc<T>>,
    /// How many there may be before unused ones are looked for.
    limit: usize,
}

impl<T: ?Sized> Default for Shared<T> {
    fn default() -> Self {
        Self { values: HashSet::new(), limit: FEW }
    }
}

impl<T: ?Sized + Eq + Hash> Shared<T> {
    /// The value, or an equal one that was given out before.
    pub fn share(&mut self, value: Arc<T>) -> Arc<T> {
        if let Some(known) = self.values.get(&value) {
            return known.clone();
        }
        if self.values.len() >= self.limit {
            self.values.retain(|value| Arc::strong_count(value) > 1);
            self.limit = (self.values.len() * 2).max(FEW);
        }
        self.values.insert(value.clone());
        value
    }

    pub fn len(&self) -> usize {
        self.values.len()
    }

    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }
}

/// So many are not worth looking for unused ones.
const FEW: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_are_kept_once_and_unused_ones_not_for_ever() {
        let mut shared = Shared::<str>::default();
        let first = shared.share("web".into());
        assert!(Arc::ptr_eq(&first, &shared.share("web".into())));
        assert!(!Arc::ptr_eq(&first, &shared.share("db".into())));
        for number in 0..1000 {
            shared.share(number.to_string().into());
        }
        assert!(shared.len() <= FEW + 1, "{} values for one that is used", shared.len());
        assert!(Arc::ptr_eq(&first, &shared.share("web".into())), "it was used all the time");
    }
}
