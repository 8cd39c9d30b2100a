//! Tests on other kernels: boots each in QEMU with an initramfs that holds the tests, and counts what they say.
//!
//! ```text
//!  kernel (Debian's package) -> modules (in the order to load them) -> cpio (with the static binaries) -> guest (QEMU)
//! ```

mod cpio;
mod guest;
mod kernel;
mod modules;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::compile::{self, Built, Profile};
use crate::test::Tally;
use crate::toolchain::{Toolchain, output, succeed};
use crate::vm::cpio::Archive;

pub(crate) use kernel::{KERNELS, Kernel, named};

/// What to do on which kernels.
pub(crate) struct Plan {
    pub(crate) kernels: Vec<Kernel>,
    /// Write the table of verified instructions instead of comparing with it.
    pub(crate) update: bool,
    pub(crate) tests: Tests,
}

/// Which tests run there, after the programs were loaded and verified.
pub(crate) enum Tests {
    Chosen,
    /// Of those what kernels differ in, in a few minutes.
    Few,
    /// All those whose name contains this.
    Named(String),
    None,
}

/// The table, from the workspace's root.
const TABLE: &str = "bpf-tests/verified.json";
const QEMU: &str = "qemu-system-x86_64";
/// The files of tests that run there, and which of a file: all, or few that together use every hook and path of the
/// programs, because an emulated machine takes half a minute for each.
const TESTS: [(&str, &[&str]); 7] = [
    ("programs", &[]),
    ("sctp", &[]),
    (
        "wire",
        &[
            "the_packet_path_alone_serves",
            "the_socket_path_serves_udp",
            "clsact_serves",
            "udp_from_one_port_leaves_a_removed_backend",
        ],
    ),
    ("north_south", &["rule_26_a_node_port_reaches_every_backend_by_masquerade"]),
    ("overlay", &["vxlan_pods_services_and_hosts_across_nodes"]),
    ("restart", &["kill_9_loses_nothing_on_the_packet_path"]),
    (NETKIT, &[]),
];
/// For kernels that have it.
const NETKIT: &str = "netkit";
/// Of these, what CI has time for, by kernel: clsact on the oldest and tcx on the newest, which both redirect to pods and
/// to neighbours; and SCTP sockets, which the machine itself may lack.
const FEW: [(&str, &str, &str); 5] = [
    ("5.10", "wire", "clsact_serves"),
    ("5.10", "north_south", "rule_26_a_node_port_reaches_every_backend_by_masquerade"),
    ("5.10", "sctp", ""),
    ("6.12", "wire", "the_packet_path_alone_serves"),
    ("6.12", "sctp", ""),
];
/// How long a machine may run: hours would pass before anyone looks, were it to hang.
const LIMIT: Duration = Duration::from_secs(3600);
/// Without all the tests that were chosen.
const SHORT_LIMIT: Duration = Duration::from_secs(1500);
/// One test at a time, without the one that is not about the kernel: it shows what the object says of its maps, through
/// a program of the host.
const ALONE: &str = "--test-threads 1 --skip bpftool_shows_the_tables_by_name";

/// For CI: the oldest kernel and the newest load and verify every program, and run a few tests. What this machine cannot
/// get is skipped, and said.
pub(crate) fn part(toolchain: &Toolchain) -> Result<Tally> {
    let skip = |what: &str, error: &anyhow::Error| {
        println!("SKIP {what}: {error:#}");
        Tally { skipped: 1, ..Tally::default() }
    };
    if let Err(error) = install_qemu() {
        return Ok(skip("other kernels", &error));
    }
    let (mut tally, mut kernels) = (Tally::default(), Vec::new());
    for kernel in [KERNELS[0], KERNELS[KERNELS.len() - 1]] {
        match kernel::image(kernel) {
            Ok(_image) => kernels.push(kernel),
            Err(error) => tally += skip(&format!("kernel {}", kernel.version), &error),
        }
    }
    if !kernels.is_empty() {
        tally += run(toolchain, &Plan { kernels, update: false, tests: Tests::Few });
    }
    Ok(tally)
}

/// Runs the plan on one kernel after the other, also after one failed.
pub(crate) fn run(toolchain: &Toolchain, plan: &Plan) -> Tally {
    match prepare(toolchain) {
        Ok(programs) => plan.kernels.iter().map(|kernel| one(toolchain, plan, *kernel, &programs)).sum(),
        Err(error) => {
            eprintln!("error: {error:#}");
            Tally::failure(format!("{error:#}"))
        }
    }
}

fn one(toolchain: &Toolchain, plan: &Plan, kernel: Kernel, programs: &Programs) -> Tally {
    println!("\n== kernel {}", kernel.version);
    let start = Instant::now();
    let tally = boot(toolchain, plan, kernel, programs).unwrap_or_else(|error| {
        eprintln!("error: kernel {}: {error:#}", kernel.version);
        Tally::failure(format!("kernel {}: {error:#}", kernel.version))
    });
    println!("kernel {}: {tally}, {:.0} s", kernel.version, start.elapsed().as_secs_f64());
    tally
}

