//! A network namespace without a name, held by a thread that lives in it.
//!
//! A namespace belongs to a thread, so everything done inside one is a job for its thread: netlink requests, files
//! below `/proc/sys/net`, and starting processes, which inherit it.

use std::{
    fs::{self, File},
    future::Future,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd as _, RawFd},
    path::PathBuf,
    process::{self, Child, Command},
    sync::mpsc,
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use futures_util::TryStreamExt as _;
use nix::{
    net::if_::{Interfaces, if_nameindex, if_nametoindex},
    sched::{CloneFlags, unshare},
    unistd::gettid,
};
use rtnetlink::{
    Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, LinkVxlan, RouteMessageBuilder,
    packet_route::{
        link::{InfoData, InfoVeth},
        route::{RouteAttribute, RouteMessage, RouteMetric, RouteProtocol, RouteScope, RouteType},
    },
};
use tokio::runtime::Runtime;

use crate::patience::stretched;

/// Its thread ends, and the namespace with it, when this is dropped.
#[derive(Debug)]
pub struct Netns {
    name: String,
    file: File,
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

/// What a job gets: netlink in the namespace.
#[derive(Debug)]
pub struct Inside {
    runtime: Runtime,
    netlink: Handle,
}

pub type Mac = [u8; 6];

/// One end of a veth pair.
#[derive(Clone, Debug)]
pub struct End {
    pub name: String,
    pub mac: Mac,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    pub addr: IpAddr,
    pub len: u8,
}

/// A tunnel of the kernel's own to one other node.
#[derive(Clone, Debug)]
pub struct Tunnel {
    pub name: String,
    pub mac: Mac,
    pub vni: u32,
    pub port: u16,
    pub local: Ipv4Addr,
    pub remote: Ipv4Addr,
    /// Of the packets inside.
    pub mtu: u32,
}

#[derive(Clone, Copy, Debug)]
pub struct Route<'a> {
    pub to: Prefix,
    pub via: Option<IpAddr>,
    pub dev: &'a str,
}

impl Route<'_> {
    fn message(&self) -> Result<RouteMessage> {
        let (len, out) = (self.to.len, index(self.dev)?);
        let message = match (self.to.addr, self.via) {
            (IpAddr::V4(to), via) => {
                let to =
                    RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(to, len).output_interface(out);
                match via {
                    Some(IpAddr::V4(via)) => to.gateway(via).onlink().build(),
                    _ => to.scope(RouteScope::Link).build(),
                }
            }
            (IpAddr::V6(to), via) => {
                let to =
                    RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(to, len).output_interface(out);
                match via {
                    Some(IpAddr::V6(via)) => to.gateway(via).build(),
                    _ => to.build(),
                }
            }
        };
        Ok(message)
    }
}

type Job = Box<dyn FnOnce(&Inside) + Send>;

