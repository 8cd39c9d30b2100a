//! The programs in the kernel: loaded once, attached to every pod and to the cgroup, pinned so that they outlive the
//! agent, and swapped in place when it comes back.

mod attach;
mod handle;
mod host;
mod migrate;
mod netkit;
mod patrol;

use std::collections::BTreeSet;
use std::path::PathBuf;

use aya::maps::MapError;
use aya::pin::PinError;
use aya::programs::ProgramError;
use aya::programs::links::LinkError;
use aya::{Ebpf, EbpfError, EbpfLoader, VerifierLogLevel};

use crate::config::{Attach, Bpffs, Masquerade, SocketLb, Xdp};
use crate::maps::transfer::TransferError;
use crate::maps::{ArrayTable as _, Backends, ConnectionCounts, Slots};

pub(crate) use attach::FILTER;
pub use attach::{Interface, load as load_program};
pub(crate) use host::kernel_is_at_least;
use migrate::{Former, Moving};

pub use host::{cgroup2_mount, prepare, prepare_agent, unlock_settings};
pub use patrol::Found;

/// What is fixed when the programs are loaded.
#[derive(Clone, Debug)]
pub struct Options {
    pub bpffs: Bpffs,
    pub socket_lb: SocketLb,
    pub attach: Attach,
    pub xdp: Xdp,
    pub masquerade: Masquerade,
    pub sources: Sources,
    /// The UDP port at which other nodes' tunnels end; `None` without tunnels.
    pub tunnel_port: Option<u16>,
    /// How many rows `backends` has; `slots` has [`SLOTS_PER_ENDPOINT`] times as many.
    pub max_endpoints: u32,
    /// Compiles the programs' log statements in.
    pub log_drops: bool,
}

/// Whether pods may send from other addresses than their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sources {
    /// They may not: this agent gave them all the addresses that they have.
    Checked,
    /// They may: another network plugin knows which ones they have.
    Any,
}

/// A Maglev table has at least a hundred slots for each backend; most services have one slot for each.
const SLOTS_PER_ENDPOINT: u32 = 4;

/// The loaded object.
pub struct Datapath {
    ebpf: Ebpf,
    options: Options,
    /// Where the socket programs are, once they are.
    cgroup: Option<PathBuf>,
    /// Maps that were replaced, until the programs that used them are.
    formers: Vec<Former>,
    /// Interfaces of pods that are known to be no netkits.
    plain: BTreeSet<u32>,
}

/// The object in this binary.
///
/// # Errors
/// [`DatapathError::NoObject`] in a binary that was built without one.
pub fn embedded_object() -> Result<&'static [u8], DatapathError> {
    #[cfg(embedded_object)]
    return Ok(aya::include_bytes_aligned!(env!("FERROFLOW_OBJECT")));
    #[cfg(not(embedded_object))]
    Err(DatapathError::NoObject)
}

impl Datapath {
    /// Loads every program and creates the maps, or takes over those that are pinned.
    ///
    /// # Errors
    /// What the kernel refuses, with the verifier's words where it is the verifier.
    pub fn load(object: &[u8], options: Options) -> Result<Self, DatapathError> {
        let mut datapath = Self::create(object, options, VerifierLogLevel::default())?;
        for (name, program) in datapath.ebpf.programs_mut() {
            attach::load(program)
                .map_err(|source| DatapathError::Program { name: name.to_owned(), source })?;
            handle::keep(name, program, &datapath.options.bpffs.dir.join("loading"))?;
        }
        Ok(datapath)
    }

    /// Creates the maps, or takes over those that are pinned; the programs are ready to be loaded, one by one, and the
    /// verifier is to say so much of each that fails.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn create(
        object: &[u8],
        options: Options,
        verifier_log: VerifierLogLevel,
    ) -> Result<Self, DatapathError> {
        prepare(&options.bpffs)?;
        host::raise_memlock_limit();
        let mut moving = Moving::new(&options.bpffs)?;
        let ebpf = loop {
            match create(object, &options, verifier_log, &moving) {
                Err(error) if moving.note(&error) => {}
                other => break other?,
            }
        };
        Ok(Self { ebpf, options, cgroup: None, formers: moving.switch()?, plain: BTreeSet::new() })
    }

    /// The programs, for those who run them on packets of their own.
    pub fn programs(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }
}

