//! Labels and the selectors over them.

use std::fmt;
use std::sync::Arc;

use super::share::Shared;

/// The labels of an object, in the order of their keys. Objects with the same labels share them, where a [`Pool`] has
/// seen both.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Labels(Arc<[(Arc<str>, Arc<str>)]>);

impl Labels {
    pub fn new<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let mut pairs: Vec<_> = pairs.into_iter().map(|(key, value)| (key.into(), value.into())).collect();
        pairs.sort_unstable();
        pairs.dedup_by(|later, first| later.0 == first.0);
        Self(pairs.into())
    }

    pub fn value(&self, key: &str) -> Option<&str> {
        let at = self.0.binary_search_by(|(other, _)| (**other).cmp(key)).ok()?;
        Some(&self.0[at].1)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, value)| (&**key, &**value))
    }
}

impl Default for Labels {
    fn default() -> Self {
        Self::new([])
    }
}

/// Keeps equal labels once: the pods of a Deployment have one set between them, and those of a StatefulSet, which
/// differ in one label, share the texts of the others.
#[derive(Debug, Default)]
pub struct Pool {
    sets: Shared<[(Arc<str>, Arc<str>)]>,
    pub texts: Shared<str>,
}

impl Pool {
    /// The labels, or equal ones that somebody has already.
    pub fn share(&mut self, labels: Labels) -> Labels {
        let pairs = labels
            .0
            .iter()
            .map(|(key, value)| (self.texts.share(key.clone()), self.texts.share(value.clone())));
        let pairs = pairs.collect();
        Labels(self.sets.share(pairs))
    }
}

/// Which labels are meant: those that meet every requirement, and so all labels where there is none. Requirements are
/// sorted and stand once, so that selectors that say the same in another order are equal.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Selector {
    requirements: Box<[Requirement]>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Requirement {
    pub key: Box<str>,
    pub operator: Operator,
}

/// What is required of the value of a key. Values are sorted.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operator {
    In(Box<[Box<str>]>),
    /// Also where there is no such key.
    NotIn(Box<[Box<str>]>),
    Exists,
    DoesNotExist,
}

impl Selector {
    pub fn new(requirements: impl IntoIterator<Item = Requirement>) -> Self {
        let mut requirements: Vec<_> = requirements.into_iter().collect();
        for requirement in &mut requirements {
            match &mut requirement.operator {
                Operator::In(values) | Operator::NotIn(values) => values.sort_unstable(),
                Operator::Exists | Operator::DoesNotExist => {}
            }
        }
        requirements.sort_unstable();
        requirements.dedup();
        Self { requirements: requirements.into() }
    }

    pub fn matches(&self, labels: &Labels) -> bool {
        self.requirements.iter().all(|requirement| requirement.is_met_by(labels))
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.requirements.is_empty() {
            return f.write_str("any");
        }
        for (index, requirement) in self.requirements.iter().enumerate() {
            let comma = if index > 0 { "," } else { "" };
            write!(f, "{comma}{requirement}")?;
        }
        Ok(())
    }
}

/// As `kubectl -l` takes it.
impl fmt::Display for Requirement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = &self.key;
        match &self.operator {
            Operator::In(values) if values.len() == 1 => write!(f, "{key}={}", values[0]),
            Operator::In(values) => write!(f, "{key} in ({})", values.join(",")),
            Operator::NotIn(values) => write!(f, "{key} notin ({})", values.join(",")),
            Operator::Exists => f.write_str(key),
            Operator::DoesNotExist => write!(f, "!{key}"),
        }
    }
}

impl Requirement {
    /// That the key has this value, as `matchLabels` says.
    pub fn equals(key: impl Into<Box<str>>, value: impl Into<Box<str>>) -> Self {
        Self { key: key.into(), operator: Operator::In(Box::new([value.into()])) }
    }

    fn is_met_by(&self, labels: &Labels) -> bool {
        let value = labels.value(&self.key);
        let among = |values: &[Box<str>]| value.is_some_and(|value| values.iter().any(|it| **it == *value));
        match &self.operator {
            Operator::In(values) => among(values),
            Operator::NotIn(values) => !among(values),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn requirement(key: &str, operator: Operator) -> Requirement {
        Requirement { key: key.into(), operator }
    }

    #[test]
    fn rule_44_a_selector_wants_all_and_the_empty_one_wants_nothing() {
        let labels = Labels::new([("tier", "db"), ("app", "shop")]);
        let values = || -> Box<[Box<str>]> { Box::new(["web".into(), "db".into()]) };
        let cases = [
            (requirement("tier", Operator::In(values())), true),
            (requirement("app", Operator::In(values())), false),
            (requirement("none", Operator::In(values())), false),
            (requirement("tier", Operator::NotIn(values())), false),
            (requirement("app", Operator::NotIn(values())), true),
            (requirement("none", Operator::NotIn(values())), true),
            (requirement("app", Operator::Exists), true),
            (requirement("none", Operator::Exists), false),
            (requirement("app", Operator::DoesNotExist), false),
            (requirement("none", Operator::DoesNotExist), true),
        ];
        for (first, met) in &cases {
            assert_eq!(Selector::new([first.clone()]).matches(&labels), *met, "{first:?}");
            for (second, also) in &cases {
                let both = Selector::new([first.clone(), second.clone()]);
                assert_eq!(both.matches(&labels), *met && *also, "{both:?}");
            }
        }
        assert!(Selector::default().matches(&labels) && Selector::default().matches(&Labels::default()));
    }

    #[test]
    fn the_order_in_which_a_selector_is_written_does_not_matter() {
        let values = |order: [&str; 2]| Operator::In(order.map(Into::into).into());
        let one = [requirement("a", values(["x", "y"])), requirement("b", Operator::Exists)];
        let other = [requirement("b", Operator::Exists), requirement("a", values(["y", "x"]))];
        assert_eq!(Selector::new(one), Selector::new(other));
    }

    #[test]
    fn equal_labels_are_kept_once_and_unused_ones_not_for_ever() {
        let mut pool = Pool::default();
        let first = pool.share(Labels::new([("app", "web"), ("pod", "web-0")]));
        assert!(Arc::ptr_eq(&first.0, &pool.share(Labels::new([("pod", "web-0"), ("app", "web")])).0));
        let sibling = pool.share(Labels::new([("app", "web"), ("pod", "web-1")]));
        assert!(Arc::ptr_eq(&first.0[0].1, &sibling.0[0].1), "the text `web`");
        for number in 0..1000 {
            pool.share(Labels::new([("job", &*number.to_string())]));
        }
        assert!(pool.sets.len() <= 66, "{} sets for two that are used", pool.sets.len());
        assert_eq!((first.value("pod"), first.value("none")), (Some("web-0"), None));
    }
}
