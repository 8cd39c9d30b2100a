//! Who has which address. Pure: no clock, no I/O.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;

use ferroflow_common::addr::Addr;
use serde::{Deserialize, Serialize};

use super::host_port::HostPort;
use super::range::Usable;
use super::{IpamError, Lease, Owner, Space, Tenant};
use crate::model::{Family, Prefix};

/// All leases of this node, and what is remembered of those that ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pool {
    leases: BTreeMap<Owner, Lease>,
    used: BTreeSet<IpAddr>,
    /// Released, the longest ago first: given again only where there is nothing else.
    resting: VecDeque<IpAddr>,
    /// Behind which address of a range the next search begins.
    cursors: BTreeMap<String, IpAddr>,
}

/// As it is in the file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    leases: Vec<Held>,
    resting: Vec<IpAddr>,
    cursors: BTreeMap<String, IpAddr>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Held {
    #[serde(flatten)]
    owner: Owner,
    #[serde(flatten)]
    lease: Lease,
}

/// How many released addresses rest: a few turns of a node full of pods.
const RESTING: usize = 1024;

impl Pool {
    /// Gives the owner one address of each family that there is a range of, or nothing at all.
    ///
    /// # Errors
    /// [`IpamError`].
    pub fn allocate(&mut self, owner: &Owner, network: &str, space: Space<'_>) -> Result<Lease, IpamError> {
        if space.ranges.is_empty() {
            return Err(IpamError::NoRange);
        }
        let mut picks = Vec::new();
        for family in Family::ALL {
            let ranges: Vec<_> = space.ranges.iter().filter(|range| range.family() == family).collect();
            if !ranges.is_empty() {
                picks.push(self.pick(family, &ranges, space.reserved)?);
            }
        }
        for Pick { addr, range } in &picks {
            self.resting.retain(|resting| resting != addr);
            self.cursors.insert(range.to_string(), *addr);
        }
        self.cursors.retain(|known, _| space.ranges.iter().any(|range| range.to_string() == *known));
        let addresses = picks.iter().map(|pick| pick.addr).collect();
        self.release(owner);
        Ok(self.hold(owner, network, addresses))
    }

    /// Notes that another gave the owner these addresses.
    ///
    /// # Errors
    /// [`IpamError::Given`] where they are in use.
    pub fn adopt(&mut self, owner: &Owner, network: &str, addresses: &[IpAddr]) -> Result<Lease, IpamError> {
        self.release(owner);
        if let Some(&addr) = addresses.iter().find(|addr| self.used.contains(addr)) {
            let holder = self.leases.iter().find(|(_, lease)| lease.addresses.contains(&addr));
            let holder = holder.map_or_else(Box::default, |(holder, _)| holder.container_id.clone());
            return Err(IpamError::Given { addr, holder });
        }
        self.resting.retain(|resting| !addresses.contains(resting));
        Ok(self.hold(owner, network, addresses.to_vec()))
    }

    fn hold(&mut self, owner: &Owner, network: &str, addresses: Vec<IpAddr>) -> Lease {
        let lease = Lease { network: network.into(), addresses, tenant: None, host_ports: Vec::new() };
        self.used.extend(&lease.addresses);
        self.leases.insert(owner.clone(), lease.clone());
        lease
    }

    /// Notes whose pod the owner's addresses are, and the ports of the host that lead to it; the whole lease, if the owner
    /// has one.
    pub fn let_to(
        &mut self,
        owner: &Owner,
        tenant: Option<Tenant>,
        host_ports: Vec<HostPort>,
    ) -> Option<&Lease> {
        let lease = self.leases.get_mut(owner)?;
        (lease.tenant, lease.host_ports) = (tenant, host_ports);
        Some(lease)
    }

