//! Hundreds of random policies of both kinds through the agent's stages into the kernel's tables, and packets of TCP, UDP
//! and SCTP through the program on pods' interfaces (`BPF_PROG_TEST_RUN`), held to the oracle. No SCTP socket is needed.
#![forbid(unsafe_code)]

use std::{collections::BTreeMap, net::IpAddr, process::ExitCode};

use anyhow::{Result, ensure};
use bpf_tests::{
    oracle::{
        Answer, Flow, Oracle, Way,
        case::{Asked, Compiled, NODE},
        random::{self, ADDRESSES, PORTS},
    },
    run::{Action, DEFAULTS, Program, Programs},
    runner,
    sandbox::Sandbox,
};
use ferroflow_common::{
    addr::Addr,
    tcp::{Flags, chunk},
};
use ferroflow_ebpf::{frame::Frame, noise::Noise};

fn main() -> ExitCode {
    runner::main(&[(
        "rules_43_to_53_hundreds_of_policies_hold_over_every_protocol",
        rules_43_to_53_hundreds_of_policies_hold_over_every_protocol,
    )])
}

const POLICIES: usize = 400;
/// After each change of a policy.
const PROBES: usize = 40;
const PROTOCOLS: [&str; 3] = ["TCP", "UDP", "SCTP"];

fn rules_43_to_53_hundreds_of_policies_hold_over_every_protocol(sandbox: &Sandbox) -> Result<()> {
    let mut programs = Programs::load(&sandbox.place()?, DEFAULTS)?;
    let mut agent = Compiled::restore(programs.maps()?)?;
    let (mut oracle, mut noise) = (Oracle::default(), Noise(1));
    let (mut policies, mut asked) = (0, BTreeMap::<&str, Asked>::new());
    while policies < POLICIES {
        let object = random::object(&mut noise);
        oracle.apply(&object);
        agent.handle(&object)?;
        agent.settle()?;
        let kind = object["kind"].as_str().unwrap_or_default();
        if kind.ends_with("NetworkPolicy") && object["gone"] != true {
            policies += 1;
            programs.set_tracked(&BTreeMap::new())?;
            probe(&oracle, &mut programs, &mut noise, &mut asked)?;
        }
    }
    println!("{policies} policies: {asked:?}");
    for protocol in PROTOCOLS {
        let asked = asked.get(protocol).copied().unwrap_or_default();
        let fewest = asked.passes.min(asked.dropped);
        ensure!(fewest > 500, "{protocol}: one answer hardly occurs: {asked:?}");
    }
    Ok(())
}

/// First packets of flows that pods of this node open.
fn probe(
    oracle: &Oracle,
    programs: &mut Programs,
    noise: &mut Noise,
    asked: &mut BTreeMap<&'static str, Asked>,
) -> Result<()> {
    let pods = oracle.pods_on(NODE);
    let pods: Vec<_> = pods.iter().filter(|(_, addresses)| !addresses.is_empty()).collect();
    for source_port in (40_000..).take(PROBES) {
        let Some((pod, own)) = pods.get(noise.below(pods.len().max(1))) else { return Ok(()) };
        let own = own[noise.below(own.len())];
        // Half of them to another pod of this node, which is asked, too.
        let (_, other) = pods[noise.below(pods.len())];
        let near = other[noise.below(other.len())];
        let peer: IpAddr = if noise.percent(50) { near } else { noise.pick(&ADDRESSES).parse()? };
        if peer.is_unspecified() || peer.is_ipv4() != own.is_ipv4() {
            continue;
        }
        let (protocol, port) = (noise.pick(&PROTOCOLS), noise.pick(&PORTS));
        let mut answer = oracle.ask(pod, Way::Out, Flow { peer, protocol, port });
        let to = pods.iter().find(|(_, addresses)| addresses.contains(&peer));
        if let Some((to, _)) = to.filter(|_| answer != Answer::Dropped) {
            let inward = oracle.ask(to, Way::In, Flow { peer: own, protocol, port });
            answer = if inward == Answer::Passes { answer } else { inward };
        }
        if peer == own {
            answer = Answer::Passes;
        }
        let (from, to) = ((Addr::from(own), source_port), (Addr::from(peer), port));
        let packet = match protocol {
            "TCP" => Frame::tcp(from, to, Flags::SYN),
            "UDP" => Frame::udp(from, to),
            _ => Frame::sctp(from, to, chunk::INIT),
        };
        let (action, _) = programs.run(Program::PodEgress, &packet.build())?;
        let dropped = action == Action::Drop;
        ensure!(
            dropped == (answer == Answer::Dropped),
            "{} -> {peer} {protocol} {port}: {action:?}, and the oracle says {answer:?}",
            pod["metadata"]["name"]
        );
        asked.entry(protocol).or_default().count(answer);
    }
    Ok(())
}
