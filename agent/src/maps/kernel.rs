//! The pinned BPF maps: hash tables through the system call, arrays through shared memory, so that programming a
//! whole cluster takes few system calls. One of the few files with unsafe code.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use aya::Pod;
use aya::maps::{Array, HashMap, Map, MapData, MapError as AyaError, PerCpuArray};
use aya::pin::PinError;
use aya::sys::SyscallError;
use ferroflow_common::abi::conntrack::{Entry, Tuple};
use ferroflow_common::abi::state::AgentState;
use ferroflow_common::verdict::DropReason;
use zerocopy::{FromZeros as _, IntoBytes as _};

use super::batch;
use super::{
    ArrayTable, Backends, ConnectedSockets, ConnectionCounts, Endpoints, ExitAddresses, Frontends, HashTable,
    Ipcache, IpcacheRanges, MapError, Maps, Masquerades, NodeAddresses, NodeTunnels, PeerClasses, Plain,
    Policy, PolicySets, PortRanges, RelayNodes, RelayPeers, Services, SettingsRow, Slots, SourceRanges,
    Tunnels, UnmasqueradedRanges,
};

/// A value whose bytes may go to the kernel and come from it.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Raw<T>(T);

// SAFETY: `Plain` is `FromBytes`, so every bit pattern is a valid `T`, and `IntoBytes`, so `T` has no padding.
unsafe impl<T: Plain> Pod for Raw<T> {}

/// The hash tables of policies.
const POLICIES: [&str; 5] =
    [Ipcache::NAME, IpcacheRanges::NAME, Policy::NAME, PolicySets::NAME, PeerClasses::NAME];

/// The tables that an agent has pinned.
pub struct KernelMaps {
    dir: PathBuf,
    hashes: BTreeMap<&'static str, Map>,
    arrays: BTreeMap<&'static str, Rows>,
    /// What the agent says of itself.
    state: Map,
    writes: u64,
}

impl KernelMaps {
    /// Opens the maps under `dir` (`<bpffs>/maps`).
    ///
    /// # Errors
    /// [`MapError::Missing`] where no agent has run.
    pub fn open(dir: &Path) -> Result<Self, MapError> {
        let mut hashes = BTreeMap::new();
        // To the system calls a trie is a hash table with a key of this layout.
        for name in [
            Frontends::NAME,
            SourceRanges::NAME,
            Services::NAME,
            Endpoints::NAME,
            NodeAddresses::NAME,
            Tunnels::NAME,
            NodeTunnels::NAME,
            ConnectedSockets::NAME,
            ExitAddresses::NAME,
            RelayNodes::NAME,
            RelayPeers::NAME,
            UnmasqueradedRanges::NAME,
        ]
        .into_iter()
        .chain(POLICIES)
        {
            hashes.insert(name, Map::HashMap(pinned(dir, name)?));
        }
        let mut arrays = BTreeMap::new();
        for name in [
            Slots::NAME,
            Backends::NAME,
            Masquerades::NAME,
            SettingsRow::NAME,
            ConnectionCounts::NAME,
            PortRanges::NAME,
        ] {
            arrays.insert(name, Rows::open(name, pinned(dir, name)?)?);
        }
        let state = Map::Array(pinned(dir, STATE)?);
        Ok(Self { dir: dir.to_owned(), hashes, arrays, state, writes: 0 })
    }

