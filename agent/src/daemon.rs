//! `ferroflow agent`: the loop that joins the stages. All decisions are in them; here is only who is told what, when.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use aya_log::EbpfLogger;
use ferroflow_common::abi::state::AgentState;
use ferroflow_common::addr::{Port, Proto};
use futures_util::FutureExt as _;
use futures_util::future::{self, BoxFuture};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{self, Receiver, Sender, UnboundedReceiver, UnboundedSender};
use tokio::sync::{Notify, oneshot, watch as latest};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::sleep_until;

use crate::clock;
use crate::cni;
use crate::cni::server::StartError;
use crate::cni::server::conflist::Conflist;
use crate::cni::server::order::{Order, Place, Readiness, Refused, View};
use crate::config::{self, PodDevice};
use crate::datapath::{self, Datapath, DatapathError, Interface, Sources};
use crate::events::{Note, Reason, Recorder};
use crate::gc;
use crate::health::{self, Health, Keeper, proxy::Progress};
use crate::heap;
use crate::ipam;
use crate::ipam::host_port::Transport;
use crate::kube_proxy;
use crate::lock::{Lock, LockError};
use crate::maps::MapError;
use crate::maps::kernel::KernelMaps;
use crate::model::{At, Change, Family, HostPort, HostPorts, KubeProxy, Name, Tenant, TunnelLink, World};
use crate::net::device::has_netkit;
use crate::net::pod::{Kind, PodError};
use crate::net::routes::{Goal, Laid, Surplus};
use crate::net::tunnel::TunnelDevice;
use crate::net::{self, Moved, NetError, NetEvent};
use crate::observe::{self, Metrics};
use crate::patrol::Patrol;
use crate::plan;
use crate::plan::relay::LoadBalancerMode;
use crate::plan::routes::Routing;
use crate::reconcile::{self, Limits, Missing, Reconciler};
use crate::scrape::Gauges;
use crate::stale;
use crate::watch::file::{FileSource, Timing};
use crate::watch::kube::{
    Access, AccessError, KubeSource, Network, Readiness as NodeReadiness, Timing as ApiTiming,
};
use crate::watch::{self, Contact, Event, Source as _};

/// Longer than any program runs on a packet, and than any reader of a slot range holds what it read.
const GRACE: Duration = Duration::from_secs(2);

/// How long a failed attachment waits for its next try.
const ATTACH_RETRY: Duration = Duration::from_secs(1);

/// How often the programs' log is read: for eyes, and its buffer holds thousands of lines.
const LOG_INTERVAL: Duration = Duration::from_millis(100);

/// How often the agent says that it lives, though nothing changed.
const TURN: Duration = Duration::from_secs(2);

/// How many changes may wait between a source and the loop.
const QUEUE: usize = 1024;

