//! Tables in ordinary memory, for tests and for a look at a plan: they may fail on purpose, and after every write they
//! may be searched for what a program must never see.

use std::collections::BTreeMap;

use ferroflow_common::abi::endpoint::Endpoint;
use ferroflow_common::abi::lb::{Backend, Frontend, FrontendKey, SourceRangeKey};
use ferroflow_common::abi::policy::{EndpointPolicy, PolicyKey, PortRange};
use ferroflow_common::addr::Addr;

use zerocopy::IntoBytes;

use super::{
    ArrayTable, Backends, Endpoints, Frontends, HashTable, MapError, Maps, Masquerades, Policy, PortRanges,
    Rows, SettingsRow, Slots, SourceRanges,
};

#[derive(Clone, Debug)]
pub struct FakeMaps {
    /// Rows as bytes, by table and key.
    hashes: BTreeMap<&'static str, BTreeMap<Vec<u8>, Vec<u8>>>,
    arrays: BTreeMap<&'static str, Vec<u8>>,
    sizes: Sizes,
    writes: u64,
    faults: Faults,
    search: Search,
}

/// How many rows a table may have; all hash tables alike.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub hash: usize,
    pub slots: u32,
    pub backends: u32,
}

/// When a write fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Faults {
    Never,
    /// In so many of a hundred writes, by a generator that starts from `seed`.
    Percent {
        seed: u64,
        percent: u64,
    },
    /// After so many more writes every one fails: the agent is dead.
    After {
        writes: u64,
    },
}

/// Whether the tables are searched for contradictions after every write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Search {
    EveryWrite,
    /// Where the test is about large tables.
    Never,
}

impl FakeMaps {
    pub fn new(sizes: Sizes, search: Search) -> Self {
        let arrays = [
            (Slots::NAME, vec![0; sizes.slots as usize * size_of::<<Slots as ArrayTable>::Value>()]),
            (SettingsRow::NAME, vec![0; size_of::<<SettingsRow as ArrayTable>::Value>()]),
            (PortRanges::NAME, vec![0; sizes.slots as usize * size_of::<PortRange>()]),
            (Masquerades::NAME, vec![0; size_of::<<Masquerades as ArrayTable>::Value>()]),
            (Backends::NAME, vec![0; sizes.backends as usize * size_of::<Backend>()]),
        ];
        let arrays = BTreeMap::from(arrays);
        Self { hashes: BTreeMap::new(), arrays, sizes, writes: 0, faults: Faults::Never, search }
    }

    pub fn set_faults(&mut self, faults: Faults) {
        self.faults = faults;
    }

    /// What a program must never see: a frontend whose slots name nothing, or a backend that is not live or is
    /// another service's; one whose internal row or whose source ranges are not there; a pod whose policy set is not
    /// there.
    ///
    /// # Errors
    /// The first such frontend or pod.
    pub fn contradiction(&self) -> Result<(), String> {
        let rows = self.dump::<Frontends>().map_err(|error| error.to_string())?;
        rows.iter().try_for_each(|(key, frontend)| self.frontend_contradiction(key, frontend))?;
        let pods = self.dump::<Endpoints>().map_err(|error| error.to_string())?;
        pods.iter().try_for_each(|(addr, row)| self.policy_contradiction(addr, row))
    }

    fn frontend_contradiction(&self, key: &FrontendKey, frontend: &Frontend) -> Result<(), String> {
        for slot in frontend.offset..frontend.offset + frontend.length {
            let index = self.read::<Slots>(slot).map_err(|error| error.to_string())?;
            let backend = self.read::<Backends>(index).map_err(|error| error.to_string())?;
            let live =
                index != 0 && backend.flags & Backend::LIVE != 0 && backend.service == frontend.service;
            if !live {
                return Err(format!(
                    "{key:?} -> {frontend:?}: slot {slot} names {index}, which is {backend:?}"
                ));
            }
        }
        let internal = FrontendKey { scope: FrontendKey::INTERNAL, ..*key };
        if frontend.flags & Frontend::INTERNAL_ROW != 0 && !self.has::<Frontends>(|row, _| *row == internal) {
            return Err(format!("{key:?} -> {frontend:?} has no internal row"));
        }
        let ranges = |row: &SourceRangeKey, _: &u32| row.data.service == frontend.service;
        if frontend.flags & Frontend::SOURCE_RANGES != 0 && !self.has::<SourceRanges>(ranges) {
            return Err(format!("{key:?} -> {frontend:?} has no source ranges"));
        }
        Ok(())
    }

    fn policy_contradiction(&self, addr: &Addr, row: &Endpoint) -> Result<(), String> {
        for set in [row.policy.ingress, row.policy.egress] {
            let others = PolicyKey { set, class: PolicyKey::OTHERS };
            let known = set == EndpointPolicy::OPEN || set == EndpointPolicy::CLOSED;
            if !known && !self.has::<Policy>(|key, _| *key == others) {
                return Err(format!("{addr} -> {row:?}: the policy set has no rules"));
            }
        }
        Ok(())
    }

    fn has<T: HashTable>(&self, wanted: impl Fn(&T::Key, &T::Value) -> bool) -> bool {
        self.dump::<T>().is_ok_and(|rows| rows.iter().any(|(key, value)| wanted(key, value)))
    }

    fn may_write(&mut self, map: &'static str) -> Result<(), MapError> {
        let fails = match &mut self.faults {
            Faults::Never => false,
            Faults::Percent { seed, percent } => {
                *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (*seed >> 33) % 100 < *percent
            }
            Faults::After { writes: 0 } => true,
            Faults::After { writes } => {
                *writes -= 1;
                false
            }
        };
        if fails {
            return Err(MapError::Kernel {
                map,
                call: "fake",
                source: std::io::Error::other("fails on purpose"),
            });
        }
        Ok(())
    }