impl Netns {
    /// A namespace with `lo` up, addresses usable at once, and no reverse path filter.
    pub fn new(name: &str) -> Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let (ready, opened) = mpsc::channel();
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || match enter_new() {
            Ok((file, inside)) => {
                let _caller_gone = ready.send(Ok(file));
                queue.into_iter().for_each(|job| job(&inside));
            }
            Err(error) => {
                let _caller_gone = ready.send(Err(error));
            }
        })?;
        let file = opened.recv()?.with_context(|| format!("make the network namespace of {name}"))?;
        Ok(Self { name: name.to_owned(), file, jobs: Some(jobs), thread: Some(thread) })
    }

    pub fn run<T: Send + 'static>(&self, job: impl FnOnce(&Inside) -> T + Send + 'static) -> Result<T> {
        let (done, result) = mpsc::channel();
        let job: Job = Box::new(move |inside| {
            let _caller_gone = done.send(job(inside));
        });
        self.jobs
            .as_ref()
            .and_then(|jobs| jobs.send(job).ok())
            .ok_or_else(|| anyhow!("the thread of {} has ended", self.name))?;
        result.recv().with_context(|| format!("a job in {} panicked", self.name))
    }

    /// The process inherits the namespace, and this thread as the parent whose end its PDEATHSIG announces.
    pub fn spawn(&self, mut command: Command) -> Result<Child> {
        let what = format!("start {} in {}", command.get_program().display(), self.name);
        self.run(move |_| command.spawn())?.context(what)
    }

    /// By which other processes find the namespace, as long as this is not dropped.
    pub fn path(&self) -> Result<PathBuf> {
        let thread = self.run(|_| gettid())?;
        Ok(format!("/proc/{}/task/{thread}/ns/net", process::id()).into())
    }

    /// The interfaces in it.
    pub fn interfaces(&self) -> Result<Vec<String>> {
        let listed = self.run(|_| if_nameindex().map(|all| names(&all)))?;
        listed.with_context(|| format!("list the interfaces in {}", self.name))
    }

    /// Of a file below `/proc/net`, as the namespace sees it.
    pub fn proc_net(&self, name: &str) -> Result<String> {
        let path = format!("/proc/thread-self/net/{name}");
        self.run(move |_| fs::read_to_string(path))?.with_context(|| format!("read {name} in {}", self.name))
    }

    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        let (name, value) = (name.to_owned(), value.to_owned());
        self.run(move |_| sysctl(&name, &value))?
    }

    /// Valid as long as this is not dropped.
    fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Makes a veth pair: one end here, the other in `peer`; both are up.
    pub fn veth(&self, here: &End, peer: &Self, there: &End) -> Result<()> {
        let (here, far, fd) = (here.clone(), there.clone(), peer.fd());
        self.run(move |inside| inside.veth(&here, &far, fd))?
            .with_context(|| format!("make the veth between {} and {}", self.name, peer.name))?;
        let name = there.name.clone();
        peer.run(move |inside| inside.up(&name))?
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

impl Inside {
    /// Of the calling thread's namespace.
    pub fn here() -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let netlink = {
            let _in_runtime = runtime.enter();
            let (connection, netlink, _notices) = rtnetlink::new_connection().context("open netlink")?;
            runtime.spawn(connection);
            netlink
        };
        Ok(Self { runtime, netlink })
    }

    pub fn up(&self, dev: &str) -> Result<()> {
        let message = LinkUnspec::new_with_index(index(dev)?).up().build();
        self.request(self.netlink.link().set(message).execute()).with_context(|| format!("set {dev} up"))
    }

    pub fn down(&self, dev: &str) -> Result<()> {
        let message = LinkUnspec::new_with_index(index(dev)?).down().build();
        self.request(self.netlink.link().set(message).execute()).with_context(|| format!("set {dev} down"))
    }

    /// An interface, with all that leads by it.
    pub fn remove(&self, dev: &str) -> Result<()> {
        self.request(self.netlink.link().del(index(dev)?).execute()).with_context(|| format!("remove {dev}"))
    }

    /// A bridge that is up.
    pub fn bridge(&self, name: &str) -> Result<()> {
        let message = LinkBridge::new(name).build();
        self.request(self.netlink.link().add(message).execute()).with_context(|| format!("add bridge {name}"))
    }

    /// A VXLAN device that is up.
    pub fn vxlan(&self, tunnel: &Tunnel) -> Result<()> {
        let message = LinkMessageBuilder::<LinkVxlan>::new(&tunnel.name)
            .id(tunnel.vni)
            .port(tunnel.port)
            .local(tunnel.local)
            .remote(tunnel.remote)
            .learning(false)
            .address(tunnel.mac.to_vec())
            .mtu(tunnel.mtu)
            .up()
            .build();
        self.request(self.netlink.link().add(message).execute()).with_context(|| format!("add {tunnel:?}"))
    }

    pub fn mtu(&self, dev: &str, mtu: u32) -> Result<()> {
        let message = LinkUnspec::new_with_index(index(dev)?).mtu(mtu).build();
        self.request(self.netlink.link().set(message).execute())
            .with_context(|| format!("set the MTU of {dev}"))
    }

    pub fn enslave(&self, dev: &str, bridge: &str) -> Result<()> {
        let message = LinkUnspec::new_with_index(index(dev)?).controller(index(bridge)?).build();
        self.request(self.netlink.link().set(message).execute())
            .with_context(|| format!("put {dev} on bridge {bridge}"))
    }

    pub fn address(&self, dev: &str, prefix: Prefix) -> Result<()> {
        let request = self.netlink.address().add(index(dev)?, prefix.addr, prefix.len);
        self.request(request.execute()).with_context(|| format!("add {} to {dev}", prefix.addr))
    }

    /// Takes an address from whichever interface has it.
    pub fn take_address(&self, addr: IpAddr) -> Result<()> {
        let mut found = Box::pin(self.netlink.address().get().set_address_filter(addr).execute());
        let message = self.request(found.try_next())?.with_context(|| format!("no interface has {addr}"))?;
        self.request(self.netlink.address().del(message).execute()).with_context(|| format!("take {addr}"))
    }

    pub fn route(&self, route: Route<'_>) -> Result<()> {
        let message = route.message()?;
        self.request(self.netlink.route().add(message).execute()).with_context(|| format!("add {route:?}"))
    }

    /// Whichever leads to exactly this range.
    pub fn remove_route(&self, to: Prefix) -> Result<()> {
        let mut any = match to.addr {
            IpAddr::V4(ip) => RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(ip, to.len).build(),
            IpAddr::V6(ip) => RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(ip, to.len).build(),
        };
        any.header.protocol = RouteProtocol::Unspec;
        any.header.scope = RouteScope::NoWhere;
        any.header.kind = RouteType::Unspec;
        self.request(self.netlink.route().del(any).execute()).with_context(|| format!("remove {to:?}"))
    }

    /// In place of the one that is there, for packets of no more than `mtu` bytes where that is said.
    pub fn replace_route(&self, route: Route<'_>, mtu: Option<u32>) -> Result<()> {
        let mut message = route.message()?;
        // Locked, or a router would not hold what it forwards to it.
        let metrics = mtu.map(|mtu| vec![RouteMetric::Lock(1 << RTAX_MTU), RouteMetric::Mtu(mtu)]);
        message.attributes.extend(metrics.map(RouteAttribute::Metrics));
        self.request(self.netlink.route().add(message).replace().execute())
            .with_context(|| format!("replace {route:?}"))
    }

    /// The longest packet for this destination as far as is known; `None` where that is the device's alone.
    pub fn path_mtu(&self, to: IpAddr) -> Result<Option<u32>> {
        let query = match to {
            IpAddr::V4(to) => RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(to, 32).build(),
            IpAddr::V6(to) => RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(to, 128).build(),
        };
        let mut answers = Box::pin(self.netlink.route().get(query).execute());
        let found = self.request(answers.try_next()).with_context(|| format!("find the route to {to}"))?;
        let metrics = found.into_iter().flat_map(|route| route.attributes).filter_map(|attribute| {
            if let RouteAttribute::Metrics(metrics) = attribute { Some(metrics) } else { None }
        });
        let mtu = metrics
            .flatten()
            .find_map(|metric| if let RouteMetric::Mtu(mtu) = metric { Some(mtu) } else { None });
        Ok(mtu)
    }

    /// A permanent entry.
    pub fn neighbour(&self, dev: &str, addr: IpAddr, mac: Mac) -> Result<()> {
        let request = self.netlink.neighbours().add(index(dev)?, addr).link_layer_address(&mac);
        self.request(request.execute()).with_context(|| format!("add neighbour {addr} on {dev}"))
    }

    fn veth(&self, here: &End, there: &End, netns: RawFd) -> Result<()> {
        let peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(there.name.as_str())
            .address(there.mac.to_vec())
            .setns_by_fd(netns)
            .build();
        let message = LinkVeth::new(&here.name, &there.name)
            .address(here.mac.to_vec())
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .up()
            .build();
        self.request(self.netlink.link().add(message).execute())
    }

    fn request<T>(&self, request: impl Future<Output = Result<T, rtnetlink::Error>>) -> Result<T> {
        let bounded = async { tokio::time::timeout(stretched(Duration::from_secs(5)), request).await };
        Ok(self.runtime.block_on(bounded).context("no answer from netlink")??)
    }
}