/// Runs until it is told to stop (SIGTERM, SIGINT). The programs, their attachments and the tables stay: stopping the
/// agent stops nothing else.
///
/// # Errors
/// [`DaemonError`] where it cannot start.
pub async fn run(config: &config::Agent) -> Result<(), DaemonError> {
    let started = (SystemTime::now(), Instant::now());
    datapath::prepare_agent(&config.bpffs)?;
    datapath::unlock_settings();
    let _lock = Lock::acquire(&config.bpffs.dir)?;
    let cgroup = config.cgroup.clone().map_or_else(datapath::cgroup2_mount, Ok)?;
    let device = pod_device(&config.cni)?;
    let (events, objects) = mpsc::channel(QUEUE);
    let (recorder, notes) = Recorder::new();
    let (ready, served) = oneshot::channel();
    let (moved, moves) = latest::channel(0);
    let source = source(config, events, notes, (served, moves)).await?;
    // The tools that it asks take their time, as the verifier does.
    let looking = tokio::task::spawn_blocking(kube_proxy::look);
    let datapath = load(config, &cgroup)?;
    let mut reconciler = restore(config)?;
    let kube_proxy = looking.await.unwrap_or_default();
    tracing::info!(node = %config.node_name, version = env!("CARGO_PKG_VERSION"), "started");

    // They end when it is dropped.
    let mut tasks = JoinSet::new();
    tasks.spawn(source);
    let (routes, proxies) = watch_host(&kube_proxy, config.timeouts, &mut tasks);
    let (metrics, gauges, scrapes) = measure(config, started, &mut tasks);
    let changed = Arc::new(Notify::new());
    tasks.spawn(stale::run(config.bpffs.maps(), changed.clone()));
    let attachments =
        Attachments { attached: datapath.pinned()?.into_iter().collect(), ..Attachments::default() };
    let health = Health::start(config.health_port);
    // Where the agent is told a cgroup, whoever told it looks after its processes.
    let own_cgroup = config.cgroup.is_none().then(|| cgroup.clone());
    let keeper = Keeper::new(&config.run_dir, own_cgroup);
    let (orders, asked) = mpsc::unbounded_channel();
    if config.cni.enabled {
        tasks.spawn(attach_pods((&config.cni, device), orders, &mut reconciler).await?.run());
    }
    let (routes_between, routing) = Routes::start(config)?;
    let mut daemon = Daemon {
        datapath,
        reconciler,
        attachments,
        health,
        keeper,
        routes: routes_between,
        surplus: Surplus::Removed,
        unserved: Vec::new(),
        recorder,
        metrics,
        gauges,
        changed,
        ready: Some(ready),
        moved,
        said: None,
        state: first_words(config),
        awaited: 2,
    };
    daemon.kube_proxy(&kube_proxy);
    daemon.serve(objects, routes, proxies, (asked, scrapes)).await?;
    routing.abort();
    tracing::info!("stopped; the programs go on with the tables as they are");
    Ok(())
}

/// Whether packets go to other nodes in a tunnel.
fn has_tunnel(routing: Routing, mode: LoadBalancerMode) -> bool {
    routing == Routing::Vxlan || mode == LoadBalancerMode::Dsr
}

/// The programs, in force for the sockets of the cgroup.
fn load(config: &config::Agent, cgroup: &Path) -> Result<Datapath, DaemonError> {
    let options = datapath::Options {
        bpffs: config.bpffs.clone(),
        socket_lb: config.socket_lb,
        attach: config.attach,
        xdp: config.xdp,
        masquerade: config.masquerades(),
        sources: if config.cni.enabled { Sources::Checked } else { Sources::Any },
        tunnel_port: has_tunnel(config.routing, config.load_balancer_mode).then_some(config.vxlan_port),
        max_endpoints: config.max_endpoints,
        log_drops: config.log_drops,
    };
    let mut datapath = Datapath::load(datapath::embedded_object()?, options)?;
    datapath.attach_cgroup(cgroup)?;
    if config.log_drops {
        log_drops(&mut datapath)?;
    }
    Ok(datapath)
}

/// Starts to look at the host's network, and for kube-proxy.
fn watch_host(
    kube_proxy: &kube_proxy::Found,
    timeouts: kube_proxy::Timeouts,
    tasks: &mut JoinSet<()>,
) -> (Receiver<NetEvent>, Receiver<kube_proxy::Found>) {
    let (events, routes) = mpsc::channel(QUEUE);
    // Where it ends early, so does what it sends to.
    tasks.spawn(async {
        if let Err(error) = net::watch(events).await {
            tracing::error!(%error, "cannot watch the host's routes and addresses");
        }
    });
    let (events, proxies) = mpsc::channel(QUEUE);
    tasks.spawn(kube_proxy::watch(kube_proxy.clone(), events));
    tasks.spawn(kube_proxy::keep_timeouts(timeouts));
    (routes, proxies)
}

/// Starts to sweep and to show metrics.
fn measure(
    config: &config::Agent,
    started: (SystemTime, Instant),
    tasks: &mut JoinSet<()>,
) -> (Metrics, Gauges, Receiver<observe::Asked>) {
    let (sweeps, swept) = latest::channel(gc::Swept::default());
    tasks.spawn(gc::run(config.bpffs.maps(), sweeps));
    let metrics = Metrics::new(started.1);
    let (ask, scrapes) = mpsc::channel(1);
    if let Some(addr) = config.metrics.addr() {
        tasks.spawn(observe::start(addr, metrics.page(), ask));
    }
    (metrics, Gauges { started: started.0, swept }, scrapes)
}

