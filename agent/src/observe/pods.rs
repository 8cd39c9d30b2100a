//! Where pods are, for who knows them by name.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::model::{Name, World};

/// Where a pod is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodAddresses {
    /// `shop/web`.
    pub pod: String,
    pub addresses: Vec<IpAddr>,
}

/// The pods of a name: of one namespace where it names one (`shop/web`), else of any.
pub fn named(world: &World, name: &str) -> Vec<PodAddresses> {
    let has = |it: &Name| match name.split_once('/') {
        Some((namespace, name)) => *it.namespace == *namespace && *it.name == *name,
        None => *it.name == *name,
    };
    let found = world.pods().filter(|(it, _)| has(it));
    let found = found.map(|(it, pod)| PodAddresses {
        pod: it.to_string(),
        addresses: pod.addresses.iter().map(|addr| addr.ip()).collect(),
    });
    found.collect()
}

#[cfg(test)]
mod tests {
    use ferroflow_common::addr::Addr;

    use super::*;
    use crate::model::{Change, Pod};

    #[test]
    fn a_name_may_be_that_of_pods_in_several_namespaces() {
        let mut world = World::new("here");
        for (namespace, last) in [("shop", 1), ("pay", 2)] {
            let pod = Pod { addresses: Box::new([Addr::v4([10, 0, 0, last])]), ..Pod::default() };
            world.apply(Change::Pod(Name::new(namespace, "web"), Some(pod)));
        }
        let pods = |name: &str| named(&world, name).into_iter().map(|it| it.pod).collect::<Vec<_>>();
        assert_eq!(pods("web"), ["pay/web", "shop/web"]);
        assert_eq!(pods("shop/web"), ["shop/web"]);
        assert_eq!(pods("shop/db"), [""; 0]);
        assert_eq!(named(&world, "pay/web")[0].addresses, [IpAddr::from([10, 0, 0, 2])]);
    }
}