/// The number of the metric, by which it is locked (`linux/rtnetlink.h`).
const RTAX_MTU: u32 = 2;

fn enter_new() -> Result<(File, Inside)> {
    unshare(CloneFlags::CLONE_NEWNET).context("unshare the network namespace")?;
    for (name, value) in [
        // Interfaces made later inherit `default`; duplicate address detection asks for both to be off.
        ("ipv6/conf/all/disable_ipv6", "0"),
        ("ipv6/conf/default/disable_ipv6", "0"),
        ("ipv6/conf/all/accept_dad", "0"),
        ("ipv6/conf/default/accept_dad", "0"),
        ("ipv6/conf/default/accept_ra", "0"),
        ("ipv4/conf/all/rp_filter", "0"),
        ("ipv4/conf/default/rp_filter", "0"),
    ] {
        sysctl(name, value)?;
    }
    let inside = Inside::here()?;
    inside.up("lo")?;
    let file = File::open("/proc/thread-self/ns/net").context("open the network namespace")?;
    Ok((file, inside))
}

fn names(interfaces: &Interfaces) -> Vec<String> {
    interfaces.iter().map(|it| it.name().to_string_lossy().into_owned()).collect()
}

fn sysctl(name: &str, value: &str) -> Result<()> {
    fs::write(format!("/proc/sys/net/{name}"), value).with_context(|| format!("set net/{name} to {value}"))
}

fn index(dev: &str) -> Result<u32> {
    if_nametoindex(dev).with_context(|| format!("no interface {dev}"))
}
