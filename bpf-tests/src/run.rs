//! The real programs in this machine's kernel, run on one packet at a time (`BPF_PROG_TEST_RUN`), and the library on
//! the same packet.

use std::{
    collections::BTreeMap,
    env, fmt, fs,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use aya::{
    VerifierLogLevel,
    maps::{HashMap, Map, MapData},
    programs::{SchedClassifier, TestRun as _, TestRunOptions, Xdp as XdpProgram},
};
use ferroflow::{
    config::{Attach, Bpffs, MAX_ENDPOINTS, Masquerade, SocketLb, Xdp},
    datapath::{Datapath, Options, Sources},
    maps::{
        Backends, Endpoints, Frontends, Ipcache, IpcacheRanges, Maps as _, Policy, PortRanges, SettingsRow,
        Slots, kernel::KernelMaps,
    },
};
use ferroflow_common::{
    abi::conntrack::{Entry, Tuple},
    addr::Addr,
    family::{Family as _, V4, V6},
    verdict::{DropReason, Verdict},
};
use ferroflow_ebpf::{
    conntrack, device, masquerade,
    packet::{Bytes, Packet as _},
    parse::headers,
    pod,
    service::Origin,
    tables::fake::{Fake, FakePolicies},
};
use nix::time::{ClockId, clock_gettime};
use zerocopy::{FromBytes as _, Immutable, IntoBytes};

use crate::sandbox::Place;

/// The loaded object with maps of its own.
pub struct Programs {
    pub datapath: Datapath,
    tables: KernelMaps,
    bpffs: Bpffs,
}

/// A program that takes packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    PodEgress,
    PodIngress,
    DeviceIngress,
    DeviceEgress,
}

/// What TC does with the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// On to whatever comes next: `TC_ACT_UNSPEC`.
    Next,
    /// To another interface, or back: `TC_ACT_REDIRECT`.
    Redirect,
    /// Kept, or dropped and counted: `TC_ACT_SHOT`.
    Drop,
}

type EntryBytes = [u8; size_of::<Entry>()];

/// A tuple of either family, v4 addresses mapped.
pub type Wide = Tuple<[u8; 16]>;

impl Program {
    pub const ALL: [Self; 4] = [Self::PodEgress, Self::PodIngress, Self::DeviceIngress, Self::DeviceEgress];

    pub fn name(self) -> &'static str {
        match self {
            Self::PodEgress => "pod_egress",
            Self::PodIngress => "pod_ingress",
            Self::DeviceIngress => "device_ingress",
            Self::DeviceEgress => "device_egress",
        }
    }

    /// What a return value of the program means.
    fn action(self, returned: u32) -> Result<Action> {
        // TC_ACT_UNSPEC is -1.
        Ok(match returned.cast_signed() {
            -1 => Action::Next,
            2 => Action::Drop,
            7 => Action::Redirect,
            other => bail!("{} returned {other}", self.name()),
        })
    }

    /// What the library does with the packet.
    pub fn on_host(self, packet: &[u8], tables: &Fake) -> (Result<Verdict, DropReason>, Vec<u8>) {
        let mut bytes = Bytes(packet.to_vec());
        let verdict = match self {
            Self::PodEgress => pod::leaving(&mut bytes, tables),
            // A packet of a test run came by no interface.
            Self::PodIngress => pod::entering_pod(&mut bytes, tables, Origin::Own),
            Self::DeviceEgress => masquerade::leaving(&mut bytes, tables),
            Self::DeviceIngress => device::arriving(&mut bytes, tables),
        };
        (verdict, bytes.0)
    }
}

impl From<Result<Verdict, DropReason>> for Action {
    fn from(verdict: Result<Verdict, DropReason>) -> Self {
        match verdict {
            Ok(Verdict::Stack) => Self::Next,
            Ok(Verdict::Pod { .. } | Verdict::Forward | Verdict::Reply | Verdict::Relay { .. }) => {
                Self::Redirect
            }
            Ok(Verdict::Taken) | Err(_) => Self::Drop,
        }
    }
}