    /// How many rows a hash table has room for.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn capacity<T: HashTable>(&self) -> Result<u32, MapError> {
        self.capacity_of(T::NAME)
    }

    /// The same of any map, by its name.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn capacity_of(&self, name: &'static str) -> Result<u32, MapError> {
        let info = pinned(&self.dir, name)?.info().map_err(|error| kernel_error(name, "info", error))?;
        Ok(info.max_entries())
    }

    /// What the agent said last.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn agent_state(&self) -> Result<AgentState, MapError> {
        let array = Array::<_, Raw<AgentState>>::try_from(&self.state)
            .map_err(|error| kernel_error(STATE, "open", error))?;
        array.get(&0, 0).map(|Raw(state)| state).map_err(|error| kernel_error(STATE, "lookup", error))
    }

    /// # Errors
    /// The kernel's refusal.
    pub fn set_agent_state(&mut self, state: AgentState) -> Result<(), MapError> {
        let mut array = Array::<_, Raw<AgentState>>::try_from(&mut self.state)
            .map_err(|error| kernel_error(STATE, "open", error))?;
        array.set(0, &Raw(state), 0).map_err(|error| kernel_error(STATE, "update", error))
    }

    /// Packets dropped since the maps were made, over all CPUs.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn drops(&self) -> Result<Vec<(DropReason, u64)>, MapError> {
        let name = "drops";
        let array = PerCpuArray::<_, u64>::try_from(Map::PerCpuArray(pinned(&self.dir, name)?))
            .map_err(|error| kernel_error(name, "open", error))?;
        let count = |reason: DropReason| {
            let counts =
                array.get(&(reason as u32), 0).map_err(|error| kernel_error(name, "lookup", error))?;
            Ok((reason, counts.iter().sum()))
        };
        DropReason::ALL.iter().map(|&reason| count(reason)).collect()
    }

    /// Tracked flows of one family; `A` is `[u8; 4]` or `[u8; 16]`. The table lives: entries may come and go while
    /// it is read.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn conntrack<A>(&self) -> Result<Vec<(Tuple<A>, Entry)>, MapError>
    where
        Tuple<A>: Plain,
    {
        let name = conntrack_name::<A>();
        let map = pinned(&self.dir, name)?;
        let mut rows = Vec::new();
        batch::for_each(map.fd().as_fd(), |tuple: &Tuple<A>, entry: &Entry| rows.push((*tuple, *entry)))
            .map_err(|source| MapError::Kernel { map: name, call: "lookup batch", source })?;
        Ok(rows)
    }

    /// Deletes the flows of one family that were idle longer than they live, as of `now` (seconds of
    /// `CLOCK_MONOTONIC`), and those that are to end, and counts.
    ///
    /// A flow that wakes up between the second look and its deletion, a microsecond, is forgotten and opened anew by
    /// its next packet. `judge` is called with each direction of the flows that live.
    ///
    /// # Errors
    /// The kernel's refusal; what was deleted stays deleted.
    pub fn sweep_conntrack<A>(
        &self,
        now: u32,
        mut judge: impl FnMut(&Tuple<A>, &Entry) -> Fate,
    ) -> Result<Sweep, MapError>
    where
        Tuple<A>: Plain,
    {
        let name = conntrack_name::<A>();
        let map = pinned(&self.dir, name)?;
        let mut sweep = Sweep::default();
        let (mut expired, mut ended) = (Vec::new(), Vec::new());
        batch::for_each(map.fd().as_fd(), |tuple: &Tuple<A>, entry: &Entry| {
            sweep.seen += 1;
            if entry.expires < now {
                expired.push(*tuple);
                return;
            }
            match judge(tuple, entry) {
                Fate::Stays => {}
                Fate::Ends => ended.push((*tuple, entry.src)),
            }
        })
        .map_err(|source| MapError::Kernel { map: name, call: "lookup batch", source })?;
        let mut map = HashMap::<_, Raw<Tuple<A>>, Raw<Entry>>::try_from(Map::LruHashMap(map))
            .map_err(|error| kernel_error(name, "open", error))?;
        for tuple in expired {
            let still = map.get(&Raw(tuple), 0).is_ok_and(|Raw(entry)| entry.expires < now);
            // That it is gone by now is what was wanted.
            if still && map.remove(&Raw(tuple)).is_ok() {
                sweep.deleted += 1;
            }
        }
        for (tuple, src) in ended {
            let still = map.get(&Raw(tuple), 0).is_ok_and(|Raw(entry)| entry.src == src);
            if still && map.remove(&Raw(tuple)).is_ok() {
                sweep.deleted += 1;
                sweep.ended += 1;
            }
        }
        Ok(sweep)
    }

    fn hash<T: HashTable>(&self) -> Result<Hash<&MapData, T>, MapError> {
        let map = self.hashes.get(T::NAME).ok_or_else(|| self.missing(T::NAME))?;
        HashMap::try_from(map).map_err(|error| kernel_error(T::NAME, "open", error))
    }

    fn hash_mut<T: HashTable>(&mut self) -> Result<Hash<&mut MapData, T>, MapError> {
        let missing = self.missing(T::NAME);
        let map = self.hashes.get_mut(T::NAME).ok_or(missing)?;
        HashMap::try_from(map).map_err(|error| kernel_error(T::NAME, "open", error))
    }

    fn missing(&self, map: &'static str) -> MapError {
        MapError::Missing { map, dir: self.dir.clone() }
    }
}

