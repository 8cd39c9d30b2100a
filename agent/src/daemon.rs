//! `ferroflow agent`: the loop that joins the stages. All decisions are in them; here is only who is told what, when.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use aya_log::EbpfLogger;
use ferroflow_common::abi::state::AgentState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{self, Receiver};
use tokio::time::sleep_until;

use crate::clock;
use crate::config;
use crate::datapath::{self, Datapath, DatapathError, Interface};
use crate::gc;
use crate::health::{self, Health, proxy::Progress};
use crate::lock::{Lock, LockError};
use crate::maps::MapError;
use crate::maps::kernel::KernelMaps;
use crate::model::Change;
use crate::net::{self, Moved, NetError, NetEvent};
use crate::plan;
use crate::reconcile::{self, Limits, Reconciler};
use crate::watch::file::{FileSource, Timing};
use crate::watch::{self, Event, Source as _};

/// Longer than any program runs on a packet, and than any reader of a slot range holds what it read.
const GRACE: Duration = Duration::from_secs(2);

/// How long a failed attachment waits for its next try.
const ATTACH_RETRY: Duration = Duration::from_secs(1);

/// How often the programs' log is read: for eyes, and its buffer holds thousands of lines.
const LOG_INTERVAL: Duration = Duration::from_millis(100);

/// How many changes may wait between a source and the loop.
const QUEUE: usize = 1024;

/// Runs until it is told to stop (SIGTERM, SIGINT). The programs, their attachments and the tables stay: stopping the
/// agent stops nothing else.
///
/// # Errors
/// [`DaemonError`] where it cannot start.
pub async fn run(config: &config::Agent) -> Result<(), DaemonError> {
    datapath::prepare(&config.bpffs)?;
    datapath::unlock_settings();
    let _lock = Lock::acquire(&config.bpffs.dir)?;
    let cgroup = match &config.cgroup {
        Some(dir) => dir.clone(),
        None => datapath::cgroup2_mount()?,
    };
    if !config.manifests.is_dir() {
        tracing::warn!(dir = %config.manifests.display(), "no such directory: nothing is served until it is there");
    }
    let options = datapath::Options {
        bpffs: config.bpffs.clone(),
        socket_lb: config.socket_lb,
        attach: config.attach,
        xdp: config.xdp,
        max_endpoints: config.max_endpoints,
        log_drops: config.log_drops,
    };
    let mut datapath = Datapath::load(datapath::embedded_object()?, options)?;
    datapath.attach_cgroup(&cgroup)?;
    if config.log_drops {
        log_drops(&mut datapath)?;
    }
    let reconciler = restore(config)?;
    tracing::info!(node = %config.node_name, version = env!("CARGO_PKG_VERSION"), "started");

    let (events, objects) = mpsc::channel(QUEUE);
    let source = FileSource::new(&config.manifests, config.node_name.as_str(), Timing::default());
    tokio::spawn(source.run(events));
    let (events, routes) = mpsc::channel(QUEUE);
    let watching = tokio::spawn(net::watch(events));
    let sweeping = tokio::spawn(gc::run(config.bpffs.maps()));
    let attachments =
        Attachments { attached: datapath.pinned()?.into_iter().collect(), ..Attachments::default() };
    let health = Health::start(config.health_port);
    let state = first_words(config);
    Daemon { datapath, reconciler, attachments, health, said: None, state, awaited: 2 }
        .serve(objects, routes)
        .await?;
    watching.abort();
    sweeping.abort();
    tracing::info!("stopped; the programs go on with the tables as they are");
    Ok(())
}

fn restore(config: &config::Agent) -> Result<Reconciler<KernelMaps>, MapError> {
    let maps = KernelMaps::open(&config.bpffs.maps())?;
    let limits = Limits {
        services: maps.capacity::<crate::maps::Services>()?,
        frontends: maps.capacity::<crate::maps::Frontends>()?,
    };
    let node = config.node_name.as_str().into();
    let plan = plan::Config { node_ports: config.node_port_addresses.clone(), ..plan::Config::default() };
    let config = reconcile::Config { node, limits, plan, grace: GRACE };
    Reconciler::restore(maps, &config, Instant::now())
}

/// Reads what the programs log; only with `--log-drops`, since every line costs a packet time.
fn log_drops(datapath: &mut Datapath) -> Result<(), DaemonError> {
    let mut logger = EbpfLogger::init(datapath.programs())?;
    let mut turns = tokio::time::interval(LOG_INTERVAL);
    tokio::spawn(async move {
        loop {
            turns.tick().await;
            logger.flush();
        }
    });
    Ok(())
}

struct Daemon {
    datapath: Datapath,
    reconciler: Reconciler<KernelMaps>,
    attachments: Attachments,
    health: Health,
    /// What was last said where `ferroflow status` finds it; nothing yet.
    said: Option<AgentState>,
    state: AgentState,
    /// Sources that have not yet sent all they have.
    awaited: u32,
}

/// Which interfaces carry the pod programs of this agent.
#[derive(Default)]
struct Attachments {
    /// Of this agent or, before it has looked, of the one before.
    attached: BTreeSet<(Interface, u32)>,
    /// Those that this agent has attached to.
    renewed: BTreeSet<(Interface, u32)>,
    retry: Option<Instant>,
}