/// What new pods get.
fn pod_device(config: &config::Cni) -> Result<Kind, DaemonError> {
    let kind = match config.pod_device {
        PodDevice::Netkit | PodDevice::Auto if !config.enabled => return Ok(Kind::Veth),
        PodDevice::Veth => return Ok(Kind::Veth),
        PodDevice::Netkit if !has_netkit()? => return Err(DaemonError::NoNetkit),
        PodDevice::Netkit => Kind::Netkit,
        PodDevice::Auto if has_netkit()? => Kind::Netkit,
        PodDevice::Auto => Kind::Veth,
    };
    tracing::info!(device = kind.name(), "what new pods get");
    Ok(kind)
}

/// Starts to attach pods; those that are attached are known before anything is written.
async fn attach_pods(
    (config, device): (&config::Cni, Kind),
    orders: UnboundedSender<Order>,
    reconciler: &mut Reconciler<KernelMaps>,
) -> Result<cni::server::Server, StartError> {
    let options = cni::server::Options {
        socket: config.socket.clone(),
        state_dir: config.state_dir.clone(),
        conflist: Conflist {
            dir: config.conf_dir.clone(),
            name: config.conf_name.clone(),
            ipam: config.ipam.clone(),
        },
        device,
    };
    let (server, attached) = cni::server::Server::start(options, Arc::new(net::veth::Kernel), orders).await?;
    for place in &attached {
        settle(reconciler, place);
    }
    Ok(server)
}

/// Takes in who is behind an interface.
fn settle(reconciler: &mut Reconciler<KernelMaps>, place: &Place) {
    let tenant = place.tenant.as_ref().map(|ipam::Tenant { namespace, name, uid }| Tenant {
        pod: Name::new(namespace.clone(), name.clone()),
        uid: uid.clone(),
    });
    for &addr in &place.addresses {
        reconciler.handle(Change::Attachment(addr, Some(place.ifindex)), Instant::now());
        reconciler.handle(Change::Tenant(addr, tenant.clone()), Instant::now());
    }
    if !place.host_ports.is_empty() {
        let ports = place.host_ports.iter().map(host_port).collect();
        let ports = HostPorts::new(place.addresses.clone().into(), ports);
        reconciler.handle(Change::HostPorts(place.interface.clone(), Some(ports)), Instant::now());
    }
}

fn host_port(port: &ipam::host_port::HostPort) -> HostPort {
    let at = match port.host_ip {
        None => At::Every,
        Some(addr) if addr.is_unspecified() => At::EveryOf(Family::of(&addr.into())),
        Some(addr) => At::One(addr.into()),
    };
    let proto = match port.protocol {
        Transport::Tcp => Proto::TCP,
        Transport::Udp => Proto::UDP,
        Transport::Sctp => Proto::SCTP,
    };
    HostPort::new(at, proto, Port::new(port.host_port), Port::new(port.container_port))
}

/// Says what there is, and what changes, until nobody listens; with an API also posts what is noted.
async fn source(
    config: &config::Agent,
    events: Sender<Event>,
    notes: Receiver<Note>,
    (served, moves): (oneshot::Receiver<()>, latest::Receiver<u64>),
) -> Result<BoxFuture<'static, ()>, AccessError> {
    let node = config.node_name.as_str();
    let Some(dir) = &config.manifests else {
        let access =
            Access { kubeconfig: config.api.kubeconfig.clone(), servers: config.api.api_server.clone() };
        let source = KubeSource::open(access, node, ApiTiming::default()).await?;
        let announcing = source.announce(readiness(&config.api));
        let announcing = async {
            if served.await.is_ok() {
                announcing.await;
            }
        };
        let (posting, reconnecting) = (source.post(notes), source.reconnect(moves));
        return Ok(future::join4(source.run(events), posting, announcing, reconnecting).map(drop).boxed());
    };
    if !dir.is_dir() {
        tracing::warn!(dir = %dir.display(), "no such directory: nothing is served until it is there");
    }
    Ok(FileSource::new(dir, node, Timing::default()).run(events).boxed())
}