/// The object with its maps; those that are being moved are at other pins.
fn create(
    object: &[u8],
    options: &Options,
    verifier_log: VerifierLogLevel,
    moving: &Moving,
) -> Result<Ebpf, EbpfError> {
    // aya's levels: 0 compiles every log statement out, 3 is `info`, which dropped packets are logged at.
    let log_level: u8 = if options.log_drops { 3 } else { 0 };
    let pod_tcp = u8::from(options.socket_lb != SocketLb::Off);
    let pod_udp = u8::from(options.socket_lb == SocketLb::All);
    let masquerade = u8::from(options.masquerade == Masquerade::On);
    let check_sources = u8::from(options.sources == Sources::Checked);
    let tunnel_port = options.tunnel_port.unwrap_or_default();
    let host_netns = host::netns_cookie();
    let coarse_clock = u8::from(kernel_is_at_least(5, 11));
    let slots = options.max_endpoints.saturating_mul(SLOTS_PER_ENDPOINT);
    let mut loader = EbpfLoader::new();
    loader
        .default_map_pin_directory(options.bpffs.maps())
        .map_max_entries(Backends::NAME, options.max_endpoints)
        .map_max_entries(ConnectionCounts::NAME, options.max_endpoints)
        .map_max_entries(Slots::NAME, slots)
        .override_global("AYA_LOG_LEVEL", &log_level, true)
        .override_global("CHECK_SOURCES", &check_sources, true)
        .override_global("COARSE_CLOCK", &coarse_clock, true)
        .override_global("HOST_NETNS", &host_netns, true)
        .override_global("MASQUERADE", &masquerade, true)
        .override_global("POD_TCP", &pod_tcp, true)
        .override_global("POD_UDP", &pod_udp, true)
        .override_global("TUNNEL_PORT", &tunnel_port, true)
        .verifier_log_level(verifier_log);
    for (name, pin) in moving.pins() {
        loader.map_pin_path(name, pin);
    }
    loader.load(object)
}

#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    #[error("this binary carries no BPF object: build it with `cargo xtask build`")]
    NoObject,
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error(
        "{path}: {source}: programs and tables are pinned there: let the BPF file system be one that can be written (mount -o \
         remount,rw), or name a directory of another with --bpffs"
    )]
    Unwritable { path: PathBuf, source: std::io::Error },
    #[error(
        "{path} is not on a BPF file system: mount one (mount -t bpf bpf {path}) or name another directory with --bpffs"
    )]
    NotBpffs { path: PathBuf },
    #[error(
        "{path} is not on a BPF file system of the host's: let the init container mount one (chart: host.mountBpffs), or \
         mount it on the host (mount -t bpf bpf /sys/fs/bpf)"
    )]
    OwnBpffs { path: PathBuf },
    #[error(
        "no cgroup2 file system is mounted: mount one (mount -t cgroup2 none DIR) and name it with --cgroup"
    )]
    NoCgroup2,
    #[error("cannot load the BPF object: {}", Causes(.0))]
    Load(#[from] EbpfError),
    #[error("program `{name}`: {}", Causes(.source))]
    Program { name: String, source: ProgramError },
    #[error("the object has no program `{name}`: object and agent are of different versions")]
    NoProgram { name: &'static str },
    #[error("{place}: {}", Causes(.source))]
    Attach { place: String, source: ProgramError },
    #[error("{path}: {}", Causes(.source))]
    Link { path: PathBuf, source: LinkError },
    #[error("{path}: {}", Causes(.source))]
    Pin { path: PathBuf, source: PinError },
    #[error("map `{map}`: {source}")]
    Move { map: String, source: TransferError },
    #[error(transparent)]
    Map(#[from] MapError),
}

/// An error with everything that caused it, on one line.
pub(crate) struct Causes<'a, E>(pub(crate) &'a E);

impl<E: std::error::Error> std::fmt::Display for Causes<'_, E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut said = self.0.to_string();
        write!(f, "{said}")?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            let text = error.to_string();
            if !said.contains(&text) {
                write!(f, ": {text}")?;
                said = text;
            }
            cause = error.source();
        }
        Ok(())
    }
}
