//! The commands. An attachment is made in steps, each of which can be undone or, after a crash, found:
//!
//! | step | what is left if the agent dies behind it | who finds it |
//! | --- | --- | --- |
//! | the lease is on disk | a lease without an interface | the next agent, at its start |
//! | the link is made | an interface with a lease | DEL, or the end of the pod's namespace and then the sweep |
//! | the pod is served | the same, with rows and programs | the same; the reconciler removes the rest |

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ferroflow_common::addr::Addr;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::{Semaphore, oneshot};

use super::busy::Busy;
use super::die::{self, Step};
use super::order::{Order, Place, Readiness, Refused, View};
use crate::cni::protocol::{Addresses, Attached, Attachment, Removal};
use crate::cni::spool;
use crate::cni::types::{CniError, Code};
use crate::ipam::host_port::HostPort;
use crate::ipam::ledger::{Ledger, LedgerError};
use crate::ipam::pool::Pool;
use crate::ipam::{IpamError, Lease, Owner, Space};
use crate::model::Family;
use crate::net::pod::{Kind, Mtu, Netlink, PodError, PodLink, Wired, host_interface};

#[derive(Debug)]
pub(super) struct Attachments {
    state_dir: PathBuf,
    device: Kind,
    /// Why there is none where it cannot be read: then nothing may be given.
    ledger: Result<Ledger, LedgerError>,
    netlink: Arc<dyn Netlink>,
    daemon: UnboundedSender<Order>,
    busy: Busy,
    /// The kernel changes links one after the other; more threads would only wait.
    links: Semaphore,
}

const LINKS_AT_ONCE: usize = 4;

/// How long a new pod waits for its rows, its policies and its programs: a change takes milliseconds, a failed attachment
/// is tried again each second, and the API tells of a pod before it tells the runtime to start it.
const SERVE_LIMIT: Duration = Duration::from_secs(15);

type Result<T, E = CniError> = std::result::Result<T, E>;

impl Attachments {
    pub(super) fn new(
        state_dir: PathBuf,
        ledger: Result<Ledger, LedgerError>,
        netlink: Arc<dyn Netlink>,
        daemon: UnboundedSender<Order>,
    ) -> Self {
        let links = Semaphore::new(LINKS_AT_ONCE);
        Self { state_dir, device: Kind::Veth, ledger, netlink, daemon, busy: Busy::default(), links }
    }

    /// What new pods get.
    #[must_use]
    pub(super) fn device(self, device: Kind) -> Self {
        Self { device, ..self }
    }

    /// Rule 54: what the pod may send and get is decided when this returns.
    pub(super) async fn add(&self, attachment: &Attachment) -> Result<Attached> {
        let owner = &attachment.owner;
        let start = Instant::now();
        let Some(_claim) = self.busy.claim(owner) else {
            return Err(CniError::new(Code::TRY_AGAIN_LATER, "another command for this attachment runs"));
        };
        let ledger = self.ledger()?;
        let view = self.view().await?;
        if view.readiness == Readiness::Starting {
            return Err(CniError::new(Code::TRY_AGAIN_LATER, "the agent has not read all objects yet"));
        }
        self.remove_spooled(owner).await?;
        die::behind(Step::Requested);
        if ledger.look(|pool| pool.lease(owner).is_some()) && self.interfaces().await?.contains(owner) {
            return Err(exists(&attachment.owner.ifname, "this attachment was added before"));
        }
        let space = Space { ranges: &view.ranges, reserved: &view.reserved };
        let taken = |pool: &Pool| pool.taken(owner, &attachment.host_ports).is_some();
        if ledger.look(taken) {
            // Of a pod that is gone, perhaps.
            self.sweep().await;
        }
        let lease = ledger.change(|pool| lease(pool, attachment, space)).await;
        let lease = match lease {
            Ok(lease) => lease?,
            // What is not on disk was not given.
            Err(error) => return Err(self.undo(owner, unwritten(&error)).await),
        };
        die::behind(Step::Leased);
        tracing::debug!(container = %owner.container_id, took = ?start.elapsed(), addresses = ?lease.addresses, "leased");
        match self.connect(attachment, &lease, view.devices).await {
            Ok(attached) => Ok(attached),
            Err(error) => Err(self.undo(owner, error).await),
        }
    }