fn readiness(api: &config::Api) -> NodeReadiness {
    let network = if api.set_network_available { Network::Ours } else { Network::Others };
    NodeReadiness { startup_taint: api.startup_taint.clone(), network }
}

fn restore(config: &config::Agent) -> Result<Reconciler<KernelMaps>, MapError> {
    let maps = KernelMaps::open(&config.bpffs.maps())?;
    let limits = Limits {
        services: maps.capacity::<crate::maps::Services>()?,
        frontends: maps.capacity::<crate::maps::Frontends>()?,
    };
    let node = config.node_name.as_str().into();
    let plan = plan::Config {
        external_ips: config.external_ips,
        node_ports: config.node_port_addresses.clone(),
        service_ranges: config.service_cidr.clone().into(),
        masquerade: config.masquerade,
        world: match config.masquerades() {
            config::Masquerade::Off => plan::masquerade::World::Known,
            config::Masquerade::On => {
                plan::masquerade::World::Unknown { kept: config.world.non_masquerade_cidrs.clone().into() }
            }
        },
        routing: config.routing,
        live_flows: config.live_flows,
        vni: config.vxlan_vni,
        mode: config.load_balancer_mode,
        ..plan::Config::default()
    };
    let config = reconcile::Config { node, limits, plan, grace: GRACE, clock: clock::seconds };
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
    keeper: Keeper,
    routes: Routes,
    surplus: Surplus,
    /// Pods whose rows and programs are being made, and who waits for it.
    unserved: Vec<(Place, oneshot::Sender<Result<(), Refused>>)>,
    recorder: Recorder,
    metrics: Metrics,
    gauges: Gauges,
    /// Told whenever something was written to the tables.
    changed: Arc<Notify>,
    /// To be told once everything is in the tables.
    ready: Option<oneshot::Sender<()>>,
    /// To be told when this host's addresses are others: connections may be by those of before.
    moved: latest::Sender<u64>,
    /// What was last said where `ferroflow status` finds it; nothing yet.
    said: Option<AgentState>,
    state: AgentState,
    /// Sources that have not yet sent all they have.
    awaited: u32,
}

/// What the routes between nodes are to be, and how far they are.
struct Routes {
    routing: Routing,
    mode: LoadBalancerMode,
    /// Of the tunnel.
    port: u16,
    goals: latest::Sender<Goal>,
    done: latest::Receiver<Laid>,
    /// What the last goal was made from.
    seen: Option<(u64, Surplus)>,
    /// What was said to be without a route.
    problems: BTreeSet<String>,
}

impl Routes {
    /// With the task that makes them.
    fn start(config: &config::Agent) -> Result<(Self, JoinHandle<()>), NetError> {
        let (goals, wanted) = latest::channel(Goal::default());
        let (laid, done) = latest::channel(Laid::default());
        let (table, events) = net::routes::Kernel::open()?;
        let task = tokio::spawn(net::routes::keep(table, wanted, laid, events));
        let (routing, mode, port) = (config.routing, config.load_balancer_mode, config.vxlan_port);
        Ok((Self { routing, mode, port, goals, done, seen: None, problems: BTreeSet::new() }, task))
    }

    /// Says what the routes are to be where what they are made from has changed.
    fn aim(&mut self, world: &World, surplus: Surplus) {
        let seen = Some((world.topology(), surplus));
        if self.seen == seen {
            return;
        }
        self.seen = seen;
        let planned = plan::routes::routes(world, self.routing);
        let absent = plan::node::absent(world);
        let problems = planned.problems.iter().map(ToString::to_string);
        let problems: BTreeSet<_> = problems.chain(absent.iter().map(ToString::to_string)).collect();
        for problem in problems.difference(&self.problems) {
            tracing::warn!("{problem}");
        }
        self.problems = problems;
        let tunnel = has_tunnel(self.routing, self.mode).then(|| TunnelDevice {
            port: self.port,
            devices: plan::node::devices(world).into_iter().collect(),
            overhead: plan::routes::overhead(world),
        });
        self.goals.send_if_modified(|goal| {
            let wanted = Goal { revision: goal.revision, routes: planned.routes, tunnel, surplus };
            let changed = goal.revision == 0 || *goal != wanted;
            if changed {
                *goal = Goal { revision: goal.revision + 1, ..wanted };
            }
            changed
        });
    }

