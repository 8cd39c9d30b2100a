//! Associations of real SCTP sockets through services. Hosts seldom have SCTP; the kernels of `cargo xtask vm` do.
#![forbid(unsafe_code)]

use std::{net::SocketAddr, process::ExitCode};

use anyhow::{Result, ensure};
use bpf_tests::{
    agent::Agent,
    checks::{self, World},
    cluster::{Cluster, Family},
    manifests::Endpoint,
    pod::sctp,
    runner,
    sandbox::Sandbox,
    traffic::{Ask, Protocol},
};

fn main() -> ExitCode {
    runner::main(&[
        ("associations_through_a_cluster_ip", associations_through_a_cluster_ip),
        ("associations_through_a_node_port", associations_through_a_node_port),
    ])
}

const NODE_PORT: u16 = 30132;
const REQUESTS: u32 = 40;

/// From 132 to 8132, which changes the CRC32c; every answer comes from the ClusterIP, to a client with its own address.
fn associations_through_a_cluster_ip(sandbox: &Sandbox) -> Result<()> {
    if !sctp::is_there()? {
        return runner::kernel_lacks("associations_through_a_cluster_ip", "SCTP");
    }
    World::test(sandbox, &[], |world| {
        for family in Family::BOTH {
            for from in ["a1", "b1"] {
                world.spread(from, Protocol::Sctp, family).into_result()?;
            }
        }
        Ok(())
    })
}

/// From outside, masqueraded, to backends on this node and another.
fn associations_through_a_node_port(sandbox: &Sandbox) -> Result<()> {
    if !sctp::is_there()? {
        return runner::kernel_lacks("associations_through_a_node_port", "SCTP");
    }
    let cluster = Cluster::with_pods(sandbox, &["a", "b", "c"], 1)?;
    let web = checks::service("web", 10);
    let port = format!("    port: {}\n", checks::SCTP_SERVICE_PORT);
    let yaml = web
        .yaml()
        .replace("type: ClusterIP", "type: NodePort")
        .replace(&port, &format!("{port}    nodePort: {NODE_PORT}\n"));
    ensure!(yaml.contains(&NODE_PORT.to_string()), "no NodePort in\n{yaml}");
    cluster.manifests().write_cluster(&cluster)?;
    cluster.manifests().write("service-web", &yaml)?;
    cluster
        .manifests()
        .write_endpoints(&web, &Endpoint::ready(["a1", "b1"].map(|name| cluster.pod(name))))?;
    let mut agents = Vec::new();
    for name in ["a", "b"] {
        let mut agent = Agent::start(cluster.node(name), &[])?;
        agent.wait_synced()?;
        agents.push(agent);
    }
    for family in Family::BOTH {
        for node in ["a", "b"] {
            let node = cluster.node(node);
            let addr = match family {
                Family::V4 => node.v4.into(),
                Family::V6 => node.v6.into(),
            };
            let target = SocketAddr::new(addr, NODE_PORT);
            let outcomes =
                cluster.pod("c1").ask(&Ask::new(Protocol::Sctp, target).count(REQUESTS).strict())?;
            let by = checks::tally(&outcomes, target, addr)?;
            ensure!(by.keys().eq(["a1", "b1"]), "{target}: {by:?}");
        }
    }
    Ok(())
}