/// The random number that gives a flow the source port which this packet came out with, where it is one of those that
/// colliding flows get: the library, having thrown it, decides as the kernel did.
pub fn thrown(packet: &[u8]) -> Option<u32> {
    let packet = Bytes(packet.to_vec());
    let port = match packet.ethertype() {
        V4::ETHERTYPE => headers::<V4, _>(&packet).ok()??.tuple.src_port,
        V6::ETHERTYPE => headers::<V6, _>(&packet).ok()??.tuple.src_port,
        _ => return None,
    };
    conntrack::throw_for(port)
}

/// What is fixed when the programs are loaded. Displayed: what an agent is told to load them so, nothing by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Constants {
    pub socket_lb: SocketLb,
    pub masquerade: Masquerade,
    pub log_drops: bool,
}

/// What an agent without options loads.
pub const DEFAULTS: Constants =
    Constants { socket_lb: SocketLb::Tcp, masquerade: Masquerade::Off, log_drops: false };

impl Constants {
    /// Every combination that makes a program another; `SocketLb::Off` loads what `Tcp` does, and attaches less. What
    /// sockets do and what packets do are in different programs. What a kernel has (its coarse clock) is no choice.
    pub const ALL: [Self; 6] = [
        DEFAULTS,
        Self { socket_lb: SocketLb::All, ..DEFAULTS },
        Self { log_drops: true, ..DEFAULTS },
        Self { socket_lb: SocketLb::All, log_drops: true, ..DEFAULTS },
        Self { masquerade: Masquerade::On, ..DEFAULTS },
        Self { masquerade: Masquerade::On, log_drops: true, ..DEFAULTS },
    ];

    fn options(self, place: &Place) -> Options {
        let Self { socket_lb, masquerade, log_drops } = self;
        Options { socket_lb, masquerade, log_drops, ..options(&place.bpffs, Xdp::Off) }
    }
}

impl fmt::Display for Constants {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut options = Vec::new();
        options.extend((self.socket_lb == SocketLb::All).then_some("--socket-lb all"));
        options.extend((self.masquerade == Masquerade::On).then_some("--masquerade on"));
        options.extend(self.log_drops.then_some("--log-drops"));
        f.write_str(&options.join(" "))
    }
}

/// What an agent loads by default, on a BPF file system of its own.
pub fn options(bpffs: &Path, xdp: Xdp) -> Options {
    Options {
        bpffs: Bpffs { dir: bpffs.to_owned() },
        socket_lb: SocketLb::Tcp,
        attach: Attach::Auto,
        xdp,
        masquerade: Masquerade::Off,
        sources: Sources::Any,
        tunnel_port: Some(8472),
        max_endpoints: MAX_ENDPOINTS,
        log_drops: false,
    }
}

impl Programs {
    /// Loads the object that `FERROFLOW_OBJECT` names.
    pub fn load(place: &Place, constants: Constants) -> Result<Self> {
        Self::load_with(place, constants.options(place))
    }

    /// The same with what else an agent may be told.
    pub fn load_with(place: &Place, options: Options) -> Result<Self> {
        let bpffs = Bpffs { dir: place.bpffs.clone() };
        let datapath = Datapath::load(&object()?, options)?;
        let tables = KernelMaps::open(&bpffs.maps())?;
        Ok(Self { datapath, tables, bpffs })
    }

    /// With its maps made and its programs still to be loaded; the verifier shall say what they cost.
    pub fn create(place: &Place, constants: Constants) -> Result<Datapath> {
        Ok(Datapath::create(&object()?, constants.options(place), VerifierLogLevel::STATS)?)
    }

    /// The tables once more, for who writes them.
    pub fn maps(&self) -> Result<KernelMaps> {
        Ok(KernelMaps::open(&self.bpffs.maps())?)
    }

    /// Where a map is pinned.
    pub fn pin(&self, map: &str) -> PathBuf {
        self.bpffs.maps().join(map)
    }

    /// Writes what the tables of a test hold; rows that are not among them stay.
    pub fn fill(&mut self, tables: &Fake) -> Result<()> {
        for (index, backend) in (0..).zip(&tables.backends) {
            self.tables.write::<Backends>(index, backend)?;
        }
        for (index, slot) in (0..).zip(&tables.slots) {
            self.tables.write::<Slots>(index, slot)?;
        }
        for (key, frontend) in &tables.frontends {
            self.tables.put::<Frontends>(key, frontend)?;
        }
        for (addr, endpoint) in &tables.endpoints {
            self.tables.put::<Endpoints>(addr, endpoint)?;
        }
        if let Some(settings) = &tables.settings {
            self.tables.write::<SettingsRow>(0, settings)?;
        }
        self.fill_policies(&tables.policies)
    }