    /// One of these ports of the host that another than the owner has, and that one.
    pub fn taken<'a>(&'a self, owner: &Owner, ports: &'a [HostPort]) -> Option<(&'a HostPort, &'a Owner)> {
        let others = self.leases.iter().filter(|(other, _)| *other != owner);
        others
            .flat_map(|(other, lease)| lease.host_ports.iter().map(move |port| (port, other)))
            .find_map(|(theirs, other)| Some((ports.iter().find(|port| port.collides(theirs))?, other)))
    }

    /// What the owner had, which it has no longer.
    pub fn release(&mut self, owner: &Owner) -> Option<Lease> {
        let lease = self.leases.remove(owner)?;
        for addr in &lease.addresses {
            self.used.remove(addr);
            self.resting.push_back(*addr);
        }
        self.resting.drain(..self.resting.len().saturating_sub(RESTING));
        Some(lease)
    }

    /// Whether another owner could be given addresses.
    ///
    /// # Errors
    /// Why not.
    pub fn room(&self, space: Space<'_>) -> Result<(), IpamError> {
        let nobody = Owner { container_id: "".into(), ifname: "".into() };
        self.clone().allocate(&nobody, "", space).map(drop)
    }

    pub fn lease(&self, owner: &Owner) -> Option<&Lease> {
        self.leases.get(owner)
    }

    pub fn leases(&self) -> impl Iterator<Item = (&Owner, &Lease)> {
        self.leases.iter()
    }

    pub fn record(&self) -> Record {
        let held = |(owner, lease): (&Owner, &Lease)| Held { owner: owner.clone(), lease: lease.clone() };
        Record {
            leases: self.leases.iter().map(held).collect(),
            resting: self.resting.iter().copied().collect(),
            cursors: self.cursors.clone(),
        }
    }

    /// # Errors
    /// The address that two owners have: such a record was not written by a pool.
    pub fn restore(record: Record) -> Result<Self, IpAddr> {
        let mut pool = Self::default();
        for Held { owner, lease } in record.leases {
            if let Some(&twice) = lease.addresses.iter().find(|addr| pool.used.contains(addr)) {
                return Err(twice);
            }
            pool.used.extend(&lease.addresses);
            pool.leases.insert(owner, lease);
        }
        pool.resting = record.resting.into_iter().filter(|addr| !pool.used.contains(addr)).collect();
        pool.cursors = record.cursors;
        Ok(pool)
    }

    fn pick<'a>(
        &self,
        family: Family,
        ranges: &[&'a Prefix],
        reserved: &BTreeSet<Addr>,
    ) -> Result<Pick<'a>, IpamError> {
        let free = |addr: &IpAddr| !self.used.contains(addr) && !reserved.contains(&Addr::from(*addr));
        // Among one more than are taken there is a free one, however large the range is.
        let enough = self.used.len() + self.resting.len() + reserved.len() + 1;
        for range in ranges {
            let cursor = self.cursors.get(&range.to_string()).map(|&addr| addr.into());
            let mut found = Usable::of(range)?.after(cursor).take(enough).map(|addr| addr.ip());
            if let Some(addr) = found.find(|addr| free(addr) && !self.resting.contains(addr)) {
                return Ok(Pick { addr, range });
            }
        }
        let rested = self.resting.iter().find_map(|addr| {
            let range = ranges.iter().find(|range| range.contains(&Addr::from(*addr)))?;
            free(addr).then_some(Pick { addr: *addr, range })
        });
        rested.ok_or_else(|| IpamError::Exhausted {
            family,
            ranges: ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
            used: self.used.iter().filter(|addr| Family::of(&Addr::from(**addr)) == family).count(),
        })
    }
}