    /// The tunnel's device, once it is there.
    fn tunnel(&self) -> Option<TunnelLink> {
        self.done.borrow().tunnel
    }

    /// The device that packets of this node's pods to those of others go through.
    fn pods_tunnel(&self) -> Option<TunnelLink> {
        self.tunnel().filter(|_| self.routing == Routing::Vxlan)
    }

    /// Each was laid, or refused with a reason in the log.
    fn are_laid(&self) -> bool {
        let wanted = self.goals.borrow().revision;
        wanted > 0 && self.done.borrow().revision == wanted
    }
}

/// Which interfaces carry the pod programs of this agent.
#[derive(Default)]
struct Attachments {
    /// Of this agent or, before it has looked, of the one before.
    attached: BTreeSet<(Interface, u32)>,
    /// Those that this agent has attached to.
    renewed: BTreeSet<(Interface, u32)>,
    retry: Option<Instant>,
    patrol: Patrol,
}

impl Daemon {
    async fn serve(
        mut self,
        mut objects: Receiver<Event>,
        mut routes: Receiver<NetEvent>,
        mut proxies: Receiver<kube_proxy::Found>,
        (mut orders, mut scrapes): (UnboundedReceiver<Order>, Receiver<observe::Asked>),
    ) -> Result<(), DaemonError> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        self.report()?;
        let mut turns = tokio::time::interval(TURN);
        loop {
            let due = [self.reconciler.due(), self.attachments.retry].into_iter().flatten().min();
            tokio::select! {
                _ = terminate.recv() => return Ok(()),
                _ = interrupt.recv() => return Ok(()),
                Some(event) = objects.recv() => self.object(event),
                _ = turns.tick() => {}
                Some(found) = proxies.recv() => self.kube_proxy(&found),
                event = routes.recv() => match event {
                    Some(event) => self.host(event),
                    None => return Err(DaemonError::Routes),
                },
                Some(order) = orders.recv() => self.order(order),
                Ok(()) = self.routes.done.changed() => self.laid(),
                Some(asked) = scrapes.recv() => self.scrape(asked),
                () = sleep_until(due.unwrap_or_else(far_away).into()), if due.is_some() => {}
            }
            // What has queued up meanwhile goes in before anything is written.
            while let Ok(event) = objects.try_recv() {
                self.object(event);
            }
            while let Ok(event) = routes.try_recv() {
                self.host(event);
            }
            while let Ok(order) = orders.try_recv() {
                self.order(order);
            }
            self.tick();
            self.reconciler.take_notes().into_iter().for_each(|note| self.recorder.note(note));
            if self.awaited == 0 {
                self.attach();
                self.routes.aim(self.reconciler.world(), self.surplus);
                self.repair();
            }
            self.tell_served();
            self.answer_checks();
            self.report()?;
        }
    }

    /// Takes in what was laid.
    fn laid(&mut self) {
        // What could not be made this time may be there all the same, as another agent left it.
        if let link @ Some(_) = self.routes.tunnel() {
            self.reconciler.handle(Change::Tunnel(link), Instant::now());
        }
    }

    /// Writes what is due, and measures it.
    fn tick(&mut self) {
        let start = Instant::now();
        let due = self.reconciler.due().is_some_and(|due| due <= start);
        self.reconciler.tick(start);
        if due {
            self.metrics.synced(start.elapsed(), SystemTime::now());
        }
        if self.awaited == 0 && self.reconciler.stats().pending == 0 {
            self.metrics.settled();
        }
        self.metrics.programmed(Instant::now(), |service| self.reconciler.is_programmed(service));
    }

    fn scrape(&self, asked: observe::Asked) {
        let asked = match asked {
            observe::Asked::Everything(asked) => asked,
            // Who asked may have gone.
            observe::Asked::Pods(name, asked) => {
                return drop(asked.send(observe::pods::named(self.reconciler.world(), &name)));
            }
        };
        let source = (self.state.rejected, self.state.away_since);
        match self.gauges.view(&self.reconciler, self.health.answered(), source) {
            // Who asked may have gone.
            Ok(view) => drop(asked.send(view)),
            Err(error) => tracing::warn!(%error, "cannot show metrics"),
        }
    }

    /// What load balancers are told from now on (rules 40 and 41).
    ///
    /// Before every source has listed, what the agent before said of services stays.
    fn answer_checks(&mut self) {
        let world = self.reconciler.world();
        let stay = world.own_node().map(|node| node.stay).unwrap_or_default();
        let checks = health::service::checks(world);
        // What has not been listed yet is not late: an agent that waits for the API is healthy.
        let progress = if self.awaited > 0 || self.is_synced() { Progress::Done } else { Progress::Pending };
        self.health.set_proxy(progress, stay);
        if self.awaited == 0 {
            self.keeper.tell(&checks, self.health.verdict(), clock::seconds());
        }
        for (port, message) in self.keeper.take_news() {
            if let Some(check) = checks.get(&Port::new(port)) {
                let reason = Reason::FailedToStartServiceHealthcheck;
                self.recorder.note_service(&check.service, reason, format!("port {port}: {message}"));
            }
        }
        let problems = self.keeper.problems() + usize::from(self.health.has_problem());
        self.state.health_problems = u32::try_from(problems).unwrap_or(u32::MAX);
    }

    /// Everything that was said is in the tables, or was refused (a conflict stays one however often it is looked at).
    fn is_synced(&self) -> bool {
        let written = self.reconciler.stats().pending == 0 && self.attachments.retry.is_none();
        self.awaited == 0 && written && self.routes.are_laid()
    }

    fn object(&mut self, event: Event) {
        match event {
            Event::Change(change) => {
                self.metrics.changed(&change, SystemTime::now());
                self.reconciler.handle(change, Instant::now());
            }
            Event::Triggered { service, at } => {
                self.metrics.triggered(service, at, (SystemTime::now(), Instant::now()));
            }
            Event::Problems(problems) => {
                self.state.rejected = u32::try_from(problems.len()).unwrap_or(u32::MAX);
                problems.iter().filter_map(refused).for_each(|note| self.recorder.note(note));
                let withheld = watch::withheld(&problems);
                self.surplus = if withheld.nodes() { Surplus::Kept } else { Surplus::Removed };
                self.reconciler.hold(withheld, Instant::now());
            }
            Event::Synced => self.source_synced(),
            Event::Contact(Contact::Lost) => self.state.away_since = clock::seconds().max(1),
            Event::Contact(Contact::Regained) => self.state.away_since = 0,
        }
    }

    fn host(&mut self, event: NetEvent) {
        let change = match event {
            NetEvent::Route(Moved { addr, ifindex }) => Change::LocalRoute(addr, ifindex),
            NetEvent::Address(Moved { addr, ifindex }) => {
                // One that came is a way to who could not be reached.
                if ifindex.is_none() || self.state.away_since != 0 {
                    self.moved.send_modify(|moves| *moves += 1);
                }
                Change::LocalAddress(addr, ifindex)
            }
            NetEvent::Subnet(Moved { addr, ifindex }) => Change::LocalSubnet(addr, ifindex),
            NetEvent::Uplink(Moved { addr: ifindex, ifindex: now }) => {
                Change::Uplink { ifindex, leads: now.is_some() }
            }
            NetEvent::Queue(Moved { addr: ifindex, ifindex: now }) => {
                Change::Queue { ifindex, there: now.is_some() }
            }
            NetEvent::Synced => return self.source_synced(),
        };
        self.reconciler.handle(change, Instant::now());
    }

    /// Beside kube-proxy, or its rules, what the programs do not know is the stack's.
    fn kube_proxy(&mut self, found: &kube_proxy::Found) {
        let state = found.state();
        match (self.reconciler.world().kube_proxy(), state) {
            (_, KubeProxy::Present) => tracing::warn!(
                "kube-proxy is here ({found}): new connections are ours, those that it opened are the kernel's to \
                 finish; stop it, and once they have ended run `ferroflow cleanup`"
            ),
            (KubeProxy::Present, KubeProxy::Absent) => {
                tracing::info!("kube-proxy is gone ({found}): every connection is ours");
            }
            (KubeProxy::Absent, KubeProxy::Absent) if !found.missing.is_empty() => tracing::warn!(
                missing = %found.missing.join(", "),
                "whether kube-proxy has rules here cannot be seen: if it has, connections that it opened may end"
            ),
            (KubeProxy::Absent, KubeProxy::Absent) => tracing::debug!("no kube-proxy ({found})"),
        }
        self.state.kube_proxy = u32::from(state == KubeProxy::Present);
        self.reconciler.handle(Change::KubeProxy(state), Instant::now());
    }

    /// What the CNI server asks. Where nobody waits for an answer any longer there is none.
    fn order(&mut self, order: Order) {
        match order {
            Order::Look(answer) => drop(answer.send(self.view())),
            Order::Serve { place, served } => {
                settle(&mut self.reconciler, &place);
                self.unserved.push((place, served));
            }
            Order::IsServed { place, answer } => drop(answer.send(self.is_served(&place))),
            Order::Withdraw { interface, addresses } => {
                self.reconciler.handle(Change::HostPorts(interface, None), Instant::now());
                for addr in addresses {
                    self.reconciler.handle(Change::Attachment(addr, None), Instant::now());
                    self.reconciler.handle(Change::Tenant(addr, None), Instant::now());
                }
            }
        }
    }

    fn view(&self) -> View {
        let world = self.reconciler.world();
        View {
            readiness: if self.awaited == 0 && self.routes.are_laid() {
                Readiness::Ready
            } else {
                Readiness::Starting
            },
            ranges: world.own_node().map(|node| node.pod_cidrs.to_vec()).unwrap_or_default(),
            reserved: world.local_addresses().keys().chain(world.local_routes()).copied().collect(),
            // Packets that go through the tunnel are the shortest.
            devices: match self.routes.pods_tunnel() {
                Some(tunnel) => vec![tunnel.ifindex],
                None => plan::node::devices(world).into_iter().collect(),
            },
        }
    }

    /// Every address has its row, with the policies of the pod, and the interface its programs; otherwise what is missing.
    fn is_served(&self, place: &Place) -> Result<(), Box<str>> {
        let Place { addresses, ifindex, interface, tenant, host_ports: _ } = place;
        if !self.attachments.renewed.contains(&(Interface::Pod, *ifindex)) {
            return Err(format!("the programs are not at interface {ifindex}").into());
        }
        for addr in addresses {
            if self.reconciler.served_by(*addr) != Some(*ifindex) {
                return Err(format!("the programs do not know {addr} at interface {ifindex}").into());
            }
            if let Some(ipam::Tenant { namespace, name, uid }) = tenant
                && self.reconciler.world().is_strangers(*addr)
            {
                return Err(format!(
                    "there are policies in namespace {namespace}, and the object of pod {name} (uid {uid:?}) that says \
                     whether they select it has not been read"
                )
                .into());
            }
            if !self.reconciler.is_guarded(*addr) {
                return Err(format!("the policies of {addr} are not in the tables").into());
            }
        }
        match self.reconciler.missing_host_ports(interface) {
            None => Ok(()),
            Some(Missing::Waiting) => {
                Err(format!("the hostPorts of {interface} are not in the tables").into())
            }
            Some(Missing::Refused(why)) => Err(why.into()),
        }
    }

    /// Why it will not be served as it was asked.
    fn refusal(&self, place: &Place) -> Option<Refused> {
        match self.reconciler.missing_host_ports(&place.interface) {
            None | Some(Missing::Waiting) => None,
            Some(Missing::Refused(why)) => Some(Refused(why.into())),
        }
    }

    fn tell_served(&mut self) {
        for (place, waiting) in std::mem::take(&mut self.unserved) {
            let answer = match self.refusal(&place) {
                Some(refused) => Err(refused),
                None if self.is_served(&place).is_ok() => Ok(()),
                None => {
                    self.unserved.extend((!waiting.is_closed()).then_some((place, waiting)));
                    continue;
                }
            };
            // Who gave up has undone it.
            let _gone = waiting.send(answer);
        }
    }

    fn source_synced(&mut self) {
        self.awaited = self.awaited.saturating_sub(1);
        if self.awaited == 0 {
            self.reconciler.synced();
        }
    }

    /// Attaches to the interfaces of the local pods and to the node's devices, and lets go of others.
    fn attach(&mut self) {
        let pods = self.reconciler.endpoints().map(|endpoint| (Interface::Pod, endpoint.ifindex()));
        let devices = plan::node::devices(self.reconciler.world());
        let exits = self.reconciler.exits();
        let wanted: BTreeSet<_> = pods
            .chain(devices.union(&exits).map(|ifindex| (Interface::Device, *ifindex)))
            .chain(self.routes.tunnel().map(|tunnel| (Interface::Tunnel, tunnel.ifindex)))
            .collect();
        let Attachments { attached, renewed, retry, patrol: _ } = &mut self.attachments;
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

    /// Makes again what somebody removed.
    fn repair(&mut self) {
        let Attachments { renewed, patrol, .. } = &mut self.attachments;
        let interfaces = renewed.iter().copied();
        let laid = *self.routes.done.borrow();
        for what in patrol.walk(&mut self.datapath, interfaces, laid, Instant::now()) {
            tracing::warn!("{what}: somebody removed it");
            let node = self.reconciler.world().own_name();
            self.recorder.note_node(node, Reason::DatapathRepaired, format!("{what}: somebody removed it"));
        }
    }

    /// Says how things are, where `ferroflow status` finds it; written only when it changed.
    fn report(&mut self) -> Result<(), MapError> {
        let stats = self.reconciler.stats();
        let synced = self.is_synced();
        if synced && let Some(ready) = self.ready.take() {
            // With a directory there is nobody to tell.
            let _nobody = ready.send(());
        }
        if self.state.writes != stats.writes {
            self.changed.notify_one();
        }
        self.state.synced = u32::from(synced);
        self.state.writes = stats.writes;
        self.state.retries = stats.failures;
        if self.said == Some(self.state) {
            return Ok(());
        }
        let was_synced = self.said.is_some_and(|said| said.synced != 0);
        if synced && !was_synced {
            heap::give_back();
        }
        self.reconciler.maps_mut().set_agent_state(self.state)?;
        if synced && !was_synced {
            let reconcile::Stats { services, frontends, backends, endpoints, writes, .. } = stats;
            tracing::info!(services, frontends, backends, endpoints, writes, "in sync");
        }
        self.said = Some(self.state);
        Ok(())
    }
}