    /// Rule 56: what is not there is gone.
    pub(super) async fn del(&self, owner: &Owner) -> Result<()> {
        let _claim = self.busy.wait(owner).await;
        self.remove(owner).await
    }

    /// Rule 57.
    pub(super) async fn check(&self, attachment: &Attachment, addresses: &[std::net::IpAddr]) -> Result<()> {
        let owner = &attachment.owner;
        let Some(lease) = self.ledger()?.look(|pool| pool.lease(owner).cloned()) else {
            let msg = format!("container {} has no interface {} here", owner.container_id, owner.ifname);
            return Err(CniError::new(Code::UNKNOWN_CONTAINER, msg));
        };
        if let Some(addr) = lease.addresses.iter().find(|addr| !addresses.contains(addr)) {
            let msg = format!("{} has {addr}, and prevResult does not say so", owner.ifname);
            return Err(CniError::new(Code::DIFFERENT, msg));
        }
        if lease.host_ports != attachment.host_ports {
            let said =
                |ports: &[HostPort]| ports.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            let (has, asked) = (said(&lease.host_ports), said(&attachment.host_ports));
            let msg = format!("{} has the ports of the host [{has}], not [{asked}]", owner.ifname);
            return Err(CniError::new(Code::DIFFERENT, msg));
        }
        let link = link(attachment, &lease, Mtu::Of(Vec::new()));
        let wired =
            self.with_netlink(move |netlink| netlink.check(&link)).await.map_err(|error| wiring(&error))?;
        let place = place(owner, &lease, wired.ifindex);
        self.ask(|answer| Order::IsServed { place, answer }).await?.map_err(|missing| {
            let msg = format!("{} is not served: {missing}", owner.ifname);
            CniError::new(Code::DIFFERENT, msg).details("see the log of the agent")
        })
    }

    /// Rule 59: goes on where one cannot be removed, and says so at the end.
    pub(super) async fn gc(&self, network: &str, valid: &[Owner]) -> Result<()> {
        let stale = |(owner, lease): (&Owner, &Lease)| {
            (&*lease.network == network && !valid.contains(owner)).then(|| owner.clone())
        };
        let stale: Vec<_> = self.ledger()?.look(|pool| pool.leases().filter_map(stale).collect());
        let mut first = Ok(());
        for owner in stale {
            // Who is being attached is valid, whatever the list says.
            let Some(_claim) = self.busy.claim(&owner) else { continue };
            tracing::info!(container = %owner.container_id, ifname = %owner.ifname, "collecting");
            first = first.and(self.remove(&owner).await);
        }
        first
    }

    /// Rule 58: whether ADD would do.
    pub(super) async fn status(&self, addresses: Addresses) -> Result<()> {
        let unavailable = |error: CniError| CniError { code: Code::NOT_AVAILABLE, ..error };
        let ledger = self.ledger().map_err(unavailable)?;
        let view = self.view().await.map_err(unavailable)?;
        if view.readiness == Readiness::Starting {
            return Err(CniError::new(Code::NOT_AVAILABLE, "the agent has not read all objects yet"));
        }
        if addresses == Addresses::Given {
            return Ok(());
        }
        let space = Space { ranges: &view.ranges, reserved: &view.reserved };
        let room = ledger.look(|pool| pool.room(space));
        room.map_err(|error| no_address(&error, Code::NOT_AVAILABLE))
    }