/// What a sweep found, in entries; a flow has two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sweep {
    pub seen: u64,
    pub deleted: u64,
    /// Those of them that had not expired.
    pub ended: u64,
}

/// What becomes of a flow that lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Stays,
    Ends,
}

const STATE: &str = "agent";

const fn conntrack_name<A>() -> &'static str {
    if size_of::<A>() == 4 { "conntrack_v4" } else { "conntrack_v6" }
}

/// aya's typed view of one of our tables.
type Hash<M, T> = HashMap<M, Raw<<T as HashTable>::Key>, Raw<<T as HashTable>::Value>>;

impl Maps for KernelMaps {
    fn dump<T: HashTable>(&self) -> Result<Vec<(T::Key, T::Value)>, MapError> {
        self.hash::<T>()?
            .iter()
            .map(|row| row.map(|(Raw(key), Raw(value))| (key, value)))
            .collect::<Result<_, _>>()
            .map_err(|error| kernel_error(T::NAME, "dump", error))
    }

    fn put<T: HashTable>(&mut self, key: &T::Key, value: &T::Value) -> Result<(), MapError> {
        self.hash_mut::<T>()?
            .insert(&Raw(*key), &Raw(*value), 0)
            .map_err(|error| kernel_error(T::NAME, "update", error))?;
        self.writes += 1;
        Ok(())
    }

    fn delete<T: HashTable>(&mut self, key: &T::Key) -> Result<(), MapError> {
        match self.hash_mut::<T>()?.remove(&Raw(*key)) {
            Ok(()) => {}
            Err(error) if errno(&error) == Some(libc::ENOENT) => return Ok(()),
            Err(error) => return Err(kernel_error(T::NAME, "delete", error)),
        }
        self.writes += 1;
        Ok(())
    }

    fn len<T: ArrayTable>(&self) -> u32 {
        self.arrays.get(T::NAME).map_or(0, |rows| rows.len)
    }

    fn read<T: ArrayTable>(&self, index: u32) -> Result<T::Value, MapError> {
        let rows = self.arrays.get(T::NAME).ok_or_else(|| self.missing(T::NAME))?;
        let mut value = T::Value::new_zeroed();
        let (words, _rest) = value.as_mut_bytes().as_chunks_mut::<4>();
        rows.with_row(index, |row| {
            for (word, row) in words.iter_mut().zip(row) {
                *word = row.load(Ordering::Acquire).to_ne_bytes();
            }
        })?;
        Ok(value)
    }

    fn write<T: ArrayTable>(&mut self, index: u32, value: &T::Value) -> Result<(), MapError> {
        let missing = self.missing(T::NAME);
        let rows = self.arrays.get(T::NAME).ok_or(missing)?;
        let (words, _rest) = value.as_bytes().as_chunks::<4>();
        rows.with_row(index, |row| {
            for (row, word) in row.iter().zip(words) {
                row.store(u32::from_ne_bytes(*word), Ordering::Release);
            }
        })?;
        self.writes += 1;
        Ok(())
    }

    fn writes(&self) -> u64 {
        self.writes
    }
}

/// The rows of an array map as shared memory: programs read them at the same time. Rows are made of atomic words,
/// written in order. Of a large table only the windows that were used last are in this process's memory: it is the
/// kernel's whether they are or not, but counts as this process's where they are.
struct Rows {
    name: &'static str,
    map: MapData,
    /// Bytes from one row to the next: the kernel rounds rows up to eight.
    stride: usize,
    len: u32,
    /// The one that was used last comes last.
    windows: RefCell<Vec<Window>>,
}