impl Daemon {
    async fn serve(
        mut self,
        mut objects: Receiver<Event>,
        mut routes: Receiver<NetEvent>,
    ) -> Result<(), DaemonError> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        self.report()?;
        loop {
            let due = [self.reconciler.due(), self.attachments.retry].into_iter().flatten().min();
            tokio::select! {
                _ = terminate.recv() => return Ok(()),
                _ = interrupt.recv() => return Ok(()),
                Some(event) = objects.recv() => self.object(event),
                event = routes.recv() => match event {
                    Some(event) => self.host(event),
                    None => return Err(DaemonError::Routes),
                },
                () = sleep_until(due.unwrap_or_else(far_away).into()), if due.is_some() => {}
            }
            // What has queued up meanwhile goes in before anything is written.
            while let Ok(event) = objects.try_recv() {
                self.object(event);
            }
            while let Ok(event) = routes.try_recv() {
                self.host(event);
            }
            self.reconciler.tick(Instant::now());
            if self.awaited == 0 {
                self.attach();
            }
            self.answer_checks();
            self.report()?;
        }
    }

    /// What load balancers are told from now on (rules 40 and 41).
    fn answer_checks(&mut self) {
        let world = self.reconciler.world();
        let stay = world.own_node().map(|node| node.stay).unwrap_or_default();
        let checks = health::service::checks(world);
        let progress = if self.is_synced() { Progress::Done } else { Progress::Pending };
        self.health.set_checks(checks);
        self.health.set_proxy(progress, stay);
    }

    /// Everything that was said is in the tables, or was refused (a conflict stays one however often it is looked at).
    fn is_synced(&self) -> bool {
        self.awaited == 0 && self.reconciler.stats().pending == 0 && self.attachments.retry.is_none()
    }

    fn object(&mut self, event: Event) {
        match event {
            Event::Change(change) => self.reconciler.handle(change, Instant::now()),
            Event::Problems(problems) => {
                self.state.rejected = u32::try_from(problems.len()).unwrap_or(u32::MAX);
                self.reconciler.hold(watch::withheld(&problems), Instant::now());
            }
            Event::Synced => self.source_synced(),
        }
    }

    fn host(&mut self, event: NetEvent) {
        let change = match event {
            NetEvent::Route(Moved { addr, ifindex }) => Change::LocalRoute(addr, ifindex),
            NetEvent::Address(Moved { addr, ifindex }) => Change::LocalAddress(addr, ifindex),
            NetEvent::Synced => return self.source_synced(),
        };
        self.reconciler.handle(change, Instant::now());
    }

    fn source_synced(&mut self) {
        self.awaited = self.awaited.saturating_sub(1);
        if self.awaited == 0 {
            self.reconciler.synced();
        }
    }

    /// Attaches to the interfaces of the local pods and to the node's devices, and lets go of others.
    fn attach(&mut self) {
        let pods = self.reconciler.endpoints().map(|endpoint| (Interface::Pod, endpoint.ifindex));
        let devices = plan::node::devices(self.reconciler.world());
        let wanted: BTreeSet<_> =
            pods.chain(devices.into_iter().map(|ifindex| (Interface::Device, ifindex))).collect();
        let Attachments { attached, renewed, retry } = &mut self.attachments;
        let mut failed = false;
        for interface @ (kind, ifindex) in wanted.difference(&renewed.clone()).copied() {
            match self.datapath.attach(kind, ifindex) {
                Ok(()) => {
                    renewed.insert(interface);
                    attached.insert(interface);
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot attach to an interface; trying again");
                    failed = true;
                }
            }
        }
        for interface @ (kind, ifindex) in attached.clone().difference(&wanted).copied() {
            match self.datapath.detach(kind, ifindex) {
                Ok(()) => {
                    renewed.remove(&interface);
                    attached.remove(&interface);
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot detach from an interface; trying again");
                    failed = true;
                }
            }
        }
        *retry = failed.then(|| Instant::now() + ATTACH_RETRY);
    }

    /// Says how things are, where `ferroflow status` finds it; written only when it changed.
    fn report(&mut self) -> Result<(), MapError> {
        let stats = self.reconciler.stats();
        let synced = self.is_synced();
        self.state.synced = u32::from(synced);
        self.state.writes = stats.writes;
        self.state.retries = stats.failures;
        if self.said == Some(self.state) {
            return Ok(());
        }
        self.reconciler.maps().set_agent_state(self.state)?;
        let was_synced = self.said.is_some_and(|said| said.synced != 0);
        if synced && !was_synced {
            let reconcile::Stats { services, frontends, backends, endpoints, writes, .. } = stats;
            tracing::info!(services, frontends, backends, endpoints, writes, "in sync");
        }
        self.said = Some(self.state);
        Ok(())
    }
}

fn first_words(config: &config::Agent) -> AgentState {
    AgentState {
        pid: std::process::id(),
        synced: 0,
        started: u64::from(clock::seconds()),
        writes: 0,
        retries: 0,
        rejected: 0,
        reserved: 0,
        version: text(env!("CARGO_PKG_VERSION")),
        node: text(&config.node_name),
    }
}

/// The text, cut where the field ends.
fn text<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [0; N];
    for (to, from) in field.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    field
}

fn far_away() -> Instant {
    Instant::now() + Duration::from_secs(3600)
}

#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    #[error(transparent)]
    Map(#[from] MapError),
    #[error(transparent)]
    Net(#[from] NetError),
    #[error("the watch of the kernel's routes and addresses ended")]
    Routes,
    #[error("cannot read the programs' log: {0}")]
    Log(#[from] aya_log::Error),
    #[error(transparent)]
    Io(#[from] std::io::Error),
}
