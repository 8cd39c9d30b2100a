//! A network that is a few maps, and refuses what it is told to.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use super::pod::{Netlink, PodError, PodLink, Wired};
use crate::model::Family;

#[derive(Debug, Default)]
pub(crate) struct Fake {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
pub(crate) struct State {
    /// Interfaces that are in each namespace by somebody else's doing.
    pub(crate) namespaces: BTreeMap<PathBuf, BTreeSet<Box<str>>>,
    pub(crate) links: BTreeMap<Box<str>, (u32, PodLink)>,
    /// What the next link is refused with.
    pub(crate) refusal: Option<String>,
    next: u32,
}

impl Fake {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn netns(&self, path: &str) -> PathBuf {
        self.state().namespaces.insert(path.into(), BTreeSet::new());
        path.into()
    }

    /// With it goes the link of whoever was in it.
    pub(crate) fn remove_netns(&self, path: &Path) {
        let mut state = self.state();
        state.namespaces.remove(path);
        state.links.retain(|_, (_, link)| link.netns != path);
    }
}

impl Netlink for Fake {
    fn attach(&self, link: &PodLink) -> Result<Wired, PodError> {
        let mut state = self.state();
        let Some(inside) = state.namespaces.get(&link.netns) else {
            let source = io::ErrorKind::NotFound.into();
            return Err(PodError::NoNetns { path: link.netns.clone(), source });
        };
        let ours =
            state.links.values().any(|(_, it)| (&it.netns, &it.pod.name) == (&link.netns, &link.pod.name));
        if ours || inside.contains(&link.pod.name) {
            return Err(PodError::Exists { name: link.pod.name.clone(), netns: link.netns.clone() });
        }
        if let Some(reason) = state.refusal.take() {
            return Err(PodError::Kernel { what: "add".into(), reason });
        }
        let taken =
            state.links.values().flat_map(|(_, it)| &it.addresses).find(|it| link.addresses.contains(it));
        assert_eq!(taken, None, "given twice");
        state.next += 1;
        let ifindex = state.next;
        state.links.insert(link.host.name.clone(), (ifindex, link.clone()));
        Ok(Wired { ifindex, mtu: 1500 })
    }

    fn detach(&self, host: &str) -> Result<(), PodError> {
        self.state().links.remove(host);
        Ok(())
    }

    fn check(&self, link: &PodLink) -> Result<Wired, PodError> {
        match self.state().links.get(&link.host.name) {
            Some((ifindex, found)) if found.addresses == link.addresses => {
                Ok(Wired { ifindex: *ifindex, mtu: 1500 })
            }
            found => Err(PodError::Different(format!("{found:?}"))),
        }
    }

    fn astray(&self, _links: &[PodLink]) -> Result<BTreeMap<Box<str>, u32>, PodError> {
        Ok(BTreeMap::new())
    }

    fn mend(&self, _link: &PodLink, _ifindex: u32) -> Result<(), PodError> {
        Ok(())
    }

    fn interfaces(&self) -> Result<BTreeMap<Box<str>, u32>, PodError> {
        Ok(self.state().links.iter().map(|(name, (ifindex, _))| (name.clone(), *ifindex)).collect())
    }

    fn forward(&self, _families: &[Family]) -> Result<(), PodError> {
        Ok(())
    }
}