/// Rows from `first` on, [`Window::ROWS`] of them or up to the end.
struct Window {
    first: u32,
    start: NonNull<AtomicU32>,
    bytes: usize,
}

// SAFETY: the memory belongs to the value, and everything in it is atomic.
unsafe impl Send for Window {}

impl Rows {
    fn open(name: &'static str, map: MapData) -> Result<Self, MapError> {
        let info = map.info().map_err(|error| kernel_error(name, "info", error))?;
        let stride = (info.value_size() as usize).next_multiple_of(8);
        Ok(Self { name, len: info.max_entries(), map, stride, windows: RefCell::default() })
    }

    /// Gives the words of a row to `use_it`.
    fn with_row(&self, index: u32, use_it: impl FnOnce(&[AtomicU32])) -> Result<(), MapError> {
        if index >= self.len {
            return Err(MapError::Index { map: self.name, index, len: self.len });
        }
        let first = index - index % Window::ROWS;
        let mut windows = self.windows.borrow_mut();
        let window = match windows.iter().position(|window| window.first == first) {
            Some(at) => windows.remove(at),
            None => {
                if windows.len() >= Window::KEPT {
                    windows.remove(0);
                }
                Window::map(self, first)?
            }
        };
        use_it(window.row((index - first) as usize * self.stride, self.stride));
        windows.push(window);
        Ok(())
    }
}

impl Window {
    /// So that windows begin at pages, of up to 64 KiB, whatever the size of a row.
    const ROWS: u32 = 1 << 13;
    /// How many of a table are kept. Rows that are used together are mostly near each other.
    const KEPT: usize = 2;

    fn map(rows: &Rows, first: u32) -> Result<Self, MapError> {
        let failed = |source| MapError::Kernel { map: rows.name, call: "mmap", source };
        let bytes = rows.stride * (rows.len - first).min(Self::ROWS) as usize;
        let offset =
            libc::off_t::try_from(rows.stride * first as usize).map_err(io::Error::other).map_err(failed)?;
        let fd = rows.map.fd().as_fd().as_raw_fd();
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping anywhere; the kernel checks the map's kind and size.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, libc::MAP_SHARED, fd, offset) };
        if start == libc::MAP_FAILED {
            return Err(failed(io::Error::last_os_error()));
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| failed(io::ErrorKind::InvalidData.into()))?;
        Ok(Self { first, start, bytes })
    }

    /// The words of the row that begins after `offset` bytes; none where it is not within the window.
    fn row(&self, offset: usize, stride: usize) -> &[AtomicU32] {
        if offset + stride > self.bytes {
            return &[];
        }
        // SAFETY: the row is inside the mapping, as was just checked.
        let row = unsafe { self.start.byte_add(offset) };
        // SAFETY: as above; the mapping lives as long as `self` and is aligned to pages, rows to words.
        unsafe { std::slice::from_raw_parts(row.as_ptr(), stride / 4) }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the mapping that `map` made; nothing borrows from it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

fn pinned(dir: &Path, name: &'static str) -> Result<MapData, MapError> {
    MapData::from_pin(dir.join(name)).map_err(|error| match errno(&error) {
        Some(libc::ENOENT) => MapError::Missing { map: name, dir: dir.to_owned() },
        _ => kernel_error(name, "open", error),
    })
}

fn errno(error: &AyaError) -> Option<i32> {
    if let AyaError::SyscallError(SyscallError { io_error, .. })
    | AyaError::PinError { error: PinError::SyscallError(SyscallError { io_error, .. }), .. } = error
    {
        return io_error.raw_os_error();
    }
    matches!(error, AyaError::KeyNotFound).then_some(libc::ENOENT)
}

fn kernel_error(map: &'static str, call: &'static str, error: AyaError) -> MapError {
    match errno(&error) {
        Some(libc::E2BIG | libc::ENOMEM | libc::ENOSPC) if call == "update" => MapError::Full { map },
        Some(code) => MapError::Kernel { map, call, source: io::Error::from_raw_os_error(code) },
        None => MapError::Kernel { map, call, source: io::Error::other(error) },
    }
}