    /// At the start: frees what is gone, and says what is there. Does what the spool has before anything is added.
    pub(super) async fn take_over(&self) -> Result<Vec<Place>, PodError> {
        self.replay().await;
        self.sweep().await;
        let Ok(ledger) = &self.ledger else { return Ok(Vec::new()) };
        let interfaces = self.with_netlink(|netlink| netlink.interfaces()).await?;
        let leases: Vec<_> =
            ledger.look(|pool| pool.leases().map(|(owner, lease)| (owner.clone(), lease.clone())).collect());
        let behind = leases
            .iter()
            .filter_map(|(owner, lease)| Some(place(owner, lease, *interfaces.get(&host_interface(owner))?)));
        Ok(behind.collect())
    }

    /// Does what was left while there was no agent.
    pub(super) async fn replay(&self) {
        let removals = match spool::list(&self.state_dir) {
            Ok(removals) => removals,
            Err(error) => return tracing::warn!(%error, "cannot read the spool"),
        };
        for Removal { owner } in removals {
            let _claim = self.busy.wait(&owner).await;
            if let Err(error) = self.remove_spooled(&owner).await {
                tracing::warn!(container = %owner.container_id, %error, "a removal stays in the spool");
            }
        }
    }

    /// Frees leases whose interface is gone: the pod's namespace was removed, or the machine started anew.
    pub(super) async fn sweep(&self) {
        let Ok(ledger) = &self.ledger else { return };
        let owners: Vec<_> = ledger.look(|pool| pool.leases().map(|(owner, _)| owner.clone()).collect());
        let Ok(interfaces) = self.interfaces().await else { return };
        for owner in owners.into_iter().filter(|owner| !interfaces.contains(owner)) {
            let Some(_claim) = self.busy.claim(&owner) else { continue };
            // It may have been added again since the list was made.
            if self.interfaces().await.is_ok_and(|now| !now.contains(&owner)) {
                tracing::info!(container = %owner.container_id, ifname = %owner.ifname, "its pod is gone: freed");
                if let Err(error) = self.remove(&owner).await {
                    tracing::warn!(container = %owner.container_id, %error, "cannot free a lease");
                }
            }
        }
    }

    /// Makes routes to pods again that somebody removed. The daemon took a pod without one to be gone, and is told.
    pub(super) async fn mend(&self) {
        let Ok(ledger) = &self.ledger else { return };
        let made = |(owner, lease): (&Owner, &Lease)| {
            let link = PodLink::new(owner, PathBuf::new(), lease.addresses.clone(), Mtu::Of(Vec::new()));
            ((owner.clone(), lease.clone()), link)
        };
        let (leases, links): (Vec<_>, Vec<_>) = ledger.look(|pool| pool.leases().map(made).unzip());
        let all = links.clone();
        let Ok(astray) = self.with_netlink(move |netlink| netlink.astray(&all)).await else { return };
        for ((owner, lease), link) in leases.iter().zip(links) {
            let Some(&ifindex) = astray.get(&link.host.name) else { continue };
            // Who is being attached or removed has no route yet, or no longer.
            let Some(_claim) = self.busy.claim(owner) else { continue };
            let (name, place) = (link.host.name.clone(), place(owner, lease, ifindex));
            let mended = self.with_netlink(move |netlink| {
                // It may have been attached since.
                let astray = netlink.astray(std::slice::from_ref(&link))?;
                let still = astray.get(&link.host.name) == Some(&ifindex);
                if still { netlink.mend(&link, ifindex).map(|()| true) } else { Ok(false) }
            });
            match mended.await {
                Ok(false) => {}
                Ok(true) => {
                    tracing::warn!(interface = %name, "routes to its pod: made again: somebody removed it");
                    // Nobody waits until it is served.
                    let _told = self.order(Order::Serve { place, served: oneshot::channel().0 });
                }
                Err(error) => {
                    tracing::warn!(interface = %name, %error, "cannot make the routes to its pod again")
                }
            }
        }
    }

