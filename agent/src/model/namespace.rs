//! Namespaces.

use super::Labels;

/// Has at least the label [`Namespace::NAME`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Namespace {
    pub labels: Labels,
}

impl Namespace {
    /// The label that holds the namespace's name; the API server sets it.
    pub const NAME: &'static str = "kubernetes.io/metadata.name";

    /// With these labels, and with the one of its name.
    pub fn new<'a>(name: &'a str, labels: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let labels = labels.into_iter().filter(|(key, _)| *key != Self::NAME);
        Self { labels: Labels::new(labels.chain([(Self::NAME, name)])) }
    }
}