    fn fill_policies(&mut self, policies: &FakePolicies) -> Result<()> {
        for (row, range) in (0..).zip(&policies.port_ranges) {
            self.tables.write::<PortRanges>(row, range)?;
        }
        for (key, rules) in &policies.policy {
            self.tables.put::<Policy>(key, rules)?;
        }
        for (addr, class) in &policies.classes {
            self.tables.put::<Ipcache>(addr, class)?;
        }
        for (range, class) in &policies.ranges {
            self.tables.put::<IpcacheRanges>(range, class)?;
        }
        Ok(())
    }

    /// One packet through one program, as from the loopback. To [`Program::PodEgress`] it has come in there, as from a veth;
    /// where the kernel does not take that (see [`Programs::run_named`]) it is being sent, as by a netkit.
    pub fn run(&mut self, program: Program, packet: &[u8]) -> Result<(Action, Vec<u8>)> {
        if program == Program::PodEgress
            && let Ok(done) = self.run_on(program, LOOPBACK, packet)
        {
            return Ok(done);
        }
        let (returned, bytes) = self.run_named(program.name(), None, packet)?;
        Ok((program.action(returned)?, bytes))
    }

    /// One packet through one program on this interface of the calling thread's network namespace.
    pub fn run_on(&mut self, program: Program, ifindex: u32, packet: &[u8]) -> Result<(Action, Vec<u8>)> {
        let (returned, bytes) = self.run_named(program.name(), Some(ifindex), packet)?;
        Ok((program.action(returned)?, bytes))
    }

    /// The same for a packet that the node's own processes send: it came in by no interface.
    pub fn run_own(&mut self, program: Program, ifindex: u32, packet: &[u8]) -> Result<(Action, Vec<u8>)> {
        let (returned, bytes) = self.run_between(program.name(), Some([0, ifindex]), packet)?;
        Ok((program.action(returned)?, bytes))
    }

    /// What the program of this name returns, and what it makes of the packet. One of XDP finds it on the loopback,
    /// whatever the interface. A kernel as old as 5.10 takes none for TC either.
    pub fn run_named(&mut self, name: &str, interface: Option<u32>, packet: &[u8]) -> Result<(u32, Vec<u8>)> {
        self.run_between(name, interface.map(|it| [it, it]), packet)
    }

    /// The interfaces are that which the packet came in by, and that which it is at.
    fn run_between(
        &mut self,
        name: &str,
        interfaces: Option<[u32; 2]>,
        packet: &[u8],
    ) -> Result<(u32, Vec<u8>)> {
        // Room for what an answer adds.
        let mut bytes = vec![0; packet.len() + 256];
        let context = interfaces.map(context);
        let options =
            TestRunOptions { data_in: Some(packet), data_out: Some(&mut bytes), ..Default::default() };
        let program = self.datapath.programs().program_mut(name).with_context(|| format!("no {name}"))?;
        let result = if let Ok(xdp) = <&mut XdpProgram>::try_from(&mut *program) {
            xdp.test_run(options)
        } else {
            let options = TestRunOptions { ctx_in: context.as_deref(), ..options };
            <&mut SchedClassifier>::try_from(program)?.test_run(options)
        };
        let result = result.context("test run")?;
        bytes.truncate(result.data_size_out as usize);
        Ok((result.return_value, bytes))
    }

    /// The mean time of `repeat` runs on one packet, which each run finds as the one before left it.
    pub fn time(&mut self, program: Program, packet: &[u8], repeat: u32) -> Result<Duration> {
        let context = context([LOOPBACK; 2]);
        let options =
            TestRunOptions { data_in: Some(packet), ctx_in: Some(&context), repeat, ..Default::default() };
        Ok(self.classifier(program)?.test_run(options).context("test run")?.duration)
    }

    fn classifier(&mut self, program: Program) -> Result<&mut SchedClassifier> {
        let name = program.name();
        let program = self.datapath.programs().program_mut(name).with_context(|| format!("no {name}"))?;
        Ok(program.try_into()?)
    }