    /// Makes the link, and waits until the pod is served by it.
    async fn connect(&self, attachment: &Attachment, lease: &Lease, devices: Vec<u32>) -> Result<Attached> {
        let mtu = attachment.mtu.map_or(Mtu::Of(devices), Mtu::Fixed);
        let link = link(attachment, lease, mtu).kind(self.device);
        let (host, mac) = (link.host.clone(), link.pod.mac);
        let families: Vec<_> = lease.addresses.iter().map(|addr| Family::of(&Addr::from(*addr))).collect();
        let wired = self.with_netlink(move |netlink| {
            netlink.forward(&families)?;
            netlink.attach(&link)
        });
        let start = Instant::now();
        let Wired { ifindex, mtu } = wired.await.map_err(|error| wiring(&error))?;
        die::behind(Step::Wired);
        tracing::debug!(interface = %host.name, took = ?start.elapsed(), "wired");
        let start = Instant::now();
        self.serve(place(&attachment.owner, lease, ifindex)).await?;
        die::behind(Step::Served);
        tracing::debug!(interface = %host.name, took = ?start.elapsed(), "served");
        Ok(Attached {
            host_interface: host.name,
            host_mac: host.mac.to_string().into(),
            mac: mac.to_string().into(),
            mtu,
            addresses: lease.addresses.clone(),
        })
    }

    /// Waits for rows, policies and programs.
    async fn serve(&self, place: Place) -> Result<()> {
        let asked = place.clone();
        let serving = self.ask(|served| Order::Serve { place, served });
        if let Ok(served) = tokio::time::timeout(SERVE_LIMIT, serving).await {
            return served?.map_err(|Refused(why)| CniError::new(Code::PORT_TAKEN, why));
        }
        let missing = self.ask(|answer| Order::IsServed { place: asked, answer }).await?;
        missing.map_err(|missing| {
            let msg = format!("the pod is not served after {SERVE_LIMIT:?}: {missing}");
            CniError::new(Code::TRY_AGAIN_LATER, msg).details("see the log of the agent")
        })
    }

    /// The error, with what could not be undone.
    async fn undo(&self, owner: &Owner, error: CniError) -> CniError {
        match self.remove(owner).await {
            Ok(()) => error,
            Err(left) => {
                let details = format!("{} (and undoing it: {left})", error.details);
                error.details(details)
            }
        }
    }

    /// In this order an address is free when nothing of its last owner is left.
    async fn remove(&self, owner: &Owner) -> Result<()> {
        let host = host_interface(owner);
        self.with_netlink(move |netlink| netlink.detach(&host)).await.map_err(|error| wiring(&error))?;
        die::behind(Step::Detached);
        let ledger = self.ledger()?;
        if let Some(lease) = ledger.look(|pool| pool.lease(owner).cloned()) {
            let addresses = lease.addresses.into_iter().map(Addr::from).collect();
            self.order(Order::Withdraw { interface: host_interface(owner), addresses })?;
            ledger.change(|pool| pool.release(owner)).await.map_err(|error| unwritten(&error))?;
        }
        die::behind(Step::Released);
        Ok(())
    }

    /// A removal in the spool is older than any command that comes now.
    async fn remove_spooled(&self, owner: &Owner) -> Result<()> {
        let removal = Removal { owner: owner.clone() };
        if spool::has(&self.state_dir, &removal) {
            self.remove(owner).await?;
            let done = spool::done(&self.state_dir, &removal);
            done.map_err(|error| CniError::new(Code::IO, format!("cannot empty the spool: {error}")))?;
        }
        Ok(())
    }

    fn ledger(&self) -> Result<&Ledger> {
        self.ledger.as_ref().map_err(unwritten)
    }

    async fn view(&self) -> Result<View> {
        self.ask(Order::Look).await
    }

    fn order(&self, order: Order) -> Result<()> {
        self.daemon.send(order).map_err(|_closed| stopping())
    }

    async fn ask<T>(&self, order: impl FnOnce(oneshot::Sender<T>) -> Order) -> Result<T> {
        let (sender, answer) = oneshot::channel();
        self.order(order(sender))?;
        answer.await.map_err(|_closed| stopping())
    }

