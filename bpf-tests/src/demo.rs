//! Two nodes on this machine, a real agent on each, and a table of what services do there.

use std::{process::ExitCode, time::Instant};

use anyhow::{Result, ensure};
use clap::Parser;
use nix::unistd::geteuid;

use crate::{
    checks::{Check, World},
    cluster::Family,
    forwarded::From,
    pod,
    sandbox::Sandbox,
    traffic::Protocol,
};

/// Services of a two-node cluster of network namespaces on this machine, with the real agent on each node.
#[derive(Debug, Parser)]
#[command(name = "demo")]
struct Cli {
    /// Further arguments of the agents, such as `--socket-lb off`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    agent_args: Vec<String>,
}

pub fn main() -> ExitCode {
    pod::run_if_asked();
    match run(&Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<ExitCode> {
    ensure!(geteuid().is_root(), "network namespaces and BPF programs need root");
    let sandbox = Sandbox::enter()?;
    sandbox.exit_on_signals()?;
    let start = Instant::now();
    let agent_args: Vec<_> = cli.agent_args.iter().map(String::as_str).collect();
    let mut world = World::new(&sandbox, &agent_args)?;
    world.forward()?;
    println!("Two nodes with two pods and an agent each, ready in {:.1} s.\n", start.elapsed().as_secs_f64());

    print_row(["STEP", "FROM", "TO", "EXPECTED", "SEEN", "OK"]);
    let mut checks = Vec::new();
    for check in steps() {
        let check = check(&world);
        print_check(&check);
        checks.push(check);
    }
    print_tables(&world)?;

    let passed = checks.iter().filter(|check| check.seen.is_ok()).count();
    if passed < checks.len() {
        eprintln!("{}", world.logs());
    }
    println!("demo: {} checks, {passed} passed", checks.len());
    Ok(if passed == checks.len() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

type Step = Box<dyn Fn(&World) -> Check>;

/// In order: the last ones change the service, and put a policy before its backend.
fn steps() -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    for protocol in [Protocol::Http, Protocol::Dns] {
        for family in Family::BOTH {
            for from in ["a1", "b1"] {
                steps.push(Box::new(move |world| world.spread(from, protocol, family)));
            }
        }
    }
    for protocol in [Protocol::Http, Protocol::Dns] {
        for family in Family::BOTH {
            steps.push(Box::new(move |world| world.refusal("a1", protocol, family)));
        }
    }
    for family in Family::BOTH {
        steps.push(Box::new(move |world| world.loopback(family)));
    }
    for family in Family::BOTH {
        steps.push(Box::new(move |world| world.node_port(family)));
    }
    for family in Family::BOTH {
        steps.push(Box::new(move |world| world.local_policy(family)));
    }
    for family in Family::BOTH {
        steps.push(Box::new(move |world| world.affinity(family)));
    }
    for family in Family::BOTH {
        for (from, protocol) in [
            (From::Outside, Protocol::Http),
            (From::Outside, Protocol::Dns),
            (From::Pod("a1"), Protocol::Http),
            (From::Pod("b1"), Protocol::Http),
            (From::Loopback, Protocol::Http),
        ] {
            steps.push(Box::new(move |world| world.forwarded(from, protocol, family)));
        }
    }
    steps.push(Box::new(World::scale_down));
    for family in Family::BOTH {
        for (from, protocol) in
            [("a1", Protocol::Http), ("b1", Protocol::Http), ("b2", Protocol::Http), ("a1", Protocol::Dns)]
        {
            steps.push(Box::new(move |world| world.guarded(from, protocol, family)));
        }
    }
    steps
}

fn print_check(check: &Check) {
    let Check { step, from, to, expected, seen } = check;
    match seen {
        Ok(seen) => print_row([step, from, to, expected, seen, "yes"]),
        Err(error) => print_row([step, from, to, expected, &format!("{error:#}"), "NO"]),
    }
}

fn print_row([step, from, to, expected, seen, ok]: [&str; 6]) {
    println!("{step:<18}  {from:<6}  {to:<20}  {expected:<27}  {seen:<33}  {ok}");
}

/// What the agent of the first node has programmed.
fn print_tables(world: &World) -> Result<()> {
    for agent in world.agents.iter().take(1) {
        for verb in [&["map", "dump", "frontends"][..], &["service", "list"], &["policy", "list"]] {
            println!("\n# ferroflow {}\n{}", verb.join(" "), agent.verb(verb)?.trim_end());
        }
    }
    println!();
    Ok(())
}
