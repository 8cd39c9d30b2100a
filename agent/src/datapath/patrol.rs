//! What somebody removed under a running agent is made again: pins of maps, links of the cgroup, programs of interfaces.
//!
//! A removed pin of a link takes the program off its interface or cgroup at once. A map goes on without its pin, since
//! the programs hold it, but no later agent would find it: it is pinned again while this one still holds it.

use nix::net::if_::if_indextoname;

use super::{Datapath, DatapathError, Interface, host};

/// What a walk found.
#[derive(Debug, Default)]
pub struct Found {
    /// What was missing and is there again, one sentence each.
    pub repaired: Vec<String>,
    pub failed: Vec<DatapathError>,
}

impl Datapath {
    /// Looks at everything that is pinned or attached. `interfaces` have programs of this agent.
    pub fn patrol(&mut self, interfaces: impl Iterator<Item = (Interface, u32)>) -> Found {
        let mut found = Found::default();
        if let Err(error) = self.pin_maps(&mut found.repaired) {
            found.failed.push(error);
        }
        // By now every program is this agent's.
        found.failed.extend(self.formers.drain(..).filter_map(|former| former.follow().err()));
        let list = |programs: Vec<&'static str>| programs.join(", ");
        match self.ensure_cgroup() {
            Ok(made) if made.is_empty() => {}
            Ok(made) => found.repaired.push(format!("{}: attached to the cgroup again", list(made))),
            Err(error) => found.failed.push(error),
        }
        for (kind, ifindex) in interfaces {
            match self.ensure(kind, ifindex) {
                Ok(made) if made.is_empty() => {}
                Ok(made) => {
                    found.repaired.push(format!("{}: attached to interface {ifindex} again", list(made)));
                }
                // It went, and whoever looks after it has not been told yet.
                Err(_gone) if if_indextoname(ifindex).is_err() => {}
                Err(error) => found.failed.push(error),
            }
        }
        found
    }

    fn pin_maps(&self, repaired: &mut Vec<String>) -> Result<(), DatapathError> {
        let dir = self.options.bpffs.maps();
        let missing = self.ebpf.maps().filter(|(name, _)| is_pinned(name) && !dir.join(name).exists());
        for (name, map) in missing {
            host::prepare(&self.options.bpffs)?;
            let path = dir.join(name);
            map.pin(&path).map_err(|source| DatapathError::Pin { path, source })?;
            repaired.push(format!("map {name}: pinned again"));
        }
        Ok(())
    }
}

/// The constants of the object, and the log, are this agent's own.
fn is_pinned(map: &str) -> bool {
    !map.starts_with('.') && !map.starts_with("AYA_")
}