    /// The connection tables, both families in one.
    pub fn tracked(&self) -> Result<BTreeMap<Wide, Entry>> {
        let v4 = self.tables.conntrack::<[u8; 4]>()?.into_iter().map(|(tuple, entry)| (wide(&tuple), entry));
        Ok(v4.chain(self.tables.conntrack::<[u8; 16]>()?).collect())
    }

    /// Makes the connection tables hold exactly this.
    pub fn set_tracked(&mut self, flows: &BTreeMap<Wide, Entry>) -> Result<()> {
        let mut v4 = self.flows::<16>("conntrack_v4")?;
        let mut v6 = self.flows::<40>("conntrack_v6")?;
        for tuple in self.tracked()?.keys().filter(|tuple| !flows.contains_key(*tuple)) {
            match narrow(tuple) {
                Some(tuple) => v4.remove(&bytes(&tuple)?)?,
                None => v6.remove(&bytes(tuple)?)?,
            }
        }
        for (tuple, entry) in flows {
            match narrow(tuple) {
                Some(tuple) => {
                    v4.insert(&bytes::<16>(&tuple)?, &bytes::<{ size_of::<Entry>() }>(entry)?, 0)?
                }
                None => v6.insert(&bytes::<40>(tuple)?, &bytes::<{ size_of::<Entry>() }>(entry)?, 0)?,
            }
        }
        Ok(())
    }

    fn flows<const KEY: usize>(&self, map: &str) -> Result<HashMap<MapData, [u8; KEY], EntryBytes>> {
        Ok(HashMap::try_from(Map::LruHashMap(MapData::from_pin(self.pin(map))?))?)
    }

    /// Packets dropped so far, by reason; reasons that did not occur are left out.
    pub fn drops(&self) -> Result<Vec<(DropReason, u64)>> {
        Ok(self.tables.drops()?.into_iter().filter(|(_, count)| *count > 0).collect())
    }

    /// The second that the programs see, and will see for a while: library and kernel must take a packet in the same
    /// one. Waits where the second is about to change.
    pub fn now() -> Result<u32> {
        loop {
            // What the programs read, which is a tick behind the finer clock.
            let now = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE)?;
            if now.tv_nsec() < STEADY {
                return Ok(u32::try_from(now.tv_sec())?);
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

const LOOPBACK: u32 = 1;

/// As much of a `struct __sk_buff` as says which interface the packet came in by, and which it is at.
fn context(interfaces: [u32; 2]) -> Vec<u8> {
    [vec![0; INGRESS_IFINDEX], interfaces.map(u32::to_ne_bytes).concat()].concat()
}

/// Where the interface that a packet came in by stands in `struct __sk_buff`; the one that it is at is behind it.
const INGRESS_IFINDEX: usize = 36;

/// Until so many nanoseconds of a second it is taken to last: longer than a machine pauses a process by chance.
const STEADY: i64 = 700_000_000;

/// The object under test.
pub fn object() -> Result<Vec<u8>> {
    let path = env::var_os("FERROFLOW_OBJECT")
        .context("FERROFLOW_OBJECT does not name the BPF object; `cargo xtask test` sets it")?;
    fs::read(&path).with_context(|| format!("read FERROFLOW_OBJECT={}", path.display()))
}

fn wide(tuple: &Tuple<[u8; 4]>) -> Wide {
    let Tuple { src, dst, src_port, dst_port, proto, reserved } = *tuple;
    Tuple { src: Addr::v4(src).bytes, dst: Addr::v4(dst).bytes, src_port, dst_port, proto, reserved }
}

/// `None` where it is IPv6.
fn narrow(tuple: &Wide) -> Option<Tuple<[u8; 4]>> {
    let Tuple { src, dst, src_port, dst_port, proto, reserved } = *tuple;
    let (src, dst) = (Addr::v6(src), Addr::v6(dst));
    let v4 = Tuple { src: src.v4_bytes(), dst: dst.v4_bytes(), src_port, dst_port, proto, reserved };
    src.ip().is_ipv4().then_some(v4)
}

fn bytes<const N: usize>(value: &(impl IntoBytes + Immutable)) -> Result<[u8; N]> {
    <[u8; N]>::read_from_bytes(value.as_bytes()).ok().context("the layout of a map has changed")
}