struct Pick<'a> {
    addr: IpAddr,
    range: &'a Prefix,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(text: &str) -> Prefix {
        let (addr, bits) = text.split_once('/').unwrap();
        Prefix::new(addr.parse::<IpAddr>().unwrap().into(), bits.parse().unwrap()).unwrap()
    }

    fn owner(number: usize) -> Owner {
        Owner { container_id: format!("c{number}").into(), ifname: "eth0".into() }
    }

    fn texts(lease: &Lease) -> Vec<String> {
        lease.addresses.iter().map(ToString::to_string).collect()
    }

    const NOBODY: &BTreeSet<Addr> = &BTreeSet::new();

    #[test]
    fn each_family_that_has_a_range_gets_an_address() {
        for (ranges, expected) in [
            (vec!["10.244.1.0/24", "fd00:1::/64"], vec!["10.244.1.2", "fd00:1::2"]),
            (vec!["10.244.1.0/24"], vec!["10.244.1.2"]),
            (vec!["fd00:1::/64"], vec!["fd00:1::2"]),
        ] {
            let ranges: Vec<_> = ranges.into_iter().map(range).collect();
            let space = Space { ranges: &ranges, reserved: NOBODY };
            let lease = Pool::default().allocate(&owner(0), "net", space).unwrap();
            assert_eq!(texts(&lease), expected);
        }
        let none = Space { ranges: &[], reserved: NOBODY };
        assert_eq!(Pool::default().allocate(&owner(0), "net", none), Err(IpamError::NoRange));
    }

    #[test]
    fn a_released_address_is_given_again_last_and_the_oldest_first() {
        let ranges = [range("10.0.0.0/29")];
        let space = Space { ranges: &ranges, reserved: NOBODY };
        let mut pool = Pool::default();
        let next =
            |pool: &mut Pool, number| texts(&pool.allocate(&owner(number), "n", space).unwrap())[0].clone();
        assert_eq!(next(&mut pool, 1), "10.0.0.2");
        assert_eq!(next(&mut pool, 2), "10.0.0.3");
        pool.release(&owner(2));
        pool.release(&owner(1));
        for (number, expected) in
            [(3, "10.0.0.4"), (4, "10.0.0.5"), (5, "10.0.0.6"), (6, "10.0.0.3"), (7, "10.0.0.2")]
        {
            assert_eq!(next(&mut pool, number), expected);
            pool = Pool::restore(pool.record()).unwrap();
        }
        let error = pool.allocate(&owner(8), "n", space).unwrap_err();
        assert_eq!(error, pool.room(space).unwrap_err());
        assert!(error.to_string().contains("no IPv4 address is left in 10.0.0.0/29"), "{error}");
        pool.release(&owner(5));
        assert_eq!(next(&mut pool, 8), "10.0.0.6");
    }

    #[test]
    fn one_family_without_an_address_gives_none_of_the_other() {
        let ranges = [range("10.0.0.0/24"), range("fd00::9/128")];
        let space = Space { ranges: &ranges, reserved: NOBODY };
        let mut pool = Pool::default();
        pool.allocate(&owner(1), "n", space).unwrap();
        let before = pool.clone();
        assert!(matches!(
            pool.allocate(&owner(2), "n", space),
            Err(IpamError::Exhausted { family: Family::V6, used: 1, .. })
        ));
        assert_eq!(pool, before);
    }

    #[test]
    fn addresses_of_others_are_left_to_them() {
        let ranges = [range("10.0.0.0/29")];
        let reserved = BTreeSet::from([Addr::v4([10, 0, 0, 2]), Addr::v4([10, 0, 0, 4])]);
        let mut pool = Pool::default();
        let space = Space { ranges: &ranges, reserved: &reserved };
        let given: Vec<_> = (0..3)
            .map(|number| texts(&pool.allocate(&owner(number), "n", space).unwrap())[0].clone())
            .collect();
        assert_eq!(given, ["10.0.0.3", "10.0.0.5", "10.0.0.6"]);
        assert!(pool.room(space).is_err());
    }

    #[test]
    fn another_range_at_run_time_and_several_of_a_family() {
        let (first, second) = (range("10.0.0.0/30"), range("10.0.1.0/30"));
        let mut pool = Pool::default();
        let both = [first, second];
        let space = Space { ranges: &both, reserved: NOBODY };
        assert_eq!(texts(&pool.allocate(&owner(1), "n", space).unwrap()), ["10.0.0.2"]);
        assert_eq!(texts(&pool.allocate(&owner(2), "n", space).unwrap()), ["10.0.1.2"]);
        let other = [range("10.0.0.0/29")];
        let space = Space { ranges: &other, reserved: NOBODY };
        assert_eq!(texts(&pool.allocate(&owner(3), "n", space).unwrap()), ["10.0.0.3"], "10.0.0.2 is in use");
        pool.release(&owner(2));
        let given: Vec<_> =
            (4..7).map(|number| texts(&pool.allocate(&owner(number), "n", space).unwrap())).collect();
        assert_eq!(given.concat(), ["10.0.0.4", "10.0.0.5", "10.0.0.6"]);
        assert!(pool.room(space).is_err(), "10.0.1.2 is free and no longer of this node");
    }

    #[test]
    fn an_owner_that_comes_again_has_one_lease() {
        let ranges = [range("10.0.0.0/24")];
        let space = Space { ranges: &ranges, reserved: NOBODY };
        let mut pool = Pool::default();
        pool.allocate(&owner(1), "n", space).unwrap();
        assert_eq!(texts(&pool.allocate(&owner(1), "n", space).unwrap()), ["10.0.0.3"]);
        assert_eq!(pool.leases().count(), 1);
        assert_eq!(texts(&pool.allocate(&owner(2), "n", space).unwrap()), ["10.0.0.4"], "10.0.0.2 rests");
    }

    #[test]
    fn a_record_that_gives_an_address_twice_is_refused() {
        let held = |number| Held {
            owner: owner(number),
            lease: Lease {
                network: "n".into(),
                addresses: vec!["10.0.0.2".parse().unwrap()],
                tenant: None,
                host_ports: Vec::new(),
            },
        };
        let record = Record { leases: vec![held(1), held(2)], resting: Vec::new(), cursors: BTreeMap::new() };
        assert_eq!(Pool::restore(record), Err("10.0.0.2".parse().unwrap()));
    }

    /// Whatever is asked for and given back, in whatever order, with ranges that change and restarts in between.
    #[test]
    fn no_address_is_ever_given_twice() {
        let choices = [
            vec![range("10.0.0.0/28"), range("fd00::/64")],
            vec![range("10.0.0.0/29"), range("10.0.0.8/29")],
            vec![range("fd00::/124")],
            vec![range("10.0.0.0/27"), range("fd00::/125")],
        ];
        for seed in 0..200u64 {
            let mut state = seed;
            let mut random = |below: usize| {
                state = ferroflow_common::hash::mix(state, 0x9e37);
                (state >> 33) as usize % below
            };
            let mut pool = Pool::default();
            let mut last_released: BTreeMap<IpAddr, usize> = BTreeMap::new();
            for step in 1..300 {
                let ranges = &choices[random(60) / 15];
                let space = Space { ranges, reserved: NOBODY };
                let who = owner(random(24));
                if random(3) == 0 {
                    let lease = pool.release(&who);
                    last_released.extend(lease.into_iter().flat_map(|it| it.addresses).map(|it| (it, step)));
                } else if pool.lease(&who).is_none()
                    && let Ok(lease) = pool.allocate(&who, "n", space)
                {
                    let families = Family::ALL.map(|family| ranges.iter().any(|it| it.family() == family));
                    assert_eq!(lease.addresses.len(), families.iter().filter(|it| **it).count());
                    for addr in &lease.addresses {
                        assert!(ranges.iter().any(|range| range.contains(&Addr::from(*addr))), "{addr}");
                        let older = pool.resting.iter().filter(|rest| {
                            let same = ranges.iter().any(|it| it.contains(&Addr::from(**rest)))
                                && rest.is_ipv4() == addr.is_ipv4();
                            same && last_released.get(addr) > last_released.get(rest)
                        });
                        assert_eq!(
                            older.collect::<Vec<_>>(),
                            Vec::<&IpAddr>::new(),
                            "seed {seed}: {addr} rested less"
                        );
                    }
                }
                let all: Vec<_> = pool.leases().flat_map(|(_, lease)| lease.addresses.clone()).collect();
                assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len(), "seed {seed}, step {step}");
                if random(10) == 0 {
                    let record = serde_json::to_string(&pool.record()).unwrap();
                    let restored = Pool::restore(serde_json::from_str(&record).unwrap()).unwrap();
                    assert_eq!(restored, pool);
                    pool = restored;
                }
            }
        }
    }
}
