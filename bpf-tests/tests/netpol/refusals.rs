//! ICMP errors about flows that policies let pass, where they let nothing else pass.

use std::{
    io::ErrorKind,
    net::{SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use bpf_tests::{
    checks::World,
    cluster::{Family, Pod},
    patience::stretched,
    sandbox::Sandbox,
};
use serde_json::json;

use crate::objects::{Objects, SOON, app, policy};

/// Nobody listens there.
const CLOSED: u16 = 9_999;
/// Until a refusal is there.
const PATIENCE: Duration = Duration::from_millis(500);

/// Clients that may send to one port and get nothing, servers that may get that and send nothing: a client still learns that
/// its port is closed, on its own node and on another one.
pub(crate) fn rule_37_errors_reach_and_leave_isolated_pods(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| {
        let mut objects = Objects::new(world)?;
        let both = json!(["Ingress", "Egress"]);
        let ports = json!([{"ports": [{"protocol": "UDP", "port": CLOSED}]}]);
        for namespace in ["shop", "pay"] {
            let client = json!({"podSelector": app("client"), "egress": ports, "policyTypes": both});
            let server = json!({"podSelector": app("db"), "ingress": ports, "policyTypes": both});
            objects.apply(&policy(namespace, "client", client))?;
            objects.apply(&policy(namespace, "server", server))?;
        }
        // Echoes and all other ports are dropped by now.
        objects.agree()?;
        for (from, to) in [("a1", "a2"), ("a1", "b2"), ("b1", "a2"), ("b1", "b2")] {
            for family in Family::BOTH {
                let target = SocketAddr::new(world.cluster.pod(to).ip(family), CLOSED);
                refused(world.cluster.pod(from), target).with_context(|| format!("{from} -> {target}"))?;
            }
        }
        Ok(())
    })
}

/// Hosts answer no more than so many packets a second with errors: it is asked until it does.
fn refused(from: &Pod, target: SocketAddr) -> Result<()> {
    let any = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = from.netns.run(move |_| UdpSocket::bind(any))??;
    socket.connect(target)?;
    socket.set_read_timeout(Some(stretched(PATIENCE)))?;
    let deadline = Instant::now() + stretched(SOON);
    loop {
        let seen = socket.send(b"anybody?").and_then(|_| socket.recv(&mut [0; 16]));
        match seen {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => return Ok(()),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            other => bail!("{other:?}, not a refusal"),
        }
        ensure!(Instant::now() < deadline, "nothing is heard of it");
    }
}
