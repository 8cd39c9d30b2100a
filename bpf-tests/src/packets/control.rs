//! The agent's stages from an object to the tables, one object after the other.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use ferroflow::clock;
use ferroflow::maps::Maps;
use ferroflow::model::{Change, Kind, Name, ObjectId, Prefix};
use ferroflow::plan::masquerade::World;
use ferroflow::plan::{self, ExternalIps};
use ferroflow::reconcile::{Config, Limits, Reconciler};
use ferroflow::watch::{cluster_policy, convert, policy};
use serde_json::Value;

use super::cluster::{Configuration, KEPT, NODE};

/// Over any tables.
#[derive(Debug)]
pub struct Control<M> {
    reconciler: Reconciler<M>,
    interfaces: Interfaces,
    /// Which interface each address was said to be at.
    told: BTreeMap<IpAddr, u32>,
    now: Instant,
}

/// The node's interfaces: what an agent learns from the kernel.
#[derive(Clone, Debug)]
pub struct Interfaces {
    /// Carries the node's addresses.
    pub device: u32,
    /// Of pods, by name.
    pub pods: BTreeMap<String, u32>,
}

impl Interfaces {
    /// Numbers that need not exist, for tables without a kernel.
    pub fn imagined() -> Self {
        Self { device: 2, pods: ["p0", "p1", "p2"].iter().map(|it| (*it).to_owned()).zip(11..).collect() }
    }
}

impl<M: Maps> Control<M> {
    /// # Errors
    /// Where the tables cannot be read.
    pub fn new(
        maps: M,
        limits: Limits,
        interfaces: Interfaces,
        configuration: Configuration,
    ) -> Result<Self> {
        let now = Instant::now();
        // Small tables are written soon, and collide more.
        let plan = plan::Config {
            external_ips: ExternalIps::Serve,
            maglev_lengths: &[31],
            world: match configuration {
                Configuration::Usual => World::Known,
                Configuration::Masquerading => World::Unknown { kept: kept()? },
            },
            ..plan::Config::default()
        };
        let config = Config { node: NODE.into(), limits, plan, grace: Duration::ZERO, clock: clock::seconds };
        let mut reconciler = Reconciler::restore(maps, &config, now)?;
        reconciler.synced();
        Ok(Self { reconciler, interfaces, told: BTreeMap::new(), now })
    }

    /// Takes one change in and writes all that follows from it.
    ///
    /// # Errors
    /// Where the object makes no sense to the agent, or the tables refuse.
    pub fn apply(&mut self, object: &Value) -> Result<()> {
        let change = change(object)?;
        if let Change::Pod(name, Some(pod)) = &change
            && &*pod.node == NODE
        {
            let interface = self.interfaces.pods.get(&*name.name).copied();
            for addr in &pod.addresses {
                let interface = interface.with_context(|| format!("no interface is there for pod {name}"))?;
                self.tell(addr.ip(), interface, Change::LocalRoute);
            }
        }
        if let Change::Node(name, Some(node)) = &change
            && &**name == NODE
        {
            for addr in &node.addresses {
                self.tell(addr.ip(), self.interfaces.device, Change::LocalAddress);
            }
        }
        self.reconciler.handle(change, self.now);
        self.settle()
    }

    /// What the kernel says of an address, once.
    fn tell(
        &mut self,
        addr: IpAddr,
        interface: u32,
        change: impl FnOnce(ferroflow_common::addr::Addr, Option<u32>) -> Change,
    ) {
        if self.told.insert(addr, interface) != Some(interface) {
            self.reconciler.handle(change(addr.into(), Some(interface)), self.now);
        }
    }

    fn settle(&mut self) -> Result<()> {
        while let Some(due) = self.reconciler.due().filter(|_| self.reconciler.failing().next().is_none()) {
            self.now = self.now.max(due);
            self.reconciler.tick(self.now);
        }
        if let Some((key, error)) = self.reconciler.failing().next() {
            bail!("{key}: {error}");
        }
        Ok(())
    }

    pub fn interfaces(&self) -> &Interfaces {
        &self.interfaces
    }

    pub fn maps(&self) -> &M {
        self.reconciler.maps()
    }
}

fn kept() -> Result<Box<[Prefix]>> {
    let prefix = |text: &&str| {
        let (addr, length) = text.split_once('/').context("no range")?;
        Prefix::new(addr.parse::<IpAddr>()?.into(), length.parse()?).context("no range")
    };
    KEPT.iter().map(prefix).collect()
}

/// What an object, or one that has `gone: true`, is to the agent.
///
/// # Errors
/// Where it makes no sense to the agent.
pub fn change(object: &Value) -> Result<Change> {
    let kind = match object["kind"].as_str().unwrap_or_default() {
        "Service" => Kind::Service,
        "EndpointSlice" => Kind::EndpointSlice,
        "Node" => Kind::Node,
        "Pod" => Kind::Pod,
        "ServiceCIDR" => Kind::ServiceCidr,
        "Namespace" => Kind::Namespace,
        "NetworkPolicy" => Kind::NetworkPolicy,
        "ClusterNetworkPolicy" => Kind::ClusterNetworkPolicy,
        other => bail!("no such kind: {other}"),
    };
    if object["gone"] == true {
        let text = |field: &str| object["metadata"][field].as_str().unwrap_or("default");
        return Ok(ObjectId { kind, name: Name::new(text("namespace"), text("name")) }.gone());
    }
    let read = || object.clone();
    let change = match kind {
        Kind::Service => convert::service(&serde_json::from_value(read())?),
        Kind::EndpointSlice => convert::endpoint_slice(&serde_json::from_value(read())?, NODE),
        Kind::Node => convert::node(&serde_json::from_value(read())?),
        Kind::Pod => convert::pod(&serde_json::from_value(read())?),
        Kind::ServiceCidr => convert::service_cidr(&serde_json::from_value(read())?),
        Kind::Namespace => policy::namespace(&serde_json::from_value(read())?),
        Kind::NetworkPolicy => policy::network_policy(&serde_json::from_value(read())?),
        Kind::ClusterNetworkPolicy => {
            cluster_policy::cluster_network_policy(&serde_json::from_value(read())?)
        }
    };
    change.with_context(|| object.to_string())
}