    async fn interfaces(&self) -> Result<Interfaces> {
        let found = self.with_netlink(|netlink| netlink.interfaces()).await;
        Ok(Interfaces(found.map_err(|error| wiring(&error))?.into_keys().collect()))
    }

    async fn with_netlink<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn Netlink) -> Result<T, PodError> + Send + 'static,
    ) -> Result<T, PodError> {
        // It is never closed.
        let _turn = self.links.acquire().await;
        let netlink = self.netlink.clone();
        match tokio::task::spawn_blocking(move || work(&*netlink)).await {
            Ok(result) => result,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
}

/// The names of the host's interfaces.
struct Interfaces(std::collections::BTreeSet<Box<str>>);

impl Interfaces {
    fn contains(&self, owner: &Owner) -> bool {
        self.0.contains(&host_interface(owner))
    }
}

fn link(attachment: &Attachment, lease: &Lease, mtu: Mtu) -> PodLink {
    PodLink::new(&attachment.owner, attachment.netns.clone(), lease.addresses.clone(), mtu)
        .limits(attachment.limits)
}

/// What an attachment is given.
fn lease(pool: &mut Pool, attachment: &Attachment, space: Space<'_>) -> Result<Lease> {
    let Attachment { owner, network, given, tenant, host_ports, .. } = attachment;
    if let Some((port, other)) = pool.taken(owner, host_ports) {
        let msg = format!("{port} is taken: it leads to container {} of this node", other.container_id);
        return Err(CniError::new(Code::PORT_TAKEN, msg)
            .details("remove that one, or choose another hostPort or hostIP"));
    }
    let lease = match given {
        None => pool.allocate(owner, network, space).map_err(|error| no_address(&error, Code::EXHAUSTED))?,
        Some(addresses) => {
            pool.adopt(owner, network, addresses).map_err(|error| no_address(&error, Code::IPAM))?
        }
    };
    if let Some(port) = host_ports.iter().find(|port| !port.serves(&lease.addresses)) {
        pool.release(owner);
        let msg = format!("runtimeConfig.portMappings: {port}: the pod has no address of this family");
        return Err(CniError::new(Code::INVALID_CONFIG, msg));
    }
    let lease = pool.let_to(owner, tenant.clone(), host_ports.clone()).cloned().unwrap_or(lease);
    Ok(lease)
}

fn place(owner: &Owner, lease: &Lease, ifindex: u32) -> Place {
    let addresses = lease.addresses.iter().copied().map(Addr::from).collect();
    let Lease { tenant, host_ports, .. } = lease.clone();
    Place { addresses, ifindex, interface: host_interface(owner), tenant, host_ports }
}

fn exists(ifname: &str, why: &str) -> CniError {
    CniError::new(Code::INVALID_ENVIRONMENT, format!("CNI_IFNAME {ifname} exists already: {why}"))
}

fn wiring(error: &PodError) -> CniError {
    match error {
        PodError::NoNetns { .. } => CniError::new(Code::UNKNOWN_CONTAINER, format!("CNI_NETNS: {error}")),
        PodError::HostNetns { .. } => CniError::new(Code::INVALID_ENVIRONMENT, format!("CNI_NETNS: {error}")),
        PodError::Exists { name, netns } => exists(name, &netns.display().to_string()),
        PodError::Kernel { .. } => CniError::new(Code::WIRING, error.to_string()),
        PodError::Different(_) => CniError::new(Code::DIFFERENT, error.to_string()),
    }
}

fn no_address(error: &IpamError, code: Code) -> CniError {
    CniError::new(code, error.to_string())
}

fn unwritten(error: &LedgerError) -> CniError {
    CniError::new(Code::IO, error.to_string())
}

fn stopping() -> CniError {
    CniError::new(Code::TRY_AGAIN_LATER, "the agent is stopping")
}