/// For the users of an object that is refused.
fn refused(problem: &watch::Problem) -> Option<Note> {
    let object = problem.object.clone()?;
    Some(Note { object, reason: Reason::InvalidObject, message: problem.message.clone() })
}

fn first_words(config: &config::Agent) -> AgentState {
    AgentState {
        pid: std::process::id(),
        synced: 0,
        started: u64::from(clock::seconds()),
        writes: 0,
        retries: 0,
        rejected: 0,
        kube_proxy: 0,
        health_problems: 0,
        away_since: 0,
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
    Access(#[from] AccessError),
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    #[error(transparent)]
    Map(#[from] MapError),
    #[error(transparent)]
    Net(#[from] NetError),
    #[error(
        "--pod-device netkit: this kernel has none (it takes Linux 6.7 or newer, with CONFIG_NETKIT): say --pod-device veth, \
         or auto where nodes differ (chart: cni.podDevice)"
    )]
    NoNetkit,
    #[error(transparent)]
    Device(#[from] PodError),
    #[error("cannot serve the CNI plugin: {0}")]
    Cni(#[from] StartError),
    #[error("the watch of the kernel's routes and addresses ended")]
    Routes,
    #[error("cannot read the programs' log: {0}")]
    Log(#[from] aya_log::Error),
    #[error(transparent)]
    Io(#[from] std::io::Error),
}
