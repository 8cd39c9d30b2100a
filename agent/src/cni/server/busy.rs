//! One command at a time for an attachment; those of others go on beside it.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::ipam::Owner;

#[derive(Debug, Default)]
pub(super) struct Busy {
    owners: Mutex<BTreeSet<Owner>>,
    freed: Notify,
}

/// The right to change one attachment, until it is dropped.
#[derive(Debug)]
pub(super) struct Claim<'a> {
    busy: &'a Busy,
    owner: Owner,
}

impl Busy {
    /// `None` while another command has it.
    pub(super) fn claim(&self, owner: &Owner) -> Option<Claim<'_>> {
        self.owners().insert(owner.clone()).then(|| Claim { busy: self, owner: owner.clone() })
    }

    pub(super) async fn wait(&self, owner: &Owner) -> Claim<'_> {
        loop {
            // Made before the look, so that no end is missed in between.
            let freed = self.freed.notified();
            if let Some(claim) = self.claim(owner) {
                return claim;
            }
            freed.await;
        }
    }

    fn owners(&self) -> MutexGuard<'_, BTreeSet<Owner>> {
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.busy.owners().remove(&self.owner);
        self.busy.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_waits_for_the_other_and_not_for_the_rest() {
        let busy = Busy::default();
        let owner = |id: &str| Owner { container_id: id.into(), ifname: "eth0".into() };
        let first = busy.claim(&owner("a")).unwrap();
        assert!(busy.claim(&owner("a")).is_none());
        drop(busy.wait(&owner("b")).await);
        let waited = owner("a");
        let (_second, ()) = tokio::join!(busy.wait(&waited), async {
            tokio::task::yield_now().await;
            drop(first);
        });
        assert!(busy.claim(&owner("a")).is_none());
    }
}