fn boot(toolchain: &Toolchain, plan: &Plan, kernel: Kernel, programs: &Programs) -> Result<Tally> {
    let image = kernel::image(kernel)?;
    let (modules, lacking) = modules::in_order(&image.modules, &modules::WANTED)?;
    for name in lacking {
        println!("kernel {} has no module {name}", kernel.version);
    }
    let dir = toolchain.target("vm");
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let table = toolchain.root().join(TABLE);
    let commands = commands(plan, kernel);
    let archive = archive(programs, &modules, &commands, &read(&table)?)?;
    let initrd = dir.join(format!("initrd-{}", kernel.version));
    fs::write(&initrd, archive).with_context(|| format!("cannot write {}", initrd.display()))?;
    let returned = dir.join(format!("verified-{}.json", kernel.version));
    let limit = if matches!(plan.tests, Tests::Chosen) { LIMIT } else { SHORT_LIMIT };
    let mut tally = guest::run((&image.vmlinuz, &initrd), &returned, limit)?;
    fs::remove_file(&initrd).with_context(|| format!("cannot remove {}", initrd.display()))?;
    // A name that has changed would match nothing, and no test would fail.
    let least = if let Tests::Named(_) = plan.tests { 2 } else { commands.lines().count() };
    if tally.passed + tally.failed < least {
        let few = format!("{} tests ran, at least {least} should have", tally.passed + tally.failed);
        eprintln!("error: {few}");
        tally += Tally::failure(few);
    }
    if plan.update {
        // A serial port ends lines as terminals do.
        let text = String::from_utf8_lossy(&read(&returned)?).replace('\r', "");
        fs::write(&table, text).with_context(|| format!("cannot write {}", table.display()))?;
    }
    Ok(tally)
}

fn commands(plan: &Plan, kernel: Kernel) -> String {
    let verify = if plan.update { "verify --update" } else { "verify" };
    let mut commands = format!("{verify} --repeat 0 --table verified.json\n");
    let few =
        FEW.iter().filter(|(version, ..)| matches!(plan.tests, Tests::Few) && *version == kernel.version);
    for (_, file, test) in few {
        let which = if test.is_empty() { ALONE.to_owned() } else { format!("--exact {test}") };
        commands += &format!("{file} {which}\n");
    }
    for (file, chosen) in TESTS.into_iter().filter(|(file, _)| *file != NETKIT || kernel.has_netkit) {
        match &plan.tests {
            Tests::Named(filter) => commands += &format!("{file} {ALONE} {filter}\n"),
            Tests::Chosen if chosen.is_empty() => commands += &format!("{file} {ALONE}\n"),
            Tests::Chosen => commands.extend(chosen.iter().map(|test| format!("{file} --exact {test}\n"))),
            Tests::Few | Tests::None => {}
        }
    }
    commands
}

/// What runs in the machine, by the name of its file there, and the object.
struct Programs {
    files: BTreeMap<String, PathBuf>,
    object: PathBuf,
}

/// Builds what runs in the machine, and installs QEMU where it is missing.
fn prepare(toolchain: &Toolchain) -> Result<Programs> {
    install_qemu()?;
    let built = compile::run(toolchain, Profile::Dev)?;
    let [(_, object), (_, agent)] = built.env();
    let mut files = BTreeMap::from([("ferroflow".to_owned(), agent.to_owned())]);
    files.extend(executables(toolchain, &built)?);
    let dir = toolchain.target("vm").join("bin");
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    for (name, path) in &mut files {
        let stripped = dir.join(name);
        // Most of it is debug information, which would fill the machine's memory.
        succeed(Command::new("strip").arg("-o").args([&stripped, &*path]))?;
        *path = stripped;
    }
    Ok(Programs { files, object: object.to_owned() })
}

/// Of bpf-tests, with its programs: name and path, from the lines of JSON that cargo writes.
fn executables(toolchain: &Toolchain, built: &Built) -> Result<BTreeMap<String, PathBuf>> {
    let mut cargo = built.cargo(toolchain, "test")?;
    cargo.args(["--no-run", "--message-format", "json-render-diagnostics"]);
    TESTS.iter().for_each(|(file, _)| _ = cargo.args(["--test", file]));
    let text = output(&mut cargo).context("the tests do not build")?;
    let wanted: Vec<_> = TESTS.iter().map(|(file, _)| *file).chain(["init", "verify"]).collect();
    let used = |(name, _): &(String, PathBuf)| wanted.contains(&name.as_str());
    Ok(text.lines().filter_map(executable).filter(used).collect())
}

fn executable(line: &str) -> Option<(String, PathBuf)> {
    let string = |key: &str, text: &str| {
        let (_, rest) = text.split_once(&format!("\"{key}\":\""))?;
        Some(rest.split_once('"')?.0.to_owned())
    };
    let target = line.split_once("\"target\":")?.1;
    Some((string("name", target)?, string("executable", line)?.into()))
}

fn install_qemu() -> Result<()> {
    if output(Command::new(QEMU).arg("--version")).is_ok() {
        eprintln!("present    {QEMU}");
        return Ok(());
    }
    eprintln!("missing    {QEMU}: installing the package qemu-system-x86");
    let mut apt = Command::new("apt-get");
    apt.args(["--quiet", "--quiet", "--yes", "--no-install-recommends", "install", "qemu-system-x86"]);
    succeed(apt.env("DEBIAN_FRONTEND", "noninteractive"))
        .with_context(|| format!("{QEMU} cannot be installed; install it (as root) and run this again"))?;
    eprintln!("installed  {QEMU}");
    Ok(())
}

fn archive(
    programs: &Programs,
    modules: &[modules::Module],
    commands: &str,
    table: &[u8],
) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for dir in ["dev", "vm", "vm/bin", "vm/modules.d"] {
        archive.directory(dir);
    }
    let mut order = String::new();
    for module in modules {
        let path = format!("vm/modules.d/{}", module.name);
        archive.file(&path, &module.bytes);
        order += &format!("/{path}\n");
    }
    archive.file("vm/modules", order.as_bytes());
    archive.file("vm/commands", commands.as_bytes());
    archive.file("vm/verified.json", table);
    archive.file("vm/object", &read(&programs.object)?);
    for (name, path) in &programs.files {
        let place = if name == "init" { name.clone() } else { format!("vm/bin/{name}") };
        archive.file(&place, &read(path)?);
    }
    Ok(archive.finish())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}