    fn written(&mut self) {
        self.writes += 1;
        if self.search == Search::EveryWrite
            && let Err(contradiction) = self.contradiction()
        {
            panic!("after write {}: {contradiction}", self.writes);
        }
    }

    fn row<T: ArrayTable>(&self, index: u32) -> Result<std::ops::Range<usize>, MapError> {
        let (width, len) = (size_of::<T::Value>(), self.len::<T>());
        if index >= len {
            return Err(MapError::Index { map: T::NAME, index, len });
        }
        Ok(index as usize * width..(index as usize + 1) * width)
    }
}

impl Maps for FakeMaps {
    fn dump<T: HashTable>(&self) -> Result<Rows<T>, MapError> {
        let rows = self.hashes.get(T::NAME).into_iter().flatten();
        Ok(rows.map(|(key, value)| (plain(key), plain(value))).collect())
    }

    fn put<T: HashTable>(&mut self, key: &T::Key, value: &T::Value) -> Result<(), MapError> {
        self.may_write(T::NAME)?;
        let rows = self.hashes.entry(T::NAME).or_default();
        if rows.len() >= self.sizes.hash && !rows.contains_key(key.as_bytes()) {
            return Err(MapError::Full { map: T::NAME });
        }
        rows.insert(key.as_bytes().to_vec(), value.as_bytes().to_vec());
        self.written();
        Ok(())
    }

    fn delete<T: HashTable>(&mut self, key: &T::Key) -> Result<(), MapError> {
        self.may_write(T::NAME)?;
        self.hashes.entry(T::NAME).or_default().remove(key.as_bytes());
        self.written();
        Ok(())
    }

    fn len<T: ArrayTable>(&self) -> u32 {
        let bytes = self.arrays.get(T::NAME).map_or(0, Vec::len);
        u32::try_from(bytes / size_of::<T::Value>()).unwrap_or(u32::MAX)
    }

    fn read<T: ArrayTable>(&self, index: u32) -> Result<T::Value, MapError> {
        let row = self.row::<T>(index)?;
        Ok(plain(&self.arrays[T::NAME][row]))
    }

    fn write<T: ArrayTable>(&mut self, index: u32, value: &T::Value) -> Result<(), MapError> {
        let row = self.row::<T>(index)?;
        self.may_write(T::NAME)?;
        if let Some(bytes) = self.arrays.get_mut(T::NAME) {
            bytes[row].copy_from_slice(value.as_bytes());
        }
        self.written();
        Ok(())
    }

    fn writes(&self) -> u64 {
        self.writes
    }
}

/// Bytes that went in as a `T` come out as one.
fn plain<T: super::Plain>(bytes: &[u8]) -> T {
    match T::read_from_bytes(bytes) {
        Ok(value) => value,
        Err(_) => panic!("a row has {} bytes, not {}", bytes.len(), size_of::<T>()),
    }
}

#[cfg(test)]
mod tests {
    use ferroflow_common::abi::endpoint::Endpoint;
    use ferroflow_common::addr::Addr;

    use super::super::Endpoints;
    use super::*;

    const SIZES: Sizes = Sizes { hash: 2, slots: 4, backends: 4 };

    #[test]
    fn rows_come_back_and_bounds_hold() {
        let mut maps = FakeMaps::new(SIZES, Search::EveryWrite);
        for last in 1..=2 {
            maps.put::<Endpoints>(
                &Addr::v4([10, 0, 0, last]),
                &Endpoint { link: last.into(), ..Endpoint::default() },
            )
            .unwrap();
        }
        let full =
            maps.put::<Endpoints>(&Addr::v4([10, 0, 0, 3]), &Endpoint { link: 3, ..Endpoint::default() });
        assert!(matches!(full, Err(MapError::Full { map: "endpoints" })));
        maps.put::<Endpoints>(&Addr::v4([10, 0, 0, 2]), &Endpoint { link: 4, ..Endpoint::default() })
            .unwrap();
        maps.delete::<Endpoints>(&Addr::v4([10, 0, 0, 1])).unwrap();
        assert_eq!(
            maps.dump::<Endpoints>().unwrap(),
            [(Addr::v4([10, 0, 0, 2]), Endpoint { link: 4, ..Endpoint::default() })]
        );
        maps.write::<Slots>(3, &7).unwrap();
        assert_eq!((maps.read::<Slots>(3).unwrap(), maps.len::<Slots>(), maps.writes()), (7, 4, 5));
        assert!(matches!(maps.read::<Backends>(4), Err(MapError::Index { index: 4, len: 4, .. })));
    }

    #[test]
    #[should_panic(expected = "slot 0 names 0")]
    fn a_frontend_before_its_slots_is_a_contradiction() {
        let mut maps = FakeMaps::new(SIZES, Search::EveryWrite);
        let key = FrontendKey {
            addr: Addr::UNSPECIFIED,
            port: ferroflow_common::addr::Port::ZERO,
            proto: ferroflow_common::addr::Proto::TCP,
            scope: FrontendKey::EXTERNAL,
        };
        let frontend = Frontend { service: 1, offset: 0, length: 1, flags: 0, affinity: 0 };
        maps.put::<Frontends>(&key, &frontend).unwrap();
    }

    #[test]
    fn a_dead_agent_writes_nothing_more() {
        let mut maps = FakeMaps::new(SIZES, Search::EveryWrite);
        maps.set_faults(Faults::After { writes: 1 });
        maps.write::<Slots>(0, &1).unwrap();
        maps.write::<Slots>(0, &2).unwrap_err();
        assert_eq!((maps.read::<Slots>(0).unwrap(), maps.writes()), (1, 1));
    }
}
