//! What contributors run: one verb per task, each doing what it needs first.

#![forbid(unsafe_code)]

mod bench;
mod chart;
mod ci;
mod compile;
mod demo;
mod fuzz;
mod image;
mod layers;
mod live;
mod memory;
mod paths;
mod privileged;
mod setup;
mod test;
mod toolchain;
mod verify;
mod vm;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::compile::Profile;
use crate::test::Scope;
use crate::toolchain::Toolchain;

/// Builds, tests and shows Ferroflow.
///
/// Every verb first does what it needs: on a fresh machine `cargo xtask demo` installs the BPF linker, builds the
/// programs and the agent, and runs them.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", after_help = NO_TOOLCHAIN)]
struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Install what building needs: the pinned Rust toolchain and bpf-linker
    ///
    /// Prints one line per thing, and does nothing where it is present. The linker is kept in
    /// ${XDG_CACHE_HOME:-~/.cache}/ferroflow, one per version of linker and toolchain, shared by all clones.
    Setup,
    /// Build the BPF object, then the static binary `ferroflow` with the object inside
    Build {
        /// Optimise the binary too (the object always is)
        #[arg(long)]
        release: bool,
    },
    /// Show a service working between network namespaces, in half a minute; needs root
    Demo {
        /// Passed to the demo; see `cargo xtask demo --help` after `--`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Run the tests: units and doc tests, then the programs in the kernel
    ///
    /// The second half needs root. BPF_TESTS=skip lets its tests skip what this machine cannot do; each skip is
    /// printed and counted, never silent.
    ///
    /// With --kubeconfig it tests a real cluster instead, which has Ferroflow from the chart: in a namespace of its own it
    /// asks every kind of Service from pods and nodes, with policies, while endpoints change and while an agent is
    /// made anew. That needs no root.
    Test {
        /// Only what needs neither root nor a BPF linker
        #[arg(long)]
        unit: bool,
        /// Test the cluster that these credentials of an administrator are for
        #[arg(long, value_name = "FILE", conflicts_with_all = ["unit", "filter"])]
        kubeconfig: Option<PathBuf>,
        /// Passed on with --kubeconfig: --image, --namespace, --agents, --timeout, --keep; `-- --help` explains them
        #[arg(last = true, requires = "kubeconfig")]
        args: Vec<String>,
        /// Run only tests whose name contains this
        filter: Option<String>,
    },
    /// Show what the programs cost the verifier, the stack and a packet; fails where they grew; needs root
    ///
    /// Verified instructions are compared with bpf-tests/verified.json, where this kernel has a row there.
    Verify {
        /// Passed on: `--update` writes this kernel's row; see `cargo xtask verify -- --help`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Feed mutated packets, documents and requests to the programs and the agent, for as long as asked; needs root
    ///
    /// `cargo xtask test` runs a short one. The seeds are in bpf-tests/corpus.
    Fuzz {
        /// Passed on: --minutes, --seed
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Verify and test the programs on other kernels, each booted in QEMU
    ///
    /// The kernels are Debian's, downloaded once through apt (and QEMU, where it is missing). Loads every program with
    /// every combination of load-time constants, then runs the packet tables and a choice of the tests on the wire.
    Vm {
        /// Of which kernels [default: all]
        #[arg(long, value_name = "VERSIONS", value_delimiter = ',', value_parser = vm::named)]
        kernel: Vec<vm::Kernel>,
        /// Write the kernels' rows of bpf-tests/verified.json instead of comparing with them
        #[arg(long)]
        update: bool,
        /// Load and verify the programs, and run no tests; CI does so on the oldest and the newest kernel
        #[arg(long, conflicts_with = "filter")]
        load_only: bool,
        /// Run all tests whose name contains this, and none of the choice
        filter: Option<String>,
    },
    /// Measure beside plain routing and kube-proxy's rules, optimised, in ten minutes or (`--quick`) two; needs root
    ///
    /// One line of JSON per figure, a table with the budgets, and charts in target/bench. Numbers never fail it.
    Bench {
        /// Passed to the bench: --quick, --full, --sizes, --control, --pairs; `cargo xtask bench -- --help` explains them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Measure what an optimised agent has resident, idle and with 100,000 endpoints and 20,000 pods; needs root
    ///
    /// Fails where that is more than 20 and 60 MB.
    Memory,
    /// Let things come and go, agents die and their API fail, under traffic; fails where something is lost or left
    ///
    /// Of rows, leases, interfaces, pins and open files. Needs root; a minute, or `-- --minutes N`.
    Soak {
        /// Passed on: `--minutes`, `--seed`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Lint the Helm chart, render it with many values, check the objects and the flags in them, and pack it
    ///
    /// It needs python3 with venv; Helm itself is installed there as a library, once.
    Chart,
    /// Write the container image as a tar for `ctr images import`, `docker load` and `podman load`
    ///
    /// It needs no container engine. The same commit gives the same bytes.
    Image(image::Options),
    /// Check the architecture: who may import whom, file names, where `unsafe` may stand
    Layers,
    /// Run what CI runs: format, lints, layers, tests, demo
    Ci,
}

const NO_TOOLCHAIN: &str = "\
xtask itself runs under whatever Rust you have; what it builds is built with the one that xtask/rust-toolchain.toml
pins, which it installs. For cargo by hand: `cargo +VERSION ..`.";

fn main() -> ExitCode {
    run(Args::parse().verb).unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(verb: Verb) -> anyhow::Result<ExitCode> {
    let toolchain = Toolchain::pinned()?;
    match verb {
        Verb::Setup => {
            setup::run(&toolchain)?;
        }
        Verb::Build { release } => {
            let profile = if release { Profile::Release } else { Profile::Dev };
            println!("{}", compile::run(&toolchain, profile)?);
        }
        Verb::Demo { args } => return demo::run(&toolchain, "demo", &args),
        Verb::Fuzz { args } => return fuzz::run(&toolchain, &args),
        Verb::Verify { args } => return verify::run(&toolchain, &args),
        Verb::Vm { kernel, update, load_only, filter } => {
            let kernels = if kernel.is_empty() { vm::KERNELS.to_vec() } else { kernel };
            let tests = match filter {
                Some(filter) => vm::Tests::Named(filter),
                None if load_only => vm::Tests::None,
                None => vm::Tests::Chosen,
            };
            return Ok(vm::run(&toolchain, &vm::Plan { kernels, update, tests }).report());
        }
        Verb::Bench { args } => return bench::run(&toolchain, &args),
        Verb::Test { kubeconfig: Some(kubeconfig), args, .. } => {
            return live::run(&toolchain, &kubeconfig, &args);
        }
        Verb::Test { unit, filter, kubeconfig: None, args: _ } => {
            let scope = if unit { Scope::Unit } else { Scope::All };
            return Ok(test::run(&toolchain, scope, filter.as_deref()).report());
        }
        Verb::Memory => return memory::run(&toolchain),
        Verb::Soak { args } => return demo::run(&toolchain, "soak", &args),
        Verb::Chart => chart::run(&toolchain)?,
        Verb::Image(options) => image::run(&toolchain, &options)?,
        Verb::Layers => layers::run(toolchain.root())?,
        Verb::Ci => return ci::run(&toolchain),
    }
    Ok(ExitCode::SUCCESS)
}
